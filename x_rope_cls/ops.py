"""What the C++ operators need on the Python side: fake kernels, derivatives and the autocast rule.

Importing this module registers all of it. The operators themselves are in csrc/torch; their schemas are documented
there, their meaning in :mod:`x_rope_cls.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _op_checks as checks

_Grads = tuple[Tensor | None, ...]

rope = torch.ops.x_rope_cls.rope.default
rope_qk = torch.ops.x_rope_cls.rope_qk.default
rope_table_grad = torch.ops.x_rope_cls.rope_table_grad.default
rope_attention = torch.ops.x_rope_cls.rope_attention.default
rope_attention_backward = torch.ops.x_rope_cls.rope_attention_backward.default
late_cls_pool = torch.ops.x_rope_cls.late_cls_pool.default
late_cls_pool_backward = torch.ops.x_rope_cls.late_cls_pool_backward.default

_library = torch.library.Library("x_rope_cls", "IMPL")  # registrations live as long as this object


def _below_autograd(op: Any, keyset: Any, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _register_autograd(op: Any, function: type[torch.autograd.Function]) -> None:
    """What torch.library.register_autograd does, without the 50 us that it takes to look up defaults in a long schema.

    Args:
        op: the operator's only overload.
        function: its ``forward`` and ``backward`` take and return the dispatch key set before the operator's arguments.
    """

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(keyset, *args)
        return _below_autograd(op, keyset, args)

    _library.impl(op, kernel, "Autograd", with_keyset=True)


def _refuse_tangents(op: Any, args: tuple[Any, ...]) -> None:
    """Forward-mode derivatives would be lost without a word where nothing requires a reverse-mode one."""
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in args):
        name = op._schema.name.split("::")[1]
        raise RuntimeError(
            f"{name}: mode of differentiation must be reverse, got forward; "
            "the functions of x_rope_cls.reference can be differentiated in both"
        )


# rope


@torch.library.register_fake("x_rope_cls::rope")
def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, rotate: Tensor | None, interleaved: bool, inverse: bool) -> Tensor:
    checks.check_rope(x, cos, sin, rotate)
    return _tokens_outside_heads(x, x.shape[-1])


@torch.library.register_fake("x_rope_cls::rope_qk")
def _rope_qk_fake(
    q: Tensor,
    k: Tensor,
    cos_q: Tensor,
    sin_q: Tensor,
    cos_k: Tensor,
    sin_k: Tensor,
    rotate_q: Tensor | None,
    rotate_k: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    checks.check_rope_qk(q, k, cos_q, sin_q, cos_k, sin_k, rotate_q, rotate_k)
    return _tokens_outside_heads(q, q.shape[-1]), _tokens_outside_heads(k, k.shape[-1])


@torch.library.register_fake("x_rope_cls::rope_table_grad")
def _rope_table_grad_fake(
    grad: Tensor, x: Tensor, cos: Tensor, rotate: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    checks.check_rope_table_grad(grad, x, cos, rotate)
    return cos.new_empty(cos.shape), cos.new_empty(cos.shape)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> Tensor:
        x, cos, sin, rotate, ctx.interleaved, ctx.inverse = args
        tables_need_grad = any(ctx.needs_input_grad[2:4])
        ctx.save_for_backward(x if tables_need_grad else None, cos, sin, rotate)
        rotated: Tensor = _below_autograd(rope, keyset, args)
        return rotated

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        x, cos, sin, rotate = ctx.saved_tensors
        dx = dcos = dsin = None
        if ctx.needs_input_grad[1]:
            dx = rope(grad, cos, sin, rotate, ctx.interleaved, not ctx.inverse)
        if x is not None:
            dcos, dsin = rope_table_grad(grad, x, cos, rotate, ctx.interleaved, ctx.inverse)
        return None, dx, dcos, dsin, None, None, None


class _RopeQK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
        q, k, *tables, ctx.interleaved, ctx.inverse = args
        needs = ctx.needs_input_grad[1:]
        ctx.save_for_backward(q if any(needs[2:4]) else None, k if any(needs[4:6]) else None, *tables)
        ctx.set_materialize_grads(False)
        rotated_q, rotated_k = _below_autograd(rope_qk, keyset, args)
        return rotated_q, rotated_k

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> _Grads:
        q, k, cos_q, sin_q, cos_k, sin_k, rotate_q, rotate_k = ctx.saved_tensors
        layout, inverse, needs = ctx.interleaved, ctx.inverse, ctx.needs_input_grad[1:]
        dq = dk = dcos_q = dsin_q = dcos_k = dsin_k = None
        want_q, want_k = needs[0] and grad_q is not None, needs[1] and grad_k is not None
        if want_q and want_k:
            dq, dk = rope_qk(grad_q, grad_k, cos_q, sin_q, cos_k, sin_k, rotate_q, rotate_k, layout, not inverse)
        elif want_q:
            dq = rope(grad_q, cos_q, sin_q, rotate_q, layout, not inverse)
        elif want_k:
            dk = rope(grad_k, cos_k, sin_k, rotate_k, layout, not inverse)
        if q is not None and grad_q is not None:
            dcos_q, dsin_q = rope_table_grad(grad_q, q, cos_q, rotate_q, layout, inverse)
        if k is not None and grad_k is not None:
            dcos_k, dsin_k = rope_table_grad(grad_k, k, cos_k, rotate_k, layout, inverse)
        return None, dq, dk, dcos_q, dsin_q, dcos_k, dsin_k, None, None, None, None


class _RopeTableGrad(torch.autograd.Function):
    """Bilinear: <ddcos, dcos> + <ddsin, dsin> = <grad, rope(x; ddcos, ddsin)> over the channels that are rotated."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
        grad, x, cos, rotate, ctx.interleaved, ctx.inverse = args
        ctx.pairs = cos.shape[-1]
        ctx.save_for_backward(grad, x, rotate)
        dcos, dsin = _below_autograd(rope_table_grad, keyset, args)
        return dcos, dsin

    @staticmethod
    def backward(ctx: Any, ddcos: Tensor, ddsin: Tensor) -> _Grads:
        grad, x, rotate = ctx.saved_tensors

        def rotated_part(t: Tensor, inverse: bool) -> Tensor:
            channels = 2 * ctx.pairs
            turned = rope(t[..., :channels], ddcos, ddsin, None, ctx.interleaved, inverse)
            if rotate is not None:
                turned = torch.where((rotate if rotate.dim() == 2 else rotate[None])[:, None, :, None], turned, 0)
            return torch.nn.functional.pad(turned, (0, t.shape[-1] - channels))

        dgrad = rotated_part(x, ctx.inverse) if ctx.needs_input_grad[1] else None
        dx = rotated_part(grad, not ctx.inverse) if ctx.needs_input_grad[2] else None
        return None, dgrad, dx, None, None, None, None


