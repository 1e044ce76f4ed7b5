"""Which x-transformers this adapter can sit in, and the parts of it that the adapter extends."""

from __future__ import annotations

import inspect
from importlib import metadata

OLDEST = "2.11.23"
NEWEST_TESTED = "2.31.10"


def installed_version() -> str:
    """Version of the x-transformers that Python would import.

    Raises:
        ImportError: it is not installed, or too old.
    """
    try:
        version = metadata.version("x-transformers")
    except metadata.PackageNotFoundError:
        message = f"x_rope_cls: x-transformers>={OLDEST} must be installed for Encoder, swap_ and explain, got none"
        raise ModuleNotFoundError(message, name="x_transformers") from None
    from packaging.version import Version  # x-transformers depends on it, this package does not

    if Version(version) < Version(OLDEST):
        raise ImportError(f"x_rope_cls: x-transformers must be at least {OLDEST}, got {version}")
    return version


def check_hooks(attention: type, attend: type, layers: type) -> None:
    """Checks that x-transformers still hands on what the adapter sends through it.

    Args:
        attention: x_transformers' Attention.
        attend: x_transformers' Attend.
        layers: x_transformers' AttentionLayers.

    Raises:
        ImportError: a later x-transformers dropped an argument that carries the adapter's data.
    """
    needed = {
        attention: ("rotary_pos_emb", "context_rotary_pos_emb", "prev_attn", "additional_key_values", "attn_mask"),
        attend: ("mask", "attn_bias", "prev_attn"),
        layers: ("mems", "pos", "seq_pos_offset", "rotary_pos_emb"),
    }
    for owner, names in needed.items():
        missing = [name for name in names if name not in inspect.signature(owner.forward).parameters]  # type: ignore[attr-defined]
        if missing:
            raise ImportError(
                f"x_rope_cls: {owner.__name__}.forward of x-transformers must take {', '.join(missing)} "
                f"(known to work: {OLDEST} to {NEWEST_TESTED}), got {installed_version()} without"
            )
