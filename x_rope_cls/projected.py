"""late_cls_pool between the projections around it, as one call of the CPU kernels.

The same sums as :mod:`x_rope_cls.pooling` does step by step: W_k into the queries, pooling, W_v behind it. With one CLS
token the steps between the kernels take about as long as the kernels, so they are not taken one by one where nothing
but plain tensors on a CPU is there. The projections in front of and behind it all, W_q and W_out, may come along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import functional
from ._layers import TokenNorm

_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_PLAIN = (Tensor, nn.Parameter)
_MOST_ROWS = 512  # of one key head: their products are for few rows

# Tests that put other kernels in the place of the CPU's take it out.
devices = {"cpu"}

# What OpOverload.__call__ calls, and nothing else: a call in Python less.
_forward = torch.ops.x_rope_cls._pool_projected.default._op
_backward = torch.ops.x_rope_cls._pool_projected_backward.default._op

# Kernels leave nothing else in the caches: after them a name that is looked up in a module, and a function that nobody
# else calls, take a microsecond and more each.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # tensors of other kinds of tracing are not plain
_is_autocast_enabled = torch.is_autocast_enabled
_in_functorch = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack


class Weights(NamedTuple):
    """Projections without bias.

    Attributes:
        k: (key_heads * key_dim, channels).
        v: (key_heads * value_dim, channels).
        q: (heads * key_dim, dim), or None: queries are projected already.
        out: (out_dim, heads * value_dim), or None: the result is that of each head.
    """

    k: Tensor
    v: Tensor
    q: Tensor | None = None
    out: Tensor | None = None


def serves(x: Tensor, q: Tensor, weights: Weights, rows: int) -> bool:
    """Whether :func:`pool_projected` can be called in the place of its steps.

    Args:
        x: tokens.
        q: queries.
        weights: of all projections.
        rows: of the queries of a batch, for each key head.
    """
    if _is_dynamo_compiling() or not (x.is_cpu and "cpu" in devices) or _is_autocast_enabled("cpu"):
        return False
    if _in_functorch() or forward_ad._current_level >= 0 or _dispatch_modes() > 0:  # or somebody watches the operators
        return False
    return x.dtype in _DTYPES and rows <= _MOST_ROWS and _all_plain(x.dtype, (x, q, *weights))


def _all_plain(dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> bool:
    for t in tensors:  # noqa: SIM110 (one call in Python less)
        if t is not None and (type(t) not in _PLAIN or t.dtype != dtype or 0 in t.shape):
            return False
    return True


def pool_projected(
    x: Tensor,
    q: Tensor,
    weights: Weights,
    heads: int,
    cyclic: bool,
    key_mask: Tensor | None,
    norm: TokenNorm | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What is pooled of x by queries q, with the projections.

    Args:
        x: (batch, tokens, channels).
        q: (batch or 1, queries, heads, key_dim); with weights.q (batch or 1, queries, dim), or (queries, dim): the
            same for the whole batch.
        weights: of the projections.
        heads: query heads.
        cyclic: query head h reads key head ``h % key_heads``; else ``h // (heads / key_heads)``.
        key_mask: bool (batch, tokens), True: attend.
        norm: normalisation of x over its channels.
        scale: factor of the scores.

    Returns:
        (batch, queries, heads, value_dim), with weights.out (batch, queries, out_dim), and lse (batch, heads,
        queries).
    """
    norm_weight = norm_bias = None
    kind, eps = 0, 1e-5
    if norm is not None:
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        norm_weight, norm_bias = (None if t is None else t.to(compute) for t in (norm.weight, norm.bias))
        kind, eps = functional.POOL_NORM[norm.kind], norm.eps
    arguments = (x, q, *weights, key_mask, norm_weight, norm_bias, heads, cyclic, scale, kind, eps)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        out, lse = _apply(*arguments)
    else:
        out, lse, _ = _forward(*arguments)
    return out, lse


class _PoolProjected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse, saved = _forward(*args)
        ctx.save_for_backward(lse, saved, *args[:9])
        ctx.options = args[9:]
        ctx.shape = out.shape
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: who differentiates these gradients gets an error
            return _gradients_once(ctx, grad, grad_lse)
        return _gradients(ctx, grad, grad_lse)


# Without what torch.autograd.Function.apply does for functorch, which `serves` has refused.
_apply = super(torch.autograd.Function, _PoolProjected).apply


def _gradients(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if grad is None:
        grad = saved[1].new_zeros(ctx.shape)
    need_weights = needs[2] or needs[3] or needs[4] or needs[5]
    gradients = _backward(grad, grad_lse, *saved, *ctx.options, needs[0], need_weights)
    dx, dq, dk, dv, dq_weight, dout, dweight, dbias = gradients
    return (
        dx if needs[0] else None,
        dq if needs[1] else None,
        dk if needs[2] else None,
        dv if needs[3] else None,
        dq_weight if needs[4] else None,
        dout if needs[5] else None,
        None,
        dweight if needs[7] else None,
        dbias if needs[8] else None,
        *(None,) * 5,
    )


_gradients_once = once_differentiable(_gradients)
