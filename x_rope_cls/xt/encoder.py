"""x_transformers.Encoder with a choice of what rotary position embeddings do to tokens without a position."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from x_transformers import Encoder as XEncoder
from x_transformers.x_transformers import Attention, AttentionLayers

from .._checks import check_choice, check_count
from ..functional import ClsRope
from .attention import convert_attention
from .feed_forward import convert_feed_forwards
from .late import LateCls, configure_late
from .late_layers import forward_late
from .options import CLS_ROPES, as_rotate
from .positions import PositionTables, check_frequencies, from_frequencies


class RopeEncoderMixin(AttentionLayers):
    """Computes rotation tables once per forward and sends them down in the place of x-transformers' frequencies.

    Attributes:
        cls_rope: what happens to tokens without a position.
        num_prefix_tokens, num_suffix_tokens: how many tokens in front and at the end have no position.
        rotate: bool (tokens,), True: the token has a position; None: the counts decide.
        late_cls, late_cls_at, num_cls_tokens: see :class:`Encoder`.
        late_cls_tokens: parameter (cls, dim), or None where CLS tokens do not enter late or are passed to forward.
    """

    late_cls: LateCls | None = None  # also of encoders that were pickled by a version without it
    late_cls_at: int
    num_cls_tokens: int
    cls_rope: ClsRope
    num_prefix_tokens: int
    num_suffix_tokens: int
    rotate: Tensor | None
    has_own_forward: bool  # it was swapped from a class that is not x-transformers'
    _forward_arguments: tuple[str, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The class after this one, which is not what a bare super() means when cls comes from elsewhere.
        following = super(RopeEncoderMixin, cls).forward  # noqa: UP008
        cls._forward_arguments = tuple(inspect.signature(following).parameters)[2:]
        cls.has_own_forward = following is not AttentionLayers.forward

    def forward(
        self,
        x: Tensor,
        *args: Any,
        rotate: Any = None,
        cls_tokens: Tensor | None = None,
        need_weights: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As x_transformers' Encoder.

        Args:
            x: (batch, tokens, dim). With late CLS this, and everything that is counted in tokens, is without CLS.
            *args: those of x_transformers' Encoder.
            **kwargs: those of x_transformers' Encoder. ``rotary_pos_emb`` may also be a :class:`Rotary`.
            rotate: bool (tokens,) or (batch, tokens), True: the token has a position. Takes the place of the counts
                given to the constructor. With ``mems``, it may also cover mems and tokens; else mems have positions.
            cls_tokens: (cls, dim) or (batch, cls, dim), in the place of the encoder's own late CLS tokens.
            need_weights: also return, last, the attention maps of late CLS: a list with (batch, heads, cls,
                cls + tokens) for each self-attention layer from the entry on, without dropout. Memory key/values and
                mems, which such a map leaves out, may have a share too.

        Returns:
            What x_transformers' Encoder returns, with late CLS in front of the tokens: (batch, cls + tokens, dim). Of
            the intermediates, ``hiddens``, which mems are made of, hold tokens alone; the other hidden states have CLS
            in front once it is there.

        Raises:
            TypeError, ValueError: ``rotate``, ``rotary_pos_emb`` or ``cls_tokens`` does not fit the tokens; tokens have
                no position but there is no rotary embedding whose effect on them could be chosen; there are no CLS
                tokens, or no late CLS for them to be.
        """
        kwargs.update(zip(self._forward_arguments, args, strict=False))
        if not isinstance(kwargs.get("rotary_pos_emb"), PositionTables):
            self._prepare_tables(x, rotate, kwargs)
        if self.late_cls is not None:
            return forward_late(self, x, cls_tokens, need_weights, kwargs)
        if cls_tokens is not None or need_weights:
            what = "cls_tokens" if cls_tokens is not None else "need_weights"
            raise ValueError(f"Encoder: {what} must not be given without late_cls, got {what}")
        return super().forward(x, **kwargs)

    def _prepare_tables(self, x: Tensor, rotate: Any, kwargs: dict[str, Any]) -> None:
        """Replaces ``rotary_pos_emb`` in the arguments of x_transformers' forward, and sets ``pos`` as it would."""
        check_choice("Encoder", "cls_rope", self.cls_rope, CLS_ROPES)
        tokens = x.shape[1]
        mems = kwargs.get("mems")
        first = mems[0] if mems is not None and len(mems) else None
        mem_tokens = first.shape[1] if first is not None else 0
        mask = self._position_mask(tokens, mem_tokens, rotate, x.device)

        given = kwargs.get("rotary_pos_emb")
        if given is not None:
            check_frequencies(given)
        elif self.rotary_pos_emb is not None:
            kwargs["pos"] = self._positions(tokens, mem_tokens, kwargs, x.device)
            given = _frequencies(self.rotary_pos_emb, kwargs["pos"])
        elif mask is not None and self.cls_rope != "rotate":
            raise ValueError(
                f"Encoder: rotary_pos_emb must be True or passed to forward for cls_rope={self.cls_rope!r} "
                "with tokens without a position, got neither"
            )
        else:
            return
        kwargs["rotary_pos_emb"] = from_frequencies(given, tokens + mem_tokens, mask, self.cls_rope)

    def _positions(self, tokens: int, mem_tokens: int, kwargs: dict[str, Any], device: torch.device) -> Tensor:
        pos: Tensor | None = kwargs.get("pos")
        if pos is None:
            offset: int | None = kwargs.get("seq_pos_offset")
            if offset is None:
                offset = int(getattr(kwargs.get("cache"), "cache_length", 0))
            return torch.arange(tokens + mem_tokens + offset, device=device) - mem_tokens
        special = self.num_prefix_tokens + self.num_suffix_tokens
        if special and self.cls_rope != "rotate" and pos.shape[-1] == tokens + mem_tokens - special:
            # Positions of the ordinary tokens only: the others have none, so any number will do for them.
            return F.pad(pos, (self.num_prefix_tokens, self.num_suffix_tokens))
        return pos

    def _position_mask(self, tokens: int, mem_tokens: int, rotate: Any, device: torch.device) -> Tensor | None:
        """Which tokens have a position: bool (mems + tokens,) or (batch, mems + tokens); None: all."""
        rotate = self.rotate if rotate is None else rotate
        if rotate is not None:
            mask = as_rotate("Encoder", rotate).to(device)
            if mask.shape[-1] == tokens:
                return F.pad(mask, (mem_tokens, 0), value=True)
            if mask.shape[-1] != tokens + mem_tokens:
                raise ValueError(f"Encoder: rotate must be of length {tokens}, got {mask.shape[-1]}")
            return mask
        prefix, suffix = self.num_prefix_tokens, self.num_suffix_tokens
        if prefix == 0 and suffix == 0:
            return None
        if prefix + suffix > tokens:
            counts = f"{prefix} + {suffix}"
            raise ValueError(
                f"Encoder: num_prefix_tokens + num_suffix_tokens must be at most {tokens} tokens, got {counts}"
            )
        inner = torch.ones(tokens - prefix - suffix, dtype=torch.bool, device=device)
        inner = F.pad(inner, (prefix, suffix), value=False)
        return F.pad(inner, (mem_tokens, 0), value=True)


