"""x_transformers.AttentionPool through this package's operators."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers import AttentionPool as XAttentionPool
from x_transformers import CrossAttender
from x_transformers.attend import Attend
from x_transformers.x_transformers import Attention

from .._checks import check_count
from ..pool_layer import pool_layer
from ..pooling import pool_attention
from .absorbed import absorbed_reasons, bare_weights, is_plain, option_reasons
from .attention import convert_attention
from .encoder import attention_layers


class AttentionPool(XAttentionPool):
    """Learned queries pool all tokens by cross attention; x_transformers.AttentionPool, same parameters and state_dict.

    With few queries and without options that need them, keys and values are never formed: see
    :mod:`x_rope_cls.pooling`. Every other option computes the same through x-transformers' code and this package's
    attention operator. ``attn_kwargs`` reach the attention at any depth, and a sequence all of whose tokens are masked
    gets 0 from its attention.

    Args:
        dim: channels of queries and result.
        num_pooled_tokens: number of learned queries; 0: queries are passed to forward.
        dim_context: channels of the tokens; None: dim.
        add_residual: add the queries to the result; not with transformer blocks, which do so.
        depth: number of blocks of cross attention and feed-forward; with 1 it is attention alone.
        heads: heads.
        dim_head: channels of a head.
        use_transformer_blocks: use blocks with depth 1 too; None: where depth is above 1.
        squeeze_output: return (batch, dim); for a single query.
        attn_kwargs: further options of x_transformers' Attention. With blocks, a tuple as long as depth gives each
            block its own.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range, or two of them contradict each other.
    """

    def __init__(
        self,
        dim: int,
        num_pooled_tokens: int = 1,
        dim_context: int | None = None,
        add_residual: bool = False,
        depth: int = 1,
        heads: int = 8,
        dim_head: int = 64,
        use_transformer_blocks: bool | None = None,
        squeeze_output: bool | None = None,
        attn_kwargs: dict[str, Any] | None = None,
    ) -> None:
        owner = "AttentionPool"
        for name, count, least in (("dim", dim, 1), ("num_pooled_tokens", num_pooled_tokens, 0), ("depth", depth, 1)):
            check_count(owner, name, count, least=least)
        blocks = depth > 1 if use_transformer_blocks is None else use_transformer_blocks
        if depth > 1 and not blocks:
            raise ValueError(f"{owner}: depth must be 1 without use_transformer_blocks, got {depth}")
        if blocks and add_residual:
            raise ValueError(f"{owner}: add_residual must be False with transformer blocks, got {add_residual}")
        if squeeze_output and num_pooled_tokens > 1:
            raise ValueError(f"{owner}: num_pooled_tokens must be at most 1 to squeeze, got {num_pooled_tokens}")
        options = dict(attn_kwargs or {})
        if add_residual and options.get("dim_out", dim) != dim:
            raise ValueError(f"{owner}: dim_out must be {dim} (dim) to add the residual, got {options['dim_out']}")
        super().__init__(
            dim,
            num_pooled_tokens=num_pooled_tokens,
            dim_context=dim_context,
            add_residual=add_residual,
            depth=depth,
            heads=heads,
            dim_head=dim_head,
            use_transformer_blocks=blocks,
            squeeze_output=squeeze_output,
            attn_kwargs={} if blocks else options,
        )
        dim_context = dim if dim_context is None else dim_context
        self.dim, self.dim_context = dim, dim_context
        self.has_learned_queries = num_pooled_tokens > 0
        if not self.has_learned_queries:
            self.queries = None
        if blocks and options:  # which x_transformers.AttentionPool forgets
            cross = {f"cross_attn_{name}": value for name, value in options.items()}
            cross = {"cross_attn_dim_context": dim_context, **cross}
            self.pooler = CrossAttender(dim=dim, depth=depth, heads=heads, attn_dim_head=dim_head, **cross)
        for attention in [self.pooler] if not blocks else [a for _, a in attention_layers(self.pooler)]:
            convert_attention(attention, None)

    def forward(
        self,
        context: Tensor,
        mask: Tensor | None = None,
        queries: Tensor | None = None,
        need_weights: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Pools the tokens.

        Args:
            context: (batch, tokens, dim_context).
            mask: bool (batch, tokens), True: attend.
            queries: (batch, queries, dim), in the place of the learned ones.
            need_weights: also return the attention map of the last attention layer.
            **kwargs: of x_transformers' Attention or CrossAttender; where they make it return a tuple
                (``return_intermediates``, ``return_hiddens``), the pooled tokens are its first.

        Returns:
            (batch, queries, dim), or (batch, dim) with squeeze_output; and, if wanted, the map
            (batch, heads, queries, keys).

        Raises:
            ValueError: shapes do not fit, or there are neither learned queries nor others.
        """
        queries = self._check(context, mask, queries)
        more: tuple[Any, ...] = ()
        found = None if kwargs else self._pool(context, mask, queries, need_weights)
        if found is not None:
            pooled, weights = found
        else:
            result, weights = self._call_pooler(context, mask, queries, need_weights, kwargs)
            pooled, more = (result[0], result[1:]) if isinstance(result, tuple) else (result, ())
        if self.add_residual:
            pooled = pooled + queries
        if self.squeeze_output:
            pooled = pooled.squeeze(1)
        if need_weights:
            more = (*more, weights)
        return (pooled, *more) if more else pooled

    def _check(self, context: Tensor, mask: Tensor | None, queries: Tensor | None) -> Tensor:
        """The queries: learned ones as (queries, dim), others as (batch, queries, dim)."""
        if context.dim() != 3 or context.shape[2] != self.dim_context:
            got = tuple(context.shape)
            raise ValueError(f"AttentionPool: context must be (batch, tokens, {self.dim_context}), got {got}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != context.shape[:2]):
            found = f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"AttentionPool: mask must be bool {tuple(context.shape[:2])}, got {found}")
        if queries is None:
            if not self.has_learned_queries:
                raise ValueError("AttentionPool: queries must be given with num_pooled_tokens=0, got None")
            own = self._parameters  # sooner than by nn.Module.__getattr__; a parametrization takes them out
            return own["queries"] if "queries" in own else self.queries  # type: ignore[return-value]  # noqa: SIM401
        count = 1 if self.squeeze_output else "queries"
        fits = queries.dim() == 3 and queries.shape[0] == context.shape[0] and queries.shape[2] == self.dim
        if not fits or (self.squeeze_output and queries.shape[1] != 1):
            expected = f"({context.shape[0]}, {count}, {self.dim})"
            raise ValueError(f"AttentionPool: queries must be {expected}, got {tuple(queries.shape)}")
        return queries

    def _pool(
        self, context: Tensor, mask: Tensor | None, queries: Tensor, need_weights: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """What is pooled, and the map; None if the pooler is more than an attention of projections and softmax."""
        attention = self._modules["pooler"]
        if not isinstance(attention, Attention) or attention._forward_hooks or attention._forward_pre_hooks:
            return None
        weights = bare_weights(attention)
        if weights is None and not (is_plain(attention) and not option_reasons(attention)):
            return None
        children = attention._modules
        attend = children["attend"]
        dropout_p = attend.dropout if attend.training else 0.0
        if weights is not None:
            pooled = pool_layer(
                context,
                queries,
                weights,
                heads=attention.heads,
                key_mask=mask,
                scale=attend.scale,
                dropout_p=dropout_p,
                head_order="cyclic",
                need_weights=need_weights,
            )
            out = pooled.out
        else:
            to_q, to_out = children["to_q"], children["to_out"]
            q = to_q(queries if queries.dim() == 3 else queries[None]).unflatten(-1, (attention.heads, -1))
            pooled = pool_attention(
                context,
                q,
                attention.to_k.weight,
                attention.to_v.weight,
                key_mask=mask,
                scale=attend.scale,
                dropout_p=dropout_p,
                head_order="cyclic",
                need_weights=need_weights,
            )
            out = to_out(pooled.out.flatten(2))
        dropout = getattr(attention, "sublayer_dropout", None)
        return out if dropout is None else dropout(out), pooled.weights

    def _call_pooler(
        self, context: Tensor, mask: Tensor | None, queries: Tensor, need_weights: bool, kwargs: dict[str, Any]
    ) -> tuple[Any, Tensor | None]:
        queries = queries.expand(context.shape[0], -1, -1)
        if mask is not None and (kwargs or self._forms_keys(queries.shape[1])):  # no NaN of padding into gradients
            context = torch.where(mask[..., None], context, 0)
        if not need_weights:
            return self.pooler(queries, context, context_mask=mask, **kwargs), None
        flag = "return_intermediates" if isinstance(self.pooler, Attention) else "return_hiddens"
        wanted = kwargs.pop(flag, False)
        pooler = _with_maps(self.pooler)
        pooled, found = pooler(queries, context, context_mask=mask, **{flag: True}, **kwargs)
        last = found if isinstance(pooler, Attention) else found.attn_intermediates[-1]
        weights = last.post_softmax_attn
        if mask is not None:  # x-transformers spreads the weights of a row without keys over masked ones
            keys = F.pad(mask, (weights.shape[-1] - mask.shape[-1], 0), value=True)
            weights = torch.where(keys[:, None, None], weights, 0)
        return ((pooled, found) if wanted else pooled), weights

    def _forms_keys(self, queries: int) -> bool:
        """Whether an attention of the pooler projects all tokens."""
        found = (m for m in self.pooler.modules() if isinstance(m, Attention))
        return any(absorbed_reasons(attention, queries, memory_apart=True) for attention in found)


def _with_maps(module: nn.Module) -> nn.Module:
    """The module, or a copy with the same parameters without ``flash``, with which x-transformers keeps no maps."""
    children = {name: None if child is None else _with_maps(child) for name, child in module._modules.items()}
    flash = isinstance(module, Attend) and module.flash
    if not flash and all(child is module._modules[name] for name, child in children.items()):
        return module
    shown = copy.copy(module)
    shown.__dict__["_modules"] = children
    if flash:
        shown.__dict__["flash"] = False
    return shown
