"""Runs a case through the operators and through the reference, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from backends import each_backend
from strategies import AttentionCase
from tolerance import SLACK, assert_close, gradient_slack
from torch import Tensor

from x_rope_cls import Rotary, reference

CODES = {"rotate": 0, "skip": 1, "mask": 2}


def call_operator(case: AttentionCase) -> tuple[Tensor, Tensor]:
    """The operator itself, which unlike the public function takes a seed."""

    def parts(rotary: Rotary | None) -> tuple[Any, ...]:
        return (None,) * 3 if rotary is None else (rotary.cos, rotary.sin, rotary.rotate)

    (cos_q, sin_q, rotate_q), (cos_k, sin_k, rotate_k) = parts(case.rotary_q), parts(case.rotary_k)
    seed = torch.tensor(case.seed, dtype=torch.int64) if case.dropout_p > 0 else None
    interleaved = case.rotary_q is None or case.rotary_q.interleaved
    return torch.ops.x_rope_cls.rope_attention(
        *(case.q, case.k, case.v, cos_q, sin_q, cos_k, sin_k, rotate_q, rotate_k, case.attn_mask, case.key_mask, seed),
        *(CODES[case.cls_rope], interleaved, case.scale, case.dropout_p),
    )


def call_reference(case: AttentionCase) -> tuple[Tensor, Tensor]:
    return reference.rope_attention(
        case.q,
        case.k,
        case.v,
        case.rotary_q,
        rotary_k=case.rotary_k,
        cls_rope=case.cls_rope,
        attn_mask=case.attn_mask,
        key_mask=case.key_mask,
        dropout_p=case.dropout_p,
        scale=case.scale,
        return_lse=True,
        seed=case.seed,
    )


def in_float64(case: AttentionCase) -> AttentionCase:
    return case.with_tensors({name: t.double() for name, t in case.differentiable().items()})


def output_weights(case: AttentionCase) -> tuple[Tensor, Tensor]:
    """Random gradients of the outputs, in the dtypes of the outputs."""
    generator = torch.Generator().manual_seed(1)
    B, H, N, _ = case.q.shape
    out = torch.randn(B, H, N, case.v.shape[-1], generator=generator).to(case.q.dtype)
    lse_dtype = torch.float64 if case.q.dtype == torch.float64 else torch.float32
    return out, torch.randn(B, H, N, generator=generator).to(lse_dtype)


def forward_backward(
    call: Any, case: AttentionCase, weights: tuple[Tensor | None, Tensor | None]
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Outputs, and gradients of ``<out, weights[0]> + <lse, weights[1]>`` by name; None leaves an output out."""
    leaves = {name: t.detach().requires_grad_() for name, t in case.differentiable().items()}
    outputs = call(case.with_tensors(leaves))
    used = [(o, w.to(o.dtype)) for o, w in zip(outputs, weights, strict=True) if w is not None]
    gradients = torch.autograd.grad(
        [o for o, _ in used], list(leaves.values()), [w for _, w in used], allow_unused=True, materialize_grads=True
    )
    return tuple(o.detach() for o in outputs), dict(zip(leaves, gradients, strict=True))


def work(case: AttentionCase) -> float:
    """Multiplications of one forward pass."""
    return case.q.shape[:3].numel() * case.k.shape[2] * (case.q.shape[3] + case.v.shape[3])


def check_forward(case: AttentionCase, scores: float = 0.0) -> None:
    """Asserts that the operator's outputs are as near to float64 as eager PyTorch's, on every instruction set.

    Args:
        case: the arguments.
        scores: the largest score, where it is above 32.
    """
    slack = SLACK[case.q.dtype] * max(1.0, scores / 32)
    eager, exact = call_reference(case), call_reference(in_float64(case))
    for backend in each_backend(work(case)):
        out, lse = call_operator(case)
        assert out.dtype == case.q.dtype
        assert out.transpose(1, 2).is_contiguous()
        assert lse.is_contiguous()
        assert_close(out, eager[0], exact[0], case.q.dtype, f"{backend}: out", slack)
        assert_close(lse, eager[1], exact[1], case.q.dtype, f"{backend}: lse", slack)


def check_backward(case: AttentionCase, use_out: bool = True, use_lse: bool = True) -> None:
    """Asserts the same of outputs and of every gradient."""
    weights = output_weights(case)
    weights = (weights[0] if use_out else None, weights[1] if use_lse else None)
    eager, eager_gradients = forward_backward(call_reference, case, weights)
    exact, exact_gradients = forward_backward(call_reference, in_float64(case), weights)
    for backend in each_backend(4 * work(case)):
        outputs, gradients = forward_backward(call_operator, case, weights)
        for name, *of in zip(("out", "lse"), outputs, eager, exact, strict=True):
            assert_close(*of, case.q.dtype, f"{backend}: {name}")
        for name, gradient in gradients.items():
            assert gradient.dtype == case.differentiable()[name].dtype
            of = (gradient, eager_gradients[name], exact_gradients[name])
            summands = (
                case.q.shape[:3].numel() * case.k.shape[2] / max(gradient.numel(), 1) if name == "attn_mask" else 1
            )
            assert_close(*of, case.q.dtype, f"{backend}: gradient of {name}", gradient_slack(case.q.dtype, summands))
