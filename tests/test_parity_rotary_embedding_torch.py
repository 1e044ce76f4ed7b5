"""apply_rope and the embeddings against rotary-embedding-torch."""

from __future__ import annotations

import pytest
import torch

from x_rope_cls import AxialRotaryEmbedding, Rotary, RotaryEmbedding, apply_rope, rope_attention

library = pytest.importorskip("rotary_embedding_torch")


@pytest.mark.parametrize("dim", [4, 16, 32])
@pytest.mark.parametrize("options", [{}, {"interpolation_factor": 2.0}, {"base": 77}, {"base_rescale_factor": 3.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotated_queries(backend, dim, options, dtype):
    names = {
        "interpolation_factor": "interpolate_factor",
        "base": "theta",
        "base_rescale_factor": "theta_rescale_factor",
    }
    theirs = library.RotaryEmbedding(dim, **{names[name]: value for name, value in options.items()})
    x = torch.randn(2, 3, 50, 32, dtype=dtype)
    out = apply_rope(x, RotaryEmbedding(dim, **options)(50))
    torch.testing.assert_close(out, theirs.rotate_queries_or_keys(x), rtol=1e-4, atol=2e-5)  # float32 angles to 50


def test_offsets_are_positions(backend):
    theirs = library.RotaryEmbedding(16)
    x = torch.randn(2, 3, 10, 16)
    out = apply_rope(x, RotaryEmbedding(16)(torch.arange(10) + 7))
    torch.testing.assert_close(out, theirs.rotate_queries_or_keys(x, offset=7), rtol=1e-4, atol=1e-5)


def test_xpos(backend):
    """Their scales count from len // 2, as ours and x-transformers' do for consecutive positions."""
    theirs = library.RotaryEmbedding(16, use_xpos=True)
    ours = RotaryEmbedding(16, use_xpos=True)
    q, k, v = (torch.randn(2, 3, 21, 16) for _ in range(3))
    rotated_q, rotated_k = theirs.rotate_queries_and_keys(q, k)
    torch.testing.assert_close(apply_rope(q, ours(21)), rotated_q, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(apply_rope(k, ours(21, keys=True)), rotated_k, rtol=1e-4, atol=1e-5)
    expected = torch.nn.functional.scaled_dot_product_attention(rotated_q, rotated_k, v)
    out = rope_attention(q, k, v, ours(21), rotary_k=ours(21, keys=True))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_axial_frequencies(backend):
    """Their 2-D frequencies, concatenated by axis, are our axial tables."""
    theirs = library.RotaryEmbedding(16)  # per axis
    freqs = theirs.get_axial_freqs(4, 6)
    x = torch.randn(2, 3, 24, 32)
    expected = library.apply_rotary_emb(freqs.flatten(0, 1), x)
    out = apply_rope(x, AxialRotaryEmbedding(32)((4, 6)))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_learned_tables(backend):
    """Any angles: their freqs repeat every angle for its two channels."""
    angles = torch.randn(9, 4, requires_grad=True)
    x = torch.randn(2, 3, 9, 12)
    expected = library.apply_rotary_emb(angles.repeat_interleave(2, dim=-1), x)
    out = apply_rope(x, Rotary(angles.cos(), angles.sin()))
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    grads = [torch.autograd.grad((o * weight).sum(), angles)[0] for o in (out, expected)]
    torch.testing.assert_close(grads[0], grads[1])
