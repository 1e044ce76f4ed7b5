"""x_transformers.ViTransformerWrapper with memory and CLS tokens, attention pooling, 2-D rotation and patch masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers import ViTransformerWrapper as XViTransformerWrapper

from .._checks import check_bool, check_choice, check_count
from ..functional import ClsRope
from ..rotary import AxialRotaryEmbedding
from ..tables import Rotary
from .attention_pool import AttentionPool
from .steer import adopt_encoder, check_encoder, pad_rotary
from .view import View

OWNER = "ViTransformerWrapper"


class ViTransformerWrapper(XViTransformerWrapper):
    """x_transformers.ViTransformerWrapper of an encoder: same options, state_dict and returns, and more of each.

    The sequence is [memory tokens, CLS tokens, patches, register tokens]. All but patches have no position, which the
    encoder is told of. In an encoder with ``late_cls``, which needs use_cls_token, the CLS tokens enter late.

    Args:
        image_size: height and width of images, or (height, width), for the table of absolute embeddings.
        patch_size: height and width of a patch.
        attn_layers: an x_rope_cls.Encoder, or an x_transformers.Encoder, which is swapped in place.
        cls_rope: what happens to tokens without a position, see :class:`x_rope_cls.Encoder`; None: as the encoder was
            built, "mask" for one of x_transformers.
        num_memory_tokens: learned tokens in front, whose outputs are not used.
        use_cls_token: CLS tokens in front of the patches, which logits come from.
        num_cls_tokens: how many.
        attn_pool: logits come from tokens pooled by attention over the patches.
        num_pooled_tokens: how many.
        attn_pool_depth: layers of the pool.
        patch_rotary: "1d": patches are a sequence, as the encoder's own ``rotary_pos_emb`` counts it; "axial": half of
            the channel pairs of a head turn with the row, half with the column; or a module that makes a
            :class:`Rotary` with a row for each patch from (rows, columns).
        use_abs_pos_emb: learned absolute embeddings of patches.
        **kwargs: further options of x_transformers.ViTransformerWrapper: channels, num_classes, post_emb_norm,
            num_register_tokens, emb_dropout.

    Raises:
        TypeError: attn_layers is not an encoder, or an argument is of a wrong type.
        ValueError: sizes that do not fit, or options that exclude each other.
    """

    knows_late_cls = True
    memory_tokens: nn.Parameter | None
    cls_token: nn.Parameter | None

    def __init__(
        self,
        *,
        image_size: int | Sequence[int],
        patch_size: int,
        attn_layers: Any,
        cls_rope: ClsRope | None = None,
        num_memory_tokens: int = 0,
        use_cls_token: bool = False,
        num_cls_tokens: int = 1,
        attn_pool: bool = False,
        num_pooled_tokens: int = 1,
        attn_pool_depth: int = 1,
        patch_rotary: Literal["1d", "axial"] | nn.Module = "1d",
        use_abs_pos_emb: bool = True,
        **kwargs: Any,
    ) -> None:
        memory = check_count(OWNER, "num_memory_tokens", num_memory_tokens)
        cls_tokens = check_count(OWNER, "num_cls_tokens", num_cls_tokens, least=1)
        pooled = check_count(OWNER, "num_pooled_tokens", num_pooled_tokens, least=1)
        check_bool(OWNER, "use_abs_pos_emb", use_abs_pos_emb)
        if check_bool(OWNER, "use_cls_token", use_cls_token) & check_bool(OWNER, "attn_pool", attn_pool):
            raise ValueError(f"{OWNER}: attn_pool must be False with use_cls_token, got True")
        check_encoder(OWNER, attn_layers, cls_tokens if use_cls_token else 0)
        if not isinstance(patch_rotary, nn.Module):
            check_choice(OWNER, "patch_rotary", patch_rotary, ("1d", "axial"))
        rows, columns = _grid(image_size, patch_size)
        # One patch by one where x_transformers knows no such image: its table is replaced.
        square = rows == columns and use_abs_pos_emb
        super().__init__(
            image_size=rows * patch_size if square else patch_size,
            patch_size=patch_size,
            attn_layers=attn_layers,
            **kwargs,
        )
        dim = attn_layers.dim
        if not use_abs_pos_emb:
            self.pos_embedding = None
        elif not square:
            self.pos_embedding = nn.Parameter(torch.randn(1, rows * columns, dim))
        self.register_parameter("memory_tokens", nn.Parameter(torch.randn(memory, dim)) if memory else None)
        cls_token = nn.Parameter(torch.randn(cls_tokens, dim) * 0.02) if use_cls_token else None
        self.register_parameter("cls_token", cls_token)
        self.attn_pool = None
        if attn_pool:
            heads, dim_head = attn_layers.attn_heads, attn_layers.attn_dim_head
            self.attn_pool = AttentionPool(
                dim, num_pooled_tokens=pooled, depth=attn_pool_depth, heads=heads, dim_head=dim_head
            )
        adopt_encoder(self, cls_rope)
        self.patch_rotary = patch_rotary if isinstance(patch_rotary, nn.Module) else None
        if patch_rotary == "axial":
            self.patch_rotary = AxialRotaryEmbedding(_axial_dim(attn_layers))

    def forward(
        self,
        img: Tensor,
        return_embeddings: bool = False,
        return_logits_and_embeddings: bool = False,
        *,
        mask: Tensor | None = None,
        return_intermediates: bool = False,
    ) -> Any:
        """Logits of images.

        Args:
            img: (batch, channels, height, width), of any size that patches divide and, with absolute embeddings, that
                has no more patches than there are embeddings.
            return_embeddings: return the patches' embeddings.
            return_logits_and_embeddings: return both.
            mask: bool (batch, patches), True: the patch is there; row by row. Others are not attended to or averaged.
            return_intermediates: return (result, intermediates of x_transformers), which has ``cls_tokens``,
                ``memory_tokens``, ``register_tokens`` and ``attn_pooled_tokens`` too, where there are such.

        Returns:
            Logits (batch, num_classes), of the CLS token, of the pooled token or of the mean over patches; (batch,
            tokens, num_classes) with several CLS or pooled tokens. Without num_classes these embeddings themselves.
            Embeddings: (batch, patches, dim).

        Raises:
            TypeError, ValueError: an argument is of a wrong type or shape.
        """
        grid = self._check_call(img, mask)
        if return_embeddings and return_logits_and_embeddings:
            raise ValueError(f"{OWNER}: return_embeddings must be False with return_logits_and_embeddings, got True")
        layers = _Layers(self, grid, mask, return_intermediates)
        replaced: dict[str, Any] = {"attn_layers": layers}
        if self.pos_embedding is None:
            replaced["pos_embedding"] = img.new_zeros((1, 1, 1))
        view: Any = View(self, **replaced)
        embed: Tensor = XViTransformerWrapper.forward(view, img, return_embeddings=True)
        tokens = layers.cls_tokens if self.attn_pool is None else self.attn_pool(embed, mask=mask)
        if return_intermediates:
            layers.fill_intermediates(embed, None if self.attn_pool is None else tokens)
        result: Any = embed
        if not return_embeddings:
            logits = self.mlp_head(_pooled(embed, mask) if tokens is None else _squeezed(tokens))
            result = (logits, embed) if return_logits_and_embeddings else logits
        return (result, layers.intermediates) if return_intermediates else result

    def _check_call(self, img: Tensor, mask: Tensor | None) -> tuple[int, int]:
        patch = self.patch_size
        if img.dim() != 4 or img.shape[2] % patch or img.shape[3] % patch or 0 in img.shape[2:]:
            expected = f"(batch, channels, height, width), multiples of patch_size {patch}"
            raise ValueError(f"{OWNER}: img must be of shape {expected}, got {tuple(img.shape)}")
        rows, columns = img.shape[2] // patch, img.shape[3] // patch
        if self.pos_embedding is not None and rows * columns > self.pos_embedding.shape[1]:
            embeddings = self.pos_embedding.shape[1]
            raise ValueError(
                f"{OWNER}: img must have at most {embeddings} patches, for which there are absolute embeddings, "
                f"got {rows} x {columns}"
            )
        if mask is None:
            return rows, columns
        if mask.dtype != torch.bool:
            raise TypeError(f"{OWNER}: mask must be bool, got {mask.dtype}")
        if mask.shape != (img.shape[0], rows * columns):
            expected = f"{(img.shape[0], rows * columns)}"
            raise ValueError(f"{OWNER}: mask must be of shape {expected}, got {tuple(mask.shape)}")
        return rows, columns


class _Layers:
    """Stands in the place of ``attn_layers``: puts memory and CLS tokens in front, and takes their outputs off."""

    def __init__(
        self, wrapper: ViTransformerWrapper, grid: tuple[int, int], mask: Tensor | None, return_hiddens: bool
    ) -> None:
        self.wrapper, self.grid, self.mask, self.return_hiddens = wrapper, grid, mask, return_hiddens
        self.intermediates: Any = None
        self.memory_tokens: Tensor | None = None
        self.cls_tokens: Tensor | None = None
        self.register_tokens: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The encoder's outputs of patches and registers, from their embeddings x."""
        wrapper = self.wrapper
        patches = self.grid[0] * self.grid[1]
        registers = x.shape[1] - patches
        memory, cls_tokens = (0 if t is None else t.shape[0] for t in (wrapper.memory_tokens, wrapper.cls_token))
        kwargs: dict[str, Any] = {}
        front = [wrapper.memory_tokens, wrapper.cls_token]
        late = wrapper.attn_layers.late_cls is not None
        if late:
            kwargs["cls_tokens"] = front.pop()
        x = torch.cat((*(t.expand(x.shape[0], -1, -1) for t in front if t is not None), x), dim=1)
        before = x.shape[1] - patches - registers
        if self.mask is not None:
            kwargs["mask"] = F.pad(self.mask, (before, registers), value=True)
        if wrapper.patch_rotary is not None:
            kwargs["rotary_pos_emb"] = self._rotary(wrapper.patch_rotary, before, registers)
        out = wrapper.attn_layers(x, return_hiddens=self.return_hiddens, **kwargs)
        if self.return_hiddens:
            out, self.intermediates = out
        # Late CLS comes back in front of all.
        first, second = (cls_tokens, memory) if late else (memory, cls_tokens)
        front_rows, second_rows, embeds = out.split([first, second, patches + registers], dim=1)
        memory_rows, cls_rows = (second_rows, front_rows) if late else (front_rows, second_rows)
        self.memory_tokens = memory_rows if memory else None
        self.cls_tokens = cls_rows if cls_tokens else None
        self.register_tokens = embeds[:, patches:] if registers else None
        rows: Tensor = embeds
        return rows

    def fill_intermediates(self, embed: Tensor, pooled: Tensor | None) -> None:
        """Adds what the wrapper knows of, under TransformerWrapper's names where it has them."""
        intermediates = self.intermediates
        intermediates.last_layer_hiddens = embed
        intermediates.attn_pooled_tokens = pooled
        for name in ("memory_tokens", "cls_tokens", "register_tokens"):
            setattr(intermediates, name, getattr(self, name))

    def _rotary(self, embedding: nn.Module, front: int, back: int) -> Rotary:
        rotary = embedding(self.grid)
        patches = self.grid[0] * self.grid[1]
        if not isinstance(rotary, Rotary) or rotary.cos.shape[-2] != patches:
            got = tuple(rotary.cos.shape) if isinstance(rotary, Rotary) else type(rotary).__name__
            raise ValueError(f"{OWNER}: patch_rotary must make a Rotary with {patches} rows, got {got}")
        padded: Rotary = pad_rotary(rotary, front, back)
        return padded


