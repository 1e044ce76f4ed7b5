"""What is known of the CUDA kernels without a GPU, as tables in docs/cuda.md.

    python tools/cuda_report.py [--build FOLDER] [--reuse] [--nvdisasm PATH]

- registers, spills and shared memory: ptxas -v of the library's build; instructions: the SASS that nvdisasm shows;
- bank conflicts, coalescing, mma instructions: the simulator's statistics of the calls in cuda_calls.py;
- blocks per multiprocessor: from registers and shared memory, see cuda_occupancy.py;
- least times on A100 and H100: an estimate from the work and the chips' data sheets, not a measurement.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cuda_calls  # noqa: E402
import cuda_families  # noqa: E402
import cuda_occupancy  # noqa: E402
import cuda_sass  # noqa: E402
import cuda_sim  # noqa: E402
from cuda_sass import GROUPS, Kernel, key, readable  # noqa: E402

PAGE = ROOT / "docs" / "cuda.md"
MACHINE_CODE = "sm_80"  # whose instructions are counted


# ---- the library's build -------------------------------------------------------------------------


@dataclass
class Build:
    """The library for the default architectures."""

    architectures: list[str]  # sm_80, ..., compute_100
    size: int  # bytes
    seconds: float
    jobs: int
    log: str


def run(*command: str | Path) -> str:
    result = subprocess.run(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}:\n{result.stdout[-2000:]}")
    return result.stdout


def build(folder: Path) -> None:
    """Builds the library from nothing; nvcc keeps the machine code, and what ptxas says is in build.log."""
    shutil.rmtree(folder, ignore_errors=True)
    kept = folder / "kept"
    kept.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    options = ["-DX_ROPE_CLS_CUDA=1", "-DX_ROPE_CLS_PYTHON=OFF", f"-DPython_EXECUTABLE={sys.executable}", "-G", "Ninja"]
    options += [f"-DCMAKE_CUDA_FLAGS=-Xptxas=-v --keep --keep-dir={kept}"]
    options += [f"-DCMAKE_MAKE_PROGRAM={cuda_sim.which('ninja')}"]
    cmake = str(cuda_sim.which("cmake"))
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    commands = [
        [cmake, "-S", str(ROOT), "-B", str(folder), *options],
        [cmake, "--build", str(folder), "--parallel", jobs, "--target", "x_rope_cls_cuda"],
    ]
    with open(folder / "build.log", "w") as log:
        for command in commands:
            start = time.monotonic()
            result = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
            if result.returncode != 0:
                raise SystemExit(f"{' '.join(command)} failed, see {log.name}")
        log.write(f"{time.monotonic() - start:.0f} seconds by {jobs} jobs\n")


def read_build(folder: Path) -> Build:
    log = (folder / "build.log").read_text()
    architectures = re.search(r"CUDA kernels for (.*)", log)
    taken = re.search(r"^(\d+) seconds by (\d+) jobs$", log, re.MULTILINE)
    if architectures is None or taken is None:
        raise SystemExit(f"{folder / 'build.log'} is of no whole build")
    size = (folder / "libx_rope_cls_cuda.so").stat().st_size
    return Build(architectures[1].split(", "), size, int(taken[1]), int(taken[2]), log)


def read_kernels(folder: Path, log: str, nvdisasm: str) -> dict[str, Kernel]:
    """Every kernel by `key`."""
    kernels: dict[str, Kernel] = {}
    for (name, architecture), resources in cuda_sass.read_ptxas(log).items():
        kernels.setdefault(name, Kernel(readable(name))).resources[architecture] = resources
    cubins = sorted((folder / "kept").glob(f"*.{MACHINE_CODE.replace('sm', 'compute')}.cubin"))
    with ThreadPoolExecutor(2) as pool:
        for text in pool.map(
            lambda cubin: run(nvdisasm, "-c", cubin), (c for c in cubins if b".text." in c.read_bytes())
        ):
            for name, sass in cuda_sass.read_sass(text).items():
                kernels[name].sass = sass
    missing = [kernel.name for kernel in kernels.values() if not kernel.sass]
    assert not missing, f"no machine code of {missing} in {folder / 'kept'}"
    return kernels


# ---- tables --------------------------------------------------------------------------------------


def table(head: list[str], rows: Iterable[list[object]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *[[str(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def joined(rows: Iterable[tuple[Kernel, list[object]]]) -> list[list[object]]:
    """Rows in the order of their names; instances that differ in nothing but types share one."""
    groups: dict[tuple[object, ...], list[Kernel]] = defaultdict(list)
    for kernel, cells in rows:
        shape = tuple("T" if argument in cuda_families.TYPES else argument for argument in kernel.arguments)
        equal = (kernel.family, shape, *cells)
        groups[equal].append(kernel)
    found: list[tuple[list[object], list[object]]] = []
    for (_, _, *cells), kernels in groups.items():
        values = [
            sorted(set(column), key=cuda_families.natural)
            for column in zip(*(k.arguments for k in kernels), strict=True)
        ]
        together = len(list(itertools.product(*values))) == len(kernels)
        for arguments in [["/".join(v) for v in values]] if together else [list(k.arguments) for k in kernels]:
            name = f"{kernels[0].family}<{', '.join(arguments)}>" if arguments else kernels[0].family
            order: list[object] = [
                kernels[0].family,
                *(cuda_families.natural(a.split("/")[0]) for a in [*arguments[1:], *arguments[:1]]),
            ]
            found.append((order, [f"`{name}`", *cells]))
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def compiled_table(kernels: dict[str, Kernel]) -> str:
    counts = {name: cuda_sass.counted(kernel.sass) for name, kernel in kernels.items()}
    columns = [column for column in cuda_sass.COUNTED if any(count[column] for count in counts.values())]
    architectures = list(next(iter(kernels.values())).resources)
    rows = []
    for name, kernel in kernels.items():
        found = [kernel.resources[a] for a in architectures]
        spills = ", ".join(f"{r.spills} ({a})" for a, r in kernel.resources.items() if r.spills) or "0"
        shared = max(r.shared for r in found)
        cells = [*(r.registers for r in found), spills, shared, *(counts[name][column] for column in columns)]
        rows.append((kernel, cells))
    registers = [f"registers, {a}" if a == architectures[0] else a for a in architectures]
    return table(["kernel", *registers, "spilled bytes", "static shared", *columns], joined(rows))


def loops_table(kernels: dict[str, Kernel]) -> str:
    """Other instructions per HMMA of the main loops."""
    found = {name: cuda_sass.main_loop(kernel.sass) for name, kernel in kernels.items()}
    counts = {name: cuda_sass.grouped(kernels[name].sass, loop) for name, loop in found.items() if loop is not None}
    names = [group.name for group in GROUPS[1:]]
    names += ["unknown"] * any(count["unknown"] for count in counts.values())
    rows = []
    for name, count in counts.items():
        products = count["HMMA"]
        others = [count.total() - products, *(count[group] for group in names)]
        rows.append((kernels[name], [products, *(f"{other / products:.2f}" for other in others)]))
    return table(["kernel", "HMMA", "others per HMMA", *names], joined(rows))


def groups_table(kernels: dict[str, Kernel]) -> str:
    opcodes: dict[str, Counter[str]] = defaultdict(Counter)
    for kernel in kernels.values():
        for i in cuda_sass.main_loop(kernel.sass) or ():
            instruction = kernel.sass[i]
            opcodes[cuda_sass.group_of(instruction)][instruction.opcode.split(".")[0]] += 1
    lines = ["| group | SASS, the most frequent first | what for |", "| --- | --- | --- |"]
    for group in GROUPS:
        lines += [f"| {group.name} | {', '.join(o for o, _ in opcodes[group.name].most_common(8))} | {group.purpose} |"]
    return "\n".join(lines)


def mma_of(stats: list[dict[str, Any]]) -> int:
    return sum(int(kernel["mma"]) for kernel in stats)


Simulated = list[tuple[cuda_calls.Call, list[dict[str, Any]]]]


def simulated_table(kernels: dict[str, Kernel], simulated: Simulated) -> str:
    rows: list[list[object]] = []
    for call, stats in simulated:
        mma = mma_of(stats)
        rows.append(
            [f"**{call.title}**", "", "", "", f"{mma} = {mma / call.mma:.3f} of the least" if call.mma else "", ""]
        )
        for k in stats:
            launch = cuda_calls.launch_of(k)
            registers = kernels[key(k["mangled"])].resources["sm_80"].registers
            blocks = cuda_occupancy.resident_blocks(cuda_occupancy.A100, registers, launch.threads, launch.shared)
            conflicts = k["shared"]["conflict_wavefronts"]
            coalescing = f"{k['global']['coalescing_percent']:.1f} %"
            resident = f"{blocks} x {launch.threads}"
            rows.append([f"`{readable(k['mangled'])}`", k["launches"], coalescing, conflicts, k["mma"], resident])
    return table(["kernel", "launches", "coalescing", "bank conflicts", "mma", "blocks x threads, A100"], rows)


def occupancy_table(kernels: dict[str, Kernel]) -> str:
    """The attention kernels of every width, beside FlashAttention-2's of the same."""
    rows: list[tuple[list[object], list[object]]] = []
    for name, launch in cuda_calls.attention_launches().items():
        kernel = kernels[name]
        forward = kernel.family == "attention_forward_kernel"
        if not forward and kernel.family != "attention_backward_kernel":
            continue
        head_dim, general = int(kernel.arguments[1]), kernel.arguments[-1] == "true"
        flash = {
            (True, False): cuda_occupancy.FLASH_FORWARD,
            (True, True): cuda_occupancy.FLASH_FORWARD_DROPOUT,
            (False, False): cuda_occupancy.FLASH_BACKWARD,
            (False, True): cuda_occupancy.FLASH_BACKWARD_DROPOUT,
        }[forward, general][head_dim]
        registers = {architecture: r.registers for architecture, r in kernel.resources.items()}
        cells = cuda_occupancy.comparison_row(registers, launch, flash)
        rows.append(([not forward, general, head_dim, kernel.name], [f"`{kernel.name}`", *cells]))
    head = ["kernel", "A100", "FlashAttention-2, A100", "H100", "FlashAttention-2, H100", "ours has"]
    ordered = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    verdicts = {
        "Fewer warps": "fewer warps",
        "Perhaps fewer warps, between FlashAttention-2's bounds": "within its bounds",
        "As many warps in fewer blocks": "fewer blocks",
    }
    lines = [f"- {title}: {', '.join(rows_with(ordered, verdict)) or 'none'}." for title, verdict in verdicts.items()]
    return "\n".join([*lines, "", table(head, ordered)])


