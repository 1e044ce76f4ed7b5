"""Random combinations of Encoder options with late CLS against x-transformers' modules by hand."""

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
from test_xt_late_cls import assert_same
from test_xt_random import TOLERANCE, configurations
from xt_cases import one_thread  # noqa: F401  (used by every test)
from xt_emulation import exact_softmax
from xt_late_emulation import LateEmulation

CALLS = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["class_attention", "join"]),
        "at": st.integers(-2, 1),
        "num_cls": st.integers(1, 6),
        "tokens": st.integers(1, 9),
        "mask": st.booleans(),
        "attn_mask": st.booleans(),
    }
)
# Random numbers, and softmaxes over queries, of which there are others in the emulation.
LEFT_OUT = ("attn_gumbel_softmax", "attn_custom_attn_fn", "cross_attn_inverted_attention")


@hypothesis.settings(
    max_examples=3 * hypothesis.settings.default.max_examples,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(options=configurations(), call=CALLS, seed=st.integers(0, 2**31))
def test_random_configuration(
    options: dict[str, Any], call: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    options["attn_flash"] = False  # the emulation replaces the scores of the path that has them
    late = {"late_cls": call["mode"], "late_cls_at": call["at"], "num_cls_tokens": call["num_cls"]}
    hypothesis.assume(not any(name in options for name in LEFT_OUT))
    try:
        theirs = x_transformers.Encoder(**options)
    except Exception:  # options that do not go together
        hypothesis.assume(False)
    attentions = [theirs.layer_types[i] for i in theirs.layers_execute_order].count("a")
    hypothesis.assume(-attentions <= call["at"] < attentions)
    ours = x_rope_cls.Encoder(**options, **late)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs, ours = theirs.double(), ours.double()
    ours.load_state_dict({**theirs.state_dict(), "late_cls_tokens": ours.late_cls_tokens.detach()})
    exact_softmax(theirs, ours)
    inputs = cases.make_inputs(theirs, tokens=call["tokens"])
    if not call["mask"]:
        inputs.pop("mask")
        inputs.pop("context_mask", None)
    if call["attn_mask"] and call["tokens"] > 1:  # a single column would be broadcast over memory keys
        inputs["attn_mask"] = torch.rand(call["tokens"], call["tokens"]) > 0.2
    emulation = LateEmulation(theirs, ours.late_cls_tokens.detach(), call["mode"], call["at"], monkeypatch)
    try:
        expected = cases.run(emulation, inputs)
    except Exception:  # options that do not go together fail in many ways
        hypothesis.event("x-transformers cannot")
        return
    if not all(torch.isfinite(t).all() for t in expected.values()):
        return
    hypothesis.event("compared")
    assert_same(cases.run(ours, inputs), expected, TOLERANCE)
