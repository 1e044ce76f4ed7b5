"""late_cls_pool, gradients, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import forward_backward
from late_cls_pool_cases import (
    MASKS,
    NORMS,
    TOKEN_LAYOUTS,
    PoolCase,
    call_pool,
    check_pool_backward,
    lay_out_tokens,
    make_key_mask,
    model_case,
    pool_cases,
    pool_weights,
)
from strategies import DTYPES, LAYOUTS, Generator, examples, lay_out
from test_late_cls_pool_forward import SIZES
from torch import Tensor

from x_rope_cls import late_cls_pool, ops, reference


def gradients_of(case: PoolCase) -> dict[str, Tensor]:
    return forward_backward(call_pool, case, pool_weights(case))[1]


def same(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same bits, NaN included."""
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


@hypothesis.given(case=pool_cases())
@examples(400)
def test_random_cases(case):
    check_pool_backward(case)


@hypothesis.given(case=pool_cases(), use_pooled=st.booleans())
@examples(40)
def test_one_output_alone(case, use_pooled):
    check_pool_backward(case, use_pooled=use_pooled, use_lse=not use_pooled)


@pytest.mark.parametrize("N", [511, 512, 513, 1025, 4099])
@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_many_parts(N, masked):
    for norm in NORMS:
        check_pool_backward(model_case(2, N, 24, norm=norm, heads=3, queries=1, masked=masked))
    check_pool_backward(model_case(2, N, 64, torch.bfloat16, heads=3, queries=1, masked=masked))


@pytest.mark.parametrize("C", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 96, 127, 128, 129, 160, 192, 257, 400, 512, 1000])
def test_channels(C):
    for norm in NORMS if C > 1 else (None,):
        check_pool_backward(model_case(2, 21, C, norm=norm))
    check_pool_backward(model_case(2, 300, C, torch.bfloat16))


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("C", [*range(1, 10), 12])
def test_what_a_norm_of_few_channels_leaves(C, dtype, norm):
    """In few dimensions a normalised token's gradient is a small difference of large terms."""
    for N in (1, 2, 64):
        for plain in (False, True):
            case = model_case(64, N, C, dtype, norm, heads=1, queries=1)
            case = replace(case, norm_weight=None, norm_bias=None) if plain else case
            check_pool_backward(case)


@pytest.mark.parametrize("rows", [*range(1, 14), 16, 17, 24, 31, 33, 64, 128, 129, 150])
def test_rows(rows):
    check_pool_backward(model_case(2, 19, 20, torch.float64, heads=1, queries=rows))
    check_pool_backward(model_case(1, 37, 64, heads=rows, queries=1))
    check_pool_backward(model_case(2, 23, 160, torch.bfloat16, heads=1, queries=rows, masked=0.2))


