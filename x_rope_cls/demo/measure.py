"""What is measured beside accuracy: time, what a change of positions does, and what CLS attends to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from x_rope_cls import Rotary, rope_attention

from .agreement import record_qkv, with_special
from .data import DIGITS_GRID, Split, Task, grid_positions, sheets
from .model import (
    CLS_IN_FRONT,
    NUM_SPECIAL,
    OWN_POOL,
    PLAIN,
    POOL,
    VARIANTS,
    Classifier,
    Size,
    build,
    tables,
    tables_for,
    token_positions,
    with_own_pool,
)
from .train import BATCH, accuracy, logits, make_optimizer, training_step

FORWARD, STEP = "forward", "training step"
TIMED = (PLAIN, *VARIANTS, OWN_POOL)
_WARM_UP_ROUNDS = 3


@dataclass
class Timing:
    """Seconds of one kind of work on one batch, for every variant; sample i of all variants is of the same round."""

    workload: str
    kind: str
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def ratios(self, variant: str, beside: str = PLAIN) -> list[float]:
        """Time of a variant over that of plain x-transformers, or of another variant, round by round."""
        return [own / peer for own, peer in zip(self.seconds[variant], self.seconds[beside], strict=True)]


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
    """Times everything in TIMED by turns, with the same weights; each round starts with another."""
    models = {variant: build(variant, task, size, seed=0) for variant in TIMED}
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


def cls_attention(model: Classifier, recording: Split, rotary: Rotary, size: Size) -> Tensor:
    """How much CLS, or the pool's query, attends to each token of the data, mean over heads: (tokens,), sum 1.

    In the last layer. The map of x_transformers.AttentionPool is that of this package's with the same weights.

    Args:
        model: trained.
        recording: one, without a mask.
        rotary: tables of [memory, CLS, tokens].
        size: of the encoder.
    """
    given = tables_for(model.variant, rotary)
    if model.variant not in CLS_IN_FRONT:
        model = with_own_pool(model, size) if model.variant == POOL else model
        with torch.no_grad():
            mean = model.eval().weights(recording.x, given)[0].mean(dim=0)
        return mean / mean.sum()
    q, k, _ = record_qkv(model, recording, rotary, size)[-1]
    tokens = k.shape[2]
    # With the identity as values, the output of attention is its weights.
    identity = torch.eye(tokens).expand(*k.shape[:2], tokens, tokens)
    weights = rope_attention(q, k, identity, with_special(rotary), cls_rope=VARIANTS[model.variant]["cls_rope"])
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
    before = logits(model, task.test, tables_for(model.variant, tables(token_positions(task.positions), size)))
    rows = []
    for name, positions in changes.items():
        after = logits(model, task.test, tables_for(model.variant, tables(positions, size)))
        change = ((after - before).abs().max() / before.std()).item()
        rows.append(Moved(name, change, accuracy(after, task.test.y)))
    return rows
