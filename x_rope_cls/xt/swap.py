"""Converts models that were built with x-transformers' own classes, in place."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from x_transformers import Encoder as XEncoder
from x_transformers import ViTransformerWrapper

from ..functional import ClsRope
from .encoder import Encoder, RopeEncoderMixin, configure

Model = TypeVar("Model", bound=nn.Module)


def swap_(
    model: Model,
    cls_rope: ClsRope = "mask",
    num_prefix_tokens: int | None = None,
    num_suffix_tokens: int | None = None,
    rotate: Any = None,
) -> Model:
    """Makes the encoder of a model one of this package, in place, with the same parameters and state_dict.

    Which tokens have no position is read off the wrapper where it is not given: TransformerWrapper and its kin put
    memory and CLS tokens in front, ViTransformerWrapper puts register tokens at the end. A swapped model may be
    swapped again, with other settings; an encoder of this package keeps those that are not given.

    Args:
        model: an x_transformers Encoder, or a wrapper with one as ``attn_layers``: TransformerWrapper,
            ViTransformerWrapper, ContinuousTransformerWrapper, MultiInputTransformerWrapper.
        cls_rope: what happens to tokens without a position, see :class:`x_rope_cls.Encoder`.
        num_prefix_tokens: how many tokens in front have no position; None: as the wrapper says.
        num_suffix_tokens: how many tokens at the end have no position; None: as the wrapper says.
        rotate: instead of the counts, a bool (tokens,), True: the token has a position.

    Returns:
        model itself.

    Raises:
        TypeError: model is something else.
        ValueError: see :class:`x_rope_cls.Encoder`.
    """
    encoder = _find_encoder(model)
    if isinstance(model, RopeEncoderMixin) and rotate is num_prefix_tokens is num_suffix_tokens is None:
        rotate = model.rotate
    prefix, suffix = (0, 0) if rotate is not None else special_tokens(model)
    previous = encoder.__class__
    if not isinstance(encoder, RopeEncoderMixin):
        encoder.__class__ = _swapped_class(previous)
    try:
        configure(
            encoder,
            cls_rope,
            prefix if num_prefix_tokens is None else num_prefix_tokens,
            suffix if num_suffix_tokens is None else num_suffix_tokens,
            rotate,
        )
    except (TypeError, ValueError):
        encoder.__class__ = previous
        raise
    return model


def special_tokens(model: nn.Module) -> tuple[int, int]:
    """How many tokens without a position a wrapper puts in front of the sequence and at its end."""
    if isinstance(model, RopeEncoderMixin):
        return model.num_prefix_tokens, model.num_suffix_tokens
    if isinstance(model, ViTransformerWrapper):
        registers = getattr(model, "register_tokens", None)
        return 0, 0 if registers is None else registers.shape[0]
    front = [getattr(model, name, None) for name in ("memory_tokens", "cls_token")]
    return sum(tokens.shape[0] for tokens in front if tokens is not None), 0


def _find_encoder(model: nn.Module) -> Any:
    encoder = model if isinstance(model, XEncoder) else getattr(model, "attn_layers", None)
    if encoder is None:
        raise TypeError(
            "swap_: model must be an x_transformers Encoder or a wrapper of one "
            f"(TransformerWrapper, ViTransformerWrapper, ...), got {type(model).__name__}"
        )
    if not isinstance(encoder, XEncoder):
        raise TypeError(f"swap_: attn_layers must be an x_transformers Encoder, got {type(encoder).__name__}")
    return encoder


_SWAPPED_CLASSES: dict[type, type] = {XEncoder: Encoder}


def _swapped_class(base: type) -> type:
    """The class of a swapped encoder: Encoder, or for a user's own subclass one with the mixin in front of it."""
    if base not in _SWAPPED_CLASSES:
        namespace = {"__reduce_ex__": _reduce_swapped, "__module__": __name__, "_swapped_from": base}
        _SWAPPED_CLASSES[base] = type(base.__name__, (RopeEncoderMixin, base), namespace)
    return _SWAPPED_CLASSES[base]


def _reduce_swapped(self: Any, protocol: Any) -> Any:
    """Pickles and copies by the user's class, since the class of a swapped instance has no importable name."""
    return _new_swapped, (self._swapped_from,), self.__dict__


def _new_swapped(base: type) -> Any:
    return object.__new__(_swapped_class(base))
