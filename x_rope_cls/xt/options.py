"""What the options of x-transformers mean for the fused operator: which layers it serves, and why not the others."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers.attend import one_hot_straight_through, sparse_topk_attn

CLS_ROPES = ("rotate", "skip", "mask")

_MODULE_REASONS = {
    "pre_softmax_talking_heads": "attn_pre_talking_heads mixes heads before the softmax",
    "post_softmax_talking_heads": "attn_post_talking_heads mixes heads after the softmax",
    "pre_scale_post_talking_heads": "attn_pre_scale_post_talking_heads scales weights after the softmax",
    "cope": "attn_use_cope adds positions that depend on the scores",
}
_FLAG_REASONS = {
    "softclamp_logits": "attn_softclamp_logits clamps the scores",
    "cog_signed": "attn_cog_signed puts the signs of the scores back after the softmax",
    "selective": "attn_selective subtracts scores of other queries",
    "inverted_attention": "cross_attn_inverted_attention normalises over queries",
    "flash_pack_seq": "attn_flash_pack_seq hands packed sequences to flash-attn",
    "causal": "causal attention",
}


def as_rotate(owner: str, rotate: Any) -> Tensor:
    """A caller's ``rotate`` as a bool tensor (tokens,) or (batch, tokens)."""
    mask = rotate if isinstance(rotate, Tensor) else torch.as_tensor(rotate)
    if mask.dtype != torch.bool:
        raise TypeError(f"{owner}: rotate must be bool, got {mask.dtype}")
    if mask.dim() not in (1, 2):
        raise ValueError(f"{owner}: rotate must be of shape (tokens,) or (batch, tokens), got {tuple(mask.shape)}")
    return mask


def composite_reasons(attend: nn.Module, *, passes_scores_on: str | None = None) -> tuple[str, ...]:
    """Why the fused operator cannot stand in for this Attend; empty if it can.

    Args:
        attend: an x_transformers Attend.
        passes_scores_on: the option, if any, under which later layers add this layer's scores to theirs.
    """
    reasons = [text for name, text in _MODULE_REASONS.items() if getattr(attend, name, None) is not None]
    reasons += [text for name, text in _FLAG_REASONS.items() if getattr(attend, name, False)]
    softmax = _replaced_softmax(attend.attn_fn)
    if softmax is not None and not getattr(attend, "inverted_attention", False):
        reasons.append(softmax)
    if getattr(attend, "l2_distance", False) and getattr(attend, "head_learned_sink", False):
        reasons.append("attn_head_learned_sink with attn_l2_distance")
    if passes_scores_on is not None:
        reasons.append(f"{passes_scores_on} adds the scores of earlier layers")
    return tuple(reasons)


def _replaced_softmax(attn_fn: Any) -> str | None:
    """What stands in the place of the softmax over keys, or None if nothing does."""
    function = attn_fn.func if isinstance(attn_fn, partial) else attn_fn
    if function is F.softmax and isinstance(attn_fn, partial) and attn_fn.keywords.get("dim") == -1:
        return None
    names = {
        F.sigmoid: "attn_sigmoid replaces the softmax",
        one_hot_straight_through: "attn_hard replaces the softmax",
        sparse_topk_attn: "attn_sparse_topk keeps the largest scores only",
        F.gumbel_softmax: "attn_gumbel_softmax replaces the softmax",
    }
    return names.get(function, "attn_custom_attn_fn replaces the softmax")
