"""The tables of the demo, for a terminal and for a text file."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table

from .measure import Moved, Timing, quartiles
from .model import NUM_MEMORY, OWN_POOL, PLAIN, POOL, VARIANTS
from .results import Results, compare, mean_sd

_WIDTH = 120
_VARIANTS_TEXT = (
    "rotate, skip, mask: CLS in front in all layers, with that cls_rope. class_attention, join: CLS enters in the "
    "penultimate layer, with that late_cls. AttentionPool: x-transformers' own, over the tokens of an encoder without "
    "CLS; it has four projections and a query more, and no CLS. The last three: memory tokens have no position."
)


def make_console() -> Console:
    """A console that remembers what it printed; at least as wide as the tables where no terminal sets the width."""
    console = Console(record=True, highlight=False)
    if not console.is_terminal:
        console = Console(record=True, highlight=False, width=_WIDTH)
    return console


def print_report(console: Console, results: Results) -> None:
    """Prints everything that was found."""
    console.print()
    for line in results.machine:
        console.print(line)
    for task in results.tasks:
        train, val, test = task.recordings
        console.print(
            f"{task.name}: {task.title}; {train} / {val} / {test} recordings to train / validate / test; "
            f"{NUM_MEMORY} memory tokens and CLS in front: {task.tokens} tokens; {task.epochs} epochs"
        )
    console.print(_VARIANTS_TEXT)
    console.print()
    _print_accuracy(console, results)
    _print_moved(console, results)
    _print_times(console, results)
    _print_agreement(console, results)
    _print_explained(console, results)
    console.print(f"All of this took {results.seconds:.0f} s.")


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right")
    return table


def _print_accuracy(console: Console, results: Results) -> None:
    title = f"Accuracy in %, mean ± standard deviation over {_seeds(results.seeds)}"
    table = _table(title, "data", "variant", "parameters", "test", "validation", "test by seed", "best epoch", left=2)
    for task in results.tasks:
        for variant in task.test:
            by_seed = ", ".join(f"{100 * value:.1f}" for value in task.test[variant])
            best = ", ".join(map(str, task.best_epochs[variant]))
            shown = _percent(task.test[variant]), _percent(task.val[variant])
            table.add_row(task.name, variant, f"{task.parameters[variant]:,}", *shown, by_seed, best)
    console.print(table)
    console.print(
        "Same initial weights, batches and number of steps for every variant; the epoch with the lowest validation "
        "loss is tested. Test accuracies paired by seed, mean ± standard deviation of the differences; within the "
        "spread: not above the largest of three standard deviations, that of the differences and of both accuracies:"
    )
    for task in results.tasks:
        for variant in list(task.test)[1:]:
            console.print(f"  {compare(task, variant, next(iter(task.test)))}")
    console.print()


def _print_moved(console: Console, results: Results) -> None:
    title = "What other positions do to the trained models: largest change of a logit, and test accuracy in %"
    table = _table(title, "data", "change", *VARIANTS, left=2)
    for task in results.tasks:
        table.add_row(task.name, "none", *(f"0 {_percent_mean(task.test[variant])}" for variant in VARIANTS))
        for index, change in enumerate(next(iter(task.moved.values()))[0]):
            cells = [_moved_cell([seed[index] for seed in task.moved[variant]]) for variant in VARIANTS]
            table.add_row(task.name, change.name, *cells)
    console.print(table)
    console.print(
        "Changes are in units of the logits' standard deviation; means over seeds. Tokens moved: those of the data, by "
        "the same number in every direction, while CLS and memory tokens stay at the positions 0 to 4 that "
        "x-transformers counts; then all of them together. Shuffled: the data's tokens trade positions. With rotate, "
        "the distance from CLS is something that the model uses. From mask on, CLS has no position, or there is none: "
        "a common shift changes nothing but rounding, but the tokens' positions relative to each other still count.\n"
    )


def _print_times(console: Console, results: Results) -> None:
    rounds = len(results.timings[0].seconds[PLAIN])
    title = f"Time beside x-transformers with attn_flash=True ({rounds} rounds by turns)"
    table = _table(title, "batch x tokens", "work", "variant", "ms", f"{PLAIN}, ms", "ratio", "quartiles", left=3)
    for timing in results.timings:
        peer = _milliseconds(timing, PLAIN)
        for variant in timing.seconds:
            if variant != PLAIN:
                ratio = _ratio(timing, variant, PLAIN)
                table.add_row(timing.workload, timing.kind, variant, _milliseconds(timing, variant), peer, *ratio)
    console.print(table)
    console.print(
        "Medians. The ratio of times is taken round by round; below 1 is faster than x-transformers with CLS in front. "
        "All of the model is timed, attention is a part of it. Same float32 weights, batch and positions. sheets: many "
        "digits to an image, for longer sequences. x_rope_cls.AttentionPool: in the place of x-transformers' in the "
        "same model; the ratio of these two:"
    )
    for timing in results.timings:
        middle, spread = _ratio(timing, OWN_POOL, POOL)
        console.print(f"  {timing.workload}, {timing.kind}: {middle} ({spread})")
    console.print()


def _print_agreement(console: Console, results: Results) -> None:
    table = _table(
        "Agreement with the float64 reference on what the trained models make of test recordings",
        "data",
        "variant",
        "dtype",
        "output",
        "output, eager",
        "gradients",
        "gradients, eager",
        left=3,
    )
    for task in results.tasks:
        for row in task.agreement:
            numbers = (row.output, row.output_eager, row.gradient, row.gradient_eager)
            table.add_row(task.name, row.variant, row.dtype, *(f"{number:.2f}" for number in numbers))
    console.print(table)
    console.print(
        "Largest error over the largest element, in units of the dtype's eps (float32: 1.2e-07, bfloat16: 7.8e-03, "
        "float16: 9.8e-04), over all layers, of the operator and of plain PyTorch in the same dtype (eager). That is "
        "rope_attention on q, k and v for rotate, skip and mask, and late_cls_pool on the token states for the others "
        "(for AttentionPool, as x_rope_cls.AttentionPool with the same weights calls it)."
    )
    peers = {"rotate": "cls_rope='rotate' and x_transformers.Encoder", POOL: "the AttentionPools of both packages"}
    for task in results.tasks:
        for variant, difference in task.parity.items():
            text = f"largest difference of a test logit between {peers[variant]} with the same weights"
            console.print(f"  {task.name}: {text}: {difference:.1e}")
    console.print()


def _print_explained(console: Console, results: Results) -> None:
    for variant, text in results.explained.items():
        console.print(f"[bold]explain(model)[/bold] of the {variant} model for {results.tasks[0].name}:")
        console.print(text, markup=False)
        console.print()


def _percent(values: list[float]) -> str:
    mean, sd = mean_sd([100 * value for value in values])
    return f"{mean:.1f}" if math.isnan(sd) else f"{mean:.1f} ± {sd:.1f}"


def _percent_mean(values: list[float]) -> str:
    return f"{100 * mean_sd(values)[0]:5.1f}"


def _moved_cell(seeds: list[Moved]) -> str:
    change = mean_sd([row.logits for row in seeds])[0]
    shown = f"{change:.2f}" if change >= 0.005 else f"{change:.0e}"
    return f"{shown} {_percent_mean([row.accuracy for row in seeds])}"


def _ratio(timing: Timing, variant: str, beside: str) -> tuple[str, str]:
    """Median, and quartiles."""
    low, middle, high = quartiles(timing.ratios(variant, beside))
    return f"{middle:.2f}", f"{low:.2f} - {high:.2f}"


def _milliseconds(timing: Timing, variant: str) -> str:
    return f"{1e3 * quartiles(timing.seconds[variant])[1]:.2f}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"
