"""AttentionPoolLatent beyond timm: key masks, maps, empty sequences, other widths, dtypes, errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from strategies import DTYPES
from tolerance import CHAIN, GRADIENT_SLACK, SLACK, assert_close
from torch import Tensor, nn

from x_rope_cls import AttentionPoolLatent


def plain(module: AttentionPoolLatent, x: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Written out: result and attention map."""
    heads = module.num_heads
    if module.pos_embed is not None:
        x = x + module.pos_embed
    q = module.q_norm(module.q(module.latent).unflatten(-1, (heads, -1))).transpose(1, 2)
    k, v = module.kv(x).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ module.k_norm(k).mT * module.head_dim**-0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    if key_mask is not None:
        weights = torch.where(key_mask.any(-1)[:, None, None, None], weights, 0)
    out = module.proj((weights @ v).transpose(1, 2).flatten(2))
    if module.mlp is not None:
        out = out + module.mlp(module.norm(out))
    return {"token": lambda t: t[:, 0], "avg": lambda t: t.mean(1), "": lambda t: t}[module.pool](out), weights


def make(dtype: torch.dtype = torch.float64, **options: Any) -> AttentionPoolLatent:
    module = AttentionPoolLatent(**{"in_features": 16, "num_heads": 2, **options}).to(dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


OPTIONS = [
    {},
    {"latent_len": 3, "pool_type": ""},
    {"latent_len": 3, "pool_type": "avg", "qkv_bias": False},
    {"qk_norm": True},
    {"pos_embed": "abs", "feat_size": 7},
    {"out_features": 0, "latent_len": 9, "pool_type": ""},  # more latents than channels of a head
    {"embed_dim": 8, "out_features": 5, "norm_layer": nn.LayerNorm},  # timm cannot: embed_dim other than in_features
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_plain(dtype, options, masked):
    module = make(dtype, **options)
    x = torch.randn(3, 7, 16).to(dtype)
    key_mask = None
    if masked:
        key_mask = torch.rand(3, 7) < 0.6
        key_mask[1] = False
    out, weights = module(x, key_mask=key_mask, need_weights=True)
    alone = module(x, key_mask=key_mask)
    assert out.dtype == weights.dtype == alone.dtype == dtype
    eager = plain(module, x, key_mask)
    exact = plain(module.double(), x.double(), key_mask)
    assert_close(out, eager[0], exact[0], dtype, slack=CHAIN * SLACK[dtype])
    assert_close(alone, eager[0], exact[0], dtype, "out alone", CHAIN * SLACK[dtype])
    assert_close(weights, eager[1], exact[1], dtype, "weights", CHAIN * SLACK[dtype])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_masked_tokens_never_matter(options):
    """Neither to results nor to gradients, NaN included."""
    module = make(**options)
    x, key_mask = torch.randn(3, 7, 16).double(), torch.rand(3, 7) < 0.6
    key_mask[1] = False
    found = []
    for filled in (0.0, torch.nan):
        values = torch.where(key_mask[..., None], x, filled).requires_grad_()
        out = module(values, key_mask=key_mask)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        found.append([out, *torch.autograd.grad((out * weight).sum(), [values, *module.parameters()])])
    for a, b, name in zip(*found, ["out", "x", *dict(module.named_parameters())], strict=True):
        torch.testing.assert_close(a, b, rtol=GRADIENT_SLACK[torch.float64] * 1e-16, atol=1e-14, msg=f"{name}")
    assert found[1][1][~key_mask].abs().max() == 0


def test_no_tokens():
    module = make()
    assert module(torch.randn(2, 0, 16).double()).isfinite().all()
    assert torch.equal(make(out_features=0)(torch.randn(2, 0, 16).double()), torch.zeros(2, 16).double())


def test_key_mask_beside_attn_mask():
    module = make(latent_len=3, pool_type="")
    x, pairs, keys = torch.randn(2, 7, 16).double(), torch.rand(2, 2, 3, 7) < 0.7, torch.rand(2, 7) < 0.7
    pairs[..., 0] = keys[..., 0] = True
    both = module(x, attn_mask=pairs & keys[:, None, None])
    torch.testing.assert_close(module(x, attn_mask=pairs, key_mask=keys), both)
    bias = torch.zeros(pairs.shape).double().masked_fill(~pairs, -torch.inf)
    torch.testing.assert_close(module(x, attn_mask=bias, key_mask=keys), both)


def test_replaced_projection_is_called():
    module = make()
    x = torch.randn(2, 7, 16).double()
    module.kv = nn.Sequential(module.kv, nn.Tanh())
    torch.testing.assert_close(module(x), plain(module, x)[0])


def test_factory_arguments():
    module = AttentionPoolLatent(
        16, num_heads=2, pos_embed="abs", feat_size=4, qk_norm=True, device="meta", dtype=torch.half
    )
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.half, "meta")}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_features": 0}, "in_features must be at least 1, got 0"),
        ({"num_heads": 3}, "embed_dim must be a multiple of 3 heads, got 16"),
        ({"q_proj": False, "latent_dim": 8}, "latent_dim must be 16 (embed_dim) without q_proj, got 8"),
        ({"pos_embed": "abs"}, "feat_size must be given with pos_embed='abs', got None"),
        ({"pos_embed": "learn"}, "pos_embed must be one of ('', 'abs'), got 'learn'"),
        ({"pool_type": "max"}, "pool_type must be one of ('token', 'avg', ''), got 'max'"),
        ({"latent_len": 0}, "latent_len must be at least 1, got 0"),
        ({"drop": 2.0}, "drop must be in [0, 1], got 2.0"),
    ],
)
def test_constructor_errors(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(f"AttentionPoolLatent: {message}")):
        AttentionPoolLatent(**{"in_features": 16, "num_heads": 2, **kwargs})


def test_forward_errors():
    module = make(pos_embed="abs", feat_size=7)
    with pytest.raises(ValueError, match=re.escape("x must be (batch, tokens, 16), got (2, 7, 8)")):
        module(torch.randn(2, 7, 8).double())
    with pytest.raises(ValueError, match=re.escape("x must have 7 tokens, got 5")):
        module(torch.randn(2, 5, 16).double())
