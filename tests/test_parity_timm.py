"""cls_rope="skip" is what timm's rotary attention does: the same weights, the same outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from x_rope_cls import AxialRotaryEmbedding, LearnedRotaryEmbedding, Rotary, apply_rope, rope_attention


def run_skip(attention: nn.Module, x: Tensor, rotary: Rotary, attn_mask: Tensor | None = None) -> Tensor:
    """timm's attention module with its core replaced by rope_attention."""
    B, N, _ = x.shape
    gate = attention.gate(x).sigmoid() if attention.gate is not None else None
    if attention.qkv is not None:
        bias = attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        qkv = nn.functional.linear(x, attention.qkv.weight, bias)
        q, k, v = qkv.view(B, N, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    else:
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
    q, k = attention.q_norm(q), attention.k_norm(k)
    out = rope_attention(q, k, v, rotary, cls_rope="skip", attn_mask=attn_mask).transpose(1, 2).flatten(2)
    out = attention.norm(out)
    return attention.proj(out if gate is None else out * gate)


def compare(attention: nn.Module, rope: Tensor, rotary: Rotary, dim: int, attn_mask: Tensor | None = None) -> None:
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.3)
    N = rotary.cos.shape[-2]
    x = torch.randn(2, N, dim, requires_grad=True)
    weight = torch.randn(2, N, dim)
    expected = attention(x, rope=rope, attn_mask=attn_mask)
    out = run_skip(attention, x, rotary, attn_mask)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    inputs = (x, *attention.parameters())
    grads = [torch.autograd.grad((o * weight).sum(), inputs) for o in (out, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * max(1.0, theirs.abs().max().item()))
    without = rope_attention_would_differ(attention, x, rotary)
    assert (without - expected).abs().max() > 1e-2


def rope_attention_would_differ(attention: nn.Module, x: Tensor, rotary: Rotary) -> Tensor:
    """The comparison bites: with the special tokens rotated at some position the outputs are others."""
    cos, sin = (t.roll(1, dims=-2) for t in (rotary.cos, rotary.sin))
    return run_skip(attention, x, Rotary(cos, sin, rotary.rotate, rotary.interleaved))


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("half", [False, True])
def test_eva_attention(backend, timm, prefix, fused, half):
    from timm.layers import RotaryEmbeddingCat
    from timm.models.eva import EvaAttention

    attention = EvaAttention(
        32,
        num_heads=2,
        qkv_fused=fused,
        num_prefix_tokens=prefix,
        scale_norm=True,
        norm_layer=nn.LayerNorm,
        rotate_half=half,
    )
    theirs = RotaryEmbeddingCat(16, in_pixels=False, feat_shape=[4, 6], ref_feat_shape=[3, 3], rotate_half=half)
    ours = AxialRotaryEmbedding(16, reference_grid=(3, 3), num_prefix_tokens=prefix, interleaved=not half)
    compare(attention, theirs.get_embed(), ours((4, 6)), 32)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_rope(backend, timm, kv_heads, masked):
    from timm.layers import AttentionRope, RotaryEmbeddingCat

    attention = AttentionRope(
        64,
        num_heads=4,
        qkv_fused=False,
        num_kv_heads=kv_heads,
        num_prefix_tokens=2,
        qk_norm=True,
        norm_layer=nn.LayerNorm,
    )
    theirs = RotaryEmbeddingCat(16, in_pixels=False, feat_shape=[5, 5])
    mask = torch.rand(2, 1, 27, 27) < 0.8 if masked else None
    compare(attention, theirs.get_embed(), AxialRotaryEmbedding.eva(16, num_prefix_tokens=2)((5, 5)), 64, mask)


def test_gated_attention_rope_with_dinov3_tables(backend, timm):
    from timm.layers import AttentionRope
    from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3

    attention = AttentionRope(32, num_heads=2, num_prefix_tokens=5, rotate_half=True, gated=True)
    theirs = RotaryEmbeddingDinoV3(16, feat_shape=[4, 7])
    ours = AxialRotaryEmbedding.dinov3(16, num_prefix_tokens=5)
    compare(attention, theirs.get_embed(), ours((4, 7)), 32)


@pytest.mark.parametrize("grid", [(4, 4), (3, 7)])
def test_dinov3_tables(timm, grid):
    from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3

    sin, cos = RotaryEmbeddingDinoV3(16).get_embed(list(grid)).chunk(2, -1)
    rotary = AxialRotaryEmbedding.dinov3(16, num_prefix_tokens=0)(grid)
    torch.testing.assert_close(rotary.cos, cos[:, :8])
    torch.testing.assert_close(rotary.sin, sin[:, :8])


def test_mixed_frequencies(timm):
    """rope-vit's mixed mode: their frequencies in ours give their tables, and the same gradient."""
    from timm.layers.pos_embed_sincos import RotaryEmbeddingMixed, apply_rot_embed_cat, get_mixed_grid

    theirs = RotaryEmbeddingMixed(64, depth=1, num_heads=4, grid_indexing="xy")
    ours = LearnedRotaryEmbedding(16, num_axes=2, heads=4, base=10.0)
    with torch.no_grad():
        ours.freqs.copy_(theirs.freqs[:, 0].transpose(0, 1))
    positions = torch.stack(get_mixed_grid([3, 5], grid_indexing="xy"), dim=-1)
    x = torch.randn(2, 4, 15, 16)
    weight = torch.randn_like(x)
    expected = apply_rot_embed_cat(x, theirs.get_embed([3, 5])[0])
    out = apply_rope(x, ours(positions))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    (their_grad,) = torch.autograd.grad((expected * weight).sum(), theirs.freqs)
    (our_grad,) = torch.autograd.grad((out * weight).sum(), ours.freqs)
    torch.testing.assert_close(our_grad, their_grad[:, 0].transpose(0, 1), rtol=1e-4, atol=1e-4)
