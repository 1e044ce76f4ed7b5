"""The table, on the terminal and as text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .machine import header_lines
from .results import Results, RowResult, Spread

_COLUMNS = ("row", "x_rope_cls", "beside", "its time", "times as fast", "target", "of limit", "target", "memory")
_LEFT = (0, 2)
_WIDTH = 170
_UNITS = (("s", 1.0, 1.0), ("ms", 1e3, 1e-3), ("µs", 1e6, 0.0))  # name, units in a second, from how many seconds on


def print_report(results: Results, folder: Path) -> list[str]:
    """Prints the table, with rich where it is installed, and writes it as plain text and as Markdown.

    Returns:
        Names of the files.
    """
    head = [*header_lines(results.header), *_limit_lines(results)]
    text = "\n".join([*head, "", *_plain_table(results), *_notes(results)])
    (folder / "report.txt").write_text(text + "\n", encoding="utf-8")
    notes = [line for line in [*head, *_notes(results)] if line]
    markdown = "\n".join([*_markdown_table(results), "", *(f"- {line.replace('*', chr(92) + '*')}" for line in notes)])
    (folder / "report.md").write_text(markdown + "\n", encoding="utf-8")
    _print(results, text)
    return ["report.txt", "report.md"]


def _print(results: Results, text: str) -> None:
    if importlib.util.find_spec("rich") is None:
        print(text)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(_COLUMNS):
        left = index in _LEFT
        table.add_column(column, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for cells in _cells(results):
        table.add_row(*(cell.replace(" ✓", " [green]✓[/]").replace(" ✗", " [red]✗[/]") for cell in cells))
    for line in _limit_lines(results):
        console.print(line)
    console.print(table)
    for line in _notes(results):
        console.print(line, markup=False)


def _cells(results: Results) -> list[tuple[str, ...]]:
    """One line for each row and peer."""
    lines = []
    for row in results.rows:
        if row.ours is None:
            lines.append((row.title, row.status, "", "", "", "", "", "", ""))
            continue
        own = (row.title, _time(row.ours.seconds), *_share(row))
        if not row.peers:
            lines.append((own[0], own[1], "", "", "", "", *own[2:], ""))
        for index, peer in enumerate(row.peers):
            title, time, share, share_target = own if index == 0 else ("", "", "", "")
            target = f"≥ {peer.target:.3g}{_mark(peer.reached)}" if peer.target is not None else ""
            memory = ""
            if peer.memory_ratio is not None and peer.memory_target is not None:
                memory = f"{peer.memory_ratio:.2f}, target ≤ {peer.memory_target:g}{_mark(peer.memory_reached)}"
            ratio = f"{peer.ratio.median:.3g} ({peer.ratio.low:.3g}–{peer.ratio.high:.3g})"  # noqa: RUF001
            lines.append((title, time, peer.name, _time(peer.seconds), ratio, target, share, share_target, memory))
    return lines


def _share(row: RowResult) -> tuple[str, str]:
    if row.share is None:
        return "", ""
    target = f"≥ {row.share_target:.0%}{_mark(row.share_reached)}" if row.share_target is not None else ""
    return f"{row.share:.0%}", target


def _mark(reached: bool | None) -> str:
    return {True: " ✓", False: " ✗", None: ""}[reached]


def _time(seconds: Spread) -> str:
    """12.3 (11.9–13.0) ms."""
    unit, factor = next(((u, f) for u, f, least in _UNITS if seconds.median >= least), _UNITS[-1][:2])
    low, median, high = (f"{value * factor:.3g}" for value in (seconds.low, seconds.median, seconds.high))
    return f"{median} ({low}–{high}) {unit}"  # noqa: RUF001


def _plain_table(results: Results) -> list[str]:
    lines = [_COLUMNS, *_cells(results)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(_COLUMNS))]
    return ["  ".join(_pad(cell, index, widths[index]) for index, cell in enumerate(line)).rstrip() for line in lines]


def _markdown_table(results: Results) -> list[str]:
    rule = ["---" if index in _LEFT else "---:" for index in range(len(_COLUMNS))]
    return [f"| {' | '.join(line)} |" for line in (_COLUMNS, rule, *_cells(results))]


def _pad(cell: str, index: int, width: int) -> str:
    return cell.ljust(width) if index in _LEFT else cell.rjust(width)


def _limit_lines(results: Results) -> list[str]:
    lines = []
    for when in ("before", "after"):
        limits = results.limits[when]
        rates = {"bfloat16": limits["dot_bfloat16_gflops"], "int16": limits["dot_int16_gflops"]}
        dot = ", ".join(f"{name} dot {'none' if r is None else f'{r:.0f} GFLOP/s'}" for name, r in rates.items())
        lines.append(
            f"limits {when}: float32 FMA {limits['fma_float32_gflops']:.0f} GFLOP/s, {dot}, "
            f"copy {limits['copy_gbs']:.1f} GB/s, read {limits['read_gbs']:.1f} GB/s, {limits['threads']} threads"
        )
    load = " ".join(f"{value:.2f}" for value in results.header["load_after"])
    return [*lines, f"load average {load} after; all took {results.seconds:.0f} s"]


def _common(names: list[str]) -> str:
    """One pattern for all names."""
    first, last = min(names), max(names)
    same = next((index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first if first == last else f"{first[:same]}*"


def _notes(results: Results) -> list[str]:
    """How to read the table, what is special about rows, and what was not measured."""
    notes = [
        "",
        "Median (quartiles). Times as fast: time of the peer over ours, round by round. Forward in inference mode.",
        "Of limit: the least time by the best of the limits measured in the run, over the median of ours.",
    ]
    if any(row.bandwidth for row in results.rows):
        notes.append(
            "Where memory is part of the work: by the better of the bandwidths right before and after the row."
        )
    for row in results.rows:
        if row.busy_target is not None and row.ours is not None:
            busy = f"{row.ours.busy:.0%} of the threads' time busy, target ≥ {row.busy_target:.0%}"
            notes.append(f"{row.title}: {busy}{_mark(row.busy_reached)}")
        if row.reason:
            notes.append(f"{row.title}: {row.status}: {row.reason}")
    grouped: dict[str, list[str]] = {}
    for row in results.rows:
        if row.note:
            grouped.setdefault(row.note, []).append(row.name)
    notes += [f"{_common(names)}: {note}" for note, names in grouped.items()]
    return notes
