"""Feed-forward layers of x-transformers on a CPU.

Linear layers in float32 go through oneDNN where it is the faster of torch's two libraries. Where nothing but the result
is wanted, they bring their activation, and many tokens are taken in pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from x_transformers import x_transformers as xt
from x_transformers.x_transformers import FeedForward

from .._layers import linear_weights

Step = Callable[[Tensor], Tensor]

# Hidden states of a piece. Larger ones leave the caches before they are read, and fresh memory for them comes with
# page faults in every call.
_PIECE_BYTES_PER_THREAD = 4 << 20

# Layers that do the same to every token, whatever the others are.
_OWN = ("GLU", "LayerNorm", "ReluSquared", "SoLU")  # not all of them there in older versions
_TOKENWISE = {nn.Sequential, nn.Linear, nn.GELU, nn.SiLU, nn.ReLU, nn.Dropout, nn.LayerNorm, nn.Identity}
_TOKENWISE |= {getattr(xt, name) for name in _OWN if hasattr(xt, name)}

# Multiply-adds of the widest linear layer below which the time is that of the calls.
_LEAST_WORK = 1 << 23


class PiecewiseFeedForward(FeedForward):
    """FeedForward that takes many tokens on a CPU in pieces where no gradients are wanted, and oneDNN where it pays.

    So the hidden states of all of them are never there at once. Only layers that are known to treat tokens alike,
    without hooks, and no deep_embed; everything else is x-transformers' own forward, with gradients in float32 but for
    the library of its linear layers.

    A subclass without state of its own: a module becomes one by assigning its ``__class__``.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As x_transformers' FeedForward."""
        layers = [] if args or any(value is not None for value in kwargs.values()) else _layers(self.ff, x)
        if not layers:
            whole: Tensor = super().forward(x, *args, **kwargs)
            return whole
        if torch.is_grad_enabled():
            return _apply([_with_gradients(layer) for layer in layers], x)
        steps = _steps(layers, x)
        tokens = x.flatten(0, -2)
        rows = _rows_of_a_piece(layers, tokens)
        out = _apply(steps, tokens[:rows])
        if rows < tokens.shape[0]:
            first, out = out, out.new_empty((tokens.shape[0], out.shape[-1]))
            out[:rows] = first
            for start in range(rows, tokens.shape[0], rows):
                out[start : start + rows] = _apply(steps, tokens[start : start + rows])
        result: Tensor = out.unflatten(0, x.shape[:-1])
        return result


def convert_feed_forwards(encoder: nn.Module) -> None:
    """Makes the feed-forward layers of an encoder of x-transformers piecewise ones, in place; no other classes."""
    for module in encoder.modules():
        if type(module) is FeedForward:
            module.__class__ = PiecewiseFeedForward


