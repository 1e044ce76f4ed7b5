"""Where figures come from: the machine, its limits, threads and versions."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from x_rope_cls import _C
from x_rope_cls._info import processor

from .threads import unpinned

_PACKAGES = ("x_rope_cls", "torch", "x-transformers", "timm", "rotary-embedding-torch", "numpy")
_LEAST_FLUSH_BYTES = 64 << 20


def describe(command: str, pinned: bool) -> dict[str, Any]:
    """The header of a run."""
    build = _C.build_info()
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "commit": _commit(),
        "machine": f"{processor()}, {platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "isa": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
        "pinned": pinned,
        "load_before": list(os.getloadavg()),
        "python": platform.python_version(),
        "compiler": f"{build['compiler']}, {build['build_type']}",
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def header_lines(header: dict[str, Any]) -> list[str]:
    """The header for people."""
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in header["versions"].items())
    pinned = "each pinned to one of its own" if header["pinned"] else "not pinned"
    load = " ".join(f"{value:.2f}" for value in header["load_before"])
    return [
        f"{header['machine']}; instruction set {header['isa']}; "
        f"{header['threads']} threads on {header['processors']} processors, {pinned}",
        f"{versions}; Python {header['python']}; {header['compiler']}; commit {header['commit']}",
        f"{header['command']}; {header['date']}; load average {load} before",
    ]


def measure_limits(seconds: float) -> dict[str, Any]:
    """Limits of this machine on as many threads as torch uses, see ``x_rope_cls._C.measure_limits``."""
    with unpinned():
        return dict(_C.measure_limits(seconds, torch.get_num_threads())["all_threads"])


def best_limits(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The best of each figure: whatever else the machine did while limits were measured only makes them lower."""

    def best(values: list[Any]) -> Any:
        return None if None in values else max(values)

    return {name: best([limits[name] for limits in measured]) for name in measured[0]}


def cache_flush() -> Callable[[], None]:
    """A function that leaves nothing of earlier work in the caches."""
    buffer = torch.zeros(max(_LEAST_FLUSH_BYTES, 4 * _last_level_cache()) // 4)

    def flush() -> None:
        buffer.add_(1.0)

    return flush


def _last_level_cache() -> int:
    """Bytes; 0 where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _C.build_info()["version"] if package == "x_rope_cls" else None


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
