"""Class attention: a layer that updates CLS tokens from all tokens and leaves those as they are.

Touvron et al., "Going deeper with Image Transformers" (CaiT), arXiv 2103.17239.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ._checks import check_count, check_number
from ._layers import DropPath, Mlp, check_probability, is_linear, token_norm
from .pooling import pool_attention


class ClassAttention(nn.Module):
    """One class-attention layer with its feed-forward: CLS tokens in, CLS tokens out.

    Options, parameters and state_dict are those of timm's LayerScaleBlockClassAttn. CLS tokens see themselves, one
    another and all tokens; nothing has a position. With few CLS tokens neither the normalised tokens nor keys and
    values are formed: see :mod:`x_rope_cls.pooling`. Attention dropout in training, or a norm other than LayerNorm and
    RMSNorm, or many CLS tokens, compute the same in the ordinary way.

    Args:
        dim: channels.
        num_heads: heads, of dim / num_heads channels.
        mlp_ratio: hidden channels of the feed-forward, in units of dim.
        qkv_bias: projections to queries, keys and values have a bias.
        proj_drop: dropout behind the output projection and in the feed-forward.
        attn_drop: dropout of attention weights.
        drop_path: probability that a sample skips a branch (stochastic depth), in [0, 1).
        act_layer: makes the activation of the feed-forward.
        norm_layer: makes a norm from a number of channels.
        init_values: first value of the layer scale, which multiplies each branch; None: no layer scale.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        init_values: float | None = 1e-4,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("ClassAttention", "dim", dim, least=1)
        check_number("ClassAttention", "mlp_ratio", mlp_ratio, above=0)
        check_probability("ClassAttention", "drop_path", drop_path, below_one=True)
        options: dict[str, Any] = {
            key: value for key, value in (("device", device), ("dtype", dtype)) if value is not None
        }
        self.norm1 = norm_layer(dim, **options)
        self.attn = _Projections(dim, num_heads, qkv_bias, attn_drop, proj_drop, options)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **options)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, proj_drop, device, dtype)
        self.gamma_1 = self.gamma_2 = None
        if init_values is not None:
            check_number("ClassAttention", "init_values", init_values)
            self.gamma_1 = nn.Parameter(torch.full((dim,), float(init_values), **options))
            self.gamma_2 = nn.Parameter(torch.full((dim,), float(init_values), **options))

    @overload
    def forward(
        self, x: Tensor, x_cls: Tensor, key_mask: Tensor | None = None, need_weights: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, x_cls: Tensor, key_mask: Tensor | None = None, *, need_weights: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, x_cls: Tensor, key_mask: Tensor | None = None, need_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Updates the CLS tokens.

        Args:
            x: (batch, tokens, dim), float32, float64, bfloat16 or float16.
            x_cls: (batch or 1, cls, dim); 1: the same CLS tokens for the whole batch, projected once.
            key_mask: bool (batch, tokens), True: attend. CLS tokens are always attended to.
            need_weights: also return the attention map.

        Returns:
            (batch, cls, dim) and, if wanted, (batch, num_heads, cls, cls + tokens), without dropout.

        Raises:
            ValueError: shapes do not fit.
        """
        self._check(x, x_cls)
        attn = self.attn
        normed = self.norm1(x_cls)
        norm = token_norm(self.norm1, x.shape[2], x.dtype)
        k_weight, v_weight, k_bias, v_bias = attn.keys_and_values()
        pooled = pool_attention(
            self.norm1(x) if norm is None else x,
            attn.q(normed).unflatten(-1, (attn.num_heads, -1)),
            k_weight,
            v_weight,
            k_bias=k_bias,
            v_bias=v_bias,
            norm=norm,
            extra=normed,
            key_mask=key_mask,
            dropout_p=attn.attn_drop.p if self.training else 0.0,
            need_weights=need_weights,
        )
        out = attn.proj(pooled.out.flatten(2))
        x_cls = self._add(x_cls, attn.proj_drop(out) if attn.proj_drop.p > 0 else out, self.gamma_1)
        x_cls = self._add(x_cls, self.mlp(self.norm2(x_cls)), self.gamma_2)
        if not need_weights:
            return x_cls
        assert pooled.weights is not None
        return x_cls, pooled.weights

    def _add(self, x_cls: Tensor, branch: Tensor, gamma: Tensor | None) -> Tensor:
        if isinstance(self.drop_path, nn.Identity) and gamma is not None:
            return torch.addcmul(x_cls, branch, gamma)
        added: Tensor = x_cls + self.drop_path(branch if gamma is None else branch * gamma)
        return added

    def _check(self, x: Tensor, x_cls: Tensor) -> None:
        dim = self.attn.dim
        if x.dim() != 3 or x.shape[2] != dim:
            raise ValueError(f"ClassAttention: x must be (batch, tokens, {dim}), got {tuple(x.shape)}")
        if x_cls.dim() != 3 or x_cls.shape[2] != dim or x_cls.shape[0] not in (1, x.shape[0]) or x_cls.shape[1] == 0:
            expected = f"({x.shape[0]} or 1, at least 1, {dim})"
            raise ValueError(f"ClassAttention: x_cls must be {expected}, got {tuple(x_cls.shape)}")


class _Projections(nn.Module):
    """Parameters of class attention, under the names that timm gives them."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float, options: dict[str, Any]
    ) -> None:
        super().__init__()
        check_count("ClassAttention", "num_heads", num_heads, least=1)
        if dim % num_heads:
            raise ValueError(f"ClassAttention: dim must be a multiple of {num_heads} heads, got {dim}")
        self.dim, self.num_heads = dim, num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **options)
        self.k = nn.Linear(dim, dim, bias=qkv_bias, **options)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, **options)
        self.attn_drop = nn.Dropout(check_probability("ClassAttention", "attn_drop", attn_drop))
        self.proj = nn.Linear(dim, dim, **options)
        self.proj_drop = nn.Dropout(check_probability("ClassAttention", "proj_drop", proj_drop))

    def keys_and_values(self) -> tuple[Any, ...]:
        """Weights and biases that make keys and values; the layers themselves if they are no plain Linear."""
        if is_linear(self.k) and is_linear(self.v):
            return self.k.weight, self.v.weight, self.k.bias, self.v.bias
        return self.k, self.v, None, None
