"""Attention pooling by learned latent queries, as timm has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_choice, check_count, check_number
from ._layers import Mlp, check_probability, is_linear
from .pooling import pool_attention


class AttentionPoolLatent(nn.Module):
    """Learned latents attend to all tokens; an output projection and a feed-forward follow.

    Options, parameters and state_dict are those of timm's AttentionPoolLatent (the pooling head of SigLIP and others).
    With few latents neither keys nor values are formed: see :mod:`x_rope_cls.pooling`. ``qk_norm``, ``attn_mask`` and
    many latents compute the same in the ordinary way.

    Args:
        in_features: channels of the tokens.
        out_features: channels of the result; None: in_features; 0: no output projection, norm and feed-forward.
        embed_dim: channels of all heads together; None: in_features.
        num_heads: heads, of embed_dim / num_heads channels.
        feat_size: number of tokens; needed for pos_embed.
        mlp_ratio: hidden channels of the feed-forward, in units of out_features.
        qkv_bias: projections to queries, keys and values have a bias.
        q_proj: project the latents to queries; False: they are the queries.
        qk_norm: normalise queries and keys of each head.
        latent_len: number of latents.
        latent_dim: channels of the latents; None: embed_dim.
        pos_embed: "abs": add a learned embedding to the tokens; "": none.
        pool_type: what is returned of several latents: "token", the first; "avg", their mean; "", all of them.
        norm_layer: makes a norm from a number of channels, before the feed-forward and for qk_norm; None: no norm,
            and LayerNorm for qk_norm.
        act_layer: makes the activation of the feed-forward.
        drop: dropout behind the output projection.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        embed_dim: int | None = None,
        num_heads: int = 8,
        feat_size: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        q_proj: bool = True,
        qk_norm: bool = False,
        latent_len: int = 1,
        latent_dim: int | None = None,
        pos_embed: str = "",
        pool_type: str = "token",
        norm_layer: Callable[..., nn.Module] | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = "AttentionPoolLatent"
        for name, count in (("in_features", in_features), ("num_heads", num_heads), ("latent_len", latent_len)):
            check_count(owner, name, count, least=1)
        embed_dim = check_count(owner, "embed_dim", embed_dim or in_features, least=1)
        out_features = in_features if out_features is None else check_count(owner, "out_features", out_features)
        latent_dim = check_count(owner, "latent_dim", latent_dim or embed_dim, least=1)
        check_choice(owner, "pos_embed", pos_embed, ("", "abs"))
        check_choice(owner, "pool_type", pool_type, ("token", "avg", ""))
        if embed_dim % num_heads:
            raise ValueError(f"{owner}: embed_dim must be a multiple of {num_heads} heads, got {embed_dim}")
        if not q_proj and latent_dim != embed_dim:
            raise ValueError(f"{owner}: latent_dim must be {embed_dim} (embed_dim) without q_proj, got {latent_dim}")
        if pos_embed and feat_size is None:
            raise ValueError(f"{owner}: feat_size must be given with pos_embed={pos_embed!r}, got None")
        if feat_size is not None:
            check_count(owner, "feat_size", feat_size)

        options: dict[str, Any] = {
            key: value for key, value in (("device", device), ("dtype", dtype)) if value is not None
        }
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.in_features, self.feat_size, self.latent_len, self.latent_dim = (
            in_features,
            feat_size,
            latent_len,
            latent_dim,
        )
        self.pool = pool_type
        self.pos_embed = None
        if pos_embed:
            self.pos_embed = nn.Parameter(torch.zeros(feat_size or 0, in_features, **options))
        self.latent = nn.Parameter(torch.zeros(1, latent_len, latent_dim, **options))
        self.q = nn.Linear(latent_dim, embed_dim, bias=qkv_bias, **options) if q_proj else nn.Identity()
        self.kv = nn.Linear(in_features, embed_dim * 2, bias=qkv_bias, **options)
        head_norm = norm_layer or nn.LayerNorm
        self.q_norm = head_norm(self.head_dim, **options) if qk_norm else nn.Identity()
        self.k_norm = head_norm(self.head_dim, **options) if qk_norm else nn.Identity()

        self.proj: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        self.mlp: nn.Module | None = None
        self.proj_drop = nn.Dropout(check_probability(owner, "drop", drop))
        if out_features:
            check_number(owner, "mlp_ratio", mlp_ratio, above=0)
            self.proj = nn.Linear(embed_dim, out_features, **options)
            self.norm = nn.Identity() if norm_layer is None else norm_layer(out_features, **options)
            self.mlp = Mlp(out_features, int(out_features * mlp_ratio), act_layer, 0.0, device, dtype)
        self.out_features = out_features or embed_dim
        self.init_weights()

    def init_weights(self) -> None:
        """Fills latents and position embedding from normal distributions cut off at two standard deviations."""
        for parameter in (self.pos_embed, self.latent):
            if parameter is not None:
                std = parameter.shape[-1] ** -0.5
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Pools the tokens.

        Args:
            x: (batch, tokens, in_features), float32, float64, bfloat16 or float16.
            attn_mask: bool (True: attend) or additive, broadcastable to (batch, num_heads, latent_len, tokens).
            key_mask: bool (batch, tokens), True: attend. A sequence without tokens is pooled to 0 by the attention.
            need_weights: also return the attention map.

        Returns:
            (batch, out_features), or (batch, latent_len, out_features) with ``pool_type=""``; and, if wanted,
            (batch, num_heads, latent_len, tokens).

        Raises:
            ValueError: shapes do not fit.
        """
        if x.dim() != 3 or x.shape[2] != self.in_features:
            got = tuple(x.shape)
            raise ValueError(f"AttentionPoolLatent: x must be (batch, tokens, {self.in_features}), got {got}")
        if self.pos_embed is not None:
            if x.shape[1] != self.feat_size:
                raise ValueError(f"AttentionPoolLatent: x must have {self.feat_size} tokens, got {x.shape[1]}")
            x = x + self.pos_embed.to(x.dtype)
        k_weight, v_weight, k_bias, v_bias = self._keys_and_values()
        pooled = pool_attention(
            x,
            self.q_norm(self.q(self.latent).unflatten(-1, (self.num_heads, -1))),
            k_weight,
            v_weight,
            k_bias=k_bias,
            v_bias=v_bias,
            key_norm=None if isinstance(self.k_norm, nn.Identity) else self.k_norm,
            key_mask=key_mask,
            attn_mask=attn_mask,
            need_weights=need_weights,
        )
        out: Tensor = self.proj_drop(self.proj(pooled.out.flatten(2)))
        if self.mlp is not None:
            out = out + self.mlp(self.norm(out))
        if self.pool:
            out = out[:, 0] if self.pool == "token" else out.mean(1)
        return (out, pooled.weights) if need_weights else out

    def _keys_and_values(self) -> tuple[Any, ...]:
        """Weights and biases of keys and of values; functions that make them if the layer is no plain Linear."""
        columns, kv = self.num_heads * self.head_dim, self.kv
        if not is_linear(kv):
            return lambda x: kv(x)[..., :columns], lambda x: kv(x)[..., columns:], None, None
        bias = (None, None) if kv.bias is None else kv.bias.split(columns)
        return (*kv.weight.split(columns), *bias)
