"""The model of the demo: x-transformers' ContinuousTransformerWrapper with memory tokens and a CLS token in front.

The same module is built around x_transformers.Encoder, the plain peer, and around x_rope_cls.Encoder; they have the
same parameters, so the same weights go into both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers import ContinuousTransformerWrapper
from x_transformers import Encoder as PlainEncoder

from x_rope_cls import AxialRotaryEmbedding, Encoder, Rotary, RotaryEmbedding

from .data import Task

NUM_MEMORY = 4
NUM_SPECIAL = NUM_MEMORY + 1  # and one CLS, behind the memory tokens

PLAIN = "x-transformers"
# Options of x_rope_cls.Encoder that tell the compared models apart, beside those that all have.
VARIANTS: dict[str, dict[str, Any]] = {
    "rotate": {"cls_rope": "rotate"},
    "skip": {"cls_rope": "skip"},
    "mask": {"cls_rope": "mask"},
}


@dataclass(frozen=True)
class Size:
    """Of the encoder."""

    dim: int = 64
    depth: int = 3
    heads: int = 2
    dim_head: int = 32


class Classifier(nn.Module):
    """Class logits from the CLS token of [memory, CLS, tokens]."""

    def __init__(self, encoder: nn.Module, dim: int, channels: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.wrapper = ContinuousTransformerWrapper(max_seq_len=0, attn_layers=encoder, num_memory_tokens=NUM_MEMORY)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor, mask: Tensor | None = None, rotary: Any = None) -> Tensor:
        """Class logits.

        Args:
            x: (batch, tokens, channels).
            mask: bool (batch, tokens), False where a recording has ended.
            rotary: tables of all tokens, the special ones included; None: positions 0, 1, 2, ... from the first memory
                token on, as x-transformers counts.

        Returns:
            (batch, classes).
        """
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), self.embed(x)), dim=1)
        if mask is not None:
            mask = F.pad(mask, (1, 0), value=True)
        states: Tensor = self.wrapper(tokens, mask=mask, rotary_pos_emb=rotary)
        logits: Tensor = self.head(states[:, 0])
        return logits


def build(variant: str, task: Task, size: Size, seed: int) -> Classifier:
    """A model with initial weights that depend on the seed, the task and the size only, not on the variant.

    Args:
        variant: a key of VARIANTS, or PLAIN for x_transformers.Encoder with attn_flash=True.
        task: for the number of channels and classes.
        size: of the encoder.
        seed: of the initial weights.
    """
    options: dict[str, Any] = {
        "dim": size.dim,
        "depth": size.depth,
        "heads": size.heads,
        "attn_dim_head": size.dim_head,
        "rotary_pos_emb": True,
        "rotary_emb_dim": size.dim_head,
        "attn_flash": True,
        # No dropout of attention weights: it would take PyTorch's CPU attention off its fast path, and the times apart.
        "ff_dropout": 0.1,
        "use_rmsnorm": True,
        "ff_glu": True,
        "ff_mult": 2,
    }
    torch.manual_seed(seed)
    if variant == PLAIN:
        encoder: nn.Module = PlainEncoder(**options)
    else:
        encoder = Encoder(**options, num_prefix_tokens=NUM_SPECIAL, **VARIANTS[variant])
    return Classifier(encoder, size.dim, task.channels, task.classes)


def token_positions(task_positions: Tensor, shift: float = 0, special_shift: float = 0) -> Tensor:
    """Positions of [memory, CLS, tokens].

    In a sequence, as x-transformers counts: special tokens are at 0 to 4, the first frame at 5. In an image likewise:
    special tokens take the beginning of row 0, patches start at row 1. Only ``cls_rope="rotate"`` uses positions of
    special tokens; ordinary tokens have the same ones in all modes.

    Args:
        task_positions: (tokens, axes), from 0.
        shift: added to all coordinates of ordinary tokens.
        special_shift: added to all coordinates of special tokens.

    Returns:
        (special tokens + tokens, axes).
    """
    axes = task_positions.shape[-1]
    special = torch.zeros(NUM_SPECIAL, axes)
    special[:, -1] = torch.arange(NUM_SPECIAL)
    start = torch.tensor([NUM_SPECIAL]) if axes == 1 else torch.tensor([1, 0])
    return torch.cat((special + special_shift, task_positions + start + shift))


def tables(positions: Tensor, size: Size) -> Rotary:
    """Rotation tables for positions (tokens, axes): a sequence's or a grid's."""
    if positions.shape[-1] == 1:
        rotary: Rotary = RotaryEmbedding(size.dim_head)(positions[:, 0])
    else:
        # Base 100: the slowest channels still turn by a few degrees from patch to patch.
        rotary = AxialRotaryEmbedding(size.dim_head, base=100)(positions)
    return rotary


def plain_tables(rotary: Rotary) -> tuple[Tensor, float]:
    """The same tables as x_transformers.Encoder takes them: (freqs, scale), each angle twice."""
    angles = torch.atan2(rotary.sin.double(), rotary.cos.double()).float()
    return angles.repeat_interleave(2, dim=-1)[None], 1.0


def tables_for(variant: str, rotary: Rotary) -> Any:
    """What a model of this variant takes as ``rotary``."""
    return plain_tables(rotary) if variant == PLAIN else rotary
