"""Small layers of the standalone modules, and what of a layer can be folded into the pooling operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_number


class TokenNorm(NamedTuple):
    """A normalisation over channels that late_cls_pool computes itself.

    Attributes:
        kind: "layer" (LayerNorm) or "rms" (RMSNorm).
        weight: (channels,) or None.
        bias: (channels,) or None.
        eps: added to the variance or mean square.
    """

    kind: Literal["layer", "rms"]
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5

    def __call__(self, x: Tensor) -> Tensor:
        """The normalised tokens, stored."""
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def token_norm(module: nn.Module, channels: int, dtype: torch.dtype) -> TokenNorm | None:
    """The normalisation that a module does, or None if late_cls_pool has none like it.

    Args:
        module: of any class. A subclass that changes ``forward``, and hooks, are respected: None.
        channels: of the tokens.
        dtype: of the tokens; gives the default eps of nn.RMSNorm.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    forward = type(module).forward
    if forward is nn.LayerNorm.forward and module.normalized_shape == (channels,):
        return TokenNorm("layer", module.weight, module.bias, module.eps)  # type: ignore[arg-type]
    if forward is nn.RMSNorm.forward and module.normalized_shape == (channels,):
        eps = torch.finfo(dtype).eps if module.eps is None else module.eps
        return TokenNorm("rms", module.weight, None, eps)  # type: ignore[arg-type]
    return None


def linear_weights(modules: Sequence[nn.Module], *, bias: bool = False) -> list[Tensor] | None:
    """The weights of modules that multiply by them and do nothing else; None if one of the modules is another.

    Args:
        modules: of any class. Adapters, quantisation, hooks and DTensors are respected: None.
        bias: whether they may add a bias, which is not returned.
    """
    weights = []
    for module in modules:
        if type(module).forward is not nn.Linear.forward or module._forward_hooks or module._forward_pre_hooks:
            return None
        if "forward" in module.__dict__:  # put in the place of the class's, as offloading does
            return None
        own = module._parameters  # sooner than by nn.Module.__getattr__; a parametrization takes them out
        weight = own["weight"] if "weight" in own else module.weight  # noqa: SIM401 (not looked up in vain)
        if type(weight) not in (Tensor, nn.Parameter):
            return None
        if not bias and (own["bias"] if "bias" in own else module.bias) is not None:  # noqa: SIM401
            return None
        weights.append(weight)
    return weights  # type: ignore[return-value]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one that :func:`linear_weights` knows, with or without a bias."""
    return linear_weights((module,), bias=True) is not None


class Mlp(nn.Module):
    """Two linear layers with an activation between them; parameters as in timm's Mlp.

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
        act_layer: makes the activation.
        drop: dropout behind both linear layers.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.act = act_layer()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        hidden = self.act(self.fc1(x))
        if self.drop.p == 0:
            return self.fc2(hidden)  # type: ignore[no-any-return]
        return self.drop(self.fc2(self.drop(hidden)))  # type: ignore[no-any-return]


class DropPath(nn.Module):
    """Drops a residual branch for whole samples in training, and scales what is kept: stochastic depth.

    Huang et al., "Deep networks with stochastic depth", ECCV 2016.

    Args:
        p: probability that a sample's branch is dropped, in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ...) to the same."""
        if not self.training or self.p == 0:
            return x
        keep = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), device=x.device) >= self.p
        return x * (keep / (1 - self.p)).to(x.dtype)

    def extra_repr(self) -> str:
        """For printing."""
        return f"p={self.p}"


def check_probability(owner: str, what: str, value: float, below_one: bool = False) -> float:
    """A probability, as a number in [0, 1], or in [0, 1)."""
    check_number(owner, what, value, least=0)
    if value > 1 or (below_one and value == 1):
        raise ValueError(f"{owner}: {what} must be in [0, 1{')' if below_one else ']'}, got {value}")
    return value
