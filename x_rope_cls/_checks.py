"""Checks of Python arguments. Messages say what was expected and what came; tensors' shapes the operators check."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_Integer = (int, torch.SymInt)  # a traced length is a SymInt


def check_bool(owner: str, what: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {what} must be a bool, got {value!r}")
    return value


def check_count(owner: str, what: str, value: int, least: int = 0) -> int:
    if not isinstance(value, _Integer) or isinstance(value, bool):
        raise TypeError(f"{owner}: {what} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{owner}: {what} must be at least {least}, got {value}")
    return value


def check_rotary_dim(owner: str, value: int, multiple: int = 2) -> int:
    if check_count(owner, "dim", value, least=1) % multiple:
        expected = "even" if multiple == 2 else f"a multiple of {multiple}"
        raise ValueError(f"{owner}: dim must be {expected}, got {value}")
    return value


def check_number(
    owner: str, what: str, value: float, *, above: float | None = None, least: float | None = None
) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{owner}: {what} must be a number, got {value!r}")
    if not math.isfinite(value) or (above is not None and value <= above) or (least is not None and value < least):
        bound = f"above {above}" if above is not None else f"at least {least}"
        raise ValueError(f"{owner}: {what} must be finite and {bound}, got {value}")
    return value


def check_choice(owner: str, what: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{owner}: {what} must be one of {choices}, got {value!r}")
    return value


def check_positions(owner: str, value: Tensor | int, device: torch.device, axes: int | None = None) -> Tensor:
    """Positions as a tensor, (tokens,) or (batch, tokens), with a last dimension `axes` if there are several."""
    if axes is None and isinstance(value, _Integer) and not isinstance(value, bool):
        return torch.arange(check_count(owner, "length", value), device=device)
    if not isinstance(value, Tensor):
        expected = "a tensor" if axes is not None else "a tensor or a length"
        raise TypeError(f"{owner}: positions must be {expected}, got {value!r}")
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{owner}: positions must be real numbers, got {value.dtype}")
    last = () if axes is None else (axes,)
    dims = value.dim() - len(last)
    if dims not in (1, 2) or tuple(value.shape[dims:]) != last:
        tail = "" if axes is None else f", {axes}"
        expected = f"(tokens{tail or ','}) or (batch, tokens{tail})"
        raise ValueError(f"{owner}: positions must be of shape {expected}, got {tuple(value.shape)}")
    if value.is_floating_point() and _has_values(value) and not torch.isfinite(value).all():
        raise ValueError(f"{owner}: positions must be finite, got {value[~torch.isfinite(value)][0].item()}")
    return value


def check_rotate(owner: str, rotate: Tensor, tokens: int) -> None:
    if not isinstance(rotate, Tensor) or rotate.dtype != torch.bool:
        got = rotate.dtype if isinstance(rotate, Tensor) else repr(rotate)
        raise TypeError(f"{owner}: rotate must be a bool tensor, got {got}")
    if rotate.dim() not in (1, 2) or rotate.shape[-1] != tokens:
        expected = f"({tokens},) or (batch, {tokens})"
        raise ValueError(f"{owner}: rotate must be of shape {expected}, got {tuple(rotate.shape)}")


def _has_values(tensor: Tensor) -> bool:
    """Whether Python may look at the values: not while tracing, not on the meta device, not in fake tensors."""
    if torch.compiler.is_compiling() or tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
