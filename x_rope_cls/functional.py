"""The public functions: default arguments and Python types are settled here, everything else in the operators."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import ops
from .tables import Rotary

ClsRope = Literal["rotate", "skip", "mask"]
PoolNorm = Literal["layer", "rms"]

POOL_NORM = {None: 0, "layer": 1, "rms": 2}
_CLS_ROPE = {"rotate": 0, "skip": 1, "mask": 2}


def apply_rope(x: Tensor, rotary: Rotary, *, inverse: bool = False) -> Tensor:
    """Rotates the first ``rotary_dim`` channels of every token that has a position; computed in float32 at least.

    Args:
        x: (batch, heads, tokens, head_dim), float32, float64, bfloat16 or float16, any strides.
        rotary: tables and layout; see :class:`x_rope_cls.Rotary`.
        inverse: multiply by the transpose, which undoes a pure rotation.

    Returns:
        Like x, in (batch, tokens, heads, head_dim) memory order. Other channels and tokens are copied.

    Raises:
        TypeError: rotary is not a Rotary.
        RuntimeError: from the operator, on shapes or dtypes that do not fit; it says what was expected and what came.
    """
    _check_rotary("apply_rope", "rotary", rotary)
    cos, sin = _tables(rotary, x)
    rotated: Tensor = ops.rope(x, cos, sin, rotary.rotate, rotary.interleaved, inverse)
    return rotated


def apply_rope_qk(
    q: Tensor, k: Tensor, rotary: Rotary, *, rotary_k: Rotary | None = None, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`apply_rope` of queries and keys in one call.

    Args:
        q: (batch, heads, queries, head_dim), float32, float64, bfloat16 or float16, any strides.
        k: (batch, key_heads, keys, head_dim), dtype of q.
        rotary: tables of the queries.
        rotary_k: tables of the keys; None: those of the queries, if there are as many keys.
        inverse: multiply by the transpose, which undoes a pure rotation.

    Returns:
        q and k rotated, each in (batch, tokens, heads, head_dim) memory order.

    Raises:
        TypeError: rotary or rotary_k is not a Rotary.
        ValueError: rotary_k is missing where lengths differ, or the layouts differ.
        RuntimeError: from the operator, on shapes or dtypes that do not fit; it says what was expected and what came.
    """
    rotary_k = _key_rotary("apply_rope_qk", q, k, rotary, rotary_k)
    cos_q, sin_q = _tables(rotary, q)
    cos_k, sin_k = (cos_q, sin_q) if rotary_k is rotary else _tables(rotary_k, k)
    rotated_q: Tensor
    rotated_k: Tensor
    rotated_q, rotated_k = ops.rope_qk(
        q, k, cos_q, sin_q, cos_k, sin_k, rotary.rotate, rotary_k.rotate, rotary.interleaved, inverse
    )
    return rotated_q, rotated_k


