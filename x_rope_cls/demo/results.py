"""What a run of the demo found, before it is printed or drawn."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .agreement import Agreement
from .measure import Moved, Timing


@dataclass
class TaskResults:
    """Of one data set. Lists are by seed, dictionaries by variant.

    Attributes:
        name, title: of the task.
        recordings: how many in training, validation and test.
        tokens: in a sequence, special tokens included.
        epochs: passes over the training data.
        test: test accuracies.
        val: validation accuracies.
        best_epochs: the epochs whose weights were tested.
        moved: what other positions do, by change.
        shifts: how far tokens were moved for ``by_shift``.
        by_shift: what tokens moved by each of ``shifts`` do.
        agreement: with the float64 reference.
        parameters: how many a model has.
        parity: largest difference of a logit from x-transformers' code with the same weights.
    """

    name: str
    title: str
    recordings: tuple[int, int, int]
    tokens: int
    epochs: int
    test: dict[str, list[float]] = field(default_factory=dict)
    val: dict[str, list[float]] = field(default_factory=dict)
    best_epochs: dict[str, list[int]] = field(default_factory=dict)
    moved: dict[str, list[list[Moved]]] = field(default_factory=dict)
    shifts: list[int] = field(default_factory=list)
    by_shift: dict[str, list[list[Moved]]] = field(default_factory=dict)
    agreement: list[Agreement] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    parity: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionMap:
    """Attention of CLS, or of a pool, over an image: weights (rows, columns) with the pixels moved by ``shift``."""

    variant: str
    shift: int
    weights: Tensor


@dataclass
class Results:
    """All of a run.

    Attributes:
        machine: processor, instruction set, threads and versions, in one line each.
        seeds: how many.
        tasks: one for each data set.
        timings: one for each workload and kind of work.
        image: (rows, columns), the picture that ``maps`` are of.
        maps: attention of CLS and of the pool.
        explained: what ``explain`` says about models for the first task, by variant.
        seconds: the whole run.
    """

    machine: list[str]
    seeds: int
    tasks: list[TaskResults] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    image: Tensor | None = None
    maps: list[AttentionMap] = field(default_factory=list)
    explained: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Writes all numbers as JSON."""
        path.write_text(json.dumps(asdict(self, dict_factory=_plain), indent=1) + "\n", encoding="utf-8")


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in pairs}


def mean_sd(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation; the latter is nan for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def compare(task: TaskResults, variant: str, with_variant: str) -> str:
    """A sentence on the difference of two variants' test accuracies, paired by seed.

    It is within the spread if it is not above the largest of the standard deviations, over seeds, of itself and of both
    variants.
    """
    pairs = zip(task.test[variant], task.test[with_variant], strict=True)
    mean, sd = mean_sd([100 * (a - b) for a, b in pairs])
    lead = f"{task.name}: {variant} - {with_variant} = {mean:+.1f}"
    if sd != sd:
        return f"{lead} points; one seed, so no spread to compare with"
    spread = max(sd, *(100 * mean_sd(task.test[each])[1] for each in (variant, with_variant)))
    verdict = "within the spread" if abs(mean) <= spread else "beyond the spread"
    return f"{lead} ± {sd:.1f} points: {verdict}"
