"""One call of TransformerWrapper: what the caller gave, and what stands in the places of the wrapper's modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from x_transformers.x_transformers import AbsolutePositionalEmbedding, ScaledSinusoidalEmbedding

from .options import as_rotate
from .steer import PaddedDeepEmbeds, count_back, fit_to_tokens, pad_rotary, rotary_length

OWNER = "TransformerWrapper"


@dataclass(frozen=True)
class WrapperCall:
    """What one call of the wrapper was given, beside what goes through x-transformers' forward.

    Attributes:
        tokens: how many x has.
        prepended: how many embeddings stand in front of them.
        special: how many tokens without a position stand in front of those in the encoder; late CLS does not.
        mems: how many keys of earlier segments come before all.
        start: (batch,) where left-padded sequences start.
        pos: positions, of x at least.
        external: an absolute embedding of x from outside.
        rotate: bool, which tokens have a position, of x at least.
    """

    tokens: int
    prepended: int
    special: int
    mems: int
    start: Tensor | None
    pos: Tensor | None
    external: Tensor | None
    rotate: Tensor | None

    @property
    def ordinary(self) -> int:
        """How many tokens have a position."""
        return self.tokens + self.prepended

    @property
    def total(self) -> int:
        """How many tokens the encoder gets."""
        return self.ordinary + self.special


def read_call(wrapper: Any, x: Tensor | None, kwargs: dict[str, Any], special: int) -> tuple[Tensor, WrapperCall]:
    """Checks the arguments of forward, and takes out of them what x-transformers' forward shall not see.

    Returns:
        x, empty where only embeddings were given, and the rest.

    Raises:
        TypeError, ValueError: see TransformerWrapper.
    """
    if kwargs.get("cache") is not None:
        raise ValueError(f"{OWNER}: cache must be None, since encoders have none, got a cache")
    x, prepended = _tokens_and_prepended(wrapper, x, kwargs)
    batch, tokens = x.shape
    for name, length in (("mask", tokens), ("prepend_mask", prepended)):
        _check_mask(name, kwargs.get(name), (batch, length))
    added = kwargs.get("sum_embeds")
    if added is not None and added.dim() > 1 and added.shape[-2] not in (1, tokens):
        expected = f"({batch}, {tokens}, {wrapper.emb_dim})"
        raise ValueError(f"{OWNER}: sum_embeds must be of shape {expected}, got {tuple(added.shape)}")

    mems = kwargs.get("mems")
    lengths = (tokens, prepended, special, mems[0].shape[1] if mems else 0)
    start = _read_start(wrapper, x, kwargs, plain=not any(lengths[1:]) and wrapper.cls_token is None)
    pos, external = _positions(wrapper, kwargs.pop("pos", None), (batch, *lengths))
    rotate = kwargs.pop("rotate", None)
    if rotate is not None:
        rotate = as_rotate(OWNER, rotate)
    return x, WrapperCall(*lengths, start, pos, external, rotate)


def _tokens_and_prepended(wrapper: Any, x: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor, int]:
    embeds = kwargs.get("prepend_embeds")
    if embeds is None:
        if x is None:
            raise ValueError(f"{OWNER}: prepend_embeds must be given where x is None, got neither")
        if kwargs.get("prepend_mask") is not None:
            raise ValueError(f"{OWNER}: prepend_mask must be None without prepend_embeds, got a mask")
        _check_ids(x)
        return x, 0
    if x is None:
        x = torch.empty((embeds.shape[0], 0), dtype=torch.long, device=embeds.device)
    _check_ids(x)
    if embeds.dim() != 3 or embeds.shape[0] != x.shape[0] or embeds.shape[2] != wrapper.emb_dim:
        expected = f"({x.shape[0]}, prepended, {wrapper.emb_dim})"
        raise ValueError(f"{OWNER}: prepend_embeds must be of shape {expected}, got {tuple(embeds.shape)}")
    return x, embeds.shape[1]


def _check_ids(x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{OWNER}: x must be of shape (batch, tokens), got {tuple(x.shape)}")


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{OWNER}: {name} must be bool, got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"{OWNER}: {name} must be of shape {shape}, got {tuple(mask.shape)}")


def _read_start(wrapper: Any, x: Tensor, kwargs: dict[str, Any], plain: bool) -> Tensor | None:
    """Takes ``seq_start_pos`` out of the arguments, as a mask over padding if anything but the encoder has to know it.

    x-transformers' encoder counts it from its own first token, does not combine it with a mask, nor do pools see it.
    """
    start: Tensor | None = kwargs.get("seq_start_pos")
    if start is None:
        return None
    if start.shape != x.shape[:1]:
        raise ValueError(f"{OWNER}: seq_start_pos must be of shape {(x.shape[0],)}, got {tuple(start.shape)}")
    mask = kwargs.get("mask")
    if not plain or mask is not None or wrapper.average_pool_embed or wrapper.attn_pool is not None:
        del kwargs["seq_start_pos"]
        left = torch.arange(x.shape[1], device=x.device) >= start[:, None]
        kwargs["mask"] = left if mask is None else mask & left
    return start


def _positions(
    wrapper: Any, pos: Tensor | None, sizes: tuple[int, int, int, int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """``pos`` as positions or as an absolute embedding from outside, whichever it is."""
    batch, tokens, prepended, special, mems = sizes
    if pos is None:
        return None, None
    if pos.is_floating_point() and pos.dim() >= 2 and pos.shape[-2:] == (tokens, wrapper.emb_dim):
        return None, pos
    ordinary = tokens + prepended
    known = (tokens, ordinary, ordinary + special, ordinary + special + mems)
    if pos.dim() not in (1, 2) or pos.shape[-1] not in known or (pos.dim() == 2 and pos.shape[0] not in (1, batch)):
        expected = f"({tokens},) or ({batch}, {tokens})" if pos.dim() < 3 else f"({batch}, {tokens}, {wrapper.emb_dim})"
        raise ValueError(f"{OWNER}: pos must be of shape {expected}, got {tuple(pos.shape)}")
    if pos.dtype == torch.bool or pos.is_complex():
        raise TypeError(f"{OWNER}: pos must be real numbers, got {pos.dtype}")
    if pos.is_floating_point() and isinstance(wrapper.pos_emb, AbsolutePositionalEmbedding):
        raise TypeError(f"{OWNER}: pos must be integers for the absolute position embedding, got {pos.dtype}")
    return (None if pos.shape[-1] == 0 else pos), None


class Layers:
    """Stands in the place of ``attn_layers``: calls the encoder with arguments that fit all tokens."""

    causal = False

    def __init__(self, wrapper: Any, call: WrapperCall) -> None:
        self.encoder, self.call = wrapper.attn_layers, call
        self.late = self.encoder.late_cls is not None
        self.memory, self.cls_tokens = wrapper.num_memory_tokens, wrapper.num_cls_tokens

    def __call__(self, x: Tensor, **kwargs: Any) -> Any:
        """The encoder's output for x, all tokens' embeddings, with what x-transformers' wrapper hands on."""
        call = self.call
        if call.pos is not None:
            kwargs["pos"] = count_back(call.pos, call.total + call.mems)
        rotary = kwargs.get("rotary_pos_emb")
        if rotary is not None and call.mems == 0 and rotary_length(rotary) == call.ordinary:
            kwargs["rotary_pos_emb"] = pad_rotary(rotary, call.special)
        if call.rotate is not None:
            kwargs["rotate"] = _whole_rotate(call.rotate.to(x.device), call)
        fit_to_tokens(kwargs, (call.tokens, call.ordinary), call.total, call.mems)
        deep = kwargs.get("deep_embeds_and_ids")
        if deep is not None and call.total > call.tokens:
            kwargs["deep_embeds_and_ids"] = (PaddedDeepEmbeds(deep[0], call.total - call.tokens), deep[1])
        return self._with_late_cls(x, **kwargs) if self.late else self.encoder(x, **kwargs)

    def _with_late_cls(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Any]:
        """Takes the rows of CLS, behind those of memory, out of x, and puts what the encoder makes of them there."""
        memory, cls_tokens = self.memory, self.cls_tokens
        end = memory + cls_tokens
        if mask is not None:
            mask = torch.cat((mask[:, :memory], mask[:, end:]), dim=1)
        tokens = torch.cat((x[:, :memory], x[:, end:]), dim=1)
        out, intermediates, *weights = self.encoder(tokens, cls_tokens=x[:, memory:end], mask=mask, **kwargs)
        if weights:
            (intermediates.cls_weights,) = weights
        rows = (out[:, cls_tokens:end], out[:, :cls_tokens], out[:, end:])
        return torch.cat(rows, dim=1) if memory else out, intermediates


