"""What is known of the CUDA kernels without a GPU, as tables in docs/cuda.md.

    python tools/cuda_report.py [--nvdisasm PATH] [--library-build FOLDER]

- registers, spills and shared memory: ptxas -v for sm_80; instructions: the SASS that nvdisasm shows;
- bank conflicts, coalescing, mma instructions: the simulator's statistics of the calls in `CALLS`, see tests/cudasim;
- blocks per multiprocessor: from registers and shared memory;
- least times on A100 and H100: an estimate from the work and the chips' data sheets, not a measurement.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cuda_sim  # noqa: E402

from x_rope_cls import RotaryEmbedding, apply_rope, late_cls_pool, rope_attention  # noqa: E402

PAGE = ROOT / "docs" / "cuda.md"
SASS = {
    "HMMA": r"HMMA",
    "LDSM": r"LDSM",
    "LDG.128": r"LDG\.E(\.\w+)*\.128",
    "LDGSTS.128": r"LDGSTS\.E(\.\w+)*\.128",
    "STG.128": r"STG\.E(\.\w+)*\.128",
    "LDS": r"LDS\b",
    "STS": r"STS\b",
    "other": r".",
}


@dataclass
class Kernel:
    """One instance as compiled for sm_80."""

    name: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    sass: Counter[str] = field(default_factory=Counter)


# ---- what the compiler made ----------------------------------------------------------------------


def run(*command: str | Path) -> str:
    result = subprocess.run(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}:\n{result.stdout[-2000:]}")
    return result.stdout


def key(mangled: str) -> str:
    """A mangled name without the part that differs between two compilations of a file."""
    return re.sub(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_[0-9a-f]{8}", "12_GLOBAL__N_1", mangled)


def readable(mangled: str) -> str:
    """`rope_kernel<bf16, 2>` of the whole demangled name."""
    name = run("c++filt", key(mangled)).strip()
    name = re.sub(r"\((anonymous namespace|x_rope_cls::cuda::\w+|int|bool)\)(::)?", "", name)
    name = name.replace("x_rope_cls::cuda::", "").replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
    return re.sub(r"^void ", "", name).partition("(")[0]


def compile_all(nvdisasm: str) -> dict[str, Kernel]:
    """Every kernel by `key`."""
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-gencode", "arch=compute_80,code=sm_80"]

    def compiled(source: Path) -> tuple[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            nvcc = str(cuda_sim.find_nvcc())
            log = run(nvcc, *flags, "-Xptxas", "-v", f"-I{ROOT}/csrc", "-cubin", "-o", cubin, source)
            return log, run(nvdisasm, "-c", cubin) if "Compiling entry function" in log else ""

    kernels: dict[str, Kernel] = {}
    with ThreadPoolExecutor(2) as pool:
        for log, sass in pool.map(compiled, sorted((ROOT / "csrc" / "kernels" / "cuda").glob("*.cu"))):
            read_ptxas(log, kernels)
            read_sass(sass, kernels)
    return kernels


def read_ptxas(log: str, kernels: dict[str, Kernel]) -> None:
    for entry in log.split("Compiling entry function")[1:]:
        mangled = re.search(r"'(\w+)'", entry)
        registers, shared = re.search(r"Used (\d+) registers", entry), re.search(r"(\d+) bytes smem", entry)
        assert mangled is not None, entry
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", entry.split("Used")[0]))
        kernels[key(mangled[1])] = Kernel(
            readable(mangled[1]), int(registers[1]), spills, int(shared[1]) if shared else 0
        )


def read_sass(text: str, kernels: dict[str, Kernel]) -> None:
    for section in text.split("\n.section\t.text.")[1:] or re.split(r"\n\.text\.", text)[1:]:
        mangled = re.match(r"\w+", section)
        assert mangled is not None
        counts = kernels[key(mangled[0])].sass
        for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", section):
            counts[next(name for name, pattern in SASS.items() if re.match(pattern, instruction))] += 1


# ---- what the simulator counted ------------------------------------------------------------------


@dataclass
class Call:
    """One call of an operator, with the least work it takes."""

    title: str
    run: Callable[[], Any]
    flops: float  # on tensor cores where the dtype is bfloat16
    moved: float  # bytes
    mma: float = 0.0  # m16n8k16 instructions: flops / 4096


def attention_call(cls_rope: str, special: int, backward: bool, head_dim: int = 64, tokens: int = 1024) -> Call:
    batch, heads = 1, 1
    q, k, v = (torch.randn(batch, heads, tokens, head_dim).bfloat16().requires_grad_(backward) for _ in range(3))
    rotary = RotaryEmbedding(head_dim)(tokens, torch.arange(tokens) >= special)

    def forward() -> Any:
        out = rope_attention(q, k, v, rotary, cls_rope=cls_rope)
        return torch.autograd.grad(out, (q, k, v), torch.randn_like(out)) if backward else out

    flops = 4.0 * batch * heads * tokens * tokens * head_dim * (3.5 if backward else 1)
    moved = 2.0 * batch * heads * tokens * head_dim * (12 if backward else 4)
    title = f"rope_attention{' forward and backward' if backward else ''}, {cls_rope}, {special} special tokens"
    return Call(f"{title}, bfloat16 (1, 1, {tokens}, {head_dim})", forward, flops, moved, flops / 4096)


def rope_call(interleaved: bool) -> Call:
    x = torch.randn(2, 1024, 8, 64).bfloat16().transpose(1, 2)
    rotary = RotaryEmbedding(64, interleaved=interleaved)(1024)
    layout = "interleaved" if interleaved else "halves"
    return Call(f"rope, {layout}, bfloat16 (2, 8, 1024, 64)", lambda: apply_rope(x, rotary), 0, 4.0 * x.numel())


def pool_call(backward: bool) -> Call:
    x = torch.randn(2, 1024, 512).bfloat16().requires_grad_(backward)
    query = (torch.randn(1, 8, 1, 512) * 512**-0.5).bfloat16().requires_grad_(backward)

    def forward() -> Any:
        out = late_cls_pool(x, query)
        return torch.autograd.grad(out, (x, query), torch.randn_like(out)) if backward else out

    title = f"late_cls_pool{' forward and backward' if backward else ''}, bfloat16 (2, 1024, 512), 8 queries"
    return Call(
        title, forward, 4.0 * x.numel() * 8 * (3.5 if backward else 1), 2.0 * x.numel() * (3 if backward else 1)
    )


def calls() -> list[Call]:
    torch.manual_seed(0)
    found = [rope_call(True), rope_call(False), attention_call("rotate", 0, False), attention_call("mask", 4, False)]
    found += [attention_call("rotate", 0, False, head_dim) for head_dim in (32, 96, 128)]
    found += [attention_call("rotate", 0, True), attention_call("mask", 4, True)]
    return [*found, pool_call(False), pool_call(True)]


def counted(call: Call) -> list[dict[str, Any]]:
    with cuda_sim.simulated_cuda(stats=True) as simulator:
        call.run()
        return simulator.stats()


def blocks_per_multiprocessor(registers: int, threads: int, shared: int) -> int:
    """On sm_80: 65536 registers in portions of 256 a warp, 164 KiB of shared memory with 1 KiB a block, 64 warps."""
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, 64 // warps, 164 * 1024 // (shared + 1024), 32)


# ---- tables --------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[object]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *[[str(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def static_table(kernels: dict[str, Kernel]) -> str:
    columns = [name for name in SASS if any(k.sass[name] for k in kernels.values())]
    rows = [
        [f"`{k.name}`", k.registers, k.spills, k.shared, *(k.sass[name] for name in columns)]
        for k in sorted(kernels.values(), key=lambda k: k.name)
    ]
    return table(["kernel", "registers", "spilled bytes", "static shared", *columns], rows)


def simulated_table(kernels: dict[str, Kernel]) -> str:
    rows: list[list[object]] = []
    for call in calls():
        stats = counted(call)
        mma = sum(k["mma"] for k in stats)
        least = f"{mma} = {mma / call.mma:.3f} of the least" if call.mma else "-"
        rows.append([f"**{call.title}**", "", "", "", least if mma else "-", ""])
        for k in stats:
            compiled = kernels.get(key(k["mangled"]))
            blocks = "?"
            if compiled is not None:
                threads = k["block"][0] * k["block"][1] * k["block"][2]
                resident = blocks_per_multiprocessor(
                    compiled.registers, threads, k["static_shared"] + k["dynamic_shared"]
                )
                blocks = f"{resident} x {threads}"
            conflicts = k["shared"]["conflict_wavefronts"]
            coalescing = f"{k['global']['coalescing_percent']:.1f} %"
            rows.append([f"`{readable(k['mangled'])}`", k["launches"], coalescing, conflicts, k["mma"], blocks])
    head = ["kernel", "launches", "coalescing", "bank conflicts", "mma", "blocks x threads per multiprocessor"]
    return table(head, rows)


# Tensor cores (bfloat16, dense) and memory, from the data sheets of A100 80GB SXM and H100 SXM.
CHIPS = {"A100": (312e12, 2.039e12), "H100": (989e12, 3.35e12)}


def roofline_table() -> str:
    rows: list[list[object]] = []
    for call in calls():
        times = [max(call.flops / flops, call.moved / bandwidth) * 1e6 for flops, bandwidth in CHIPS.values()]
        bound = "memory" if call.flops / CHIPS["A100"][0] < call.moved / CHIPS["A100"][1] else "tensor cores"
        rows.append(
            [call.title, f"{call.flops / 1e9:.2f}", f"{call.moved / 1e6:.2f}", *(f"{t:.2f}" for t in times), bound]
        )
    return table(["call", "GFLOP", "MB", *(f"{chip}, us" for chip in CHIPS), "limit on A100"], rows)


def library_line(folder: Path) -> str:
    """Builds the library for the default architectures, from nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    options = ["-DX_ROPE_CLS_CUDA=1", "-DX_ROPE_CLS_PYTHON=OFF", f"-DPython_EXECUTABLE={sys.executable}", "-G", "Ninja"]
    cmake = str(cuda_sim.which("cmake"))
    configured = run(cmake, "-S", ROOT, "-B", folder, *options, f"-DCMAKE_MAKE_PROGRAM={cuda_sim.which('ninja')}")
    start = time.monotonic()
    run(cmake, "--build", folder, "--parallel", "2", "--target", "x_rope_cls_cuda")
    minutes = (time.monotonic() - start) / 60
    size = (folder / "libx_rope_cls_cuda.so").stat().st_size / 2**20
    names = re.search(r"CUDA kernels for (.*)", configured)
    return f"Library for {names[1] if names else '?'}: {size:.1f} MiB, built in {minutes:.1f} minutes by two jobs."


