"""What the C++ operators need on the Python side: fake kernels, derivatives and the autocast rule.

Importing this module registers all of it. The operators themselves are in csrc/torch; their schemas are documented
there, their meaning in :mod:`x_rope_cls.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _op_checks as checks

_Grads = tuple[Tensor | None, ...]

_library = torch.library.Library("x_rope_cls", "IMPL")  # registrations live as long as this object
_ops = torch.ops.x_rope_cls


# rope


@torch.library.register_fake("x_rope_cls::rope")
def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, rotate: Tensor | None, interleaved: bool, inverse: bool) -> Tensor:
    checks.check_rope(x, cos, sin, rotate)
    return _tokens_outside_heads(x, x.shape[-1])


@torch.library.register_fake("x_rope_cls::rope_table_grad")
def _rope_table_grad_fake(
    grad: Tensor, x: Tensor, cos: Tensor, rotate: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    checks.check_rope_table_grad(grad, x, cos, rotate)
    return cos.new_empty(cos.shape), cos.new_empty(cos.shape)


def _rope_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, rotate, ctx.interleaved, ctx.inverse = inputs
    tables_need_grad = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if tables_need_grad else None, cos, sin, rotate)


def _rope_backward(ctx: Any, grad: Tensor) -> _Grads:
    x, cos, sin, rotate = ctx.saved_tensors
    dx = dcos = dsin = None
    if ctx.needs_input_grad[0]:
        dx = _ops.rope(grad, cos, sin, rotate, ctx.interleaved, not ctx.inverse)
    if x is not None:
        dcos, dsin = _ops.rope_table_grad(grad, x, cos, rotate, ctx.interleaved, ctx.inverse)
    return dx, dcos, dsin, None, None, None


def _rope_table_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, x, cos, rotate, ctx.interleaved, ctx.inverse = inputs
    ctx.pairs = cos.shape[-1]
    ctx.save_for_backward(grad, x, rotate)


def _rope_table_grad_backward(ctx: Any, ddcos: Tensor, ddsin: Tensor) -> _Grads:
    """The operator is bilinear: <ddcos, dcos> + <ddsin, dsin> = <grad, rope(x; ddcos, ddsin)> over what is rotated."""
    grad, x, rotate = ctx.saved_tensors

    def rotated_part(t: Tensor, inverse: bool) -> Tensor:
        channels = 2 * ctx.pairs
        turned = _ops.rope(t[..., :channels], ddcos, ddsin, None, ctx.interleaved, inverse)
        if rotate is not None:
            turned = torch.where((rotate if rotate.dim() == 2 else rotate[None])[:, None, :, None], turned, 0)
        return torch.nn.functional.pad(turned, (0, t.shape[-1] - channels))

    dgrad = rotated_part(x, ctx.inverse) if ctx.needs_input_grad[0] else None
    dx = rotated_part(grad, not ctx.inverse) if ctx.needs_input_grad[1] else None
    return dgrad, dx, None, None, None, None


torch.library.register_autograd("x_rope_cls::rope", _rope_backward, setup_context=_rope_setup)
torch.library.register_autograd(
    "x_rope_cls::rope_table_grad", _rope_table_grad_backward, setup_context=_rope_table_grad_setup
)


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


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:12], inputs[12:]
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.set_materialize_grads(False)


def _attention_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> _Grads:
    saved = ctx.saved_tensors
    needs = ctx.needs_input_grad
    attn_mask, need_bias_grad, need_table_grad = saved[11], needs[9], any(needs[3:7])
    if grad_out is None:
        grad_out = torch.zeros_like(saved[3])
    dq, dk, dv, dbias, *dtables = _ops.rope_attention_backward(
        grad_out, grad_lse, *saved, *ctx.options, need_bias_grad, need_table_grad
    )
    dtables = [dtable if needed else None for dtable, needed in zip(dtables, needs[3:7], strict=True)]
    dqkv = [gradient if needed else None for gradient, needed in zip((dq, dk, dv), needs[:3], strict=True)]
    dbias = dbias.to(attn_mask.dtype) if need_bias_grad else None
    return (*dqkv, *dtables, None, None, dbias, *(None,) * 6)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> _Grads:
    raise RuntimeError(
        "rope_attention: order of differentiation must be at most 1, got 2; "
        "x_rope_cls.reference.rope_attention can be differentiated any number of times"
    )


torch.library.register_autograd("x_rope_cls::rope_attention", _attention_backward, setup_context=_attention_setup)
torch.library.register_autograd("x_rope_cls::rope_attention_backward", _no_second_derivative)


def _register_attention_autocast(device: str, key: str) -> None:
    """Casts q, k and v, as scaled_dot_product_attention does; tables and bias keep their precision."""
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return _ops.rope_attention(cast(q, dtype), cast(k, dtype), cast(v, dtype), *rest)

    _library.impl("rope_attention", attention, key)


_register_attention_autocast("cpu", "AutocastCPU")
_register_attention_autocast("cuda", "AutocastCUDA")


def _tokens_outside_heads(like: Tensor, channels: int) -> Tensor:
    """An empty (batch, heads, tokens, channels) tensor in (batch, tokens, heads, channels) memory order."""
    batch, heads, tokens = like.shape[:3]
    return like.new_empty((batch, tokens, heads, channels)).transpose(1, 2)
