"""What must hold whatever the numbers are: the meaning of the three modes. Checked on the operators, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from strategies import DTYPES, MODES, Generator
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from x_rope_cls import Rotary, RotaryEmbedding, rope_attention
from x_rope_cls.reference import rope


@dataclass(frozen=True)
class Sequence:
    """Self-attention over tokens with integer positions, some of which have none."""

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    rotate: Tensor
    embedding: RotaryEmbedding

    def attend(self, cls_rope: str, positions: Tensor | None = None, rotate: Tensor | None = None) -> Tensor:
        positions = self.positions if positions is None else positions
        rotary = self.embedding(positions, self.rotate if rotate is None else rotate)
        return rope_attention(self.q, self.k, self.v, rotary, cls_rope=cls_rope)


@st.composite
def sequences(draw: st.DrawFn, min_special: int = 0) -> Sequence:
    generator = Generator(draw(st.integers(0, 2**16)))
    B, Hkv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    N, D = draw(st.integers(2, 40)), 2 * draw(st.integers(1, 20))
    special = draw(st.integers(min_special, N))
    rotate = torch.ones(N, dtype=torch.bool)
    rotate[torch.randperm(N, generator=torch.Generator().manual_seed(generator.seed))[:special]] = False
    # float64 angles: a shift by 1,000 changes float32 ones in the fourth digit
    embedding = RotaryEmbedding(2 * draw(st.integers(1, D // 2)), interleaved=draw(st.booleans())).double()
    positions = torch.tensor(draw(st.lists(st.integers(-100, 100), min_size=N, max_size=N)))
    shapes = ((B, Hkv * group, N, D), (B, Hkv, N, D), (B, Hkv, N, draw(st.integers(1, 9))))
    return Sequence(*(generator.normal(*shape) for shape in shapes), positions, rotate, embedding)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@hypothesis.given(sequences(min_special=1), st.integers(0, 2**16))
def test_special_rows_do_not_change_when_positions_change(backend, sequence, seed):
    others = torch.randint(-1000, 1000, sequence.positions.shape, generator=torch.Generator().manual_seed(seed))
    before, after = sequence.attend("mask"), sequence.attend("mask", others)
    special = ~sequence.rotate
    assert torch.equal(before[:, :, special], after[:, :, special])


def test_special_rows_do_change_in_the_other_modes(backend):
    generator = Generator(0)
    q, k, v = (generator.normal(1, 1, 6, 8) for _ in range(3))
    sequence = Sequence(q, k, v, torch.arange(6), torch.arange(6) > 1, RotaryEmbedding(8).double())
    for mode in ("rotate", "skip"):
        before, after = sequence.attend(mode), sequence.attend(mode, torch.arange(6) * 2)
        assert (before[:, :, :2] - after[:, :, :2]).abs().max() > 1e-3


@hypothesis.given(sequences(), st.integers(-1000, 1000))
def test_a_global_shift_changes_nothing_in_mask(backend, sequence, shift):
    close(sequence.attend("mask", sequence.positions + shift), sequence.attend("mask"))
    close(sequence.attend("rotate", sequence.positions + shift), sequence.attend("rotate"))


def test_a_global_shift_does_change_skip(backend):
    generator = Generator(0)
    q, k, v = (generator.normal(1, 1, 6, 8) for _ in range(3))
    sequence = Sequence(q, k, v, torch.arange(6), torch.arange(6) > 1, RotaryEmbedding(8).double())
    assert (sequence.attend("skip") - sequence.attend("skip", torch.arange(6) + 5)).abs().max() > 1e-3


@hypothesis.given(sequences())
def test_positions_of_special_tokens_never_matter(backend, sequence):
    moved = torch.where(sequence.rotate, sequence.positions, 77)
    for mode in ("skip", "mask"):
        assert torch.equal(sequence.attend(mode, moved), sequence.attend(mode))


@hypothesis.given(sequences(), st.integers(0, 2**16))
def test_reordering_tokens_with_their_positions_reorders_the_result(backend, sequence, seed):
    order = torch.randperm(len(sequence.positions), generator=torch.Generator().manual_seed(seed))
    for mode in MODES:
        rotary = sequence.embedding(sequence.positions[order], sequence.rotate[order])
        q, k, v = (t[:, :, order] for t in (sequence.q, sequence.k, sequence.v))
        close(rope_attention(q, k, v, rotary, cls_rope=mode), sequence.attend(mode)[:, :, order])


@hypothesis.given(sequences())
def test_no_special_tokens_equals_rotate(backend, sequence):
    everywhere = torch.ones_like(sequence.rotate)
    for mode in ("skip", "mask"):
        close(sequence.attend(mode, rotate=everywhere), sequence.attend("rotate"))


@hypothesis.given(sequences())
def test_all_special_equals_no_rotation(backend, sequence):
    nowhere = torch.zeros_like(sequence.rotate)
    expected = scaled_dot_product_attention(sequence.q, sequence.k, sequence.v, enable_gqa=True)
    for mode in ("skip", "mask"):
        close(sequence.attend(mode, rotate=nowhere), expected)


@hypothesis.given(sequences())
def test_one_special_token_at_position_zero_is_the_same_in_rotate_and_skip(backend, sequence):
    positions = sequence.positions.clone()
    positions[0] = 0
    rotate = torch.arange(len(positions)) > 0
    close(sequence.attend("skip", positions, rotate), sequence.attend("rotate", positions, rotate))


@hypothesis.given(sequences())
def test_mask_is_plain_attention_on_three_times_the_channels(backend, sequence):
    """Queries [m Rq, q, m q], keys [m Rk, k, -m k]: the score of a masked pair loses its second term to its third."""
    rotary = sequence.embedding(sequence.positions)
    m = sequence.rotate[:, None].double()
    rotated_q, rotated_k = (rope(t, rotary) for t in (sequence.q, sequence.k))
    q = torch.cat((m * rotated_q, sequence.q, m * sequence.q), dim=-1)
    k = torch.cat((m * rotated_k, sequence.k, -m * sequence.k), dim=-1)
    scale = sequence.q.shape[-1] ** -0.5
    expected = scaled_dot_product_attention(q, k, sequence.v, scale=scale, enable_gqa=True)
    close(sequence.attend("mask"), expected)


@hypothesis.given(sequences())
def test_masked_keys_are_as_if_they_were_not_there(backend, sequence):
    """key_mask equals leaving the keys out, for every mode."""
    N = len(sequence.positions)
    keep = torch.arange(N) % 3 > 0
    B = sequence.q.shape[0]
    rotary = sequence.embedding(sequence.positions, sequence.rotate)
    fewer = sequence.embedding(sequence.positions[keep], sequence.rotate[keep])
    q, k, v = sequence.q, sequence.k, sequence.v
    for mode in MODES:
        out = rope_attention(q, k, v, rotary, cls_rope=mode, key_mask=keep.expand(B, N))
        close(out, rope_attention(q, k[:, :, keep], v[:, :, keep], rotary, rotary_k=fewer, cls_rope=mode))


@hypothesis.given(sequences())
def test_bool_mask_key_mask_and_infinite_bias_are_the_same(backend, sequence):
    N, B = len(sequence.positions), sequence.q.shape[0]
    rotary = sequence.embedding(sequence.positions, sequence.rotate)
    keep = (torch.arange(N) % 3 > 0).expand(B, N)
    call = lambda **masks: rope_attention(sequence.q, sequence.k, sequence.v, rotary, **masks)  # noqa: E731
    by_key = call(key_mask=keep)
    close(call(attn_mask=keep[:, None, None]), by_key)
    close(call(attn_mask=torch.zeros(N, dtype=torch.float64).masked_fill(~keep[0], -torch.inf)), by_key)


@hypothesis.given(sequences(), st.integers(1, 5))
def test_repeated_key_heads_are_grouped_queries(backend, sequence, extra):
    rotary = sequence.embedding(sequence.positions, sequence.rotate)
    group = sequence.q.shape[1] // sequence.k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (sequence.k, sequence.v))
    close(rope_attention(sequence.q, k, v, rotary), sequence.attend("mask"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls_rope", MODES)
def test_constant_values_pass_through(backend, dtype, cls_rope):
    """Attention weights add up to 1, also over many blocks of keys."""
    q = Generator(1).normal(1, 2, 33, 16, dtype=dtype)
    k = Generator(2).normal(1, 2, 700, 16, dtype=dtype)
    tables = RotaryEmbedding(16)
    out = rope_attention(
        q, k, torch.ones_like(k), tables(33, torch.arange(33) > 3), rotary_k=tables(700), cls_rope=cls_rope
    )
    # Weights are rounded to the dtype before they meet the values where the machine multiplies in bfloat16.
    torch.testing.assert_close(
        out.double(), torch.ones_like(out).double(), rtol=0, atol=2 * torch.finfo(dtype).eps + 1e-6
    )


@pytest.mark.parametrize("cls_rope", MODES)
def test_a_stretch_of_the_tables_scales_rotated_scores(backend, cls_rope):
    """xpos: inverse scales of queries and keys cancel for one position."""
    q, k, v = (Generator(i).normal(1, 2, 12, 8) for i in range(3))
    rotary = RotaryEmbedding(8).double()(12)
    up = Rotary(rotary.cos * 3, rotary.sin * 3)
    down = Rotary(rotary.cos / 3, rotary.sin / 3)
    close(
        rope_attention(q, k, v, up, rotary_k=down, cls_rope=cls_rope),
        rope_attention(q, k, v, rotary, cls_rope=cls_rope),
    )
