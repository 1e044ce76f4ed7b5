"""What was found, in the shape in which it is saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .timing import Samples, quartiles


@dataclass
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of these values."""
        return cls(*quartiles(values))


@dataclass
class SideResult:
    """Times of one side.

    Attributes:
        name: of the side.
        seconds: a call.
        best: seconds of the fastest sample.
        rounds: how many samples there are.
        calls: how many calls one sample is the mean of.
        cpu_seconds: processor time of a call, median; less disturbed by other programs, but a thread that spins while
            it waits for another counts.
        busy: processor time over wall time of all threads, median.
        memory: bytes that the work needed at most beside its inputs; None: not measured.
    """

    name: str
    seconds: Spread
    best: float
    rounds: int
    calls: int
    cpu_seconds: float
    busy: float
    memory: int | None = None

    @classmethod
    def of(cls, name: str, samples: Samples, threads: int) -> SideResult:
        """From what was measured with so many threads."""
        busy = [cpu / wall / threads for cpu, wall in zip(samples.cpu, samples.wall, strict=True)]
        spread, cpu = Spread.of(samples.wall), quartiles(samples.cpu)[1]
        return cls(name, spread, min(samples.wall), len(samples.wall), samples.calls, cpu, quartiles(busy)[1])


@dataclass
class PeerResult(SideResult):
    """A peer beside ours.

    Attributes:
        ratio: time of the peer over ours, round by round.
        target: of the ratio; None: none.
        reached: whether the median ratio is at least the target.
        error: relative difference of the results; None: it computes something else.
        memory_ratio: memory of ours over the peer's.
        memory_target: the most that memory_ratio is to be.
        memory_reached: whether it is not more.
    """

    ratio: Spread = field(default_factory=lambda: Spread(0.0, 0.0, 0.0))
    target: float | None = None
    reached: bool | None = None
    error: float | None = None
    memory_ratio: float | None = None
    memory_target: float | None = None
    memory_reached: bool | None = None


@dataclass
class RowResult:
    """A row.

    Attributes:
        name, title, backward, sizes, note, series: of the row.
        status: "measured"; "skipped" (a package is missing) or "failed", with the reason.
        reason: see there.
        ours: times of ours.
        peers: the others.
        error: relative difference of ours from the row's own expectation, where it has one.
        work: flops, read, copied, bfloat16 and int16 of the least work.
        bandwidth: copy_gbs and read_gbs around the row's timing; None: not measured, or memory is not part of its work.
        limit_seconds: the least time on this machine.
        share: limit_seconds over the median of ours.
        share_target, share_reached: what it is to be, and whether it is.
        busy_target, busy_reached: of ours.
    """

    name: str
    title: str
    backward: bool
    sizes: dict[str, Any]
    note: str
    series: tuple[str, float] | None
    share_target: float | None
    busy_target: float | None
    status: str = "measured"
    reason: str = ""
    ours: SideResult | None = None
    peers: list[PeerResult] = field(default_factory=list)
    error: float | None = None
    work: dict[str, Any] | None = None
    bandwidth: dict[str, float] | None = None
    limit_seconds: float | None = None
    share: float | None = None
    share_reached: bool | None = None
    busy_reached: bool | None = None


@dataclass
class Results:
    """A run.

    Attributes:
        header: see ``machine.describe``.
        limits: those measured before and after the rows, and the best of each, those around rows included.
        rows: one for each row that was selected.
        seconds: that all took.
    """

    header: dict[str, Any]
    limits: dict[str, dict[str, Any]]
    rows: list[RowResult] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"version": 1, **asdict(self)}
