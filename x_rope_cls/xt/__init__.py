"""The adapter for x-transformers: Encoder, AttentionPool, the wrappers, swap_ and explain."""

from .version import check_hooks, installed_version

installed_version()

from x_transformers.attend import Attend  # noqa: E402
from x_transformers.x_transformers import Attention, AttentionLayers  # noqa: E402

check_hooks(Attention, Attend, AttentionLayers)

from .attention_pool import AttentionPool  # noqa: E402
from .encoder import Encoder  # noqa: E402
from .explain import Report, Row, explain  # noqa: E402
from .swap import swap_  # noqa: E402
from .vit import ViTransformerWrapper  # noqa: E402
from .wrapper import TransformerWrapper  # noqa: E402

__all__ = [
    "AttentionPool",
    "Encoder",
    "Report",
    "Row",
    "TransformerWrapper",
    "ViTransformerWrapper",
    "explain",
    "swap_",
]
