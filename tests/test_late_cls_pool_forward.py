"""late_cls_pool, outputs, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import pytest
import torch
from late_cls_pool_cases import (
    MASKS,
    NORMS,
    TOKEN_LAYOUTS,
    PoolCase,
    call_pool,
    call_pool_reference,
    check_pool_forward,
    lay_out_tokens,
    make_key_mask,
    model_case,
    pool_cases,
)
from strategies import DTYPES, LAYOUTS, Generator, examples, lay_out
from torch import Tensor

from x_rope_cls import late_cls_pool

# Batches that share a task, batches that are cut into several, and one of each kind.
SIZES = [(70, 13, 32), (2, 1100, 16), (1, 700, 64), (5, 40, 33)]


def equal(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    """The same bits, NaN included."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@hypothesis.given(case=pool_cases())
@examples(160)
def test_random_cases(case):
    check_pool_forward(case)


@pytest.mark.parametrize("N", [511, 512, 513, 1023, 1024, 1025, 4099])
@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_many_parts(N, masked):
    """Each batch is cut into parts of 256 tokens or more, whose sums are merged."""
    for norm in NORMS:
        check_pool_forward(model_case(2, N, 24, norm=norm, heads=3, queries=1, masked=masked))
    check_pool_forward(model_case(2, N, 64, torch.bfloat16, heads=3, queries=1, masked=masked))
    check_pool_forward(model_case(2, N, 32, heads=8, queries=4, masked=masked))


@pytest.mark.parametrize("C", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 96, 127, 128, 129, 160, 192, 257, 400, 512, 1000])
def test_channels(C):
    for norm in NORMS if C > 1 else (None,):
        check_pool_forward(model_case(2, 21, C, norm=norm))
    check_pool_forward(model_case(2, 300, C, torch.bfloat16))


