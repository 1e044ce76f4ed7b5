"""The run itself: train, measure, print, save."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from x_rope_cls import explain
from x_rope_cls._info import machine_lines

from . import Options, measure
from .agreement import agreement, parity
from .data import DIGITS_GRID, Task, image, load_tasks
from .model import NUM_SPECIAL, POOL, VARIANTS, Size, build, tables, tables_for, token_positions
from .plot import draw
from .report import make_console, print_report
from .results import AttentionMap, Results, TaskResults
from .train import Result, steps_per_epoch, train


@dataclass(frozen=True)
class _Plan:
    """How much of everything."""

    seeds: int
    epochs: list[int]
    rounds: int
    sheet_side: int
    shifts: list[int]
    compared: int  # recordings in the comparison with the reference


_SHIFT = 8
_EXPLAINED = ("mask", "class_attention")


def run_demo(options: Options) -> Path:
    """See :func:`x_rope_cls.demo.run`."""
    start = time.perf_counter()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    console = make_console()
    console.print(f"Reading two data sets from installed packages; results go to {options.out}/")
    tasks = load_tasks()
    if options.quick:
        tasks = [task.small(64) for task in tasks]
    plan = _make_plan(options, tasks)
    size = Size()
    results = Results(machine_lines(), plan.seeds)

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description:32}"), *columns, console=console) as progress:
        bar = progress.add_task("", total=_total(plan, tasks))
        for task, epochs in zip(tasks, plan.epochs, strict=True):
            found = TaskResults(
                task.name,
                task.title,
                (len(task.train), len(task.val), len(task.test)),
                len(task.positions) + NUM_SPECIAL,
                epochs,
                shifts=plan.shifts,
            )
            results.tasks.append(found)
            trained = _train_all(task, size, plan, found, progress, bar)
            progress.update(bar, description=f"{task.name}: measuring")
            _measure_task(task, size, plan, trained, found)
            if task is tasks[0]:
                _draw_attention(task, size, trained, results)
                results.explained = {variant: str(explain(trained[variant].model)) for variant in _EXPLAINED}
        for workload in measure.workloads(tasks, size, plan.sheet_side):
            progress.update(bar, description="timing beside x-transformers")
            results.timings += measure.time_workload(*workload, size, plan.rounds, lambda: progress.advance(bar))
        progress.update(bar, description="done")

    results.seconds = time.perf_counter() - start
    print_report(console, results)
    results.save(options.out / "results.json")
    draw(results, options.out / "demo.png")
    console.print(f"Saved demo.png, report.txt and results.json in {options.out}/")
    (options.out / "report.txt").write_text(console.export_text(), encoding="utf-8")
    return options.out


def _make_plan(options: Options, tasks: list[Task]) -> _Plan:
    quick = options.quick
    return _Plan(
        seeds=options.seeds or 2,
        epochs=[options.epochs or (1 if quick else task.epochs) for task in tasks],
        rounds=2 if quick else 10,
        sheet_side=4 if quick else 8,
        shifts=[0, 8] if quick else [0, 1, 2, 3, 4, 6, 8, 12, 16, 32],
        compared=4 if quick else 16,
    )


def _total(plan: _Plan, tasks: list[Task]) -> int:
    """Steps of the progress bar: training steps and rounds of timing."""
    steps = sum(epochs * steps_per_epoch(task) for task, epochs in zip(tasks, plan.epochs, strict=True))
    workloads = len(tasks) + 1
    return steps * plan.seeds * len(VARIANTS) + workloads * measure.timing_rounds(plan.rounds)


def _train_all(
    task: Task, size: Size, plan: _Plan, found: TaskResults, progress: Progress, bar: TaskID
) -> dict[str, Result]:
    """Trains every variant with every seed and measures what moving the tokens does; returns those of seed 0."""
    rotary = tables(token_positions(task.positions), size)
    first: dict[str, Result] = {}
    for seed in range(plan.seeds):
        for variant in VARIANTS:
            progress.update(bar, description=f"{task.name}: {variant}, seed {seed + 1} of {plan.seeds}")
            model = build(variant, task, size, seed)
            given = tables_for(variant, rotary)
            result = train(model, task, given, found.epochs, seed, lambda: progress.advance(bar))
            if not progress.console.is_terminal:  # no bar is to be seen there
                progress.console.print(f"{task.name}: {variant}, seed {seed + 1} of {plan.seeds} done")
            first.setdefault(variant, result)
            found.parameters[variant] = sum(p.numel() for p in model.parameters())
            found.test.setdefault(variant, []).append(result.test_accuracy)
            found.val.setdefault(variant, []).append(result.val_accuracy)
            found.best_epochs.setdefault(variant, []).append(result.epoch)
            found.moved.setdefault(variant, []).append(measure.moved(model, task, size, shift=_SHIFT))
            by_shift = measure.moved_by_shift(model, task, size, plan.shifts)
            found.by_shift.setdefault(variant, []).append(by_shift)
    return first


def _measure_task(task: Task, size: Size, plan: _Plan, trained: dict[str, Result], found: TaskResults) -> None:
    rotary = tables(token_positions(task.positions), size)
    recordings = task.test.rows(slice(plan.compared))
    for result in trained.values():
        found.agreement += agreement(result.model, recordings, rotary, size)
    found.parity = {variant: parity(trained[variant].model, task, size) for variant in ("rotate", POOL)}


def _draw_attention(task: Task, size: Size, trained: dict[str, Result], results: Results) -> None:
    """Attention over the first test digit, with its patches where they were and moved."""
    recording = task.test.rows(slice(1))
    results.image = image(recording.x[0])
    for variant, result in trained.items():
        for shift in (0, _SHIFT):
            rotary = tables(token_positions(task.positions, shift), size)
            weights = measure.cls_attention(result.model, recording, rotary, size)
            results.maps.append(AttentionMap(variant, shift, weights.reshape(DIGITS_GRID)))
