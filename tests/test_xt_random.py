"""Random combinations of Encoder options, masks and modes against x-transformers, outputs and gradients."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import x_rope_cls

pytest.importorskip("x_transformers")
import x_transformers
import xt_cases as cases
from xt_cases import one_thread  # noqa: F401  (used by every test)
from xt_emulation import emulated, exact_softmax, rotated_heads

TOLERANCE = 1e-7
NOT_FLOAT64 = {*cases.FLOAT32_ONLY, "polar"}  # these go through float32

COMBINABLE = sorted(set(cases.ALL_OPTIONS) - NOT_FLOAT64)
SIZES: dict[str, st.SearchStrategy[Any]] = {
    "depth": st.integers(1, 3),
    "heads": st.sampled_from([2, 4, 6]),
    "attn_dim_head": st.sampled_from([6, 8, 16]),
    "attn_flash": st.booleans(),
    "rotary_emb_dim": st.sampled_from([4, 6]),
    "attn_kv_heads": st.sampled_from([1, 2]),
    "attn_num_mem_kv": st.integers(1, 3),
    "attn_qk_norm": st.booleans(),
    "ff_glu": st.booleans(),
    "num_residual_streams": st.integers(1, 3),
}


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Options of an encoder: sizes, and a few of the named options on top, which may not go together."""
    options = dict(cases.BASE)
    for name in draw(st.sets(st.sampled_from(sorted(SIZES)), max_size=5)):
        options[name] = draw(SIZES[name])
    for name in draw(st.lists(st.sampled_from(COMBINABLE), max_size=4, unique=True)):
        options |= cases.ALL_OPTIONS[name]
    return options


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes and masks of one forward."""
    return {
        "tokens": draw(st.integers(3, 9)),
        "mask": draw(st.booleans()),
        "attn_mask": draw(st.booleans()),
        "context_pos": draw(st.booleans()),
        "cls_rope": draw(st.sampled_from(["rotate", "skip", "mask"])),
        "prefix": draw(st.integers(0, 2)),
        "suffix": draw(st.integers(0, 1)),
    }


def _inputs(encoder: Any, call: dict[str, Any]) -> dict[str, Any]:
    tokens = call["tokens"]
    inputs = cases.make_inputs(encoder, tokens=tokens)
    if not call["mask"]:
        inputs.pop("mask")
        inputs.pop("context_mask", None)
    if call["attn_mask"]:
        inputs["attn_mask"] = torch.rand(tokens, tokens) > 0.2
    if call["context_pos"] and encoder.cross_attend and encoder.rotary_pos_emb is not None:
        inputs["context_pos"] = torch.arange(inputs["context"].shape[1])
    return inputs


def _run_theirs(theirs: Any, inputs: dict[str, Any], call: dict[str, Any], patch: pytest.MonkeyPatch) -> Any:
    """What x-transformers makes of it, or None where it cannot."""
    try:
        if call["cls_rope"] == "rotate":
            return cases.run(theirs, inputs)
        inner = call["tokens"] - call["prefix"] - call["suffix"]
        rotate = torch.tensor([False] * call["prefix"] + [True] * inner + [False] * call["suffix"])
        with emulated(call["cls_rope"], rotate, patch, rotated_heads(theirs)):
            return cases.run(theirs, inputs)
    except Exception:  # options that do not go together fail in many ways
        return None


@hypothesis.settings(
    max_examples=5 * hypothesis.settings.default.max_examples,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(options=configurations(), call=calls(), seed=st.integers(0, 2**31))
def test_random_configuration(
    options: dict[str, Any], call: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    if call["cls_rope"] == "mask":
        options["attn_flash"] = False  # the emulation replaces the scores of the path that has them
    ours_only = {name: call[name] for name in ("cls_rope",)}
    ours_only |= {"num_prefix_tokens": call["prefix"], "num_suffix_tokens": call["suffix"]}
    try:
        x_transformers.Encoder(**options)
    except Exception as refused:
        with pytest.raises(type(refused)):
            x_rope_cls.Encoder(**options, **ours_only)
        return
    theirs, ours = cases.make_pair(options, **ours_only)
    exact_softmax(theirs, ours)
    inputs = _inputs(theirs, call)
    special = call["prefix"] + call["suffix"] > 0
    if theirs.rotary_pos_emb is None and special and call["cls_rope"] != "rotate":
        with pytest.raises(ValueError, match="rotary_pos_emb"):
            ours(**inputs)
        return
    expected = _run_theirs(theirs, inputs, call, monkeypatch)
    if expected is None or not all(torch.isfinite(t).all() for t in expected.values()):
        return
    hypothesis.event("compared " + ("fused" if x_rope_cls.explain(ours).fused else "composite"))
    cases.assert_same(cases.run(ours, inputs), expected, TOLERANCE)
