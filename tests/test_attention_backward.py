"""rope_attention, gradients, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import call_operator, check_backward, forward_backward, output_weights
from strategies import DTYPES, LAYOUTS, MODES, Generator, attention_cases, examples, lay_out
from test_attention_forward import model_case, of_size, with_special_tokens

from x_rope_cls import LearnedRotaryEmbedding, Rotary, reference, rope_attention


@hypothesis.given(case=attention_cases())
@examples(600)
def test_random_cases(case):
    check_backward(case)


@hypothesis.given(case=attention_cases(), use_out=st.booleans())
@examples(10)
def test_one_output_alone(case, use_out):
    check_backward(case, use_out=use_out, use_lse=not use_out)


@pytest.mark.parametrize(("N", "M"), [(1, 500), (500, 1), (193, 520), (300, 300)])
@pytest.mark.parametrize("cls_rope", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_blocks(N, M, cls_rope, dtype):
    check_backward(model_case(N, M, cls_rope, dtype, rotate="scattered"))


@pytest.mark.parametrize("N", [128, 129, 145, 161])
@pytest.mark.parametrize("special", [1, 8, 16, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_special_tokens_at_the_border_of_a_block(dtype, special, N):
    check_backward(with_special_tokens(special, N, dtype))


@pytest.mark.parametrize("rotate", ["front", "end", "per_batch"])
def test_many_blocks_with_masks_and_dropout(rotate):
    generator = Generator(3)
    N = 400
    case = model_case(N, N, "mask", rotate=rotate)
    key_mask = generator.chance(0.8, 2, N)
    key_mask[0, 50:380] = False
    check_backward(replace(case, key_mask=key_mask))
    check_backward(replace(case, attn_mask=generator.normal(2, 1, N, N, dtype=torch.float32), dropout_p=0.25, seed=9))
    check_backward(replace(case, attn_mask=torch.ones(N, N, dtype=torch.bool).tril(), key_mask=key_mask))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_of_memory(layout, dtype):
    case = model_case(33, 47, "mask", dtype, D=24, Dv=17)
    check_backward(replace(case, q=lay_out(case.q, layout), k=lay_out(case.k, layout), v=lay_out(case.v, layout)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_output_gradient(backend, layout):
    case = model_case(33, 47, "mask", D=24, Dv=17)
    weight, lse_weight = output_weights(case)
    weight = lay_out(weight, layout)
    _, expected = forward_backward(call_operator, case, (weight.contiguous(), lse_weight))
    _, gradients = forward_backward(call_operator, case, (weight, lse_weight.mT.contiguous().mT))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("D", [2, 3, 8, 17, 32, 64, 96, 128, 200])
def test_head_dims(D):
    for Dv in (D, 1, 40):
        check_backward(model_case(21, 37, "mask", D=D, Dv=Dv, interleaved=False))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_keys_never_matter_and_get_no_gradient(backend, bad, dtype):
    case = model_case(40, 150, "mask", dtype, D=16, Dv=8)
    key_mask = Generator(5).chance(0.6, 2, 150)
    weights = output_weights(case)
    _, expected = forward_backward(call_operator, replace(case, key_mask=key_mask), weights)
    hidden = ~key_mask[:, None, :, None]
    k, v = case.k.masked_fill(hidden, bad), case.v.masked_fill(hidden, bad)
    _, gradients = forward_backward(call_operator, replace(case, k=k, v=v, key_mask=key_mask), weights)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name
    for name in ("k", "v"):
        assert (gradients[name].masked_select(hidden) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls_rope", ["rotate", "skip", "mask"])
def test_heads_of_one_worker_are_of_any_length(cls_rope, dtype):
    """Eight heads a thread and more are handed out whole, and what the next one reads is asked for ahead."""
    case = model_case(101, 77, cls_rope, dtype, D=24, Dv=16)
    q, k, v = (t.repeat(2, 4, 1, 1) for t in (case.q, case.k, case.v))
    key_mask = torch.arange(77) < torch.tensor([[77], [0], [1], [40]])
    check_backward(replace(case, q=q, k=k, v=v, key_mask=key_mask, attn_mask=None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_give_and_get_nothing(backend, dtype):
    case = model_case(20, 30, "mask", dtype, D=16, Dv=8)
    bias = torch.zeros(20, 30)
    bias[7] = -torch.inf
    case = replace(case, attn_mask=bias, key_mask=torch.tensor([[True], [False]]).expand(2, 30))
    _, gradients = forward_backward(call_operator, case, output_weights(case))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all((gradients[name][1] == 0).all() for name in ("q", "k", "v"))
    assert (gradients["q"][0, :, 7] == 0).all()
    assert (gradients["attn_mask"][7] == 0).all()
    check_backward(case)
    none = replace(
        case, k=case.k[:, :, :0], v=case.v[:, :, :0], rotary_q=None, rotary_k=None, attn_mask=None, key_mask=None
    )
    _, gradients = forward_backward(call_operator, none, output_weights(none))
    assert (gradients["q"] == 0).all()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 300), (2, 2, 150), (3, 5, 20), (5, 6, 130)])
def test_result_does_not_depend_on_the_number_of_threads(isa, threads, sizes, biased):
    case = of_size(*sizes)
    case = replace(case, attn_mask=torch.randn(1, 1, sizes[2], sizes[2]) if biased else None)
    weights = output_weights(case)
    _, gradients = forward_backward(call_operator, case, weights)
    torch.set_num_threads(1)
    _, expected = forward_backward(call_operator, case, weights)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


def test_only_what_needs_a_gradient_gets_one():
    case = model_case(10, 10, "mask", D=8, Dv=8)
    v = case.v.clone().requires_grad_()
    bias = torch.randn(10, 10, requires_grad=True)
    cos = case.rotary_q.cos.clone().requires_grad_()
    rotary = Rotary(cos, case.rotary_q.sin, case.rotary_q.rotate)
    out = rope_attention(case.q, case.k, v, rotary, attn_mask=bias)
    out.sum().backward()
    exact = [t.detach().requires_grad_() for t in (v, bias, cos)]
    rotary = Rotary(exact[2], case.rotary_q.sin, case.rotary_q.rotate)
    reference.rope_attention(case.q, case.k, exact[0], rotary, attn_mask=exact[1]).sum().backward()
    for t, e in zip((v, bias, cos), exact, strict=True):
        torch.testing.assert_close(t.grad, e.grad)


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("cls_rope", MODES)
def test_learned_frequencies_get_gradients(backend, heads, cls_rope):
    """One table serves queries and keys: their gradients add up."""
    case = model_case(12, 12, cls_rope, torch.float32, D=8, Dv=8)
    embedding = LearnedRotaryEmbedding(8, num_axes=2, heads=heads, num_prefix_tokens=3)
    grads = []
    for function in (rope_attention, reference.rope_attention):
        rotary = embedding((3, 3))
        out = function(case.q, case.k, case.v, rotary, cls_rope=cls_rope)
        grads.append(torch.autograd.grad((out * case.q).sum(), embedding.freqs)[0])
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_second_derivative_is_refused_clearly():
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(rope_attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="order of differentiation must be at most 1, got 2"):
        grad.sum().backward()
