"""Derivatives against finite differences, in float64."""

from __future__ import annotations

import pytest
import torch
from strategies import MODES, TABLES, Generator, make_rotate, make_tables
from torch.autograd import gradcheck, gradgradcheck

from x_rope_cls import Rotary, apply_rope, reference, rope_attention


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
def test_attention(isa, cls_rope, options):
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
