"""Rotation alone: q and k of a layer."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from x_rope_cls import RotaryEmbedding, apply_rope_qk

from ..case import TOLERANCE, Case, Row, Side, Work, name_of


def rows() -> list[Row]:
    """Q and k, float32 and bfloat16, all and half of the channels rotated."""
    found = []
    for dtype, target in ((torch.float32, 10.0), (torch.bfloat16, 20.0)):
        for rotary_dim in (64, 32):
            found.append(
                Row(
                    name=f"rope/{name_of(dtype)}/{rotary_dim}",
                    title=f"rope of q and k, {name_of(dtype)}, {rotary_dim} of 64 channels",
                    build=_build,
                    sizes={"shape": (8, 8, 1024, 64), "rotary_dim": rotary_dim, "dtype": dtype, "target": target},
                    tiny={"shape": (1, 2, 9, 64)},
                    tolerance=TOLERANCE[dtype],
                    share_target=0.85,
                    note="limit: q and k read once and written once, at copy bandwidth",
                )
            )
    return found


def _build(shape: tuple[int, int, int, int], rotary_dim: int, dtype: torch.dtype, target: float) -> Case:
    from x_transformers.x_transformers import RotaryEmbedding as XRotaryEmbedding
    from x_transformers.x_transformers import apply_rotary_pos_emb

    q, k = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    rotary = RotaryEmbedding(rotary_dim)(shape[2])
    freqs, scale = XRotaryEmbedding(rotary_dim).forward_from_seq_len(shape[2])

    def theirs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(q, freqs, scale), apply_rotary_pos_emb(k, freqs, scale)

    compiled = torch.compile(theirs)
    peers = [
        Side("x-transformers", lambda: theirs(q, k), target=target),
        Side("x-transformers compiled", lambda: compiled(q, k), target=3.0, slow=True),
        Side("copies of q and k", lambda: (q.clone(), k.clone()), target=0.85, same=False),
    ]
    if importlib.util.find_spec("rotary_embedding_torch") is not None and dtype == torch.float32:
        from rotary_embedding_torch import RotaryEmbedding as OtherRotaryEmbedding

        other = OtherRotaryEmbedding(rotary_dim)
        peers.append(
            Side("rotary-embedding-torch", lambda: (other.rotate_queries_or_keys(q), other.rotate_queries_or_keys(k)))
        )
    size = q.numel() * q.element_size()
    return Case(lambda: apply_rope_qk(q, k, rotary), peers, Work(copied=4 * size))
