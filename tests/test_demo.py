"""The demo, end to end and without a network, and ``info``."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from x_rope_cls import _C, demo
from x_rope_cls.__main__ import main
from x_rope_cls._info import info_lines

for _package in ("x_transformers", "sklearn", "aeon", "matplotlib", "rich"):
    pytest.importorskip(_package)

from x_rope_cls.demo import agreement, data, measure, model, results, train  # noqa: E402  (after what they need)

IN_FRONT = ["rotate", "skip", "mask"]
LATE = ["class_attention", "join"]
MODES = [*IN_FRONT, *LATE, model.POOL]
SIZE = model.Size(dim=16, depth=2, heads=2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tasks() -> dict[str, data.Task]:
    return {task.name: task for task in data.load_tasks()}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the demo must not use the network")

    out = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        assert main(["demo", "--quick", "--threads", "1", "--seeds", "2", "--epochs", "1", "--out", str(out)]) == 0
    return out


def test_report_has_all_rows(quick: Path) -> None:
    text = (quick / "report.txt").read_text(encoding="utf-8")
    rows = [line.split() for line in text.splitlines()]
    for task, parameters in (("digits", ("125,578", "141,962")), ("vowels", ("126,025", "142,409"))):
        for mode in MODES:
            accuracy = [row for row in rows if row[:2] == [task, mode] and "±" in row]
            assert [row[2] for row in accuracy] == [parameters[mode == model.POOL]]
            dtypes = {row[2] for row in rows if row[:2] == [task, mode] and len(row) == 7}
            assert dtypes == {"float32", "bfloat16", "float16"}
        for mode in MODES[1:]:
            assert any(row[:4] == [f"{task}:", mode, "-", "rotate"] for row in rows)
        for change in ("none", "tokens moved by 8", "CLS and memory too", "positions shuffled"):
            found = [row for row in rows if row[0:1] == [task] and " ".join(row[1:]).startswith(change)]
            assert [len(row) for row in found] == [1 + len(change.split()) + 2 * len(MODES)]
    for workload in ("digits,", "vowels,", "sheets,"):
        for work in ("forward", "training"):
            timed = {row[-7] for row in rows if row[:1] == [workload] and work in row and row[3].isdigit()}
            assert timed == {*MODES, model.OWN_POOL}
    assert sum(" ".join(row).startswith("3 of 3 attention layers fused") for row in rows) == 2
    assert sum(row[1:] == ["class", "yes", "mask", "cpu", f"({_C.cpu_isa()})", "absorbed"] for row in rows) == 2


def test_numbers_are_saved(quick: Path) -> None:
    found = json.loads((quick / "results.json").read_text(encoding="utf-8"))
    assert [task["name"] for task in found["tasks"]] == ["digits", "vowels"]
    for task in found["tasks"]:
        assert {mode: len(seeds) for mode, seeds in task["test"].items()} == dict.fromkeys(MODES, 2)
        assert task["parity"].keys() == {"rotate", model.POOL}
        assert max(task["parity"].values()) < 1e-4
        assert [row["variant"] for row in task["agreement"][::3]] == MODES
        for row in task["agreement"]:
            assert 0 < row["output"] <= 2 * row["output_eager"] + 16
            assert 0 < row["gradient"] <= 2 * row["gradient_eager"] + 16
    assert len(found["timings"]) == 6
    for timing in found["timings"]:
        assert set(timing["seconds"]) == {model.PLAIN, *MODES, model.OWN_POOL}
        assert all(second > 0 for seconds in timing["seconds"].values() for second in seconds)
    assert [(each["variant"], each["shift"]) for each in found["maps"]] == [(m, s) for m in MODES for s in (0, 8)]


@pytest.mark.parametrize("mode", ["mask", *LATE, model.POOL])
def test_moved_tokens_change_nothing_in_the_exact_ways(quick: Path, mode: str) -> None:
    found = json.loads((quick / "results.json").read_text(encoding="utf-8"))
    for name in ("tokens moved by 8", "CLS and memory too"):
        changes = [c for task in found["tasks"] for seed in task["moved"][mode] for c in seed if c["name"] == name]
        assert len(changes) == 4
        assert all(change["logits"] < 1e-4 for change in changes)
    before, after = (torch.tensor(each["weights"]) for each in found["maps"] if each["variant"] == mode)
    torch.testing.assert_close(before, after, atol=1e-6, rtol=0)


def test_picture_is_a_png(quick: Path) -> None:
    picture = (quick / "demo.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 20_000


def test_digits(tasks: dict[str, data.Task]) -> None:
    task = tasks["digits"]
    splits = (task.train, task.val, task.test)
    assert [len(split) for split in splits] == [1077, 360, 360]
    assert all(split.x.shape[1:] == (16, 4) and split.mask is None for split in splits)
    assert all(split.y.unique().tolist() == list(range(10)) for split in splits)
    assert task.positions.shape == (16, 2)
    assert task.positions[5].tolist() == [1, 1]
    channels = task.train.x.flatten(0, 1)
    torch.testing.assert_close(channels.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(channels.std(0), torch.ones(4), atol=1e-5, rtol=0)


def test_japanese_vowels(tasks: dict[str, data.Task]) -> None:
    task = tasks["vowels"]
    splits = (task.train, task.val, task.test)
    assert [len(split) for split in splits] == [216, 54, 370]
    assert all(split.y.unique().tolist() == list(range(9)) for split in splits)
    lengths = torch.cat([split.mask.sum(dim=1) for split in splits if split.mask is not None])
    assert (len(lengths), lengths.min().item(), lengths.max().item()) == (640, 7, 29)
    for split in splits:
        assert split.x.shape[1:] == (29, 12)
        assert split.mask is not None
        assert not split.x[~split.mask].any()
        # Recordings come first, padding behind them.
        assert (split.mask.long().diff(dim=1) <= 0).all()


@pytest.mark.parametrize("name", ["digits", "vowels"])
def test_no_recording_is_in_two_splits(tasks: dict[str, data.Task], name: str) -> None:
    task = tasks[name]
    everything = torch.cat([split.x.flatten(1) for split in (task.train, task.val, task.test)])
    assert len(everything.unique(dim=0)) == len(everything)


def test_sheets_are_read_row_by_row(tasks: dict[str, data.Task]) -> None:
    split = tasks["digits"].train
    sheet = data.sheets(split, per_side=2, count=3)
    assert sheet.x.shape == (3, 64, 4)
    tokens = sheet.x[1].reshape(8, 8, 4)
    torch.testing.assert_close(tokens[:4, 4:], split.x[5].reshape(4, 4, 4))
    torch.testing.assert_close(tokens[4:, :4], split.x[6].reshape(4, 4, 4))


def test_patches_are_cut_from_the_pictures() -> None:
    pixels = torch.arange(64.0)[None]
    patches = data._patches(pixels)
    assert patches.shape == (1, 16, 4)
    assert patches[0, 4 + 2].tolist() == [20, 21, 28, 29]  # second row of patches, third column
    assert torch.equal(data.image(patches[0]), pixels.reshape(8, 8))


@pytest.mark.parametrize("name", ["digits", "vowels"])
def test_variants_start_alike_and_rotate_is_x_transformers(tasks: dict[str, data.Task], name: str) -> None:
    task = tasks[name]
    batch = task.test.rows(slice(8))
    rotary = model.tables(model.token_positions(task.positions), SIZE)
    built = {variant: model.build(variant, task, SIZE, seed=3).eval() for variant in (model.PLAIN, *MODES)}
    weights = built[model.PLAIN].state_dict()
    logits = {}
    for variant, each in built.items():
        shared = {key: value for key, value in each.state_dict().items() if not key.startswith("pool.")}
        assert shared.keys() == weights.keys() - ({"cls_token"} if variant == model.POOL else set())
        assert all(torch.equal(value, weights[key]) for key, value in shared.items())
        with torch.no_grad():
            logits[variant] = each(batch.x, batch.mask, model.tables_for(variant, rotary))
    torch.testing.assert_close(logits["rotate"], logits[model.PLAIN], atol=1e-5, rtol=1e-5)
    for i, variant in enumerate(MODES):
        for other in MODES[:i]:
            assert (logits[variant] - logits[other]).abs().max() > 1e-3, (variant, other)


@pytest.mark.parametrize("variant", [*LATE, model.POOL])
def test_padding_never_matters(tasks: dict[str, data.Task], variant: str) -> None:
    task = tasks["vowels"]
    batch = task.test.rows(slice(8))
    assert batch.mask is not None
    built = model.build(variant, task, SIZE, seed=0).eval()
    given = model.tables_for(variant, model.tables(model.token_positions(task.positions), SIZE))
    other = batch.x.masked_fill(~batch.mask[..., None], 7)
    with torch.no_grad():
        torch.testing.assert_close(built(other, batch.mask, given), built(batch.x, batch.mask, given))
        assert (built(other, None, given) - built(batch.x, None, given)).abs().max() > 1e-3


def test_late_cls_enters_behind_the_first_layer(tasks: dict[str, data.Task]) -> None:
    """Two layers of three pool for class_attention, the same tokens; one does for join. CLS is none of the tokens."""
    task = tasks["digits"]
    size = model.Size(dim=16, depth=3, heads=2)
    batch = task.test.rows(slice(4))
    given = model.tables_for("join", model.tables(model.token_positions(task.positions), size))
    pooled = {}
    for variant in LATE:
        with agreement._PoolCalls() as recorder:
            train.logits(model.build(variant, task, size, seed=0), batch, given)
        pooled[variant] = [call[0] for call in recorder.calls]
    assert {variant: len(states) for variant, states in pooled.items()} == {"class_attention": 2, "join": 1}
    assert {states.shape for each in pooled.values() for states in each} == {(4, model.NUM_MEMORY + 16, 16)}
    assert torch.equal(*pooled["class_attention"])


def test_pools_of_both_packages_are_one_function(tasks: dict[str, data.Task]) -> None:
    task = tasks["vowels"]
    built = model.build(model.POOL, task, SIZE, seed=0)
    own = model.build(model.OWN_POOL, task, SIZE, seed=0)
    assert type(built.pool).__module__.startswith("x_transformers")
    assert type(own.pool).__module__.startswith("x_rope_cls")
    assert agreement.parity(built, task, SIZE) < 1e-5
    with torch.no_grad():
        own.pool.pooler.to_v.weight.mul_(2)
    assert built.pool.state_dict().keys() == own.pool.state_dict().keys()
    assert not torch.equal(built.pool.pooler.to_v.weight, own.pool.pooler.to_v.weight)


def test_tokens_are_not_decayed(tasks: dict[str, data.Task]) -> None:
    for variant in ("join", model.POOL):
        built = model.build(variant, tasks["digits"], SIZE, seed=0)
        decay = {id(p): g["weight_decay"] for g in train.make_optimizer(built).param_groups for p in g["params"]}
        names = [name for name, p in built.named_parameters() if p.dim() >= 2 and decay[id(p)] == 0]
        assert set(names) == {"memory_tokens", "pool.queries" if variant == model.POOL else "cls_token"}


def test_positions_of_a_sequence_are_those_x_transformers_counts(tasks: dict[str, data.Task]) -> None:
    task = tasks["vowels"]
    batch = task.test.rows(slice(8))
    plain = model.build(model.PLAIN, task, SIZE, seed=0).eval()
    rotary = model.tables(model.token_positions(task.positions), SIZE)
    with torch.no_grad():
        torch.testing.assert_close(plain(batch.x, batch.mask), plain(batch.x, batch.mask, model.plain_tables(rotary)))


def test_moved_positions_matter_where_they_should(tasks: dict[str, data.Task]) -> None:
    task = tasks["digits"].small(16)
    size = model.Size(dim=16, depth=3, heads=2)  # with two layers, no tokens would meet before late CLS enters
    felt = {}
    for variant in MODES:
        rows = measure.moved(model.build(variant, task, size, seed=0), task, size, shift=5)
        felt[variant] = [row.logits > 1e-3 for row in rows]
    exact = {variant: [False, False, True] for variant in ("mask", *LATE, model.POOL)}
    assert felt == {"rotate": [True, False, True], "skip": [True, True, True], **exact}


@pytest.mark.parametrize("variant", MODES)
def test_cls_attention_is_that_of_the_cls_token(tasks: dict[str, data.Task], variant: str) -> None:
    task = tasks["digits"]
    recording = task.test.rows(slice(1))
    rotary = model.tables(model.token_positions(task.positions), SIZE)
    built = model.build(variant, task, SIZE, seed=0)
    weights = measure.cls_attention(built, recording, rotary, SIZE)
    assert weights.shape == (16,)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    assert weights.std() > 0
    # Tokens and positions in another order: the same weights in that order.
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    other = model.tables(model.token_positions(task.positions[order]), SIZE)
    mixed = measure.cls_attention(built, data.Split(recording.x[:, order], recording.y), other, SIZE)
    torch.testing.assert_close(mixed, weights[order])


@pytest.mark.parametrize("variant", [*LATE, model.POOL])
def test_agreement_sees_a_wrong_operator(
    tasks: dict[str, data.Task], variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks["vowels"]
    built = model.build(variant, task, SIZE, seed=0)
    rotary = model.tables(model.token_positions(task.positions), SIZE)
    right = agreement.late_cls_pool
    monkeypatch.setattr(agreement, "late_cls_pool", lambda *a, **k: right(*a, **{**k, "key_mask": None}))
    row = agreement.agreement(built, task.test.rows(slice(4)), rotary, SIZE)[0]
    assert row.output > 1000 > 16 > row.output_eager


def test_comparison_says_when_a_difference_is_within_the_spread() -> None:
    def task(mask: list[float]) -> results.TaskResults:
        return results.TaskResults("t", "", (1, 1, 1), 1, 1, test={"rotate": [0.5, 0.6, 0.7], "mask": mask})

    assert (
        results.compare(task([0.4, 0.6, 0.8]), "mask", "rotate")
        == "t: mask - rotate = +0.0 ± 10.0 points: within the spread"
    )
    assert results.compare(task([0.9, 1.0, 1.0]), "mask", "rotate").endswith("beyond the spread")
    single = results.TaskResults("t", "", (1, 1, 1), 1, 1, test={"rotate": [0.5], "mask": [0.6]})
    assert results.compare(single, "mask", "rotate").endswith("+10.0 points; one seed, so no spread to compare with")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "aeon" else found(name))
    assert main(["demo"]) == 1
    message = capsys.readouterr().err
    assert "aeon must be installed" in message
    assert "pip install 'x_rope_cls[demo]'" in message


@pytest.mark.parametrize("arguments", [[], ["demo", "--seeds", "0"], ["demo", "--epochs", "x"], ["nothing"]])
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--no-measure"]) == 0
    text = capsys.readouterr().out
    for expected in (
        torch.__version__,
        _C.build_info()["compiler"],
        _C.cpu_isa(),
        "libx_rope_cls",
        "tested from",
        "CUDA",
    ):
        assert expected in text
    assert "measured limits" not in text


def test_info_measures() -> None:
    text = "\n".join(info_lines(measure_seconds=0.01))
    assert "one thread (1): float32 FMA" in text
    assert "GB/s" in text
