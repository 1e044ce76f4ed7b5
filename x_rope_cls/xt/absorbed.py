"""Which attention layers of x-transformers can do without keys and values, for few queries over many tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._layers import linear_weights
from ..pooling import ordinary_reasons
from ..projected import Weights

_BIASES = ("data_dependent_alibi", "rel_proj_pos_bias")
_GATES = ("head_scale", "use_latent_q", "hybrid_module", "to_v_head_gate", "to_v_gate", "to_output_gate")
# What is_plain and option_reasons ask of an attention but for max_attend_past, which may be 0, and of its attend.
_OPTIONS = (
    *("qk_norm", "k_rmsnorm", "laser", "value_rmsnorm", "num_mem_kv", "use_latent_kv"),
    *("orthog_projected_values", "orthog_projected_values_per_head"),
    *_BIASES,
    *_GATES,
)
_ATTEND_OPTIONS = ("l2_distance", "add_zero_kv", "head_learned_sink", "composite_reasons")
_COUNTS = (int, tuple)  # of which 0 or none is not set


def absorbed_reasons(
    attention: Any, queries: int | None = None, *, memory_apart: bool = False, late_cls: bool = False
) -> tuple[str, ...]:
    """Why an Attention of x-transformers forms keys and values in this call; empty: it does not.

    Args:
        attention: an x_transformers Attention, in training or not.
        queries: number of queries of one sequence; None: the cost is not judged.
        memory_apart: keys that are no tokens are attended to apart, and the two merged.
        late_cls: queries are late CLS tokens, which no position bias or mask over pairs applies to.
    """
    options = option_reasons(attention, memory_apart=memory_apart, late_cls=late_cls)
    if options:
        return options
    dropout = attention.attend.training and attention.attend.dropout > 0
    if queries is None:
        return ordinary_reasons(dropout=dropout)
    key_heads = attention.kv_heads
    key_dim, value_dim = (p.weight.shape[0] // key_heads for p in (attention.to_k, attention.to_v))
    return ordinary_reasons(
        queries=queries,
        heads=attention.heads,
        key_heads=key_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=attention.to_k.weight.dtype,
        dropout=dropout,
    )


def option_reasons(attention: Any, *, memory_apart: bool = False, late_cls: bool = False) -> tuple[str, ...]:
    """Options of an Attention of x-transformers for which keys and values have to be formed, whatever the call."""
    children = attention.__dict__.get("_modules")  # sooner than by nn.Module.__getattr__; a View has none
    attend = attention.attend if children is None else children["attend"]
    biased = _any_set(attention, _BIASES)
    reasons = ordinary_reasons(
        key_norm=attention.qk_norm or _any_set(attention, ("k_rmsnorm",)),
        value_norm=attention.laser or _any_set(attention, ("value_rmsnorm",)),
        key_memory=not memory_apart and bool(attention.num_mem_kv or attend.add_zero_kv or attend.head_learned_sink),
        position_bias=attend.l2_distance or (biased and not late_cls),
        attn_mask=attention.max_attend_past is not None and not late_cls,
    )
    if not late_cls and (attention.orthog_projected_values or attention.orthog_projected_values_per_head):
        reasons += ("attn_orthog_projected_values needs the values",)
    if attention.use_latent_kv:
        reasons += ("attn_use_latent_kv makes keys and values from latents",)
    for name in ("to_k", "to_v"):
        module = getattr(attention, name) if children is None else children[name]
        if type(module) is not nn.Linear:
            reasons += (f"{name} is a {type(module).__name__}, not a Linear",)
        elif module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            reasons += (f"{name} has hooks",)
        elif (module._parameters["bias"] if "bias" in module._parameters else module.bias) is not None:  # noqa: SIM401
            reasons += (f"{name} has a bias",)
    if attend._forward_hooks or attend._forward_pre_hooks:
        reasons += ("attend has hooks",)
    composite: tuple[str, ...] = attend.composite_reasons
    return reasons + composite


def bare_weights(attention: Any) -> Weights | None:
    """The weights of to_k, to_v, to_q and to_out, if these, softmax and nothing else is what an attention does.

    For one that is absorbed with None here, :func:`is_plain` and :func:`option_reasons` know more. This is for layers
    whose kernels take less time than all questions of these two.
    """
    children = attention._modules
    attend = children["attend"]
    if attend._forward_hooks or attend._forward_pre_hooks or attention.max_attend_past is not None:
        return None
    if _any_set(attention, _OPTIONS) or _any_set(attend, _ATTEND_OPTIONS):
        return None
    found = linear_weights((children["to_k"], children["to_v"], children["to_q"], children["to_out"]))
    return None if found is None else tuple.__new__(Weights, found)  # sooner than by Weights._make


def is_plain(attention: Any) -> bool:
    """Whether queries are one projection and the result nothing but an output projection: no gates, no scales."""
    return not _any_set(attention, _GATES)


def _any_set(module: Any, names: tuple[str, ...]) -> bool:
    """Whether one of the attributes is there (older versions lack some) and neither None nor False, 0 or ()."""
    own = module.__dict__
    children = own.get("_modules", ())  # a View has none
    for name in names:  # sooner than by nn.Module.__getattr__, a call in Python for each of them
        value = own[name] if name in own else children[name] if name in children else getattr(module, name, None)
        if value is not None and value is not False and (type(value) not in _COUNTS or value):
            return True
    return False
