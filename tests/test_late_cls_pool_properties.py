"""What must hold for late_cls_pool whatever the numbers are. Checked on the operator, in float64 unless said."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from late_cls_pool_cases import NORMS, model_case
from strategies import DTYPES, Generator
from torch import Tensor

from x_rope_cls import late_cls_pool, rope_attention


@dataclass(frozen=True)
class Pool:
    """Tokens, queries and a norm."""

    x: Tensor
    query: Tensor
    norm: dict[str, Tensor | str | float | None]

    def __call__(self, x: Tensor | None = None, query: Tensor | None = None, **options) -> Tensor:
        options = {"scale": 0.3, **self.norm, **options}
        return late_cls_pool(self.x if x is None else x, self.query if query is None else query, **options)

    def normalised(self) -> Tensor:
        """The token states as a layer in front would have them."""
        weight, bias, eps = (self.norm.get(name) for name in ("norm_weight", "norm_bias", "norm_eps"))
        if self.norm["norm"] is None:
            return self.x
        if self.norm["norm"] == "layer":
            return F.layer_norm(self.x, self.x.shape[2:], weight, bias, eps)
        states = F.rms_norm(self.x, self.x.shape[2:], weight, eps)
        return states if bias is None else states + bias


@st.composite
def pools(draw: st.DrawFn, min_tokens: int = 1) -> Pool:
    generator = Generator(draw(st.integers(0, 2**16)))
    B, N, C = draw(st.sampled_from((1, 2, 3, 66))), draw(st.integers(min_tokens, 40)), draw(st.integers(2, 40))
    if draw(st.integers(0, 4)) == 0:
        B, N = 1, 600
    query = generator.normal(draw(st.sampled_from((1, B))), draw(st.integers(1, 5)), draw(st.integers(1, 3)), C)
    norm = {"norm": draw(st.sampled_from(NORMS)), "norm_eps": draw(st.sampled_from((1e-5, 0.1)))}
    if norm["norm"]:
        norm |= {name: generator.normal(C) for name in ("norm_weight", "norm_bias") if draw(st.booleans())}
    return Pool(generator.normal(B, N, C) + draw(st.sampled_from((0.0, 2.0))), query, norm)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@hypothesis.given(pools())
def test_a_norm_inside_is_a_norm_in_front(backend, pool):
    """Outputs and every gradient, by PyTorch's own norms."""
    leaves = {name: t for name, t in pool.norm.items() if isinstance(t, Tensor)}
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    leaves |= {name: t.clone().requires_grad_() for name, t in (("x", pool.x), ("query", pool.query))}
    own = {name: t for name, t in leaves.items() if name.startswith("norm")}
    inside = Pool(leaves["x"], leaves["query"], pool.norm | own)
    pooled, lse = inside(return_lse=True)
    front, front_lse = late_cls_pool(inside.normalised(), leaves["query"], scale=0.3, return_lse=True)
    close(pooled, front)
    close(lse, front_lse)
    g = Generator(3).normal(*pooled.shape)
    gradients, expected = (
        torch.autograd.grad((out * g).sum() + other.square().sum(), list(leaves.values()), materialize_grads=True)
        for out, other in ((pooled, lse), (front, front_lse))
    )
    torch.testing.assert_close(gradients, expected, rtol=1e-7, atol=1e-7)


@hypothesis.given(pools())
def test_it_is_attention_with_the_tokens_as_keys_and_values(backend, pool):
    states = pool.normalised()[:, None]
    key_mask = Generator(pool.x.shape[1]).chance(0.7, *pool.x.shape[:2])
    query = pool.query.expand(pool.x.shape[0], -1, -1, -1)
    pooled, lse = pool(key_mask=key_mask, return_lse=True)
    expected = rope_attention(query, states, states, key_mask=key_mask, scale=0.3, return_lse=True)
    close(pooled, expected[0])
    close(lse, expected[1])


@hypothesis.given(pools(), st.integers(0, 2**16))
def test_the_order_of_tokens_does_not_matter(backend, pool, seed):
    order = torch.randperm(pool.x.shape[1], generator=torch.Generator().manual_seed(seed))
    key_mask = Generator(seed).chance(0.7, *pool.x.shape[:2])
    close(pool(pool.x[:, order], key_mask=key_mask[:, order]), pool(key_mask=key_mask))
    x = pool.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pool(x).square().sum(), x)
    (moved,) = torch.autograd.grad(pool(x[:, order]).square().sum(), x)
    torch.testing.assert_close(moved, gradient, rtol=1e-7, atol=1e-7)


@hypothesis.given(pools())
def test_masked_tokens_are_as_if_they_were_not_there(backend, pool):
    keep = torch.arange(pool.x.shape[1]) % 3 > 0
    close(pool(key_mask=keep.expand(pool.x.shape[:2])), pool(pool.x[:, keep]))


