"""The pictures, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .results import PeerResult, Results, RowResult

# Colours of Okabe and Ito, which colour-blind people can tell apart.
_REACHED, _MISSED, _NEUTRAL, _TARGET = "#009E73", "#D55E00", "#777777", "#000000"
_SIDES = ("#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#009E73")


def draw(results: Results, folder: Path) -> list[str]:
    """Draws ratios, shares of the limit, and lines over x for rows in a series.

    Returns:
        Names of the files; none without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib as mpl

    names = []
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        for name, figure in (
            ("ratios.png", _ratios(results)),
            ("limits.png", _shares(results)),
            ("series.png", _series(results)),
        ):
            if figure is not None:
                figure.savefig(folder / name, dpi=130)
                names.append(name)
    return names


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _colour(reached: bool | None) -> str:
    return _NEUTRAL if reached is None else _REACHED if reached else _MISSED


def _bars(
    axes: Any, labels: list[str], values: list[float], targets: list[float | None], colours: list[str], start: float
) -> None:
    """Horizontal bars from start on, first on top, with a mark at each target."""
    places = list(range(len(labels)))
    axes.barh(places, [value - start for value in values], left=start, color=colours, height=0.7)
    for place, target in zip(places, targets, strict=True):
        if target is not None:
            axes.plot([target, target], [place - 0.42, place + 0.42], color=_TARGET, linewidth=2)
    axes.set_yticks(places, labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def _ratios(results: Results) -> Any:
    found: list[tuple[RowResult, PeerResult]] = [(row, peer) for row in results.rows for peer in row.peers]
    if not found:
        return None
    figure = _figure(10, 1.2 + 0.24 * len(found))
    axes = figure.add_subplot()
    ratios = [peer.ratio for _, peer in found]
    _bars(
        axes,
        [f"{row.title}, beside {peer.name}" for row, peer in found],
        [ratio.median for ratio in ratios],
        [peer.target for _, peer in found],
        [_colour(peer.reached) for _, peer in found],
        start=1.0,
    )
    below = [ratio.median - ratio.low for ratio in ratios]
    above = [ratio.high - ratio.median for ratio in ratios]
    medians = [ratio.median for ratio in ratios]
    axes.errorbar(medians, range(len(found)), xerr=[below, above], fmt="none", color="#333333", linewidth=1)
    axes.axvline(1, color="#999999", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("times as fast as the peer: median and quartiles; black mark: target (green: reached)")
    return figure


def _shares(results: Results) -> Any:
    rows = [row for row in results.rows if row.share is not None]
    if not rows:
        return None
    figure = _figure(10, 1.2 + 0.24 * len(rows))
    axes = figure.add_subplot()
    _bars(
        axes,
        [row.title for row in rows],
        [100 * (row.share or 0.0) for row in rows],
        [None if row.share_target is None else 100 * row.share_target for row in rows],
        [_colour(row.share_reached) for row in rows],
        start=0.0,
    )
    axes.axvline(100, color="#999999", linewidth=1, zorder=0)
    axes.set_xlabel("% of the machine's limit, measured in the same run; black mark: target (green: reached)")
    return figure


def _series(results: Results) -> Any:
    """Time over x, and the arithmetic rate with that of the limit as a line, one pair of axes for each series."""
    series: dict[str, list[tuple[float, RowResult]]] = {}
    for row in results.rows:
        if row.series is not None and row.ours is not None:
            series.setdefault(row.series[0], []).append((row.series[1], row))
    series = {name: sorted(points, key=lambda point: point[0]) for name, points in series.items() if len(points) > 1}
    if not series:
        return None
    figure = _figure(9, 2.6 * len(series))
    for index, (name, points) in enumerate(series.items()):
        left, right = (figure.add_subplot(len(series), 2, 2 * index + column) for column in (1, 2))
        _lines(left, right, points)
        left.set_title(name, loc="left")
        left.set_ylabel("ms")
        right.set_ylabel("GFLOP/s")
        left.set_yscale("log")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks([x for x, _ in points], [f"{x:g}" for x, _ in points])
            axes.minorticks_off()
        # Below all rates.
        look: dict[str, Any] = {"ncols": 2, "frameon": False, "fontsize": 7, "handlelength": 1.2, "columnspacing": 1.0}
        right.legend(*left.get_legend_handles_labels(), loc="lower right", **look)
    return figure


def _lines(left: Any, right: Any, points: list[tuple[float, RowResult]]) -> None:
    sides: dict[str, list[tuple[float, float, float]]] = {}
    limit = []
    for x, row in points:
        flops = row.work["flops"] if row.work else 0.0
        for side in (row.ours, *row.peers):
            if side is not None:
                sides.setdefault(side.name, []).append((x, side.seconds.median, flops))
        if row.limit_seconds:
            limit.append((x, row.limit_seconds, flops))
    styles = [(name, values, _SIDES[index % len(_SIDES)], "o-") for index, (name, values) in enumerate(sides.items())]
    for name, values, colour, style in [*styles, ("limit", limit, "#333333", "--")]:
        xs = [x for x, _, _ in values]
        left.plot(xs, [1e3 * seconds for _, seconds, _ in values], style, color=colour, label=name, markersize=4)
        right.plot(xs, [flops / seconds / 1e9 for _, seconds, flops in values], style, color=colour, markersize=4)
