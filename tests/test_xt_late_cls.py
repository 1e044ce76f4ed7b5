"""Late CLS with every option of x_transformers.Encoder, against its own modules run by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import x_rope_cls

pytest.importorskip("x_transformers")
import x_transformers
import xt_cases as cases
from xt_cases import one_thread  # noqa: F401  (used by every test)
from xt_emulation import exact_softmax
from xt_late_emulation import LateEmulation

TOLERANCE = 1e-9
MODES = ("class_attention", "join")
DEPTH = {"depth": 3}
TWO_ATTENTIONS = ("attn_tuple_options", "custom_layers")  # so that one is early: late_cls_at=-1
REFUSED = ("only_cross",)
RANDOM = ("attn_gumbel_softmax",)
NAMES = [name for name in cases.ALL_OPTIONS if name not in (*REFUSED, *RANDOM)]


def make(name: str, mode: str, num_cls: int, at: int | None = None, **more: Any) -> tuple[Any, Any, int]:
    """x-transformers' encoder, ours with late CLS and the same weights, and the layer where CLS enters."""
    depth = {"depth": 2} if name == "attn_tuple_options" else DEPTH
    options = {**cases.BASE, **depth, **cases.ALL_OPTIONS[name], **more}
    if not cases.known_to_installed_version(options):
        pytest.skip(f"x-transformers {cases.VERSION} does not have this option")
    at = (-1 if name in TWO_ATTENTIONS else -2) if at is None else at
    dtype = torch.float32 if name in cases.FLOAT32_ONLY else torch.float64
    theirs = x_transformers.Encoder(**options)
    ours = x_rope_cls.Encoder(**options, late_cls=mode, late_cls_at=at, num_cls_tokens=num_cls)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    cls = torch.randn(num_cls, ours.dim, dtype=dtype)
    ours.load_state_dict({**theirs.state_dict(), "late_cls_tokens": cls})
    exact_softmax(theirs, ours)
    return theirs, ours, at


