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


def without_zeros(results: dict[str, Any]) -> dict[str, Any]:
    """A gradient of zeros and none at all mean the same."""
    return {name: t for name, t in results.items() if name == "out" or t.any()}


def compare(theirs: Any, ours: Any, at: int, inputs: dict[str, Any], patch: Any, tolerance: float = TOLERANCE) -> None:
    emulation = LateEmulation(theirs, ours.late_cls_tokens.detach(), ours.late_cls, at, patch)
    expected, got = cases.run(emulation, inputs), cases.run(ours, inputs)
    cases.assert_same(without_zeros(got), without_zeros(expected), tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_option(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours, at = make(name, mode, num_cls=2)
    inputs = cases.make_inputs(theirs)
    tolerance = {"polar": 1e-5, "dynamic_pos_bias": 2e-4}.get(name, TOLERANCE)
    compare(theirs, ours, at, inputs, monkeypatch, tolerance)
