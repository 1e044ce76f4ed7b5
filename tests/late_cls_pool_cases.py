"""Calls of late_cls_pool: a hypothesis strategy of all that are allowed, and their checks against the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import torch
from backends import each_backend
from cases import forward_backward
from strategies import DTYPES, LAYOUTS, Generator, lay_out
from tolerance import SLACK, assert_close, gradient_slack, largest
from torch import Tensor

from x_rope_cls import reference

NORMS = (None, "layer", "rms")
CODES = {None: 0, "layer": 1, "rms": 2}
TOKEN_LAYOUTS = (*(name for name in LAYOUTS if name != "one_head"), "one_token")
MASKS = ("none", "random", "lengths", "one_dead", "all_dead", "mostly_dead", "transposed", "expanded", "sliced")

# Around the lanes, the four tokens of an inner product, blocks of 16 to 128 tokens and parts of 256.
TOKENS = st.sampled_from((0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 130, 255, 257))
LONG = st.sampled_from((511, 512, 513, 515, 700, 767, 769, 1023, 1025, 1291, 2051))
CHANNELS = st.sampled_from((1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 80, 96))
WIDE = st.sampled_from((127, 128, 129, 192, 255, 256, 257, 320, 384, 511, 512))
FEW = st.tuples(st.sampled_from((1, 2, 3, 4, 8, 0)), st.sampled_from((1, 1, 2, 3, 4, 5, 0)))
MANY = st.sampled_from(((17, 1), (1, 18), (3, 6), (12, 2), (5, 7), (16, 8), (1, 130), (16, 9)))


@dataclass(frozen=True)
class PoolCase:
    """Arguments of the operator late_cls_pool, and which of its tensors want no gradient."""

    x: Tensor
    query: Tensor
    key_mask: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    scale: float = 1.0
    norm: str | None = None
    norm_eps: float = 1e-5
    frozen: tuple[str, ...] = ()

    def work(self) -> float:
        """Multiplications of one product."""
        return self.x.shape.numel() * self.query.shape[1:3].numel()

    def tensors(self) -> dict[str, Tensor]:
        """All floating tensors, by name."""
        named = {name: getattr(self, name) for name in ("x", "query", "norm_weight", "norm_bias")}
        return {name: t for name, t in named.items() if t is not None}

    def differentiable(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors().items() if name not in self.frozen}

    def summands(self, name: str) -> int:
        """How many rows' contributions add up in one element of a gradient."""
        B, rows = self.x.shape[0], self.query.shape[1:3].numel()
        if name == "query":
            return B if self.query.shape[0] == 1 or self.query.stride(0) == 0 else 1
        return rows if name == "x" else B * rows

    def with_tensors(self, tensors: dict[str, Tensor]) -> PoolCase:
        return replace(self, **tensors)

    def arguments(self) -> tuple[Any, ...]:
        """In the order of the operator's schema."""
        tensors = (self.x, self.query, self.key_mask, self.norm_weight, self.norm_bias)
        return (*tensors, self.scale, CODES[self.norm], self.norm_eps)


def lay_out_tokens(t: Tensor, layout: str) -> Tensor:
    """A (batch, tokens, channels) tensor of the same shape in the named memory layout."""
    if layout == "tokens_first":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "one_token" and t.shape[1] > 0:
        return t[:, :1].contiguous().expand(t.shape)
    return lay_out(t[:, None], layout)[:, 0]


def make_key_mask(kind: str, generator: Generator, batch: int, tokens: int) -> Tensor | None:
    """A key mask; the kinds that end in "dead" leave a batch without tokens."""
    mask = generator.chance(0.7, batch, tokens)
    if kind == "none":
        return None
    if kind == "lengths":
        lengths = [generator.index(tokens + 1) for _ in range(batch)]
        return torch.arange(tokens) < torch.tensor(lengths).view(batch, 1)
    if kind == "one_dead" and batch:
        mask[generator.index(batch)] = False
    if kind == "all_dead":
        return torch.zeros(batch, tokens, dtype=torch.bool)
    if kind == "mostly_dead":
        return generator.chance(0.02, batch, tokens)
    if kind == "transposed":
        return mask.T.contiguous().T
    if kind == "expanded":
        return generator.chance(0.7, tokens).expand(batch, tokens)
    return generator.chance(0.7, batch, 2 * tokens + 1)[:, 1::2] if kind == "sliced" else mask


