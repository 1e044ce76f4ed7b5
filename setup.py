"""Builds the native part with CMake; everything static about the package is in pyproject.toml.

Environment:
    CXX, CXXFLAGS: compiler and further flags.
    MAX_JOBS: compile jobs at a time (default: processors).
    X_ROPE_CLS_CUDA: 1 builds the CUDA kernels, 0 does not; without it they are built where nvcc is.
    TORCH_CUDA_ARCH_LIST: for which GPUs, as torch takes it (default: see cmake/CudaKernels.cmake).
    CUDACXX, CUDA_HOME: where nvcc is, if not on the path.
    X_ROPE_CLS_TEST_ISA: 1 also builds the kernels variant that only tests use.
"""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    """All native targets: the CMake project at the root."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake project, in a build folder that later builds reuse."""

    build_dir = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

    def build_extension(self, ext: Extension) -> None:
        # Two builds in one folder at a time would ruin ninja's records, and with them the reuse.
        self.build_dir.parent.mkdir(exist_ok=True)
        with open(f"{self.build_dir}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.build()

    def build(self) -> None:
        cmake = self.cmake()
        self.forget_other_toolchain()
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        run(cmake, "-S", str(ROOT), "-B", str(self.build_dir), *self.cmake_arguments())
        run(cmake, "--build", str(self.build_dir), "--parallel", jobs)
        self.install_to(Path(self.build_lib).resolve())

    def copy_extensions_to_source(self) -> None:
        """In place and editable: the binaries belong beside the Python sources."""
        self.install_to(ROOT)

    def install_to(self, prefix: Path) -> None:
        # Unlinked first: a process that runs the old binaries keeps them.
        shutil.rmtree(prefix / "x_rope_cls" / "lib", ignore_errors=True)
        for module in (prefix / "x_rope_cls").glob("_C.*.so"):
            module.unlink()
        run(self.cmake(), "--install", str(self.build_dir), "--prefix", str(prefix), "--component", "python")

    @staticmethod
    def cmake() -> str:
        path = shutil.which("cmake")
        if path is None:
            raise SystemExit("x_rope_cls needs cmake 3.22 or newer to build, got none: pip install cmake ninja")
        return path

    @staticmethod
    def cmake_arguments() -> list[str]:
        arguments = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "X_ROPE_CLS_TORCH_DIR": package_dir("torch"),
            "X_ROPE_CLS_TEST_ISA": os.environ.get("X_ROPE_CLS_TEST_ISA", "0"),
            "X_ROPE_CLS_CUDA": os.environ.get("X_ROPE_CLS_CUDA", ""),
            "pybind11_DIR": str(Path(package_dir("pybind11")) / "share" / "cmake" / "pybind11"),
        }
        result = [f"-D{name}={value}" for name, value in arguments.items()]
        ninja = shutil.which("ninja")
        if ninja is not None:
            result += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        return result

    def forget_other_toolchain(self) -> None:
        """CMake keeps compiler and generator of a build folder for good: start anew where they differ."""
        toolchain = [f"{name}={os.environ.get(name, '')}" for name in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX")]
        toolchain.append(f"ninja={shutil.which('ninja') is not None}")
        record = self.build_dir / "toolchain.txt"
        if not record.exists() or record.read_text().splitlines() != toolchain:
            shutil.rmtree(self.build_dir, ignore_errors=True)
            self.build_dir.mkdir(parents=True)
            record.write_text("\n".join(toolchain))


def package_dir(name: str) -> str:
    """Folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"x_rope_cls needs {name} to build, got none for {sys.executable}. "
            "Install it, or build without --no-build-isolation."
        )
    return str(Path(spec.origin).parent)


def run(*command: str) -> None:
    print("+", " ".join(command), flush=True)
    result = subprocess.run(command, check=False)
    if result.returncode != 0:
        raise SystemExit(
            f"x_rope_cls: the native build failed (`{command[0]} {command[1]}` returned {result.returncode})"
        )


setup(ext_modules=[CMakeExtension("x_rope_cls._C")], cmdclass={"build_ext": CMakeBuild})
