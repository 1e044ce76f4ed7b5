"""x-transformers with its rotation and its scores replaced by plain PyTorch: what "skip" and "mask" must compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import x_transformers.attend as xt_attend
import x_transformers.x_transformers as xt
from torch import Tensor

_plain_rotation = xt.apply_rotary_pos_emb


def _rotated(t: Tensor, freqs: Tensor, heads: int) -> Tensor:
    """The last tokens of the last heads rotated; tokens in front (memory key/values) are left as they are."""
    front = max(t.shape[-2] - freqs.shape[-2], 0)
    still, turned = t[:, : t.shape[1] - heads], t[:, t.shape[1] - heads :]
    turned = torch.cat((turned[..., :front, :], _plain_rotation(turned[..., front:, :], freqs)), dim=-2)
    return torch.cat((still, turned), dim=1)


@contextmanager
def emulated(cls_rope: str, rotate: Tensor, monkeypatch: pytest.MonkeyPatch, heads: int) -> Iterator[None]:
    """Makes x-transformers score tokens without a position (rotate False) as cls_rope says."""
    freqs_of: dict[str, Tensor] = {}

    def skip(t: Tensor, freqs: Tensor, scale: float = 1) -> Tensor:
        keep = rotate if freqs.shape[-2] == rotate.shape[-1] else torch.ones(freqs.shape[-2], dtype=torch.bool)
        keep = keep[..., -t.shape[-2] :, None]
        return torch.where(keep if keep.dim() == 2 else keep[:, None], _plain_rotation(t, freqs, scale), t)

    def remember(t: Tensor, freqs: Tensor, scale: float = 1) -> Tensor:
        freqs_of["k" if "q" in freqs_of else "q"] = freqs
        return t

    def scores(q: Tensor, k: Tensor) -> Tensor:
        k = k[:, None] if k.dim() == 3 else k
        raw = torch.matmul(q, k.transpose(-1, -2))
        if not freqs_of:
            return raw
        freqs_q, freqs_k = freqs_of.pop("q"), freqs_of.pop("k")
        rotated_k = _rotated(k, freqs_k, heads if k.shape[1] > 1 else 1)
        rotated = torch.matmul(_rotated(q, freqs_q, heads), rotated_k.transpose(-1, -2))
        mask_k = rotate if freqs_k.shape[-2] == rotate.shape[-1] else torch.ones(freqs_k.shape[-2], dtype=torch.bool)
        mask_k = F.pad(mask_k, (k.shape[-2] - mask_k.shape[-1], 0), value=False)
        mask_q = rotate[..., -q.shape[-2] :]
        both = mask_q[..., :, None] & mask_k[..., None, :]
        return torch.where(both if both.dim() == 2 else both[:, None], rotated, raw)

    def einsum(equation: str, *operands: Tensor) -> Tensor:
        is_scores = equation.endswith("-> b h i j")
        return scores(*operands) if is_scores else torch.einsum(equation, *operands)

    def squared_distance(q: Tensor, k: Tensor) -> Tensor:
        k = k[:, None] if k.dim() == 3 else k
        return q.square().sum(-1)[..., None] + k.square().sum(-1)[..., None, :] - 2 * scores(q, k)

    with monkeypatch.context() as patch:
        patch.setattr(xt, "apply_rotary_pos_emb", skip if cls_rope == "skip" else remember)
        if cls_rope == "mask":
            patch.setattr(xt_attend, "einsum", einsum)
            patch.setattr(xt_attend, "qk_l2_dist_squared", squared_distance)
        yield


def exact_softmax(*encoders: Any) -> None:
    """Takes the softmax in the dtype of the scores; x-transformers has it in float32 unless attn_qk_norm is set."""
    for encoder in encoders:
        for module in encoder.modules():
            if isinstance(module, xt_attend.Attend) and getattr(module.attn_fn, "func", None) is F.softmax:
                module.attn_fn = partial(F.softmax, dim=module.attn_fn.keywords["dim"])


def rotated_heads(encoder: Any) -> int:
    """How many heads of each attention layer are rotated."""
    return next(m for m in encoder.modules() if isinstance(m, xt.Attention)).rotate_num_heads
