"""pool_attention in both forms against one softmax in plain PyTorch."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from pooling_cases import PoolCase, call, plain, pool_cases
from strategies import Generator, examples
from tolerance import CHAIN, GRADIENT_SLACK, SLACK, assert_close
from torch import Tensor

from x_rope_cls import pooling
from x_rope_cls.pooling import Pooled, ordinary_reasons, pool_attention

FORMS = ("absorbed", "ordinary")


def gradients(case: PoolCase, function: Any) -> tuple[Pooled, dict[str, Tensor]]:
    """Results, and gradients of a random linear function of all three."""
    case = case.leaves()
    results = function(case)
    g = Generator(1)
    weights = [g.normal(*t.shape).to(t.dtype) for t in results]
    finite = [torch.where(t.isfinite(), t, 0) for t in results]  # lse of a row without keys
    total = sum((t * w).sum().double() for t, w in zip(finite, weights, strict=True))
    leaves = case.tensors()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return Pooled(*(t.detach() for t in results)), dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("form", FORMS)
@hypothesis.given(case=pool_cases())
@examples(60)
def test_random_cases(form, case):
    dtype = case.x.dtype
    out, out_grads = gradients(case, lambda c: call(c, form=form))
    eager, eager_grads = gradients(case, plain)
    exact, exact_grads = gradients(case.double(), plain)
    assert out.out.dtype == out.weights.dtype == dtype
    for name, *of in zip(Pooled._fields, out, eager, exact, strict=True):
        assert_close(*of, dtype, name, CHAIN * SLACK[dtype])
    for name in out_grads:
        of = (out_grads[name], eager_grads[name], exact_grads[name])
        assert_close(*of, dtype, f"gradient of {name}", CHAIN * GRADIENT_SLACK[dtype])


def simple(dtype: torch.dtype = torch.float64, M: int = 2, D: int = 8) -> PoolCase:
    x, q = torch.randn(2, 7, 12, dtype=dtype), torch.randn(2, M, 2, D, dtype=dtype)
    return PoolCase(x, q, torch.randn(2 * D, 12, dtype=dtype), torch.randn(2 * D, 12, dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
def test_masked_tokens_never_matter(form):
    """NaN in padding reaches neither results nor gradients."""
    case = replace(simple(), norm="layer", key_mask=torch.rand(2, 7) < 0.6)
    case.key_mask[0] = False
    expected = gradients(case, lambda c: call(c, form=form))
    poisoned = replace(case, x=torch.where(case.key_mask[..., None], case.x, torch.nan))
    found = gradients(poisoned, lambda c: call(c, form=form))
    for a, b in zip((*expected[0], *expected[1].values()), (*found[0], *found[1].values()), strict=True):
        torch.testing.assert_close(b, a)
    assert found[1]["x"][~case.key_mask].abs().max() == 0
    assert found[0].out[0].abs().max() == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("B", "N", "M"), [(0, 5, 2), (2, 5, 0), (2, 0, 2), (0, 0, 1)])
@pytest.mark.parametrize("key_heads", [1, 2])
def test_nothing_to_do(form, B, N, M, key_heads):
    """Empty batches, sequences and sets of queries."""
    k_weight, v_weight = torch.randn(8 * key_heads, 12), torch.randn(8 * key_heads, 12)
    leaves = [torch.randn(B, N, 12), torch.randn(B, M, 2, 8), k_weight, v_weight]
    x, q, k_weight, v_weight = (t.requires_grad_() for t in leaves)
    pooled = pool_attention(
        *(x, q, k_weight, v_weight), v_bias=torch.ones(8 * key_heads), form=form, return_lse=True, need_weights=True
    )
    assert [t.shape for t in pooled] == [(B, M, 2, 8), (B, 2, M), (B, 2, M, N)]
    if N == 0:
        assert not pooled.out.any()
        assert (pooled.lse == -torch.inf).all()
    assert all(t.isfinite().all() for t in torch.autograd.grad(pooled.out.sum(), (x, q, k_weight, v_weight)))


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_mask_over_pairs(kind):
    case = replace(
        simple(), extra=torch.randn(2, 1, 12).double(), key_mask=torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    )
    mask = torch.rand(2, 2, 2, 7) < 0.5
    mask = mask if kind == "bool" else torch.randn(2, 1, 2, 7).double().masked_fill(~mask[:, :1], -torch.inf)
    for a, b in zip(call(case, attn_mask=mask), plain(case, attn_mask=mask), strict=True):
        torch.testing.assert_close(a, b)


def test_key_norm():
    case = replace(simple(), k_bias=torch.randn(16).double())
    norm = torch.nn.LayerNorm(8).double()
    for a, b in zip(call(case, key_norm=norm), plain(case, key_norm=norm), strict=True):
        torch.testing.assert_close(a, b)


def test_chosen_form(monkeypatch):
    """What pool_attention runs is what ordinary_reasons says."""
    ran = []
    for form in FORMS:
        function = getattr(pooling, f"_{form}")
        monkeypatch.setattr(pooling, f"_{form}", lambda *args, f=form, g=function: (ran.append(f), g(*args))[1])
    cases = {
        "absorbed": [{}, {"key_mask": torch.ones(2, 7, dtype=torch.bool)}, {"form": "absorbed"}],
        "ordinary": [
            {"key_norm": torch.nn.Identity()},
            {"attn_mask": torch.ones(7, dtype=torch.bool)},
            {"dropout_p": 0.1},
        ],
    }
    for form, options in cases.items():
        for option in options:
            case = replace(simple(), **{k: option.pop(k) for k in ("key_mask",) if k in option})
            call(case, **option)
            assert ran.pop() == form
    for dtype, M, form in (
        (torch.float32, 8, "absorbed"),
        (torch.float32, 9, "ordinary"),
        (torch.bfloat16, 4, "absorbed"),
        (torch.bfloat16, 5, "ordinary"),
    ):
        call(simple(dtype, M))
        assert ran.pop() == form
    call(simple(M=9), form="absorbed")
    assert ran.pop() == "absorbed"


def test_reasons():
    assert ordinary_reasons() == ()
    assert ordinary_reasons(queries=16, heads=8, key_heads=8, key_dim=64) == ()
    for flag in ("key_norm", "value_norm", "key_memory", "rotated_keys", "position_bias", "attn_mask", "dropout"):
        assert len(ordinary_reasons(**{flag: True})) == 1
    assert len(ordinary_reasons(key_norm=True, dropout=True)) == 2
    (reason,) = ordinary_reasons(queries=65, heads=8, key_heads=8, key_dim=64)
    assert "65 queries are too many for 8 heads" in reason
    assert ordinary_reasons(queries=9, heads=8, key_heads=1, key_dim=64)  # fewer keys to form
    assert not ordinary_reasons(queries=8, heads=8, key_heads=1, key_dim=64)


@pytest.mark.parametrize("form", FORMS)
def test_under_functorch_transforms(form):
    """Plain PyTorch there, the same numbers: per-sample gradients, for example."""
    case = simple()

    def loss(weight: Tensor, x: Tensor, q: Tensor) -> Tensor:
        return pool_attention(x[None], q[None], weight, case.v_weight, form=form).out.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(case.k_weight, case.x, case.q)
    for index in range(2):
        weight = case.k_weight.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(weight, case.x[index], case.q[index]), weight)
        torch.testing.assert_close(found[index], expected)


def test_dropout():
    """Attention weights are dropped, those of extra keys too, and scaled so that the mean stays."""
    case = replace(simple(), extra=torch.randn(1, 2, 12).double())
    torch.manual_seed(1)
    first = call(case, dropout_p=0.3)
    second = call(case, dropout_p=0.3)
    torch.manual_seed(1)
    assert torch.equal(call(case, dropout_p=0.3).out, first.out)
    assert not torch.equal(first.out, second.out)
    exact = plain(case)
    torch.testing.assert_close(first.weights, exact.weights)
    mean = torch.stack([call(case, dropout_p=0.3, need_weights=False).out for _ in range(4000)]).mean(0)
    assert (mean - exact.out).abs().max() < 0.1 * exact.out.abs().max()
    everything = call(case, dropout_p=1.0).out
    assert everything.abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 7)}, "x must be (batch, tokens, channels), got (2, 7)"),
        ({"q": (3, 2, 2, 8)}, "q must be (2 or 1, queries, heads, key_dim), got (3, 2, 2, 8)"),
        ({"q": (2, 2, 16)}, "q must be (2 or 1, queries, heads, key_dim), got (2, 2, 16)"),
        ({"k_weight": (16, 9)}, "k_weight must be (columns, 12), got (16, 9)"),
        ({"v_weight": (16, 9)}, "v_weight must be (columns, 12), got (16, 9)"),
        ({"k_weight": (15, 12)}, "k_weight must have a divisor of 2 heads, times 8 rows, got 15"),
        ({"k_weight": (24, 12)}, "k_weight must have a divisor of 2 heads, times 8 rows, got 24"),
        ({"v_weight": (15, 12)}, "v_weight must have a multiple of 2 key heads as rows, got 15"),
        ({"extra": (3, 1, 12)}, "extra must be (2 or 1, at least 1, 12), got (3, 1, 12)"),
        ({"extra": (2, 0, 12)}, "extra must be (2 or 1, at least 1, 12), got (2, 0, 12)"),
    ],
)
def test_shape_errors(change, message):
    case = replace(simple(), **{name: torch.randn(shape).double() for name, shape in change.items()})
    with pytest.raises(ValueError, match=re.escape(f"pool_attention: {message}")):
        call(case)


def test_other_errors():
    with pytest.raises(ValueError, match="form must be one of"):
        call(simple(), form="folded")
    with pytest.raises(ValueError, match="head_order must be one of"):
        call(replace(simple(), head_order="random"))
    with pytest.raises(ValueError, match="form must not be 'absorbed' where there is 'attention dropout in training'"):
        call(simple(), form="absorbed", dropout_p=0.5)
