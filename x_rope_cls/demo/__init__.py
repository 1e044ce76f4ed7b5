"""The demo: a small x-transformers encoder on two real data sets, with CLS in every way, and with a pool instead.

Run it with ``python -m x_rope_cls demo``; it needs the extra: ``pip install 'x_rope_cls[demo]'``.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Options", "require_packages", "run"]

# What is imported, and what it is called where packages are installed from.
_PACKAGES = {
    "x_transformers": "x-transformers",
    "sklearn": "scikit-learn",
    "aeon": "aeon",
    "matplotlib": "matplotlib",
    "rich": "rich",
}


@dataclass(frozen=True)
class Options:
    """What the command line sets.

    Attributes:
        quick: a few seconds in all: few recordings, one epoch, few rounds of timing.
        seeds: how many initialisations and orders of the training data; None: a default.
        epochs: passes over the training data of every task; None: a default for each task.
        out: folder for the picture, the text and the numbers.
        threads: of torch; None: as torch chooses.
    """

    quick: bool = False
    seeds: int | None = None
    epochs: int | None = None
    out: Path = Path("demo-output")
    threads: int | None = None


def require_packages() -> None:
    """Checks that everything the demo needs is installed.

    Raises:
        ImportError: names what is missing and the extra that brings it.
    """
    missing = [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        names = ", ".join(missing)
        raise ImportError(f"x_rope_cls demo: {names} must be installed, got none: `pip install 'x_rope_cls[demo]'`")


def run(options: Options) -> Path:
    """Trains, measures, prints the tables and saves them with a picture.

    Returns:
        The folder they are in.

    Raises:
        ImportError: a package that the demo needs is missing.
    """
    require_packages()
    from .main import run_demo

    return run_demo(options)
