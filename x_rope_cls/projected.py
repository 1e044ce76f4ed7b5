"""late_cls_pool between the projections folded around it, as one call of the CPU kernels.

The same sums as :mod:`x_rope_cls.pooling` does step by step: W_k into the queries, pooling, W_v behind it. With one CLS
token the steps between the kernels take about as long as the kernels, so they are not taken one by one where nothing
but plain tensors on a CPU is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import functional
from ._layers import TokenNorm

_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_PLAIN = (Tensor, nn.Parameter)
_MOST_ROWS = 512  # of one key head: their products are for few rows

# Tests that put other kernels in the place of the CPU's clear it.
devices = {"cpu"}

_forward = torch.ops.x_rope_cls._pool_projected.default
_backward = torch.ops.x_rope_cls._pool_projected_backward.default


def serves(x: Tensor, q: Tensor, k_weight: Tensor, v_weight: Tensor, key_heads: int) -> bool:
    """Whether :func:`pool_projected` can be called in the place of its steps."""
    if torch.compiler.is_compiling() or x.device.type not in devices or torch.is_autocast_enabled("cpu"):
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    dtype = x.dtype
    tensors = (x, q, k_weight, v_weight)
    if dtype not in _DTYPES or any(type(t) not in _PLAIN or t.dtype != dtype or not t.numel() for t in tensors):
        return False
    return x.shape[0] * q.shape[1] * q.shape[2] <= _MOST_ROWS * key_heads


def pool_projected(
    x: Tensor,
    q: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    key_mask: Tensor | None,
    norm: TokenNorm | None,
    scale: float,
    cyclic: bool,
) -> tuple[Tensor, Tensor]:
    """What is pooled of x by queries q, with both projections.

    Args:
        x: (batch, tokens, channels).
        q: (batch or 1, queries, heads, key_dim), projected.
        k_weight: (key_heads * key_dim, channels).
        v_weight: (key_heads * value_dim, channels).
        key_mask: bool (batch, tokens), True: attend.
        norm: normalisation of x over its channels.
        scale: factor of the scores.
        cyclic: query head h reads key head ``h % key_heads``; else ``h // (heads / key_heads)``.

    Returns:
        (batch, queries, heads, value_dim), and lse (batch, heads, queries).
    """
    options: tuple[Any, ...] = (None, None, scale, 0, 1e-5)
    if norm is not None:
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight, bias = (None if t is None else t.to(compute) for t in (norm.weight, norm.bias))
        options = (weight, bias, scale, functional.POOL_NORM[norm.kind], norm.eps)
    arguments = (x, q, k_weight, v_weight, key_mask, *options, cyclic)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        out, lse = _PoolProjected.apply(*arguments)
    else:
        out, _, _, lse = _forward(*arguments)
    return out, lse


class _PoolProjected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, folded, pooled, lse = _forward(*args)
        ctx.save_for_backward(*args[:4], folded, pooled, lse, *args[4:7])
        ctx.options = args[7:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if grad is None:
            q, v_weight, pooled = saved[1], saved[3], saved[5]
            values = v_weight.shape[0] * q.shape[3] // saved[2].shape[0]
            grad = pooled.new_zeros((pooled.shape[0], *q.shape[1:3], values))
        gradients = _backward(grad, grad_lse, *saved, *ctx.options, needs[0], needs[2] or needs[3])
        wanted = (*needs[:4], *needs[5:7])
        dx, dq, dk, dv, dweight, dbias = (
            gradient if needed else None for gradient, needed in zip(gradients, wanted, strict=True)
        )
        return dx, dq, dk, dv, None, dweight, dbias, None, None, None, None