def _draw_sizes(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """(batch, tokens, channels, heads, queries), one of them large at a time."""
    kind = draw(st.sampled_from(("usual", "usual", "long", "wide", "batches", "rows")))
    B = draw(st.sampled_from((1, 2, 2, 3, 5, 0)))
    N, C, (H, M) = draw(TOKENS), draw(CHANNELS), draw(FEW)
    if kind == "long":
        B, N = draw(st.integers(1, 3)), draw(LONG)
    if kind == "wide":
        N, C = min(N, 130), draw(WIDE)
    if kind == "batches":
        B, N = draw(st.sampled_from((64, 65, 70, 130))), min(N, 17)
    if kind == "rows":
        N, C, (H, M) = draw(st.one_of(TOKENS, LONG)), min(C, 33), draw(MANY)
        B = min(B, 2)
    return B, N, C, H, M


@st.composite
def pool_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> PoolCase:
    """Any call of late_cls_pool that is allowed."""
    generator = Generator(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(dtypes))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    B, N, C, H, M = _draw_sizes(draw)
    norm = draw(st.sampled_from(NORMS))
    spread, mean = draw(st.sampled_from(((1.0, 0.0), (1.0, 0.0), (3.0, 1.0), (0.1, -2.0))))
    x = (spread * generator.normal(B, N, C) + mean).to(dtype) if norm else generator.normal(B, N, C, dtype=dtype)
    query_batch = draw(st.sampled_from((1, B, "expanded")))
    query = generator.normal(B if query_batch == B else 1, H, M, C, dtype=dtype)
    query = lay_out(query, draw(st.sampled_from(LAYOUTS)))
    vectors = {"norm_weight": None, "norm_bias": None}
    if norm:
        for name in draw(st.sampled_from(((), ("norm_weight",), ("norm_bias",), tuple(vectors)))):
            vectors[name] = (1.0 * (name == "norm_weight") + generator.normal(C)).to(compute)
            if draw(st.booleans()):
                vectors[name] = torch.stack((vectors[name], vectors[name]), dim=1).flatten()[::2]
    # A token of one channel has no variance.
    eps = draw(st.sampled_from((1e-5, 1e-5, 1e-6, 0.1, 0.0))) if C > 1 else 1e-5
    names = ["x", "query", *(name for name, t in vectors.items() if t is not None)]
    frozen = draw(st.one_of(st.just([]), st.lists(st.sampled_from(names), unique=True, max_size=len(names) - 1)))
    return PoolCase(
        x=lay_out_tokens(x, draw(st.sampled_from(TOKEN_LAYOUTS))),
        query=query.expand(B, H, M, C) if query_batch == "expanded" else query,
        key_mask=make_key_mask(draw(st.sampled_from((*MASKS[:3], *MASKS))), generator, B, N),
        **vectors,
        scale=draw(st.sampled_from((C**-0.5, C**-0.5, 2 * C**-0.5, 0.0, -(C**-0.5)))),
        norm=norm,
        norm_eps=eps,
        frozen=tuple(frozen),
    )


def model_case(
    B: int,
    N: int,
    C: int,
    dtype: torch.dtype = torch.float32,
    norm: str | None = None,
    *,
    heads: int = 2,
    queries: int = 2,
    shared: bool = True,
    masked: float = 0.0,
) -> PoolCase:
    """What a model calls: with a weight and a bias where there is a norm, some tokens masked if wanted."""
    generator = Generator(10_007 * B + 101 * N + C)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = generator.normal(B, N, C, dtype=dtype)
    query = generator.normal(1 if shared else B, heads, queries, C, dtype=dtype)
    weight, bias = ((at + 0.5 * generator.normal(C)).to(compute) if norm else None for at in (1, 0))
    key_mask = generator.chance(1 - masked, B, N) if masked else None
    return PoolCase(x, query, key_mask, weight, bias, C**-0.5, norm)


def call_pool(case: PoolCase) -> tuple[Tensor, Tensor]:
    return torch.ops.x_rope_cls.late_cls_pool(*case.arguments())


def call_pool_reference(case: PoolCase) -> tuple[Tensor, Tensor]:
    return reference.late_cls_pool(
        case.x,
        case.query,
        key_mask=case.key_mask,
        scale=case.scale,
        return_lse=True,
        norm=case.norm,
        norm_weight=case.norm_weight,
        norm_bias=case.norm_bias,
        norm_eps=case.norm_eps,
    )


def pool_in_float64(case: PoolCase) -> PoolCase:
    return case.with_tensors({name: t.double() for name, t in case.tensors().items()})


def pool_weights(case: PoolCase) -> tuple[Tensor, Tensor]:
    """Random gradients of the outputs, in the dtypes of the outputs."""
    generator = Generator(1)
    shape = (case.x.shape[0], *case.query.shape[1:])
    lse_dtype = torch.float64 if case.x.dtype == torch.float64 else torch.float32
    return generator.normal(*shape, dtype=case.x.dtype), generator.normal(*shape[:3], dtype=lse_dtype)


@torch.no_grad()
def conditioning(case: PoolCase) -> float:
    """Factor of the slack: see tolerance.py."""
    exact = pool_in_float64(case)
    counts = torch.ones(case.x.shape[:2], dtype=torch.bool) if case.key_mask is None else case.key_mask
    x, alike = exact.x, case.x.stride(1) == 0
    factor = max(1.0, case.x.shape[1] / 64 if alike else 1.0)
    if case.norm is not None:
        centred = x - x.mean(dim=-1, keepdim=True) if case.norm == "layer" else x
        spread = (centred.square().mean(dim=-1, keepdim=True) + case.norm_eps).sqrt()
        factor *= max(1.0, largest((x.abs() / spread)[counts]) / 8)
        x = centred / spread * (1 if exact.norm_weight is None else exact.norm_weight)
        x = x if exact.norm_bias is None else x + exact.norm_bias
    scores = (case.scale * exact.query @ x[:, None].mT).abs()
    return factor * max(1.0, largest(torch.where(counts[:, None, None], scores, 0)) / 32)


def check_pool_forward(case: PoolCase) -> None:
    """Asserts that the operator's outputs are as near to float64 as eager PyTorch's, on every instruction set."""
    slack = SLACK[case.x.dtype] * conditioning(case)
    eager, exact = call_pool_reference(case), call_pool_reference(pool_in_float64(case))
    for backend in each_backend(case.work()):
        pooled, lse = call_pool(case)
        assert pooled.dtype == case.x.dtype
        assert pooled.is_contiguous()
        assert lse.is_contiguous()
        assert_close(pooled, eager[0], exact[0], case.x.dtype, f"{backend}: pooled", slack)
        assert_close(lse, eager[1], exact[1], case.x.dtype, f"{backend}: lse", slack)


def check_pool_backward(case: PoolCase, use_pooled: bool = True, use_lse: bool = True) -> None:
    """Asserts the same of outputs and of every gradient that is wanted."""
    dtype, factor = case.x.dtype, conditioning(case)
    weights = pool_weights(case)
    weights = (weights[0] if use_pooled else None, weights[1] if use_lse else None)
    eager, eager_gradients = forward_backward(call_pool_reference, case, weights)
    exact, exact_gradients = forward_backward(call_pool_reference, pool_in_float64(case), weights)
    slack = {name: factor * gradient_slack(dtype, case.summands(name)) for name in exact_gradients}
    for backend in each_backend(case.work()):
        outputs, gradients = forward_backward(call_pool, case, weights)
        for name, *of in zip(("pooled", "lse"), outputs, eager, exact, strict=True):
            assert_close(*of, dtype, f"{backend}: {name}", factor * SLACK[dtype])
        assert set(gradients) == set(case.differentiable())
        for name, gradient in gradients.items():
            assert gradient.dtype == case.tensors()[name].dtype
            of = (gradient, eager_gradients[name], exact_gradients[name])
            assert_close(*of, dtype, f"{backend}: gradient of {name}", slack[name])
