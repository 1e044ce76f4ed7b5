"""Self attention over [CLS, tokens] while CLS joins the sequence without a position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from x_transformers import x_transformers as xt
from x_transformers.attend import Intermediates
from x_transformers.x_transformers import Attention

from .lazy import MAPS, LazyIntermediates
from .positions import PositionTables
from .view import View


@dataclass(eq=False)
class JoinedCall:
    """Comes to RopeAttention.forward in the place of rotation tables.

    Attributes:
        tables: of CLS and tokens; None: nothing is rotated.
        polar: (freqs, bias) of the tokens, as x-transformers passes its polar embedding.
        num_cls, num_tokens: rows.
        keep_maps: the attention map of CLS is asked for.
        weights: that map, (batch, heads, cls, keys); set by the call.
    """

    tables: PositionTables | None
    polar: tuple[Tensor, Tensor] | None
    num_cls: int
    num_tokens: int
    keep_maps: bool
    weights: Tensor | None = None

    def view(self, attention: Attention, kwargs: dict[str, Any]) -> Any:
        """The attention without what would see a distance from CLS, or mix it into the sequence."""
        own: dict[str, Any] = {}
        if attention.max_attend_past is not None:
            own["max_attend_past"] = None
            kwargs["attn_mask"] = self._not_past(attention, kwargs)
        rel_pos = kwargs.get("rel_pos")
        if rel_pos is not None and kwargs.get("pos") is None:
            kwargs["rel_pos"] = lambda rows, keys: self._spread(rel_pos(rows - self.num_cls, keys - self.num_cls))
        rel_proj = getattr(attention, "rel_proj_pos_bias", None)
        if rel_proj is not None:
            own["rel_proj_pos_bias"] = lambda x, seq_len_k: self._spread(
                rel_proj(x[:, self.num_cls :], seq_len_k=seq_len_k - self.num_cls)
            )
        if attention.hybrid_module is not None:
            own["hybrid_module"] = self._apart(attention.hybrid_module)
        if attention.orthog_projected_values or attention.orthog_projected_values_per_head:
            own.update(self._projected_apart(attention))
        return View(attention, **own) if own else attention

    def without_bias(self, bias: Tensor) -> Tensor:
        """A bias over pairs, 0 wherever CLS is one of the two."""
        rows, keys = bias.shape[-2:]
        cls_rows = torch.arange(rows, device=bias.device) < self.num_cls
        key = torch.arange(keys, device=bias.device) - (keys - self.num_tokens)
        cls_keys = (key < 0) & (key >= -self.num_cls)
        return torch.where(cls_rows[:, None] | cls_keys, 0, bias)

    def _spread(self, bias: Tensor) -> Tensor:
        """A bias between tokens, (..., tokens, mems + tokens), with rows and columns of 0 for CLS."""
        at = bias.shape[-1] - self.num_tokens
        bias = torch.cat((F.pad(bias[..., :at], (0, self.num_cls)), bias[..., at:]), dim=-1)
        return F.pad(bias, (0, 0, self.num_cls, 0))

    def with_polar(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Longer q and k: polar positions between tokens, the same position for pairs with CLS.

        With m = 1 for tokens, else 0, and P_i the embedding at position i: ``<m_i P_i q_i, m_j P_j k_j>
        + <(1 - m_i) P_0 q_i, P_0 k_j> + <m_i P_0 q_i, (1 - m_j) P_0 k_j>``.
        """
        if self.polar is None:
            return q, k
        freqs, bias = self.polar
        still = freqs.new_zeros((1, k.shape[-2], freqs.shape[-1]))
        freqs = F.pad(freqs, (0, 0, k.shape[-2] - freqs.shape[-2], 0))
        is_token = torch.arange(-k.shape[-2], 0, device=k.device)[:, None] >= -self.num_tokens
        row_is_token = is_token[-q.shape[-2] :]
        turned_q, still_q = xt.apply_polar_pos_emb(q, freqs), xt.apply_polar_pos_emb(q, still)
        turned_k, still_k = xt.apply_polar_pos_emb(k, freqs + bias), xt.apply_polar_pos_emb(k, still + bias)
        parts_q = (
            torch.where(row_is_token, turned_q, 0),
            torch.where(row_is_token, 0, still_q),
            torch.where(row_is_token, still_q, 0),
        )
        parts_k = torch.where(is_token, turned_k, 0), still_k, torch.where(is_token, 0, still_k)
        return torch.cat(parts_q, dim=-1), torch.cat(parts_k, dim=-1)

    def _not_past(self, attention: Attention, kwargs: dict[str, Any]) -> Tensor:
        """attn_mask and the option attn_max_attend_past, which CLS knows nothing of."""
        mem, device = kwargs.get("mem"), attention.to_q.weight.device
        tokens = self.num_tokens + (0 if mem is None else mem.shape[-2])
        rows = torch.arange(tokens - self.num_tokens, tokens, device=device)
        near = rows[:, None] - torch.arange(tokens, device=device) <= attention.max_attend_past
        front, tail = near[:, : tokens - self.num_tokens], near[:, tokens - self.num_tokens :]
        near = torch.cat((F.pad(front, (0, self.num_cls), value=True), tail), dim=-1)
        near = F.pad(near, (attention.num_mem_kv, 0, self.num_cls, 0), value=True)
        given = kwargs.get("attn_mask")
        return near if given is None else given & near

    def _apart(self, module: Any) -> Any:
        """A module that mixes over the sequence: CLS is a sequence of its own."""

        def both(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            masks = {name: None if mask is None else mask[:, self.num_cls :] for name, mask in kwargs.items()}
            cls = _first(module(x[:, : self.num_cls], **dict.fromkeys(kwargs)))
            tokens = _first(module(x[:, self.num_cls :], *args, **masks))
            return torch.cat((cls, tokens), dim=-2)

        return both

    def _projected_apart(self, attention: Any) -> dict[str, Any]:
        """attn_orthog_projected_values, which x-transformers projects on the values of a whole sequence at once."""
        kept: list[Tensor] = []
        flags = ("orthog_projected_values", "orthog_projected_values_per_head")
        whole, per_head = (getattr(attention, flag) for flag in flags)

        def split_v_heads(values: Tensor) -> Tensor:
            kept.append(attention.split_v_heads(values))
            return kept[0]

        def project(out: Tensor, values: Tensor) -> Tensor:
            projected = [xt.orthog_project(out, values)] if whole else []
            if per_head:
                heads = (attention.heads, -1)
                projected.append(xt.orthog_project(out.unflatten(-1, heads), values.unflatten(-1, heads)).flatten(-2))
            return torch.cat(projected, dim=-1)

        def to_out(out: Tensor) -> Tensor:
            values = kept[0].transpose(1, 2).flatten(2).repeat(1, 1, attention.groups)
            rows = slice(None, self.num_cls), slice(self.num_cls, None)
            result: Tensor = attention.to_out(torch.cat([project(out[:, r], values[:, r]) for r in rows], dim=-2))
            return result

        return {**dict.fromkeys(flags, False), "split_v_heads": split_v_heads, "to_out": to_out}


def _first(outputs: Any) -> Tensor:
    while not isinstance(outputs, Tensor):
        outputs = outputs[0]
    return outputs


class TokenValues:
    """Values of the first self attention in which there was no CLS: the keys of CLS keep their own values."""

    def __init__(self, values: Tensor, num_cls: int, num_tokens: int) -> None:
        self.values, self.num_cls, self.num_tokens = values, num_cls, num_tokens

    def lerp(self, values: Tensor, mix: Any) -> Tensor:
        """``first.lerp(values, mix)`` for all but CLS; values: (batch, heads, mems + cls + tokens, dim)."""
        at = values.shape[-2] - self.num_tokens - self.num_cls
        before, cls, tokens = values.split((at, self.num_cls, self.num_tokens), dim=-2)
        own = torch.cat((before, tokens), dim=-2)
        if isinstance(mix, Tensor):
            mix = torch.cat((mix[..., :at, :], mix[..., at + self.num_cls :, :]), dim=-2)
        before, tokens = self.values.lerp(own, mix).split((at, self.num_tokens), dim=-2)
        return torch.cat((before, cls, tokens), dim=-2)


def entry_intermediates(cls: Intermediates, tokens: Intermediates, num_cls: int, num_tokens: int) -> LazyIntermediates:
    """Of the entry layer while joining: tokens attended to tokens, CLS to CLS and tokens.

    Maps are (batch, heads, cls + tokens, keys), with 0 where a token would look at CLS.
    """

    def joined_map(name: str) -> Tensor | None:
        rows = getattr(tokens, name)
        if rows is None:
            return None
        nothing = rows.new_zeros(()).expand(*rows.shape[:-1], num_cls)
        at = rows.shape[-1] - num_tokens
        rows = torch.cat((rows[..., :at], nothing, rows[..., at:]), dim=-1)
        return torch.cat((getattr(cls, name), rows), dim=-2)

    made = LazyIntermediates(lambda: Intermediates(**{name: joined_map(name) for name in MAPS}))
    at = tokens.values.shape[-2] - num_tokens
    made.values = torch.cat(
        (tokens.values[..., :at, :], cls.values[..., -num_cls:, :], tokens.values[..., at:, :]), dim=-2
    )
    made.cached_kv = tokens.cached_kv
    return made
