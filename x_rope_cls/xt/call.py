"""What one attention call needs beside q, k and v."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import ClsRope
from ..tables import Rotary
from .joined import JoinedCall
from .positions import PositionTables


@dataclass(eq=False)
class AttentionCall:
    """Travels from RopeAttention.forward through x-transformers' Attention.forward to RopeAttend.forward.

    It goes as the argument ``prev_attn``, which x-transformers hands on as it is: nothing is kept on a module, so that
    threads, recursion, checkpointing and torch.compile see plain arguments.

    Attributes:
        tables: of the queries, and of the keys in self attention; None: nothing is rotated.
        context: of the keys in cross attention.
        front: keys in front that have no position: memory key/values and additional key/values.
        unrotated_heads: how many of the first heads are not rotated.
        attn_mask: the caller's bool mask, held back so that key padding stays a (batch, keys) mask.
        prev_attn: scores of an earlier layer, as x-transformers passes them.
        joined: the sequence is CLS, which has come late, and tokens.
        keep_maps: the attention map will be looked at, with ``attn_flash`` too.
    """

    tables: PositionTables | None
    context: PositionTables | None
    front: int
    unrotated_heads: int
    attn_mask: Tensor | None
    prev_attn: Any
    joined: JoinedCall | None = None
    keep_maps: bool = False

    @property
    def cls_rope(self) -> ClsRope:
        """What happens to tokens without a position."""
        return "rotate" if self.tables is None else self.tables.cls_rope

    @property
    def preserves_norm(self) -> bool:
        """Rotation does not stretch q and k."""
        keys = self.tables if self.context is None else self.context
        return self.tables is None or (self.tables.preserves_norm and keys is not None and keys.preserves_norm)

    def rotaries(self, q: Tensor, k: Tensor) -> tuple[Rotary | None, Rotary | None]:
        """Tables for q and for k."""
        if self.tables is None:
            return None, None
        keys = self.tables if self.context is None else self.context
        return (
            self.tables.for_queries(q.shape[-2], q.shape[1], self.unrotated_heads),
            keys.for_keys(k.shape[-2] - self.front, self.front, k.shape[1], self.unrotated_heads),
        )


@dataclass(eq=False)
class Masks:
    """Which query/key pairs attend: a mask over keys and a mask over pairs, kept apart since masked keys cost nothing.

    Attributes:
        keys: bool (batch or 1, keys) or None.
        pairs: bool, broadcastable to (batch, heads, queries, keys), or None.
    """

    keys: Tensor | None
    pairs: Tensor | None

    @staticmethod
    def of(mask: Tensor | None, attn_mask: Tensor | None) -> Masks:
        """Sorts x-transformers' merged mask and the held-back attn_mask, 4-D or 2-D over keys, into the two kinds."""
        keys: Tensor | None = None
        pairs: Tensor | None = None
        for each in (mask, attn_mask):
            if each is None:
                continue
            if each.dim() == 2 or (each.shape[1] == 1 and each.shape[2] == 1):
                each = each.flatten(1, -2)[:, 0] if each.dim() == 4 else each
                keys = each if keys is None else keys & each
            else:
                pairs = each if pairs is None else pairs & each
        return Masks(keys, pairs)

    def keys_for(self, k: Tensor) -> Tensor | None:
        """The mask over keys as (batch, keys), of keys k."""
        return None if self.keys is None else self.keys.expand(k.shape[0], k.shape[-2])

    def merged(self) -> Tensor | None:
        """One mask, as x-transformers makes it."""
        keys = None if self.keys is None else self.keys[:, None, None]
        if keys is None or self.pairs is None:
            return keys if self.pairs is None else self.pairs
        return keys & self.pairs

    def pad_front(self) -> Masks:
        """One more key in front, which everybody may attend to."""
        keys, pairs = (None if t is None else F.pad(t, (1, 0), value=True) for t in (self.keys, self.pairs))
        return Masks(keys, pairs)

    def with_pairs(self, pairs: Tensor | None) -> Masks:
        """The same keys with another mask over pairs."""
        return Masks(self.keys, pairs)

    def merge_into(self, bias: Tensor) -> Tensor:
        """The bias with -inf at pairs that do not attend; the mask over keys stays apart."""
        return bias if self.pairs is None else torch.where(self.pairs, bias, -torch.inf)


def with_zero_key(
    k: Tensor, v: Tensor, masks: Masks, bias: Tensor | None, call: AttentionCall
) -> tuple[Tensor, Tensor, Masks, Tensor | None, AttentionCall]:
    """The option attn_add_zero_kv: a key and value of zeros in front, which everybody may attend to."""
    return (
        F.pad(k, (0, 0, 1, 0)),
        F.pad(v, (0, 0, 1, 0)),
        masks.pad_front(),
        None if bias is None else F.pad(bias, (1, 0)),
        replace(call, front=call.front + 1),
    )