def rows_with(rows: list[list[object]], verdict: str) -> list[str]:
    """Names of the rows whose last cell has that verdict, with the chip where it is of one."""
    found = []
    for name, *_, last in rows:
        chips = re.findall(rf"(\w+): [^,]*{verdict}", str(last))
        if chips:
            found.append(f"{name} on {' and '.join(chips)}")
        elif verdict in str(last):
            found.append(str(name))
    return found


def families_table(kernels: dict[str, Kernel]) -> str:
    lines = ["| family | instances | template arguments, and why |", "| --- | ---: | --- |"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in cuda_families.family_rows(kernels.values())]
    return "\n".join(lines)


def library_line(built: Build) -> str:
    return (
        f"Library for {', '.join(built.architectures)}: {built.size / 2**20:.1f} MiB, built from nothing in "
        f"{built.seconds / 60:.1f} minutes by {built.jobs} {'job' if built.jobs == 1 else 'jobs'}."
    )


def summary(kernels: dict[str, Kernel], simulated: Simulated) -> str:
    """The report's main figures."""
    architectures = list(next(iter(kernels.values())).resources)
    lines = [f"- {len(kernels)} kernel instances of {len(cuda_families.FAMILIES)} templates."]
    spilling = {
        a: [str(row[0]) for row in joined((k, []) for k in kernels.values() if k.resources[a].spills)]
        for a in architectures
    }
    lines += [f"- On {a} these spill registers: {', '.join(names)}." for a, names in spilling.items() if names]
    if not any(spilling.values()):
        lines += [f"- None of them spills a register, on {', '.join(architectures)}."]

    found = [(stats, call.title) for call, kernels_of_call in simulated for stats in kernels_of_call]
    conflicts = sum(stats["shared"]["conflict_wavefronts"] for stats, _ in found)
    least, title = min(found, key=lambda pair: float(pair[0]["global"]["coalescing_percent"]))
    percent = f"{least['global']['coalescing_percent']:.1f} %"
    lines += [f"- Simulated calls: {conflicts} bank conflicts."]
    lines += [f"- Coalescing {percent} or more; that is `{readable(least['mangled'])}` in {title}."]
    ratios: dict[str, list[float]] = defaultdict(list)
    for call, stats_of_call in simulated:
        if call.mma and "backward" not in call.title:
            ratios[call.title.split(", ", 1)[1].partition(", bfloat16")[0]] += [mma_of(stats_of_call) / call.mma]
    listed = ", ".join(f"{mode}: {max(values):.3f}" for mode, values in ratios.items())
    lines += [f"- mma instructions of attention forward, in parts of the least there can be: {listed}."]
    return "\n".join(lines)


