"""Attention of few queries through x-transformers' ``Attention.forward`` without keys and values of the tokens.

The layer's own code makes queries, the keys and values of everything else (CLS rows, mems, memory key/values), and all
that follows the attention. In the place of its ``attend`` the token states are pooled with the projections folded in,
and the two are merged by their logsumexp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from x_transformers import x_transformers as xt
from x_transformers.attend import Intermediates
from x_transformers.x_transformers import Attention

from .._layers import TokenNorm
from ..pooling import pool_attention
from .absorbed import absorbed_reasons
from .call import AttentionCall, Masks
from .composite import attention_maps
from .devices import takes_operators
from .fused import softmax_attention, with_sink
from .lazy import LazyIntermediates
from .view import View

# F.normalize divides by max(|x|, 1e-12): this is the square of that bound, for a sum over the channels.
_SMALLEST_SQUARE = 1e-24

# Arguments of Attention.forward that the pooling operator knows nothing of.
_MORE_THAN_POOLING = (
    "attn_mask",
    "rel_pos",
    "attn_bias",
    "polar_pos_emb",
    "prev_attn",
    "cache",
    "value_residual",
    "kv_input_residual",
    "k_delta",
    "v_delta",
    "attn_delta",
    "flash_pack_seq_kwargs",
    "causal",
    "mem",
)

_UNROTATED = AttentionCall(None, None, 0, 0, None, None)


class Keys:
    """The token states that are keys and values.

    Attributes:
        states: (batch, tokens, channels).
        norm: their normalisation, left to the operator; None: states are normalised.
        mask: bool (batch, tokens), True: attend.
        keep_maps: attention maps are asked for.
        weights: (batch, heads, queries, keys), if asked for; set by the call.
    """

    def __init__(self, states: Tensor, norm: TokenNorm | None, mask: Tensor | None, keep_maps: bool = False) -> None:
        self.states, self.norm, self.mask, self.keep_maps = states, norm, mask, keep_maps
        self.weights: Tensor | None = None


def foldable_norm(norm: Any, dim: int) -> TokenNorm | None:
    """The normalisation of an x-transformers module as the operator does it, or None if it cannot."""
    if norm is None or norm._forward_hooks or norm._forward_pre_hooks:
        return None
    kind = type(norm)
    if kind is xt.LayerNorm:
        return TokenNorm("layer", norm.gamma + float(norm.unit_offset), None, norm.ln.eps)
    if kind not in (xt.RMSNorm, xt.ScaleNorm, xt.SimpleRMSNorm):
        return None
    weight = None if kind is xt.SimpleRMSNorm else (norm.g + float(norm.unit_offset)).expand(dim)
    return TokenNorm("rms", weight, None, _SMALLEST_SQUARE / dim)


def attend_from_few(attention: Any, x: Tensor, kwargs: dict[str, Any]) -> Any:
    """Cross attention without rotation, if absorbing the projections pays; else None.

    Args:
        attention: the layer.
        x: (batch, queries, dim).
        kwargs: the other arguments of its forward, with ``context``.
    """
    context = kwargs.get("context")
    if context is None or context.dim() != 3 or x.dim() != 3 or not takes_operators(x):
        return None
    if any([kwargs.get(name) is not None for name in _MORE_THAN_POOLING]):  # noqa: C419 (quicker than a generator)
        return None
    if absorbed_reasons(attention, x.shape[-2], memory_apart=True):
        return None
    mask = kwargs.get("context_mask")
    keys = Keys(context, None, None if mask is None else mask.expand(context.shape[0], -1))
    kwargs = {**kwargs, "context": context[:, :0], "context_mask": None}
    return Attention.forward(absorbed_view(attention, keys), x, **kwargs)


def absorbed_view(attention: Any, keys: Keys, **own: Any) -> Any:
    """The layer with keys and values of everything but the tokens, whose share ``attend`` adds."""
    return View(attention, attend=_Pooling(attention, keys), qkv_receive_diff_residuals=False, **own)


class _Pooling:
    """Stands in the place of Attend: attention over the given keys and values and over the token states."""

    def __init__(self, attention: Any, keys: Keys) -> None:
        self.attention, self.keys = attention, keys

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **_: Any) -> Any:
        attend, keys = self.attention.attend, self.keys
        own_mask = Masks.of(mask, None)
        pooled = pool_attention(
            keys.states,
            q.transpose(1, 2),
            self.attention.to_k.weight,
            self.attention.to_v.weight,
            norm=keys.norm,
            key_mask=keys.mask,
            scale=attend.scale,
            head_order="cyclic",
            form="absorbed",
            return_lse=True,
            need_weights=keys.keep_maps,
        )
        out, token_lse = pooled.out.transpose(1, 2), pooled.lse
        assert token_lse is not None
        lse = token_lse
        if k.shape[-2] > 0 or attend.add_zero_kv:
            own, own_lse = softmax_attention(attend, q, k, v, own_mask, None, _UNROTATED)
            out, lse = _merge(out, lse, own, own_lse)
        if pooled.weights is not None:
            total = torch.logaddexp(lse, attend.head_attn_sink[:, None]) if attend.head_learned_sink else lse
            own_map = _map(q, k, own_mask, total, attend.scale)
            keys.weights = torch.cat((own_map, pooled.weights * (token_lse - total).exp()[..., None]), dim=-1)
        out = with_sink(attend, out, lse)
        return out, Intermediates() if attend.flash else LazyIntermediates(lambda: self._maps(q, k, own_mask))

    def _maps(self, q: Tensor, k: Tensor, own_mask: Masks) -> Intermediates:
        """Scores and weights over all keys, which are formed for it."""
        keys = self.keys
        states = keys.states if keys.norm is None else keys.norm(keys.states)
        token_k = self.attention.split_k_heads(self.attention.to_k(states))
        if k.shape[1] != token_k.shape[1]:
            token_k = token_k.repeat(1, k.shape[1] // token_k.shape[1], 1, 1)
        batch, tokens = states.shape[:2]
        mask = None
        if keys.mask is not None or own_mask.keys is not None:
            every = torch.ones((batch, 1), dtype=torch.bool, device=q.device)
            own = every.expand(-1, k.shape[-2]) if own_mask.keys is None else own_mask.keys
            mask = torch.cat((own.expand(batch, -1), every.expand(-1, tokens) if keys.mask is None else keys.mask), -1)
        k = torch.cat((k, token_k), dim=-2)
        return attention_maps(self.attention.attend, q, k, Masks(mask, None), None, _UNROTATED)


def _map(q: Tensor, k: Tensor, mask: Masks, lse: Tensor, scale: float) -> Tensor:
    """Weights of q over k, (batch, heads, queries, keys), from the logsumexp over all keys."""
    k = k.repeat(1, q.shape[1] // k.shape[1], 1, 1)
    scores = (q @ k.mT).to(lse.dtype) * scale
    if mask.keys is not None:
        scores = scores.masked_fill(~mask.keys[:, None, None], -torch.inf)
    return (scores - lse[..., None]).exp().to(q.dtype)


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each; the other set always has a key."""
    share = torch.sigmoid(lse - other_lse)[..., None].to(out.dtype)
    return torch.lerp(other, out, share), torch.logaddexp(lse, other_lse)