@pytest.mark.parametrize("rows", [*range(1, 18), 24, 30, 31, 33, 64, 128, 129, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows(rows, dtype):
    """Every mixture of tiles; they are cut differently for scores and for sums."""
    check_pool_forward(model_case(2, 19, 20, dtype, heads=1, queries=rows))
    check_pool_forward(model_case(1, 37, 130, dtype, heads=rows, queries=1))
    check_pool_forward(model_case(2, 23, 160, dtype, heads=1, queries=rows, masked=0.2))


@pytest.mark.parametrize("N", [1, 11, 12, 13, 100, 101, 300])
@pytest.mark.parametrize(("C", "dtype"), [(512, torch.float32), (1024, torch.float32), (512, torch.float64)], ids=str)
def test_blocks_of_many_rows(N, C, dtype):
    """Rows that fill vectors, over tokens that are whole pages apart and over others."""
    check_pool_forward(model_case(1, N, C, dtype, heads=8, queries=2))


@pytest.mark.parametrize("N", [*range(1, 19), 63, 64, 65, 127, 128, 129, 191, 193, 256, 257])
@pytest.mark.parametrize(("C", "dtype"), [(16, torch.float32), (20, torch.float32), (96, torch.bfloat16)], ids=str)
def test_tokens(N, C, dtype):
    """Read where they are (16 channels in most variants), copied (20) or multiplied as bfloat16 pairs (96, in one)."""
    for queries in (2, 4, 6, 10):  # rows in fours, by one, two and three of them
        check_pool_forward(model_case(2, N, C, dtype, queries=queries))


@pytest.mark.parametrize("layout", TOKEN_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_of_tokens(layout, dtype):
    for C in (32, 17):
        case = model_case(3, 41, C, dtype)
        check_pool_forward(replace(case, x=lay_out_tokens(case.x, layout)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_of_queries(layout, dtype):
    case = model_case(3, 23, 17, dtype, heads=3, queries=2, shared=False)
    check_pool_forward(replace(case, query=lay_out(case.query, layout)))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("B", [2, 70])
def test_key_masks(kind, B):
    case = model_case(B, 90, 16, norm="rms")
    check_pool_forward(replace(case, key_mask=make_key_mask(kind, Generator(7), B, 90)))


def test_mask_with_long_gaps_and_long_runs():
    """Whole blocks and whole parts of the tokens are masked, or not at all."""
    case = model_case(2, 2100, 16)
    key_mask = torch.ones(2, 2100, dtype=torch.bool)
    key_mask[0, 100:1900] = False
    key_mask[0, 1500] = True
    key_mask[1, :1024] = False
    check_pool_forward(replace(case, key_mask=key_mask))
    check_pool_forward(replace(case, key_mask=~key_mask))


def test_a_query_shared_by_the_batch_is_an_expanded_one(backend):
    for B in (3, 70):
        case = model_case(B, 30, 24, heads=3)
        expected = call_pool(case)
        equal(call_pool(replace(case, query=case.query.expand(B, 3, 2, 24))), expected)
        equal(call_pool(replace(case, query=case.query.expand(B, 3, 2, 24).contiguous())), expected)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 30.0, 1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_and_large_scores(scale, dtype):
    for N in (70, 1100):
        check_pool_forward(replace(model_case(2, N, 24, dtype), scale=scale))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("queries", [2, 16])
def test_increasing_and_decreasing_scores(sign, queries):
    """The running maximum moves at every block, or only at the first; parts differ by far more than 2^128."""
    case = model_case(2, 2100, 16, queries=queries)
    x = case.x.clone()
    x[:, :, 0] = sign * torch.linspace(-800, 800, 2100)
    query = case.query.clone()
    query[..., 0] = 1
    check_pool_forward(replace(case, x=x, query=query, scale=1.0))


@pytest.mark.parametrize("mean", [1e2, 1e4])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_means(norm, mean, dtype):
    """The variance is that of differences from the mean: a difference of squares would lose all its digits."""
    case = model_case(2, 50, 64, dtype, norm)
    check_pool_forward(replace(case, x=case.x + mean))
    out, _ = call_pool(replace(case, x=case.x + mean, norm="layer"))
    expected, _ = call_pool(replace(case, norm="layer"))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6 * mean)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1.0])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_eps(norm, eps):
    for spread in (1e-3, 1.0):
        case = model_case(2, 30, 24, norm=norm)
        check_pool_forward(replace(case, x=spread * case.x, norm_eps=eps))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_masked_tokens_never_matter(backend, bad, dtype, norm):
    for B, N, C in SIZES:
        case = model_case(B, N, C, dtype, norm, masked=0.4)
        expected = call_pool(case)
        dirty = case.x.masked_fill(~case.key_mask[:, :, None], bad)
        equal(call_pool(replace(case, x=dirty)), expected)
        assert expected[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_rows_without_tokens(backend, dtype, norm):
    for N, C in ((9, 20), (700, 16)):
        case = model_case(3, N, C, dtype, norm)
        key_mask = torch.tensor([[True], [False], [True]]).expand(3, N)
        pooled, lse = call_pool(replace(case, key_mask=key_mask))
        assert (pooled[1] == 0).all()
        assert (lse[1] == -torch.inf).all()
        assert lse[[0, 2]].isfinite().all()
        for dead in (replace(case, key_mask=torch.zeros_like(key_mask)), replace(case, x=case.x[:, :0])):
            pooled, lse = call_pool(dead)
            assert (pooled == 0).all()
            assert (lse == -torch.inf).all()


@pytest.mark.parametrize("sizes", [(0, 5, 8, 2, 1), (2, 0, 8, 2, 1), (2, 5, 8, 0, 1), (2, 5, 8, 2, 0), (0, 0, 1, 0, 0)])
@pytest.mark.parametrize("shared", [False, True])
def test_nothing_at_all(backend, sizes, shared):
    B, N, C, H, M = sizes
    pooled, lse = call_pool(PoolCase(torch.randn(B, N, C), torch.randn(1 if shared else B, H, M, C)))
    assert pooled.shape == (B, H, M, C)
    assert lse.shape == (B, H, M)
    assert (pooled == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("N", "n"), [(20, 19), (600, 0), (600, 599)])
def test_nan_in_a_token_reaches_its_batch_alone(backend, dtype, norm, N, n):
    case = model_case(3, N, 20, dtype, norm)
    clean = call_pool(case)
    case.x[1, n, 13] = torch.nan
    pooled, lse = call_pool(case)
    assert lse[1].isnan().all()
    assert pooled[1].isnan().all()
    for b in (0, 2):
        equal((pooled[b], lse[b]), (clean[0][b], clean[1][b]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "heads"), [(20, 3), (600, 3), (600, 16)])
def test_nan_in_a_query_stays_in_its_row(backend, dtype, N, heads):
    case = model_case(2, N, 20, dtype, heads=heads, shared=False)
    clean = call_pool(case)
    case.query[1, 2, 1, 19] = torch.nan
    pooled, lse = call_pool(case)
    assert pooled[1, 2, 1].isnan().all()
    assert lse[1, 2, 1].isnan()
    pooled[1, 2, 1], lse[1, 2, 1] = clean[0][1, 2, 1], clean[1][1, 2, 1]
    equal((pooled, lse), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_does_not_depend_on_the_number_of_threads(isa, threads, dtype):
    for norm, masked, queries in ((None, 0.0, 2), ("layer", 0.3, 2), (None, 0.0, 4)):
        for B, N, C in SIZES:
            case = model_case(B, N, C, dtype, norm, heads=8, queries=queries, masked=masked)
            torch.set_num_threads(1)
            expected = call_pool(case)
            torch.set_num_threads(threads)
            for _ in range(3):
                equal(call_pool(case), expected)


@hypothesis.given(case=pool_cases())
@examples(20)
def test_public_function_is_the_operator(case):
    out = late_cls_pool(
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
    equal(out, call_pool(case))


def test_defaults_of_the_public_function():
    case = model_case(2, 9, 16)
    pooled = late_cls_pool(case.x, case.query)
    assert torch.equal(pooled, call_pool(replace(case, scale=1.0))[0])
    pooled = late_cls_pool(case.x, case.query, norm="layer")
    assert torch.equal(pooled, call_pool(replace(case, scale=1.0, norm="layer", norm_eps=1e-5))[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_public_function_takes_norms_of_other_dtypes(dtype):
    """As torch's layer_norm under autocast does: weight and bias are computed with in float32 at least."""
    case = model_case(2, 9, 16, dtype, "layer")
    weight, bias = case.norm_weight.bfloat16(), case.norm_bias.bfloat16()
    compute = case.norm_weight.dtype
    expected = call_pool(replace(case, norm_weight=weight.to(compute), norm_bias=bias.to(compute)))
    options = {"scale": case.scale, "norm": "layer", "return_lse": True}
    equal(late_cls_pool(case.x, case.query, norm_weight=weight, norm_bias=bias, **options), expected)


def test_normalised_tokens_are_not_rounded_to_half_precision():
    """Eager PyTorch stores the output of the norm in bfloat16; the kernel has nothing to store."""
    case = model_case(2, 300, 64, torch.bfloat16, "layer")
    exact = call_pool_reference(case.with_tensors({name: t.double() for name, t in case.tensors().items()}))
    errors = [(lse - exact[1]).abs().max() for _, lse in (call_pool(case), call_pool_reference(case))]
    assert errors[0] < 1e-5
    assert errors[0] < errors[1] / 10
