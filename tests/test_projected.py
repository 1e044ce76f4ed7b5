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
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from x_rope_cls import _C, projected
from x_rope_cls.pool_layer import pool_layer
from x_rope_cls.pooling import Pooled
from x_rope_cls.projected import Weights


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
    empty = any(t.numel() == 0 for t in (case.x, case.q))
    assert empty or projected.serves(case.x, case.q, Weights(case.k_weight, case.v_weight), 1)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [32, 40])
@pytest.mark.parametrize(("B", "M"), [(1, 65), (72, 1), (23, 3), (5, 13)])
def test_many_rows(dtype, C, B, M):
    """Columns of weights are lanes; rows lie together, a batch apart, or in runs too short or long enough."""
    check(make(dtype, B=B, M=M, heads=(2, 1), C=C, dims=(16, 20)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [1024, 1040, 1048])
def test_large_gradients(dtype, C):
    """Those of the weights are stored past the caches where their rows are whole vectors."""
    case = make(dtype, heads=(2, 1), C=C, dims=(1024, 1024))
    assert sum(w.numel() * w.element_size() for w in (case.k_weight, case.v_weight)) >= 8 << 20
    check(case)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "M", "heads", "queries"),
    [
        (1, 1, (1, 1), (1, 1)),
        (3, 2, (2, 2), (1, 2)),
        (3, 2, (2, 2), (2,)),
        (1, 1, (2, 1), (1,)),
        (2, 5, (3, 1), (2, 5)),
    ],
)
def test_whole_layer(dtype, B, M, heads, queries):
    """W_q and W_out come along; nothing else calls the operator, or steps would be compared with themselves."""
    g, (key_heads, group) = Generator(5), heads
    H, D, Dv = key_heads * group, 8, 12
    x, queries = g.normal(B, 21, 40, dtype=dtype), g.normal(*queries, 33, dtype=dtype)
    shapes = ((key_heads * D, 40), (key_heads * Dv, 40), (H * D, 33), (25, H * Dv))
    tensors = (x, queries, *(g.normal(*shape, dtype=dtype) * shape[1] ** -0.5 for shape in shapes))
    grad = g.normal(B, M, 25, dtype=dtype)
    key_mask = g.chance(0.7, B, 21)
    key_mask[0] = False

    def gradients(function: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
        out = function(leaves[0], leaves[1], Weights(*leaves[2:]))
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))

    def layer(x: Tensor, queries: Tensor, weights: Weights) -> Tensor:
        return pool_layer(x, queries, weights, heads=H, key_mask=key_mask, head_order="cyclic").out

    def steps(x: Tensor, queries: Tensor, weights: Weights) -> Tensor:
        q = (queries @ weights.q.mT).unflatten(-1, (H, D)).expand(B, M, H, D)
        out = plain(PoolCase(x, q, weights.k, weights.v, key_mask=key_mask, head_order="cyclic")).out
        return out.flatten(2) @ weights.out.mT

    eager, exact = gradients(steps, dtype), gradients(steps, torch.float64)
    for isa in _C.cpu_isas():
        with running(isa):
            assert projected.serves(x, queries, Weights(*tensors[2:]), 1)
            found = gradients(layer, dtype)
        for i, of in enumerate(zip(found, eager, exact, strict=True)):
            slack = SLACK[dtype] if i == 0 else GRADIENT_SLACK[dtype]
            assert_close(*of, dtype, f"result {i}, {isa}", CHAIN * slack)


def test_where_it_does_not_serve():
    case = make(torch.float32)
    weights = Weights(case.k_weight, case.v_weight)
    assert projected.serves(case.x, case.q, weights, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not projected.serves(case.x, case.q, weights, 2)
    assert not projected.serves(case.x.double(), case.q, weights, 2)
    assert not projected.serves(case.x, case.q, weights._replace(out=case.x.double()), 2)
    assert not projected.serves(case.x.to("meta"), case.q, weights, 2)
    assert not projected.serves(case.x[:, :0], case.q, weights, 2)
    assert not projected.serves(case.x, case.q, weights, 10_000)
    served = []
    torch.func.vmap(lambda x: served.append(projected.serves(x, case.q, weights, 2)) or x)(case.x[None])
    assert served == [False]


class _Watcher(TorchDispatchMode):
    """Notes the operators of this package that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "x_rope_cls":
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_whoever_watches_operators_sees_the_public_ones():
    case = make(torch.float32)
    expected = in_one_call(case).out
    with _Watcher() as watcher:
        found = call(case, form="absorbed", need_weights=False).out
    assert watcher.seen == ["x_rope_cls::late_cls_pool"]
    torch.testing.assert_close(found, expected)


def test_fake_tensors():
    case = make(torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = call(case, form="absorbed", need_weights=False).out
    assert isinstance(out, FakeTensor)
    assert out.shape == in_one_call(case).out.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 64)}, "x must be"),
        ({"q": (3, 1, 2, 16)}, "q must be"),
        ({"k_weight": (33, 64)}, "rows of the weights must fit"),
        ({"q_weight": (32, 15)}, "q must be"),
        ({"q_weight": (32, 16), "q": (2, 1, 1, 16)}, "q must be"),
        ({"q_weight": (32, 16), "q": (3, 1, 16)}, "q must be"),
        ({"q_weight": (32, 15), "q": (2, 1, 16)}, "q_weight must be"),
        ({"q_weight": (32, 15), "q": (1, 16)}, "q_weight must be"),
        ({"out_weight": (5, 33)}, "out_weight must be"),
        ({"v_weight": (33, 64)}, "rows of the weights must fit"),
        ({"k_weight": (32, 63)}, "weights must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    case = make(torch.float32)
    tensors = {name: getattr(case, name, None) for name in ("x", "q", "k_weight", "v_weight", "q_weight", "out_weight")}
    tensors.update({name: torch.zeros(shape) for name, shape in change.items()})
    with pytest.raises(RuntimeError, match=message):
        torch.ops.x_rope_cls._pool_projected(*tensors.values(), None, None, None, 2, False, 1.0, 0, 1e-5)


def test_gradients_are_not_differentiable_again():
    leaves = make(torch.float64).leaves()
    (dx,) = torch.autograd.grad(in_one_call(leaves).out.square().sum(), leaves.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_tensors_that_a_transform_left_behind():
    """They are wrapped still, but the transform is over."""
    case = make(torch.float32)
    left = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(case.x)
    assert torch._C._functorch.is_functorch_wrapped_tensor(left[0])
    leaves = case.leaves()
    found = in_one_call(replace(leaves, x=left[0]))
    expected = in_one_call(leaves)
    assert torch.equal(found.out, expected.out)
    (a,), (b,) = (torch.autograd.grad(pooled.out.sum(), leaves.k_weight) for pooled in (found, expected))
    assert torch.equal(a, b)
