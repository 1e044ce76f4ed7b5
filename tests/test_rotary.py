"""The tables: angles, precision, prefixes, bad input, and x-transformers' numbers."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch

from x_rope_cls import AxialRotaryEmbedding, LearnedRotaryEmbedding, Rotary, RotaryEmbedding, apply_rope, rope_attention

EMBEDDINGS = {
    "sequence": (lambda: RotaryEmbedding(16, use_xpos=True), 2000),
    "axial": (lambda: AxialRotaryEmbedding(16, num_prefix_tokens=1), (40, 50)),
    "learned": (lambda: LearnedRotaryEmbedding(16, num_axes=2, heads=2), (40, 50)),
}
OPTIONS = [
    {},
    {"base": 500},
    {"interpolation_factor": 3.0},
    {"base_rescale_factor": 2.5},
    {"use_xpos": True, "scale_base": 64},
    {"use_xpos": True, "interpolation_factor": 2.0, "base": 100, "base_rescale_factor": 1.5},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dim", [4, 6, 32])
@pytest.mark.parametrize("double", [False, True])
def test_equals_x_transformers_to_the_bit(options, dim, double):
    x_transformers = pytest.importorskip("x_transformers.x_transformers")
    ours, theirs = RotaryEmbedding(dim, **options), x_transformers.RotaryEmbedding(dim, **options)
    if double:
        ours, theirs = ours.double(), theirs.double()
    for positions in (torch.arange(37), torch.randint(0, 4000, (2, 9))):
        freqs, scale = theirs(positions)
        scale = torch.ones(()) if not torch.is_tensor(scale) else scale
        for keys in (False, True):
            rotary = ours(positions, keys=keys)
            expected = scale**-1.0 if keys else scale
            for table, turn in ((rotary.cos, freqs.cos()), (rotary.sin, freqs.sin())):
                expected_table = (turn * expected)[..., ::2]
                expected_table = expected_table[0] if positions.dim() == 1 else expected_table[:, None]
                assert table.dtype == expected_table.dtype
                assert torch.equal(table, expected_table)


def test_one_pair_turns_by_the_position():
    """The one frequency of dim 2 is 1 whatever the base; x-transformers divides by zero there."""
    rotary = RotaryEmbedding(2, base=7, base_rescale_factor=2.0)(5)
    torch.testing.assert_close(rotary.cos[:, 0], torch.arange(5).float().cos())


@pytest.mark.parametrize("use_xpos", [False, True])
def test_equals_x_transformers_in_a_model(use_xpos):
    """Their apply_rotary_pos_emb, attention with both kinds of tables."""
    x_transformers = pytest.importorskip("x_transformers.x_transformers")
    ours, theirs = (cls(8, use_xpos=use_xpos) for cls in (RotaryEmbedding, x_transformers.RotaryEmbedding))
    q, k, v = (torch.randn(2, 3, 20, 12) for _ in range(3))
    freqs, scale = theirs.forward_from_seq_len(20)
    apply = x_transformers.apply_rotary_pos_emb
    inverse = scale**-1.0 if use_xpos else 1.0
    expected = torch.nn.functional.scaled_dot_product_attention(apply(q, freqs, scale), apply(k, freqs, inverse), v)
    out = rope_attention(q, k, v, ours(20), rotary_k=ours(20, keys=True), cls_rope="rotate")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(apply_rope(q, ours(20)), apply(q, freqs, scale))


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("convert", ["bfloat16", "half", "to", "float", "double"])
def test_tables_are_immune_to_lower_precision(name, convert):
    make, where = EMBEDDINGS[name]
    embedding = make()
    expected = embedding(where)
    parent = torch.nn.Sequential(embedding, torch.nn.Linear(2, 2))
    parent = parent.to(torch.bfloat16) if convert == "to" else getattr(parent, convert)()
    rotary = embedding(where)
    if convert == "double":
        assert rotary.cos.dtype == torch.float64
        torch.testing.assert_close(rotary.cos.float(), expected.cos, rtol=0, atol=2e-4)  # float32 angles near 2,000
        parent.float()
        rotary = embedding(where)
    else:
        assert parent[1].weight.dtype == (torch.float32 if convert == "float" else parent[1].weight.dtype)
    for table, exact in ((rotary.cos, expected.cos), (rotary.sin, expected.sin)):
        assert table.dtype == torch.float32
        assert torch.equal(table, exact)


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_are_immune_to_autocast(name, dtype):
    make, where = EMBEDDINGS[name]
    embedding = make()
    expected = embedding(where)
    with torch.autocast("cpu", dtype=dtype):
        rotary = embedding(where)
    assert rotary.cos.dtype == torch.float32
    assert torch.equal(rotary.cos, expected.cos)
    assert torch.equal(rotary.sin, expected.sin)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_default_dtype_does_not_matter(name):
    make, where = EMBEDDINGS[name]
    torch.manual_seed(3)
    expected = make()(where)
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(3)
        rotary = make()(where)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rotary.cos, expected.cos)


def test_bfloat16_angles_would_be_wrong():
    """What the immunity is for."""
    angles = torch.arange(1000) * RotaryEmbedding(16).inv_freq[0]
    assert (angles - angles.bfloat16().float()).abs().max() > 1.9


@pytest.mark.parametrize("name", ["sequence", "axial"])
def test_buffers_survive_the_meta_device(name):
    make, where = EMBEDDINGS[name]
    expected = make()(where)
    with torch.device("meta"):
        embedding = make()
    embedding.to_empty(device="cpu")
    assert torch.equal(embedding(where).cos, expected.cos)
    moved = make().to("meta").to_empty(device="cpu")
    assert torch.equal(moved(where).cos, expected.cos)


def test_state_dicts():
    """Frequencies that follow from the options are not saved; learned ones are, and as float32."""
    assert not RotaryEmbedding(8, use_xpos=True).state_dict()
    assert not AxialRotaryEmbedding(8).state_dict()
    learned = LearnedRotaryEmbedding(8, heads=2).bfloat16()
    state = learned.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in state.items()} == {"freqs": ((2, 1, 4), torch.float32)}
    other = LearnedRotaryEmbedding(8, heads=2)
    other.load_state_dict(state)
    assert torch.equal(other.freqs, learned.freqs)


def test_copies_and_pickles():
    for make, where in EMBEDDINGS.values():
        embedding = make()
        for again in (copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
            assert torch.equal(again(where).cos, embedding(where).cos)
    rotary = RotaryEmbedding(8)(5, torch.arange(5) > 0)
    again = pickle.loads(pickle.dumps(rotary))
    assert torch.equal(again.rotate, rotary.rotate)


def test_positions_of_every_kind():
    embedding = RotaryEmbedding(8)
    base = embedding(6)
    for dtype in (torch.int32, torch.int16, torch.uint8, torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(embedding(torch.arange(6).to(dtype)).cos, base.cos)
    batched = embedding(torch.stack((torch.arange(6), torch.arange(6) + 3)))
    assert batched.cos.shape == (2, 1, 6, 4)
    assert torch.equal(batched.cos[1, 0, :3], base.cos[3:])
    assert embedding(0).cos.shape == (0, 4)
    assert RotaryEmbedding(8, use_xpos=True)(0).cos.shape == (0, 4)
    torch.testing.assert_close(embedding(torch.tensor([0.5])).cos, (0.5 * embedding.inv_freq)[None].cos())
    assert torch.equal(embedding(torch.tensor([-3])).sin, -embedding(torch.tensor([3])).sin)


def test_rotary_to():
    rotary = RotaryEmbedding(8)(5, torch.arange(5) > 0)
    double = rotary.to(dtype=torch.float64)
    assert double.cos.dtype == double.sin.dtype == torch.float64
    assert double.rotate.dtype == torch.bool
    meta = rotary.to("meta")
    assert meta.cos.is_meta
    assert meta.rotate.is_meta
    assert rotary.without_rotate().rotate is None
    with pytest.raises(AttributeError):
        rotary.cos = rotary.sin


def test_axial_angles():
    """Rows first: pair i of the first half turns with the row, of the second half with the column."""
    embedding = AxialRotaryEmbedding(16, base=100.0, num_prefix_tokens=2, num_suffix_tokens=1)
    rotary = embedding((3, 4))
    assert rotary.cos.shape == (2 + 12 + 1, 8)
    assert rotary.rotate.tolist() == [False] * 2 + [True] * 12 + [False]
    for row in range(3):
        for column in range(4):
            angles = [axis * 100.0 ** (-i / 4) for axis in (row, column) for i in range(4)]
            torch.testing.assert_close(rotary.cos[2 + 4 * row + column], torch.tensor(angles).cos())
            torch.testing.assert_close(rotary.sin[2 + 4 * row + column], torch.tensor(angles).sin())
    for special in (0, 1, 14):
        assert (rotary.cos[special] == 1).all()
        assert (rotary.sin[special] == 0).all()


def test_axial_centers_do_not_depend_on_the_resolution():
    embedding = AxialRotaryEmbedding.dinov3(16, num_prefix_tokens=0)
    small, large = embedding((1, 1)), embedding((3, 3))
    torch.testing.assert_close(large.cos[4], small.cos[0])
    edge = embedding(torch.tensor([[-1.0, 1.0]]))
    assert torch.equal(edge.sin[0, :4], -edge.sin[0, 4:])
    assert not embedding.interleaved


def test_axial_takes_coordinates():
    embedding = AxialRotaryEmbedding(16, num_prefix_tokens=1)
    positions = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    assert torch.equal(embedding(positions).cos, embedding((2, 2)).cos)
    batched = embedding(positions.expand(3, 4, 2))
    assert batched.cos.shape == (3, 1, 5, 8)
    assert torch.equal(batched.cos[2, 0], embedding((2, 2)).cos)


def test_axial_reference_grid_rescales():
    embedding = AxialRotaryEmbedding(8, reference_grid=(4, 4))
    torch.testing.assert_close(embedding((8, 8)).cos[9], AxialRotaryEmbedding(8)(torch.tensor([[0.5, 0.5]])).cos[0])


def test_three_axes():
    rotary = AxialRotaryEmbedding(12, num_axes=3)((2, 3, 4))
    assert rotary.cos.shape == (24, 6)
    assert LearnedRotaryEmbedding(10, num_axes=3)((2, 3, 4)).cos.shape == (24, 5)


def test_rotate_meets_prefix_tokens():
    embedding = AxialRotaryEmbedding(8, num_prefix_tokens=1)
    rotate = torch.tensor([[True, True, False, True, True], [True] * 5])
    rotary = embedding((2, 2), rotate)
    assert rotary.rotate.tolist() == [[False, True, False, True, True], [False, True, True, True, True]]


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("axes", [1, 2])
def test_learned_shapes_and_angles(heads, axes):
    embedding = LearnedRotaryEmbedding(8, num_axes=axes, heads=heads, num_prefix_tokens=1)
    positions = torch.randn(5, axes) if axes > 1 else torch.randn(5)
    rotary = embedding(positions)
    assert rotary.cos.shape == ((6, 4) if heads is None else (3, 6, 4))
    freqs = embedding.freqs.view(-1, axes, 4)
    expected = torch.einsum("na,hap->hnp", positions.view(5, axes), freqs)
    torch.testing.assert_close(rotary.cos.view(-1, 6, 4)[:, 1:], expected.cos())
    batched = embedding(positions.expand(2, *positions.shape))
    assert batched.cos.shape == (2, heads or 1, 6, 4)
    torch.testing.assert_close(batched.cos[1].view_as(rotary.cos), rotary.cos)


def test_learned_start():
    """One axis: the usual frequencies. Two: each magnitude along two directions at right angles."""
    one = LearnedRotaryEmbedding(16)
    torch.testing.assert_close(one(9).cos, RotaryEmbedding(16)(9).cos)
    axial = LearnedRotaryEmbedding(16, num_axes=2, random_directions=False)
    torch.testing.assert_close(axial((3, 4)).cos, AxialRotaryEmbedding(16)((3, 4)).cos)
    mixed = LearnedRotaryEmbedding(16, num_axes=2, heads=5, base=10.0).freqs.detach()
    magnitudes = mixed.norm(dim=1)
    torch.testing.assert_close(magnitudes[:, :4], (10.0 ** -(torch.arange(4) / 4)).expand(5, 4))
    torch.testing.assert_close(magnitudes[:, :4], magnitudes[:, 4:])
    assert (mixed[:, :, :4] * mixed[:, :, 4:]).sum(1).abs().max() < 1e-6
    assert not torch.allclose(mixed[0], mixed[1])


def test_learned_frequencies_learn_below_float32():
    """A step of a bfloat16 model reaches the float32 frequencies."""
    embedding = LearnedRotaryEmbedding(8, heads=2).bfloat16()
    q = torch.randn(1, 2, 6, 8, dtype=torch.bfloat16)
    rope_attention(q, q, q, embedding(6)).float().square().sum().backward()
    assert embedding.freqs.grad.dtype == torch.float32
    assert embedding.freqs.grad.abs().max() > 0


def test_same_length_gives_equal_tables_and_no_cache():
    embedding = RotaryEmbedding(8)
    embedding(100)
    assert {name for name, _ in embedding.named_buffers()} == {"inv_freq"}


CONSTRUCTORS = [RotaryEmbedding, AxialRotaryEmbedding, LearnedRotaryEmbedding]


@pytest.mark.parametrize("cls", CONSTRUCTORS)
@pytest.mark.parametrize(
    ("dim", "error", "text"),
    [
        (0, ValueError, "dim must be at least 1, got 0"),
        (-2, ValueError, "dim must be at least 1, got -2"),
        (7, ValueError, "got 7"),
        (8.0, TypeError, "dim must be an integer, got 8.0"),
        (True, TypeError, "dim must be an integer, got True"),
        ("8", TypeError, "dim must be an integer, got '8'"),
        (None, TypeError, "dim must be an integer, got None"),
    ],
)
def test_bad_dims(cls, dim, error, text):
    with pytest.raises(error, match=f"{cls.__name__}: .*{text}"):
        cls(dim)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: RotaryEmbedding(8, base=0), ValueError, "base must be finite and above 0, got 0"),
        (lambda: RotaryEmbedding(8, base=math.nan), ValueError, "base must be finite and above 0, got nan"),
        (lambda: RotaryEmbedding(8, base="e"), TypeError, "base must be a number, got 'e'"),
        (lambda: RotaryEmbedding(8, interpolation_factor=0.5), ValueError, "must be finite and at least 1, got 0.5"),
        (
            lambda: RotaryEmbedding(8, base_rescale_factor=-1),
            ValueError,
            "base_rescale_factor must be finite and above",
        ),
        (lambda: RotaryEmbedding(8, use_xpos=1), TypeError, "use_xpos must be a bool, got 1"),
        (lambda: RotaryEmbedding(8, scale_base=math.inf), ValueError, "scale_base must be finite and above 0, got inf"),
        (lambda: RotaryEmbedding(8, interleaved="no"), TypeError, "interleaved must be a bool, got 'no'"),
        (lambda: AxialRotaryEmbedding(6), ValueError, "dim must be a multiple of 4, got 6"),
        (lambda: AxialRotaryEmbedding(8, coordinates="pixel"), ValueError, "coordinates must be one of"),
        (lambda: AxialRotaryEmbedding(8, reference_grid=(3,)), ValueError, "reference_grid must be 2 integers, got"),
        (lambda: AxialRotaryEmbedding(8, num_prefix_tokens=-1), ValueError, "num_prefix_tokens must be at least 0"),
        (lambda: AxialRotaryEmbedding(8, num_axes=0), ValueError, "num_axes must be at least 1, got 0"),
        (
            lambda: AxialRotaryEmbedding(8, coordinates="centers", reference_grid=(2, 2)),
            ValueError,
            "reference_grid must be None",
        ),
        (lambda: LearnedRotaryEmbedding(8, heads=0), ValueError, "heads must be at least 1, got 0"),
        (lambda: LearnedRotaryEmbedding(8, heads=2.5), TypeError, "heads must be an integer, got 2.5"),
    ],
)
def test_bad_options(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cls", CONSTRUCTORS)
def test_positions_that_are_not_finite(cls, value):
    positions = torch.tensor([0.0, value]) if cls is not AxialRotaryEmbedding else torch.tensor([[0.0, value]])
    with pytest.raises(ValueError, match=f"{cls.__name__}: positions must be finite, got {value}"):
        cls(8)(positions)


@pytest.mark.parametrize(
    ("positions", "error", "text"),
    [
        (-1, ValueError, "length must be at least 0, got -1"),
        (True, TypeError, "positions must be a tensor or a length, got True"),
        (5.0, TypeError, "positions must be a tensor or a length, got 5.0"),
        ([0, 1], TypeError, r"positions must be a tensor or a length, got \[0, 1\]"),
        (None, TypeError, "got None"),
        (torch.tensor(3), ValueError, r"positions must be of shape \(tokens,\) or \(batch, tokens\), got \(\)"),
        (torch.zeros(1, 2, 3), ValueError, r"got \(1, 2, 3\)"),
        (torch.ones(3, dtype=torch.bool), TypeError, "positions must be real numbers, got torch.bool"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "positions must be real numbers, got torch.complex64"),
    ],
)
def test_bad_positions(positions, error, text):
    with pytest.raises(error, match=text):
        RotaryEmbedding(8)(positions)


@pytest.mark.parametrize("cls", [AxialRotaryEmbedding, lambda dim: LearnedRotaryEmbedding(dim, num_axes=2)])
@pytest.mark.parametrize("grid", [(3,), (2, 2, 2), 4, (2, -1), (2, 2.0), torch.zeros(4), torch.zeros(4, 3)])
def test_bad_grids(cls, grid):
    with pytest.raises((TypeError, ValueError), match=r"Embedding: .* must be .*, got "):
        cls(8)(grid)


@pytest.mark.parametrize(
    ("rotate", "error", "text"),
    [
        (torch.ones(4, dtype=torch.bool), ValueError, r"rotate must be of shape \(5,\) or \(batch, 5\), got \(4,\)"),
        (torch.ones(5), TypeError, "rotate must be a bool tensor, got torch.float32"),
        ([True] * 5, TypeError, r"rotate must be a bool tensor, got \[True"),
        (torch.ones(1, 1, 5, dtype=torch.bool), ValueError, r"got \(1, 1, 5\)"),
    ],
)
def test_bad_rotate(rotate, error, text):
    with pytest.raises(error, match=text):
        RotaryEmbedding(8)(5, rotate)


def test_equal_tables_make_equal_attention_in_both_layouts():
    """Permuting channels turns one layout into the other."""
    q, k, v = (torch.randn(1, 2, 7, 8, dtype=torch.float64) for _ in range(3))
    rotary = RotaryEmbedding(6)(7, torch.arange(7) > 1)
    order = torch.tensor([0, 2, 4, 1, 3, 5, 6, 7])
    half = replace(rotary, interleaved=False)
    torch.testing.assert_close(
        rope_attention(q[..., order], k[..., order], v, half), rope_attention(q, k, v, rotary), rtol=1e-9, atol=1e-9
    )


def test_rotary_is_a_pytree():
    rotary = RotaryEmbedding(8)(5)
    doubled = torch.utils._pytree.tree_map(lambda t: t * 2 if t is not None else None, rotary)
    assert isinstance(doubled, Rotary)
    assert torch.equal(doubled.cos, 2 * rotary.cos)
    assert doubled.rotate is None
    assert doubled.interleaved
