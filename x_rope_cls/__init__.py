"""Rotary position embeddings for encoders whose CLS, memory and register tokens have no position."""

from __future__ import annotations

from . import reference
from .functional import apply_rope, rope_attention
from .rotary import AxialRotaryEmbedding, LearnedRotaryEmbedding, Rotary, RotaryEmbedding

__all__ = [
    "AxialRotaryEmbedding",
    "LearnedRotaryEmbedding",
    "Rotary",
    "RotaryEmbedding",
    "apply_rope",
    "reference",
    "rope_attention",
]
