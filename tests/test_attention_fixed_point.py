"""rope_attention in half precision, whose queries and keys some processors multiply as 16-bit integers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends import each_backend, running
from cases import call_operator, call_reference, check_forward, in_float64, work
from strategies import MODES, AttentionCase, Generator
from tolerance import assert_close
from torch import Tensor

from x_rope_cls import _C, Rotary, RotaryEmbedding, apply_rope

each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def self_attention(q: Tensor, k: Tensor, cls_rope: str = "mask", special: int = 2) -> AttentionCase:
    """Half of the channels rotated; the first tokens have no position."""
    N, D = q.shape[-2:]
    rotary = RotaryEmbedding(D // 2)(N, torch.arange(N) >= special)
    v = Generator(N).normal(*q.shape, dtype=q.dtype)
    return AttentionCase(q, k, v, rotary, rotary, cls_rope, None, None, D**-0.5, 0.0, 0)


def normal_case(
    dtype: torch.dtype, N: int, D: int, cls_rope: str = "mask", special: int = 2, heads: int = 2
) -> AttentionCase:
    generator = Generator(N + D)
    q, k = (generator.normal(2, heads, N, D, dtype=dtype) for _ in range(2))
    return self_attention(q, k, cls_rope, special)


def rotated_then_rounded(case: AttentionCase) -> Tensor:
    """What a rotation outside of the operator leaves: queries and keys rounded to their dtype, all else exact."""

    def turned(x: Tensor, rotary: Rotary | None) -> Tensor:
        assert rotary is not None
        return apply_rope(x.double(), rotary).to(x.dtype)

    assert case.cls_rope == "rotate"
    turned_too = replace(
        case, q=turned(case.q, case.rotary_q), k=turned(case.k, case.rotary_k), rotary_q=None, rotary_k=None
    )
    return call_reference(in_float64(turned_too))[0].to(case.q.dtype)


@each_dtype
@pytest.mark.parametrize("D", [16, 64, 80, 256])
@pytest.mark.parametrize("size", [1.0, 2.0, 4.0])
def test_errors_are_below_those_of_rows_rounded_after_their_rotation(dtype, D, size):
    case = normal_case(dtype, 150, D, "rotate", special=0)
    case = replace(case, q=case.q * size, k=case.k * size)
    exact = call_reference(in_float64(case))[0]
    limit = (rotated_then_rounded(case).double() - exact).square().mean().sqrt()
    for isa in _C.cpu_isas():
        if dtype == torch.bfloat16 and isa == "avx512_bf16":
            continue  # it rounds rows and weights to bfloat16 too
        with running(isa):
            out, _ = call_operator(case)
        error = (out.double() - exact).square().mean().sqrt()
        assert error <= 1.02 * limit, f"{isa}: {error:.2e} of {limit:.2e}"


@each_dtype
@pytest.mark.parametrize("cls_rope", MODES)
@pytest.mark.parametrize("special", [0, 1, 3, 40])
@pytest.mark.parametrize("D", [8, 48, 64])
@pytest.mark.parametrize("size", [1.0, 4.0])
def test_modes_and_special_tokens(dtype, cls_rope, special, D, size):
    case = normal_case(dtype, 77, D, cls_rope, special)
    check_forward(replace(case, q=case.q * size, k=case.k * size))


@each_dtype
@pytest.mark.parametrize("D", [4, 16, 512])
@pytest.mark.parametrize("value", [1.0, -0.3, 6e-8, 60000.0])
def test_rows_that_are_all_alike_do_not_overflow(dtype, D, value):
    """Their products are as large as lengths allow."""
    q = torch.full((1, 2, 40, D), value, dtype=dtype)
    case = replace(self_attention(q, q, "skip", 40), scale=1.0 / max(value * value * D, 1.0))
    check_forward(case)
    check_forward(replace(case, k=-q))
    one = torch.zeros_like(q)
    one[..., 0] = value
    check_forward(replace(case, q=one, k=one))
    check_forward(replace(case, q=one, k=torch.zeros_like(q)))


@each_dtype
@pytest.mark.parametrize("outlier", [10.0, 100.0, 1000.0])
@pytest.mark.parametrize("in_queries", [False, True])
def test_channels_much_larger_than_others(dtype, outlier, in_queries):
    case = normal_case(dtype, 200, 64, "rotate")
    case.k[..., 3] = outlier
    case.q[..., 3] = 1.0 if in_queries else 0.0
    check_forward(case, scores=outlier / 8)


@each_dtype
@pytest.mark.parametrize("outlier", [10.0, 100.0, 1000.0, 60000.0])
def test_large_channels_that_queries_do_not_see(dtype, outlier):
    """Not rotated, and 0 in all queries: scores are as if these channels were not there."""
    case = normal_case(dtype, 200, 64, "rotate")
    case.k[..., 62:] = outlier
    case.q[..., 62:] = 0.0
    check_forward(case)


@each_dtype
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("cls_rope", MODES)
@pytest.mark.parametrize("special", [3, 60])
@pytest.mark.parametrize("where", ["query", "key", "special key"])
def test_infinity_and_nan_matter_where_they_would(dtype, bad, cls_rope, special, where):
    """An infinity in a key takes all weight of some queries and none of others."""
    case = normal_case(dtype, 150, 32, cls_rope, special)
    of, token = {"query": (case.q, 101), "key": (case.k, 101), "special key": (case.k, 1)}[where]
    of[1, 0, token, 31] = bad
    eager, exact = call_reference(case)[0], call_reference(in_float64(case))[0]
    assert not exact.isfinite().all()
    assert exact[1, 0].isfinite().any() or (bad != bad and where != "query")
    for backend in each_backend(work(case)):
        assert_close(call_operator(case)[0], eager, exact, dtype, backend)


@each_dtype
@pytest.mark.parametrize("heads", [1, 16])
def test_dropout_bias_and_key_mask(dtype, heads):
    case = normal_case(dtype, 130, 32, "mask", 3, heads)
    generator = Generator(3)
    bias = generator.normal(130, 130, dtype=torch.float32)
    check_forward(replace(case, attn_mask=bias))
    check_forward(replace(case, key_mask=generator.chance(0.5, 2, 130)))
    check_forward(replace(case, dropout_p=0.25, seed=5))
