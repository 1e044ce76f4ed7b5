"""Attention of few queries over many tokens, with keys and values that are linear in the token states.

Two forms of one function, and the one place that chooses between them:

- absorbed: ``<q, W_k x_n> = <W_k^T q, x_n>`` and ``sum p_n W_v x_n = W_v sum p_n x_n``, so W_k is folded into the
  queries, W_v is applied to the sum, and :func:`x_rope_cls.functional.late_cls_pool` reads each token state once.
- ordinary: keys and values are formed, and :func:`x_rope_cls.rope_attention` attends to them.

The bias of the keys adds one number to all scores of a row, which a softmax does not see; that of the values is added
once behind the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import projected, reference
from ._checks import check_choice
from ._heads import by_key_head, by_row, per_head, ungroup
from ._layers import TokenNorm
from .functional import late_cls_pool, rope_attention

Form = Literal["auto", "absorbed", "ordinary"]
Projection = Callable[[Tensor], Tensor]
HeadOrder = Literal["block", "cyclic"]

_FORMS = ("auto", "absorbed", "ordinary")
_HEAD_ORDERS = ("block", "cyclic")

# The absorbed form costs 4 N C flops for each of heads * queries rows, forming keys and values 2 N C for each of their
# columns: equal at as many queries as head_dim. So it was measured for float32; matrix products in bfloat16 are faster
# where there are instructions for them, and the two are even at half as many.
_MOST_ROWS_PER_COLUMN = {torch.float32: 0.5, torch.float64: 0.5}
_MOST_ROWS_PER_COLUMN_HALF = 0.25

# In the order of the flags of ordinary_reasons.
_REASONS = (
    "keys or values are made by a layer that is not a plain Linear",
    "keys are normalised after their projection",
    "values are not linear in the tokens",
    "memory key/values are keys of their own",
    "keys are rotated by their positions",
    "a position bias is added to the scores",
    "a mask over pairs of query and key",
    "attention dropout in training",
)

_OPERATOR_DEVICES = frozenset(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if torch._C._dispatch_has_kernel_for_dispatch_key("x_rope_cls::rope_attention", key)
) | {"meta"}


class Pooled(NamedTuple):
    """What :func:`pool_attention` returns.

    Attributes:
        out: (batch, queries, heads, value_dim).
        lse: (batch, heads, queries), natural log of the softmax denominators, float32 (float64 for float64); or None.
        weights: (batch, heads, queries, extra + tokens), the attention map, without dropout; or None.
    """

    out: Tensor
    lse: Tensor | None
    weights: Tensor | None


def ordinary_reasons(
    *,
    queries: int = 1,
    heads: int = 1,
    key_heads: int = 1,
    key_dim: int | None = None,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    projection: bool = False,
    key_norm: bool = False,
    value_norm: bool = False,
    key_memory: bool = False,
    rotated_keys: bool = False,
    position_bias: bool = False,
    attn_mask: bool = False,
    dropout: bool = False,
) -> tuple[str, ...]:
    """Why keys and values have to be formed (or had better be); empty: the absorbed form it is.

    Args:
        queries: number of queries of one sequence.
        heads: number of query heads.
        key_heads: number of heads of keys and values.
        key_dim: channels of a key head; None: not judged by cost.
        value_dim: channels of a value head; None: as key_dim.
        dtype: of the tokens.
        projection: keys or values are not made by a plain linear layer.
        key_norm: keys are normalised after their projection.
        value_norm: values are normalised, or otherwise changed in a way that is not linear.
        key_memory: some keys and values are parameters of their own.
        rotated_keys: keys are rotated by their positions.
        position_bias: a bias is added to the scores.
        attn_mask: a mask over pairs of query and key.
        dropout: attention weights are dropped.
    """
    flags = (projection, key_norm, value_norm, key_memory, rotated_keys, position_bias, attn_mask, dropout)
    reasons = [text for flag, text in zip(flags, _REASONS, strict=True) if flag] if any(flags) else []
    if key_dim is not None:
        columns = key_heads * (key_dim + (key_dim if value_dim is None else value_dim))
        if costs_more(heads * queries, columns, dtype):
            reasons.append(
                f"{queries} queries are too many for {heads} heads and {columns} channels of keys and values"
            )
    return tuple(reasons)


def pool_attention(
    x: Tensor,
    q: Tensor,
    k_weight: Tensor | Projection,
    v_weight: Tensor | Projection,
    *,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    norm: TokenNorm | None = None,
    key_norm: Callable[[Tensor], Tensor] | None = None,
    extra: Tensor | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    head_order: HeadOrder = "block",
    form: Form = "auto",
    return_lse: bool = False,
    need_weights: bool = False,
) -> Pooled:
    """Attention of q over tokens x, whose keys are ``norm(x) W_k^T + b_k`` and values ``norm(x) W_v^T + b_v``.

    Args:
        x: (batch, tokens, channels), float32, float64, bfloat16 or float16.
        q: (batch or 1, queries, heads, key_dim), projected; 1: the same queries for the whole batch, folded once.
        k_weight: (key_heads * key_dim, channels), as in nn.Linear. Or a function that makes keys (batch, tokens,
            heads * key_dim) of normalised tokens, for a layer with an adapter or hooks; makes the form ordinary.
        v_weight: (key_heads * value_dim, channels), or a function as k_weight.
        k_bias: (key_heads * key_dim,).
        v_bias: (key_heads * value_dim,).
        norm: normalisation of x over its channels, folded in where the form allows.
        key_norm: applied to keys (batch, key_heads, tokens, key_dim); makes the form ordinary.
        extra: (batch or 1, extra, channels), normalised already: further tokens that are keys and values too, in
            front of x and never masked. For a model whose CLS tokens see themselves.
        key_mask: bool (batch, tokens), True: attend. Masked tokens never matter, NaN included.
        attn_mask: bool or additive, broadcastable to (batch, heads, queries, tokens); makes the form ordinary.
        scale: factor of the scores; default key_dim ** -0.5.
        dropout_p: probability that an attention weight is dropped; above 0 makes the form ordinary.
        head_order: which key head query head h reads: "block", ``h // (heads / key_heads)`` (PyTorch); "cyclic",
            ``h % key_heads`` (x-transformers).
        form: "auto": see :func:`ordinary_reasons`.
        return_lse: return the logsumexp too; -inf for a row without any key.
        need_weights: return the attention map too, made from the logsumexp; normalised tokens are stored meanwhile.

    Returns:
        out, lse and weights. A row without any key has output, weights and gradients 0.

    Raises:
        ValueError: shapes do not fit, or form is "absorbed" and there are reasons against it.
    """
    _check_arguments(x, q, extra, head_order, form)
    heads, key_dim = q.shape[2:]
    linear, key_heads = False, heads
    if isinstance(k_weight, Tensor) and isinstance(v_weight, Tensor):
        linear, key_heads = True, _key_heads(x, q, k_weight, v_weight)
    reasons = ordinary_reasons(
        queries=q.shape[1],
        heads=heads,
        key_heads=key_heads,
        key_dim=key_dim if linear and form == "auto" else None,
        value_dim=v_weight.shape[0] // key_heads if isinstance(v_weight, Tensor) else None,
        dtype=x.dtype,
        projection=not linear,
        key_norm=key_norm is not None,
        attn_mask=attn_mask is not None,
        dropout=dropout_p > 0,
    )
    if form == "absorbed" and reasons:
        raise ValueError(f"pool_attention: form must not be 'absorbed' where there is {reasons[0]!r}, got 'absorbed'")
    scale = key_dim**-0.5 if scale is None else scale
    call = _Call(x, q, k_weight, v_weight, k_bias, v_bias, norm, key_norm, extra, key_mask, attn_mask, scale, dropout_p)
    run = _ordinary if reasons or form == "ordinary" else _absorbed
    return run(call, key_heads, head_order == "cyclic", return_lse, need_weights)


def costs_more(rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether so many rows over tokens of a dtype cost more than forming keys and values of so many columns."""
    return rows > _MOST_ROWS_PER_COLUMN.get(dtype, _MOST_ROWS_PER_COLUMN_HALF) * columns