@hypothesis.given(pools(min_tokens=2), st.data())
def test_parts_merge_by_their_logsumexp(backend, pool, data):
    """How extra keys (class tokens in class attention) are pooled apart and merged."""
    cut = data.draw(st.integers(0, pool.x.shape[1]))
    parts = [pool(x, return_lse=True) for x in (pool.x[:, :cut], pool.x[:, cut:])]
    weights = torch.stack([lse for _, lse in parts]).softmax(dim=0)[..., None]
    close(weights[0] * parts[0][0] + weights[1] * parts[1][0], pool())


@hypothesis.given(pools())
def test_each_row_and_each_batch_stands_alone(backend, pool):
    whole = pool()
    one_by_one = [
        pool(query=pool.query[:, h : h + 1, m : m + 1]) for h in range(whole.shape[1]) for m in range(whole.shape[2])
    ]
    close(torch.cat(one_by_one, dim=1).reshape(whole.shape), whole)
    b = whole.shape[0] - 1
    close(pool(pool.x[b:], query=pool.query[-1:]), whole[b:])


@hypothesis.given(pools(), st.sampled_from((0.5, 2.0, -4.0)))
def test_scale_belongs_to_the_query(backend, pool, factor):
    close(pool(query=pool.query * factor), pool(scale=0.3 * factor))


@hypothesis.given(pools())
def test_no_scores_is_the_mean(backend, pool):
    mean = pool.normalised().mean(dim=1)[:, None, None]
    pooled, lse = pool(scale=0.0, return_lse=True)
    close(pooled, mean.expand(pooled.shape))
    close(lse, torch.full_like(lse, pool.x.shape[1]).log())


@hypothesis.given(pools())
def test_a_query_may_grow_along_what_tokens_share(backend, pool):
    """A constant added to all scores of a row changes its logsumexp alone: key biases fold away."""
    x = pool.x.clone()
    x[:, :, 0] = 1.0
    query = pool.query.clone()
    query[..., 0] += 5.0
    pooled, lse = late_cls_pool(x, pool.query, scale=0.3, return_lse=True)
    grown, grown_lse = late_cls_pool(x, query, scale=0.3, return_lse=True)
    close(grown, pooled)
    close(grown_lse, lse + 1.5)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@hypothesis.given(pool=pools())
def test_norms_forget_what_they_are_meant_to(backend, norm, pool):
    """Both forget a token's length, layer norm its mean too; and a gradient never points along what is forgotten."""
    # Rounding is magnified by what a token is divided by: tokens that are all but constant, or 0, are not among these.
    divisor = pool.x.std(-1, correction=0) if norm == "layer" else pool.x.square().mean(-1).sqrt()
    ramp = torch.linspace(-1.0, 1.0, pool.x.shape[-1], dtype=pool.x.dtype)
    x = torch.where(divisor[..., None] < 0.1, ramp, pool.x)
    pool = Pool(x, pool.query, pool.norm | {"norm": norm, "norm_eps": 0.0})
    close(pool(3.0 * pool.x), pool())
    if norm == "layer":
        close(pool(pool.x + 7.0), pool())
    x = pool.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pool(x).square().sum(), x)
    allowed = 1e-9 * max(1.0, gradient.abs().max().item())
    assert (gradient * pool.x).sum(dim=-1).abs().max() < allowed
    if norm == "layer":
        assert gradient.sum(dim=-1).abs().max() < allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [33, 700, 4099])
def test_constant_tokens_pass_through(backend, dtype, N):
    """Weights add up to 1, also over many blocks and parts."""
    x = torch.ones(2, N, 24, dtype=dtype)
    pooled = late_cls_pool(x, model_case(2, N, 24, dtype).query, scale=0.2)
    torch.testing.assert_close(pooled, torch.ones_like(pooled), rtol=0, atol=2 * torch.finfo(dtype).eps + 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [40, 700])
def test_one_token_that_wins_is_returned(backend, dtype, N):
    """Where one score is far above the others, its token comes out as it is, wherever it stands."""
    for n in (0, 3, N // 2, N - 1):
        x = Generator(n).normal(2, N, 20, dtype=dtype)
        query = torch.zeros(1, 2, 1, 20, dtype=dtype)
        query[..., 0] = 100
        x[:, :, 0], x[:, n, 0] = 0, 4
        pooled, lse = late_cls_pool(x, query, return_lse=True)
        expected = x[:, n, None, None].expand(pooled.shape)
        torch.testing.assert_close(pooled, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
        torch.testing.assert_close(lse, torch.full_like(lse, 400.0))
