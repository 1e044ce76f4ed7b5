"""Which attention layers of x-transformers can do without keys and values, for few queries over many tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..pooling import ordinary_reasons

_GATES = ("head_scale", "use_latent_q", "hybrid_module", "to_v_head_gate", "to_v_gate", "to_output_gate")


def absorbed_reasons(attention: Any, queries: int | None = None) -> tuple[str, ...]:
    """Why an Attention of x-transformers forms keys and values in this call; empty: it does not.

    Args:
        attention: an x_transformers Attention, in training or not.
        queries: number of queries of one sequence; None: the cost is not judged.
    """
    dropout = attention.attend.training and attention.attend.dropout > 0
    key_heads = attention.kv_heads
    sizes: dict[str, Any] = {}
    if queries is not None:
        key_dim, value_dim = (p.weight.shape[0] // key_heads for p in (attention.to_k, attention.to_v))
        sizes.update(queries=queries, heads=attention.heads, key_heads=key_heads, key_dim=key_dim, value_dim=value_dim)
        sizes.update(dtype=attention.to_k.weight.dtype)
    return option_reasons(attention) or ordinary_reasons(dropout=dropout, **sizes)


def option_reasons(attention: Any) -> tuple[str, ...]:
    """Options of an Attention of x-transformers for which keys and values have to be formed, whatever the call."""
    attend = attention.attend
    reasons = ordinary_reasons(
        key_norm=attention.qk_norm or _has(attention, "k_rmsnorm"),
        value_norm=attention.laser or _has(attention, "value_rmsnorm"),
        key_memory=bool(attention.num_mem_kv or attend.add_zero_kv or attend.head_learned_sink),
        position_bias=attend.l2_distance
        or _has(attention, "data_dependent_alibi")
        or _has(attention, "rel_proj_pos_bias"),
        attn_mask=attention.max_attend_past is not None,
    )
    if attention.orthog_projected_values or attention.orthog_projected_values_per_head:
        reasons += ("attn_orthog_projected_values needs the values",)
    if attention.use_latent_kv:
        reasons += ("attn_use_latent_kv makes keys and values from latents",)
    for name in ("to_k", "to_v"):
        projection = type(getattr(attention, name))
        if projection is not nn.Linear:
            reasons += (f"{name} is a {projection.__name__}, not a Linear",)
    composite: tuple[str, ...] = attend.composite_reasons
    return reasons + composite


def is_plain(attention: Any) -> bool:
    """Whether queries are one projection and the result nothing but an output projection: no gates, no scales."""
    return not any([_has(attention, name) for name in _GATES])  # noqa: C419 (a generator takes longer than the checks)


def _has(attention: Any, name: str) -> bool:
    value = getattr(attention, name, None)  # not there in older versions
    return value is not None and value is not False
