"""What is measured beside accuracy: time, agreement with the reference, and what a change of positions does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from x_rope_cls import Rotary, reference, rope_attention

from .data import DIGITS_GRID, Split, Task, grid_positions, sheets
from .model import NUM_SPECIAL, PLAIN, VARIANTS, Classifier, Size, build, tables, tables_for, token_positions
from .train import BATCH, accuracy, logits, make_optimizer, training_step

FORWARD, STEP = "forward", "training step"
_WARM_UP_ROUNDS = 3


@dataclass
class Timing:
    """Seconds of one kind of work on one batch, for every variant; sample i of all variants is of the same round."""

    workload: str
    kind: str
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def ratios(self, variant: str) -> list[float]:
        """Time of a variant over that of plain x-transformers, round by round."""
        return [own / peer for own, peer in zip(self.seconds[variant], self.seconds[PLAIN], strict=True)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def workloads(tasks: list[Task], size: Size, sheet_side: int) -> list[tuple[str, Task, Split, Tensor]]:
    """(name, task, batch, positions) to time: a training batch of each task, and sheets of many digits."""
    found = []
    for task in tasks:
        batch = task.train.rows(slice(BATCH))
        tokens = batch.x.shape[1] + NUM_SPECIAL
        found.append((f"{task.name}, {len(batch)} x {tokens}", task, batch, task.positions))
    digits = tasks[0]
    batch = sheets(digits.train, sheet_side, 2)
    positions = grid_positions(*(sheet_side * cells for cells in DIGITS_GRID))
    name = f"sheets, {len(batch)} x {len(positions) + NUM_SPECIAL}"
    return [*found, (name, digits, batch, positions)]


def time_workload(
    name: str, task: Task, batch: Split, positions: Tensor, size: Size, rounds: int, on_round: Callable[[], None]
) -> list[Timing]:
    """Times all variants and plain x-transformers by turns, with the same weights; each round starts with another."""
    models = {variant: build(variant, task, size, seed=0) for variant in (PLAIN, *VARIANTS)}
    rotary = tables(token_positions(positions), size)
    given = {variant: tables_for(variant, rotary) for variant in models}
    work = {
        FORWARD: {v: _forward(model, batch, given[v]) for v, model in models.items()},
        STEP: {v: _step(model, batch, given[v]) for v, model in models.items()},
    }
    timings = []
    for kind, calls in work.items():
        timing = Timing(name, kind, {variant: [] for variant in calls})
        order = list(calls)
        for turn in range(-_WARM_UP_ROUNDS, rounds):
            order = [*order[1:], order[0]]
            for variant in order:
                start = time.perf_counter()
                calls[variant]()
                if turn >= 0:
                    timing.seconds[variant].append(time.perf_counter() - start)
            on_round()
        timings.append(timing)
    return timings


def timing_rounds(rounds: int) -> int:
    """How often ``time_workload`` calls on_round for one workload."""
    return 2 * (rounds + _WARM_UP_ROUNDS)


def _forward(model: Classifier, batch: Split, rotary: Any) -> Callable[[], Any]:
    return lambda: logits(model, batch, rotary)


def _step(model: Classifier, batch: Split, rotary: Any) -> Callable[[], Any]:
    optimizer = make_optimizer(model)

    def step() -> None:
        model.train()
        training_step(model, optimizer, batch, rotary)

    return step


@dataclass(frozen=True)
class Agreement:
    """Largest error of outputs and gradients, over all layers of a trained model on real recordings.

    Errors are in units of the dtype's eps times the largest element of the float64 reference.

    Attributes:
        variant: a key of VARIANTS.
        dtype: of q, k and v.
        output: of the operator.
        output_eager: of the reference's formulas in plain PyTorch, in this dtype.
        gradient: of the operator, over dq, dk and dv.
        gradient_eager: likewise of plain PyTorch.
    """

    variant: str
    dtype: str
    output: float
    output_eager: float
    gradient: float
    gradient_eager: float


def agreement(model: Classifier, variant: str, split: Split, rotary: Rotary, size: Size) -> list[Agreement]:
    """Compares the operator with the float64 reference on the q, k and v that a trained model makes of recordings."""
    layers = _record_qkv(model, split, rotary, size)
    has_position = torch.arange(rotary.cos.shape[0]) >= NUM_SPECIAL
    rotary = Rotary(rotary.cos, rotary.sin, has_position, rotary.interleaved)
    options = {"cls_rope": VARIANTS[variant]["cls_rope"], "key_mask": _with_special(split.mask)}
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        eps = torch.finfo(dtype).eps
        worst = [0.0] * 4
        for qkv in layers:
            rounded = [t.to(dtype) for t in qkv]
            weights = torch.randn(rounded[0].shape).to(dtype)
            exact = _run(reference.rope_attention, [t.double() for t in rounded], weights.double(), rotary, options)
            ours = _run(rope_attention, rounded, weights, rotary, options)
            eager = _run(reference.rope_attention, rounded, weights, rotary, options)
            errors = [[_error(got, want) / eps for got, want in zip(r, exact, strict=True)] for r in (ours, eager)]
            found = [errors[0][0], errors[1][0], max(errors[0][1:]), max(errors[1][1:])]
            worst = [max(pair) for pair in zip(worst, found, strict=True)]
        rows.append(Agreement(variant, str(dtype).removeprefix("torch."), *worst))
    return rows


def _run(attention: Any, qkv: list[Tensor], weights: Tensor, rotary: Rotary, options: dict[str, Any]) -> list[Tensor]:
    """Output, and gradients of its product with weights."""
    leaves = [t.detach().requires_grad_() for t in qkv]
    out = attention(*leaves, rotary, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def _with_special(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else nn.functional.pad(mask, (NUM_SPECIAL, 0), value=True)


def _record_qkv(model: Classifier, split: Split, rotary: Any, size: Size) -> list[list[Tensor]]:
    """q, k and v of each attention layer, (recordings, heads, tokens, head_dim)."""
    found: dict[str, list[Tensor]] = {"to_q": [], "to_k": [], "to_v": []}
    with _outputs_of(model, found):
        logits(model, split, rotary)
    heads = [[t.unflatten(-1, (size.heads, size.dim_head)).transpose(1, 2) for t in ts] for ts in found.values()]
    return [list(layer) for layer in zip(*heads, strict=True)]


@contextmanager
def _outputs_of(model: nn.Module, found: dict[str, list[Tensor]]) -> Iterator[None]:
    """Appends the outputs of all submodules with these names, in the order of the calls."""

    def recorder(name: str) -> Any:
        return lambda module, inputs, output: found[name].append(output.clone())

    handles = []
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in found:
            handles.append(module.register_forward_hook(recorder(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cls_attention(model: Classifier, variant: str, recording: Split, rotary: Rotary, size: Size) -> Tensor:
    """How much the CLS token attends to each ordinary token in the last layer, mean over heads: (tokens,), sum 1."""
    q, k, _ = _record_qkv(model, recording, rotary, size)[-1]
    tokens = k.shape[2]
    has_position = torch.arange(tokens) >= NUM_SPECIAL
    rotary = Rotary(rotary.cos, rotary.sin, has_position, rotary.interleaved)
    # With the identity as values, the output of attention is its weights.
    identity = torch.eye(tokens).expand(*k.shape[:2], tokens, tokens)
    weights = rope_attention(q, k, identity, rotary, cls_rope=VARIANTS[variant]["cls_rope"])
    mean = weights[0, :, NUM_SPECIAL - 1, NUM_SPECIAL:].mean(dim=0)
    return mean / mean.sum()


@dataclass(frozen=True)
class Moved:
    """What another choice of positions does to a trained model on the test set.

    Attributes:
        name: of the change.
        logits: largest change of a logit, in units of the standard deviation of all logits.
        accuracy: after the change.
    """

    name: str
    logits: float
    accuracy: float


def moved(model: Classifier, task: Task, size: Size, shift: float) -> list[Moved]:
    """Moves ordinary tokens, all tokens, and (for control) gives the tokens each other's positions."""
    order = torch.randperm(len(task.positions), generator=torch.Generator().manual_seed(0))
    changes = {
        f"tokens moved by {shift:g}": token_positions(task.positions, shift),
        "CLS and memory too": token_positions(task.positions, shift, shift),
        "positions shuffled": token_positions(task.positions[order]),
    }
    return _compare_positions(model, task, size, changes)


def moved_by_shift(model: Classifier, task: Task, size: Size, shifts: list[int]) -> list[Moved]:
    """Moves all ordinary tokens away from the special ones by each number of positions."""
    changes = {f"tokens moved by {shift}": token_positions(task.positions, shift) for shift in shifts}
    return _compare_positions(model, task, size, changes)


def _compare_positions(model: Classifier, task: Task, size: Size, changes: dict[str, Tensor]) -> list[Moved]:
    before = logits(model, task.test, tables(token_positions(task.positions), size))
    rows = []
    for name, positions in changes.items():
        after = logits(model, task.test, tables(positions, size))
        change = ((after - before).abs().max() / before.std()).item()
        rows.append(Moved(name, change, accuracy(after, task.test.y)))
    return rows


def parity(model: Classifier, task: Task, size: Size) -> float:
    """Largest difference of a test logit between x_transformers.Encoder and a trained ``rotate`` model's weights."""
    plain = build(PLAIN, task, size, seed=0)
    plain.load_state_dict(model.state_dict())
    rotary = tables(token_positions(task.positions), size)
    theirs = logits(plain, task.test, tables_for(PLAIN, rotary))
    return (logits(model, task.test, rotary) - theirs).abs().max().item()
