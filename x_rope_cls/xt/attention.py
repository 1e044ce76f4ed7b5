"""x-transformers' Attention and Attend with the rotation moved into the attention operator.

Both are subclasses without state of their own: a module becomes one by assigning its ``__class__``, with the same
parameters and state_dict keys.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from x_transformers.attend import Attend, Intermediates
from x_transformers.x_transformers import Attention

from .call import AttentionCall, Masks
from .composite import attention_maps, composite_attention
from .fused import fused_attention
from .options import composite_reasons
from .positions import PositionTables, from_frequencies

_ATTENTION_ARGUMENTS = tuple(inspect.signature(Attention.forward).parameters)[2:]
_ATTEND_ARGUMENTS = tuple(inspect.signature(Attend.forward).parameters)[4:]


def _fused_device_types() -> frozenset[str]:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    found = [device for device, key in keys.items() if has_kernel("x_rope_cls::rope_attention", key)]
    return frozenset([*found, "meta"])


FUSED_DEVICE_TYPES = _fused_device_types()


class RopeAttention(Attention):
    """Attention whose q, k and v reach ``attend`` unrotated, with the tables beside them."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As x_transformers' Attention; ``rotary_pos_emb`` may be :class:`PositionTables` instead of (freqs, scale)."""
        kwargs.update(zip(_ATTENTION_ARGUMENTS, args, strict=False))
        rotary = kwargs.pop("rotary_pos_emb", None)
        context_rotary = kwargs.pop("context_rotary_pos_emb", None)
        if rotary is not None and not isinstance(rotary, PositionTables):
            rotary = from_frequencies(rotary)
        context = None
        if rotary is not None and kwargs.get("context") is not None:
            context = rotary.for_context(context_rotary)

        attn_mask = kwargs.get("attn_mask")
        if attn_mask is not None and attn_mask.dtype == torch.bool and 2 <= attn_mask.dim() <= 4:
            kwargs["attn_mask"] = None
            attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        else:
            attn_mask = None  # not ours to judge: x-transformers refuses it

        added = kwargs.get("additional_key_values")
        front = self.num_mem_kv + (0 if added is None else added[0].shape[-2])
        unrotated_heads = self.heads - self.rotate_num_heads
        kwargs["prev_attn"] = AttentionCall(rotary, context, front, unrotated_heads, attn_mask, kwargs.get("prev_attn"))
        return super().forward(x, **kwargs)


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
        operators = q.device.type in FUSED_DEVICE_TYPES and not torch._C._are_functorch_transforms_active()
        if not operators or self.composite_reasons or self._call_needs_composite(call, kwargs):
            return composite_attention(self, q, k, v, masks, bias, call, kwargs, operators)
        out = fused_attention(self, q, k, v, masks, bias, call)
        if self.flash:
            return out, Intermediates()
        return out, FusedIntermediates(self, q, k, masks, bias, call)

    def _call_needs_composite(self, call: AttentionCall, extra: dict[str, Any]) -> bool:
        if call.prev_attn is not None or extra.get("attn_delta") is not None or extra.get("causal"):
            return True
        return self.l2_distance and not call.preserves_norm


class FusedIntermediates(Intermediates):
    """What a fused layer without ``attn_flash`` returns: attention maps are made when somebody looks at them."""

    def __init__(
        self, attend: RopeAttend, q: Tensor, k: Tensor, masks: Masks, bias: Tensor | None, call: AttentionCall
    ) -> None:
        self._maps: dict[str, Any] = {}
        self._source: Any = (attend, q, k, masks, bias, call)
        super().__init__()
        self._maps.clear()

    def _map(self, name: str) -> Any:
        if name not in self._maps:
            made = attention_maps(*self._source)
            for each in _MAPS:
                self._maps.setdefault(each, getattr(made, each))
        return self._maps[name]


_MAPS = ("qk_similarities", "pre_softmax_attn", "post_softmax_attn")


def _lazy(name: str) -> property:
    def get(self: FusedIntermediates) -> Any:
        return self._map(name)

    def put(self: FusedIntermediates, value: Any) -> None:
        self._maps[name] = value

    return property(get, put)


for _name in _MAPS:
    setattr(FusedIntermediates, _name, _lazy(_name))


def convert_attention(attention: Attention, passes_scores_on: str | None) -> None:
    """Makes an Attention of x-transformers one of ours, in place.

    Args:
        attention: an x_transformers Attention, possibly converted before.
        passes_scores_on: the option under which later layers add this layer's scores to theirs, if any.
    """
    attention.__class__ = RopeAttention
    attention.attend.__class__ = RopeAttend
    attention.attend.composite_reasons = composite_reasons(attention.attend, passes_scores_on=passes_scores_on)
