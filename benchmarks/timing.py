"""Timing of several sides by turns in one process."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_LEAST_SAMPLE_SECONDS = 2e-3  # shorter calls are repeated, so that the clock's own cost does not count
_MOST_CALLS = 2000
_MOST_ROUNDS = 200
_WARM_UP_SHARE = 0.1  # of the time for a row
_CACHED_SECONDS = 0.05  # what a longer call finds in the caches makes no difference
_REWARM_SECONDS = 10e-3  # until short calls are as fast as they get, after a side that emptied the caches
_LONG_SECONDS = 1.0  # calls of which the first is not slower than the others by a part that counts


@dataclass
class Samples:
    """Times of one side; sample i of all sides is of the same round.

    Attributes:
        calls: how many calls one sample is the mean of.
        wall: seconds a call.
        cpu: seconds of processor time a call, of all threads.
    """

    calls: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def take_turns(
    sides: Mapping[str, Callable[[], Any]], seconds: float, rounds: int, flush: Callable[[], None] | None = None
) -> dict[str, Samples]:
    """Times all sides, A B A B, for about so many seconds.

    Args:
        sides: what to call, by name.
        seconds: for all sides and rounds together, warm-up included.
        rounds: the least number of rounds, however long that takes; of long calls the warm-up is one of them.
        flush: called in front of every call, outside the time; None: caches are warm. For that each sample of short
            calls follows some that are not timed, since the side before has left its own data in the caches.
    """
    samples = {name: Samples(1) for name in sides}
    with _no_garbage_collection():
        first = {name: _warm_up(run, _WARM_UP_SHARE * seconds / len(sides)) for name, run in sides.items()}
        estimates = {name: wall for name, (wall, _) in first.items()}
        if flush is None and min(estimates.values()) > _LONG_SECONDS:
            rounds -= 1
            for name, (wall, cpu) in first.items():
                samples[name].wall.append(wall)
                samples[name].cpu.append(cpu)
        if flush is None:
            for name, estimate in estimates.items():
                samples[name].calls = _calls(_LEAST_SAMPLE_SECONDS, estimate)
        untimed = dict.fromkeys(sides, 0)
        if flush is None and min(estimates.values()) < _CACHED_SECONDS:
            untimed = {name: _calls(_REWARM_SECONDS, estimate) for name, estimate in estimates.items()}
        round_seconds = sum(estimates[name] * (untimed[name] + samples[name].calls) for name in sides)
        possible = int((1 - _WARM_UP_SHARE) * seconds / round_seconds)
        for _ in range(min(_MOST_ROUNDS, max(rounds, possible))):
            for name, run in sides.items():
                for _ in range(untimed[name]):
                    run()
                _sample(run, samples[name], flush)
    return samples


def _calls(seconds: float, estimate: float) -> int:
    return min(_MOST_CALLS, max(1, math.ceil(seconds / estimate)))


def _sample(run: Callable[[], Any], samples: Samples, flush: Callable[[], None] | None) -> None:
    if flush is not None:
        flush()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(samples.calls):
        run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    samples.wall.append(wall / samples.calls)
    samples.cpu.append(cpu / samples.calls)


def _warm_up(run: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Calls for so long, at least once; returns wall and processor time of the fastest call."""
    start = time.perf_counter()
    best = (math.inf, math.inf)
    while True:
        cpu, before = time.process_time(), time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, (now - before, time.process_time() - cpu))
        if now - start >= seconds:
            return best


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