class _Call(NamedTuple):
    x: Tensor
    q: Tensor
    k_weight: Any
    v_weight: Any
    k_bias: Tensor | None
    v_bias: Tensor | None
    norm: TokenNorm | None
    key_norm: Callable[[Tensor], Tensor] | None
    extra: Tensor | None
    key_mask: Tensor | None
    attn_mask: Tensor | None
    scale: float
    dropout_p: float


def _absorbed(call: _Call, key_heads: int, cyclic: bool, return_lse: bool, need_weights: bool) -> Pooled:
    x, q, extra = call.x, call.q, call.extra
    heads = q.shape[2]
    query = None
    weights = projected.Weights(call.k_weight, call.v_weight)
    rows = x.shape[0] * q.shape[1] * (heads // key_heads)
    if extra is None and not need_weights and projected.serves(x, q, weights, rows):
        out, lse = projected.pool_projected(x, q, weights, heads, cyclic, call.key_mask, call.norm, call.scale)
    else:
        out, query, lse = _absorbed_steps(call, key_heads, cyclic)
    if call.v_bias is not None:
        bias = per_head(call.v_bias, key_heads, heads, cyclic)
        if extra is None and (call.key_mask is not None or x.shape[1] == 0):  # rows without keys stay 0
            bias = bias * (lse != -torch.inf).transpose(1, 2)[..., None]
        out = out + bias
    if call.k_bias is not None and call.k_bias.requires_grad and torch.is_grad_enabled():
        out = out + call.k_bias.sum() * 0  # its gradient is 0, not missing: DistributedDataParallel waits for one

    maps = None
    if query is not None and need_weights:
        keys = x if call.norm is None else call.norm(_without_masked(x, call.key_mask))
        maps = _map(query, keys[:, None], lse, call)
        if extra is not None:
            maps = torch.cat((_map(query, extra[:, None], lse, call._replace(key_mask=None)), maps), -1)
    if return_lse and call.k_bias is not None:
        bias = per_head(call.k_bias, key_heads, heads, cyclic)
        lse = lse + (q * bias).sum(-1).transpose(1, 2).to(lse.dtype) * call.scale
    return Pooled(out, lse if return_lse else None, maps)


def _absorbed_steps(call: _Call, key_heads: int, cyclic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output without bias, folded queries and logsumexp."""
    x, q, extra = call.x, call.q, call.extra
    queries, heads, key_dim = q.shape[1:]
    batch, _, channels = x.shape
    rows = by_key_head(q.reshape(q.shape[0] * queries, heads, key_dim), key_heads, cyclic)
    folded = torch.bmm(rows, call.k_weight.view(key_heads, key_dim, channels))
    query = by_row(folded, heads, cyclic).unflatten(0, (q.shape[0], queries)).transpose(1, 2)

    pooled, lse = _pool(x, query, call.key_mask, call.scale, call.norm)
    if extra is not None:
        if extra.shape[0] < query.shape[0]:
            extra = extra.expand(query.shape[0], -1, -1)
        pooled, lse = _merge(pooled, lse, *_pool(extra, query, None, call.scale, None))

    rows = by_key_head(pooled.transpose(1, 2).reshape(batch * queries, heads, channels), key_heads, cyclic)
    out = torch.bmm(rows, call.v_weight.view(key_heads, -1, channels).mT)
    return by_row(out, heads, cyclic).unflatten(0, (batch, queries)), query, lse


def _ordinary(call: _Call, key_heads: int, cyclic: bool, return_lse: bool, need_weights: bool) -> Pooled:
    x, q, extra = _without_masked(call.x, call.key_mask), call.q.transpose(1, 2), call.extra
    k, v = _keys_and_values(call, x if call.norm is None else call.norm(x), key_heads)
    cyclic = cyclic and 1 < key_heads < q.shape[1]
    if cyclic:  # to PyTorch's order of heads
        q = q.unflatten(1, (-1, key_heads)).transpose(1, 2).flatten(1, 2)
    q = q.expand(x.shape[0], -1, -1, -1)
    out, lse = _attend(q, k, v, call)
    maps = []
    if extra is not None:
        unmasked = call._replace(key_mask=None, attn_mask=None)
        extra_k, extra_v = _keys_and_values(call, extra.expand(x.shape[0], -1, -1), key_heads)
        out, lse = _merge(out, lse, *_attend(q, extra_k, extra_v, unmasked))
        maps = [_map(q, extra_k, lse, unmasked)] if need_weights else []
    weights = torch.cat((*maps, _map(q, k, lse, call)), -1) if need_weights else None
    if cyclic:
        out, lse = (ungroup(t, key_heads) for t in (out, lse))
        weights = None if weights is None else ungroup(weights, key_heads)
    return Pooled(out.transpose(1, 2), lse if return_lse else None, weights)


def _pool(
    x: Tensor, query: Tensor, key_mask: Tensor | None, scale: float, norm: TokenNorm | None
) -> tuple[Tensor, Tensor]:
    """late_cls_pool; in plain PyTorch where there is no kernel, or under torch.func transforms."""
    kind, weight, bias, eps = (None, None, None, 1e-5) if norm is None else norm
    options: dict[str, Any] = {"key_mask": key_mask, "scale": scale, "return_lse": True}
    if kind is not None:
        options.update(norm=kind, norm_weight=weight, norm_bias=bias, norm_eps=eps)
    if _has_operators(x):
        pooled, lse = late_cls_pool(x, query, **options)
        return pooled, lse
    heads = query.shape[1]  # as rows of a single head: plain PyTorch would copy x for each head
    pooled, lse = reference.late_cls_pool(x, query.flatten(1, 2)[:, None], **options)
    return pooled[:, 0].unflatten(1, (heads, -1)), lse[:, 0].unflatten(1, (heads, -1))


def _attend(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """rope_attention without rotation; in plain PyTorch where there is no kernel, or under torch.func transforms."""
    options: dict[str, Any] = {"key_mask": call.key_mask, "attn_mask": call.attn_mask, "scale": call.scale}
    options.update(dropout_p=call.dropout_p, return_lse=True)
    if _has_operators(q):
        out, lse = rope_attention(q, k, v, **options)
        return out, lse
    if call.dropout_p > 0:
        options["seed"] = torch.randint(2**63 - 1, ())
    out, lse = reference.rope_attention(q, k, v, **options)
    return out, lse


def _has_operators(x: Tensor) -> bool:
    return x.device.type in _OPERATOR_DEVICES and not torch._C._are_functorch_transforms_active()


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each; the other set is never empty."""
    share = torch.sigmoid(lse - other_lse)[..., None].to(out.dtype)
    return torch.lerp(other.to(out.dtype), out, share), torch.logaddexp(lse, other_lse)


def _keys_and_values(call: _Call, x: Tensor, key_heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values of normalised tokens, (batch, key_heads, tokens, head_dim)."""
    k, v = (
        (F.linear(x, weight, bias) if isinstance(weight, Tensor) else weight(x))
        .unflatten(-1, (key_heads, -1))
        .transpose(1, 2)
        for weight, bias in ((call.k_weight, call.k_bias), (call.v_weight, call.v_bias))
    )
    return k if call.key_norm is None else call.key_norm(k), v


def _map(q: Tensor, k: Tensor, lse: Tensor, call: _Call) -> Tensor:
    """Attention weights of q over k, whose heads are in PyTorch's order, from the logsumexp over all keys."""
    compute = lse.dtype
    key_heads = k.shape[1]
    rows = q.reshape(q.shape[0], key_heads, q.shape[1] // key_heads * q.shape[2], q.shape[3]).to(compute)
    if call.key_mask is not None:
        k = torch.where(call.key_mask[:, None, :, None], k, 0)
    scores = rows @ k.to(compute).mT * call.scale
    scores = scores.view(scores.shape[0], *q.shape[1:3], k.shape[2])
    if call.attn_mask is not None and call.attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~call.attn_mask, -torch.inf)
    elif call.attn_mask is not None:
        scores = scores + call.attn_mask
    if call.key_mask is not None:
        scores = scores.masked_fill(~call.key_mask[:, None, None], -torch.inf)
    log_sum = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]
    return (scores - log_sum).exp().to(q.dtype)


def _without_masked(x: Tensor, key_mask: Tensor | None) -> Tensor:
    return x if key_mask is None else torch.where(key_mask[..., None], x, 0)


def _check_arguments(x: Tensor, q: Tensor, extra: Tensor | None, head_order: str, form: str) -> None:
    """Checks what reshaping would not tell clearly."""
    check_choice("pool_attention", "head_order", head_order, _HEAD_ORDERS)
    check_choice("pool_attention", "form", form, _FORMS)
    if x.dim() != 3:
        raise ValueError(f"pool_attention: x must be (batch, tokens, channels), got {tuple(x.shape)}")
    batch, _, channels = x.shape
    if q.dim() != 4 or q.shape[0] not in (1, batch):
        expected = f"({batch} or 1, queries, heads, key_dim)"
        raise ValueError(f"pool_attention: q must be {expected}, got {tuple(q.shape)}")
    if extra is None:
        return
    if extra.dim() != 3 or extra.shape[0] not in (1, batch) or extra.shape[1] == 0 or extra.shape[2] != channels:
        expected = f"({batch} or 1, at least 1, {channels})"
        raise ValueError(f"pool_attention: extra must be {expected}, got {tuple(extra.shape)}")


def _key_heads(x: Tensor, q: Tensor, k_weight: Tensor, v_weight: Tensor) -> int:
    """The number of key heads that the weights are for."""
    channels, (heads, key_dim) = x.shape[2], q.shape[2:]
    for name, weight in (("k_weight", k_weight), ("v_weight", v_weight)):
        if weight.dim() != 2 or weight.shape[1] != channels:
            raise ValueError(f"pool_attention: {name} must be (columns, {channels}), got {tuple(weight.shape)}")
    key_heads: int = k_weight.shape[0] // key_dim
    if key_heads * key_dim != k_weight.shape[0] or key_heads == 0 or heads % key_heads:
        expected = f"a divisor of {heads} heads, times {key_dim} rows"
        raise ValueError(f"pool_attention: k_weight must have {expected}, got {k_weight.shape[0]}")
    if v_weight.shape[0] % key_heads:
        expected = f"a multiple of {key_heads} key heads"
        raise ValueError(f"pool_attention: v_weight must have {expected} as rows, got {v_weight.shape[0]}")
    return key_heads
