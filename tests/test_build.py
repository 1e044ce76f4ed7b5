"""The native build: what the binaries contain and need, the choice of the ISA, the package, the C++ interface."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import x_rope_cls
from x_rope_cls import _C, _library

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(x_rope_cls.__file__).resolve().parent
LIBRARY = _library.library_path()
KERNELS = LIBRARY.with_name("libx_rope_cls_kernels" + LIBRARY.suffix)
ISAS = ["generic", "avx2x16", "avx2", "avx512", "avx512_bf16"]  # slowest first
WEAK = re.compile(r" [WwVvu] ")

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
needs_sources = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="not a source tree")


def _nm(path: Path, *options: str) -> list[str]:
    return subprocess.run(
        ["nm", "-C", *options, str(path)], check=True, capture_output=True, text=True
    ).stdout.splitlines()


def _isa_of_new_process(cap: str) -> subprocess.CompletedProcess[str]:
    """Prints the ISA that is chosen; loads _C alone, which is quicker than with torch."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE)!r}); import _C; print(_C.cpu_isa())"
    return _python(code, X_ROPE_CLS_CPU_ISA=cap)


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


# ---- symbols -----------------------------------------------------------------


@needs_nm
@pytest.mark.parametrize("path", [LIBRARY, KERNELS, Path(_C.__file__)], ids=lambda path: path.name)
def test_needs_nothing_of_torch_but_the_stable_abi(path: Path) -> None:
    undefined = _nm(path, "-D", "--undefined-only")
    assert undefined
    assert [line for line in undefined if re.search(r"\b(at|c10|torch|caffe2)::", line)] == []


@needs_nm
def test_only_the_operators_know_torch() -> None:
    pattern = re.compile(r" U (aoti_torch|torch_)")
    assert any(pattern.search(line) for line in _nm(LIBRARY, "-D", "--undefined-only"))
    for path in (KERNELS, Path(_C.__file__)):
        assert not any(pattern.search(line) for line in _nm(path, "-D", "--undefined-only"))


@needs_nm
def test_kernels_emit_no_shared_symbols() -> None:
    """A weak symbol outside an ISA's namespace may be kept from the copy with the widest instructions."""
    symbols = _nm(KERNELS)
    defined = [line for line in symbols if WEAK.search(line) and not re.match(r"\s+[wv] ", line)]
    assert [line for line in defined if not re.search(rf"x_rope_cls::cpu::({'|'.join(ISAS)})::", line)] == []
    assert any("x_rope_cls::cpu::generic::" in line for line in symbols), "the symbol table is stripped"


@needs_nm
def test_kernels_export_only_their_interface() -> None:
    exported = [line.split(" T ")[1] for line in _nm(KERNELS, "-D", "--defined-only") if " T " in line]
    names = {name.split("(")[0] for name in exported}
    expected = {"kernels", "built_isas", "isa_supported", "select_isa", "isa_warning", "cache_bytes"}
    assert names == {f"x_rope_cls::cpu::{name}" for name in expected}


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_records_no_folder_of_the_build_machine() -> None:
    for path, expected in ((LIBRARY, "$ORIGIN"), (KERNELS, "$ORIGIN"), (Path(_C.__file__), "$ORIGIN/lib")):
        output = subprocess.run(["readelf", "-d", str(path)], check=True, capture_output=True, text=True).stdout
        assert re.findall(r"R(?:UN)?PATH.*\[(.*)\]", output) == [expected], path.name


# ---- build info, ISA ---------------------------------------------------------


def test_cache_bytes() -> None:
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(path.read_text().strip().removesuffix("K")) * 1024 for path in caches]
    assert _C.cache_bytes() == min(max(sizes, default=32 << 20), 64 << 20)


def test_build_info() -> None:
    info = _C.build_info()
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["version"])
    assert info["version"] == x_rope_cls.__version__
    assert re.match(r"(GNU|Clang|AppleClang) \d+", info["compiler"])
    assert "-O3" in info["flags"]["all"]
    assert "-ffast-math" not in str(info["flags"])
    assert info["cpu_isas_built"] == [isa for isa in ISAS if isa in info["cpu_isas_built"]]
    assert info["cpu_isas_built"][0] == "generic"
    assert set(info["cpu_isas_supported"]) <= set(info["cpu_isas_built"])
    assert set(info["flags"]) == {"all", *info["cpu_isas_built"]}
    assert info["cpu_isa"] == _C.cpu_isa()
    assert _C.cpu_isas() == info["cpu_isas_supported"]
    assert tuple(map(int, info["torch"].split(".")[:2])) >= _library.MINIMUM_TORCH
    architectures = info["cuda_architectures"]
    assert (architectures is None) == bool(info["cuda_reason"])
    assert _library.cuda_library_path().exists() == (architectures is not None)
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", name) for name in architectures or ())


