"""Rotation tables: which angle each channel pair of each token is turned by, and which tokens have no position.

Every embedding here computes its angles in float32 at least, after ``.bfloat16()`` or ``.half()`` of the model and
under autocast too: at position 1,000 an angle in bfloat16 is off by up to two radians. Nothing is cached by length, so
a compiled model does not recompile for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ._checks import (
    check_bool,
    check_choice,
    check_count,
    check_number,
    check_positions,
    check_rotary_dim,
    check_rotate,
)
from .tables import Rotary

__all__ = ["AxialRotaryEmbedding", "LearnedRotaryEmbedding", "Rotary", "RotaryEmbedding"]


class _Embedding(nn.Module):
    """Keeps parameters and buffers in float32 at least, and buffers right after a stay on the meta device."""

    def __init__(self, interleaved: bool, num_prefix_tokens: int = 0, num_suffix_tokens: int = 0) -> None:
        super().__init__()
        name = type(self).__name__
        self.interleaved = check_bool(name, "interleaved", interleaved)
        self.num_prefix_tokens = check_count(name, "num_prefix_tokens", num_prefix_tokens)
        self.num_suffix_tokens = check_count(name, "num_suffix_tokens", num_suffix_tokens)

    def _compute_buffers(self) -> dict[str, Tensor]:
        return {}

    def _register_buffers(self) -> None:
        for name, value in self._compute_buffers().items():
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Embedding:
        was_meta = any(buffer.is_meta for buffer in self.buffers(recurse=False))

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lossy = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if lossy else moved

        super()._apply(keep_precision, recurse)
        if was_meta and not any(buffer.is_meta for buffer in self.buffers(recurse=False)):
            with torch.device("cpu"):
                computed = self._compute_buffers()
            for name, value in computed.items():
                setattr(self, name, value.to(getattr(self, name)))
        return self

    def _rotary(self, angles: Tensor, rotate: Tensor | None, scale: Tensor | None = None) -> Rotary:
        """Tables from angles (..., tokens, pairs); tokens in front and at the end get identity rows."""
        prefix, suffix = self.num_prefix_tokens, self.num_suffix_tokens
        cos, sin = angles.cos(), angles.sin()
        if scale is not None:
            cos, sin = cos * scale, sin * scale
        if prefix or suffix:
            cos = nn.functional.pad(cos, (0, 0, prefix, suffix), value=1.0)
            sin = nn.functional.pad(sin, (0, 0, prefix, suffix))
        if rotate is not None:
            check_rotate(type(self).__name__, rotate, cos.shape[-2])
        if prefix or suffix:
            has_position = torch.ones(angles.shape[-2], dtype=torch.bool, device=angles.device)
            has_position = nn.functional.pad(has_position, (prefix, suffix), value=False)
            rotate = has_position if rotate is None else rotate & has_position
        return Rotary(cos, sin, rotate, self.interleaved)

    def extra_repr(self) -> str:
        """The options, for ``print(module)``."""
        options = {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "training"}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


class RotaryEmbedding(_Embedding):
    """Rotary position embedding of a sequence (Su et al., "RoFormer", 2021), with x-transformers' options and numbers.

    Angle i of position t is ``t / interpolation_factor * base ** (-2i / dim)``. With ``use_xpos`` (Sun et al., "A
    length-extrapolatable transformer", 2022) query tables are scaled up and key tables down with the position, so call
    once for each: ``emb(positions)`` and ``emb(positions, keys=True)``.

    Args:
        dim: channels to rotate, even; at most head_dim.
        base: of the geometric series of frequencies.
        interpolation_factor: divides positions (Chen et al., "Extending context window ... via positional
            interpolation", 2023), at least 1.
        base_rescale_factor: multiplies the base by ``base_rescale_factor ** (dim / (dim - 2))`` ("NTK-aware" scaling).
        use_xpos: scale tables by position. Scales are relative to the middle, (largest position + 1) // 2.
        scale_base: of xpos, in positions.
        interleaved: channel layout, see :class:`Rotary`.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range.
    """

    inv_freq: Tensor
    scale: Tensor

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000,
        interpolation_factor: float = 1.0,
        base_rescale_factor: float = 1.0,
        use_xpos: bool = False,
        scale_base: float = 512,
        interleaved: bool = True,
    ) -> None:
        super().__init__(interleaved)
        name = type(self).__name__
        self.dim = check_rotary_dim(name, dim)
        self.base = check_number(name, "base", base, above=0)
        self.interpolation_factor = check_number(name, "interpolation_factor", interpolation_factor, least=1)
        self.base_rescale_factor = check_number(name, "base_rescale_factor", base_rescale_factor, above=0)
        self.use_xpos = check_bool(name, "use_xpos", use_xpos)
        self.scale_base = check_number(name, "scale_base", scale_base, above=0)
        self._register_buffers()

    def _compute_buffers(self) -> dict[str, Tensor]:
        dim, base = self.dim, self.base
        if dim > 2:  # the one frequency of dim 2 is base ** 0
            base = base * self.base_rescale_factor ** (dim / (dim - 2))
        steps = torch.arange(0, dim, 2).to(torch.float32)
        buffers = {"inv_freq": 1.0 / (base ** (steps / dim))}
        if self.use_xpos:
            buffers["scale"] = (steps + 0.4 * dim) / (1.4 * dim)
        return buffers

    def forward(self, positions_or_length: Tensor | int, rotate: Tensor | None = None, *, keys: bool = False) -> Rotary:
        """Tables for the given positions.

        Args:
            positions_or_length: real (tokens,) or (batch, tokens), or a number of tokens, at positions 0, 1, 2, ...
            rotate: bool (tokens,) or (batch, tokens), False where a token has no position; None: all have.
            keys: with xpos, tables for keys; without, no difference.

        Returns:
            Tables (tokens, dim / 2), or (batch, 1, tokens, dim / 2) for positions with a batch.

        Raises:
            TypeError, ValueError: positions are not real, not finite (checked outside compiled code), or of a wrong
                shape.
        """
        positions = check_positions(type(self).__name__, positions_or_length, self.inv_freq.device)
        angles = positions.to(self.inv_freq.dtype)[..., None] * self.inv_freq / self.interpolation_factor
        scale = self._xpos_scale(positions) if self.use_xpos else None
        if scale is not None and keys:
            scale = scale.reciprocal()
        if positions.dim() == 2:
            angles = angles[:, None]
            scale = None if scale is None else scale[:, None]
        return self._rotary(angles, rotate, scale)

    def _xpos_scale(self, positions: Tensor) -> Tensor:
        middle = (positions.max() + 1) // 2 if positions.numel() else 0
        power = (positions - middle).to(torch.promote_types(positions.dtype, torch.float32)) / self.scale_base
        return self.scale ** power[..., None]


class AxialRotaryEmbedding(_Embedding):
    """Rotary position embedding of a grid: an equal share of the channel pairs turns with each coordinate.

    Channel pairs are grouped by axis, in the order of the grid's axes (rows first); tokens are in row-major order.
    :meth:`eva` and :meth:`dinov3` are the conventions of those models.

    Args:
        dim: channels to rotate, a multiple of 2 * num_axes; at most head_dim.
        base: of the geometric series of frequencies of each axis.
        coordinates: "index": cell i of an axis is at i; "centers": cell centres are spread over (-1, 1) and multiplied
            by 2 pi, so that angles do not depend on the resolution.
        reference_grid: with "index", the grid that coordinates are rescaled to (EVA's reference feature shape).
        interleaved: channel layout, see :class:`Rotary`.
        num_axes: of the grid.
        num_prefix_tokens: tokens without a position in front of the grid's (CLS, registers).
        num_suffix_tokens: tokens without a position behind the grid's.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range.
    """

    inv_freq: Tensor

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000,
        coordinates: Literal["index", "centers"] = "index",
        reference_grid: Sequence[int] | None = None,
        interleaved: bool = True,
        num_axes: int = 2,
        num_prefix_tokens: int = 0,
        num_suffix_tokens: int = 0,
    ) -> None:
        super().__init__(interleaved, num_prefix_tokens, num_suffix_tokens)
        name = type(self).__name__
        self.num_axes = check_count(name, "num_axes", num_axes, least=1)
        self.dim = check_rotary_dim(name, dim, multiple=2 * num_axes)
        self.base = check_number(name, "base", base, above=0)
        self.coordinates = check_choice(name, "coordinates", coordinates, ("index", "centers"))
        self.reference_grid = None if reference_grid is None else self._check_grid("reference_grid", reference_grid)
        if reference_grid is not None and coordinates == "centers":
            raise ValueError(f"{name}: reference_grid must be None with coordinates='centers', got {reference_grid}")
        self._register_buffers()

    @classmethod
    def eva(
        cls, dim: int, *, reference_grid: Sequence[int] | None = None, num_prefix_tokens: int = 1
    ) -> AxialRotaryEmbedding:
        """EVA-02's convention (Fang et al., 2023): integer coordinates, base 10,000, interleaved channels."""
        return cls(dim, reference_grid=reference_grid, num_prefix_tokens=num_prefix_tokens)

    @classmethod
    def dinov3(cls, dim: int, *, base: float = 100.0, num_prefix_tokens: int = 1) -> AxialRotaryEmbedding:
        """DINOv3's convention (Siméoni et al., 2025): cell centres in (-1, 1) times 2 pi, half-split channels."""
        return cls(dim, base=base, coordinates="centers", interleaved=False, num_prefix_tokens=num_prefix_tokens)

    def _compute_buffers(self) -> dict[str, Tensor]:
        count = self.dim // (2 * self.num_axes)
        steps = torch.arange(count, dtype=torch.float32)
        return {"inv_freq": 1.0 / (self.base ** (steps / count))}

    def _check_grid(self, what: str, grid: Sequence[int]) -> tuple[int, ...]:
        name = type(self).__name__
        if not isinstance(grid, Sequence) or len(grid) != self.num_axes:
            raise ValueError(f"{name}: {what} must be {self.num_axes} integers, got {grid!r}")
        return tuple(check_count(name, what, size) for size in grid)

    def forward(self, grid: Sequence[int] | Tensor, rotate: Tensor | None = None) -> Rotary:
        """Tables for all cells of a grid, or for the given coordinates.

        Args:
            grid: its size along each axis, such as (14, 14); or real coordinates (tokens, num_axes) or
                (batch, tokens, num_axes), used as they are ("centers": in (-1, 1)).
            rotate: bool (tokens,) or (batch, tokens), over all tokens, prefix and suffix included; None: all of the
                grid have a position.

        Returns:
            Tables (tokens, dim / 2), or (batch, 1, tokens, dim / 2) for coordinates with a batch, where tokens counts
            prefix and suffix.
        """
        if isinstance(grid, Tensor):
            positions = check_positions(type(self).__name__, grid, self.inv_freq.device, axes=self.num_axes)
            positions = positions.to(self.inv_freq.dtype)
        else:
            positions = self._grid_positions(self._check_grid("grid", grid))
        if self.coordinates == "centers":
            positions = positions * (2 * math.pi)
        angles = (positions[..., None] * self.inv_freq).flatten(-2)
        return self._rotary(angles[:, None] if angles.dim() == 3 else angles, rotate)

    def _grid_positions(self, grid: tuple[int, ...]) -> Tensor:
        inv_freq = self.inv_freq
        axes = []
        for axis, size in enumerate(grid):
            coordinate = torch.arange(size, dtype=inv_freq.dtype, device=inv_freq.device)
            if self.coordinates == "centers":
                coordinate = 2 * (coordinate + 0.5) / size - 1
            elif self.reference_grid is not None:
                coordinate = coordinate / size * self.reference_grid[axis]
            axes.append(coordinate)
        return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], dim=-1)


class LearnedRotaryEmbedding(_Embedding):
    """Rotary position embedding with trainable frequencies, per head if wanted, of positions with any number of axes.

    The angle of a pair is the dot product of the position with that pair's frequency vector, so that pairs turn along
    directions that mix the axes (rope-vit's "mixed" mode: Heo et al., "Rotary position embedding for vision
    transformer", ECCV 2024). Parameter ``freqs``: (heads, num_axes, dim / 2), or (num_axes, dim / 2) if heads share.

    Args:
        dim: channels to rotate, even; at most head_dim.
        num_axes: of the positions; 1 for a sequence, 2 for images.
        heads: give every head its own frequencies; None: shared.
        base: of the geometric series of initial frequencies (rope-vit takes 10 for images).
        random_directions: for two axes or more, start from directions turned at random for each head; False: from the
            axes themselves.
        interleaved: channel layout, see :class:`Rotary`.
        num_prefix_tokens: tokens without a position in front of those given.
        num_suffix_tokens: tokens without a position behind those given.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_axes: int = 1,
        heads: int | None = None,
        base: float = 10000,
        random_directions: bool = True,
        interleaved: bool = True,
        num_prefix_tokens: int = 0,
        num_suffix_tokens: int = 0,
    ) -> None:
        super().__init__(interleaved, num_prefix_tokens, num_suffix_tokens)
        name = type(self).__name__
        self.dim = check_rotary_dim(name, dim)
        self.num_axes = check_count(name, "num_axes", num_axes, least=1)
        self.heads = None if heads is None else check_count(name, "heads", heads, least=1)
        self.base = check_number(name, "base", base, above=0)
        self.random_directions = check_bool(name, "random_directions", random_directions)
        shape = (self.num_axes, self.dim // 2)
        self.freqs = nn.Parameter(torch.empty(shape if heads is None else (heads, *shape), dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each magnitude of the geometric series once along every direction of an orthonormal basis per head."""
        axes, pairs, heads = self.num_axes, self.dim // 2, self.heads or 1
        count = -(-pairs // axes)
        device = self.freqs.device
        magnitudes = self.base ** -(torch.arange(count, dtype=torch.float32, device=device) / count)
        directions = torch.eye(axes, device=device, dtype=torch.float32).expand(heads, axes, axes)
        if axes > 1 and self.random_directions:
            directions, _ = torch.linalg.qr(torch.randn(heads, axes, axes, device=device, dtype=torch.float32))
        freqs = (directions[..., None] * magnitudes).flatten(-2)[..., :pairs]
        self.freqs.copy_(freqs if self.heads is not None else freqs[0])

    def forward(self, positions: Tensor | Sequence[int] | int, rotate: Tensor | None = None) -> Rotary:
        """Tables for the given positions; gradients reach ``freqs`` through them.

        Args:
            positions: with one axis, real (tokens,) or (batch, tokens), or a number of tokens; with more, real
                (tokens, num_axes) or (batch, tokens, num_axes), or the size of a grid along each axis.
            rotate: bool (tokens,) or (batch, tokens), over all tokens, prefix and suffix included.

        Returns:
            Tables (tokens, dim / 2), (heads, tokens, dim / 2), or with a batch (batch, heads or 1, tokens, dim / 2),
            where tokens counts prefix and suffix.
        """
        name = type(self).__name__
        points = self._points(name, positions).to(self.freqs.dtype)
        if self.heads is not None or points.dim() == 3:
            points = points.unsqueeze(-3)
        freqs = self.freqs
        angles = points[..., 0, None] * freqs[..., 0, None, :]
        for axis in range(1, self.num_axes):  # no matmul: autocast would run it in bfloat16
            angles = angles + points[..., axis, None] * freqs[..., axis, None, :]
        return self._rotary(angles, rotate)

    def _points(self, name: str, positions: Tensor | Sequence[int] | int) -> Tensor:
        device = self.freqs.device
        if self.num_axes == 1 and not isinstance(positions, Sequence):
            return check_positions(name, positions, device)[..., None]
        if isinstance(positions, Tensor):
            return check_positions(name, positions, device, axes=self.num_axes)
        if not isinstance(positions, Sequence) or len(positions) != self.num_axes:
            raise ValueError(f"{name}: positions must be a tensor or {self.num_axes} integers, got {positions!r}")
        sizes = [check_count(name, "positions", size) for size in positions]
        axes = torch.meshgrid(*(torch.arange(size, device=device) for size in sizes), indexing="ij")
        return torch.stack([axis.flatten() for axis in axes], dim=-1)
