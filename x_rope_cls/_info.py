"""What ``python -m x_rope_cls info`` prints."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from . import _C, _library


def info_lines(measure_seconds: float | None = 0.2) -> list[str]:
    """Versions, what was built and is used, threads, and measured limits of the machine, as lines of text.

    Args:
        measure_seconds: for each of the about eight limits that are measured; None: measure none.
    """
    build = _C.build_info()
    rows = [
        ("x_rope_cls", f"{build['version']} ({Path(__file__).resolve().parent})"),
        ("library", str(_library.library_path())),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__} (built against {build['torch']}, works from {_minimum_torch()})"),
        ("x-transformers", _x_transformers()),
        ("compiler", f"{build['compiler']}, {build['build_type']}"),
        ("processor", processor()),
        ("instruction sets built", ", ".join(build["cpu_isas_built"])),
        ("supported here", ", ".join(build["cpu_isas_supported"])),
        ("in use", _isa()),
        ("CUDA", _cuda()),
        ("threads", f"{torch.get_num_threads()} of torch, {os.cpu_count()} processors"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    return lines + ([] if measure_seconds is None else _limits(measure_seconds))


def machine_lines() -> list[str]:
    """Two lines that say where figures come from."""
    versions = f"x_rope_cls {_C.build_info()['version']}, torch {torch.__version__}, x-transformers {_x_transformers()}"
    return [f"{processor()}; {torch.get_num_threads()} thread(s); instruction set {_C.cpu_isa()}", versions]


def _minimum_torch() -> str:
    return ".".join(map(str, _library.MINIMUM_TORCH))


def _isa() -> str:
    cap = os.environ.get("X_ROPE_CLS_CPU_ISA")
    warning = _C.build_info()["cpu_isa_warning"]
    notes = [f"X_ROPE_CLS_CPU_ISA={cap}"] if cap else []
    notes += [warning] if warning else []
    return _C.cpu_isa() + (f" ({'; '.join(notes)})" if notes else "")


def _cuda() -> str:
    build = _C.build_info()
    architectures = build["cuda_architectures"]
    here = f"torch's CUDA: {torch.version.cuda or 'none'}"
    if architectures:
        return f"built for {', '.join(architectures)}; {here}"
    return f"not built: {build['cuda_reason']}; {here}"


def _x_transformers() -> str:
    try:
        version = metadata.version("x-transformers")
    except metadata.PackageNotFoundError:
        return "not installed (Encoder, swap_ and explain need it)"
    try:
        from .xt.version import NEWEST_TESTED, OLDEST
    except ImportError as error:
        return f"{version}, cannot be used: {error}"
    from packaging.version import Version

    later = " (later than those tested)" if Version(version) > Version(NEWEST_TESTED) else ""
    return f"{version}{later}, tested from {OLDEST} to {NEWEST_TESTED}"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _limits(seconds: float) -> list[str]:
    found = _C.measure_limits(seconds)
    lines = [f"measured limits ({found['cpu_isa']}):"]
    for title, limits in (("one thread", found["one_thread"]), ("all threads", found["all_threads"])):
        dots = {"bfloat16": limits["dot_bfloat16_gflops"], "int16": limits["dot_int16_gflops"]}
        figures = [
            f"float32 FMA {limits['fma_float32_gflops']:.0f} GFLOP/s",
            *(f"{n} dot {'none' if r is None else f'{r:.0f} GFLOP/s'}" for n, r in dots.items()),
            f"copy {limits['copy_gbs']:.1f} GB/s",
            f"read {limits['read_gbs']:.1f} GB/s",
        ]
        lines.append(f"  {title} ({limits['threads']}): {', '.join(figures)}")
    return lines
