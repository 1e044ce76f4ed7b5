"""Feed-forward layers of x-transformers that take many tokens in pieces where nothing but the result is wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from x_transformers import x_transformers as xt
from x_transformers.x_transformers import FeedForward

# Hidden states of a piece. Larger ones leave the caches before they are read, and fresh memory for them comes with
# page faults in every call.
_PIECE_BYTES_PER_THREAD = 4 << 20

# Layers that do the same to every token, whatever the others are.
_OWN = ("GLU", "LayerNorm", "ReluSquared", "SoLU")  # not all of them there in older versions
_TOKENWISE = {nn.Sequential, nn.Linear, nn.GELU, nn.SiLU, nn.Dropout, nn.LayerNorm, nn.Identity}
_TOKENWISE |= {getattr(xt, name) for name in _OWN if hasattr(xt, name)}


class PiecewiseFeedForward(FeedForward):
    """FeedForward that takes many tokens on a CPU in pieces where no gradients are wanted.

    So the hidden states of all of them are never there at once. Only layers that are known to treat tokens alike,
    without hooks, and no deep_embed; everything else is x-transformers' own forward.

    A subclass without state of its own: a module becomes one by assigning its ``__class__``.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As x_transformers' FeedForward."""
        plain = not args and all(value is None for value in kwargs.values())
        rows = _rows_of_a_piece(self.ff, x) if plain else 0
        if rows == 0:
            whole: Tensor = super().forward(x, *args, **kwargs)
            return whole
        tokens = x.flatten(0, -2)
        first: Tensor = self.ff(tokens[:rows])
        out = first.new_empty((tokens.shape[0], first.shape[-1]))
        out[:rows] = first
        for start in range(rows, tokens.shape[0], rows):
            out[start : start + rows] = self.ff(tokens[start : start + rows])
        result: Tensor = out.unflatten(0, x.shape[:-1])
        return result


def convert_feed_forwards(encoder: nn.Module) -> None:
    """Makes the feed-forward layers of an encoder of x-transformers piecewise ones, in place; no other classes."""
    for module in encoder.modules():
        if type(module) is FeedForward:
            module.__class__ = PiecewiseFeedForward


def _rows_of_a_piece(layers: nn.Module, x: Tensor) -> int:
    """Tokens of a piece; 0: all are taken at once."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor or x.device.type != "cpu":
        return 0
    piece = _PIECE_BYTES_PER_THREAD * torch.get_num_threads()
    if x.dim() < 2 or x.nbytes < piece // 4 or torch._C._get_tracing_state() is not None:
        return 0
    if torch._C._are_functorch_transforms_active():
        return 0
    modules = list(layers.modules())
    if not all(_is_tokenwise(module) for module in modules):
        return 0
    widest = max((m.out_features for m in modules if isinstance(m, nn.Linear)), default=1)
    tokens = x.shape[:-1].numel()
    pieces = tokens * widest * x.element_size() // piece
    return 0 if pieces < 2 else -(-tokens // pieces)


def _is_tokenwise(module: nn.Module) -> bool:
    """Whether a layer treats tokens alike and by themselves, and nobody looks at them on their way."""
    if type(module) not in _TOKENWISE or module._forward_hooks or module._forward_pre_hooks:
        return False
    return not (isinstance(module, nn.Dropout) and module.training and module.p > 0)