def _pooled(embed: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over patches that are there."""
    if mask is None:
        return embed.mean(dim=-2)
    present = mask[..., None]
    return torch.where(present, embed, 0).sum(dim=-2) / present.sum(dim=-2).clamp(min=1)


def _squeezed(tokens: Tensor) -> Tensor:
    """One token without its dimension, as x_transformers' TransformerWrapper has it."""
    return tokens[:, 0] if tokens.shape[1] == 1 else tokens


def _grid(image_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    check_count(OWNER, "patch_size", patch_size, least=1)
    sizes = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
    if len(sizes) != 2:
        raise ValueError(f"{OWNER}: image_size must be an integer or (height, width), got {image_size!r}")
    for size in sizes:
        if check_count(OWNER, "image_size", size, least=1) % patch_size:
            raise ValueError(f"{OWNER}: image_size must be a multiple of patch_size {patch_size}, got {image_size!r}")
    return sizes[0] // patch_size, sizes[1] // patch_size


def _axial_dim(encoder: Any) -> int:
    """All channels of a head that two axes can share."""
    dim_head: int = encoder.attn_dim_head
    if dim_head < 4:
        raise ValueError(f"{OWNER}: attn_dim_head must be at least 4 with patch_rotary='axial', got {dim_head}")
    return dim_head - dim_head % 4
