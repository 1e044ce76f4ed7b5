"""What a row of the benchmark is made of."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_rope_cls import _C

OURS = "x_rope_cls"

Run = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Side:
    """A peer: another way to do the work of a row.

    Attributes:
        name: of the package or of what it does.
        run: does the work once and returns its results, in the order of those of ours.
        target: ours is to be at least this many times as fast.
        memory_target: ours is to need at most this share of the peer's memory. Where one is set, memory is measured.
        same: computes what ours computes, which is then asserted before anything is timed.
        slow: left out of quick runs (what has to be compiled first).
    """

    name: str
    run: Run
    target: float | None = None
    memory_target: float | None = None
    same: bool = True
    slow: bool = False


@dataclass(frozen=True)
class Work:
    """The least that must be done, whoever does it.

    Attributes:
        flops: floating-point operations, a multiply-add counting two.
        read: bytes that are read from memory and not written.
        copied: bytes read plus bytes written where as much is written as is read.
        bfloat16: the arithmetic can be bfloat16 dot products, where the instruction set in use has them.
        int16: those of the operations that can be dot products of 16-bit integers, likewise.
    """

    flops: float = 0.0
    read: float = 0.0
    copied: float = 0.0
    bfloat16: bool = False
    int16: float = 0.0

    @property
    def memory(self) -> bool:
        """Whether memory is part of it."""
        return self.read > 0 or self.copied > 0

    def seconds(self, limits: Mapping[str, Any]) -> float:
        """Time on a machine with these limits (`x_rope_cls._C.Limits`) if arithmetic and memory overlap."""
        rate = limits["fma_float32_gflops"]
        if self.bfloat16 and limits["dot_bfloat16_gflops"] is not None:
            rate = limits["dot_bfloat16_gflops"]
        int16 = limits["dot_int16_gflops"] or rate
        arithmetic = (self.flops - self.int16) / rate + self.int16 / int16
        memory = self.read / limits["read_gbs"] + self.copied / limits["copy_gbs"]
        return max(arithmetic, memory) / 1e9


@dataclass(frozen=True)
class Case:
    """A row's work, ready to run.

    Attributes:
        ours: does the work once with this package.
        peers: the others.
        work: the least that must be done; None: no share of the machine's limit is stated.
        expected: the results of ours computed otherwise, for rows without a peer that computes the same.
    """

    ours: Run
    peers: list[Side]
    work: Work | None = None
    expected: Run | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: ``group/…``, what ``--rows`` selects by.
        title: what is done, for the table.
        build: makes the case; called with ``sizes``.
        sizes: arguments of ``build``.
        tiny: those that differ where only the structure is tested.
        backward: gradients are computed; else everything runs in inference mode.
        tolerance: of the relative error (Euclidean norm) between ours and what must be the same.
        share_target: share of the machine's limit that ours is to reach.
        busy_target: share of all threads' time that ours is to keep busy.
        series: (name of a line in the plot over x, x); None: no such line.
        quick: part of quick runs.
        note: how the limit is counted and what else there is to say.
    """

    name: str
    title: str
    build: Callable[..., Case]
    sizes: Mapping[str, Any]
    tiny: Mapping[str, Any]
    backward: bool = False
    tolerance: float = 1e-4
    share_target: float | None = None
    busy_target: float | None = None
    series: tuple[str, float] | None = None
    quick: bool = True
    note: str = ""

    @property
    def group(self) -> str:
        """The part of the name in front of the first slash."""
        return self.name.partition("/")[0]

    def make(self, tiny: bool = False) -> Case:
        """The case, from the same random numbers each time."""
        torch.manual_seed(0)
        return self.build(**{**self.sizes, **(self.tiny if tiny else {})})


def all_rows() -> list[Row]:
    """The rows of every module in ``benchmarks/rows``, in the order of the modules' names.

    Raises:
        ValueError: two rows have the same name.
    """
    package = importlib.import_module(".rows", __package__)
    modules = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    found = [row for name in modules for row in importlib.import_module(f"{package.__name__}.{name}").rows()]
    names = [row.name for row in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"all_rows: names of rows must be unique, got {name!r} twice")
    return found


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def name_of(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def has_bfloat16_dot() -> bool:
    """Whether the instruction set in use has bfloat16 dot products, on which some targets depend."""
    return _C.cpu_isa() == "avx512_bf16"


def with_gradients(run: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor) -> Run:
    """Forward and backward: the output and the gradients with respect to inputs."""

    def both() -> tuple[Tensor, ...]:
        out = run()
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    return both


def one_thread(run: Run) -> Run:
    """The same work on one thread."""

    def alone() -> Tensor | tuple[Tensor, ...]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run()
        finally:
            torch.set_num_threads(threads)

    return alone