def _whole_rotate(rotate: Tensor, call: WrapperCall) -> Tensor:
    if rotate.shape[-1] == call.tokens:
        rotate = F.pad(rotate, (call.prepended, 0), value=True)
    if rotate.shape[-1] == call.ordinary:
        rotate = F.pad(rotate, (call.special, 0), value=False)
    return rotate  # of another length: the encoder says what it should be


class AbsolutePositions:
    """Stands in the place of ``pos_emb`` where positions, their start or the embedding itself were given."""

    def __init__(self, pos_emb: Any, call: WrapperCall) -> None:
        self.pos_emb, self.call = pos_emb, call

    def __call__(self, x: Tensor, **kwargs: Any) -> Any:
        """Embeddings that are added to those of the token ids x."""
        call, pos_emb = self.call, self.pos_emb
        if call.external is not None:
            return call.external
        pos = None if call.pos is None else call.pos[..., call.pos.shape[-1] - call.tokens :]
        if isinstance(pos_emb, AbsolutePositionalEmbedding):
            return pos_emb(x, pos=pos, seq_start_pos=call.start)
        if not isinstance(pos_emb, ScaledSinusoidalEmbedding):
            return pos_emb(x)
        # This one takes positions of one dimension only.
        pos = torch.arange(call.tokens, device=x.device) if pos is None else pos
        pos = pos if call.start is None else pos - call.start[:, None]
        return pos_emb(x, pos=pos.flatten()).unflatten(0, pos.shape)


