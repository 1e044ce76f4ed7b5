"""What both wrappers need around x-transformers' own forward: the encoder's settings, arguments for all tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers import Encoder as XEncoder

from ..functional import ClsRope
from ..tables import Rotary
from .encoder import RopeEncoderMixin
from .late import configure_late
from .swap import special_tokens, swap_


def check_encoder(owner: str, encoder: Any, cls_tokens: int) -> None:
    """Checks a wrapper's ``attn_layers``, beside that many CLS tokens of the wrapper.

    Raises:
        TypeError: it is not an x_transformers Encoder.
        ValueError: CLS tokens enter it late, but the wrapper has none, or another number of them.
    """
    if not isinstance(encoder, XEncoder):
        raise TypeError(f"{owner}: attn_layers must be an x_transformers Encoder, got {type(encoder).__name__}")
    late_cls = getattr(encoder, "late_cls", None)
    if late_cls is None:
        return
    if cls_tokens == 0:
        raise ValueError(f"{owner}: use_cls_token must be True for an encoder with late_cls={late_cls!r}, got False")
    of_encoder: int = encoder.num_cls_tokens
    if of_encoder > 1 and of_encoder != cls_tokens:
        raise ValueError(f"{owner}: num_cls_tokens must be {of_encoder}, as of the encoder, got {cls_tokens}")


def adopt_encoder(wrapper: nn.Module, cls_rope: ClsRope | None) -> None:
    """Swaps a wrapper's encoder where it is x-transformers' own, and tells it which tokens have no position.

    An encoder of this package keeps what it was built with: its ``cls_rope`` unless one is given, its ``rotate``, and
    its counts where they are larger than what the wrapper adds. One with late CLS loses its own ``late_cls_tokens``.
    """
    encoder: Any = wrapper.attn_layers
    if getattr(encoder, "late_cls", None) is not None:
        # Its CLS tokens are the wrapper's, passed to every forward.
        configure_late(encoder, encoder.late_cls, encoder.late_cls_at, 0)
    front, back = special_tokens(wrapper)
    if not isinstance(encoder, RopeEncoderMixin):
        swap_(wrapper, "mask" if cls_rope is None else cls_rope, front, back)
        return
    cls_rope = encoder.cls_rope if cls_rope is None else cls_rope
    if encoder.rotate is not None:
        swap_(wrapper, cls_rope, rotate=encoder.rotate)
    else:
        swap_(wrapper, cls_rope, max(front, encoder.num_prefix_tokens), max(back, encoder.num_suffix_tokens))


def count_back(positions: Tensor, total: int) -> Tensor:
    """Positions (tokens,) or (batch, tokens) with more in front, which count up to just before the first."""
    missing = total - positions.shape[-1]
    if missing == 0:
        return positions
    front = torch.arange(-missing, 0, device=positions.device)
    return torch.cat((positions[..., :1] + front.to(positions.dtype), positions), dim=-1)


def pad_rotary(rotary: Any, front: int, back: int = 0) -> Any:
    """A ``rotary_pos_emb`` of x-transformers or a Rotary with rows that are not turned in front and at the end."""
    if front == 0 and back == 0:
        return rotary
    if not isinstance(rotary, Rotary):
        freqs, scale = rotary
        if isinstance(scale, Tensor) and scale.dim() > 1:
            scale = F.pad(scale, (0, 0, front, back), value=1.0)
        return F.pad(freqs, (0, 0, front, back)), scale
    rotate = rotary.rotate
    if rotate is None:
        rotate = torch.ones(rotary.cos.shape[-2], dtype=torch.bool, device=rotary.cos.device)
    return Rotary(
        F.pad(rotary.cos, (0, 0, front, back), value=1.0),
        F.pad(rotary.sin, (0, 0, front, back)),
        F.pad(rotate, (front, back), value=False),
        rotary.interleaved,
    )


def rotary_length(rotary: Any) -> int | None:
    """How many tokens a ``rotary_pos_emb`` has rows for; None if it is something else."""
    table = rotary.cos if isinstance(rotary, Rotary) else rotary[0] if isinstance(rotary, (tuple, list)) else None
    return table.shape[-2] if isinstance(table, Tensor) and table.dim() > 1 else None


class PaddedDeepEmbeds:
    """The table of ``ff_deep_embed``, read for ordinary tokens; tokens in front of them get factors of one."""

    def __init__(self, table: Tensor, front: int) -> None:
        self.table, self.front = table, front

    def __getitem__(self, ids: Tensor) -> Tensor:
        return F.pad(self.table[ids], (0, 0, 0, 0, self.front, 0), value=1.0)


# What x_transformers' Encoder takes for each token, by the dimensions that count tokens from the end: query tokens,
# key tokens (which mems come before), and what tokens get that the caller does not know of.
_PER_TOKEN: dict[str, tuple[int | None, int | None, Any]] = {
    "attn_mask": (-2, -1, True),
    "attn_bias": (-2, -1, 0.0),
    "self_attn_kv_mask": (None, -1, True),
    "in_attn_cond": (-2, None, 0.0),
    "condition": (-2, None, 0.0),
    "self_attn_kv_residuals": (-2, None, 0.0),
}


def fit_to_tokens(kwargs: dict[str, Any], known: tuple[int, ...], tokens: int, mem_tokens: int) -> None:
    """Lengthens arguments of an encoder that were given for the tokens a wrapper's caller knows of, in place.

    Args:
        kwargs: arguments of the encoder's forward.
        known: lengths that the caller may have counted: without special tokens, without prepended embeddings.
        tokens: what the encoder gets. The tokens that the caller did not count are in front.
        mem_tokens: keys in front of all.

    Raises:
        ValueError: an argument has neither a known length nor that of all tokens.
    """
    for name, (query_dim, key_dim, value) in _PER_TOKEN.items():
        given = kwargs.get(name)
        if not isinstance(given, Tensor) or (name in ("condition", "in_attn_cond") and given.dim() < 3):
            continue
        for dim, length in ((query_dim, tokens), (key_dim, tokens + mem_tokens)):
            if dim is None:
                continue
            size = given.shape[dim]
            if size in known and size < length:
                given = F.pad(given, (0, 0) * (-dim - 1) + (length - size, 0), value=value)
            elif size not in (1, length) and (dim == query_dim or query_dim is None):  # keys: memory key/values too
                shape = tuple(given.shape)
                raise ValueError(f"TransformerWrapper: {name} must have {known[0]} tokens, got shape {shape}")
        kwargs[name] = given