def with_zeros(results: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """No gradient and one of zeros mean the same."""
    return {**{name: torch.zeros_like(t) for name, t in others.items()}, **results}


def assert_same(got: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    cases.assert_same(with_zeros(got, expected), with_zeros(expected, got), tolerance)


def compare(theirs: Any, ours: Any, at: int, inputs: dict[str, Any], patch: Any, tolerance: float = TOLERANCE) -> None:
    """Outputs and all gradients of ours and of x-transformers' modules by hand."""
    emulation = LateEmulation(theirs, ours.late_cls_tokens.detach(), ours.late_cls, at, patch, ours.cls_rope)
    expected, got = cases.run(emulation, inputs), cases.run(ours, inputs)
    assert_same(got, expected, tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_option(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours, at = make(name, mode, num_cls=2)
    inputs = cases.make_inputs(theirs)
    tolerance = {"polar": 1e-5, "dynamic_pos_bias": 2e-4}.get(name, TOLERANCE)
    compare(theirs, ours, at, inputs, monkeypatch, tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["plain", "attn_num_mem_kv", "value_residual", "residual_attn", "integrate_layers"])
@pytest.mark.parametrize("at", [0, 1, 2, -1])
def test_entry(name: str, at: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours, at = make(name, mode, num_cls=1, at=at)
    compare(theirs, ours, at, cases.make_inputs(theirs), monkeypatch)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", ["plain", "attn_kv_heads", "attn_num_mem_kv", "attn_head_learned_sink", "mv_split_residual"]
)
@pytest.mark.parametrize("num_cls", [1, 3, 17])
def test_number_of_cls_tokens(name: str, num_cls: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """17 queries are too many for head_dim 8 to absorb anything; as many CLS rows as tokens must not be confused."""
    theirs, ours, at = make(name, mode, num_cls=num_cls)
    for tokens in (1, num_cls, 9):
        compare(theirs, ours, at, cases.make_inputs(theirs, tokens=tokens), monkeypatch)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["plain", "attn_kv_heads", "attn_max_attend_past", "residual_attn", "alibi"])
def test_attn_mask_is_about_tokens(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours, at = make(name, mode, num_cls=2)
    inputs = cases.make_inputs(theirs)
    inputs["attn_mask"] = torch.rand(7, 7) > 0.4
    compare(theirs, ours, at, inputs, monkeypatch)
    del inputs["mask"]
    compare(theirs, ours, at, inputs, monkeypatch)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cls_rope", ["rotate", "skip", "mask"])
@pytest.mark.parametrize("name", ["plain", "attn_kv_heads", "rotate_num_heads", "attn_softclamp_logits"])
def test_other_tokens_without_a_position(name: str, cls_rope: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours, at = make(name, mode, num_cls=2)
    ours.cls_rope, ours.num_prefix_tokens, ours.num_suffix_tokens = cls_rope, 2, 1
    inputs = cases.make_inputs(theirs, tokens=8)
    rotate = torch.tensor([False] * 2 + [True] * 5 + [False])
    emulation = LateEmulation(theirs, ours.late_cls_tokens.detach(), mode, at, monkeypatch, cls_rope)
    expected = cases.run(emulation, {**inputs, "rotate": rotate})
    assert_same(cases.run(ours, inputs), expected, TOLERANCE)
    ours.num_prefix_tokens = ours.num_suffix_tokens = 0
    assert_same(cases.run(ours, {**inputs, "rotate": rotate}), expected, TOLERANCE)


@pytest.mark.parametrize("cls_rope", ["rotate", "skip", "mask"])
@pytest.mark.parametrize("name", ["plain", "attn_num_mem_kv", "cross_attend_kwargs"])
def test_tokens_keep_their_mode(name: str, cls_rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While joining, what tokens see of tokens, memory keys and a context is what they see without CLS."""
    theirs, ours, _ = make(name, "join", num_cls=1, at=0)
    plain = x_rope_cls.swap_(theirs, cls_rope=cls_rope, num_prefix_tokens=1)
    ours.cls_rope, ours.num_prefix_tokens = cls_rope, 1
    inputs = cases.make_inputs(ours)
    if ours.cross_attend:
        inputs["context_pos"] = torch.arange(inputs["context"].shape[1])
    expected = plain(**inputs)
    assert not torch.allclose(ours(**inputs)[:, 1:], expected)
    monkeypatch.setattr("x_rope_cls.xt.late.LateCall.pad_mask", _hide_cls)
    torch.testing.assert_close(ours(**inputs)[:, 1:], expected)


def _hide_cls(call: Any, mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else torch.nn.functional.pad(mask, (call.num_cls, 0), value=False)


MEMORIES = {
    "mems": {},
    "mems_mem_kv": {"attn_num_mem_kv": 2},
    "mems_qk_norm": {"attn_qk_norm": True},
    "mems_grouped": {"attn_kv_heads": 2},
    "mems_max_attend_past": {"attn_max_attend_past": 3},
    "mems_alibi": {"alibi_pos_bias": True, "rotary_pos_emb": False},
    "mems_rel_pos": {"rel_pos_bias": True, "rotary_pos_emb": False},
    "mems_rel_proj": {"attn_use_rel_proj_pos_bias": True},
    "mems_latent": cases.FUSED_OPTIONS["latent_q_kv"],
    "mems_composite": {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 0.5},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MEMORIES)
def test_mems(name: str, masked: bool, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours, at = make("plain", mode, num_cls=2, **MEMORIES[name])
    inputs = cases.make_inputs(theirs)
    inputs["mems"] = [torch.randn(2, 3, 32, dtype=torch.float64) for _ in range(3)]
    if masked:
        inputs["mem_masks"] = [torch.rand(2, 3) > 0.4 for _ in range(3)]
    else:
        del inputs["mask"]
    compare(theirs, ours, at, inputs, monkeypatch)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["plain", "attn_num_mem_kv", "attn_kv_heads", "attn_qk_norm"])
def test_further_keys(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of another model, key masks of their own, additions to what keys and values are made of."""
    theirs, ours, at = make(name, mode, num_cls=2)
    inputs = cases.make_inputs(theirs)
    kv_heads = ours.layers[0][1].kv_heads
    added = [tuple(torch.randn(2, kv_heads, 3, 8, dtype=torch.float64) for _ in range(2)) for _ in range(3)]
    compare(theirs, ours, at, {**inputs, "self_attn_additional_kv": added}, monkeypatch)
    masked = {"self_attn_additional_kv": added, "additional_kv_mask": torch.rand(2, 3) > 0.4}
    compare(theirs, ours, at, {**inputs, **masked}, monkeypatch)
    compare(theirs, ours, at, {"x": inputs["x"], **masked}, monkeypatch)
    compare(theirs, ours, at, {**inputs, "self_attn_kv_mask": torch.rand(2, 7) > 0.4}, monkeypatch)
    residuals = torch.randn(3, 2, 7, 32, dtype=torch.float64)
    compare(theirs, ours, at, {**inputs, "self_attn_kv_residuals": residuals}, monkeypatch)


@pytest.mark.parametrize("mode", MODES)
def test_conditions_of_tokens(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours, at = make("plain", mode, num_cls=2)
    inputs = cases.make_inputs(theirs)
    for shape in ((2, 32), (2, 7, 32)):
        compare(theirs, ours, at, {**inputs, "in_attn_cond": torch.randn(shape, dtype=torch.float64)}, monkeypatch)
    embeds = torch.randn(11, 3, 32, dtype=torch.float64), torch.randint(0, 11, (2, 7))
    compare(theirs, ours, at, {**inputs, "deep_embeds_and_ids": embeds}, monkeypatch)
