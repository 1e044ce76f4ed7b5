"""One attention of x-transformers through the fused operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import rope_attention
from .call import AttentionCall, Masks, with_zero_key


def fused_attention(
    attend: Any, q: Tensor, k: Tensor, v: Tensor, masks: Masks, bias: Tensor | None, call: AttentionCall
) -> Tensor:
    """Attention of an Attend whose weights are a plain softmax.

    Args:
        attend: x_transformers' Attend, for its options.
        q: (batch, heads, queries, head_dim), not rotated.
        k: (batch, key_heads, keys, head_dim), not rotated; query head h reads key head ``h % key_heads``.
        v: (batch, key_heads, keys, value_dim).
        masks: which pairs attend.
        bias: additive, broadcastable to (batch, heads, queries, keys).
        call: tables and the number of memory keys in front.

    Returns:
        (batch, heads, queries, value_dim).
    """
    return with_sink(attend, *softmax_attention(attend, q, k, v, masks, bias, call))


def with_sink(attend: Any, out: Tensor, lse: Tensor) -> Tensor:
    """The option attn_head_learned_sink: a logit beside the keys takes its share, exp(sink) of exp(lse) + exp(sink)."""
    if not attend.head_learned_sink:
        return out
    share = torch.sigmoid(lse - attend.head_attn_sink[:, None])
    shared: Tensor = out * share[..., None].to(out.dtype)
    return shared


def softmax_attention(
    attend: Any, q: Tensor, k: Tensor, v: Tensor, masks: Masks, bias: Tensor | None, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """As :func:`fused_attention` but for the sink; returns the logsumexp (batch, heads, queries) too."""
    heads, key_heads = q.shape[1], k.shape[1]
    groups = heads // key_heads if key_heads else 1
    if attend.add_zero_kv:
        k, v, masks, bias, call = with_zero_key(k, v, masks, bias, call)
    rotary, rotary_k = call.rotaries(q, k)
    scale = attend.scale if attend.scale is not None else q.shape[-1] ** -0.5

    permute = groups > 1 and key_heads > 1
    if permute:
        q = _group_heads(q, key_heads)
        bias = _group_heads_of_mask(bias, heads, key_heads)
        masks = masks.with_pairs(_group_heads_of_mask(masks.pairs, heads, key_heads))
    if attend.l2_distance:
        bias = _add(bias, _key_norms(k, groups, scale))
        scale = 2 * scale
    out, lse = rope_attention(
        q,
        k,
        v,
        rotary,
        rotary_k=rotary_k,
        cls_rope=call.cls_rope,
        attn_mask=masks.pairs if bias is None else masks.merge_into(bias),
        key_mask=masks.keys_for(k),
        dropout_p=dropout_probability(attend),
        scale=scale,
        return_lse=True,
    )
    if not permute:
        return out, lse
    return _ungroup_heads(out, key_heads), _ungroup_heads(lse[..., None], key_heads)[..., 0]


def dropout_probability(attend: Any) -> float:
    """With which probability this Attend drops a weight now."""
    if attend.flash:
        return attend.dropout if attend.training else 0.0
    return attend.attn_dropout.p if attend.attn_dropout.training else 0.0


def _key_norms(k: Tensor, groups: int, scale: float) -> Tensor:
    """-scale * |k|^2 as a bias (batch, heads or 1, 1, keys): what -scale * |q - k|^2 has beside 2 * scale * <q, k>.

    The third term, -scale * |q|^2, is one number a row, which a softmax does not see. Rotations keep norms.
    """
    norms = k.to(torch.promote_types(k.dtype, torch.float32)).square().sum(dim=-1)[:, :, None] * -scale
    return norms.repeat_interleave(groups, dim=1) if groups > 1 and k.shape[1] > 1 else norms


def _add(bias: Tensor | None, more: Tensor) -> Tensor:
    return more if bias is None else bias + more


def _group_heads(t: Tensor, key_heads: int) -> Tensor:
    """From x-transformers' order of heads to PyTorch's, in which heads that share a key head are neighbours."""
    batch, heads, tokens, dim = t.shape
    return t.view(batch, heads // key_heads, key_heads, tokens, dim).transpose(1, 2).reshape(t.shape)


def _ungroup_heads(t: Tensor, key_heads: int) -> Tensor:
    """The way back."""
    batch, heads, tokens, dim = t.shape
    return t.view(batch, key_heads, heads // key_heads, tokens, dim).transpose(1, 2).reshape(t.shape)


def _group_heads_of_mask(mask: Tensor | None, heads: int, key_heads: int) -> Tensor | None:
    if mask is None or mask.dim() < 3 or mask.shape[-3] == 1:
        return mask
    *batch, _, queries, keys = mask.shape
    split = mask.view(*batch, heads // key_heads, key_heads, queries, keys)
    return split.transpose(-4, -3).reshape(mask.shape)