class Encoder(RopeEncoderMixin, XEncoder):
    """x_transformers.Encoder, same parameters and state_dict, with attention through this package's operator.

    Late CLS: CLS tokens do not exist in the first layers, which cost what they cost without them. At a late
    self-attention layer they enter and attend to themselves and to all tokens, as in CaiT (Touvron et al., "Going
    deeper with image transformers", ICCV 2021): with that layer's weights, unrotated, and without any bias or mask
    over pairs (alibi, relative positions, attn_max_attend_past, attn_mask), which are about positions that they do not
    have. Then ``late_cls`` decides:

    - "class_attention": the remaining layers update CLS alone, each by attention of this kind with its own weights. The
      tokens stay as they are, and the output is final_norm of those. Where the layer's options allow, keys and values
      are never formed (see :func:`x_rope_cls.explain`).
    - "join": in the entry layer the tokens attend to each other as always; from then on CLS and tokens are one sequence
      in which CLS has no position: no pair with CLS is rotated, whatever ``cls_rope`` says of other tokens, and no bias
      or mask over pairs applies to one.

    There are no weights but those of the layers, and ``late_cls_tokens``: the state_dict of an encoder without late CLS
    lacks this key alone. Where layers look back at earlier ones (U-net skips, layer integration, residual streams), CLS
    had been there unchanged; add_value_residual and residual_attn have nothing of it there. What mixes tokens in
    another way than attention (shift_tokens, the mean of mv_split_residual, hybrid modules) never mixes CLS with them.

    Args:
        cls_rope: what happens to the scores of tokens without a position (CLS, memory, registers): "rotate", as
            x-transformers does, like any other token; "skip": their queries and keys are not rotated; "mask": no pair
            that one of them is part of is rotated.
        num_prefix_tokens: how many tokens in front have no position. Late CLS tokens are not counted.
        num_suffix_tokens: how many tokens at the end have no position.
        rotate: instead of the counts, a bool (tokens,), True: the token has a position.
        late_cls: "class_attention" or "join", see above; None: no CLS tokens enter.
        late_cls_at: which self-attention layer CLS enters at, in the order of execution; counts from the end if
            negative. The default is the penultimate one. What stands in front of that attention in its block (the first
            feed-forward of ``macaron``) still has tokens alone.
        num_cls_tokens: how many CLS tokens enter late; 0: they are passed to every forward as ``cls_tokens``.
        **kwargs: any option of x_transformers.Encoder.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range, or an option of x-transformers leaves
            nothing for cls_rope to choose, or late CLS no meaning: only_cross (there is no layer to enter at) and
            attn_flash_pack_seq (the sequences in one row would share their CLS tokens).
    """

    def __init__(
        self,
        *,
        cls_rope: ClsRope = "mask",
        num_prefix_tokens: int = 0,
        num_suffix_tokens: int = 0,
        rotate: Any = None,
        late_cls: LateCls | None = None,
        late_cls_at: int = -2,
        num_cls_tokens: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        configure(self, cls_rope, num_prefix_tokens, num_suffix_tokens, rotate)
        configure_late(self, late_cls, late_cls_at, num_cls_tokens)


def configure(encoder: Any, cls_rope: ClsRope, num_prefix_tokens: int, num_suffix_tokens: int, rotate: Any) -> None:
    """Gives an encoder whose class has RopeEncoderMixin its settings and converts its attention layers.

    Raises:
        TypeError, ValueError: see :class:`Encoder`.
    """
    check_choice("Encoder", "cls_rope", cls_rope, CLS_ROPES)
    prefix = check_count("Encoder", "num_prefix_tokens", num_prefix_tokens)
    suffix = check_count("Encoder", "num_suffix_tokens", num_suffix_tokens)
    if rotate is not None:
        rotate = as_rotate("Encoder", rotate)
        if rotate.dim() != 1:
            raise ValueError(f"Encoder: rotate must be of shape (tokens,), got {tuple(rotate.shape)}")
        if prefix or suffix:
            raise ValueError(f"Encoder: rotate must be None beside token counts, got counts {prefix} and {suffix}")
    special = prefix or suffix or rotate is not None
    if special and cls_rope != "rotate" and getattr(encoder, "polar_pos_emb", None) is not None:
        raise ValueError(
            f"Encoder: cls_rope must be 'rotate' with polar_pos_emb, which is no rotation, got {cls_rope!r}"
        )
    encoder.cls_rope = cls_rope
    encoder.num_prefix_tokens, encoder.num_suffix_tokens = prefix, suffix
    encoder.register_buffer("rotate", rotate, persistent=False)
    for layer_type, attention in attention_layers(encoder):
        option = {"a": "residual_attn", "c": "cross_residual_attn"}[layer_type]
        convert_attention(attention, option if getattr(encoder, option, False) else None)
    convert_feed_forwards(encoder)


def attention_layers(encoder: AttentionLayers) -> list[tuple[str, Attention]]:
    """The attention modules of an encoder with their layer types, "a" for self and "c" for cross attention."""
    found = []
    for layer_type, (_, block, _) in zip(encoder.layer_types, encoder.layers, strict=True):
        if layer_type in ("a", "c"):
            found.append((layer_type, next(m for m in block.modules() if isinstance(m, Attention))))
    return found


def _frequencies(rotary_pos_emb: Any, pos: Tensor) -> Any:
    """x-transformers' (freqs, scale) for these positions, in float32 at least whatever the module was cast to."""
    low = {n: b.float() for n, b in rotary_pos_emb.named_buffers() if b.is_floating_point() and b.dtype.itemsize < 4}
    if low:
        return torch.func.functional_call(rotary_pos_emb, low, (pos,))
    return rotary_pos_emb(pos)
