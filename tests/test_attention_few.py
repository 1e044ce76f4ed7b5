"""rope_attention with a few queries over many keys, which takes kernels of its own, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import call_operator, check_backward, check_forward
from strategies import DTYPES, LAYOUTS, MODES, Generator, attention_cases, examples, lay_out
from test_attention_forward import model_case

# Around blocks of 128 keys and parts of at least 256.
LONG = st.sampled_from((1, 127, 128, 129, 255, 256, 511, 512, 513, 700, 1025))


def lengthen(case, keys: int, seed: int):
    """The same case with so many keys: keys, values, tables and masks are repeated, values drawn anew."""
    generator = Generator(seed)
    B, Hkv, M, D = case.k.shape
    index = torch.arange(keys) % max(M, 1)

    def grow(t, axis):
        return t if t is None or t.shape[axis] != M else t.index_select(axis, index)

    rotary_k = case.rotary_k
    if rotary_k is not None:
        cos, sin = (grow(t, -2) for t in (rotary_k.cos, rotary_k.sin))
        rotate = grow(rotary_k.rotate, -1)
        rotary_k = replace(rotary_k, cos=cos, sin=sin, rotate=rotate)
    mask = case.attn_mask
    if mask is not None and mask.dim() and mask.shape[-1] == M:
        mask = mask.index_select(-1, index)
    return replace(
        case,
        k=generator.normal(B, Hkv, keys, D, dtype=case.k.dtype),
        v=generator.normal(B, Hkv, keys, case.v.shape[-1], dtype=case.v.dtype),
        rotary_k=rotary_k,
        attn_mask=mask,
        key_mask=grow(case.key_mask, -1),
    )


@hypothesis.given(case=attention_cases(tokens=st.integers(1, 16)), keys=LONG, seed=st.integers(0, 99))
@examples(150)
def test_random_cases(case, keys, seed):
    check_forward(lengthen(case, keys, seed))


@hypothesis.given(case=attention_cases(tokens=st.integers(1, 16)), keys=LONG, seed=st.integers(0, 99))
@examples(40)
def test_random_cases_backward(case, keys, seed):
    check_backward(lengthen(case, keys, seed))


@pytest.mark.parametrize("N", [1, 4, 16, 17])
@pytest.mark.parametrize("cls_rope", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_the_keys(N, cls_rope, dtype):
    check_forward(model_case(N, 1500, cls_rope, dtype, rotate="scattered"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_memory(layout):
    case = model_case(3, 600, "mask", torch.float32, D=32, Dv=16)
    check_forward(replace(case, k=lay_out(case.k, layout), v=lay_out(case.v, layout)))
    check_forward(replace(case, rotary_q=None, rotary_k=None, k=lay_out(case.k, layout), v=lay_out(case.v, layout)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_keys_never_matter(backend, dtype):
    case = model_case(2, 900, "mask", dtype, D=16, Dv=8)
    key_mask = Generator(5).chance(0.6, 2, 900)
    key_mask[0, 100:800] = False
    expected = call_operator(replace(case, key_mask=key_mask))
    hidden = ~key_mask[:, None, :, None]
    k, v = (t.masked_fill(hidden, torch.nan) for t in (case.k, case.v))
    got = call_operator(replace(case, k=k, v=v, key_mask=key_mask))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_batch_without_keys(backend):
    case = model_case(2, 900, "mask")
    out, lse = call_operator(replace(case, key_mask=torch.tensor([[True], [False]]).expand(2, 900)))
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    assert out[0].isfinite().all()


def test_not_a_number_in_one_part_is_seen(backend):
    case = model_case(2, 1500, "mask")
    case.k[0, 0, 700] = torch.nan
    out, _ = call_operator(case)
    assert out[0, 0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("N", [1, 5])
def test_result_does_not_depend_on_the_number_of_threads(isa, threads, N):
    case = model_case(N, 3000, "mask", rotate="scattered")
    got = call_operator(case)
    torch.set_num_threads(1)
    expected = call_operator(case)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    again = call_operator(case)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
