"""``"skip"`` and ``"mask"`` against x-transformers itself, its rotation and its scores replaced by plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import x_rope_cls

pytest.importorskip("x_transformers")
import xt_cases as cases
from xt_cases import one_thread  # noqa: F401  (used by every test)
from xt_emulation import emulated, exact_softmax, rotated_heads

from x_rope_cls.xt import attention, devices

TOLERANCE = 1e-9
WITHOUT_ROTATION = ("no_rotary", "polar", "rel_pos_bias", "dynamic_pos_bias")
NAMES = [name for name in cases.ALL_OPTIONS if name not in WITHOUT_ROTATION]


def _make(name: str, **ours: Any) -> tuple[Any, Any]:
    options = cases.ALL_OPTIONS[name]
    if not cases.known_to_installed_version(options):
        pytest.skip(f"x-transformers {cases.VERSION} does not have this option")
    theirs, mine = cases.make_pair({**cases.BASE, **options}, **ours)
    exact_softmax(theirs, mine)
    return theirs, mine


@pytest.mark.parametrize("cls_rope", ["skip", "mask"])
@pytest.mark.parametrize("name", NAMES)
def test_option(name: str, cls_rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = _make(name, cls_rope=cls_rope, num_prefix_tokens=2, num_suffix_tokens=1)
    inputs = cases.make_inputs(theirs, tokens=8)
    rotate = torch.tensor([False] * 2 + [True] * 5 + [False])
    if theirs.cross_attend:
        inputs["context_pos"] = torch.arange(inputs["context"].shape[1])
    with emulated(cls_rope, rotate, monkeypatch, rotated_heads(theirs)):
        expected = cases.run(theirs, inputs)
    got = cases.run(ours, inputs)
    cases.assert_same(got, expected, TOLERANCE)
    ours.cls_rope = "rotate"
    assert not torch.allclose(ours(**inputs), got["out"])


@pytest.mark.parametrize("cls_rope", ["skip", "mask"])
@pytest.mark.parametrize(
    "name", ["plain", "attn_num_mem_kv", "attn_kv_heads", "attn_softclamp_logits", "residual_attn"]
)
@pytest.mark.parametrize("where", ["scattered", "per_batch", "all", "none"])
def test_rotate_per_call(name: str, cls_rope: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = _make(name, cls_rope=cls_rope, num_prefix_tokens=1)
    inputs = cases.make_inputs(theirs, tokens=8)
    rotate = {
        "scattered": torch.tensor([True, False, True, True, False, True, True, False]),
        "per_batch": torch.rand(2, 8) > 0.4,
        "all": torch.ones(8, dtype=torch.bool),
        "none": torch.zeros(8, dtype=torch.bool),
    }[where]
    with emulated(cls_rope, rotate, monkeypatch, rotated_heads(theirs)):
        expected = cases.run(theirs, inputs)
    cases.assert_same(cases.run(ours, {**inputs, "rotate": rotate}), expected, TOLERANCE)
    ours.num_prefix_tokens = 0
    ours.rotate = rotate if rotate.dim() == 1 else None
    if rotate.dim() == 1:
        cases.assert_same(cases.run(ours, inputs), expected, TOLERANCE)


@pytest.mark.parametrize("name", ["plain", "attn_num_mem_kv", "attn_pre_talking_heads", "value_residual"])
def test_mask_sees_no_positions(name: str) -> None:
    """Reordering (token, position) pairs, or shifting all positions, changes nothing for tokens without a position."""
    _, ours = _make(name, cls_rope="mask", num_prefix_tokens=2)
    x, pos = torch.randn(2, 9, 32, dtype=torch.float64), torch.arange(9)
    order = torch.cat((torch.arange(2), 2 + torch.randperm(7)))
    out = ours(x, pos=pos)
    torch.testing.assert_close(ours(x[:, order], pos=pos[order]), out[:, order])
    torch.testing.assert_close(ours(x, pos=pos + 5), out)
    moved = pos.clone()
    moved[:2] = 100
    torch.testing.assert_close(ours(x, pos=moved), out)
    torch.testing.assert_close(ours(x, pos=pos[2:]), out)  # positions of the ordinary tokens are enough


@pytest.mark.parametrize("name", [n for n in cases.FUSED_OPTIONS if n not in {*WITHOUT_ROTATION, *cases.FLOAT32_ONLY}])
def test_without_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no kernel for the device, the composite path computes the same."""
    _, ours = _make(name, cls_rope="mask", num_prefix_tokens=2, num_suffix_tokens=1)
    inputs = cases.make_inputs(ours, tokens=8)
    expected = cases.run(ours, inputs)
    monkeypatch.setattr(devices, "FUSED_DEVICE_TYPES", frozenset())
    monkeypatch.setattr(attention, "fused_attention", None)
    assert not x_rope_cls.explain(ours).fused or not len(x_rope_cls.explain(ours))
    cases.assert_same(cases.run(ours, inputs), expected, TOLERANCE)


def test_mask_without_special_tokens_is_rotate() -> None:
    theirs, ours = _make("plain", cls_rope="mask")
    inputs = cases.make_inputs(theirs)
    cases.assert_same(cases.run(ours, inputs), cases.run(theirs, inputs), TOLERANCE)


def test_all_special_is_no_rotation() -> None:
    theirs, ours = _make("plain", cls_rope="mask", num_prefix_tokens=7)
    inputs = cases.make_inputs(theirs)
    theirs.rotary_pos_emb = None
    cases.assert_same(cases.run(ours, inputs), cases.run(theirs, inputs), TOLERANCE)


def test_memory_keys_are_raw_in_mask_only(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = _make("attn_num_mem_kv", cls_rope="mask")
    inputs = cases.make_inputs(theirs)
    everywhere = torch.ones(7, dtype=torch.bool)
    with emulated("mask", everywhere, monkeypatch, 4):
        cases.assert_same(cases.run(ours, inputs), cases.run(theirs, inputs), TOLERANCE)
    ours.cls_rope = "skip"
    cases.assert_same(cases.run(ours, inputs), cases.run(theirs, inputs), TOLERANCE)
