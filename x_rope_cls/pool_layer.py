"""A whole layer of attention of few queries: :func:`x_rope_cls.pooling.pool_attention` between W_q and W_out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import projected
from .pooling import HeadOrder, Pooled, costs_more, pool_attention


def pool_layer(
    x: Tensor,
    queries: Tensor,
    weights: projected.Weights,
    *,
    heads: int,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    head_order: HeadOrder = "block",
    need_weights: bool = False,
) -> Pooled:
    """Queries are projected, attend to tokens, and the heads' results are merged and projected. No biases.

    Args:
        x: (batch, tokens, channels).
        queries: (batch or 1, queries, dim), or (queries, dim): the same for the whole batch.
        weights: of all four projections.
        heads: query heads.
        key_mask: bool (batch, tokens), True: attend.
        scale: factor of the scores; default key_dim ** -0.5.
        dropout_p: probability that an attention weight is dropped.
        head_order: which key head query head h reads, see :func:`x_rope_cls.pooling.pool_attention`.
        need_weights: return the attention map too.

    Returns:
        out (batch, queries, out_dim), and the attention map if wanted.
    """
    assert weights.q is not None
    assert weights.out is not None
    key_dim = weights.q.shape[0] // heads
    key_columns = weights.k.shape[0]
    count = queries.shape[-2]
    rows = x.shape[0] * count * (heads * key_dim // key_columns)
    if (
        not need_weights
        and dropout_p == 0
        and projected.serves(x, queries, weights, rows)
        and not costs_more(heads * count, key_columns + weights.v.shape[0], x.dtype)
    ):
        scale = key_dim**-0.5 if scale is None else scale
        out, _ = projected.pool_projected(x, queries, weights, heads, head_order == "cyclic", key_mask, None, scale)
        return Pooled(out, None, None)
    q = F.linear(queries if queries.dim() == 3 else queries[None], weights.q)
    pooled = pool_attention(
        x,
        q.unflatten(-1, (heads, -1)),
        weights.k,
        weights.v,
        key_mask=key_mask,
        scale=scale,
        dropout_p=dropout_p,
        head_order=head_order,
        need_weights=need_weights,
    )
    return Pooled(F.linear(pooled.out.flatten(2), weights.out), None, pooled.weights)
