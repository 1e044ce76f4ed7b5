"""The checks of csrc/torch/checks.h once more, for fake tensors: the same conditions, order and texts.

A test compares both sides. Sizes may be symbolic here; a check then becomes a guard of the compiled code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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


def compute_dtype(t: Tensor) -> torch.dtype:
    """The dtype of tables, logsumexp and accumulation for tensors such as t."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def rope(op: str, x: Tensor, cos: Tensor, sin: Tensor, rotate: Tensor | None) -> None:
    pass


def rope_table_grad(grad: Tensor, x: Tensor, cos: Tensor, rotate: Tensor | None) -> None:
    pass


def attention(op: str, a: AttentionArguments) -> None:
    pass


def attention_backward(
    a: AttentionArguments,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    need_bias_grad: bool,
    need_table_grad: bool,
) -> None:
    pass
