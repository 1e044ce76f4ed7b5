"""Converts models that were built with x-transformers' own classes, in place."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from x_transformers import ContinuousTransformerWrapper, ViTransformerWrapper
from x_transformers import Encoder as XEncoder

from ..functional import ClsRope
from .encoder import Encoder, RopeEncoderMixin, configure
from .late import LateCls, check_late, configure_late

Model = TypeVar("Model", bound=nn.Module)


def swap_(
    model: Model,
    cls_rope: ClsRope = "mask",
    num_prefix_tokens: int | None = None,
    num_suffix_tokens: int | None = None,
    rotate: Any = None,
    late_cls: LateCls | None = None,
    late_cls_at: int | None = None,
    num_cls_tokens: int | None = None,
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
        late_cls: let CLS tokens enter late, see :class:`x_rope_cls.Encoder`; the model gets a parameter for them, and
            its output CLS rows in front. For an Encoder, or a ContinuousTransformerWrapper that neither takes rows off
            the output nor averages over it. Also for a wrapper of this package with use_cls_token, whose CLS tokens
            enter late then, without any new parameter. None: as before.
        late_cls_at: None: as before, at first -2.
        num_cls_tokens: None: as before, at first 1.

    Returns:
        model itself.

    Raises:
        TypeError: model is something else.
        ValueError: see :class:`x_rope_cls.Encoder`; or late_cls is given for a wrapper that would not know of CLS.
    """
    encoder = _find_encoder(model)
    if isinstance(model, RopeEncoderMixin) and rotate is num_prefix_tokens is num_suffix_tokens is None:
        rotate = model.rotate
    gives_cls = late_cls is not None and gives_late_cls(model)
    prefix, suffix = (0, 0) if rotate is not None else special_tokens(model, gives_cls)
    previous = encoder.__class__
    if not isinstance(encoder, RopeEncoderMixin):
        encoder.__class__ = _swapped_class(previous)
    late = _late_settings(encoder, late_cls, late_cls_at, 0 if gives_cls else num_cls_tokens)
    try:
        if late_cls is not None:
            _check_wrapper(model, late_cls)
        check_late(encoder, *late)
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
    configure_late(encoder, *late)
    return model


def _late_settings(
    encoder: Any, late_cls: LateCls | None, late_cls_at: int | None, num_cls_tokens: int | None
) -> tuple[LateCls | None, int, int]:
    """What is not given is as the encoder has it."""
    return (
        encoder.late_cls if late_cls is None else late_cls,
        getattr(encoder, "late_cls_at", -2) if late_cls_at is None else late_cls_at,
        getattr(encoder, "num_cls_tokens", 1) if num_cls_tokens is None else num_cls_tokens,
    )


def _check_wrapper(model: nn.Module, late_cls: str) -> None:
    """Refuses late CLS in a wrapper that would take its rows for something else."""
    if isinstance(model, XEncoder) or gives_late_cls(model):
        return
    name = type(model).__name__
    if not isinstance(model, ContinuousTransformerWrapper):
        raise ValueError(f"swap_: late_cls must be None for {name}, which knows nothing of CLS rows, got {late_cls!r}")
    for option in ("has_memory_tokens", "average_pool_embed"):
        if getattr(model, option, False):
            raise ValueError(f"swap_: late_cls must be None for {name} with {option}, got {late_cls!r}")


def gives_late_cls(model: nn.Module) -> bool:
    """Whether a wrapper passes its own CLS tokens to an encoder with late CLS: one of this package with CLS tokens."""
    return getattr(model, "knows_late_cls", False) and getattr(model, "cls_token", None) is not None


def special_tokens(model: nn.Module, late: bool = False) -> tuple[int, int]:
    """How many tokens without a position a wrapper puts in front of the sequence and at its end.

    Late CLS, which the encoder has or will have (late), is not in the sequence.
    """
    if isinstance(model, RopeEncoderMixin):
        return model.num_prefix_tokens, model.num_suffix_tokens
    registers = getattr(model, "register_tokens", None) if isinstance(model, ViTransformerWrapper) else None
    late = late or (gives_late_cls(model) and getattr(model.attn_layers, "late_cls", None) is not None)
    front = [getattr(model, name, None) for name in (("memory_tokens",) if late else ("memory_tokens", "cls_token"))]
    before = sum(tokens.shape[0] for tokens in front if tokens is not None)
    return before, 0 if registers is None else registers.shape[0]


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
