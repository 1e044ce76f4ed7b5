"""Cross attention of few queries in any converted Attention of x-transformers: no keys and values of the context."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("x_transformers")
import x_transformers.x_transformers as xt
import xt_cases as cases
from xt_cases import one_thread  # noqa: F401  (used by every test)

from x_rope_cls.xt import few
from x_rope_cls.xt.attention import convert_attention

# What the keys and values of the context can be absorbed with.
ABSORBED: dict[str, dict[str, Any]] = {
    "plain": {},
    "other_dim": {"dim_context": 24},
    "one_head": {"heads": 1},
    "kv_heads": {"kv_heads": 2},
    "one_kv_head": {"one_kv_head": True},
    "value_dim_head": {"value_dim_head": 12},
    "num_mem_kv": {"num_mem_kv": 3},
    "num_mem_kv_grouped": {"num_mem_kv": 3, "kv_heads": 2},
    "add_zero_kv": {"add_zero_kv": True},
    "head_learned_sink": {"head_learned_sink": True},
    "head_learned_sink_grouped": {"head_learned_sink": True, "kv_heads": 2, "num_mem_kv": 1},
    "gates": {"gate_values": True, "gate_value_heads": True, "head_scale": True},
    "on_attn": {"on_attn": True},
    "latent_q": {"use_latent_q": True, "dim_latent_q": 16},
    "flash": {"flash": True},
}
ORDINARY: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": True},
    "value_rmsnorm": {"value_rmsnorm": True},
    "laser": {"laser": True},
    "l2_distance": {"l2_distance": True},
    "latent_kv": {"use_latent_kv": True, "dim_latent_kv": 16},
    "sigmoid": {"sigmoid": True},
    "max_attend_past": {"max_attend_past": 3},
}


def _pair(options: dict[str, Any]) -> tuple[Any, Any]:
    try:
        theirs = xt.Attention(32, **{"heads": 4, "dim_head": 8, **options}).double()
    except TypeError:
        pytest.skip(f"x-transformers {cases.VERSION} does not have this option")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours = copy.deepcopy(theirs)
    convert_attention(ours, None)
    return theirs, ours


def _run(attention: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Without the float32 softmax of x-transformers, where there is one."""
    for module in attention.modules():
        if getattr(getattr(module, "attn_fn", None), "func", None) is torch.nn.functional.softmax:
            module.attn_fn.keywords.pop("dtype", None)
    return cases.run(attention, inputs)


def _count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    real = few.pool_attention
    monkeypatch.setattr(few, "pool_attention", lambda *a, **k: (calls.append(k["form"]), real(*a, **k))[1])
    return calls


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [*ABSORBED, *ORDINARY])
def test_cross_attention(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**ABSORBED, **ORDINARY}[name]
    theirs, ours = _pair(options)
    context = torch.randn(3, 9, options.get("dim_context", 32), dtype=torch.float64)
    inputs: dict[str, Any] = {"x": torch.randn(3, 2, 32, dtype=torch.float64), "context": context}
    if masked:
        inputs["context_mask"] = torch.rand(3, 9) > 0.4
        inputs["mask"] = torch.tensor([[True, True], [True, False], [True, True]])
        if name != "sigmoid":
            inputs["context_mask"][1] = False
    calls = _count(monkeypatch)
    cases.assert_same(_run(ours, inputs), _run(theirs, inputs), 1e-9)
    assert calls == (["absorbed"] if name in ABSORBED else [])


def test_maps() -> None:
    theirs, ours = _pair({"num_mem_kv": 2, "kv_heads": 2})
    x, context = torch.randn(2, 2, 32).double(), torch.randn(2, 9, 32).double()
    mask = torch.rand(2, 9) > 0.4
    (out, got), (expected, maps) = (
        a(x, context=context, context_mask=mask, return_intermediates=True) for a in (ours, theirs)
    )
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    for name in ("qk_similarities", "post_softmax_attn"):
        torch.testing.assert_close(getattr(got, name), getattr(maps, name), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "more", ["many", "attn_mask", "attn_bias", "prev_attn", "kv_input_residual", "dropout", "self", "k_delta"]
)
def test_what_needs_keys(more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that x-transformers makes with keys formed, or for which there are too many queries."""
    theirs, ours = _pair({"dropout": 0.5} if more == "dropout" else {})
    queries = 17 if more == "many" else 2
    x, context = torch.randn(2, queries, 32).double(), torch.randn(2, 9, 32).double()
    arguments: dict[str, Any] = {
        "attn_mask": {"attn_mask": torch.rand(2, 9) > 0.3},
        "attn_bias": {"attn_bias": torch.randn(4, 2, 9).double()},
        "prev_attn": {"prev_attn": torch.randn(2, 4, 2, 9).double()},
        "kv_input_residual": {"kv_input_residual": torch.randn(2, 9, 32).double()},
        "k_delta": {"k_delta": torch.randn(2, 9, 32).double()},
    }.get(more, {})
    if more != "self":
        arguments["context"] = context
    calls = _count(monkeypatch)
    if more == "k_delta" and "k_delta" not in xt.Attention.forward.__code__.co_varnames:
        pytest.skip("no k_delta")
    out = ours(x, **arguments)
    assert calls == []
    if more == "dropout":
        assert not torch.allclose(ours(x, **arguments), out)
        ours.eval()(x, **arguments)
        assert calls == ["absorbed"]
    else:
        torch.testing.assert_close(out, theirs(x, **arguments), atol=1e-6, rtol=1e-6)
