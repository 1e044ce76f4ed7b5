"""CLS tokens that enter a model late, for any PyTorch model.

Touvron et al., "Going deeper with Image Transformers" (CaiT), arXiv 2103.17239: layers of tokens first, then layers of
class attention that update CLS alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_choice, check_count
from .class_attention import ClassAttention

_MODES = ("class_attention", "join")


class LateCLS(nn.Module):
    """Learned CLS tokens that pool all tokens by class attention, after the layers that need no CLS.

    - ``"class_attention"``: all ``layers`` run on the tokens, then ``depth`` :class:`ClassAttention` layers update CLS
      alone; the tokens stay as the last of ``layers`` left them.
    - ``"join"``: ``layers[:at]`` run on the tokens, CLS pools them by ``depth`` class-attention layers, and
      ``layers[at:]`` run on CLS and tokens as one sequence.

    Either way the result has CLS in front of the tokens, as if they had stood there from the start. Without ``layers``
    it is what comes behind (or, for ``"join"``, between) layers that the caller runs.

    A layer is called as ``layer(x)``; where forward is given a key mask, as ``layer(x, key_mask=key_mask)``, or with
    the keyword that ``mask_argument`` names. Layers that were called without CLS and with CLS alike must not depend on
    the number of tokens. CLS tokens have no position: layers that rotate should be told so (``Rotary.rotate``).

    Args:
        dim: channels.
        num_cls_tokens: how many CLS tokens there are.
        mode: see above.
        depth: number of class-attention layers; None: 2 for "class_attention", 1 for "join".
        num_heads: heads of class attention.
        layers: the model's own layers, each (batch, tokens, dim) to the same; they become part of this module.
        at: in "join", CLS enters before ``layers[at]``, negative counts from the end; None: -2, the penultimate.
        mask_argument: keyword under which layers take a key mask (True: attend). A name that ends in "padding_mask"
            gets the opposite, as torch.nn has it (``src_key_padding_mask``). None: layers take no mask, because no
            token sees another in them.
        init_values: first value of the layer scale of class attention; None: no layer scale.
        device, dtype: of the parameters.
        **options: of :class:`ClassAttention`: mlp_ratio, qkv_bias, proj_drop, attn_drop, drop_path, act_layer,
            norm_layer.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range.
    """

    def __init__(
        self,
        dim: int,
        num_cls_tokens: int = 1,
        mode: Literal["class_attention", "join"] = "class_attention",
        depth: int | None = None,
        num_heads: int = 8,
        *,
        layers: Iterable[nn.Module] | None = None,
        at: int | None = None,
        mask_argument: str | None = "key_mask",
        init_values: float | None = 1e-4,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_count("LateCLS", "dim", dim, least=1)
        check_count("LateCLS", "num_cls_tokens", num_cls_tokens, least=1)
        check_choice("LateCLS", "mode", mode, _MODES)
        depth = {"class_attention": 2, "join": 1}[mode] if depth is None else depth
        check_count("LateCLS", "depth", depth, least=1)
        self.mode = mode
        self.mask_argument = mask_argument
        self.layers = nn.ModuleList(() if layers is None else layers)
        self.at = _entry(mode, at, None if layers is None else len(self.layers))
        options.update(init_values=init_values, device=device, dtype=dtype)
        self.class_layers = nn.ModuleList(ClassAttention(dim, num_heads, **options) for _ in range(depth))
        self.cls_tokens = nn.Parameter(torch.empty(num_cls_tokens, dim, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.cls_tokens, std=0.02)

    @property
    def num_cls_tokens(self) -> int:
        """How many CLS tokens stand in front of the result."""
        return self.cls_tokens.shape[0]

    @overload
    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        need_weights: Literal[False] = False,
        return_tokens: bool = True,
    ) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, *, need_weights: Literal[True], return_tokens: bool = True
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, need_weights: bool = False, return_tokens: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Runs the layers and lets CLS in.

        Args:
            x: (batch, tokens, dim), without CLS; float32, float64, bfloat16 or float16.
            key_mask: bool (batch, tokens), True: attend.
            need_weights: also return the attention map of the last class-attention layer.
            return_tokens: False: return CLS alone, which in "class_attention" saves a copy of the tokens.

        Returns:
            (batch, num_cls_tokens + tokens, dim), CLS in front, or (batch, num_cls_tokens, dim); and, if wanted, the
            map (batch, num_heads, num_cls_tokens, num_cls_tokens + tokens).

        Raises:
            ValueError: shapes do not fit.
            TypeError: one of the layers returned something else than such tokens.
        """
        dim = self.cls_tokens.shape[1]
        if x.dim() != 3 or x.shape[2] != dim:
            raise ValueError(f"LateCLS: x must be (batch, tokens, {dim}), got {tuple(x.shape)}")
        if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != x.shape[:2]):
            got = f"{key_mask.dtype} {tuple(key_mask.shape)}"
            raise ValueError(f"LateCLS: key_mask must be bool {tuple(x.shape[:2])}, got {got}")
        for index in range(self.at):
            x = self._run(index, x, key_mask)

        x_cls = self.cls_tokens[None]
        weights = None
        for layer in self.class_layers[:-1]:
            x_cls = layer(x, x_cls, key_mask)
        x_cls = self.class_layers[-1](x, x_cls, key_mask, need_weights=need_weights)
        if need_weights:
            x_cls, weights = x_cls
        out = x_cls.to(x.dtype)
        rest = range(self.at, len(self.layers))
        if rest or return_tokens:
            out = torch.cat((out, x), dim=1)
        if rest and key_mask is not None:
            key_mask = F.pad(key_mask, (self.num_cls_tokens, 0), value=True)
        for index in rest:
            out = self._run(index, out, key_mask)
        if rest and not return_tokens:
            out = out[:, : self.num_cls_tokens]
        return out if weights is None else (out, weights)

    def _run(self, index: int, x: Tensor, key_mask: Tensor | None) -> Tensor:
        layer: Callable[..., Tensor] = self.layers[index]
        if key_mask is None or self.mask_argument is None:
            out = layer(x)
        else:
            inverted = self.mask_argument.endswith("padding_mask")
            out = layer(x, **{self.mask_argument: ~key_mask if inverted else key_mask})
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise TypeError(f"LateCLS: layers[{index}] must return a tensor {tuple(x.shape)}, got {got}")
        return out


def _entry(mode: str, at: int | None, layers: int | None) -> int:
    """The number of layers that run before CLS enters."""
    if mode == "class_attention":
        if at is not None:
            raise ValueError(f"LateCLS: at must be None for 'class_attention', where CLS enters last, got {at}")
        return layers or 0
    if layers is None:
        if at is not None:
            raise ValueError(f"LateCLS: at must be None without layers, got {at}")
        return 0
    at = -2 if at is None else at
    if not isinstance(at, int) or isinstance(at, bool):
        raise TypeError(f"LateCLS: at must be an integer, got {at!r}")
    if not -layers <= at <= layers:
        raise ValueError(f"LateCLS: at must be in [{-layers}, {layers}] for {layers} layers, got {at}")
    return at + layers if at < 0 else at
