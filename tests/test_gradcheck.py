"""Derivatives against finite differences, in float64."""

from __future__ import annotations

import pytest
import torch
from strategies import MODES, TABLES, Generator, make_rotate, make_tables
from torch.autograd import gradcheck, gradgradcheck

from x_rope_cls import Rotary, apply_rope, late_cls_pool, reference, rope_attention


def leaf(t: torch.Tensor) -> torch.Tensor:
    return t.detach().clone().requires_grad_()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("function", [apply_rope, reference.rope])
def test_rope(function, interleaved, inverse, table):
    generator = Generator(1)
    x = leaf(generator.normal(2, 2, 3, 5))
    cos, sin = (leaf(t) for t in make_tables(table, generator, 2, 2, 3, 2, torch.float64))
    rotate = torch.tensor([[False, True, True], [True, True, False]])

    def call(x, cos, sin):
        return function(x, Rotary(cos, sin, rotate, interleaved), inverse=inverse)

    assert gradcheck(call, (x, cos, sin))
    assert gradgradcheck(call, (x, cos, sin))


def test_rope_third_derivative():
    x, cos, sin = (torch.randn(*shape).double().requires_grad_() for shape in ((1, 1, 2, 4), (2, 2), (2, 2)))

    def second(x, cos, sin):
        y = apply_rope(x, Rotary(cos, sin)).square().sum()
        return torch.autograd.grad(y, (x, cos), create_graph=True)

    assert gradgradcheck(second, (x, cos, sin))


@pytest.mark.parametrize("cls_rope", MODES)
@pytest.mark.parametrize("options", ["plain", "bias", "bool", "keys", "dropout", "tables"])
def test_attention(backend, cls_rope, options):
    generator = Generator(2)
    B, H, Hkv, N, M, D, Dv = 2, 2, 1, 3, 4, 5, 2
    q, k, v = (leaf(generator.normal(*s)) for s in ((B, H, N, D), (B, Hkv, M, D), (B, Hkv, M, Dv)))
    kind = "full" if options == "tables" else "shared"
    rotate_q, rotate_k = make_rotate("per_batch", generator, B, N), make_rotate("front", generator, B, M)
    tables = [
        *make_tables(kind, generator, B, H, N, 2, torch.float64),
        *make_tables(kind, generator, B, Hkv, M, 2, torch.float64),
    ]
    attn_mask = key_mask = None
    if options == "bias":
        attn_mask = leaf(generator.normal(H, 1, M))
    if options == "bool":
        attn_mask = torch.tensor([[True, True, False, True], [False] * 4, [True, False, False, False]])
    if options == "keys":
        key_mask = torch.tensor([[True, False, True, True], [False] * 4])
    dropout_p = 0.4 if options == "dropout" else 0.0

    def call(q, k, v, cos_q, sin_q, cos_k, sin_k, attn_mask):
        torch.manual_seed(5)
        out, lse = rope_attention(
            q,
            k,
            v,
            Rotary(cos_q, sin_q, rotate_q),
            rotary_k=Rotary(cos_k, sin_k, rotate_k),
            cls_rope=cls_rope,
            attn_mask=attn_mask,
            key_mask=key_mask,
            dropout_p=dropout_p,
            return_lse=True,
        )
        return out, lse.nan_to_num(neginf=0.0)

    if options == "tables":
        tables = [leaf(t) for t in tables]
    assert gradcheck(call, (q, k, v, *tables, attn_mask), atol=1e-6)


def pool_arguments(norm, options):
    generator = Generator(3)
    B, H, M, N, C = 2, 2, 1, 3, 4
    x = leaf(generator.normal(B, N, C)).requires_grad_(options != "frozen_tokens")
    query = leaf(generator.normal(B if options == "own_queries" else 1, H, M, C))
    weight, bias = (leaf(generator.normal(C)) if norm else None for _ in range(2))
    return x, query, weight, bias


def pool_function(function, norm, options):
    key_mask = torch.tensor([[True, False, True], [False] * 3]) if options == "keys" else None

    def call(x, query, weight, bias):
        vectors = {"norm": norm, "norm_weight": weight, "norm_bias": bias, "norm_eps": 0.1}
        pooled, lse = function(x, query, key_mask=key_mask, scale=0.6, return_lse=True, **vectors)
        return pooled, lse.nan_to_num(neginf=0.0)

    return call


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("options", ["plain", "keys", "own_queries", "frozen_tokens"])
def test_late_cls_pool(backend, norm, options):
    assert gradcheck(pool_function(late_cls_pool, norm, options), pool_arguments(norm, options), atol=1e-6)


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_reference_late_cls_pool(norm):
    """Its second derivatives too, which the operator leaves to it."""
    call, arguments = pool_function(reference.late_cls_pool, norm, "keys"), pool_arguments(norm, "keys")
    assert gradcheck(call, arguments, atol=1e-6)
    assert gradgradcheck(call, arguments, atol=1e-6)
