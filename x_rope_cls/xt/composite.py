"""One attention of x-transformers through its own Attend, for options that the fused operator does not have.

Queries and keys are prepared so that their plain inner products are the scores which ``cls_rope`` asks for; all else is
x-transformers' own code, so every option keeps its meaning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from x_transformers.attend import Attend, Intermediates

from ..functional import apply_rope
from ..reference import rope as plain_rope
from ..tables import Rotary
from .call import AttentionCall, Masks, with_zero_key


def composite_attention(
    attend: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Masks,
    bias: Tensor | None,
    call: AttentionCall,
    extra: dict[str, Any],
    operators: bool,
) -> tuple[Tensor, Intermediates]:
    """Calls Attend.forward of x-transformers on prepared q and k.

    Args:
        attend: x_transformers' Attend.
        q: (batch, heads, queries, head_dim), not rotated.
        k: (batch, key_heads, keys, head_dim), not rotated.
        v: (batch, key_heads, keys, value_dim).
        masks: which pairs attend.
        bias: additive, as x-transformers passes it.
        call: tables and the number of memory keys in front.
        extra: further arguments of Attend.forward.
        operators: the package's own rotation can be used here.

    Returns:
        (batch, heads, queries, value_dim) and what x-transformers returns beside it.
    """
    rope = apply_rope if operators else plain_rope
    if attend.add_zero_kv and call.cls_rope == "mask":
        # Before q and k get longer: a longer key of zeros would not have the scores of a zero key.
        k, v, masks, bias, call = with_zero_key(k, v, masks, bias, call)
        attend = _Variant(attend, add_zero_kv=False)
    rotary, rotary_k = call.rotaries(q, k)
    if rotary is not None and rotary_k is not None:
        if call.cls_rope == "mask" and not (rotary.rotate is None and rotary_k.rotate is None):
            attend, q, k = _masked(attend, q, k, rotary, rotary_k, call, rope)
        else:
            skip = call.cls_rope == "skip"
            q = rope(q, rotary if skip else rotary.without_rotate())
            k = rope(k, rotary_k if skip else rotary_k.without_rotate())
    out, intermediates = Attend.forward(
        attend, q, k, v, mask=masks.merged(), attn_bias=bias, prev_attn=call.prev_attn, **extra
    )
    return out, intermediates


def attention_maps(
    attend: Any, q: Tensor, k: Tensor, masks: Masks, bias: Tensor | None, call: AttentionCall
) -> Intermediates:
    """Scores and weights of a layer that ran fused, differentiable, without dropout."""
    plain = _Variant(attend, flash=False, attn_dropout=nn.Identity())
    nothing = k.new_empty((*k.shape[:-1], 0))
    _, intermediates = composite_attention(plain, q, k, nothing, masks, bias, call, {}, operators=True)
    return intermediates


def _masked(
    attend: Any, q: Tensor, k: Tensor, rotary: Rotary, rotary_k: Rotary, call: AttentionCall, rope: Any
) -> tuple[Any, Tensor, Tensor]:
    """Longer q and k whose inner products are rotated where both tokens have a position, and raw elsewhere.

    With m = 1 for a token with a position, else 0: ``<m_i R_i q_i, m_j R_j k_j> + <(1 - m_i) q_i, k_j>
    + <m_i q_i, (1 - m_j) k_j>``. One of the three terms is there for each pair, so nothing cancels.
    """
    turned = 2 * rotary.cos.shape[-1]
    rotated_q, rotated_k = rope(q, rotary.without_rotate()), rope(k, rotary_k.without_rotate())
    has_q, has_k = _has_position(rotary, q), _has_position(rotary_k, k)
    raw_q, raw_k = q[..., :turned], k[..., :turned]
    long_q = torch.cat(
        (
            torch.where(has_q, rotated_q[..., :turned], 0),
            torch.where(has_q, 0, raw_q),
            torch.where(has_q, raw_q, 0),
            q[..., turned:],
        ),
        dim=-1,
    )
    long_k = torch.cat(
        (torch.where(has_k, rotated_k[..., :turned], 0), raw_k, torch.where(has_k, 0, raw_k), k[..., turned:]), dim=-1
    )
    if attend.l2_distance:
        if not call.preserves_norm:
            raise ValueError("Encoder: rotary_pos_emb must have scale 1 with attn_l2_distance and 'mask', got another")
        attend = _Variant(attend, l2_distance=False)
        squares_q, squares_k = q.square().sum(-1, keepdim=True), k.square().sum(-1, keepdim=True)
        long_q = torch.cat((2 * long_q, -squares_q, -torch.ones_like(squares_q)), dim=-1)
        long_k = torch.cat((long_k, torch.ones_like(squares_k), squares_k), dim=-1)
    if attend.scale is None:
        attend = _Variant(attend, scale=q.shape[-1] ** -0.5)
    return attend, long_q, long_k


def _has_position(rotary: Rotary, t: Tensor) -> Tensor:
    """bool, broadcastable to t: (batch, heads, tokens, head_dim)."""
    if rotary.rotate is None:
        return torch.ones((), dtype=torch.bool, device=t.device)
    return rotary.rotate[..., None] if rotary.rotate.dim() == 1 else rotary.rotate[:, None, :, None]


class _Variant:
    """The same Attend, with its parameters and modules, under other options."""

    flash_attn = Attend.flash_attn

    def __init__(self, attend: Any, **options: Any) -> None:
        for source in (attend.__dict__, attend._parameters, attend._modules, options):
            for name, value in source.items():
                setattr(self, name, value)