def summary(kernels: dict[str, Kernel]) -> str:
    families: dict[str, int] = defaultdict(int)
    for kernel in kernels.values():
        families[kernel.name.partition("<")[0]] += 1
    spilled = sum(kernel.spills > 0 for kernel in kernels.values())
    listed = ", ".join(f"`{name}` {count}" for name, count in sorted(families.items()))
    return f"{len(kernels)} kernel instances ({listed}), {spilled} of which spill registers."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nvdisasm", default=shutil.which("nvdisasm"), help="default: that on the path")
    parser.add_argument("--library-build", type=Path, help="also build the whole library there, which takes minutes")
    options = parser.parse_args()
    if options.nvdisasm is None:
        raise SystemExit("cuda_report needs nvdisasm: pip install nvidia-cuda-nvdisasm, then --nvdisasm PATH")
    kernels = compile_all(options.nvdisasm)
    parts = {
        "summary": summary(kernels),
        "compiled": static_table(kernels),
        "simulated": simulated_table(kernels),
        "roofline": roofline_table(),
    }
    if options.library_build is not None:
        parts["library"] = library_line(options.library_build.resolve())
    page = PAGE.read_text()
    for name, text in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        page, count = re.subn(pattern, lambda m, text=text: m[1] + text + "\n" + m[2], page, flags=re.DOTALL)
        assert count == 1, f"docs/cuda.md must have one place for {name}, got {count}"
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
