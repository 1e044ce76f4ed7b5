"""The benchmark: its structure, on tiny sizes. No test looks at how long anything took."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end: x_rope_cls itself may be installed elsewhere

for _package in ("x_transformers", "matplotlib", "rich"):
    pytest.importorskip(_package)

from benchmarks import case, machine, measure, memory, plot, report, run, timing  # noqa: E402  (after the path)

NEED_COMPILING = "encoder/compiled"
LIMITS = {
    "fma_float32_gflops": 100.0,
    "dot_bfloat16_gflops": None,
    "dot_int16_gflops": None,
    "copy_gbs": 10.0,
    "read_gbs": 20.0,
}


@pytest.fixture(scope="module")
def rows() -> list[case.Row]:
    return case.all_rows()


def tiny_options(out: Path, *patterns: str, quick: bool = True) -> run.Options:
    return run.Options(patterns, quick=quick, tiny=True, minutes=0.01, limit_seconds=0.01, out=out, command="a test")


@pytest.fixture(scope="module")
def tiny(rows: list[case.Row], timm: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a run with all rows but those that take long to compile left behind."""
    out = tmp_path_factory.mktemp("bench") / "made" / "here"
    names = [row.name for row in rows if not row.name.startswith(NEED_COMPILING)]
    run.run(tiny_options(out, *names))
    return out


@pytest.fixture(scope="module")
def saved(tiny: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tiny / "results.json").read_text(encoding="utf-8"))
    return found


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def test_all_rows_were_measured(saved: dict[str, Any], rows: list[case.Row]) -> None:
    expected = [row.name for row in rows if not row.name.startswith(NEED_COMPILING)]
    assert [row["name"] for row in saved["rows"]] == expected
    assert [(row["name"], row["reason"]) for row in saved["rows"] if row["status"] != "measured"] == []
    assert all(math.isfinite(number) for number in numbers(saved))


def test_what_is_saved_of_a_row(saved: dict[str, Any], rows: list[case.Row]) -> None:
    for row, found in zip((r for r in rows if not r.name.startswith(NEED_COMPILING)), saved["rows"], strict=True):
        assert found["peers"], row.name
        for side in (found["ours"], *found["peers"]):
            seconds = side["seconds"]
            assert 0 < side["best"] <= seconds["low"] <= seconds["median"] <= seconds["high"], row.name
            assert side["rounds"] >= 2
            assert side["calls"] >= 1
            assert side["cpu_seconds"] >= 0
            assert side["busy"] >= 0
        targets = {peer.name: (peer.target, peer.memory_target) for peer in row.make(tiny=True).peers if not peer.slow}
        assert {p["name"]: (p["target"], p["memory_target"]) for p in found["peers"]} == targets
        for peer in found["peers"]:
            assert peer["ratio"]["low"] <= peer["ratio"]["median"] <= peer["ratio"]["high"]
            assert (peer["reached"] is None) == (peer["target"] is None)
            assert (peer["memory_ratio"] is None) == (peer["memory_target"] is None)
        compared = [error for error in (found["error"], *(p["error"] for p in found["peers"])) if error is not None]
        assert compared, f"{row.name}: compared with nothing"
        assert max(compared) <= row.tolerance
        assert (found["share"] is None) == (found["work"] is None)
        assert found["bandwidth"] is None, "a quick run"
        assert found["share_target"] == row.share_target
        assert (found["share_reached"] is None) == (row.share_target is None)


def test_header_and_limits_are_saved(saved: dict[str, Any]) -> None:
    header = saved["header"]
    assert header["threads"] == torch.get_num_threads()
    assert header["command"] == "a test"
    assert len(header["load_before"]) == len(header["load_after"]) == 3
    assert header["versions"]["torch"] == torch.__version__
    for when in ("before", "after"):
        for name, value in saved["limits"][when].items():
            assert value is None or 0 < value <= saved["limits"]["best"][name]


