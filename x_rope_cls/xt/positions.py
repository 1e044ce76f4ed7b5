"""From the frequencies that x-transformers computes to the rotation tables of every attention layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import ClsRope
from ..tables import Rotary


@dataclass(eq=False)
class PositionTables:
    """Rotation tables of one token sequence, made once per forward and shared by all layers.

    Takes the place of the (freqs, scale) pair that x-transformers passes from layer to layer.

    Attributes:
        queries: tables of the tokens as queries; ``rotate`` as in :class:`Rotary`.
        keys: the same tokens as keys; another object only where xpos scales queries and keys apart.
        cls_rope: what happens to tokens without a position.
        preserves_norm: the tables turn vectors without stretching them.
        memory_turns: memory key/values are keys like those with a position, at which the tables are the identity. Only
            "mask" sees a difference.
    """

    queries: Rotary
    keys: Rotary
    cls_rope: ClsRope
    preserves_norm: bool = True
    memory_turns: bool = False
    _made: list[tuple[Rotary, int, int, Rotary]] = field(default_factory=list, repr=False)
    _contexts: list[tuple[Any, PositionTables]] = field(default_factory=list, repr=False)

    def for_queries(self, tokens: int, heads: int, unrotated_heads: int) -> Rotary:
        """Tables of the last ``tokens`` tokens; the first ``unrotated_heads`` of ``heads`` heads are not turned."""
        return self._derive(self.queries, tokens, 0, heads, unrotated_heads)

    def for_keys(self, tokens: int, front: int, heads: int, unrotated_heads: int) -> Rotary:
        """Like :meth:`for_queries`, with ``front`` keys in front that have no position (memory key/values)."""
        return self._derive(self.keys, tokens, front, heads, unrotated_heads)

    def for_context(self, frequencies: Any) -> PositionTables:
        """Tables of the keys of cross attention, all of which have a position.

        Args:
            frequencies: what x-transformers passes as ``context_rotary_pos_emb``.

        Raises:
            ValueError: frequencies is None.
        """
        if frequencies is None:
            raise ValueError("Attention: context_rotary_pos_emb must be given with rotary_pos_emb, got None")
        for source, made in self._contexts:
            if source is frequencies:
                return made
        made = from_frequencies(frequencies, cls_rope=self.cls_rope)
        made.memory_turns = self.memory_turns
        self._contexts.append((frequencies, made))
        return made

    def with_cls(self, num_cls: int, num_tokens: int) -> PositionTables:
        """Tables of a sequence in which CLS tokens stand in front of the last ``num_tokens`` and have no position.

        CLS is as in "mask" whatever the mode. Tokens stay as they were: "rotate" and "skip" are "mask" in which every
        token has a position, for "skip" with the identity as the tables of those that have none.
        """

        def insert(rotary: Rotary) -> Rotary:
            at = rotary.cos.shape[-2] - num_tokens
            rotate = rotary.rotate
            if self.cls_rope == "skip":
                rotary = _still(rotary)
            if rotate is None or self.cls_rope != "mask":
                rotate = torch.ones(rotary.cos.shape[-2], dtype=torch.bool, device=rotary.cos.device)
            front, last = _first(rotary, at), _last(rotary, num_tokens)
            cls = _pad_front(last, num_cls, False)
            return Rotary(
                torch.cat((front.cos, cls.cos), dim=-2),
                torch.cat((front.sin, cls.sin), dim=-2),
                torch.cat((rotate[..., :at], F.pad(rotate[..., at:], (num_cls, 0), value=False)), dim=-1),
                rotary.interleaved,
            )

        queries = insert(self.queries)
        keys = queries if self.keys is self.queries else insert(self.keys)
        turns = self.memory_turns or self.cls_rope != "mask"
        return PositionTables(queries, keys, "mask", self.preserves_norm, turns)

    def _derive(self, base: Rotary, tokens: int, front: int, heads: int, unrotated_heads: int) -> Rotary:
        length = base.cos.shape[-2]
        if tokens == length and front == 0 and unrotated_heads == 0:
            return base
        for made_base, made_front, made_unrotated, made in self._made:
            same = made_base is base and made_front == front and made_unrotated == unrotated_heads
            if same and made.cos.shape[-2] == tokens + front:
                return made
        if tokens > length:
            raise ValueError(f"Encoder: rotary_pos_emb must have a row for each of {tokens} tokens, got {length}")
        derived = _pad_front(_last(base, tokens), front, self.memory_turns)
        if unrotated_heads:
            derived = _leave_heads(derived, heads, unrotated_heads)
        self._made.append((base, front, unrotated_heads, derived))
        return derived


def from_frequencies(
    frequencies: Any, tokens: int | None = None, rotate: Tensor | None = None, cls_rope: ClsRope = "rotate"
) -> PositionTables:
    """Tables from what x-transformers passes as ``rotary_pos_emb``.

    Args:
        frequencies: (freqs, scale): freqs (1 or batch, tokens, rotary_dim), each angle twice as x-transformers lays
            them out; scale: 1.0, None or, with xpos, a tensor like freqs, by which queries are multiplied and keys
            divided. Or a :class:`Rotary`.
        tokens: how many of the last rows to keep, as x-transformers does; None: all.
        rotate: bool (tokens,) or (batch, tokens); None: that of a Rotary, else all tokens have a position.
        cls_rope: what happens to tokens without a position.

    Returns:
        Tables (tokens, rotary_dim / 2), or (batch, 1, tokens, rotary_dim / 2), in float32 at least.

    Raises:
        ValueError: there are fewer rows than tokens.
    """
    if isinstance(frequencies, Rotary):
        rotate = frequencies.rotate if rotate is None else rotate
        queries = Rotary(frequencies.cos, frequencies.sin, None, frequencies.interleaved)
        return _tables(queries, None, tokens, rotate, cls_rope)

    freqs, scale = frequencies
    angles = _per_pair(freqs)
    cos, sin = angles.cos(), angles.sin()
    if scale is None or (not isinstance(scale, Tensor) and scale == 1):
        return _tables(Rotary(cos, sin), None, tokens, rotate, cls_rope)
    if isinstance(scale, Tensor) and scale.dim() > 0:
        scale = _per_pair(scale)
    queries, keys = Rotary(cos * scale, sin * scale), Rotary(cos / scale, sin / scale)
    return _tables(queries, keys, tokens, rotate, cls_rope)


def check_frequencies(frequencies: Any) -> None:
    """Checks a ``rotary_pos_emb`` that the caller passed.

    Raises:
        TypeError: it is neither a (freqs, scale) pair nor a Rotary.
        ValueError: its shape is wrong, or the two channels of a pair have different angles.
    """
    if isinstance(frequencies, (Rotary, PositionTables)):
        return
    if not isinstance(frequencies, (tuple, list)) or len(frequencies) != 2 or not isinstance(frequencies[0], Tensor):
        got = type(frequencies).__name__
        raise TypeError(f"Encoder: rotary_pos_emb must be a (freqs, scale) pair or a Rotary, got {got}")
    freqs = frequencies[0]
    if freqs.dim() not in (3, 4) or freqs.shape[-1] % 2:
        shape = tuple(freqs.shape)
        raise ValueError(f"Encoder: freqs of rotary_pos_emb must be (1 or batch, tokens, even rotary_dim), got {shape}")
    if torch.compiler.is_compiling() or freqs.device.type != "cpu" or type(freqs) is not Tensor:
        return
    if not torch.equal(freqs[..., 0::2], freqs[..., 1::2]):
        raise ValueError(
            "Encoder: freqs of rotary_pos_emb must hold each angle twice, in channels 2i and 2i + 1, got other angles"
        )


def _per_pair(per_channel: Tensor) -> Tensor:
    """(batch, tokens, rotary_dim) to (tokens, pairs) or (batch, 1, tokens, pairs), in float32 at least."""
    per_pair = per_channel[..., 0::2]
    if per_pair.dtype.itemsize < 4:
        per_pair = per_pair.float()
    if per_pair.dim() == 3:
        return per_pair[0] if per_pair.shape[0] == 1 else per_pair[:, None]
    return per_pair


def _tables(
    queries: Rotary, keys: Rotary | None, tokens: int | None, rotate: Tensor | None, cls_rope: ClsRope
) -> PositionTables:
    def finish(rotary: Rotary) -> Rotary:
        length = rotary.cos.shape[-2]
        if tokens is not None and tokens > length:
            raise ValueError(f"Encoder: rotary_pos_emb must have a row for each of {tokens} tokens, got {length}")
        last = rotary if tokens is None else _last(rotary, tokens)
        return Rotary(last.cos, last.sin, rotate, last.interleaved)

    done = finish(queries)
    return PositionTables(done, done if keys is None else finish(keys), cls_rope, preserves_norm=keys is None)


def _last(rotary: Rotary, tokens: int) -> Rotary:
    start = rotary.cos.shape[-2] - tokens
    if start == 0:
        return rotary
    rotate = None if rotary.rotate is None else rotary.rotate[..., start:]
    return Rotary(rotary.cos[..., start:, :], rotary.sin[..., start:, :], rotate, rotary.interleaved)


def _first(rotary: Rotary, tokens: int) -> Rotary:
    rotate = None if rotary.rotate is None else rotary.rotate[..., :tokens]
    return Rotary(rotary.cos[..., :tokens, :], rotary.sin[..., :tokens, :], rotate, rotary.interleaved)


def _still(rotary: Rotary) -> Rotary:
    """The identity as the tables of tokens without a position."""
    if rotary.rotate is None:
        return rotary
    turns = rotary.rotate[..., None] if rotary.rotate.dim() == 1 else rotary.rotate[:, None, :, None]
    cos, sin = torch.where(turns, rotary.cos, 1.0), torch.where(turns, rotary.sin, 0.0)
    return Rotary(cos, sin, rotary.rotate, rotary.interleaved)


def _pad_front(rotary: Rotary, front: int, turns: bool) -> Rotary:
    """Identity rows in front, not turned where every row is used; unless ``turns``, they are without a position."""
    if front == 0:
        return rotary
    rotate = rotary.rotate
    if rotate is None:
        rotate = torch.ones(rotary.cos.shape[-2], dtype=torch.bool, device=rotary.cos.device)
    return Rotary(
        F.pad(rotary.cos, (0, 0, front, 0), value=1.0),
        F.pad(rotary.sin, (0, 0, front, 0)),
        F.pad(rotate, (front, 0), value=turns),
        rotary.interleaved,
    )


def _leave_heads(rotary: Rotary, heads: int, unrotated: int) -> Rotary:
    """Tables per head, the identity for the first ``unrotated`` heads."""

    def per_head(table: Tensor, identity: float) -> Tensor:
        table = table[None] if table.dim() == 2 else table
        shape = table.shape[:-3]
        still = table.new_full((), identity).expand(*shape, unrotated, *table.shape[-2:])
        return torch.cat((still, table.expand(*shape, heads - unrotated, *table.shape[-2:])), dim=-3)

    return Rotary(per_head(rotary.cos, 1.0), per_head(rotary.sin, 0.0), rotary.rotate, rotary.interleaved)
