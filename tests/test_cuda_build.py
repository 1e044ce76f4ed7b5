"""The CUDA library's build: what CMake accepts, what the library needs and exports, what the launchers call."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_sim
import pytest

ROOT = cuda_sim.ROOT
BUILD = ROOT / "build" / "cuda-sm80"  # one architecture; `make cuda-report` builds all

pytestmark = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="not a source tree")
needs_nvcc = pytest.mark.skipif(cuda_sim.missing() is not None, reason=str(cuda_sim.missing()))
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")


def configure(build: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("TORCH_CUDA_ARCH_LIST", "CUDACXX")}
    command = [str(cuda_sim.which("cmake")), "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
    command += ["-DX_ROPE_CLS_PYTHON=OFF", "-DX_ROPE_CLS_ISAS=generic", *options]
    result = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)
    result.stderr = " ".join(result.stderr.split())
    return result


def nm(path: Path, *options: str) -> list[str]:
    command = ["nm", "-C", *options, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_value_of_the_option(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DX_ROPE_CLS_CUDA=yes")
    assert result.returncode != 0
    assert "X_ROPE_CLS_CUDA must be 0, 1 or empty, got yes" in result.stderr


@pytest.mark.parametrize("forced", [True, False])
def test_old_nvcc(tmp_path: Path, forced: bool) -> None:
    """Refused where CUDA was asked for, left alone where it was not."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    options = [f"-DCMAKE_CUDA_COMPILER={nvcc}"] + ["-DX_ROPE_CLS_CUDA=1"] * forced
    result = configure(tmp_path / "build", *options, X_ROPE_CLS_CUDA="")
    assert f"nvcc must be 12.0 or newer, got 11.8 ({nvcc})" in (result.stderr if forced else result.stdout)
    assert (result.returncode != 0) == forced


@needs_nvcc
@pytest.mark.parametrize(
    ("requested", "answer"),
    [
        ("8.0;9.0+PTX", "CUDA kernels for sm_80, sm_90, compute_90"),
        ("8.6 12.0", "CUDA kernels for sm_86, sm_120"),
        ("9.0a", "CUDA kernels for sm_90a"),
        ("7.5;8.0", "TORCH_CUDA_ARCH_LIST must be of 8.0 or newer, got 7.5"),
        ("Ampere", "TORCH_CUDA_ARCH_LIST must be versions like 8.0 or 9.0+PTX, got Ampere"),
    ],
)
def test_architectures(tmp_path: Path, requested: str, answer: str) -> None:
    result = configure(tmp_path, "-DX_ROPE_CLS_CUDA=1", TORCH_CUDA_ARCH_LIST=requested)
    assert answer in result.stdout + result.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_launch_choices(tmp_path: Path) -> None:
    """Plain functions of shapes: no nvcc, no simulator."""
    program = tmp_path / "launch_test"
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        f"-I{ROOT}/csrc",
        str(ROOT / "tests/native/launch_test.cpp"),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    assert subprocess.run([program], capture_output=True, text=True, check=False).stdout == "launch choices hold\n"


@pytest.fixture(scope="module")
def library() -> Path:
    """The library for CUDA tensors, for one architecture."""
    result = configure(BUILD, "-DX_ROPE_CLS_CUDA=1", TORCH_CUDA_ARCH_LIST="8.0")
    assert result.returncode == 0, result.stderr
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    build = [str(cuda_sim.which("cmake")), "--build", str(BUILD), "--parallel", jobs, "--target", "x_rope_cls_cuda"]
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
    return BUILD / "libx_rope_cls_cuda.so"


@needs_nvcc
@needs_nm
@pytest.mark.slow
def test_library_needs_nothing_of_torch_but_the_stable_abi(library: Path) -> None:
    undefined = nm(library, "-D", "--undefined-only")
    assert any(re.search(r" U aoti_torch_", line) for line in undefined)
    assert [line for line in undefined if re.search(r"\b(at|c10|torch|caffe2)::", line)] == []
    assert [line for line in undefined if re.search(r" U (cuda|__cuda|cu[A-Z])", line)] == [], "the runtime is inside"
    assert [line for line in nm(library, "-D", "--defined-only") if re.search(r"cuda|x_rope_cls", line)] == []


@needs_nvcc
@pytest.mark.slow
def test_library_registers_every_operator_for_cuda(library: Path) -> None:
    """Also in a process whose torch has no CUDA, where nobody calls them."""
    names = repr(cuda_sim.OPERATORS)
    code = (
        f"import torch, x_rope_cls; torch.ops.load_library({str(library)!r}); "
        f"print([n for n in {names} if not torch._C._dispatch_has_kernel_for_dispatch_key('x_rope_cls::' + n, 'CUDA')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stderr


@needs_nvcc
@needs_nm
@pytest.mark.slow
def test_launchers_neither_allocate_nor_wait(library: Path) -> None:
    """What they call of the CUDA runtime can be captured into a CUDA graph."""
    allowed = {
        *("cudaLaunchKernel", "cudaLaunchKernelExC", "cudaGetLastError", "cudaFuncSetAttribute"),
        *("cudaGetDevice", "cudaDeviceGetAttribute", "cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags"),
        *("cudaMemsetAsync", "cudaMemcpyAsync"),
    }
    objects = list(BUILD.rglob("*.cu.o"))
    assert objects
    undefined = [line.split()[-1] for path in objects for line in nm(path, "--undefined-only")]
    called = {re.sub("^__cudaLaunch", "cudaLaunch", name) for name in undefined}
    called = {name for name in called if name.startswith("cuda")}  # the others: registration of kernels
    assert "cudaLaunchKernel" in called
    assert called <= allowed
