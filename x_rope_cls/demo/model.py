"""The models of the demo: an encoder over memory tokens and the tokens of the data, and six ways to a class from it.

- "rotate", "skip", "mask": CLS stands in front of the sequence in all layers; the names are values of ``cls_rope``.
- "class_attention", "join": CLS enters in the penultimate layer; the names are values of ``late_cls``.
- "AttentionPool": x_transformers.AttentionPool over the tokens that the encoder returns; there is no CLS.

Memory tokens have no position in the last three (``cls_rope="mask"``). The same module is built around
x_transformers.Encoder, the plain peer with CLS in front. What two models both have starts with the same weights.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import x_transformers
from torch import Tensor, nn

from x_rope_cls import AttentionPool, AxialRotaryEmbedding, Encoder, Rotary, RotaryEmbedding

from .data import Task

NUM_MEMORY = 4
NUM_SPECIAL = NUM_MEMORY + 1  # and one CLS, behind the memory tokens

PLAIN = "x-transformers"
POOL = "AttentionPool"
OWN_POOL = "x_rope_cls.AttentionPool"
# Options of x_rope_cls.Encoder that tell the compared models apart, beside those that all have.
VARIANTS: dict[str, dict[str, Any]] = {
    "rotate": {"cls_rope": "rotate", "num_prefix_tokens": NUM_SPECIAL},
    "skip": {"cls_rope": "skip", "num_prefix_tokens": NUM_SPECIAL},
    "mask": {"cls_rope": "mask", "num_prefix_tokens": NUM_SPECIAL},
    "class_attention": {"num_prefix_tokens": NUM_MEMORY, "late_cls": "class_attention", "num_cls_tokens": 0},
    "join": {"num_prefix_tokens": NUM_MEMORY, "late_cls": "join", "num_cls_tokens": 0},
    POOL: {"num_prefix_tokens": NUM_MEMORY},
}
CLS_IN_FRONT = (PLAIN, "rotate", "skip", "mask")


@dataclass(frozen=True)
class Size:
    """Of the encoder."""

    dim: int = 64
    depth: int = 3
    heads: int = 2
    dim_head: int = 32


class Classifier(nn.Module):
    """Class logits of a sequence.

    Args:
        variant: a key of VARIANTS, or PLAIN.
        encoder: x_transformers' or this package's, with the options of the variant.
        size: of the encoder.
        channels: of the data.
        classes: how many.
    """

    def __init__(self, variant: str, encoder: nn.Module, size: Size, channels: int, classes: int) -> None:
        super().__init__()
        dim = size.dim
        self.variant, self.encoder = variant, encoder
        self.embed = nn.Linear(channels, dim)
        cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.memory_tokens = nn.Parameter(torch.randn(1, NUM_MEMORY, dim))
        self.head = nn.Linear(dim, classes)
        # The pool comes last, and the CLS token is drawn where it is not used too: so all else is the same.
        has_pool = variant == POOL
        options = {"heads": size.heads, "dim_head": size.dim_head, "squeeze_output": True}
        self.cls_token: Any = None if has_pool else cls_token
        self.pool: nn.Module | None = x_transformers.AttentionPool(dim, **options) if has_pool else None

    def forward(self, x: Tensor, mask: Tensor | None = None, rotary: Any = None) -> Tensor:
        """Class logits.

        Args:
            x: (batch, tokens, channels).
            mask: bool (batch, tokens), False where a recording has ended.
            rotary: tables of all tokens, the special ones included, as :func:`tables_for` makes them; None: positions
                0, 1, 2, ... from the first token of the sequence on, as x-transformers counts.

        Returns:
            (batch, classes).
        """
        logits: Tensor = self.head(self._summarise(x, mask, rotary, need_weights=False)[0])
        return logits

    def weights(self, x: Tensor, rotary: Any) -> Tensor:
        """Attention (batch, heads, tokens of the data) of late CLS in the last layer, or of this package's pool."""
        maps: Tensor = self._summarise(x, None, rotary, need_weights=True)[1]
        return maps[:, :, 0, -x.shape[1] :]

    def _summarise(self, x: Tensor, mask: Tensor | None, rotary: Any, need_weights: bool) -> tuple[Tensor, Any]:
        """(batch, dim), and the attention map if wanted."""
        in_front = [self.memory_tokens, self.cls_token] if self.variant in CLS_IN_FRONT else [self.memory_tokens]
        tokens = torch.cat((*(t.expand(len(x), -1, -1) for t in in_front), self.embed(x)), dim=1)
        special = tokens.shape[1] - x.shape[1]
        options: dict[str, Any] = {"rotary_pos_emb": rotary}
        if mask is not None:
            options["mask"] = F.pad(mask, (special, 0), value=True)
        if self.pool is not None:
            wanted = {"need_weights": True} if need_weights else {}
            pooled = self.pool(self.encoder(tokens, **options)[:, special:], mask=mask, **wanted)
            return pooled if need_weights else (pooled, None)
        if self.variant in CLS_IN_FRONT:
            return self.encoder(tokens, **options)[:, NUM_MEMORY], None
        options["cls_tokens"] = self.cls_token[0]
        if need_weights:
            states, maps = self.encoder(tokens, need_weights=True, **options)
            return states[:, 0], maps[-1]
        return self.encoder(tokens, **options)[:, 0], None


def build(variant: str, task: Task, size: Size, seed: int) -> Classifier:
    """A model with initial weights that depend on the seed, the task and the size only, not on the variant.

    Args:
        variant: a key of VARIANTS, or PLAIN for x_transformers.Encoder with attn_flash=True, or OWN_POOL for the model
            with a pool in which that is this package's.
        task: for the number of channels and classes.
        size: of the encoder.
        seed: of the initial weights.
    """
    if variant == OWN_POOL:
        return with_own_pool(build(POOL, task, size, seed), size)
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
        encoder: nn.Module = x_transformers.Encoder(**options)
    else:
        encoder = Encoder(**options, **VARIANTS[variant])
    return Classifier(variant, encoder, size, task.channels, task.classes)


def with_own_pool(model: Classifier, size: Size) -> Classifier:
    """A copy of a model with a pool, in which that is this package's AttentionPool with the same weights."""
    model = copy.deepcopy(model)
    assert model.pool is not None
    pool = AttentionPool(size.dim, heads=size.heads, dim_head=size.dim_head, squeeze_output=True)
    pool.load_state_dict(model.pool.state_dict())
    model.pool = pool
    return model


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
    """What a model of this variant takes as ``rotary``, from the tables of [memory, CLS, tokens]."""
    if variant == PLAIN:
        return plain_tables(rotary)
    if variant in CLS_IN_FRONT:
        return rotary
    cos, sin = (torch.cat((t[:NUM_MEMORY], t[NUM_SPECIAL:])) for t in (rotary.cos, rotary.sin))
    return Rotary(cos, sin, None, rotary.interleaved)
