"""What a call of TransformerWrapper returns, where x-transformers' own code would stumble over a pair of options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_FLAGS = (
    "return_embeddings",
    "return_logits_and_embeddings",
    "return_intermediates",
    "return_embeddings_and_intermediates",
    "return_logit_entropies",
    "return_next_embed_pred",
    "return_mems",
    "return_attn",
    "return_attn_z_loss",
)


@dataclass(frozen=True)
class Returns:
    """The parts that the result of x-transformers' forward is made of.

    Attributes:
        no_logits: embeddings are returned, and no logits computed.
        logits_and_embeddings: both are.
        embeddings_and_intermediates: embeddings come with intermediates.
        next_embed: a pair (result, prediction of the next embeddings) is returned.
        extra: a pair (result, intermediates, mems or attention maps) is returned.
        pooled: the result are tokens pooled by attention.
        excise: prepended embeddings are left out of what has a row for each token.
    """

    no_logits: bool
    logits_and_embeddings: bool
    embeddings_and_intermediates: bool
    next_embed: bool
    extra: bool
    pooled: bool
    excise: bool

    @staticmethod
    def of(wrapper: Any, kwargs: dict[str, Any]) -> Returns:
        """Reads the flags among the arguments of forward, and takes ``excise_prepend_embeds`` out.

        Raises:
            ValueError: flags that contradict each other or the options of the wrapper.
        """
        asked = {name: bool(kwargs.get(name, False)) for name in _FLAGS}
        no_logits = (
            asked["return_embeddings"] or asked["return_embeddings_and_intermediates"] or wrapper.to_logits is None
        )
        for name in ("return_logits_and_embeddings", "return_logit_entropies"):
            if asked[name] and no_logits:
                raise ValueError(
                    f"TransformerWrapper: {name} must be False where only embeddings are returned "
                    "(return_embeddings, return_embeddings_and_intermediates, return_only_embed), got True"
                )
        if asked["return_logit_entropies"] and wrapper.has_multiple_heads:
            heads = len(wrapper.to_logits)
            raise ValueError(f"TransformerWrapper: return_logit_entropies must be False with {heads} heads, got True")
        if asked["return_attn_z_loss"] and wrapper.attn_layers.late_cls is not None:
            raise ValueError(
                "TransformerWrapper: return_attn_z_loss must be False with late_cls, since not all layers have the "
                "same queries, got True"
            )
        if asked["return_next_embed_pred"] and not wrapper.add_continuous_pred_head:
            raise ValueError(
                "TransformerWrapper: return_next_embed_pred must be False without add_continuous_pred_head, got True"
            )
        rows_are_tokens = wrapper.cls_token is None and not wrapper.average_pool_embed
        extra = ("intermediates", "logit_entropies", "attn_z_loss", "mems", "attn")
        return Returns(
            no_logits,
            asked["return_logits_and_embeddings"],
            asked["return_embeddings_and_intermediates"],
            asked["return_next_embed_pred"],
            any(asked[f"return_{name}"] for name in extra),
            wrapper.attn_pool is not None and not no_logits and not asked["return_logits_and_embeddings"],
            bool(kwargs.pop("excise_prepend_embeds", False)) and rows_are_tokens,
        )

    def replaced(self, wrapper: Any) -> dict[str, Any]:
        """Attributes under which x-transformers' forward makes no use of logits that it has not computed."""
        if self.no_logits:
            return {"to_mixture": None, "sigsoftmax_logits": False, "squeeze_out_last_dim": False}
        if wrapper.sigsoftmax_logits and wrapper.has_multiple_heads:
            return {"sigsoftmax_logits": False, "to_logits": [_sigsoftmax(head) for head in wrapper.to_logits]}
        return {}

    def without_prepended(self, result: Any, prepended: int) -> Any:
        """The result without the rows of so many embeddings in front."""
        if not self.excise or prepended == 0:
            return result

        def cut(t: Any) -> Any:
            if t is None or (isinstance(t, Tensor) and t.dim() < 2):
                return t
            return tuple(map(cut, t)) if isinstance(t, tuple) else t[:, prepended:]

        extra: Any = None
        next_embed: Any = None
        if self.extra:
            result, extra = result
        if self.next_embed:
            result, next_embed = result
        if self.embeddings_and_intermediates:
            result = (cut(result[0]), result[1])
        elif not self.pooled:
            result = cut(result)
        if self.next_embed:
            result = (result, (cut(next_embed[0]), next_embed[1]))
        if not self.extra:
            return result
        if hasattr(extra, "logit_entropies"):
            extra.logits, extra.logit_entropies = cut(extra.logits), cut(extra.logit_entropies)
        return result, extra


def _sigsoftmax(head: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(embed: Tensor, **kwargs: Any) -> Tensor:
        logits = head(embed, **kwargs)
        return logits + logits.sigmoid().log()

    return forward
