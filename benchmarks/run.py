"""The run: limits, rows one after the other, limits again, report."""

from __future__ import annotations

import fnmatch
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine
from .case import Row, all_rows
from .measure import compare_with_limits, measure_row
from .plot import draw
from .report import print_report
from .results import Results

_SHARE_OF_BUDGET = 0.6  # of the time left goes into timing, the rest into building, compiling and comparing
_SHARE_OF_LIMIT_SECONDS = 0.5  # around a row
_MOST_ROW_SECONDS = {False: 12.0, True: 3.0}  # quick or not


@dataclass(frozen=True)
class Options:
    """What the command line sets.

    Attributes:
        rows: names, their beginnings up to a slash, or patterns with *; empty: all.
        quick: leave out slow sides and rows, and limits around rows.
        cold: flush the caches in front of every call.
        tiny: the rows' tiny sizes, to test the structure.
        minutes: for everything.
        limit_seconds: for each figure of the limits.
        out: folder for results.
        command: to be written down.
        pinned: whether threads are pinned; to be written down.
    """

    rows: tuple[str, ...] = ()
    quick: bool = False
    cold: bool = False
    tiny: bool = False
    minutes: float = 15.0
    limit_seconds: float = 0.3
    out: Path = Path("bench-output")
    command: str = ""
    pinned: bool = False


def select(options: Options) -> list[Row]:
    """The rows to run.

    Raises:
        ValueError: a pattern fits no row.
    """
    rows = all_rows()
    for pattern in options.rows:
        if not any(_fits(row, pattern) for row in rows):
            raise ValueError(f"--rows: a pattern must fit a row (see --list), got {pattern!r}")
    if options.rows:
        return [row for row in rows if any(_fits(row, pattern) for pattern in options.rows)]
    return [row for row in rows if row.quick or not options.quick]


def _fits(row: Row, pattern: str) -> bool:
    return row.name == pattern or row.name.startswith(f"{pattern}/") or fnmatch.fnmatch(row.name, pattern)


def run(options: Options, say: Callable[[str], None] = print) -> Results:
    """Measures everything and writes results.json, report.txt, report.md and the plots.

    Raises:
        ValueError: see :func:`select`.
    """
    start = time.perf_counter()
    rows = select(options)
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(machine.describe(options.command, options.pinned), {})
    for line in machine.header_lines(results.header):
        say(line)
    before = machine.measure_limits(options.limit_seconds)
    measured = [before]

    def around() -> dict[str, Any]:
        measured.append(machine.measure_limits(options.limit_seconds * _SHARE_OF_LIMIT_SECONDS))
        return measured[-1]

    flush = machine.cache_flush() if options.cold else None
    limits = None if options.quick else around  # they take seconds
    try:
        for index, row in enumerate(rows):
            left = options.minutes * 60 - (time.perf_counter() - start)
            seconds = min(_MOST_ROW_SECONDS[options.quick], max(0.0, left) * _SHARE_OF_BUDGET / (len(rows) - index))
            began = time.perf_counter()
            found = measure_row(row, seconds, quick=options.quick, tiny=options.tiny, flush=flush, limits=limits)
            results.rows.append(found)
            outcome = f"{found.status} {found.reason}".strip()
            say(f"[{index + 1}/{len(rows)}] {row.name}: {outcome}, {time.perf_counter() - began:.1f} s")
    except KeyboardInterrupt:
        say("Stopped: what follows is of the rows so far.")
    after = machine.measure_limits(options.limit_seconds)
    results.limits = {"before": before, "after": after, "best": machine.best_limits([*measured, after])}
    results.header["load_after"] = list(os.getloadavg())
    for row in results.rows:
        compare_with_limits(row, results.limits["best"])
    results.seconds = time.perf_counter() - start
    (options.out / "results.json").write_text(json.dumps(results.as_dict(), indent=1) + "\n", encoding="utf-8")
    reports = print_report(results, options.out)
    pictures = draw(results, options.out)
    say(f"Saved {', '.join(['results.json', *reports, *pictures])} in {options.out}/ after {results.seconds:.0f} s")
    return results