class Prepend:
    """Stands in the place of ``post_emb_norm`` and puts embeddings in front, as x-transformers does right after it."""

    def __init__(self, norm: Any, embeds: Tensor) -> None:
        self.norm, self.embeds = norm, embeds

    def __call__(self, x: Tensor) -> Tensor:
        """Prepended embeddings and the normalised ones of x."""
        return torch.cat((self.embeds, self.norm(x)), dim=-2)


def joined_masks(prepend_mask: Tensor | None, mask: Tensor | None, x: Tensor, prepended: int) -> Tensor | None:
    """The mask over prepended embeddings and tokens; None where neither was given."""
    if prepend_mask is None and mask is None:
        return None
    if prepend_mask is None:
        prepend_mask = torch.ones((x.shape[0], prepended), dtype=torch.bool, device=x.device)
    if mask is None:
        mask = torch.ones(x.shape, dtype=torch.bool, device=x.device)
    return torch.cat((prepend_mask, mask), dim=-1)


class Pool:
    """Stands in the place of ``attn_pool``: the mask that it is given may have entries of memory tokens in front."""

    def __init__(self, attn_pool: Any) -> None:
        self.attn_pool = attn_pool

    def __call__(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Tokens pooled from x."""
        mask = None if mask is None else mask[:, mask.shape[1] - x.shape[1] :]
        pooled: Tensor = self.attn_pool(x, mask=mask, **kwargs)
        return pooled
