"""pool_attention in both forms against one softmax in plain PyTorch."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from pooling_cases import PoolCase, call, plain, pool_cases
from strategies import Generator, examples
from tolerance import CHAIN, GRADIENT_SLACK, SLACK, assert_close
from torch import Tensor

from x_rope_cls.pooling import Pooled

FORMS = ("absorbed", "ordinary")


def gradients(case: PoolCase, function: Any) -> tuple[Pooled, dict[str, Tensor]]:
    """Results, and gradients of a random linear function of all three."""
    case = case.leaves()
    results = function(case)
    g = Generator(1)
    weights = [g.normal(*t.shape).to(t.dtype) for t in results]
    finite = [torch.where(t.isfinite(), t, 0) for t in results]  # lse of a row without keys
    total = sum((t * w).sum().double() for t, w in zip(finite, weights, strict=True))
    leaves = case.tensors()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return Pooled(*(t.detach() for t in results)), dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("form", FORMS)
@hypothesis.given(case=pool_cases())
@examples(60)
def test_random_cases(form, case):
    dtype = case.x.dtype
    out, out_grads = gradients(case, lambda c: call(c, form=form))
    eager, eager_grads = gradients(case, plain)
    exact, exact_grads = gradients(case.double(), plain)
    assert out.out.dtype == out.weights.dtype == dtype
    for name, *of in zip(Pooled._fields, out, eager, exact, strict=True):
        assert_close(*of, dtype, name, CHAIN * SLACK[dtype])
    for name in out_grads:
        of = (out_grads[name], eager_grads[name], exact_grads[name])
        assert_close(*of, dtype, f"gradient of {name}", CHAIN * GRADIENT_SLACK[dtype])
