"""Arguments of pool_attention, and the function itself written out in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from strategies import DTYPES, Generator
from torch import Tensor

from x_rope_cls._layers import TokenNorm
from x_rope_cls.pooling import Pooled, pool_attention

TENSORS = ("x", "q", "k_weight", "v_weight", "k_bias", "v_bias", "norm_weight", "norm_bias", "extra")


@dataclass
class PoolCase:
    """Arguments of one call; the norm's tensors apart, so that they can be leaves."""

    x: Tensor
    q: Tensor
    k_weight: Tensor
    v_weight: Tensor
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    extra: Tensor | None = None
    key_mask: Tensor | None = None
    norm: str | None = None
    scale: float | None = None
    head_order: str = "block"

    def tensors(self) -> dict[str, Tensor]:
        return {name: t for name in TENSORS if (t := getattr(self, name)) is not None}

    def double(self) -> PoolCase:
        return replace(self, **{name: t.double() for name, t in self.tensors().items()})

    def leaves(self) -> PoolCase:
        return replace(self, **{name: t.detach().requires_grad_() for name, t in self.tensors().items()})

    def token_norm(self) -> TokenNorm | None:
        return None if self.norm is None else TokenNorm(self.norm, self.norm_weight, self.norm_bias, 1e-3)


def call(case: PoolCase, **options: Any) -> Pooled:
    return pool_attention(
        *(case.x, case.q, case.k_weight, case.v_weight),
        **{name: getattr(case, name) for name in ("k_bias", "v_bias", "extra", "key_mask", "scale", "head_order")},
        norm=case.token_norm(),
        **{"return_lse": True, "need_weights": True, **options},
    )


def plain(case: PoolCase, attn_mask: Tensor | None = None, key_norm: Any = None) -> Pooled:
    """Keys and values formed, one softmax over all keys, nothing clever."""
    x, (B, N, C), (_, M, H, D) = case.x, case.x.shape, case.q.shape
    extra = 0 if case.extra is None else case.extra.shape[1]
    mask = torch.ones(B, extra + N, dtype=torch.bool)
    if case.key_mask is not None:
        mask[:, extra:] = case.key_mask
        x = torch.where(case.key_mask[..., None], x, 0)
    if case.norm == "layer":
        x = F.layer_norm(x, (C,), case.norm_weight, case.norm_bias, 1e-3)
    elif case.norm == "rms":
        x = x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
        x = x if case.norm_weight is None else x * case.norm_weight
    if case.extra is not None:
        x = torch.cat((case.extra.expand(B, -1, -1), x), dim=1)
    k, v = F.linear(x, case.k_weight, case.k_bias), F.linear(x, case.v_weight, case.v_bias)
    key_heads = k.shape[-1] // D
    k, v = (t.unflatten(-1, (key_heads, -1)).transpose(1, 2) for t in (k, v))
    k = k if key_norm is None else key_norm(k)
    head = torch.arange(H)
    head = head % key_heads if case.head_order == "cyclic" else head // (H // key_heads)
    scores = case.q.transpose(1, 2) @ k[:, head].mT * (D**-0.5 if case.scale is None else case.scale)
    allowed = mask[:, None, None].expand(B, H, M, -1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = allowed & F.pad(attn_mask.expand(B, H, M, N), (extra, 0), value=True)
    elif attn_mask is not None:
        scores = scores + F.pad(attn_mask.expand(B, H, M, N), (extra, 0))
    dead = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed & ~dead, -torch.inf)
    weights = scores.softmax(-1).masked_fill(dead, 0)
    compute = torch.promote_types(scores.dtype, torch.float32)
    lse = scores.to(compute).logsumexp(-1).masked_fill(dead[..., 0], -torch.inf)
    return Pooled((weights @ v[:, head]).transpose(1, 2), lse, weights)


@st.composite
def pool_cases(draw: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> PoolCase:
    g = Generator(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    key_heads, group = draw(st.sampled_from(((1, 1), (2, 1), (3, 1), (1, 4), (2, 2), (3, 2))))
    B, M, H = draw(st.integers(1, 3)), draw(st.integers(1, 5)), key_heads * group
    N, C = draw(st.sampled_from((0, 1, 2, 7, 16, 33))), draw(st.sampled_from((1, 5, 8, 24)))
    D, Dv = draw(st.sampled_from(((4, 4), (8, 8), (5, 3), (1, 7))))
    norm = draw(st.sampled_from((None, "layer", "rms")))
    affine = norm is not None and draw(st.booleans())

    def maybe(*shape: int) -> Tensor | None:
        return g.normal(*shape, dtype=dtype) if draw(st.booleans()) else None

    mask = draw(st.sampled_from(("none", "some", "dead", "all")))
    key_mask = None if mask == "none" else g.chance(1.0 if mask == "all" else 0.6, B, N)
    if mask == "dead":
        key_mask[0] = False
    return PoolCase(
        g.normal(B, N, C, dtype=dtype),
        g.normal(draw(st.sampled_from((1, B))), M, H, D, dtype=dtype),
        g.normal(key_heads * D, C, dtype=dtype) * C**-0.5,
        g.normal(key_heads * Dv, C, dtype=dtype) * C**-0.5,
        maybe(key_heads * D),
        maybe(key_heads * Dv),
        g.normal(C, dtype=dtype) if affine else None,
        g.normal(C, dtype=dtype) if affine and norm == "layer" else None,
        g.normal(draw(st.sampled_from((1, B))), draw(st.integers(1, 3)), C, dtype=dtype)
        if draw(st.booleans())
        else None,
        key_mask,
        norm,
        draw(st.sampled_from((None, 0.3))),
        draw(st.sampled_from(("block", "cyclic"))),
    )
