"""The reference against plain Python loops over every pair, and against PyTorch where the two overlap."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from x_rope_cls import Rotary, reference

INF = math.inf


def random_rotary(tokens: int, pairs: int, interleaved: bool, lead: tuple[int, ...] = (), rotate=None) -> Rotary:
    angles = torch.randn(*lead, tokens, pairs, dtype=torch.float64) * 3
    return Rotary(angles.cos() * 1.1, angles.sin() * 1.1, rotate, interleaved)


def table_entry(table: Tensor, b: int, h: int, n: int, i: int) -> float:
    while table.dim() < 4:
        table = table[None]
    return table[min(b, table.shape[0] - 1), min(h, table.shape[1] - 1), n, i].item()


def has_position(rotary: Rotary, b: int, n: int) -> bool:
    if rotary.rotate is None:
        return True
    return bool(rotary.rotate[b, n] if rotary.rotate.dim() == 2 else rotary.rotate[n])


def turn(x: list[float], rotary: Rotary, b: int, h: int, n: int, inverse: bool = False) -> list[float]:
    y = list(x)
    pairs = rotary.cos.shape[-1]
    for i in range(pairs):
        first, second = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + pairs)
        c, s = table_entry(rotary.cos, b, h, n, i), table_entry(rotary.sin, b, h, n, i)
        s = -s if inverse else s
        y[first], y[second] = x[first] * c - x[second] * s, x[first] * s + x[second] * c
    return y


def loop_rope(x: Tensor, rotary: Rotary, inverse: bool) -> Tensor:
    out = x.clone()
    for b, h, n in itertools.product(*map(range, x.shape[:3])):
        if has_position(rotary, b, n):
            out[b, h, n] = torch.tensor(turn(x[b, h, n].tolist(), rotary, b, h, n, inverse), dtype=x.dtype)
    return out


def loop_score(q, k, rotary_q, rotary_k, cls_rope, b, h, hk, n, m) -> float:
    query, key = q[b, h, n].tolist(), k[b, hk, m].tolist()
    if rotary_q is not None:
        q_has, k_has = has_position(rotary_q, b, n), has_position(rotary_k, b, m)
        if cls_rope == "rotate":
            q_has = k_has = True
        elif cls_rope == "mask":
            q_has = k_has = q_has and k_has
        query = turn(query, rotary_q, b, h, n) if q_has else query
        key = turn(key, rotary_k, b, hk, m) if k_has else key
    return sum(x * y for x, y in zip(query, key, strict=True))


def loop_attention(q, k, v, rotary_q, rotary_k, cls_rope, attn_mask, key_mask, scale, keep=None, keep_scale=1.0):
    (B, H, N, _), (Hkv, M, Dv) = q.shape, v.shape[1:]
    out, lse = torch.zeros(B, H, N, Dv, dtype=q.dtype), torch.full((B, H, N), -INF, dtype=q.dtype)
    mask = None if attn_mask is None else attn_mask.expand(B, H, N, M)
    for b, h, n in itertools.product(range(B), range(H), range(N)):
        hk, scores = h // (H // Hkv), {}
        for m in range(M):
            score = scale * loop_score(q, k, rotary_q, rotary_k, cls_rope, b, h, hk, n, m)
            if mask is not None:
                score = (score if mask[b, h, n, m] else -INF) if mask.dtype == torch.bool else score + mask[b, h, n, m]
            if (key_mask is None or key_mask[b, m]) and score != -INF:
                scores[m] = float(score)
        if not scores:
            continue
        total = sum(math.exp(score) for score in scores.values())
        lse[b, h, n] = math.log(total)
        for m, score in scores.items():
            if keep is None or keep[b, h, n, m]:
                out[b, h, n] += math.exp(score) / total * keep_scale * v[b, hk, m]
    return out, lse


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("rotate_dims", [0, 1, 2])
def test_rope_equals_loops(interleaved, inverse, lead, rotate_dims):
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    rotate = [None, torch.rand(5) < 0.5, torch.rand(2, 5) < 0.5][rotate_dims]
    lead = (*lead, 1)[: len(lead)]
    rotary = random_rotary(5, 2, interleaved, lead, rotate)
    torch.testing.assert_close(reference.rope(x, rotary, inverse=inverse), loop_rope(x, rotary, inverse))


@pytest.mark.parametrize("cls_rope", ["rotate", "skip", "mask"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "bias", "key", "all"])
@pytest.mark.parametrize("cross", [False, True])
def test_attention_equals_loops(cls_rope, interleaved, mask, cross):
    B, H, Hkv, N, M, D, Dv = 2, 4, 2, 5, 6 if cross else 5, 6, 3
    q, k = torch.randn(B, H, N, D).double(), torch.randn(B, Hkv, M, D).double()
    v = torch.randn(B, Hkv, M, Dv).double()
    rotary_q = random_rotary(N, 2, interleaved, rotate=torch.rand(B, N) < 0.6)
    rotary_k = random_rotary(M, 2, interleaved, (B, Hkv), rotate=torch.rand(M) < 0.6) if cross else rotary_q
    attn_mask = key_mask = None
    if mask in ("bool", "all"):
        attn_mask = torch.rand(B, 1, N, M) < 0.7
        attn_mask[0, 0, 1] = False
    if mask == "bias":
        attn_mask = torch.randn(H, N, M).double()
        attn_mask[torch.rand(H, N, M) < 0.3] = -INF
    if mask in ("key", "all"):
        key_mask = torch.rand(B, M) < 0.7
        key_mask[1] = False
    out, lse = reference.rope_attention(
        q,
        k,
        v,
        rotary_q,
        rotary_k=rotary_k if cross else None,
        cls_rope=cls_rope,
        attn_mask=attn_mask,
        key_mask=key_mask,
        scale=0.7,
        return_lse=True,
    )
    expected = loop_attention(q, k, v, rotary_q, rotary_k, cls_rope, attn_mask, key_mask, 0.7)
    torch.testing.assert_close((out, lse), expected)


def test_attention_without_rotary_is_sdpa():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 3)
    bias = torch.randn(5, 7)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)
    torch.testing.assert_close(reference.rope_attention(q, k, v, attn_mask=bias), expected)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_equals_loops(p):
    q, k, v = (torch.randn(2, 2, 3, 4).double() for _ in range(3))
    out, lse = reference.rope_attention(q, k, v, dropout_p=p, seed=-5, return_lse=True)
    keep = reference.dropout_keep_mask(-5, 2, 2, 3, 3, p)
    expected, expected_lse = loop_attention(
        q, k, v, None, None, "mask", None, None, 0.5, keep, 1 / (1 - p) if p < 1 else 0.0
    )
    torch.testing.assert_close((out, lse), (expected, expected_lse))


def test_rows_without_keys_are_zero_with_zero_gradient():
    q, k, v = (torch.randn(2, 2, 3, 4, requires_grad=True) for _ in range(3))
    bias = torch.zeros(3, 3)
    bias[1] = -INF
    bias.requires_grad_()
    key_mask = torch.tensor([[True, True, False], [False, False, False]])
    out, lse = reference.rope_attention(q, k, v, attn_mask=bias, key_mask=key_mask, return_lse=True)
    assert (out[1] == 0).all()
    assert (out[0, :, 1] == 0).all()
    assert (lse[1] == -INF).all()
    assert lse[0, :, 0].isfinite().all()
    grads = torch.autograd.grad((out.sum() + lse[lse.isfinite()].sum()), (q, k, v, bias))
    assert all(grad.isfinite().all() for grad in grads)
    assert all((grad[1] == 0).all() for grad in grads[:3])
    assert (grads[0][0, :, 1] == 0).all()
    assert (grads[3][1] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_masked_keys_never_matter(bad):
    q, k, v = (torch.randn(2, 2, 3, 4) for _ in range(3))
    key_mask = torch.tensor([[True, False, True], [True, True, False]])
    rotary = random_rotary(3, 2, True, rotate=torch.tensor([False, True, True]))
    expected = reference.rope_attention(q, k, v, rotary, key_mask=key_mask)
    hidden = ~key_mask[:, None, :, None]
    dirty = [t.masked_fill(hidden, bad).requires_grad_() for t in (k, v)]
    out = reference.rope_attention(q, *dirty, rotary, key_mask=key_mask)
    torch.testing.assert_close(out, expected)
    for grad in torch.autograd.grad(out.sum(), dirty):
        assert grad.isfinite().all()
        assert (grad.masked_select(hidden) == 0).all()


def test_no_keys_and_no_queries():
    q = torch.randn(2, 2, 3, 4)
    out, lse = reference.rope_attention(q, q[:, :, :0], q[:, :, :0], return_lse=True)
    assert (out == 0).all()
    assert (lse == -INF).all()
    assert reference.rope_attention(q[:, :, :0], q, q).shape == (2, 2, 0, 4)


@pytest.mark.parametrize("batched_query", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_late_cls_pool_equals_attention_over_the_tokens(batched_query, masked):
    x = torch.randn(2, 5, 6).double()
    query = torch.randn(2 if batched_query else 1, 3, 2, 6).double()
    key_mask = torch.rand(2, 5) < 0.6 if masked else None
    out = reference.late_cls_pool(x, query, key_mask=key_mask, scale=0.3, return_lse=True)
    expected = loop_attention(query.expand(2, 3, 2, 6), x[:, None], x[:, None], None, None, "mask", None, key_mask, 0.3)
    torch.testing.assert_close(out, expected)
    default = reference.late_cls_pool(x, query)
    torch.testing.assert_close(default, reference.late_cls_pool(x, query, scale=1.0))


def loop_norm(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """One token at a time."""
    y = x.clone()
    for b, n in itertools.product(*map(range, x.shape[:2])):
        values = x[b, n].tolist()
        mean = sum(values) / len(values) if norm == "layer" else 0.0
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        for c, value in enumerate(values):
            factor = 1.0 if weight is None else weight[c].item()
            y[b, n, c] = factor * (value - mean) / math.sqrt(variance + eps) + (0.0 if bias is None else bias[c].item())
    return y


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_late_cls_pool_with_a_norm_equals_loops(norm, masked, weighted, shifted):
    x, query = torch.randn(2, 5, 6).double() + 1, torch.randn(2, 3, 2, 6).double()
    weight, bias = (torch.randn(6).double() if given else None for given in (weighted, shifted))
    key_mask = torch.tensor([[True, False, True, True, True], [False] * 5]) if masked else None
    vectors = {"norm": norm, "norm_weight": weight, "norm_bias": bias, "norm_eps": 0.2}
    out = reference.late_cls_pool(x, query, key_mask=key_mask, scale=0.3, return_lse=True, **vectors)
    states = loop_norm(x, norm, weight, bias, 0.2)[:, None]
    torch.testing.assert_close(out, loop_attention(query, states, states, None, None, "mask", None, key_mask, 0.3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_late_cls_pool_norms_as_torch_does(norm, dtype):
    """The same states as F.layer_norm and F.rms_norm in the same dtype, to a rounding."""
    x, query = torch.randn(2, 5, 16).to(dtype), torch.randn(1, 2, 3, 16).to(dtype)
    weight, bias = torch.randn(16, dtype=dtype), torch.randn(16, dtype=dtype)
    if norm == "layer":
        states = torch.nn.functional.layer_norm(x, (16,), weight, bias)
    else:
        states, bias = torch.nn.functional.rms_norm(x, (16,), weight, 1e-5), None
    expected = reference.late_cls_pool(states, query, scale=0.25)
    out = reference.late_cls_pool(x, query, scale=0.25, norm=norm, norm_weight=weight, norm_bias=bias)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("bad", [0.0, math.nan, INF])
def test_late_cls_pool_never_reads_masked_tokens(norm, bad):
    """Nor does their variance matter, which is 0 where all channels are alike."""
    x, query = torch.randn(2, 5, 6), torch.randn(1, 2, 1, 6)
    key_mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    vectors = {"norm": norm, "norm_eps": 0.0}
    if norm:
        vectors |= {"norm_weight": torch.randn(6, requires_grad=True), "norm_bias": torch.randn(6, requires_grad=True)}
    dirty = x.masked_fill(~key_mask[:, :, None], bad).requires_grad_()
    pooled, lse = reference.late_cls_pool(dirty, query, key_mask=key_mask, return_lse=True, **vectors)
    expected = reference.late_cls_pool(x[:1, key_mask[0]], query, **vectors)
    torch.testing.assert_close(pooled[:1], expected)
    assert (pooled[1] == 0).all()
    assert (lse[1] == -INF).all()
    leaves = [dirty, *(t for t in vectors.values() if isinstance(t, Tensor))]
    grad, *others = torch.autograd.grad(pooled.sum(), leaves)
    assert (grad[~key_mask] == 0).all()
    assert all(t.isfinite().all() for t in (grad, *others))


def test_late_cls_pool_refuses_unknown_norms():
    with pytest.raises(ValueError, match="norm must be 'layer', 'rms' or None, got 'batch'"):
        reference.late_cls_pool(torch.randn(1, 2, 3), torch.randn(1, 1, 1, 3), norm="batch")


def philox_in_python_integers(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """The generator once more, with integers of unlimited size."""
    c, k = list(counter), list(key)
    for i in range(rounds):
        if i > 0:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return c


# Known answers published with Random123 (kat_vectors): counter, key, result.
KNOWN_ANSWERS = {
    7: [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ],
    10: [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
}


@pytest.mark.parametrize(("rounds", "case"), [(r, case) for r, cases in KNOWN_ANSWERS.items() for case in cases])
def test_philox_known_answers(rounds, case):
    counter, key, expected = ([int(word, 16) for word in words.split()] for words in case)
    words = reference.philox_4x32(tuple(torch.tensor(c) for c in counter), tuple(key), rounds)
    assert [int(word) for word in words] == expected
    assert philox_in_python_integers(counter, key, rounds) == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 17, -(2**63), 2**63 - 1])
def test_dropout_keep_mask_equals_integers(seed):
    B, H, N, M, p = 2, 3, 2, 290, 0.25
    keep = reference.dropout_keep_mask(seed, B, H, N, M, p)
    key = [seed % 2**32, (seed >> 32) % 2**32]
    for b, h, n, m in [*itertools.product((1,), (2,), range(N), range(M)), (0, 0, 0, 0), (0, 1, 1, 289)]:
        words = philox_in_python_integers([m // 128 * 32 + m % 32, n, b * H + h, 0], key, 7)
        assert keep[b, h, n, m] == (words[m // 32 % 4] >= math.floor(p * 2**32))


def test_dropout_keep_mask_rates():
    keep = reference.dropout_keep_mask(7, 2, 2, 100, 100, 0.3)
    assert abs(keep.double().mean().item() - 0.7) < 0.01
    assert not reference.dropout_keep_mask(7, 1, 1, 10, 10, 1.0).any()
    assert reference.dropout_keep_mask(7, 1, 1, 10, 10, 0.0).all()
    assert not torch.equal(keep, reference.dropout_keep_mask(8, 2, 2, 100, 100, 0.3))


def test_float32_is_close_to_float64():
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    rotary = random_rotary(9, 4, True, rotate=torch.arange(9) > 1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 1e-2)):
        exact = reference.rope_attention(*(t.to(dtype).double() for t in (q, k, v)), rotary)
        out = reference.rope_attention(*(t.to(dtype) for t in (q, k, v)), rotary)
        assert out.dtype == dtype
        assert (out.double() - exact).abs().max() < tolerance


def test_unknown_mode_and_missing_seed_are_refused():
    q = torch.randn(1, 1, 3, 4)
    rotary = random_rotary(3, 2, True)
    with pytest.raises(ValueError, match=r"cls_rope must be 'rotate', 'skip' or 'mask', got 'masked'"):
        reference.rope_attention(q, q, q, rotary, cls_rope="masked")
    with pytest.raises(ValueError, match="seed must be given"):
        reference.rope_attention(q, q, q, dropout_p=0.1)
