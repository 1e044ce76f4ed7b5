"""x_transformers.TransformerWrapper in which CLS and memory tokens, positions, masks and pooling work together."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from x_transformers import TransformerWrapper as XTransformerWrapper
from x_transformers.x_transformers import ScaledSinusoidalEmbedding

from .._checks import check_count
from ..functional import ClsRope
from .attention_pool import AttentionPool
from .returns import Returns
from .steer import adopt_encoder, check_encoder
from .swap import special_tokens
from .view import View
from .wrapper_call import OWNER, AbsolutePositions, Layers, Pool, Prepend, joined_masks, read_call

_ARGUMENTS = tuple(inspect.signature(XTransformerWrapper.forward).parameters)[2:]
_EXCLUSIVE = (
    ("use_cls_token", "average_pool_embed"),
    ("use_cls_token", "attn_pool"),
    ("average_pool_embed", "attn_pool"),
    ("recycling", "looped"),
)


class TransformerWrapper(XTransformerWrapper):
    """x_transformers.TransformerWrapper of an encoder: same options, state_dict and returns.

    The sequence is [memory tokens, CLS tokens, prepended embeddings, tokens]. Memory and CLS tokens have no position,
    which the encoder is told of. In an encoder with ``late_cls``, which needs use_cls_token, the CLS tokens enter late.

    Args:
        cls_rope: what happens to memory and CLS tokens, see :class:`x_rope_cls.Encoder`; None: as the encoder was
            built, "mask" for one of x_transformers.
        **kwargs: any option of x_transformers.TransformerWrapper. ``attn_layers`` is an x_rope_cls.Encoder, or an
            x_transformers.Encoder, which is swapped in place.

    Raises:
        TypeError: attn_layers is not an encoder, or an argument is of a wrong type.
        ValueError: options that exclude each other, or that encoders do not have.
    """

    knows_late_cls = True
    attn_pool: Any

    def __init__(self, *, cls_rope: ClsRope | None = None, **kwargs: Any) -> None:
        _check_options(kwargs)
        super().__init__(**kwargs)
        if kwargs.get("tie_embedding", False) and not kwargs.get("return_only_embed", False):
            self.to_logits = self._tied_logits  # copied and pickled with the model, which a closure is not
        pool: Any = self.attn_pool
        if pool is not None:
            self.attn_pool = _converted_pool(pool, kwargs)
        adopt_encoder(self, cls_rope)

    def init_(self) -> None:
        """Initialises the embeddings as x_transformers does, whatever kind of position embedding there is."""
        if not isinstance(self.pos_emb, ScaledSinusoidalEmbedding):
            super().init_()
        elif hasattr(self.token_emb, "init_"):
            self.token_emb.init_()

    def _tied_logits(self, embed: Tensor) -> Tensor:
        logits: Tensor = (embed @ self.token_emb.emb.weight.t()) * getattr(self, "tie_embedding_scale", 1)
        return logits

    def forward(self, x: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """As x_transformers' TransformerWrapper.

        What is given for each token may leave out memory and CLS tokens, and prepended embeddings.

        Args:
            x: (batch, tokens) token ids, or None beside prepend_embeds.
            *args: those of x_transformers' TransformerWrapper.
            **kwargs: those of x_transformers' TransformerWrapper and of the encoder:
                ``pos``: (tokens,) or (batch, tokens) positions, for the absolute embedding and the rotation; tokens in
                front that it leaves out (mems, memory, CLS, prepended) count up to just before the first. Or real
                (batch, tokens, emb_dim), an absolute embedding in the place of the module's.
                ``mask``, ``attn_mask``, ``attn_bias``, ``self_attn_kv_mask``: tokens left out may be attended to.
                ``rotate``: memory and CLS tokens left out have no position, prepended embeddings have one.
                ``rotary_pos_emb``: x-transformers' (freqs, scale) or a :class:`Rotary`, with rows for prepended
                embeddings and tokens at least.
                ``seq_start_pos``: (batch,) where left-padded sequences start; what is before is masked everywhere.
                ``need_weights``: keep the attention maps of late CLS in the intermediates, as ``cls_weights``.

        Returns:
            What x_transformers returns. With CLS tokens, embeddings and logits are theirs, without the dimension of
            tokens if there is one; with attn_pool, the pooled tokens, unless embeddings are asked for.

        Raises:
            TypeError, ValueError: an argument is of a wrong type or shape, or has no meaning with the options.
        """
        kwargs.update(zip(_ARGUMENTS, args, strict=False))
        x, call = read_call(self, x, kwargs, special_tokens(self)[0])
        returns = Returns.of(self, kwargs)
        replaced: dict[str, Any] = {"attn_layers": Layers(self, call), **returns.replaced(self)}
        if call.external is not None or call.pos is not None or call.start is not None:
            replaced["pos_emb"] = AbsolutePositions(self.pos_emb, call)
        if self.average_pool_embed and call.prepended:
            # So that the mask over all tokens is also the one that x-transformers averages with.
            replaced["post_emb_norm"] = Prepend(self.post_emb_norm, kwargs.pop("prepend_embeds"))
            kwargs["mask"] = joined_masks(kwargs.pop("prepend_mask", None), kwargs.get("mask"), x, call.prepended)
        if self.attn_pool is not None:
            replaced["attn_pool"] = Pool(self.attn_pool)
        view: Any = View(self, **replaced)
        return returns.without_prepended(XTransformerWrapper.forward(view, x, **kwargs), call.prepended)


def _converted_pool(pool: Any, options: dict[str, Any]) -> AttentionPool:
    """This package's AttentionPool with the parameters of x_transformers' own."""
    with torch.random.fork_rng(devices=[]):  # what is initialised later is as without this
        ours = AttentionPool(
            options.get("dim_pooled_tokens") or options["attn_layers"].dim,
            num_pooled_tokens=options.get("num_pooled_tokens", 1),
            dim_context=options["attn_layers"].dim,
            depth=options.get("attn_pool_depth", 1),
            heads=options["attn_layers"].attn_heads,
            dim_head=options["attn_layers"].attn_dim_head,
        )
    ours.load_state_dict(pool.state_dict(keep_vars=True), assign=True)
    return ours


def _check_options(options: dict[str, Any]) -> None:
    """Refuses what x_transformers refuses with an empty message, or accepts and stumbles over in forward."""
    for first, second in _EXCLUSIVE:
        if options.get(first, False) and options.get(second, False):
            raise ValueError(f"{OWNER}: {second} must be False with {first}, got True")
    cls_tokens = 0
    if options.get("use_cls_token", False):
        cls_tokens = check_count(OWNER, "num_cls_tokens", options.get("num_cls_tokens", 1), least=1)
    check_encoder(OWNER, options.get("attn_layers"), cls_tokens)
    memory = options.get("num_memory_tokens")
    if memory is not None and check_count(OWNER, "num_memory_tokens", memory):
        every = options.get("memory_tokens_interspersed_every")
        if every is not None:
            raise ValueError(f"{OWNER}: memory_tokens_interspersed_every must be None for an encoder, got {every}")
    heads = options.get("num_output_heads", 1)
    tied = options.get("tie_embedding", False) and not options.get("return_only_embed", False)
    if heads > 1 and (tied or options.get("mixture_of_softmax", False)):
        raise ValueError(f"{OWNER}: num_output_heads must be 1 with tie_embedding or mixture_of_softmax, got {heads}")
    dim = options["attn_layers"].dim
    if tied and (options.get("emb_dim") or dim) != dim:
        raise ValueError(
            f"{OWNER}: emb_dim must be {dim}, that of attn_layers, with tie_embedding, got {options['emb_dim']}"
        )
