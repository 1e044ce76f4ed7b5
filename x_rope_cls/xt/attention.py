"""x-transformers' Attention and Attend with the rotation moved into the attention operator.

Both are subclasses without state of their own: a module becomes one by assigning its ``__class__``, with the same
parameters and state_dict keys.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from x_transformers.attend import Attend, Intermediates
from x_transformers.x_transformers import Attention

from .call import AttentionCall, Masks
from .class_step import ClassStep
from .composite import attention_maps, composite_attention
from .devices import takes_operators
from .few import attend_from_few
from .fused import fused_attention
from .joined import JoinedCall
from .lazy import LazyIntermediates
from .options import composite_reasons
from .positions import PositionTables, from_frequencies

_ATTENTION_ARGUMENTS = tuple(inspect.signature(Attention.forward).parameters)[2:]
_ATTEND_ARGUMENTS = tuple(inspect.signature(Attend.forward).parameters)[4:]


class RopeAttention(Attention):
    """Attention whose q, k and v reach ``attend`` unrotated, with the tables beside them."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As x_transformers' Attention.

        ``rotary_pos_emb`` may be :class:`PositionTables` instead of (freqs, scale); or what late CLS needs, a
        :class:`ClassStep` or a :class:`JoinedCall`.
        """
        kwargs.update(zip(_ATTENTION_ARGUMENTS, args, strict=False))
        rotary = kwargs.pop("rotary_pos_emb", None)
        if isinstance(rotary, ClassStep):
            return rotary.attend(self, x, kwargs)
        context_rotary = kwargs.pop("context_rotary_pos_emb", None)
        joined = rotary if isinstance(rotary, JoinedCall) else None
        attention: Any = self
        if joined is not None:
            attention, rotary = joined.view(self, kwargs), joined.tables
        if rotary is not None and not isinstance(rotary, PositionTables):
            rotary = from_frequencies(rotary)
        context = None
        if rotary is not None and kwargs.get("context") is not None:
            context = rotary.for_context(context_rotary)
        if rotary is None and joined is None:
            few = attend_from_few(self, x, kwargs)
            if few is not None:
                return few

        attn_mask = kwargs.get("attn_mask")
        if attn_mask is not None and attn_mask.dtype == torch.bool and 2 <= attn_mask.dim() <= 4:
            kwargs["attn_mask"] = None
            attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        else:
            attn_mask = None  # not ours to judge: x-transformers refuses it

        added = kwargs.get("additional_key_values")
        front = self.num_mem_kv + (0 if added is None else added[0].shape[-2])
        unrotated_heads = self.heads - self.rotate_num_heads
        previous = kwargs.get("prev_attn")
        kwargs["prev_attn"] = AttentionCall(rotary, context, front, unrotated_heads, attn_mask, previous, joined)
        return Attention.forward(attention, x, **kwargs)


class RopeAttend(Attend):
    """Attend that rotates: in the fused operator where the options allow it, else through x-transformers' own code."""

    composite_reasons: tuple[str, ...] = ()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Intermediates]:
        """As x_transformers' Attend; an :class:`AttentionCall` as ``prev_attn`` brings what the rotation needs.

        Under torch.func transforms, which the operators do not go through, everything is plain PyTorch.
        """
        kwargs.update(zip(_ATTEND_ARGUMENTS, args, strict=False))
        call = kwargs.pop("prev_attn", None)
        if not isinstance(call, AttentionCall):
            plain: tuple[Tensor, Intermediates] = super().forward(q, k, v, prev_attn=call, **kwargs)
            return plain
        masks = Masks.of(kwargs.pop("mask", None), call.attn_mask)
        bias = kwargs.pop("attn_bias", None)
        joined = call.joined
        if joined is not None:
            q, k = joined.with_polar(q, k)
            bias = None if bias is None else joined.without_bias(bias)
        operators = takes_operators(q)
        if not operators or self.composite_reasons or self._call_needs_composite(call, kwargs):
            result = composite_attention(self, q, k, v, masks, bias, call, kwargs, operators)
            if call.keep_maps and result[1].post_softmax_attn is None:
                result = result[0], LazyIntermediates(lambda: attention_maps(self, q, k, masks, bias, call))
        elif self.flash and not call.keep_maps:
            result = fused_attention(self, q, k, v, masks, bias, call), Intermediates()
        else:
            out = fused_attention(self, q, k, v, masks, bias, call)
            result = out, LazyIntermediates(lambda: attention_maps(self, q, k, masks, bias, call))
        if joined is not None and joined.keep_maps:
            joined.weights = self._cls_map(q[..., : joined.num_cls, :], k, masks, call, result[1])
        return result

    def _cls_map(self, q: Tensor, k: Tensor, masks: Masks, call: AttentionCall, intermediates: Intermediates) -> Tensor:
        """The attention map of CLS rows, which are rotated against nothing."""
        whole: Tensor | None = None
        if not isinstance(intermediates, LazyIntermediates):
            whole = intermediates.post_softmax_attn
        if whole is not None:
            return whole[..., : q.shape[-2], :]
        raw = replace(call, tables=None, context=None, joined=None)
        made: Tensor = attention_maps(self, q, k, Masks(masks.keys, None), None, raw).post_softmax_attn
        return made

    def _call_needs_composite(self, call: AttentionCall, extra: dict[str, Any]) -> bool:
        if call.prev_attn is not None or extra.get("attn_delta") is not None or extra.get("causal"):
            return True
        return self.l2_distance and not call.preserves_norm


def convert_attention(attention: Attention, passes_scores_on: str | None) -> None:
    """Makes an Attention of x-transformers one of ours, in place.

    Args:
        attention: an x_transformers Attention, possibly converted before.
        passes_scores_on: the option under which later layers add this layer's scores to theirs, if any.
    """
    attention.__class__ = RopeAttention
    attention.attend.__class__ = RopeAttend
    attention.attend.composite_reasons = composite_reasons(attention.attend, passes_scores_on=passes_scores_on)
