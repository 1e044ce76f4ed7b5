"""The CUDA kernels without a GPU: in the simulator of tests/cudasim, for CPU tensors.

Under `simulated_cuda` the operators of namespace ``x_rope_cls``, called with CPU tensors in whatever way (the public
functions, autograd, `torch.ops`), run the CUDA kernels. Every access outside the tensors of the call and its
workspace, read of shared memory that nobody wrote, copy that is not waited for, and so on, is an exception with the
simulator's report.

The simulator and the kernels are built on demand (nvcc 13, make, g++, cmake) into tests/cudasim/build and build/sim.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from x_rope_cls import projected

ROOT = Path(__file__).resolve().parent.parent
SIMULATOR = ROOT / "tests" / "cudasim" / "build" / "libcudasim.so"
BUILD = ROOT / "build" / "sim"
OPERATORS = (
    "rope",
    "rope_qk",
    "rope_table_grad",
    "rope_attention",
    "rope_attention_backward",
    "late_cls_pool",
    "late_cls_pool_backward",
)


class UnavailableError(Exception):
    """Why kernels cannot be simulated here."""


@contextlib.contextmanager
def simulated_cuda(*, race: bool = False, truncate: bool = False, stats: bool = False) -> Iterator[Simulator]:
    """Operators called with CPU tensors run the CUDA kernels in the simulator.

    Args:
        race: also look for races in shared memory; 3 to 10 times slower.
        truncate: add up as tensor cores do, cutting off digits instead of rounding.
        stats: count, see `Simulator.stats`.

    Raises:
        UnavailableError: something is missing here.
    """
    simulator = load()
    simulator.set_option("RACECHECK", "1" if race else "0")
    simulator.set_option("MMA", "truncate" if truncate else "")
    simulator.set_option("STATS", str(simulator.stats_path) if stats else "")
    simulator.library.cudasim_reset_stats()
    try:
        with cpu_kernels({name: getattr(torch.ops.x_rope_cls_sim, name).default for name in OPERATORS}):
            yield simulator
    finally:
        simulator.set_option("STATS", "")


class Simulator:
    """What tests need of tests/cudasim beyond the CUDA runtime."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.stats_path = BUILD / f"stats-{os.getpid()}.json"

    def set_option(self, name: str, value: str) -> None:
        """Sets what the environment variable CUDASIM_<name> sets at the start."""
        error = self.library.cudasim_set_option(name.encode(), value.encode())
        assert error == 0, f"cudasim refuses {name}={value!r}"

    def stats(self) -> list[dict[str, Any]]:
        """Counts of each kernel since the context was entered, see tests/cudasim/README.md."""
        self.library.cudasim_write_stats()
        kernels: list[dict[str, Any]] = json.loads(self.stats_path.read_text())["kernels"]
        self.stats_path.unlink()
        return kernels


@contextlib.contextmanager
def cpu_kernels(kernels: dict[str, Any]) -> Iterator[None]:
    """Replaces kernels of namespace x_rope_cls for CPU tensors, below autograd and autocast."""
    library = torch.library.Library("x_rope_cls", "IMPL")
    projected.devices.discard("cpu")  # its one call would go past what is replaced
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"[\s\S]*Overriding a previously registered kernel")
            for name, kernel in kernels.items():
                library.impl(name, kernel, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()
        projected.devices.add("cpu")


@functools.cache
def load() -> Simulator:
    """Builds what is missing or old, and loads it. Raises UnavailableError, again at every call."""
    simulator = ctypes.CDLL(str(build()))
    simulator.cudasim_set_option.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    torch.ops.load_library(BUILD / "tests" / "sim" / "libx_rope_cls_sim.so")
    result = Simulator(simulator)
    result.set_option("HOST_POINTERS", "1")
    result.set_option("THREADS", os.environ.get("CUDASIM_THREADS", "1"))
    return result


@functools.cache
def missing() -> str | None:
    """What is not there to build the simulator with, or None."""
    if not (ROOT / "CMakeLists.txt").exists():
        return "not a source tree"
    nvcc = find_nvcc()
    if nvcc is None:
        return "nvcc is not installed"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    if "release 13." not in version:
        return f"nvcc must be of CUDA 13, got {version.strip().splitlines()[-1] if version else 'none that runs'}"
    tools = [tool for tool in ("make", "g++", "cmake") if which(tool) is None]
    return f"{', '.join(tools)} not installed" if tools else None


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    return shutil.which("nvcc") or next((str(p) for h in homes if h and (p := Path(h) / "bin" / "nvcc").exists()), None)


def build() -> Path:
    """Brings the simulator and the kernels for it up to date; returns the simulator's library."""
    reason = missing()
    if reason is not None:
        raise UnavailableError(reason)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run("make", "-C", str(ROOT / "tests" / "cudasim"), "-j", jobs)
        # Of the CPU's kernels none is needed.
        options = ["-DX_ROPE_CLS_SIM=ON", "-DX_ROPE_CLS_PYTHON=OFF", "-DX_ROPE_CLS_ISAS=generic", "-DX_ROPE_CLS_CUDA=1"]
        ninja = which("ninja")
        options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        python = f"-DPython_EXECUTABLE={sys.executable}"
        _run("cmake", "-S", str(ROOT), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release", python, *options)
        _run("cmake", "--build", str(BUILD), "--parallel", jobs, "--target", "x_rope_cls_sim", "cuda_kernels_test")
    return SIMULATOR


def which(tool: str) -> str | None:
    return shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool)


def _run(tool: str, *arguments: str) -> None:
    result = subprocess.run(
        [str(which(tool)), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(f"{tool} {' '.join(arguments)}:\n{result.stdout[-4000:]}")