@pytest.mark.parametrize("N", [*range(1, 19), 63, 64, 65, 127, 128, 129, 191, 193, 256, 257])
@pytest.mark.parametrize(("C", "dtype"), [(16, torch.float32), (20, torch.float32), (96, torch.bfloat16)], ids=str)
def test_tokens(N, C, dtype):
    """dx is written where it belongs (16 channels in most variants) or copied there; see the test of the outputs."""
    for queries in (1, 2, 3):  # of two heads: four, eight and twelve rows of queries and of gradients
        check_pool_backward(model_case(2, N, C, dtype, queries=queries))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_too_large_for_caches(dtype):
    """Large enough, and aligned, to be stored past the caches. Few of the tokens have nearly all of the weight."""
    case = model_case(1, 4201 * 4 // dtype.itemsize, 512, dtype, heads=3, queries=1)
    check_pool_backward(replace(case, scale=4 * case.scale))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("B", [1, 2, 63, 64, 65, 70, 129])
def test_batches_that_share_a_task(B, shared):
    """Their gradients to a shared query, weight and bias add up; those to queries of their own do not."""
    for norm in (None, "layer"):
        check_pool_backward(model_case(B, 11, 24, norm=norm, shared=shared, masked=0.2))


@pytest.mark.parametrize("layout", TOKEN_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_of_tokens(layout, dtype):
    for norm, C in ((None, 32), ("rms", 17)):
        case = model_case(3, 41, C, dtype, norm)
        check_pool_backward(replace(case, x=lay_out_tokens(case.x, layout)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_of_queries(layout, dtype):
    case = model_case(3, 23, 17, dtype, heads=3, queries=2, shared=False)
    check_pool_backward(replace(case, query=lay_out(case.query, layout)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_output_gradient(backend, layout):
    case = model_case(3, 33, 24, norm="layer", heads=3, queries=2)
    pooled, lse = pool_weights(case)
    pooled, lse = lay_out(pooled, layout), lse.mT.contiguous().mT
    expected = forward_backward(call_pool, case, (pooled.contiguous(), lse.contiguous()))[1]
    same(forward_backward(call_pool, case, (pooled, lse))[1], expected)


def test_expanded_output_gradients(backend):
    """What .sum() hands back."""
    case = model_case(3, 33, 24, norm="layer")
    ones = torch.ones(())
    for pooled, lse in ((ones.expand(3, 2, 2, 24), ones.expand(3, 2, 2)), (None, ones.expand(3, 2, 2))):
        dense = tuple(t if t is None else t.contiguous() for t in (pooled, lse))
        same(forward_backward(call_pool, case, (pooled, lse))[1], forward_backward(call_pool, case, dense)[1])


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("B", [2, 70])
def test_key_masks(kind, B):
    case = model_case(B, 90, 16, norm="rms")
    check_pool_backward(replace(case, key_mask=make_key_mask(kind, Generator(7), B, 90)))


def test_mask_with_long_gaps_and_long_runs():
    for norm, C in ((None, 16), ("layer", 20)):
        case = model_case(2, 2100, C, norm=norm)
        key_mask = torch.ones(2, 2100, dtype=torch.bool)
        key_mask[0, 100:1900] = False
        key_mask[0, 1500] = True
        key_mask[1, :1024] = False
        check_pool_backward(replace(case, key_mask=key_mask))
        check_pool_backward(replace(case, key_mask=~key_mask))


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("given", [(), ("norm_weight",), ("norm_bias",), ("norm_weight", "norm_bias")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms(norm, given, dtype):
    for C in (2, 7, 24, 100):
        case = model_case(3, 40, C, dtype, norm, masked=0.2)
        unwanted = {name: None for name in ("norm_weight", "norm_bias") if name not in given}
        check_pool_backward(replace(case, **unwanted))


@pytest.mark.parametrize("mean", [1e2, 1e4])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_large_means(norm, mean):
    case = model_case(2, 50, 64, norm=norm)
    check_pool_backward(replace(case, x=case.x + mean))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_scores(dtype):
    for N in (70, 1100):
        check_pool_backward(replace(model_case(2, N, 24, dtype), scale=1e4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_masked_tokens_never_matter_and_get_no_gradient(backend, bad, dtype, norm):
    for B, N, C in SIZES:
        case = model_case(B, N, C, dtype, norm, masked=0.4)
        expected = gradients_of(case)
        hidden = ~case.key_mask[:, :, None]
        gradients = gradients_of(replace(case, x=case.x.masked_fill(hidden, bad)))
        same(gradients, expected)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert (gradients["x"].masked_select(hidden) == 0).all()
        assert (gradients["x"].masked_select(~hidden) != 0).float().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("N", [9, 700])
def test_rows_without_tokens_give_and_get_nothing(backend, dtype, norm, N):
    case = model_case(3, N, 20, dtype, norm, shared=False)
    case = replace(case, key_mask=torch.tensor([[True], [False], [True]]).expand(3, N))
    gradients = gradients_of(case)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert (gradients["x"][1] == 0).all()
    assert (gradients["query"][1] == 0).all()
    for dead in (
        replace(case, key_mask=torch.zeros(3, N, dtype=torch.bool)),
        replace(case, x=case.x[:, :0], key_mask=None),
    ):
        assert all((gradient == 0).all() for gradient in gradients_of(dead).values())


@pytest.mark.parametrize("sizes", [(0, 5, 8, 2, 1), (2, 0, 8, 2, 1), (2, 5, 8, 0, 1), (2, 5, 8, 2, 0), (0, 0, 1, 0, 0)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_nothing_at_all(backend, sizes, shared, norm):
    B, N, C, H, M = sizes
    vectors = (torch.ones(C), torch.zeros(C)) if norm else (None, None)
    case = PoolCase(torch.randn(B, N, C), torch.randn(1 if shared else B, H, M, C), None, *vectors, norm=norm)
    for name, gradient in gradients_of(case).items():
        assert gradient.shape == case.tensors()[name].shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_in_a_token_reaches_its_batch_alone(backend, dtype):
    for norm in NORMS:
        case = model_case(3, 600, 20, dtype, norm, shared=False)
        clean = gradients_of(case)
        case.x[1, 300, 13] = torch.nan
        gradients = gradients_of(case)
        for name in ("x", "query"):
            assert gradients[name][1].isnan().all()
            same({name: gradients[name][[0, 2]]}, {name: clean[name][[0, 2]]})
        assert all(gradients[name].isnan().all() for name in gradients if name.startswith("norm"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_does_not_depend_on_the_number_of_threads(isa, threads, dtype):
    for norm, masked in ((None, 0.0), ("layer", 0.3)):
        for B, N, C in SIZES:
            case = model_case(B, N, C, dtype, norm, heads=8, masked=masked)
            torch.set_num_threads(1)
            expected = gradients_of(case)
            torch.set_num_threads(threads)
            for _ in range(3):
                same(gradients_of(case), expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_without_that_of_x_are_the_same(backend, norm, dtype):
    """A frozen backbone: x gets no gradient, and none is computed; the others do not change."""
    for B, N, C in SIZES:
        case = model_case(B, N, C, dtype, norm, masked=0.2)
        grad, grad_lse = pool_weights(case)
        x, query, *rest = case.arguments()
        arguments = (grad, grad_lse, x, query, *call_pool(case), *rest)
        dx, *others = ops.late_cls_pool_backward(*arguments, True)
        none, *without = ops.late_cls_pool_backward(*arguments, False)
        assert dx.shape == x.shape
        assert none.shape == (0,)
        for a, b in zip(without, others, strict=True):
            assert torch.equal(a, b)
        expected = gradients_of(case)
        same(gradients_of(replace(case, frozen=("x",))), {name: expected[name] for name in expected if name != "x"})


@pytest.mark.parametrize("name", ["x", "query", "norm_weight", "norm_bias"])
def test_only_what_needs_a_gradient_gets_one(name):
    case = model_case(3, 40, 24, norm="layer", masked=0.2)
    others = tuple(other for other in case.tensors() if other != name)
    check_pool_backward(replace(case, frozen=others))
    leaf = case.tensors()[name].clone().requires_grad_()
    call_pool(case.with_tensors({name: leaf}))[0].sum().backward()
    assert leaf.grad.abs().max() > 1e-3
    assert all(case.tensors()[other].grad is None for other in others)


def test_norm_vectors_of_another_dtype_get_gradients_in_it():
    case = model_case(2, 30, 24, torch.bfloat16, "layer")
    vectors = [t.bfloat16().requires_grad_() for t in (case.norm_weight, case.norm_bias)]
    options = {"norm": "layer", "norm_weight": vectors[0], "norm_bias": vectors[1], "scale": case.scale}
    gradients = torch.autograd.grad(late_cls_pool(case.x, case.query, **options).sum(), vectors)
    wide = [t.detach().float().requires_grad_() for t in vectors]
    options |= {"norm_weight": wide[0], "norm_bias": wide[1]}
    expected = torch.autograd.grad(late_cls_pool(case.x, case.query, **options).sum(), wide)
    for gradient, e in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert torch.equal(gradient, e.bfloat16())


def test_one_tensor_as_tokens_and_queries():
    """Class tokens that pool themselves too: both gradients reach them."""
    grads = []
    for function in (late_cls_pool, reference.late_cls_pool):
        x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        function(x, x[:, None, :2], scale=0.25).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_second_derivative_is_refused_clearly():
    x, query = torch.randn(1, 5, 4, requires_grad=True), torch.randn(1, 1, 1, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(late_cls_pool(x, query).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"late_cls_pool: order of differentiation must be at most 1, got 2"):
        grad.sum().backward()
