"""Measures one row: agreement, times, memory, share of the machine's limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .case import OURS, Case, Row, Run, Work
from .machine import best_limits
from .memory import peak_memory
from .results import PeerResult, RowResult, SideResult, Spread
from .timing import take_turns


def measure_row(
    row: Row,
    seconds: float,
    *,
    quick: bool = False,
    tiny: bool = False,
    flush: Callable[[], None] | None = None,
    limits: Callable[[], dict[str, Any]] | None = None,
) -> RowResult:
    """Compares the results of all sides, then times them by turns. What goes wrong is written down, not raised.

    Args:
        row: what to measure.
        seconds: for the timing.
        quick: without slow sides.
        tiny: with the row's tiny sizes.
        flush: empties the caches; None: they stay warm.
        limits: measures the machine's limits; called around the timing of work that reads or copies memory, whose
            bandwidth changes within minutes on machines that are shared. None: not measured here.
    """
    sizes = {name: _plain(value) for name, value in {**row.sizes, **(row.tiny if tiny else {})}.items()}
    result = RowResult(
        row.name, row.title, row.backward, sizes, row.note, row.series, row.share_target, row.busy_target
    )
    torch.compiler.reset()  # what earlier rows compiled must not make shapes dynamic here
    try:
        case = row.make(tiny)
        case.peers[:] = [peer for peer in case.peers if not (quick and peer.slow)]
        result.work = asdict(case.work) if case.work else None
        with torch.inference_mode(not row.backward):
            errors = _agree(row, case, result)
            around = limits if limits is not None and case.work is not None and case.work.memory else None
            before = [around()] if around else []
            _time(case, errors, result, seconds, 2 if tiny else 3, flush)
            if around:
                result.bandwidth = _bandwidth([*before, around()])
        _measure_memory(row, case, result, tiny)
    except ModuleNotFoundError as error:
        result.status, result.reason = "skipped", f"{error.name} is not installed"
    except Exception as error:
        result.status, result.reason = "failed", f"{type(error).__name__}: {error}"
    return result


def _agree(row: Row, case: Case, result: RowResult) -> dict[str, float | None]:
    """Relative error of ours beside each peer.

    Raises:
        AssertionError: it is above the row's tolerance.
    """
    ours = _results(case.ours)
    if case.expected is not None:
        result.error = _error(ours, _results(case.expected), row.tolerance, "the expected result")
    return {
        peer.name: _error(ours, _results(peer.run), row.tolerance, peer.name) if peer.same else None
        for peer in case.peers
    }


def _results(run: Run) -> list[Tensor]:
    found = run()
    return [t.detach().double() for t in ([found] if isinstance(found, Tensor) else found)]


def _error(ours: list[Tensor], theirs: list[Tensor], tolerance: float, what: str) -> float:
    """The largest relative error (Euclidean norm) of any result.

    A result that is far smaller than the largest one, or 0 but for rounding, is seen relative to that.
    """
    worst = 0.0
    floor = 1e-2 * max(t.norm().item() for t in theirs)
    for index, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        assert own.shape == other.shape, f"result {index}: {tuple(own.shape)} beside {tuple(other.shape)} of {what}"
        error = (own - other).norm().item() / max(other.norm().item(), floor, 1e-30)
        assert error <= tolerance, f"result {index} differs from {what} by {error:.1e}, tolerance {tolerance:.0e}"
        worst = max(worst, error)
    return worst


def _time(
    case: Case,
    errors: dict[str, float | None],
    result: RowResult,
    seconds: float,
    rounds: int,
    flush: Callable[[], None] | None,
) -> None:
    samples = take_turns({OURS: case.ours, **{peer.name: peer.run for peer in case.peers}}, seconds, rounds, flush)
    threads = torch.get_num_threads()
    result.ours = SideResult.of(OURS, samples[OURS], threads)
    for peer in case.peers:
        found = PeerResult(**vars(SideResult.of(peer.name, samples[peer.name], threads)))
        walls = zip(samples[peer.name].wall, samples[OURS].wall, strict=True)
        found.ratio = Spread.of([other / own for other, own in walls])
        found.target, found.error = peer.target, errors[peer.name]
        found.reached = None if peer.target is None else found.ratio.median >= peer.target
        result.peers.append(found)
    if result.busy_target is not None:
        result.busy_reached = result.ours.busy >= result.busy_target


def _bandwidth(measured: list[dict[str, Any]]) -> dict[str, float]:
    """The best of those of memory."""
    return {name: value for name, value in best_limits(measured).items() if name in ("copy_gbs", "read_gbs")}


def _measure_memory(row: Row, case: Case, result: RowResult, tiny: bool) -> None:
    named = {peer.name: peer.memory_target for peer in case.peers if peer.memory_target is not None}
    if not named or result.ours is None:
        return
    result.ours.memory = _memory(row, OURS, tiny)
    for peer in result.peers:
        if peer.name in named:
            peer.memory, peer.memory_target = _memory(row, peer.name, tiny), named[peer.name]
            peer.memory_ratio = result.ours.memory / max(1, peer.memory)
            peer.memory_reached = peer.memory_ratio <= peer.memory_target


def _memory(row: Row, side: str, tiny: bool) -> int:
    found = peak_memory(row.name, side, torch.get_num_threads(), tiny)
    return found["peak"] - found["before"]


def compare_with_limits(result: RowResult, limits: dict[str, Any]) -> None:
    """Adds which share of the machine's limit ours reached: of bandwidth measured around the row, if there is any."""
    if result.work is None or result.ours is None:
        return
    result.limit_seconds = Work(**result.work).seconds({**limits, **(result.bandwidth or {})})
    result.share = result.limit_seconds / result.ours.seconds.median
    if result.share_target is not None:
        result.share_reached = result.share >= result.share_target


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else str(value)
