"""The attention of CLS rows alone: CaiT's class attention, through x-transformers' own ``Attention.forward``.

CLS rows are queries; keys are memory key/values, mems, the CLS rows themselves and all tokens. Nothing is rotated, and
no bias or mask over pairs applies: these are about distances, or about pairs of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from x_transformers.x_transformers import Attention

from .absorbed import absorbed_reasons
from .call import AttentionCall
from .devices import takes_operators
from .few import Keys, absorbed_view, foldable_norm
from .view import View

_LEFT_OUT: dict[str, None] = dict.fromkeys(("max_attend_past", "data_dependent_alibi", "rel_proj_pos_bias"))


class ClassStep:
    """Comes to RopeAttention.forward in the place of rotation tables, beside x = CLS rows.

    Args:
        tokens: (batch, tokens, dim), or three of them for queries, keys and values; not yet normalised.
        norm: the layer's pre-norm; None: the tokens are normalised.
        condition: what the norm is called with beside the tokens.
        shift: the layer's token shift.
        mask: bool (batch, tokens), True: attend.
        mem_mask: bool (batch, mems).
        key_residual: added to the tokens that keys and values are made of.
        polar: what x-transformers passes as ``polar_pos_emb``.
        add_values: the encoder adds values of its first self attention to those of all others.
        value_residual: these values; None in the first.
        values_have_cls: these hold values of CLS too.
        keep_values: intermediates hold the values of all keys, not of CLS alone.
        keep_maps: the attention map is asked for.
        previous: scores of the layer before, as x-transformers passes them.

    Attributes:
        weights: (batch, heads, cls, keys), if asked for; set by the call.
    """

    def __init__(
        self,
        tokens: Tensor,
        *,
        norm: Any,
        condition: dict[str, Any],
        shift: Callable[[Tensor], Tensor] | None,
        mask: Tensor | None,
        mem_mask: Tensor | None,
        key_residual: Tensor | None,
        polar: Any,
        add_values: bool,
        value_residual: Tensor | None,
        values_have_cls: bool,
        keep_values: bool,
        keep_maps: bool,
        previous: Any,
    ) -> None:
        self.tokens, self.norm, self.condition, self.shift = tokens, norm, condition, shift
        self.mask, self.mem_mask = mask, mem_mask
        self.key_residual, self.polar = key_residual, polar
        self.add_values = add_values
        self.value_residual, self.values_have_cls, self.keep_values = value_residual, values_have_cls, keep_values
        self.keep_maps, self.previous = keep_maps, previous
        self.weights: Tensor | None = None

    def attend(self, attention: Any, x: Tensor, kwargs: dict[str, Any]) -> Any:
        """Attention.forward for CLS rows x: (batch, cls, dim) or three of them, normalised."""
        if not takes_operators(x) or step_reasons(
            attention, x.shape[-2], self.add_values, self.polar is not None, self.tokens.dim() == 4
        ):
            return self._ordinary(attention, x, kwargs)
        return self._absorbed(attention, x, kwargs)

    def _absorbed(self, attention: Any, x: Tensor, kwargs: dict[str, Any]) -> Any:
        folded = None
        if not self.condition and self.shift is None and self.key_residual is None:
            folded = foldable_norm(self.norm, self.tokens.shape[-1])
        states = self.tokens if folded is not None else self._normed()
        if self.key_residual is not None:
            states = states + self.key_residual
        keys = Keys(states, folded, self.mask, self.keep_maps)
        view = absorbed_view(attention, keys, **_LEFT_OUT)
        out = Attention.forward(view, x, mem_mask=self.mem_mask, **kwargs)
        self.weights = keys.weights
        return out

    def _ordinary(self, attention: Any, x: Tensor, kwargs: dict[str, Any]) -> Any:
        """Keys and values of all rows formed by the layer's own code; queries and all that follows are of CLS."""
        num_cls = x.shape[-2]
        mem = kwargs.get("mem")
        cls_q, cls_k, cls_v = _views(x)
        token_q, token_k, token_v = _views(self._normed())
        if self.key_residual is not None:
            token_k, token_v = token_k + self.key_residual, token_v + self.key_residual
        front = [] if mem is None else [mem]
        all_k = torch.cat((*front, cls_k, token_k), dim=-2)
        all_v = all_k if cls_k is cls_v else torch.cat((*front, cls_v, token_v), dim=-2)
        at = 0 if mem is None else mem.shape[-2]
        latent = attention.use_latent_kv
        values = _Values(self, attention, (cls_q, token_q), at)

        def to_v(latents: Tensor) -> Tensor:
            values.projected = attention.to_v(latents if latent else all_v)
            return values.projected[:, at : at + num_cls]

        own: dict[str, Any] = {"to_v": to_v, "to_value_residual_mix": _nothing}
        if latent:
            own["to_latent_kv"] = lambda _: attention.to_latent_kv(all_k)
            if attention.to_rotateable_k is not None:
                own["to_rotateable_k"] = lambda _: attention.to_rotateable_k(all_k)
        else:
            own["to_k"] = lambda _: attention.to_k(all_k)
        view = View(attention, qkv_receive_diff_residuals=False, **_LEFT_OUT, **own)
        kwargs["context_mask"] = self._mask_of_all(cls_q, at)
        if self.polar is not None:
            freqs, bias = self.polar
            kwargs["polar_pos_emb"] = (freqs.new_zeros((1, all_k.shape[-2], freqs.shape[-1])), bias)
        added = kwargs.get("additional_key_values")
        keys_in_front = attention.num_mem_kv + (0 if added is None else added[0].shape[-2])
        kwargs["prev_attn"] = AttentionCall(None, None, keys_in_front, 0, None, self.previous, keep_maps=self.keep_maps)
        out, intermediates = Attention.forward(view, cls_q, value_residual=values, **kwargs)
        if self.keep_values:
            intermediates.values = attention.split_v_heads(values.projected)
        if self.keep_maps:
            self.weights = intermediates.post_softmax_attn
        return out, intermediates

    def _normed(self) -> Tensor:
        tokens = self.tokens if self.norm is None else self.norm(self.tokens, **self.condition)
        return tokens if self.shift is None else self.shift(tokens)

    def _mask_of_all(self, cls: Tensor, mems: int) -> Tensor | None:
        """Over mems, CLS and tokens."""
        if self.mask is None and self.mem_mask is None:
            return None
        batch, num_cls = cls.shape[:2]
        tokens = self.tokens.shape[-2]
        parts = ((self.mem_mask, mems), (None, num_cls), (self.mask, tokens))
        shape = (batch, 1)
        return torch.cat(
            [
                torch.ones(shape, dtype=torch.bool, device=cls.device).expand(-1, n) if m is None else m
                for m, n in parts
            ],
            dim=-1,
        )


