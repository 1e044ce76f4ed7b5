"""Finds and loads the libraries with the C++ operators: for CPU tensors, and for CUDA tensors where torch has CUDA."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import torch

MINIMUM_TORCH = (2, 13)
_BUILD_HINT = (
    "build it with `pip install .`, or beside an installed torch with `pip install --no-build-isolation .`, "
    "in the source folder of x_rope_cls"
)


def library_path() -> Path:
    """Where the operators' library belongs."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    return Path(__file__).resolve().parent / "lib" / f"libx_rope_cls{suffix}"


def cuda_library_path() -> Path:
    """Where the operators' library for CUDA tensors belongs; a build without CUDA has none."""
    cpu = library_path()
    return cpu.with_name(f"{cpu.stem}_cuda{cpu.suffix}")


def load() -> None:
    """Registers the operators of namespace `x_rope_cls` with torch.

    Raises:
        ImportError: torch is too old, or the library is missing or does not load.
    """
    _check_torch(torch.__version__)
    path = library_path()
    if not path.exists():
        raise ImportError(f"x_rope_cls: the library {path} is missing: {_BUILD_HINT}")
    _load(path)
    if torch.version.cuda is not None and cuda_library_path().exists():
        _load(cuda_library_path())
    _warn_about_isa()


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(f"x_rope_cls: the library {path} does not load ({error}): {_BUILD_HINT}") from error


def _check_torch(version: str) -> None:
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or (int(match[1]), int(match[2])) < MINIMUM_TORCH:
        needed = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(
            f"x_rope_cls: torch must be {needed} or newer, got {version}: `pip install 'torch>={needed}'`"
        )


def _warn_about_isa() -> None:
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(f"x_rope_cls: the module _C does not load ({error}): {_BUILD_HINT}") from error
    message = _C.build_info()["cpu_isa_warning"]
    if message:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
