"""What nvcc made of the CUDA kernels: reads the output of ptxas -v and the SASS that nvdisasm prints."""

from __future__ import annotations

import functools
import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Instructions that the table of kernels counts, in the order in which they are tried.
COUNTED = {
    "HMMA": r"HMMA",
    "LDSM": r"LDSM",
    "LDG.128": r"LDG\.E(\.\w+)*\.128",
    "LDGSTS.128": r"LDGSTS\.E(\.\w+)*\.128",
    "STG.128": r"STG\.E(\.\w+)*\.128",
    "LDS": r"LDS\b",
    "STS": r"STS\b",
    "other": r".",
}


@dataclass(frozen=True)
class Group:
    """Instructions of the main loops that serve one purpose."""

    name: str
    pattern: str  # of the opcode's first part
    purpose: str


GROUPS = (
    Group("HMMA", "HMMA", "the matrix products: 16 x 8 x 16 multiply-adds each"),
    Group("copies", "LDGSTS", "the next tile from global to shared memory, 16 bytes a thread, past the registers"),
    Group("fragments", "LDSM|MOVM", "operands of HMMA out of shared memory, four 8 x 8 matrices each"),
    Group("exponentials", "MUFU", "2^x of the scores and of what rescales a row; reciprocals where numbers divide"),
    Group(
        "floats",
        "F(ADD|MUL|FMA|MNMX|SEL|SETP?|CHK)|D(ADD|MUL|FMA|SETP)",
        "softmax: maximum, scale, sum, rescaled output; backward P (dP - delta); biases; tokens that are not there",
    ),
    Group(
        "conversions",
        "F2FP?|F2I|I2F|I2I|PRMT|H(ADD|MUL|SET)2",
        "weights and gradients of scores to operands of the next product; biases to float32",
    ),
    Group("exchanges", "SHFL|VOTEU?|REDUX|MATCH", "the maximum of a row, between the four lanes that have it"),
    Group(
        "memory",
        "LD[GSLC]?|ST[GSL]?|ULDC|ATOM[GS]?|RED|CCTL",
        "lists of tokens where they are ordered; logsumexp and delta of queries; biases; arguments of the kernel",
    ),
    Group(
        "addresses",
        "U?(IADD3?|IMAD|LEA|LOP3?|SHF|IMNMX|SEL|IABS|POPC|FLO|BREV|BMSK|SGXT)",
        "where the rows of the next tile lie (any strides, 64 bits); numbers of keys; random numbers of dropout",
    ),
    Group("predicates", "U?(ISETP|PLOP3|PSETP)|P2R|R2P", "which rows and keys of a tile there are; ends of loops"),
    Group("moves", "U?MOV|CS2R|S2U?R|R2UR|HFMA2", "sums set to zero, constants, copies of registers"),
    Group(
        "branches",
        "BRA|BRX|JMP|CALL|RET|EXIT|BSSY|BSYNC|BREAK|NOP",
        "the loop; past what this tile does not need; instructions that never run (`@!PT`)",
    ),
    Group("waits", "BAR|DEPBAR|LDGDEPBAR|WARPSYNC", "for the copies of a tile, and for the other warps of the block"),
)


@dataclass
class Resources:
    """Of a kernel on one architecture, by ptxas -v."""

    registers: int
    spills: int  # bytes stored and loaded
    shared: int  # static, bytes


@dataclass
class Instruction:
    """One line of SASS."""

    predicate: str  # "" or "@!P0"
    opcode: str  # "IMAD.MOV.U32"
    operands: str
    targets: tuple[int, ...] = ()  # of a branch: places in the kernel's list

    @property
    def ends(self) -> bool:
        """Whether what stands below is not run next."""
        if self.predicate:
            return False
        # `BRA P1, ...` has a further condition, BRA.DIV leads to the path of a divergent warp.
        always = self.opcode in ("BRA", "JMP") and not re.match(r"!?U?P\d", self.operands)
        return always or self.opcode.split(".")[0] in ("EXIT", "RET", "BRX")


@dataclass
class Kernel:
    """One instance, by name of the architecture: {"sm_80": ...}."""

    name: str
    resources: dict[str, Resources] = field(default_factory=dict)
    sass: list[Instruction] = field(default_factory=list)  # of sm_80

    @property
    def family(self) -> str:
        """`rope_kernel` of `rope_kernel<bf16, kHalves>`."""
        return self.name.partition("<")[0]

    @property
    def arguments(self) -> tuple[str, ...]:
        """The template's."""
        inside = self.name.partition("<")[2].removesuffix(">")
        return tuple(inside.split(", ")) if inside else ()


# ---- names ---------------------------------------------------------------------------------------


