"""late_cls_pool and its projections in one call, against keys and values in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from backends import running
from pooling_cases import PoolCase, call, plain, pool_cases
from strategies import DTYPES, Generator, examples
from tolerance import CHAIN, GRADIENT_SLACK, SLACK, assert_close
from torch import Tensor

from x_rope_cls import _C, projected
from x_rope_cls.pooling import Pooled


def run(case: PoolCase, function: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, logsumexp, and gradients of a random linear function of both."""
    case = case.leaves()
    pooled: Pooled = function(case)
    g = Generator(1)
    out, lse = pooled.out, pooled.lse
    total = (out * g.normal(*out.shape).to(out.dtype)).sum().double()
    total = total + (torch.where(lse.isfinite(), lse, 0) * g.normal(*lse.shape).to(lse.dtype)).sum()
    leaves = case.tensors()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return out.detach(), lse.detach(), dict(zip(leaves, grads, strict=True))


def in_one_call(case: PoolCase) -> Pooled:
    heads = case.k_weight.shape[0] // case.q.shape[3]
    empty = any(t.numel() == 0 for t in (case.x, case.q))
    assert empty or projected.serves(case.x, case.q, case.k_weight, case.v_weight, heads)
    return call(case, form="absorbed", need_weights=False)


def check(case: PoolCase) -> None:
    dtype = case.x.dtype
    eager, exact = run(case, plain), run(case.double(), plain)
    for isa in _C.cpu_isas():
        with running(isa):
            found = run(case, in_one_call)
        assert_close(found[0], eager[0], exact[0], dtype, f"out, {isa}", CHAIN * SLACK[dtype])
        assert_close(found[1], eager[1], exact[1], dtype, f"lse, {isa}", CHAIN * SLACK[dtype])
        for name, gradient in found[2].items():
            of = (gradient, eager[2][name], exact[2][name])
            assert_close(*of, dtype, f"gradient of {name}, {isa}", CHAIN * GRADIENT_SLACK[dtype])


def make(
    dtype: torch.dtype,
    B: int = 2,
    M: int = 1,
    heads: tuple[int, int] = (2, 1),
    C: int = 64,
    dims: tuple[int, int] = (16, 16),
    **options: Any,
) -> PoolCase:
    """heads: of keys, and query heads for each of them; dims: of a key head and of a value head."""
    g, (key_heads, group), (D, Dv) = Generator(7), heads, dims
    weights = (g.normal(key_heads * d, C, dtype=dtype) * C**-0.5 for d in (D, Dv))
    q = g.normal(B, M, key_heads * group, D, dtype=dtype)
    return PoolCase(g.normal(B, 21, C, dtype=dtype), q, *weights, **options)


@hypothesis.given(case=pool_cases())
@examples(60)
def test_random_cases(case):
    check(replace(case, extra=None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [1, 4, 15, 16, 32, 40, 96, 129, 160, 257, 320])
def test_channels(dtype, C):
    check(make(dtype, C=C))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(1, 1), (3, 33), (24, 25), (31, 64), (32, 7), (64, 100), (130, 31)])
def test_head_dims(dtype, dims):
    check(make(dtype, dims=dims, C=96))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 33])
def test_rows(dtype, rows):
    check(make(dtype, B=1, M=rows, heads=(1, 1), C=32))
    check(make(dtype, B=rows, heads=(2, 2), C=32, head_order="cyclic"))


def test_queries_shared_by_the_batch():
    case = make(torch.float32, B=5, M=3)
    check(replace(case, q=case.q[:1]))


def test_strides(isa):
    """Weights that are parts of one, queries and gradients with channels apart."""
    case = make(torch.float32, M=3, heads=(2, 2), C=40)
    expected = run(case, in_one_call)
    together = torch.cat((case.k_weight, case.v_weight, case.v_weight), 1)
    apart = replace(
        case,
        x=case.x.mT.contiguous().mT,
        q=case.q.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        k_weight=together[:, :40],
        v_weight=case.v_weight.mT.contiguous().mT,
    )
    found = run(apart, in_one_call)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    g = Generator(2).normal(*expected[0].shape)
    leaves = case.leaves()
    tensors = (leaves.x, leaves.q, leaves.k_weight, leaves.v_weight)
    for grad in (g.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), g[:1, :1, :1, :1].expand_as(g)):
        once = torch.autograd.grad(in_one_call(leaves).out, tensors, grad)
        dense = torch.autograd.grad(in_one_call(leaves).out, tensors, grad.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(once, dense, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_does_not_depend_on_the_number_of_threads(isa, threads, dtype):
    case = make(dtype, B=8, heads=(4, 2), C=256, dims=(64, 48))
    torch.set_num_threads(1)
    out, lse, grads = run(case, in_one_call)
    torch.set_num_threads(threads)
    for _ in range(3):
        again = run(case, in_one_call)
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)
        assert all(torch.equal(again[2][name], grads[name]) for name in grads)


@pytest.mark.parametrize("name", ["x", "q", "k_weight", "v_weight", "norm_weight", "norm_bias"])
def test_only_what_needs_a_gradient_gets_one(name):
    g = Generator(3)
    case = make(torch.float32, norm="layer", norm_weight=g.normal(64), norm_bias=g.normal(64))
    leaves = case.leaves()
    expected = torch.autograd.grad(in_one_call(leaves).out.sum(), getattr(leaves, name))[0]
    alone = replace(case, **{name: getattr(case, name).clone().requires_grad_()})
    (found,) = torch.autograd.grad(in_one_call(alone).out.sum(), getattr(alone, name))
    assert torch.equal(found, expected)


def test_gradient_of_the_logsumexp_alone():
    leaves = make(torch.float64).leaves()
    tensors = (leaves.x, leaves.q, leaves.k_weight)
    found = torch.autograd.grad(in_one_call(leaves).lse.sum(), tensors)
    torch.testing.assert_close(found, torch.autograd.grad(plain(leaves).lse.sum(), tensors))


def test_where_it_does_not_serve():
    case = make(torch.float32)
    tensors = (case.x, case.q, case.k_weight, case.v_weight)
    assert projected.serves(*tensors, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not projected.serves(*tensors, 2)
    assert not projected.serves(case.x.double(), *tensors[1:], 2)
    assert not projected.serves(case.x.to("meta"), *(t.to("meta") for t in tensors[1:]), 2)
    assert not projected.serves(case.x[:, :0], *tensors[1:], 2)
    assert not projected.serves(case.x, case.q.expand(2, 1, 2, 16).repeat(1, 600, 1, 1), *tensors[2:], 2)
    torch.func.vmap(lambda x: torch.tensor(projected.serves(x, *tensors[1:], 2)))(case.x[None]).logical_not().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 64)}, "x must be"),
        ({"q": (3, 1, 2, 16)}, "q must be"),
        ({"k_weight": (33, 64)}, "rows of the weights must fit"),
        ({"v_weight": (33, 64)}, "rows of the weights must fit"),
        ({"k_weight": (32, 63)}, r"weights must be \(rows, channels\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    case = make(torch.float32)
    tensors = {name: getattr(case, name) for name in ("x", "q", "k_weight", "v_weight")}
    tensors.update({name: torch.zeros(shape) for name, shape in change.items()})
    with pytest.raises(RuntimeError, match=message):
        torch.ops.x_rope_cls._pool_projected(*tensors.values(), None, None, None, 1.0, 0, 1e-5, False)