def test_report_and_pictures(tiny: Path, saved: dict[str, Any]) -> None:
    text = (tiny / "report.txt").read_text(encoding="utf-8")
    for row in saved["rows"]:
        assert row["title"] in text
        assert all(peer["name"] in text for peer in row["peers"])
    table = [line for line in (tiny / "report.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {10}
    assert [title for line in table[2:] if (title := line.split("|")[1].strip())] == [r["title"] for r in saved["rows"]]
    for name in ("ratios.png", "limits.png", "series.png"):
        assert (tiny / name).stat().st_size > 10_000


def test_without_rich_and_matplotlib(saved: dict[str, Any], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    results = run.run(tiny_options(tmp_path, "rope/float32/64"))
    capsys.readouterr()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plot.draw(results, tmp_path) == []
    report.print_report(results, tmp_path)
    assert capsys.readouterr().out == (tmp_path / "report.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_rows_that_are_compiled(tmp_path: Path) -> None:
    patterns = [f"{NEED_COMPILING}/*/256", "rope/float32/64", "attention/forward/float32/1024"]
    results = run.run(tiny_options(tmp_path, *patterns, quick=False))
    assert [row.reason for row in results.rows] == [""] * 4
    names = {peer.name for row in results.rows for peer in row.peers}
    assert {"x-transformers compiled", "x-transformers + FlexAttention"} <= names


def a_row(build: Any, **kwargs: Any) -> case.Row:
    return case.Row("test/row", "a row", build, {}, {}, **kwargs)


def test_a_difference_is_a_failure(tmp_path: Path, monkeypatch: Any) -> None:
    x = torch.randn(50)

    def build(ours: float = 1.0, expected: float = 1.0) -> case.Case:
        return case.Case(lambda: x * ours, [case.Side("peer", lambda: x)], expected=lambda: x * expected)

    row = a_row(build, tolerance=1e-3)
    assert measure.measure_row(row, 0.0).status == "measured"
    for wrong in ({"ours": 1.01}, {"expected": 1.01}):
        found = measure.measure_row(replace(row, sizes=wrong), 0.0)
        assert (found.status, found.ours) == ("failed", None)
        assert "differs from" in found.reason
    monkeypatch.setattr(run, "all_rows", lambda: [replace(row, sizes={"ours": 1.01})])
    results = run.run(tiny_options(tmp_path))
    assert "failed" in (tmp_path / "report.txt").read_text(encoding="utf-8")
    assert results.rows[0].share is None


def test_ratios_and_shares(monkeypatch: Any) -> None:
    walls = {case.OURS: [1.0, 2.0, 4.0], "slower": [4.0, 4.0, 4.0], "faster": [0.5, 0.5, 0.5]}
    samples = {name: timing.Samples(1, wall, [0.5 * second for second in wall]) for name, wall in walls.items()}
    monkeypatch.setattr(measure, "take_turns", lambda *args: samples)

    def build() -> case.Case:
        peers = [case.Side("slower", torch.zeros(1).clone, target=2.0), case.Side("faster", torch.zeros(1).clone, 0.5)]
        return case.Case(torch.zeros(1).clone, peers, case.Work(flops=1e11))

    found = measure.measure_row(a_row(build, share_target=0.6, busy_target=0.6), 0.0)
    assert [peer.ratio.median for peer in found.peers] == [2.0, 0.25]
    assert [peer.reached for peer in found.peers] == [True, False]
    measure.compare_with_limits(found, LIMITS)
    assert (found.limit_seconds, found.share, found.share_reached) == (1.0, 0.5, False)
    assert found.bandwidth is None
    assert found.ours is not None
    assert (found.ours.busy, found.busy_reached) == (0.5 / torch.get_num_threads(), False)


def test_bandwidth_is_that_around_the_row(monkeypatch: Any) -> None:
    events: list[str] = []
    samples = {case.OURS: timing.Samples(1, [1.0], [1.0])}
    monkeypatch.setattr(measure, "take_turns", lambda *args: events.append("timing") or samples)
    copies = iter([20.0, 40.0])

    def limits() -> dict[str, Any]:
        events.append("limits")
        return {**LIMITS, "copy_gbs": next(copies), "read_gbs": 10.0, "fma_float32_gflops": 1.0}

    def build(**work: float) -> case.Case:
        return case.Case(torch.zeros(1).clone, [], case.Work(**work))

    found = measure.measure_row(replace(a_row(build), sizes={"copied": 2e10}), 0.0, limits=limits)
    assert events == ["limits", "timing", "limits"]
    assert found.bandwidth == {"copy_gbs": 40.0, "read_gbs": 10.0}
    measure.compare_with_limits(found, LIMITS)
    assert found.limit_seconds == pytest.approx(0.5)  # and not 2e10 / LIMITS["copy_gbs"]
    found = measure.measure_row(replace(a_row(build), sizes={"flops": 1e11}), 0.0, limits=limits)
    assert events == ["limits", "timing", "limits", "timing"]
    measure.compare_with_limits(found, LIMITS)
    assert found.limit_seconds == pytest.approx(1.0)  # arithmetic: the run's own limit


@pytest.mark.parametrize("quick", [True, False])
def test_bandwidth_is_measured_unless_quick(tmp_path: Path, monkeypatch: Any, quick: bool) -> None:
    def build(**work: float) -> case.Case:
        return case.Case(torch.zeros(1).clone, [], case.Work(**work), expected=torch.zeros(1).clone)

    row = a_row(build)
    rows = [replace(row, name=f"test/{name}", sizes={name: 1e9}) for name in ("read", "copied", "flops")]
    monkeypatch.setattr(run, "all_rows", lambda: rows)
    results = run.run(tiny_options(tmp_path, quick=quick))
    assert [found.bandwidth is not None for found in results.rows] == [not quick, not quick, False]
    for found in results.rows:
        for name, value in (found.bandwidth or {}).items():
            assert 0 < value <= results.limits["best"][name]
    said = "right before and after the row" in (tmp_path / "report.txt").read_text(encoding="utf-8")
    assert said == (not quick)


def test_rows_are_selected_by_name(tmp_path: Path, rows: list[case.Row]) -> None:
    def selected(*patterns: str, quick: bool = False) -> list[str]:
        return [row.name for row in run.select(tiny_options(tmp_path, *patterns, quick=quick))]

    assert selected() == [row.name for row in rows]
    assert selected(quick=True) == [row.name for row in rows if row.quick]
    assert selected("rope/float32") == ["rope/float32/64", "rope/float32/32"]
    assert selected("rope/*/32", "rope/float32/64") == ["rope/float32/64", "rope/float32/32", "rope/bfloat16/32"]
    with pytest.raises(ValueError, match="got 'rope/float'"):
        selected("rope/float")


def test_rows_so_far_are_kept_when_it_is_stopped(tmp_path: Path, monkeypatch: Any) -> None:
    def stop() -> case.Case:
        raise KeyboardInterrupt

    rows = [a_row(lambda: case.Case(torch.zeros(1).clone, [])), replace(a_row(stop), name="test/other")]
    monkeypatch.setattr(run, "all_rows", lambda: rows)
    run.run(tiny_options(tmp_path))
    saved = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in saved["rows"]] == ["test/row"]


def test_a_missing_package_is_named() -> None:
    def build() -> case.Case:
        raise ModuleNotFoundError("no", name="some_peer")

    found = measure.measure_row(a_row(build), 0.0)
    assert (found.status, found.reason) == ("skipped", "some_peer is not installed")


def test_inference_mode_is_for_forward_only() -> None:
    seen = []

    def build() -> case.Case:
        def ours() -> torch.Tensor:
            seen.append(torch.is_inference_mode_enabled())
            return torch.ones(1)

        return case.Case(ours, [])

    for backward in (False, True):
        seen.clear()
        measure.measure_row(a_row(build, backward=backward), 0.0)
        assert set(seen) == {not backward}


def test_sides_take_turns() -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = timing.take_turns(sides, 0.0, 4, flush=lambda: calls.append("flush"))
    assert calls == ["a", "b", *["flush", "a", "flush", "b"] * 4]  # warm-up, then rounds
    assert [(len(s.wall), len(s.cpu), s.calls) for s in found.values()] == [(4, 4, 1)] * 2
    calls.clear()
    found = timing.take_turns(sides, 0.0, 2)
    assert found["a"].calls > 1  # too short for the clock
    in_rounds = calls[2:]
    assert in_rounds[0] == "a"
    untimed = in_rounds.index("b") - found["a"].calls
    assert untimed > 1  # they fetch what the side before has put out of the caches
    assert calls.count("a") == 1 + 2 * (untimed + found["a"].calls)


def test_caches_make_no_difference_to_long_calls(monkeypatch: Any) -> None:
    monkeypatch.setattr(timing, "_CACHED_SECONDS", 1e-3)
    calls: list[str] = []
    sides = {name: lambda name=name: (calls.append(name), time.sleep(2e-3)) for name in "ab"}
    found = timing.take_turns(sides, 0.0, 3)
    assert all(s.calls == 1 for s in found.values())
    assert calls == ["a", "b"] * 4


def test_warm_up_of_long_calls_counts(monkeypatch: Any) -> None:
    monkeypatch.setattr(timing, "_CACHED_SECONDS", 1e-3)
    monkeypatch.setattr(timing, "_LONG_SECONDS", 1e-3)
    calls: list[str] = []
    sides = {name: lambda name=name: (calls.append(name), time.sleep(2e-3)) for name in "ab"}
    found = timing.take_turns(sides, 0.0, 3)
    assert calls == ["a", "b"] * 3
    assert all(len(s.wall) == len(s.cpu) == 3 and min(s.wall) >= 2e-3 for s in found.values())


def test_quartiles() -> None:
    assert timing.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timing.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_least_time_is_that_of_arithmetic_or_memory() -> None:
    assert case.Work(flops=5e11).seconds(LIMITS) == pytest.approx(5.0)
    assert case.Work(flops=5e11, read=2e10, copied=5e10).seconds(LIMITS) == pytest.approx(6.0)
    assert case.Work(flops=5e11, bfloat16=True).seconds(LIMITS) == pytest.approx(5.0)
    assert case.Work(flops=5e11, bfloat16=True).seconds({**LIMITS, "dot_bfloat16_gflops": 250.0}) == pytest.approx(2.0)
    assert case.Work(flops=5e11, int16=2e11).seconds(LIMITS) == pytest.approx(5.0)
    assert case.Work(flops=5e11, int16=2e11).seconds({**LIMITS, "dot_int16_gflops": 200.0}) == pytest.approx(4.0)
    assert machine.best_limits([LIMITS, {**LIMITS, "copy_gbs": 11.0}]) == {**LIMITS, "copy_gbs": 11.0}


def test_peak_memory_is_that_of_the_work() -> None:
    code = (
        "from benchmarks import memory; data = bytearray(200 << 20); del data\n"
        "before = memory._forget_peak(); data = bytearray(64 << 20); del data\n"
        "print(memory._peak() - before)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 60 << 20 <= int(found.stdout) <= 72 << 20
    with pytest.raises(RuntimeError, match="no-such-row"):
        memory.peak_memory("no-such-row", case.OURS, 1, tiny=True)


def test_names_of_rows(rows: list[case.Row], monkeypatch: Any) -> None:
    assert len({row.name for row in rows}) == len(rows)
    assert any(row.quick for row in rows)
    monkeypatch.setattr("benchmarks.rows.rope.rows", lambda: rows[:1])
    with pytest.raises(ValueError, match="must be unique"):
        case.all_rows()


def test_command_line(rows: list[case.Row]) -> None:
    command = [sys.executable, "-m", "benchmarks", "--list"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [row.name for row in rows]
    wrong = subprocess.run([*command, "--rows", "nothing"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "got 'nothing'" in wrong.stderr