@overload
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Rotary | None = None,
    *,
    rotary_k: Rotary | None = None,
    cls_rope: ClsRope = "mask",
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Rotary | None = None,
    *,
    rotary_k: Rotary | None = None,
    cls_rope: ClsRope = "mask",
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Rotary | None = None,
    *,
    rotary_k: Rotary | None = None,
    cls_rope: ClsRope = "mask",
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention with the rotation inside, and tokens without a position handled as ``cls_rope`` says.

    The score of query i and key j, with R the rotation and ``rotate`` True where a token has a position:

    - ``"rotate"``: ``<R_i q_i, R_j k_j>`` for all pairs; ``rotate`` is ignored.
    - ``"skip"``: the same with R = 1 for tokens without a position.
    - ``"mask"``: ``<R_i q_i, R_j k_j>`` where both have a position, else ``<q_i, k_j>``.

    Nothing of size queries * keys is stored. Under autocast q, k and v are cast, tables and bias are not. Gradients:
    once, for q, k, v, a floating attn_mask and the tables. Rotation and sums of
    bfloat16 and float16 are in float32; on some processors rotated q and k are rounded before they are multiplied, to
    bfloat16, or in float16 to integers with errors in weights of the size of float16's own rounding at most.

    Args:
        q: (batch, heads, queries, head_dim), float32, float64, bfloat16 or float16, any strides.
        k: (batch, key_heads, keys, head_dim); query head h reads key head ``h // (heads / key_heads)``.
        v: (batch, key_heads, keys, value_dim).
        rotary: tables of the queries; None: no rotation at all.
        rotary_k: tables of the keys; None: those of the queries, if there are as many keys.
        cls_rope: see above.
        attn_mask: bool (True: attend) or additive, broadcastable to (batch, heads, queries, keys).
        key_mask: bool (batch, keys), True: attend. Values of k and v at masked keys never matter, NaN included.
        dropout_p: probability that an attention weight is dropped, in [0, 1]. The seed is drawn from the
            device's default generator, so that ``torch.manual_seed`` makes it reproducible.
        scale: factor of the scores; default head_dim ** -0.5.
        return_lse: also return the natural logarithm of the softmax denominators; it is differentiable.

    Returns:
        (batch, heads, queries, value_dim), dtype of v, in (batch, queries, heads, value_dim) memory order so that
        merging heads is a view; and, if wanted, lse (batch, heads, queries), float32 (float64 for float64). A query
        without any key to attend to gets output 0, gradient 0 and lse -inf.

    Raises:
        TypeError: rotary or rotary_k is not a Rotary.
        ValueError: cls_rope is unknown, rotary_k is missing or comes without rotary, or the layouts differ.
        RuntimeError: from the operator, on shapes or dtypes that do not fit; it says what was expected and what came.
    """
    mode = _CLS_ROPE.get(cls_rope)
    if mode is None:
        raise ValueError(f"rope_attention: cls_rope must be 'rotate', 'skip' or 'mask', got {cls_rope!r}")
    tables: tuple[Tensor | None, ...] = (None,) * 4
    rotate: tuple[Tensor | None, ...] = (None,) * 2
    if rotary is not None:
        rotary_k = _key_rotary("rope_attention", q, k, rotary, rotary_k)
        tables_q = _tables(rotary, q)
        tables = (*tables_q, *(tables_q if rotary_k is rotary else _tables(rotary_k, k)))
        if cls_rope != "rotate":
            rotate = (rotary.rotate, rotary_k.rotate)
    elif rotary_k is not None:
        raise ValueError("rope_attention: rotary must be given with rotary_k, got None")

    interleaved = rotary is None or rotary.interleaved
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=q.device) if dropout_p > 0 else None
    if scale is None:
        scale = max(q.size(-1), 1) ** -0.5 if q.dim() else 1.0  # no head_dim: the operator complains
    out: Tensor
    lse: Tensor
    out, lse = ops.rope_attention(
        q, k, v, *tables, *rotate, attn_mask, key_mask, seed, mode, interleaved, scale, dropout_p
    )
    return (out, lse) if return_lse else out


@overload
def late_cls_pool(
    x: Tensor,
    query: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    norm: PoolNorm | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor: ...
@overload
def late_cls_pool(
    x: Tensor,
    query: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    norm: PoolNorm | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor]: ...
def late_cls_pool(
    x: Tensor,
    query: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    norm: PoolNorm | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few queries whose keys and values are the token states themselves: ``softmax(scale q x^T) x``.

    For few queries, ``q . (W_k x_n) = (W_k^T q) . x_n`` and ``sum p_n W_v x_n = W_v sum p_n x_n``: with W_k folded into
    the query and W_v applied behind the sum, attention reads each token state once and never forms keys or values.
    Nothing of size queries * tokens is stored. Under autocast x and query are cast. Gradients: once, for x, query,
    norm_weight and norm_bias.

    Args:
        x: (batch, tokens, channels), float32, float64, bfloat16 or float16, any strides.
        query: (batch or 1, heads, queries, channels), dtype of x; a batch of 1 is shared by the whole batch.
        key_mask: bool (batch, tokens), True: attend. Masked tokens are not read; their values never matter.
        scale: factor of the scores; default 1, because it belongs to the projections folded into the query.
        return_lse: also return the natural logarithm of the softmax denominators; it is differentiable.
        norm: normalises tokens over their channels as they are read, exactly as a layer in front would: "layer"
            (layer norm), "rms" (root mean square norm) or None.
        norm_weight: (channels,), floating, factor after the normalisation; None: 1.
        norm_bias: (channels,), floating, added after the normalisation; None: 0.
        norm_eps: added to the variance ("layer") or the mean square ("rms").

    Returns:
        pooled (batch, heads, queries, channels), dtype of x, contiguous, and, if wanted, lse (batch, heads, queries),
        float32 (float64 for float64). A query without any token to attend to gets pooled 0, gradient 0 and lse -inf.

    Raises:
        ValueError: norm is unknown.
        RuntimeError: from the operator, on shapes or dtypes that do not fit; it says what was expected and what came.
    """
    code = POOL_NORM.get(norm)
    if code is None:
        raise ValueError(f"late_cls_pool: norm must be 'layer', 'rms' or None, got {norm!r}")
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (t if t is None or t.dtype == compute else t.to(compute) for t in (norm_weight, norm_bias))
    pooled: Tensor
    lse: Tensor
    factor = 1.0 if scale is None else scale
    pooled, lse = ops.late_cls_pool(x, query, key_mask, weight, bias, factor, code, norm_eps)
    return (pooled, lse) if return_lse else pooled


def _check_rotary(owner: str, what: str, rotary: Rotary) -> None:
    if not isinstance(rotary, Rotary):
        raise TypeError(f"{owner}: {what} must be a Rotary, got {type(rotary).__name__}")


def _key_rotary(owner: str, q: Tensor, k: Tensor, rotary: Rotary, rotary_k: Rotary | None) -> Rotary:
    """The tables of the keys: those given, or those of the queries where there are as many keys."""
    _check_rotary(owner, "rotary", rotary)
    if rotary_k is None:
        if q.shape[-2:-1] != k.shape[-2:-1]:
            lengths = f"{q.shape[-2]} queries and {k.shape[-2]} keys"
            raise ValueError(f"{owner}: rotary_k must be given where lengths differ, got None at {lengths}")
        return rotary
    _check_rotary(owner, "rotary_k", rotary_k)
    if rotary_k.interleaved != rotary.interleaved:
        layouts = f"{rotary.interleaved} and {rotary_k.interleaved}"
        raise ValueError(f"{owner}: interleaved of rotary and rotary_k must be the same, got {layouts}")
    return rotary_k


def _tables(rotary: Rotary, x: Tensor) -> tuple[Tensor, Tensor]:
    """The tables in the dtype that x is rotated in."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return rotary.cos.to(compute), rotary.sin.to(compute)
