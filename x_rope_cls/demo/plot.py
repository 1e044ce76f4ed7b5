"""The picture of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .measure import Timing, quartiles
from .model import OWN_POOL, PLAIN, POOL, VARIANTS
from .results import AttentionMap, Results, TaskResults, mean_sd

# Colours of Okabe and Ito, which colour-blind people can tell apart; shapes differ too.
_STYLE = {
    "rotate": ("#0072B2", "o"),
    "skip": ("#E69F00", "s"),
    "mask": ("#009E73", "D"),
    "class_attention": ("#D55E00", "v"),
    "join": ("#CC79A7", "P"),
    POOL: ("#56B4E9", "X"),
    OWN_POOL: ("#000000", "^"),
}


def draw(results: Results, path: Path) -> None:
    """Draws accuracy, times, and what moving the tokens does to accuracy and to the attention of CLS."""
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 11.6), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(2, 1), hspace=0.03)
        top, bottom = parts
        grid = top.add_gridspec(2, 2, width_ratios=(1.15, 1), height_ratios=(1, 1.25))
        _draw_accuracy(top.add_subplot(grid[0, 0]), results)
        _draw_times(top.add_subplot(grid[1, 0]), results.timings)
        _draw_accuracy_by_shift(top.add_subplot(grid[0, 1]), results.tasks[0])
        _draw_change_by_shift(top.add_subplot(grid[1, 1]), results.tasks[1])
        _draw_maps(bottom, results)
        handles = [_handle(variant) for variant in _STYLE]
        top.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
        figure.savefig(path, dpi=120)


def _handle(variant: str) -> Line2D:
    colour, marker = _STYLE[variant]
    label = f"{variant} (times)" if variant == OWN_POOL else variant
    return Line2D([], [], color=colour, marker=marker, label=label)


def _offsets(count: int, step: float) -> list[float]:
    return [(index - (count - 1) / 2) * step for index in range(count)]


def _draw_accuracy(axes: Any, results: Results) -> None:
    variants = list(VARIANTS)
    for place, task in enumerate(results.tasks):
        for variant, offset in zip(variants, _offsets(len(variants), 0.155), strict=True):
            colour, marker = _STYLE[variant]
            values = [100 * value for value in task.test[variant]]
            mean, sd = mean_sd(values)
            axes.plot([place + offset - 0.04] * len(values), values, ".", color=colour, alpha=0.5, markersize=6)
            spread = 0 if sd != sd else sd
            axes.errorbar(place + offset, mean, spread, color=colour, marker=marker, capsize=2, linestyle="none")
            axes.annotate(
                f"{mean:.1f}",
                (place + offset, max(mean + spread, *values)),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=colour,
            )
    axes.set_xticks(
        range(len(results.tasks)), [f"{task.name}\n({task.recordings[2]} tested)" for task in results.tasks]
    )
    axes.set_xlim(-0.5, len(results.tasks) - 0.5)
    axes.margins(y=0.1)
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"Accuracy: mean ± sd over seeds (n = {results.seeds}), and each seed", loc="left")
    axes.grid(axis="y", alpha=0.3)


def _draw_times(axes: Any, timings: list[Timing]) -> None:
    for place, timing in enumerate(timings):
        variants = [variant for variant in timing.seconds if variant != PLAIN]
        for variant, offset in zip(variants, _offsets(len(variants), 0.12), strict=True):
            colour, marker = _STYLE[variant]
            low, middle, high = quartiles(timing.ratios(variant))
            error = [[middle - low], [high - middle]]
            axes.errorbar(
                middle, place + offset, xerr=error, color=colour, marker=marker, markersize=5, linestyle="none"
            )
        if place:
            axes.axhline(place - 0.5, color="black", linewidth=0.4, alpha=0.3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(timings)), [f"{t.workload}\n{t.kind}" for t in timings], fontsize=8)
    axes.set_ylim(len(timings) - 0.5, -0.5)
    axes.set_xlim(left=0, right=max(1.15, axes.get_xlim()[1]))
    axes.set_xlabel("time / time of x-transformers with attn_flash=True and CLS in front (below 1: faster)")
    axes.set_title("Time of the whole model: median and quartiles of ratios", loc="left")
    axes.grid(axis="x", alpha=0.3)


def _draw_accuracy_by_shift(axes: Any, task: TaskResults) -> None:
    for variant, seeds in task.by_shift.items():
        colour, marker = _STYLE[variant]
        by_shift = [mean_sd([100 * row.accuracy for row in rows]) for rows in zip(*seeds, strict=True)]
        axes.plot(task.shifts, [mean for mean, _ in by_shift], color=colour, marker=marker, markersize=4)
        low = [mean - sd if sd == sd else mean for mean, sd in by_shift]
        high = [mean + sd if sd == sd else mean for mean, sd in by_shift]
        axes.fill_between(task.shifts, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_ylabel("test accuracy, %")
    axes.set_xlabel("positions of the data's tokens moved by, rows and columns of patches")
    axes.set_title(f"{task.name}: accuracy where positions are not those of training", loc="left")
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.3)


def _draw_change_by_shift(axes: Any, task: TaskResults) -> None:
    moved = [index for index, shift in enumerate(task.shifts) if shift]
    shifts = [task.shifts[index] for index in moved]
    for variant, seeds in task.by_shift.items():
        colour, marker = _STYLE[variant]
        changes = [[max(rows[index].logits, 1e-8) for index in moved] for rows in seeds]
        for each in changes:
            axes.plot(shifts, each, color=colour, alpha=0.25, linewidth=1)
        medians = [quartiles(list(at_shift))[1] for at_shift in zip(*changes, strict=True)]
        axes.plot(shifts, medians, color=colour, marker=marker, markersize=4)
    axes.set_yscale("log")
    axes.set_ylabel("largest change of a logit,\nstandard deviations")
    axes.set_xlabel("positions of the data's tokens moved by, frames")
    axes.set_title(f"{task.name}: how much the outputs change, each seed and median", loc="left")
    axes.grid(alpha=0.3)


def _draw_maps(figure: Any, results: Results) -> None:
    """Above each other: where the patches were, and moved; beside each other: the digit and the variants."""
    if results.image is None:
        return
    axes = figure.subplots(2, len(VARIANTS) + 1)
    shift = max(each.shift for each in results.maps)
    _show(axes[0][0], results.image.tolist(), "gray_r", "a test digit", "black")
    axes[1][0].axis("off")
    for column, variant in enumerate(VARIANTS, start=1):
        before, after = (m for m in results.maps if m.variant == variant)
        limit = max(before.weights.max().item(), after.weights.max().item())
        colour = _STYLE[variant][0]
        _show(axes[0][column], before.weights.tolist(), "magma", variant, colour, limit)
        _show(axes[1][column], after.weights.tolist(), "magma", _moved_title(before, after), colour, limit)
    figure.suptitle(
        "Attention of CLS, or of the pool's query, over the patches in the last layer; below, positions moved by "
        f"{shift} (in %: how much attention moved)",
        fontsize=10,
        x=0.01,
        ha="left",
    )


def _moved_title(before: AttentionMap, after: AttentionMap) -> str:
    moved = 50 * (after.weights - before.weights).abs().sum().item()
    return f"moved by {after.shift}: " + (f"{moved:.0f} %" if moved == 0 or moved > 0.1 else f"{moved:.0e} %")


def _show(
    axes: Any, image: list[list[float]], colours: str, title: str, colour: str, limit: float | None = None
) -> None:
    axes.imshow(image, cmap=colours, vmin=0 if limit else None, vmax=limit)
    axes.set_title(title, color=colour, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(colour)
