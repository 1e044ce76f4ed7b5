"""The checks of csrc/torch/checks.cpp once more, for fake tensors: the same conditions, order and texts.

A test compares both sides. Sizes may be symbolic here; a check then becomes a guard of the compiled code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NAMED = (
    *_FLOATING,
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128),
)
_FLOATING_TEXT = "float32, float64, bfloat16 or float16"
_MOST_TOKENS = 2**31 - 1  # indices of tokens are 32 bit in the kernels
_ANY = -1  # any size

_Shape = Sequence[int]


class AttentionArguments(NamedTuple):
    """Arguments of rope_attention that can be wrong."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos_q: Tensor | None
    sin_q: Tensor | None
    cos_k: Tensor | None
    sin_k: Tensor | None
    rotate_q: Tensor | None
    rotate_k: Tensor | None
    attn_mask: Tensor | None
    key_mask: Tensor | None
    seed: Tensor | None
    cls_rope: int
    scale: float
    dropout_p: float


class PoolArguments(NamedTuple):
    """Arguments of late_cls_pool that can be wrong."""

    x: Tensor
    query: Tensor
    key_mask: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    scale: float
    norm: int
    norm_eps: float


class AttentionGradients(NamedTuple):
    """What rope_attention_backward takes on top."""

    grad_out: Tensor
    grad_lse: Tensor | None
    out: Tensor
    lse: Tensor
    need_bias_grad: bool
    need_table_grad: bool