OPERATORS = (
    *("rope", "rope_qk", "rope_table_grad", "rope_attention", "rope_attention_backward"),
    *("late_cls_pool", "late_cls_pool_backward"),
)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_there_for_cuda_where_torch_and_the_build_have_it(name: str) -> None:
    """Also where there is no GPU: the library for CUDA tensors is loaded beside every torch that has CUDA."""
    expected = torch.version.cuda is not None and _C.build_info()["cuda_architectures"] is not None
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"x_rope_cls::{name}", "CUDA") == expected


def test_best_isa_is_used() -> None:
    result = _isa_of_new_process("")
    assert result.stdout.strip() == _C.cpu_isas()[-1], result.stderr


@pytest.mark.parametrize("cap", ISAS)
def test_isa_cap(cap: str) -> None:
    if cap == "avx2x16" and cap not in _C.build_info()["cpu_isas_built"]:
        pytest.skip("built without X_ROPE_CLS_TEST_ISA")
    result = _isa_of_new_process(cap)
    allowed = [isa for isa in _C.cpu_isas() if ISAS.index(isa) <= ISAS.index(cap)]
    assert result.stdout.strip() == allowed[-1], result.stderr


def test_unknown_isa_warns() -> None:
    result = _python("import x_rope_cls; print(x_rope_cls._C.cpu_isa())", X_ROPE_CLS_CPU_ISA="sse9")
    assert result.stdout.strip() == _C.cpu_isas()[-1]
    assert re.search(
        r"RuntimeWarning: X_ROPE_CLS_CPU_ISA must be one of generic, .*avx2, .*, got 'sse9'", result.stderr
    )


def test_set_cpu_isa() -> None:
    chosen = _C.cpu_isa()
    try:
        for isa in _C.cpu_isas():
            _C.set_cpu_isa(isa)
            assert _C.cpu_isa() == isa
    finally:
        _C.set_cpu_isa(chosen)
    with pytest.raises(ValueError, match=r"set_cpu_isa: name must be one of \['generic'.*\], got 'mmx'"):
        _C.set_cpu_isa("mmx")
    assert _C.cpu_isa() == chosen


def test_measure_limits() -> None:
    limits = _C.measure_limits(seconds=0.01)
    assert limits["cpu_isa"] == _C.cpu_isa()
    assert limits["one_thread"]["threads"] == 1
    assert limits["all_threads"]["threads"] >= 1
    for figures in (limits["one_thread"], limits["all_threads"]):
        assert 0.1 < figures["fma_float32_gflops"] < 1e6
        assert 0.05 < figures["copy_gbs"] < 1e5
        assert 0.05 < figures["read_gbs"] < 1e5
        has_dot = limits["cpu_isa"] == "avx512_bf16"
        for rate in (figures["dot_bfloat16_gflops"], figures["dot_int16_gflops"]):
            assert (rate is not None) == has_dot
            assert rate is None or rate > 0.1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processors of a thread are known on Linux only")
def test_measure_limits_leaves_the_thread_where_it_may_run() -> None:
    before = os.sched_getaffinity(0)
    _C.measure_limits(seconds=0.01)
    assert os.sched_getaffinity(0) == before


def test_measure_limits_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        _C.measure_limits(seconds=0.0)
    with pytest.raises(ValueError, match="threads must be at least 0, got -1"):
        _C.measure_limits(threads=-1)


# ---- loading -----------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.12.1", "1.13.0+cu117", "2.9.0a0"])
def test_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=rf"torch must be 2.13 or newer, got {re.escape(version)}"):
        _library.load()


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0a0+git1234", "2.20.1+cu130", "3.0.0"])
def test_new_torch_is_accepted(version: str) -> None:
    _library._check_torch(version)


def test_missing_library_says_how_to_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_library, "library_path", lambda: tmp_path / "libx_rope_cls.so")
    with pytest.raises(ImportError, match=r"libx_rope_cls.so is missing: build it with `pip install \."):
        _library.load()


