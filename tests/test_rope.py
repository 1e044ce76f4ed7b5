"""apply_rope, outputs and gradients, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import pytest
import torch
from backends import each_backend, moved
from strategies import DTYPES, LAYOUTS, Generator, RopeCase, examples, lay_out, make_tables, rope_cases
from tolerance import assert_close

from x_rope_cls import Rotary, RotaryEmbedding, apply_rope, reference


def in_float64(case: RopeCase) -> RopeCase:
    return replace(case, x=case.x.double(), rotary=case.rotary.to(dtype=torch.float64))


def gradients(function, case: RopeCase, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rotary = case.rotary
    leaves = [t.detach().requires_grad_() for t in (case.x, rotary.cos, rotary.sin)]
    rotary = replace(rotary, cos=leaves[1], sin=leaves[2])
    out = function(leaves[0], rotary, inverse=case.inverse)
    return dict(zip(("x", "cos", "sin"), torch.autograd.grad(out, leaves, weight.to(out.dtype)), strict=True))


@hypothesis.given(case=rope_cases())
@examples(80)
def test_random_cases(case):
    dtype = case.x.dtype
    eager = reference.rope(case.x, case.rotary, inverse=case.inverse)
    doubled = in_float64(case)
    exact = reference.rope(doubled.x, doubled.rotary, inverse=case.inverse)
    for backend in each_backend():
        out = apply_rope(case.x, case.rotary, inverse=case.inverse)
        assert out.dtype == dtype
        assert out.transpose(1, 2).is_contiguous()
        assert_close(out, eager, exact, dtype, backend)


@hypothesis.given(case=rope_cases())
def test_random_gradients(case):
    weight = Generator(7).normal(*case.x.shape, dtype=case.x.dtype)
    eager = gradients(reference.rope, case, weight)
    exact = gradients(reference.rope, in_float64(case), weight)
    for backend in each_backend():
        for name, gradient in gradients(apply_rope, case, weight).items():
            assert_close(gradient, eager[name], exact[name], case.x.dtype, f"{backend}: gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
def test_unrotated_tokens_and_channels_are_copied_bit_for_bit(backend, dtype, interleaved):
    x = Generator(1).normal(2, 3, 9, 22, dtype=dtype)
    rotate = torch.arange(9) % 3 > 0
    rotary = replace(RotaryEmbedding(12, interleaved=interleaved)(9, rotate))
    out = apply_rope(x, rotary)
    assert torch.equal(out[..., 12:], x[..., 12:])
    assert torch.equal(out[:, :, ~rotate], x[:, :, ~rotate])
    assert not torch.equal(out[:, :, rotate, :12], x[:, :, rotate, :12])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_of_memory(backend, layout, dtype):
    x = lay_out(Generator(1).normal(2, 3, 37, 40, dtype=dtype), layout)
    rotary = RotaryEmbedding(32)(37)
    assert torch.equal(apply_rope(x, rotary), apply_rope(x.contiguous(), rotary))


@pytest.mark.parametrize("pairs", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64])
@pytest.mark.parametrize("interleaved", [True, False])
def test_numbers_of_pairs(backend, pairs, interleaved):
    """Every way to fill a vector, with and without channels behind."""
    for head_dim in (2 * pairs, 2 * pairs + 1):
        x = Generator(2).normal(1, 2, 5, head_dim, dtype=torch.float32)
        cos, sin = make_tables("shared", Generator(3), 1, 2, 5, pairs, torch.float32)
        rotary = Rotary(cos, sin, None, interleaved)
        torch.testing.assert_close(apply_rope(x, rotary), reference.rope(x, rotary))
        torch.testing.assert_close(apply_rope(x, rotary, inverse=True), reference.rope(x, rotary, inverse=True))


def test_inverse_undoes_a_rotation(backend):
    x = torch.randn(2, 3, 50, 16, dtype=torch.float64)
    rotary = RotaryEmbedding(16)(50, torch.arange(50) > 2)
    back = apply_rope(apply_rope(x, rotary), rotary, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)  # float32 tables: cos^2 + sin^2 is 1 to 1e-7


def test_large_tensors_use_all_threads_and_agree(backend, threads):
    x = torch.randn(2, 8, 1025, 64)
    rotary = RotaryEmbedding(32)(1025, torch.arange(1025) > 0)
    torch.testing.assert_close(apply_rope(x, rotary), reference.rope(x, rotary))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_for_another_device_keep_the_layout(layout):
    t = lay_out(Generator(1).normal(2, 3, 5, 7, dtype=torch.float32), layout)
    copy = moved(t, "cpu")
    assert torch.equal(copy, t)
    assert copy.stride() == t.stride()
    assert copy.data_ptr() % 16 == t.data_ptr() % 16
    assert copy.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


def test_tables_of_other_dtypes_are_converted():
    x = torch.randn(1, 2, 5, 8)
    rotary = RotaryEmbedding(8)(5)
    expected = apply_rope(x, rotary)
    torch.testing.assert_close(apply_rope(x, rotary.to(dtype=torch.float64)), expected)
    half = rotary.to(dtype=torch.float16)
    torch.testing.assert_close(apply_rope(x, half), apply_rope(x, half.to(dtype=torch.float32)))


def test_x_is_kept_for_the_backward_pass_only_where_tables_need_gradients():
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    rotary = RotaryEmbedding(8)(5)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        apply_rope(x, rotary)
        assert not any(t.shape == x.shape for t in saved)
        apply_rope(x, replace(rotary, cos=rotary.cos.clone().requires_grad_()))
        assert any(t.shape == x.shape for t in saved)
