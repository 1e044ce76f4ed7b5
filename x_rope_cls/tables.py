"""The tables that rotate a sequence of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotation tables of one sequence of tokens. Works as an argument and a result under compile and export.

    The operators check shapes and dtypes. Tables need not be a pure rotation: xpos scales them.

    Attributes:
        cos: (tokens, rotary_dim / 2), or broadcastable to (batch, heads, tokens, rotary_dim / 2) except along tokens
            and channel pairs. Floating.
        sin: the same shape.
        rotate: bool (tokens,) or (batch, tokens). True: the token has a position; False: it has none (CLS, memory,
            register). None: all have.
        interleaved: True: channels (2i, 2i + 1) turn together; False: (i, i + rotary_dim / 2).
    """

    cos: Tensor
    sin: Tensor
    rotate: Tensor | None = None
    interleaved: bool = True

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Rotary:
        """Moves all tensors to a device and converts the tables, never ``rotate``, to a dtype."""
        rotate = None if self.rotate is None else self.rotate.to(device)
        return Rotary(self.cos.to(device, dtype), self.sin.to(device, dtype), rotate, self.interleaved)

    def without_rotate(self) -> Rotary:
        """The same tables for a sequence in which every token has a position."""
        return Rotary(self.cos, self.sin, None, self.interleaved)


def _flatten(rotary: Rotary) -> tuple[list[Tensor | None], bool]:
    return [rotary.cos, rotary.sin, rotary.rotate], rotary.interleaved


def _flatten_with_keys(rotary: Rotary) -> tuple[list[tuple[pytree.KeyEntry, Tensor | None]], bool]:
    values, interleaved = _flatten(rotary)
    return [
        (pytree.GetAttrKey(name), value) for name, value in zip(("cos", "sin", "rotate"), values, strict=True)
    ], interleaved


def _unflatten(values: Iterable[Any], interleaved: bool) -> Rotary:
    cos, sin, rotate = values
    return Rotary(cos, sin, rotate, interleaved)


pytree.register_pytree_node(
    Rotary, _flatten, _unflatten, serialized_type_name="x_rope_cls.Rotary", flatten_with_keys_fn=_flatten_with_keys
)
torch.serialization.add_safe_globals([Rotary])  # plain tensors; for example inputs of saved exported programs