def test_broken_library_says_how_to_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "libx_rope_cls.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(_library, "library_path", lambda: path)
    with pytest.raises(ImportError, match=r"libx_rope_cls.so does not load .*: build it with `pip install \."):
        _library.load()


# ---- CMake, packages ---------------------------------------------------------


def _cmake() -> str:
    path = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip("cmake is not installed")
    return path


def _run(*command: str | Path, **environment: str) -> str:
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PATH": tools, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def _configure_error(build: Path, *options: str, **environment: str) -> str:
    result = subprocess.run(
        [_cmake(), "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}", *options],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    return " ".join(result.stderr.split())


@needs_sources
def test_old_torch_is_refused_at_build(tmp_path: Path) -> None:
    header = tmp_path / "torch/include/torch/headeronly/version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 12\n#define TORCH_VERSION_PATCH 1\n")
    error = _configure_error(
        tmp_path / "build", f"-DX_ROPE_CLS_TORCH_DIR={tmp_path / 'torch'}", "-DX_ROPE_CLS_PYTHON=OFF"
    )
    assert "x_rope_cls needs torch 2.13 or newer to build, got 2.12.1" in error


@needs_sources
def test_old_compiler_is_refused(tmp_path: Path) -> None:
    """A compiler that says it is GCC 11."""
    real = shutil.which("g++")
    if real is None:
        pytest.skip("g++ is not installed")
    fake = tmp_path / "g++-11"
    fake.write_text(f'#!/bin/sh\nexec {real} -U__GNUC__ -D__GNUC__=11 "$@"\n')
    fake.chmod(0o755)
    error = _configure_error(tmp_path / "build", CXX=str(fake))
    assert "x_rope_cls needs GCC 12 or newer or Clang 15 or newer, with C++20, got GNU 11" in error


@needs_sources
@pytest.mark.slow
def test_wheel_and_sdist(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path)]
    built = "1" if "avx2x16" in _C.build_info()["cpu_isas_built"] else "0"  # so that nothing is compiled anew
    cuda = "0" if _C.build_info()["cuda_architectures"] is None else "1"
    _run(*pip, ROOT, X_ROPE_CLS_TEST_ISA=built, X_ROPE_CLS_CUDA=cuda)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "x_rope_cls").rglob("*.py")}
    assert sources <= names
    assert {"x_rope_cls/py.typed", "x_rope_cls/_C.pyi"} <= names
    assert {f"x_rope_cls/lib/{path.name}" for path in (LIBRARY, KERNELS)} <= names
    assert f"x_rope_cls/{Path(_C.__file__).name}" in names
    assert not [
        name for name in names if name.startswith(("csrc", "tests", "examples")) or name.endswith((".cpp", ".h"))
    ]

    _run(
        sys.executable,
        "-c",
        f"import setuptools.build_meta as b, os; os.chdir({str(ROOT)!r}); b.build_sdist({str(tmp_path)!r})",
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    unpacked = tmp_path / "unpacked"
    shutil.unpack_archive(sdist, unpacked)
    (tree,) = unpacked.iterdir()
    held = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    needed = {"CMakeLists.txt", "LICENSE", "pyproject.toml", "setup.py", *sources}
    for folder, patterns in {"csrc": ("*.h", "*.cpp", "*.cu", "*.cuh"), "cmake": ("*",)}.items():
        needed |= {str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / folder).rglob(pattern)}
    assert needed <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


@needs_sources
@pytest.mark.slow
def test_cpp_program(tmp_path: Path) -> None:
    """examples/cpp: installs the library with CMake, finds it with find_package and calls an operator."""
    cmake = _cmake()
    build, prefix, example = tmp_path / "build", tmp_path / "prefix", tmp_path / "example"
    options = [
        "-DX_ROPE_CLS_PYTHON=OFF",
        "-DX_ROPE_CLS_CUDA=0",
        "-DX_ROPE_CLS_ISAS=generic",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    _run(cmake, "-S", ROOT, "-B", build, *options)
    _run(cmake, "--build", build, "--parallel", "2")
    _run(cmake, "--install", build, "--prefix", prefix)
    prefixes = f"{prefix};{torch.utils.cmake_prefix_path}"
    _run(cmake, "-S", ROOT / "examples" / "cpp", "-B", example, f"-DCMAKE_PREFIX_PATH={prefixes}")
    _run(cmake, "--build", example)
    assert "largest difference from the plain computation" in _run(example / "example")