def key(mangled: str) -> str:
    """A mangled name without the part that differs between two compilations of a file."""
    return re.sub(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_[0-9a-f]{8}", "12_GLOBAL__N_1", mangled)


@functools.cache
def enumerators() -> dict[str, list[str]]:
    """Names of each `enum class` of the kernels, which count from 0."""
    sources = [*(ROOT / "csrc" / "kernels").glob("*.h"), *(ROOT / "csrc" / "kernels" / "cuda").iterdir()]
    enums = re.findall(r"enum class (\w+)[^{;]*{([^}]*)}", "\n".join(path.read_text() for path in sorted(sources)))
    return {name: re.findall(r"\bk\w+", body) for name, body in enums}


def shorten(demangled: str, enums: dict[str, list[str]]) -> str:
    """`rope_kernel<bf16, kHalves>` of `void x_rope_cls::cuda::rope_kernel<__nv_bfloat16, (x_rope_cls::...)2>(...)`."""

    def value(match: re.Match[str]) -> str:
        names = enums.get(match[1].rpartition("::")[2])
        return names[int(match[2])] if names else match[2]

    name = demangled.strip().replace("(anonymous namespace)::", "")
    name = re.sub(r"\(([\w:]+)\)(\d+)", value, name)
    name = name.replace("x_rope_cls::cuda::", "").replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
    return name.removeprefix("void ").partition("(")[0]


@functools.cache
def readable(mangled: str) -> str:
    result = subprocess.run(["c++filt", key(mangled)], check=True, capture_output=True, text=True)
    return shorten(result.stdout, enumerators())


# ---- ptxas ---------------------------------------------------------------------------------------


def read_ptxas(log: str) -> dict[tuple[str, str], Resources]:
    """Of every kernel, by `key` and architecture."""
    found = {}
    for entry in log.split("Compiling entry function")[1:]:
        head = re.match(r" '(\w+)' for '(sm_\w+)'", entry)
        properties, _, after = entry.partition("Used ")
        registers = re.match(r"(\d+) registers", after)
        if head is None or registers is None:
            raise ValueError(f"unknown output of ptxas -v: {entry[:500]}")
        shared = re.search(r"(\d+) bytes smem", after.splitlines()[0])
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", properties))
        found[key(head[1]), head[2]] = Resources(int(registers[1]), spills, int(shared[1]) if shared else 0)
    return found


# ---- SASS ----------------------------------------------------------------------------------------


def read_sass(text: str) -> dict[str, list[Instruction]]:
    """Of `nvdisasm -c`: the instructions of every kernel, by `key`."""
    return {
        key(name): instructions(body)
        for name, body in re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", text, re.M | re.S)
    }


def instructions(body: str) -> list[Instruction]:
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif part := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            found.append(Instruction(part[1] or "", part[2], part[3]))
    for instruction in found:
        if instruction.opcode.split(".")[0] in ("BRA", "BRX", "JMP", "CALL"):
            names = re.findall(r"\.L_x_\d+", instruction.operands)
            instruction.targets = tuple(labels[name] for name in names if name in labels)
    return found


def counted(sass: list[Instruction]) -> Counter[str]:
    return Counter(next(name for name, pattern in COUNTED.items() if re.match(pattern, i.opcode)) for i in sass)


def group_of(instruction: Instruction) -> str:
    if instruction.predicate == "@!PT":  # never run: ptxas keeps a distance with it
        return "branches"
    if instruction.opcode.startswith("IMAD.MOV"):  # a copy that runs on the multiplier
        return "moves"
    first = instruction.opcode.split(".")[0]
    return next((group.name for group in GROUPS if re.fullmatch(group.pattern, first)), "unknown")


def reaches(sass: list[Instruction], start: int, end: int, without: int) -> bool:
    """Whether `end` can be run after `start` without `without`."""
    seen = {without}
    stack = [start]
    while stack:
        at = stack.pop()
        if at in seen or at >= len(sass):
            continue
        if at == end:
            return True
        seen.add(at)
        stack += sass[at].targets
        if not sass[at].ends:
            stack.append(at + 1)
    return False


def loops(sass: list[Instruction], opcode: str) -> list[range]:
    """Loops with such instructions: from the target of a branch back to that branch.

    A jump back out of code that the compiler moved behind the end is no loop: its target can be passed by.
    """
    found = []
    for last, instruction in enumerate(sass):
        for first in instruction.targets:
            if first > last or not any(i.opcode.startswith(opcode) for i in sass[first : last + 1]):
                continue
            if first == 0 or not reaches(sass, 0, last, without=first):
                found.append(range(first, last + 1))
    return found


def main_loop(sass: list[Instruction], opcode: str = "HMMA") -> range | None:
    """The loop over tiles: of the innermost with at least half of the products that with most, the first of these.

    A loop around it is over the heads of a group, a loop with few products inside it is a part of a tile's work. Beside
    it are loops over tokens without a position, in narrower tiles or equal and later.
    """
    found = loops(sass, opcode)
    products = {loop: sum(sass[i].opcode.startswith(opcode) for i in loop) for loop in found}
    large = [loop for loop in found if 2 * products[loop] >= max(products.values())]
    inner = [a for a in large if not any(b is not a and set(b) < set(a) for b in large)]
    return max(inner, key=lambda loop: products[loop], default=None)


def grouped(sass: list[Instruction], loop: range) -> Counter[str]:
    return Counter(group_of(sass[i]) for i in loop)
