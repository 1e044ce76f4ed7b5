"""Rotary position embeddings for encoders whose CLS, memory and register tokens have no position.

Operators (:func:`apply_rope`, :func:`apply_rope_qk`, :func:`rope_attention`, :func:`late_cls_pool`), the tables they
take (:class:`Rotary` and the embeddings that make them), modules in which few queries pool all tokens
(:class:`ClassAttention`, :class:`LateCLS`, :class:`AttentionPoolLatent`), the same in plain PyTorch
(:mod:`x_rope_cls.reference`), and parts for x-transformers (:class:`Encoder`, :class:`AttentionPool`,
:class:`TransformerWrapper`, :class:`ViTransformerWrapper`, :func:`swap_`, :func:`explain`), which are imported when
first used and need x-transformers installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _library

_library.load()

from . import _C, reference  # noqa: E402  (the operators must be there)
from .class_attention import ClassAttention  # noqa: E402
from .functional import apply_rope, apply_rope_qk, late_cls_pool, rope_attention  # noqa: E402
from .late_cls import LateCLS  # noqa: E402
from .latent_pool import AttentionPoolLatent  # noqa: E402
from .rotary import AxialRotaryEmbedding, LearnedRotaryEmbedding, Rotary, RotaryEmbedding  # noqa: E402

if TYPE_CHECKING:
    from .xt.attention_pool import AttentionPool as AttentionPool
    from .xt.encoder import Encoder as Encoder
    from .xt.explain import explain as explain
    from .xt.swap import swap_ as swap_
    from .xt.vit import ViTransformerWrapper as ViTransformerWrapper
    from .xt.wrapper import TransformerWrapper as TransformerWrapper

__version__: str = _C.build_info()["version"]

__all__ = [
    "AttentionPoolLatent",
    "AxialRotaryEmbedding",
    "ClassAttention",
    "LateCLS",
    "LearnedRotaryEmbedding",
    "Rotary",
    "RotaryEmbedding",
    "apply_rope",
    "apply_rope_qk",
    "late_cls_pool",
    "reference",
    "rope_attention",
]  # the lazy ones are left out, so that `from x_rope_cls import *` works without x-transformers

_NEED_X_TRANSFORMERS = (
    "AttentionPool",
    "Encoder",
    "TransformerWrapper",
    "ViTransformerWrapper",
    "explain",
    "swap_",
)


def __getattr__(name: str) -> Any:
    if name not in _NEED_X_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(".xt", __name__)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "x_transformers":
            raise
        message = f"x_rope_cls.{name} needs x-transformers, which is not installed: `pip install x-transformers`"
        raise ImportError(message) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NEED_X_TRANSFORMERS})