_register_autograd(rope, _Rope)
_register_autograd(rope_qk, _RopeQK)
_register_autograd(rope_table_grad, _RopeTableGrad)


# rope_attention


@torch.library.register_fake("x_rope_cls::rope_attention")
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_q: Tensor | None,
    sin_q: Tensor | None,
    cos_k: Tensor | None,
    sin_k: Tensor | None,
    rotate_q: Tensor | None,
    rotate_k: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    cls_rope: int,
    interleaved: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    args = checks.AttentionArguments(
        q, k, v, cos_q, sin_q, cos_k, sin_k, rotate_q, rotate_k, attn_mask, key_mask, seed, cls_rope, scale, dropout_p
    )
    checks.check_attention("rope_attention", args)
    lse = q.new_empty(q.shape[:3], dtype=checks.compute_dtype(q))
    return _tokens_outside_heads(q, v.shape[-1]), lse


@torch.library.register_fake("x_rope_cls::rope_attention_backward")
def _attention_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cos_q: Tensor | None,
    sin_q: Tensor | None,
    cos_k: Tensor | None,
    sin_k: Tensor | None,
    rotate_q: Tensor | None,
    rotate_k: Tensor | None,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    cls_rope: int,
    interleaved: bool,
    scale: float,
    dropout_p: float,
    need_bias_grad: bool,
    need_table_grad: bool,
) -> tuple[Tensor, ...]:
    args = checks.AttentionArguments(
        q, k, v, cos_q, sin_q, cos_k, sin_k, rotate_q, rotate_k, attn_mask, key_mask, seed, cls_rope, scale, dropout_p
    )
    gradients = checks.AttentionGradients(grad_out, grad_lse, out, lse, need_bias_grad, need_table_grad)
    checks.check_attention_backward(args, gradients)

    def like(t: Tensor | None, wanted: bool) -> Tensor:
        return q.new_empty(t.shape if t is not None and wanted else (0,), dtype=checks.compute_dtype(q))

    dqkv = (_tokens_outside_heads(t, t.shape[-1]) for t in (q, k, v))
    tables = (like(t, need_table_grad) for t in (cos_q, sin_q, cos_k, sin_k))
    return (*dqkv, like(attn_mask, need_bias_grad), *tables)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = _below_autograd(rope_attention, keyset, args)
        ctx.save_for_backward(*args[:3], out, lse, *args[3:12])
        ctx.options = args[12:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> _Grads:
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        attn_mask, need_bias_grad, need_table_grad = saved[11], needs[9], any(needs[3:7])
        if grad_out is None:
            grad_out = torch.zeros_like(saved[3])
        dq, dk, dv, dbias, *dtables = rope_attention_backward(
            grad_out, grad_lse, *saved, *ctx.options, need_bias_grad, need_table_grad
        )
        dqkv = [gradient if needed else None for gradient, needed in zip((dq, dk, dv), needs[:3], strict=True)]
        dtables = [dtable if needed else None for dtable, needed in zip(dtables, needs[3:7], strict=True)]
        dbias = dbias.to(attn_mask.dtype) if need_bias_grad else None
        return (None, *dqkv, *dtables, None, None, dbias, *(None,) * 6)


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = _below_autograd(rope_attention_backward, keyset, args)
        return gradients

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> _Grads:
        raise RuntimeError(
            "rope_attention: order of differentiation must be at most 1, got 2; "
            "x_rope_cls.reference.rope_attention can be differentiated any number of times"
        )


_register_autograd(rope_attention, _Attention)
_register_autograd(rope_attention_backward, _AttentionBackward)


# late_cls_pool


@torch.library.register_fake("x_rope_cls::late_cls_pool")
def _pool_fake(
    x: Tensor,
    query: Tensor,
    key_mask: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: float,
    norm: int,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    args = checks.PoolArguments(x, query, key_mask, norm_weight, norm_bias, scale, norm, norm_eps)
    checks.check_pool("late_cls_pool", args)
    shape = (x.shape[0], *query.shape[1:])
    return x.new_empty(shape), x.new_empty(shape[:3], dtype=checks.compute_dtype(x))


@torch.library.register_fake("x_rope_cls::late_cls_pool_backward")
def _pool_backward_fake(
    grad: Tensor,
    grad_lse: Tensor | None,
    x: Tensor,
    query: Tensor,
    pooled: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: float,
    norm: int,
    norm_eps: float,
    need_x_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = checks.PoolArguments(x, query, key_mask, norm_weight, norm_bias, scale, norm, norm_eps)
    checks.check_pool_backward(args, grad, grad_lse, pooled, lse)

    def like(t: Tensor | None) -> Tensor:
        return x.new_empty((0,) if t is None else t.shape, dtype=checks.compute_dtype(x))

    dx = x.new_empty(x.shape if need_x_grad else (0,))
    return dx, query.new_empty(query.shape), like(norm_weight), like(norm_bias)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
        pooled, lse = _below_autograd(late_cls_pool, keyset, args)
        x, query, key_mask, norm_weight, norm_bias, *ctx.options = args
        ctx.save_for_backward(x, query, pooled, lse, key_mask, norm_weight, norm_bias)
        ctx.set_materialize_grads(False)
        return pooled, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> _Grads:
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if grad is None:
            grad = torch.zeros_like(saved[2])
        dx, dquery, dweight, dbias = late_cls_pool_backward(grad, grad_lse, *saved, *ctx.options, needs[0])
        wanted = (needs[0], needs[1], needs[3], needs[4])
        dx, dquery, dweight, dbias = (
            gradient if needed else None for gradient, needed in zip((dx, dquery, dweight, dbias), wanted, strict=True)
        )
        return None, dx, dquery, None, dweight, dbias, None, None, None


class _PoolBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = _below_autograd(late_cls_pool_backward, keyset, args)
        return gradients

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> _Grads:
        raise RuntimeError(
            "late_cls_pool: order of differentiation must be at most 1, got 2; "
            "x_rope_cls.reference.late_cls_pool can be differentiated any number of times"
        )


_register_autograd(late_cls_pool, _Pool)
_register_autograd(late_cls_pool_backward, _PoolBackward)


# autocast


def _register_autocast(op: Any, count: int, device: str, key: str) -> None:
    """Casts the first ``count`` arguments, as scaled_dot_product_attention does; tables, biases and norms are not."""
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return op(*(cast(t, dtype) for t in args[:count]), *args[count:])

    _library.impl(op, kernel, key)


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _register_autocast(rope_attention, 3, _device, _key)
    _register_autocast(late_cls_pool, 2, _device, _key)


def _tokens_outside_heads(like: Tensor, channels: int) -> Tensor:
    """An empty (batch, heads, tokens, channels) tensor in (batch, tokens, heads, channels) memory order."""
    batch, heads, tokens = like.shape[:3]
    return like.new_empty((batch, tokens, heads, channels)).transpose(1, 2)
