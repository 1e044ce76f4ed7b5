"""apply_rope, outputs and gradients, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import pytest
import torch
from backends import each_backend, moved
from strategies import DTYPES, LAYOUTS, Generator, RopeCase, examples, lay_out, make_tables, rope_cases
from tolerance import assert_close

from x_rope_cls import _C, Rotary, RotaryEmbedding, apply_rope, apply_rope_qk, reference


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_of_pairs(backend, dtype, pairs, interleaved):
    """Every way to fill a vector, with and without channels behind."""
    for head_dim in (2 * pairs, 2 * pairs + 1, 2 * pairs + 16):
        x = Generator(2).normal(1, 2, 5, head_dim, dtype=dtype)
        cos, sin = make_tables("shared", Generator(3), 1, 2, 5, pairs, torch.float32)
        rotary = Rotary(cos, sin, None, interleaved)
        torch.testing.assert_close(apply_rope(x, rotary), reference.rope(x, rotary))
        torch.testing.assert_close(apply_rope(x, rotary, inverse=True), reference.rope(x, rotary, inverse=True))


@pytest.mark.parametrize("pairs", [1, 3, 4, 5, 8, 12, 20])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_behind_the_pairs_stay_bit_by_bit(backend, dtype, pairs, interleaved):
    head_dim = 64
    x = Generator(2).normal(1, 2, 5, head_dim, dtype=dtype)
    cos, sin = make_tables("shared", Generator(3), 1, 2, 5, pairs, torch.float32)
    rotary = Rotary(cos, sin, None, interleaved)
    expected = apply_rope(x[..., : 2 * pairs].contiguous(), rotary)
    x[..., 2 * pairs :] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=dtype).repeat(16)[
        2 * pairs :
    ]
    found = apply_rope(x, rotary)
    torch.testing.assert_close(found[..., : 2 * pairs], expected)
    word = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    assert torch.equal(found[..., 2 * pairs :].contiguous().view(word), x[..., 2 * pairs :].contiguous().view(word))


@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7F800001], ids=hex)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotary_dim", [2, 14, 32, 64, 80])
def test_nan_in_a_table_stays_nan(isa, rotary_dim, interleaved, bits):
    """Whatever its bits are: rounding to bfloat16 must not carry them into the sign."""
    x = Generator(1).normal(1, 2, 3, 80, dtype=torch.bfloat16)
    rotary = RotaryEmbedding(rotary_dim, interleaved=interleaved)(3)
    for name in ("cos", "sin"):
        table = getattr(rotary, name).clone()
        table.view(torch.int32)[1, rotary_dim // 4] = bits
        broken = replace(rotary, **{name: table})
        for inverse in (False, True):
            out = apply_rope(x, broken, inverse=inverse)
            assert torch.equal(out.isnan(), reference.rope(x, broken, inverse=inverse).isnan())
            assert int(out.isnan().sum()) == 4


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


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rotary_dim", [64, 32])
def test_outputs_too_large_for_caches(isa, threads, dtype, interleaved, rotary_dim):
    """Large enough, and aligned, to be stored past the caches."""
    bytes_of_token = 2 * 2 * 8 * 64 * dtype.itemsize  # of both outputs
    tokens = _C.cache_bytes() // 2 // bytes_of_token + 60
    q, k = (Generator(seed).normal(2, 8, tokens, 64, dtype=dtype) for seed in (1, 2))
    rotary = RotaryEmbedding(rotary_dim, interleaved=interleaved)(tokens, torch.arange(tokens) % 7 > 0)
    rotated = apply_rope_qk(q, k, rotary)
    for x, out in zip((q, k), rotated, strict=True):
        for part in (slice(0, 40), slice(tokens - 40, tokens)):
            some = replace(rotary, cos=rotary.cos[part], sin=rotary.sin[part], rotate=rotary.rotate[part])
            eager = reference.rope(x[:, :, part], some)
            exact = reference.rope(x[:, :, part].double(), some.to(dtype=torch.float64))
            assert_close(out[:, :, part], eager, exact, dtype, isa)
        few = apply_rope(
            x[:, :, :1000], replace(rotary, cos=rotary.cos[:1000], sin=rotary.sin[:1000], rotate=rotary.rotate[:1000])
        )
        assert torch.equal(out[:, :, :1000], few)


class TestQueriesAndKeys:
    """apply_rope_qk is apply_rope of each, in outputs and gradients."""

    q, k = torch.randn(2, 4, 5, 12), torch.randn(2, 2, 7, 12)
    rotary = RotaryEmbedding(8)(5, torch.arange(5) > 0)
    rotary_k = RotaryEmbedding(12)(7)

    def test_outputs(self, backend):
        for inverse in (False, True):
            q, k = apply_rope_qk(self.q, self.k, self.rotary, rotary_k=self.rotary_k, inverse=inverse)
            assert torch.equal(q, apply_rope(self.q, self.rotary, inverse=inverse))
            assert torch.equal(k, apply_rope(self.k, self.rotary_k, inverse=inverse))
            assert q.transpose(1, 2).is_contiguous()
            expected = reference.rope_qk(self.q, self.k, self.rotary, rotary_k=self.rotary_k, inverse=inverse)
            torch.testing.assert_close((q, k), expected)

    @pytest.mark.parametrize("length", [1, 63, 130, 900])
    def test_lengths_that_threads_divide(self, threads, length):
        q, k = torch.randn(3, 4, 700, 24), torch.randn(1, 2, length, 24)
        rotary, rotary_k = RotaryEmbedding(24)(700), RotaryEmbedding(16)(length)
        rotated = apply_rope_qk(q, k, rotary, rotary_k=rotary_k)
        torch.testing.assert_close(rotated, reference.rope_qk(q, k, rotary, rotary_k=rotary_k))

    @pytest.mark.parametrize("used", ["both", "q", "k"])
    def test_gradients(self, used):
        def both(q, k, cos, sin, cos_k, sin_k):
            rotary_k = replace(self.rotary_k, cos=cos_k, sin=sin_k)
            return apply_rope_qk(q, k, replace(self.rotary, cos=cos, sin=sin), rotary_k=rotary_k)

        def each(q, k, cos, sin, cos_k, sin_k):
            rotary_k = replace(self.rotary_k, cos=cos_k, sin=sin_k)
            return apply_rope(q, replace(self.rotary, cos=cos, sin=sin)), apply_rope(k, rotary_k)

        def gradients_of(function):
            tensors = (self.q, self.k, self.rotary.cos, self.rotary.sin, self.rotary_k.cos, self.rotary_k.sin)
            leaves = [t.detach().clone().requires_grad_() for t in tensors]
            out = {name: t for name, t in zip("qk", function(*leaves), strict=True) if used in ("both", name)}
            loss = sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in out.values())
            return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

        torch.testing.assert_close(gradients_of(both), gradients_of(each))

    def test_second_derivatives(self):
        q, k = (t[:, :1, :3].double().requires_grad_() for t in (self.q, self.k))
        rotary = RotaryEmbedding(8)(3, torch.arange(3) > 0)
        torch.autograd.gradcheck(lambda q, k: apply_rope_qk(q, k, rotary), (q, k))
        torch.autograd.gradgradcheck(lambda q, k: apply_rope_qk(q, k, rotary), (q, k))

    def test_tables_are_shared_where_lengths_agree(self):
        k = self.k[:, :, :5]
        assert torch.equal(apply_rope_qk(self.q, k, self.rotary)[1], apply_rope(k, self.rotary))

    def test_arguments(self):
        with pytest.raises(ValueError, match="apply_rope_qk: rotary_k must be given where lengths differ, got None"):
            apply_rope_qk(self.q, self.k, self.rotary)
        with pytest.raises(ValueError, match="apply_rope_qk: interleaved of rotary and rotary_k must be the same"):
            apply_rope_qk(self.q, self.k, self.rotary, rotary_k=replace(self.rotary_k, interleaved=False))
        with pytest.raises(TypeError, match="apply_rope_qk: rotary_k must be a Rotary, got tuple"):
            apply_rope_qk(self.q, self.k, self.rotary, rotary_k=(self.rotary.cos, self.rotary.sin))


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
