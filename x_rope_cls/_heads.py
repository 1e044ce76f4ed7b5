"""Heads sorted by the key head that they read, and back.

Query head h reads key head ``h // group``, the order of PyTorch, or, where ``cyclic``, ``h % key_heads``, that of
x-transformers. With as many key heads as heads all of it is views.
"""

from __future__ import annotations

from torch import Tensor


def by_key_head(rows: Tensor, key_heads: int, cyclic: bool) -> Tensor:
    """(rows, heads, dim) to (key_heads, rows * group, dim): what each key head is multiplied with."""
    count, heads, dim = rows.shape
    if heads == key_heads:
        return rows.transpose(0, 1)
    group = heads // key_heads
    if cyclic:
        sorted_rows = rows.view(count, group, key_heads, dim).permute(2, 0, 1, 3)
    else:
        sorted_rows = rows.view(count, key_heads, group, dim).transpose(0, 1)
    return sorted_rows.reshape(key_heads, count * group, dim)


def by_row(grouped: Tensor, heads: int, cyclic: bool) -> Tensor:
    """The way back: (key_heads, rows * group, dim) to (rows, heads, dim)."""
    key_heads, count, dim = grouped.shape
    if heads == key_heads:
        return grouped.transpose(0, 1)
    group = heads // key_heads
    count = count // group
    grouped = grouped.view(key_heads, count, group, dim)
    return grouped.permute((1, 2, 0, 3) if cyclic else (1, 0, 2, 3)).reshape(count, heads, dim)


def ungroup(t: Tensor, key_heads: int) -> Tensor:
    """(batch, heads, ...) from the order in which heads of one key head are neighbours to the cyclic one."""
    ungrouped: Tensor = t.unflatten(1, (key_heads, -1)).transpose(1, 2).flatten(1, 2)
    return ungrouped


def per_head(bias: Tensor, key_heads: int, heads: int, cyclic: bool) -> Tensor:
    """A bias of the key heads as (heads, dim)."""
    bias = bias.view(key_heads, -1)
    if heads == key_heads:
        return bias
    return bias.repeat(heads // key_heads, 1) if cyclic else bias.repeat_interleave(heads // key_heads, 0)
