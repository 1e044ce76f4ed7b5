"""rope_attention, outputs, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import pytest
import torch
from cases import call_operator, call_reference, check_forward, in_float64
from strategies import (
    DTYPES,
    LAYOUTS,
    MODES,
    AttentionCase,
    Generator,
    attention_cases,
    examples,
    lay_out,
    make_rotate,
    make_tables,
)

from x_rope_cls import Rotary, RotaryEmbedding, rope_attention

LONG = [(1, 700), (700, 1), (193, 520), (300, 300), (97, 1025)]


def model_case(
    N: int,
    M: int,
    cls_rope: str,
    dtype: torch.dtype = torch.float32,
    D: int = 64,
    Dv: int = 64,
    rotate: str = "front",
    interleaved: bool = True,
) -> AttentionCase:
    """What an encoder calls: two heads, half of the channels rotated, special tokens."""
    generator = Generator(N * 10_007 + M)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    rotaries = []
    for tokens in (N, M):
        cos, sin = make_tables("shared", generator, 2, 2, tokens, max(D // 4, 1), compute)
        rotaries.append(Rotary(cos, sin, make_rotate(rotate, generator, 2, tokens), interleaved))
    q, k, v = (generator.normal(2, 2, n, d, dtype=dtype) for n, d in ((N, D), (M, D), (M, Dv)))
    return AttentionCase(q, k, v, *rotaries, cls_rope, None, None, D**-0.5, 0.0, 0)


def of_size(B: int, Hkv: int, N: int) -> AttentionCase:
    """Self-attention with two query heads a key head, so that batches and heads are more or fewer than threads."""
    generator = Generator(B + N)
    q, k, v = (generator.normal(B, h, N, 32, dtype=torch.float32) for h in (2 * Hkv, Hkv, Hkv))
    rotary = RotaryEmbedding(16)(N, torch.arange(N) > 1)
    return AttentionCase(q, k, v, rotary, rotary, "mask", None, None, 0.2, 0.0, 0)


@hypothesis.given(case=attention_cases())
@examples(600)
def test_random_cases(case):
    check_forward(case)


@pytest.mark.parametrize(("N", "M"), LONG)
@pytest.mark.parametrize("cls_rope", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_blocks(N, M, cls_rope, dtype):
    case = model_case(N, M, cls_rope, dtype, rotate="scattered")
    check_forward(case)


def test_many_blocks_with_masks_and_dropout():
    N = 600
    generator = Generator(3)
    case = model_case(N, N, "mask", rotate="per_batch")
    key_mask = generator.chance(0.8, 2, N)
    key_mask[0, 100:500] = False  # whole blocks of keys
    check_forward(replace(case, key_mask=key_mask))
    check_forward(replace(case, attn_mask=generator.chance(0.8, N, N), key_mask=key_mask))
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    check_forward(replace(case, attn_mask=causal, dropout_p=0.25, seed=2**40 + 1))
    check_forward(replace(case, attn_mask=3 * generator.normal(2, 2, N, N, dtype=torch.float32), dropout_p=0.5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_of_memory(layout, dtype):
    case = model_case(33, 47, "mask", dtype, D=24, Dv=17)
    check_forward(replace(case, q=lay_out(case.q, layout), k=lay_out(case.k, layout), v=lay_out(case.v, layout)))


@pytest.mark.parametrize("D", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 96, 128, 160, 256, 300])
def test_head_dims(D):
    for Dv in (D, 1, 40):
        check_forward(model_case(21, 37, "mask" if D > 1 else "rotate", D=D, Dv=Dv) if D > 1 else _plain(D, Dv))


def _plain(D: int, Dv: int) -> AttentionCase:
    return replace(model_case(21, 37, "mask", D=2, Dv=Dv), q=torch.randn(2, 2, 21, D), k=torch.randn(2, 2, 37, D),
                   rotary_q=None, rotary_k=None)  # fmt: skip


@pytest.mark.parametrize("magnitude", [1e-4, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_and_large_scores(magnitude, dtype):
    case = model_case(40, 70, "mask", dtype)
    exact = call_reference(in_float64(replace(case, scale=magnitude)))
    check_forward(replace(case, scale=magnitude), scores=exact[1].abs().max().item())


@pytest.mark.parametrize("cls_rope", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [3.9, 4.1, 4.6, 4.8, 12.0])
def test_scores_about_the_bound_that_needs_no_maximum(length, cls_rope, dtype):
    """A score, in units of log2, is at most length² · log2(e), which is compared with 32: at 4.71."""
    case = model_case(150, 330, cls_rope, dtype, rotate="scattered")
    q, k = (t * (length / t.float().norm(dim=-1, keepdim=True)).to(dtype) for t in (case.q, case.k))
    k[:, :, ::7] = q[:, :, :48]  # as large as the bound allows, or as low
    k[:, :, 1::7] = -q[:, :, 48:95]
    check_forward(replace(case, q=q, k=k, scale=1.0), scores=length**2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_long_query_or_key_among_others(dtype):
    """Whether a maximum is needed differs between heads, and between blocks of rows."""
    case = model_case(220, 300, "mask", dtype)
    q, k = case.q.clone(), case.k.clone()
    q[0, 0, 150] *= 40
    k[1, 0, 299] *= 40
    case = replace(case, q=q, k=k)
    check_forward(case, scores=call_reference(in_float64(case))[1].max().item())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_scores_as_large_as_the_bound(sign, dtype):
    """Weights are relative to a score of 0, which none of these is near."""
    case = replace(model_case(30, 530, "rotate", dtype), rotary_q=None, rotary_k=None)
    q, k = torch.full_like(case.q, 0.58), torch.full_like(case.k, sign * 0.58)
    check_forward(replace(case, q=q, k=k, scale=1.0), scores=32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [16, 48])
@pytest.mark.parametrize("cls_rope", MODES)
def test_what_an_earlier_call_left_in_memory_does_not_matter(backend, D, cls_rope, dtype):
    case = model_case(90, 130, cls_rope, dtype, D=D)
    call_operator(case)
    expected = call_operator(case)
    length = (20 / D) ** 0.5  # of all scores: weights of 2^29 stay behind in the memory of scores
    call_operator(replace(case, q=torch.full_like(case.q, length), k=torch.full_like(case.k, length), scale=1.0,
                          rotary_q=None, rotary_k=None, cls_rope="rotate"))  # fmt: skip
    out, lse = call_operator(case)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_increasing_and_decreasing_scores():
    """The running maximum moves at every block of keys, or only at the first."""
    for sign in (1, -1):
        case = model_case(9, 900, "mask", torch.float32)
        bias = sign * torch.linspace(-200, 200, 900)
        check_forward(replace(case, attn_mask=bias), scores=200)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls_rope", MODES)
def test_nan_in_a_query_stays_in_its_row(backend, dtype, cls_rope):
    case = model_case(20, 30, cls_rope, dtype, D=16, Dv=8)
    clean, _ = call_operator(case)
    case.q[0, 1, 5, 3] = torch.nan
    out, lse = call_operator(case)
    assert out[0, 1, 5].isnan().all()
    assert lse[0, 1, 5].isnan()
    out[0, 1, 5] = clean[0, 1, 5]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_key_reaches_every_query(backend, dtype):
    case = model_case(20, 30, "mask", dtype, D=16, Dv=8)
    case.k[1, 0, 29, 15] = torch.nan
    out, lse = call_operator(case)
    assert out[1, 0].isnan().all()
    assert lse[1, 0].isnan().all()
    assert out[0].isfinite().all()
    assert out[1, 1].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [3, 150])
def test_masked_keys_never_matter(backend, bad, dtype, N):
    case = model_case(N, 150, "mask", dtype, D=16, Dv=8)
    key_mask = Generator(5).chance(0.6, 2, 150)
    expected = call_operator(replace(case, key_mask=key_mask))
    hidden = ~key_mask[:, None, :, None]
    k, v = case.k.masked_fill(hidden, bad), case.v.masked_fill(hidden, bad)
    out = call_operator(replace(case, k=k, v=v, key_mask=key_mask))
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys(backend, dtype):
    case = model_case(20, 30, "mask", dtype, D=16, Dv=8)
    bias = torch.zeros(20, 30)
    bias[7] = -torch.inf
    dead_batch = torch.tensor([[True], [False]]).expand(2, 30)
    for some in (
        replace(case, attn_mask=bias, key_mask=dead_batch),
        replace(case, attn_mask=bias == 0, key_mask=dead_batch),
    ):
        out, lse = call_operator(some)
        assert (out[1] == 0).all()
        assert (out[0, :, 7] == 0).all()
        assert (lse[1] == -torch.inf).all()
        assert (lse[0, :, 7] == -torch.inf).all()
        check_forward(some)
    no_keys = replace(case, k=case.k[:, :, :0], v=case.v[:, :, :0], rotary_q=None, rotary_k=None)
    out, lse = call_operator(no_keys)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_many_heads_and_batches():
    """More (batch, head) pairs than threads, with grouped queries."""
    generator = Generator(11)
    q, k, v = (generator.normal(5, h, 19, 16, dtype=torch.float32) for h in (12, 3, 3))
    rotary = RotaryEmbedding(8)(19, torch.arange(19) > 1)
    check_forward(AttentionCase(q, k, v, rotary, rotary, "mask", None, None, 0.25, 0.0, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls_rope", MODES)
def test_heads_of_one_worker_are_of_any_length(cls_rope, dtype):
    """Eight heads a thread and more are handed out whole, and what the next one reads is asked for ahead."""
    generator = Generator(17)
    q, k, v = (generator.normal(4, h, n, 24, dtype=dtype) for h, n in ((6, 101), (3, 77), (3, 77)))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    tables = (RotaryEmbedding(16)(n, torch.arange(n) > 1) for n in (101, 77))
    rotaries = [Rotary(t.cos.to(compute), t.sin.to(compute), t.rotate, t.interleaved) for t in tables]
    key_mask = torch.arange(77) < torch.tensor([[77], [0], [1], [40]])
    check_forward(AttentionCase(q, k, v, *rotaries, cls_rope, None, key_mask, 0.2, 0.0, 0))


def with_special_tokens(special: int, N: int, dtype: torch.dtype) -> AttentionCase:
    """Mode mask, special tokens in front, two query heads for one key head."""
    generator = Generator(13)
    q, k, v = (generator.normal(1, h, N, 16, dtype=dtype) for h in (2, 1, 1))
    table = RotaryEmbedding(8)(N, torch.arange(N) >= special)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    rotary = Rotary(table.cos.to(compute), table.sin.to(compute), table.rotate, table.interleaved)
    return AttentionCase(q, k, v, rotary, rotary, "mask", None, None, 0.25, 0.0, 0)


@pytest.mark.parametrize("N", [511, 512, 513, 527, 545])
@pytest.mark.parametrize("special", [1, 4, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_special_tokens_at_the_border_of_a_block(dtype, special, N):
    """Few rows without a position, and keys that fit into a vector, take ways of their own."""
    check_forward(with_special_tokens(special, N, dtype))


@pytest.mark.parametrize("sizes", [(1, 1, 300), (2, 2, 150), (3, 5, 20), (5, 6, 130)])
def test_result_does_not_depend_on_the_number_of_threads(isa, threads, sizes):
    case = of_size(*sizes)
    out = call_operator(case)
    torch.set_num_threads(1)
    expected = call_operator(case)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])


@hypothesis.given(case=attention_cases(dropout=(0.0,)))
@examples(20)
def test_public_function_is_the_operator(case):
    hypothesis.assume(case.q.shape[2] == case.k.shape[2] or case.rotary_q is None or case.rotary_k is not case.rotary_q)
    out, lse = rope_attention(
        case.q,
        case.k,
        case.v,
        case.rotary_q,
        rotary_k=None if case.rotary_k is case.rotary_q else case.rotary_k,
        cls_rope=case.cls_rope,
        attn_mask=case.attn_mask,
        key_mask=case.key_mask,
        scale=case.scale,
        return_lse=True,
    )
    expected = call_operator(case)
    torch.testing.assert_close((out, lse), expected, rtol=0, atol=0, equal_nan=True)


def test_public_dropout_is_reproducible_and_drops():
    case = model_case(64, 64, "mask")

    def call(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return rope_attention(case.q, case.k, case.v, case.rotary_q, rotary_k=case.rotary_k, dropout_p=0.5)

    assert torch.equal(call(1), call(1))
    assert not torch.equal(call(1), call(2))
    torch.manual_seed(4)
    seed = int(torch.randint(2**63 - 1, ()))
    expected, _ = call_reference(replace(case, dropout_p=0.5, seed=seed))
    torch.testing.assert_close(call(4), expected)


def test_default_scale():
    case = model_case(10, 10, "mask", D=16)
    out = rope_attention(case.q, case.k, case.v, case.rotary_q, rotary_k=case.rotary_k)
    torch.testing.assert_close(out, call_operator(case)[0], rtol=0, atol=0)