def step_reasons(
    attention: Any, queries: int | None, add_values: bool, polar: bool, different_residuals: bool
) -> tuple[str, ...]:
    """Why keys and values of the tokens have to be formed for CLS rows; empty: they are not.

    Args:
        attention: the layer.
        queries: number of CLS rows; None: the cost is not judged.
        add_values: see :class:`ClassStep`.
        polar: the encoder has polar_pos_emb.
        different_residuals: queries, keys and values each read their own mix of residuals.
    """
    reasons = absorbed_reasons(attention, queries, memory_apart=True, late_cls=True)
    if add_values:
        reasons += ("add_value_residual mixes the values of two layers",)
    if polar:
        reasons += ("polar_pos_emb changes keys",)
    if different_residuals:
        reasons += ("keys and values are made of different residuals",)
    return reasons


class _Values:
    """Comes to Attention.forward as ``value_residual``: where it goes on with the values of all keys.

    Attributes:
        projected: (batch, mems + cls + tokens, key_heads * value_dim).
    """

    projected: Tensor

    def __init__(self, step: ClassStep, attention: Any, query_inputs: tuple[Tensor, Tensor], mems: int) -> None:
        self.step, self.attention, self.query_inputs, self.mems = step, attention, query_inputs, mems

    def lerp(self, cls_values: Tensor, _: Any) -> Tensor:
        values: Tensor = self.attention.split_v_heads(self.projected)
        step = self.step
        first = step.value_residual
        if first is None:
            return values
        mix_of = self.attention.to_value_residual_mix
        cls_q, token_q = self.query_inputs
        num_cls = cls_q.shape[-2]
        mems, cls, tokens = values.split((self.mems, num_cls, token_q.shape[-2]), dim=-2)
        at = first.shape[-2] - tokens.shape[-2]
        tokens = first[..., at:, :].lerp(tokens, mix_of(token_q))
        if step.values_have_cls:
            cls = first[..., at - num_cls : at, :].lerp(cls, mix_of(cls_q))
            at -= num_cls
        if self.mems and at == self.mems:
            mems = first[..., :at, :].lerp(mems, mix_of(cls_q[:, :1]))
        return torch.cat((mems, cls, tokens), dim=-2)


def _views(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.dim() == 3:
        return x, x, x
    q, k, v = x.unbind()
    return q, k, v


def _nothing(_: Tensor) -> None:
    return None