def compute_dtype(t: Tensor) -> torch.dtype:
    """The dtype of tables, logsumexp and accumulation for tensors such as t."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def check_rope(x: Tensor, cos: Tensor, sin: Tensor, rotate: Tensor | None) -> None:
    """Refuses what the operator rope refuses."""
    _check_values("rope", "x", x)
    _check_cos("rope", "cos", cos, x)
    _check_like("rope", "sin", sin, compute_dtype(x), x, cos.shape)
    _check_rotate("rope", "rotate", rotate, x)


def check_rope_qk(
    q: Tensor,
    k: Tensor,
    cos_q: Tensor,
    sin_q: Tensor,
    cos_k: Tensor,
    sin_k: Tensor,
    rotate_q: Tensor | None,
    rotate_k: Tensor | None,
) -> None:
    """Refuses what the operator rope_qk refuses."""
    op = "rope_qk"
    _check_values(op, "q", q)
    _check_dtype(op, "k", k, q.dtype)
    _check_device(op, "k", k, q)
    _check_values(op, "k", k)
    _check_cos(op, "cos_q", cos_q, q)
    _check_like(op, "sin_q", sin_q, compute_dtype(q), q, cos_q.shape)
    _check_cos(op, "cos_k", cos_k, k)
    _check_like(op, "sin_k", sin_k, compute_dtype(q), q, cos_k.shape)
    _check_rotate(op, "rotate_q", rotate_q, q)
    _check_rotate(op, "rotate_k", rotate_k, k)


def check_rope_table_grad(grad: Tensor, x: Tensor, cos: Tensor, rotate: Tensor | None) -> None:
    """Refuses what the operator rope_table_grad refuses."""
    op = "rope_table_grad"
    _check_values(op, "x", x)
    _check_like(op, "grad", grad, x.dtype, x, x.shape)
    _check_cos(op, "cos", cos, x)
    _check_rotate(op, "rotate", rotate, x)


def check_attention(op: str, a: AttentionArguments) -> None:
    """Refuses what the operator rope_attention refuses."""
    _check_queries_keys_values(op, a)
    _check_tables(op, a)
    _check_masks(op, a)
    _check_options(op, a)


def check_attention_backward(a: AttentionArguments, g: AttentionGradients) -> None:
    """Refuses what the operator rope_attention_backward refuses."""
    op = "rope_attention_backward"
    check_attention(op, a)
    rows, values = a.q.shape[:3], (*a.q.shape[:3], a.v.shape[3])
    _check_like(op, "grad_out", g.grad_out, a.q.dtype, a.q, values)
    if g.grad_lse is not None:
        _check_like(op, "grad_lse", g.grad_lse, compute_dtype(a.q), a.q, rows)
    _check_like(op, "out", g.out, a.q.dtype, a.q, values)
    _check_like(op, "lse", g.lse, compute_dtype(a.q), a.q, rows)
    if g.need_bias_grad and (a.attn_mask is None or a.attn_mask.dtype not in _FLOATING):
        got = "None" if a.attn_mask is None else _dtype_text(a.attn_mask.dtype)
        _refuse(op, "attn_mask", "floating where need_bias_grad is set", got)
    if g.need_table_grad and a.cos_q is None:
        _refuse(op, "cos_q", "given where need_table_grad is set", "None")


def check_pool(op: str, a: PoolArguments) -> None:
    """Refuses what the operator late_cls_pool refuses."""
    if a.x.dim() != 3:
        _refuse(op, "x", "of shape (batch, tokens, channels)", _shape_text(a.x.shape))
    if a.x.dtype not in _FLOATING:
        _refuse(op, "x", _FLOATING_TEXT, _dtype_text(a.x.dtype))
    batch, tokens, channels = a.x.shape
    if isinstance(tokens, int) and tokens > _MOST_TOKENS:
        _refuse(op, "x", f"of at most {_MOST_TOKENS} tokens", str(tokens))
    if channels < 1:
        _refuse(op, "channels of x", "at least 1", str(channels))
    if a.key_mask is not None:
        _check_like(op, "key_mask", a.key_mask, torch.bool, a.x, (batch, tokens))
    for what, t in (("norm_weight", a.norm_weight), ("norm_bias", a.norm_bias)):
        if t is not None:
            if a.norm == 0:
                _refuse(op, what, "None where norm is 0", "a tensor")
            _check_like(op, what, t, compute_dtype(a.x), a.x, (channels,))
    if a.norm not in (0, 1, 2):
        _refuse(op, "norm", "0, 1 or 2", str(a.norm))
    if isinstance(a.scale, float) and not math.isfinite(a.scale):
        _refuse(op, "scale", "finite", f"{a.scale:g}")
    if not 0 <= a.norm_eps < math.inf:
        _refuse(op, "norm_eps", "finite and at least 0", f"{a.norm_eps:g}")
    _check_dtype(op, "query", a.query, a.x.dtype)
    _check_device(op, "query", a.query, a.x)
    fits = a.query.dim() == 4 and a.query.shape[3] == channels
    if not fits or (a.query.shape[0] != 1 and a.query.shape[0] != batch):
        expected = f"of shape (batch, heads, queries, channels) with batch {batch} or 1 and {channels} channels"
        _refuse(op, "query", expected, _shape_text(a.query.shape))


def check_pool_backward(a: PoolArguments, grad: Tensor, grad_lse: Tensor | None, pooled: Tensor, lse: Tensor) -> None:
    """Refuses what the operator late_cls_pool_backward refuses."""
    op = "late_cls_pool_backward"
    check_pool(op, a)
    shape = (a.x.shape[0], *a.query.shape[1:])
    _check_like(op, "grad", grad, a.x.dtype, a.x, shape)
    if grad_lse is not None:
        _check_like(op, "grad_lse", grad_lse, compute_dtype(a.x), a.x, shape[:3])
    _check_like(op, "pooled", pooled, a.x.dtype, a.x, shape)
    _check_like(op, "lse", lse, compute_dtype(a.x), a.x, shape[:3])


def _refuse(op: str, what: str, expected: str, got: str) -> NoReturn:
    raise RuntimeError(f"{op}: {what} must be {expected}, got {got}")


def _shape_text(shape: _Shape) -> str:
    sizes = ["*" if isinstance(size, int) and size == _ANY else str(size) for size in shape]
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype) if dtype in _NAMED else "another dtype"


def _device_text(t: Tensor) -> str:
    return str(t.device) if t.device.type in ("cpu", "cuda") else "another device"


def _check_device(op: str, what: str, t: Tensor, like: Tensor) -> None:
    if t.device != like.device:
        _refuse(op, what, f"on {_device_text(like)}", _device_text(t))


def _check_dtype(op: str, what: str, t: Tensor, expected: torch.dtype) -> None:
    if t.dtype != expected:
        _refuse(op, what, _dtype_text(expected), _dtype_text(t.dtype))


def _check_four_axes(op: str, what: str, t: Tensor) -> None:
    if t.dim() != 4:
        _refuse(op, what, "of shape (batch, heads, tokens, head_dim)", _shape_text(t.shape))
    tokens = t.shape[2]
    if isinstance(tokens, int) and tokens > _MOST_TOKENS:  # of a symbol it would bound what can be exported
        _refuse(op, what, f"of at most {_MOST_TOKENS} tokens", str(tokens))


def _check_values(op: str, what: str, t: Tensor) -> None:
    _check_four_axes(op, what, t)
    if t.dtype not in _FLOATING:
        _refuse(op, what, _FLOATING_TEXT, _dtype_text(t.dtype))


def _check_shape(op: str, what: str, t: Tensor, expected: _Shape) -> None:
    fits = t.dim() == len(expected)
    if not fits or any(size != wanted for size, wanted in zip(t.shape, expected, strict=True) if not _is_any(wanted)):
        _refuse(op, what, f"of shape {_shape_text(expected)}", _shape_text(t.shape))


def _is_any(size: int) -> bool:
    return isinstance(size, int) and size == _ANY


def _check_like(op: str, what: str, t: Tensor, dtype: torch.dtype, device: Tensor, shape: _Shape) -> None:
    _check_dtype(op, what, t, dtype)
    _check_device(op, what, t, device)
    _check_shape(op, what, t, shape)


def _check_cos(op: str, what: str, cos: Tensor, x: Tensor) -> None:
    _check_dtype(op, what, cos, compute_dtype(x))
    _check_device(op, what, cos, x)
    batch, heads, tokens, head_dim = x.shape
    shape, dims = cos.shape, cos.dim()
    fits = 2 <= dims <= 4 and shape[-2] == tokens and shape[-1] >= 1 and 2 * shape[-1] <= head_dim
    fits = fits and (dims < 3 or shape[-3] == 1 or shape[-3] == heads)
    fits = fits and (dims < 4 or shape[0] == 1 or shape[0] == batch)
    if not fits:
        expected = (
            "of shape (tokens, pairs), (heads, tokens, pairs) or (batch, heads, tokens, pairs) "
            f"with batch {batch} or 1, heads {heads} or 1, tokens {tokens} and 1 to {head_dim // 2} pairs"
        )
        _refuse(op, what, expected, _shape_text(shape))


def _check_rotate(op: str, what: str, rotate: Tensor | None, x: Tensor) -> None:
    if rotate is None:
        return
    _check_dtype(op, what, rotate, torch.bool)
    _check_device(op, what, rotate, x)
    batch, tokens = x.shape[0], x.shape[2]
    fits = rotate.dim() in (1, 2) and rotate.shape[-1] == tokens and (rotate.dim() == 1 or rotate.shape[0] == batch)
    if not fits:
        expected = f"of shape {_shape_text((tokens,))} or {_shape_text((batch, tokens))}"
        _refuse(op, what, expected, _shape_text(rotate.shape))


def _check_queries_keys_values(op: str, a: AttentionArguments) -> None:
    _check_values(op, "q", a.q)
    for what, t in (("k", a.k), ("v", a.v)):
        _check_four_axes(op, what, t)
        _check_dtype(op, what, t, a.q.dtype)
        _check_device(op, what, t, a.q)
    batch, heads, _, head_dim = a.q.shape
    _check_shape(op, "k", a.k, (batch, _ANY, _ANY, head_dim))
    _check_shape(op, "v", a.v, (batch, a.k.shape[1], a.k.shape[2], _ANY))
    if head_dim < 1:
        _refuse(op, "head_dim", "at least 1", str(head_dim))
    if a.v.shape[3] < 1:
        _refuse(op, "head_dim of v", "at least 1", str(a.v.shape[3]))
    key_heads = a.k.shape[1]
    if heads != 0 if key_heads == 0 else heads % key_heads != 0:
        _refuse(op, "heads of q", "a multiple of the heads of k", f"{heads} and {key_heads}")


def _check_tables(op: str, a: AttentionArguments) -> None:
    cos_q, sin_q, cos_k, sin_k = a.cos_q, a.sin_q, a.cos_k, a.sin_k
    if cos_q is None or sin_q is None or cos_k is None or sin_k is None:
        given = sum(table is not None for table in (cos_q, sin_q, cos_k, sin_k))
        if given != 0:
            _refuse(op, "cos_q, sin_q, cos_k and sin_k", "given together or not at all", f"{given} of them")
        for what, rotate in (("rotate_q", a.rotate_q), ("rotate_k", a.rotate_k)):
            if rotate is not None:
                _refuse(op, what, "None where there are no tables", "a tensor")
        return
    dtype = compute_dtype(a.q)
    _check_cos(op, "cos_q", cos_q, a.q)
    _check_like(op, "sin_q", sin_q, dtype, a.q, cos_q.shape)
    _check_cos(op, "cos_k", cos_k, a.k)
    _check_like(op, "sin_k", sin_k, dtype, a.q, cos_k.shape)
    if cos_q.shape[-1] != cos_k.shape[-1]:
        _refuse(op, "pairs of cos_k", str(cos_q.shape[-1]), str(cos_k.shape[-1]))
    _check_rotate(op, "rotate_q", a.rotate_q, a.q)
    _check_rotate(op, "rotate_k", a.rotate_k, a.k)


def _check_masks(op: str, a: AttentionArguments) -> None:
    full = (*a.q.shape[:3], a.k.shape[2])
    mask = a.attn_mask
    if mask is not None:
        if mask.dtype != torch.bool and mask.dtype not in _FLOATING:
            _refuse(op, "attn_mask", f"bool, {_FLOATING_TEXT}", _dtype_text(mask.dtype))
        _check_device(op, "attn_mask", mask, a.q)
        sizes = zip(reversed(mask.shape), reversed(full), strict=False)
        if mask.dim() > 4 or not all(size == 1 or size == whole for size, whole in sizes):
            _refuse(op, "attn_mask", f"broadcastable to {_shape_text(full)}", _shape_text(mask.shape))
    if a.key_mask is not None:
        _check_like(op, "key_mask", a.key_mask, torch.bool, a.q, (full[0], full[3]))


def _check_options(op: str, a: AttentionArguments) -> None:
    if a.cls_rope not in (0, 1, 2):
        _refuse(op, "cls_rope", "0, 1 or 2", str(a.cls_rope))
    if isinstance(a.scale, float) and not math.isfinite(a.scale):
        _refuse(op, "scale", "finite", f"{a.scale:g}")
    if not 0 <= a.dropout_p <= 1:
        _refuse(op, "dropout_p", "between 0 and 1", f"{a.dropout_p:g}")
    if a.dropout_p > 0:
        if a.seed is None:
            _refuse(op, "seed", "given where dropout_p is above 0", "None")
        _check_like(op, "seed", a.seed, torch.int64, a.q, ())
