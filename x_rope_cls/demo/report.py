"""The tables of the demo, for a terminal and for a text file."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table

from .measure import Moved, Timing, quartiles
from .model import NUM_MEMORY, PLAIN, VARIANTS
from .results import Results, compare, mean_sd

_WIDTH = 116


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
            f"{NUM_MEMORY} memory tokens and CLS in front: {task.tokens} tokens; "
            f"{results.parameters[task.name]:,} parameters"
        )
    console.print()
    _print_accuracy(console, results)
    _print_moved(console, results)
    _print_times(console, results)
    _print_agreement(console, results)
    _print_explained(console, results)
    console.print(f"\nAll of this took {results.seconds:.0f} s.")


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right")
    return table


def _print_accuracy(console: Console, results: Results) -> None:
    title = f"Accuracy in %, mean ± standard deviation over {_seeds(results.seeds)}"
    table = _table(title, "data", "cls_rope", "test", "validation", "test by seed", "epochs", "best epoch", left=2)
    for task in results.tasks:
        for variant in task.test:
            by_seed = ", ".join(f"{100 * value:.1f}" for value in task.test[variant])
            best = ", ".join(map(str, task.best_epochs[variant]))
            shown = _percent(task.test[variant]), _percent(task.val[variant])
            table.add_row(task.name, variant, *shown, by_seed, str(task.epochs), best)
    console.print(table)
    console.print(
        "Same initial weights, batches and number of steps for every cls_rope; the epoch with the lowest validation "
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
        table.add_row(task.name, "none", *(f"0    {_percent_mean(task.test[variant])}" for variant in VARIANTS))
        for index, change in enumerate(next(iter(task.moved.values()))[0]):
            cells = [_moved_cell([seed[index] for seed in task.moved[variant]]) for variant in VARIANTS]
            table.add_row(task.name, change.name, *cells)
    console.print(table)
    console.print(
        "Changes are in units of the logits' standard deviation; means over seeds. Tokens moved: those of the data, by "
        "the same number in every direction, while CLS and memory tokens stay at the positions 0 to 4 that "
        "x-transformers counts; then all of them together. Shuffled: the data's tokens trade positions. With rotate, "
        "the distance from CLS is something that the model uses. With mask CLS has no position: a common shift changes "
        "nothing but rounding, while the tokens' positions relative to each other still count.\n"
    )


def _print_times(console: Console, results: Results) -> None:
    rounds = len(results.timings[0].seconds[PLAIN])
    title = f"Time beside x-transformers with attn_flash=True ({rounds} rounds by turns)"
    table = _table(title, "batch x tokens", "work", "cls_rope", "ms", f"{PLAIN}, ms", "ratio", "quartiles", left=3)
    for timing in results.timings:
        peer = _milliseconds(timing, PLAIN)
        for variant in VARIANTS:
            low, middle, high = quartiles(timing.ratios(variant))
            ratio = f"{middle:.2f}", f"{low:.2f} - {high:.2f}"
            table.add_row(timing.workload, timing.kind, variant, _milliseconds(timing, variant), peer, *ratio)
    console.print(table)
    console.print(
        "Medians. The ratio of times is taken round by round; below 1 is faster than x-transformers. All of the model "
        "is timed, attention is a part of it. Same float32 weights, batch and positions. sheets: many digits to an "
        "image, for longer sequences.\n"
    )


def _print_agreement(console: Console, results: Results) -> None:
    table = _table(
        "Agreement with the float64 reference on q, k, v of the trained models and test recordings",
        "data",
        "cls_rope",
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
        "float16: 9.8e-04), over all layers, for rope_attention and for plain PyTorch in the same dtype (eager)."
    )
    for task in results.tasks:
        console.print(
            f"  {task.name}: largest difference of a test logit between cls_rope='rotate' and x_transformers.Encoder "
            f"with the same weights: {task.parity:.1e}"
        )
    console.print()


def _print_explained(console: Console, results: Results) -> None:
    console.print("[bold]explain(model)[/bold] of the mask model for digits:")
    console.print(results.explained, markup=False)


def _percent(values: list[float]) -> str:
    mean, sd = mean_sd([100 * value for value in values])
    return f"{mean:.1f}" if math.isnan(sd) else f"{mean:.1f} ± {sd:.1f}"


def _percent_mean(values: list[float]) -> str:
    return f"{100 * mean_sd(values)[0]:5.1f}"


def _moved_cell(seeds: list[Moved]) -> str:
    change = mean_sd([row.logits for row in seeds])[0]
    shown = f"{change:.2f}" if change >= 0.005 else f"{change:.0e}"
    return f"{shown}    {_percent_mean([row.accuracy for row in seeds])}"


def _milliseconds(timing: Timing, variant: str) -> str:
    return f"{1e3 * quartiles(timing.seconds[variant])[1]:.2f}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"