def _layers(ff: nn.Module, x: Tensor) -> list[nn.Module]:
    """The layers one after the other, without containers; empty: x-transformers' forward is to be called."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu" or x.dim() < 2:
        return []
    if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
        return []
    modules = list(ff.modules())
    if torch.is_grad_enabled():
        if not _takes_one_dnn(x) or forward_ad._current_level >= 0 or any(map(_has_hooks, modules)):
            return []
    elif not all(map(_is_tokenwise, modules)):
        return []
    layers = _flat(ff)
    return layers if x.numel() * _widest(layers) >= _LEAST_WORK else []


def _flat(module: nn.Module) -> list[nn.Module]:
    if type(module) is not nn.Sequential:
        return [module]
    return [layer for child in module for layer in _flat(child)]


def _widest(layers: list[nn.Module]) -> int:
    return max((m.out_features for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)), default=0)


def _rows_of_a_piece(layers: list[nn.Module], tokens: Tensor) -> int:
    count = tokens.shape[0]
    pieces = count * _widest(layers) * tokens.element_size() // (_PIECE_BYTES_PER_THREAD * torch.get_num_threads())
    return count if pieces < 2 else -(-count // pieces)


def _steps(layers: list[nn.Module], x: Tensor) -> list[Step]:
    """What to call one after the other."""
    one_dnn = _takes_one_dnn(x)
    steps: list[Step] = []
    skip = False
    for layer, after in zip(layers, (*layers[1:], None), strict=True):
        if skip:
            skip = False
        elif type(layer) is nn.Linear and one_dnn and _fits(layer, None if steps else x.shape[-1]):
            activation = _activation(after)
            skip = activation is not None
            steps.append(partial(_fused_linear, layer.weight, layer.bias, *(activation or ("none", ""))))
        elif type(layer) not in (nn.Dropout, nn.Identity):  # which do nothing here
            steps.append(layer)
    return steps


def _apply(steps: list[Step], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _takes_one_dnn(x: Tensor) -> bool:
    """Whether linear layers of x are called through oneDNN.

    In float32 torch calls MKL. On Zen 4 with AVX-512 oneDNN took 7 to 20 % less time from 16 to 4,096 tokens; with AVX2
    neither is the faster one.
    """
    if x.dtype != torch.float32 or not torch.backends.mkldnn.is_available() or not torch._C._get_mkldnn_enabled():
        return False
    if torch.is_autocast_enabled("cpu") or torch._C._len_torch_dispatch_stack() > 0 or _has_any_global_hook():
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _fits(layer: nn.Linear, channels: int | None) -> bool:
    """Whether there is nothing about its parameters that only torch's own linear layer knows, errors included."""
    if linear_weights((layer,), bias=True) is None or layer.weight.layout != torch.strided:
        return False
    if channels is not None and layer.weight.shape[-1] != channels:
        return False
    return all(p is None or (p.dtype == torch.float32 and p.device.type == "cpu") for p in (layer.weight, layer.bias))


def _activation(module: nn.Module | None) -> tuple[str, str] | None:
    """Its name and algorithm in oneDNN; None: not one that a linear layer can bring."""
    if type(module) is nn.GELU:
        return "gelu", module.approximate
    if type(module) is nn.SiLU:
        return "swish", ""
    return ("relu", "") if type(module) is nn.ReLU else None


def _fused_linear(weight: Tensor, bias: Tensor | None, activation: str, algorithm: str, x: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    return out


def _with_gradients(layer: nn.Module) -> Step:
    if type(layer) is nn.Linear and _fits(layer, None):
        return lambda x: _apply_linear(x, layer.weight, layer.bias)
    return layer


def _apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype != weight.dtype or x.shape[-1] != weight.shape[-1]:
        return F.linear(x, weight, bias)  # which says what is wrong
    out: Tensor = _Linear.apply(x, weight, bias)
    return out


class _Linear(torch.autograd.Function):
    """A linear layer and its gradients; that of the weight is as fast the way torch does it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _fused_linear(weight, bias, "none", "", x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        # With create_graph, for transforms and for whoever watches, by operators that all of them know.
        batched = torch._C._functorch.is_batchedtensor(grad) or torch._C._functorch.is_legacy_batchedtensor(grad)
        plain = torch.is_grad_enabled() or batched or torch._C._len_torch_dispatch_stack() > 0
        dx = dweight = dbias = None
        if needs_x:
            dx = grad @ weight if plain else _fused_linear(weight.t(), None, "none", "", grad.contiguous())
        rows = grad.reshape(-1, grad.shape[-1])
        if needs_weight:
            dweight = rows.t() @ x.reshape(-1, x.shape[-1])
        if needs_bias:
            dbias = rows.sum(0)
        return dx, dweight, dbias


def _has_forward_hooks(module: nn.Module) -> bool:
    """Whether somebody else acts when a module is called; a ``forward`` of its own is how offloading does it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _has_hooks(module: nn.Module) -> bool:
    return bool(_has_forward_hooks(module) or module._backward_hooks or module._backward_pre_hooks)


def _is_tokenwise(module: nn.Module) -> bool:
    """Whether a layer treats tokens alike and by themselves, and nobody looks at them on their way."""
    if type(module) not in _TOKENWISE or _has_forward_hooks(module):
        return False
    return not (isinstance(module, nn.Dropout) and module.training and module.p > 0)