def filled(page: str, name: str, text: str) -> str:
    """The page with that text between `<!-- name -->` and the next `<!-- end -->`."""
    start = f"<!-- {name} -->\n"
    assert page.count(start) == 1, f"docs/cuda.md must have one place for {name}, got {page.count(start)}"
    before, _, rest = page.partition(start)
    return f"{before}{start}{text}\n{rest[rest.index('<!-- end -->') :]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nvdisasm", default=shutil.which("nvdisasm"), help="default: that on the path")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda-report", help="where the library is built")
    parser.add_argument("--reuse", action="store_true", help="take the build that is there")
    options = parser.parse_args()
    if options.nvdisasm is None:
        raise SystemExit("cuda_report needs nvdisasm: pip install nvidia-cuda-nvdisasm, then --nvdisasm PATH")
    folder = options.build.resolve()
    if not options.reuse:
        build(folder)
    built = read_build(folder)
    kernels = read_kernels(folder, built.log, options.nvdisasm)
    simulated = [(call, cuda_calls.counted(call)) for call in cuda_calls.calls()]
    chips = [f"{chip.name}, us" for chip in cuda_occupancy.CHIPS]
    parts = {
        "summary": summary(kernels, simulated),
        "library": library_line(built),
        "families": families_table(kernels),
        "compiled": compiled_table(kernels),
        "groups": groups_table(kernels),
        "loops": loops_table(kernels),
        "occupancy": occupancy_table(kernels),
        "simulated": simulated_table(kernels, simulated),
        "roofline": table(["kernel", "GFLOP", "MB", *chips, "limit"], cuda_calls.roofline_rows()),
    }
    page = PAGE.read_text()
    for name, text in parts.items():
        page = filled(page, name, text)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
