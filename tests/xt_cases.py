"""Configurations of x_transformers.Encoder that the adapter's tests go through, and how two encoders are compared."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import x_transformers
from packaging.version import Version
from torch import Tensor, nn
from x_transformers.x_transformers import Attention

import x_rope_cls

VERSION = Version(metadata.version("x-transformers"))
BASE: dict[str, Any] = {
    "dim": 32,
    "depth": 2,
    "heads": 4,
    "attn_dim_head": 8,
    "ff_mult": 2,
    "rotary_pos_emb": True,
    "verbose": False,
}

# People's options: every one of these must run in the fused operator.
FUSED_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_rotary": {"rotary_pos_emb": False},
    "depth": {"depth": 3},
    "one_head": {"heads": 1, "attn_dim_head": 32},
    "rotary_emb_dim_full": {"rotary_emb_dim": 8},
    "rotary_emb_dim_odd": {"rotary_emb_dim": 5},
    "rotary_interpolation": {"rotary_interpolation_factor": 2.0},
    "rotary_base_rescale": {"rotary_base_rescale_factor": 4.0},
    "ff_glu": {"ff_glu": True, "ff_swish": True, "ff_no_bias": True},
    "use_rmsnorm": {"use_rmsnorm": True},
    "use_scalenorm": {"use_scalenorm": True},
    "attn_dim_head": {"attn_dim_head": 12},
    "attn_value_dim_head": {"attn_value_dim_head": 5},
    "attn_kv_heads": {"attn_kv_heads": 2},
    "attn_kv_heads_wide": {"heads": 6, "attn_kv_heads": 2},
    "attn_one_kv_head": {"attn_one_kv_head": True},
    "attn_num_mem_kv": {"attn_num_mem_kv": 3},
    "attn_num_mem_kv_grouped": {"attn_num_mem_kv": 3, "attn_kv_heads": 2},
    "attn_qk_norm": {"attn_qk_norm": True},
    "attn_qk_norm_dim_scale": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True, "attn_num_mem_kv": 2},
    "attn_qk_norm_groups": {"attn_qk_norm": True, "attn_qk_norm_groups": 2},
    "attn_qk_rmsnorm": {"attn_qk_rmsnorm": True},
    "attn_k_rmsnorm": {"attn_k_rmsnorm": True},
    "attn_value_rmsnorm": {"attn_value_rmsnorm": True},
    "attn_add_zero_kv": {"attn_add_zero_kv": True},
    "attn_add_zero_kv_alibi": {"attn_add_zero_kv": True, "alibi_pos_bias": True},
    "attn_l2_distance": {"attn_l2_distance": True},
    "attn_l2_distance_grouped": {"attn_l2_distance": True, "attn_kv_heads": 2},
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 3},
    "alibi_grouped": {"alibi_pos_bias": True, "attn_kv_heads": 2},
    "data_dependent_alibi": {"attn_data_dependent_alibi": True},
    "rel_proj_pos_bias": {"attn_use_rel_proj_pos_bias": True},
    "attn_max_attend_past": {"attn_max_attend_past": 2},
    "rotate_num_heads": {"rotate_num_heads": 3},
    "rotate_num_heads_mem_kv": {"rotate_num_heads": 1, "attn_num_mem_kv": 2},
    "latent_q_kv": {
        "attn_use_latent_q": True,
        "attn_dim_latent_q": 16,
        "attn_use_latent_kv": True,
        "attn_dim_latent_kv": 16,
        "attn_latent_rope_subheads": 2,
    },
    "attn_head_scale": {"attn_head_scale": True},
    "attn_on_attn": {"attn_on_attn": True},
    "attn_gates": {"attn_gate_value_heads": True, "attn_gate_values": True, "attn_swiglu_values": True},
    "attn_output_gate": {"attn_output_gate": True, "attn_output_gate_headwise": True},
    "attn_laser": {"attn_laser": True},
    "attn_orthog_projected_values": {
        "attn_orthog_projected_values": True,
        "attn_orthog_projected_values_per_head": True,
    },
    "attn_tuple_options": {"attn_num_mem_kv": (1, 2)},
    "residual_streams": {"num_residual_streams": 2},
    "residual_streams_qkv": {"num_residual_streams": 2, "qkv_receive_diff_residuals": True},
    "integrate_layers": {"integrate_layers": True},
    "aggregated_residuals": {
        "attn_aggregated_residuals": True,
        "attn_aggregated_residual_kwargs": {"lora_rank": 8},
    },
    "gated_multi_residual": {
        "gated_multi_residual": True,
        "num_residual_streams": 2,
        "residual_fn_kwargs": {"read_gate_rank": 4, "write_gate_rank": 4},
    },
    "gate_residual": {"gate_residual": True},
    "orthog_residual": {"orthog_residual": True},
    "mv_split_residual": {"mv_split_residual": True},
    "scale_residual": {"scale_residual": True},
    "depth_scale_residual": {"depth_scale_residual": 0.5},
    "value_residual": {"add_value_residual": True},
    "value_residual_fixed": {"add_value_residual": True, "learned_value_residual_mix": False},
    "reinject_input": {"reinject_input": True, "learned_reinject_input_gate": True},
    "shift_tokens": {"shift_tokens": 1},
    "macaron": {"macaron": True},
    "sandwich_coef": {"sandwich_coef": 1},
    "sandwich_norm": {"sandwich_norm": True},
    "par_ratio": {"depth": 4, "par_ratio": 3},
    "post_norm": {"pre_norm": False},
    "pre_and_post_norm": {"pre_and_post_norm": True},
    "custom_layers": {"depth": None, "custom_layers": ("a", "f", "f", "a")},
    "layers_execute_order": {"layers_execute_order": (0, 1, 0, 1, 2, 3)},
    "weight_tie_layers": {"weight_tie_layers": True},
    "only_attn": {"only_attn": True},
    "unet_skips": {"unet_skips": True, "depth": 4},
    "layerscale": {"use_layerscale": True},
    "softclamp_output": {"softclamp_output": True},
    "dynamic_tanh": {"use_dynamic_tanh": True},
    "simple_rmsnorm": {"use_simple_rmsnorm": True},
    "polar": {"rotary_pos_emb": False, "polar_pos_emb": True},
    "rel_pos_bias": {"rotary_pos_emb": False, "rel_pos_bias": True},
    "dynamic_pos_bias": {"rotary_pos_emb": False, "dynamic_pos_bias": True, "attn_num_mem_kv": 1},
    "hybrid": {
        "attn_hybrid_module": nn.Linear(32, 32),
        "attn_hybrid_fold_axial_dim": 1,
        "attn_hybrid_learned_mix": True,
    },
    "cross_attend": {"cross_attend": True},
    "cross_attend_kwargs": {"cross_attend": True, "cross_attn_dim_context": 24, "cross_attn_num_mem_kv": 2},
    "only_cross": {"cross_attend": True, "only_cross": True},
    "adaptive_layernorm": {"use_adaptive_layernorm": True, "use_adaptive_layerscale": True},
    "adaptive_rmsnorm": {"use_adaptive_rmsnorm": True, "dim_condition": 16, "adaptive_condition_mlp": True},
    "attn_head_learned_sink": {"attn_head_learned_sink": True},
    "attn_head_learned_sink_grouped": {"attn_head_learned_sink": True, "attn_kv_heads": 2},
}
FLOAT32_ONLY = ("dynamic_pos_bias",)
NO_FLASH = ("rel_pos_bias", "dynamic_pos_bias", "attn_head_learned_sink", "attn_head_learned_sink_grouped")

# Scores change before or after the softmax: x-transformers' own Attend on prepared queries and keys.
COMPOSITE_OPTIONS: dict[str, dict[str, Any]] = {
    "attn_pre_talking_heads": {"attn_pre_talking_heads": True},
    "attn_post_talking_heads": {"attn_post_talking_heads": True},
    "attn_pre_scale_post_talking_heads": {"attn_pre_scale_post_talking_heads": True, "attn_pre_talking_heads": True},
    "attn_sparse_topk": {"attn_sparse_topk": 3},
    "attn_sparse_topk_straight_through": {"attn_sparse_topk": 3, "attn_sparse_topk_straight_through": True},
    "attn_hard": {"attn_hard": True},
    "attn_sigmoid": {"attn_sigmoid": True},
    "attn_gumbel_softmax": {"attn_gumbel_softmax": True},
    "attn_cog_signed": {"attn_cog_signed": True},
    "attn_custom_attn_fn": {"attn_custom_attn_fn": partial(F.softmax, dim=-2)},
    "attn_softclamp_logits": {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 0.5},
    "residual_attn": {"residual_attn": True},
    "residual_attn_l2": {"residual_attn": True, "attn_l2_distance": True},
    "cross_residual_attn": {"cross_residual_attn": True, "cross_attend": True},
    "cross_attn_inverted_attention": {"cross_attend": True, "cross_attn_inverted_attention": True},
    "attn_l2_distance_softclamp": {"attn_l2_distance": True, "attn_softclamp_logits": True, "attn_num_mem_kv": 2},
    "attn_head_learned_sink_l2": {"attn_head_learned_sink": True, "attn_l2_distance": True},
    "attn_l2_distance_zero_kv_sink": {
        "attn_l2_distance": True,
        "attn_add_zero_kv": True,
        "attn_head_learned_sink": True,
    },
    "attn_sigmoid_zero_kv_grouped": {"attn_sigmoid": True, "attn_add_zero_kv": True, "attn_kv_heads": 2},
    "attn_talking_heads_mem_kv_alibi": {"attn_pre_talking_heads": True, "attn_num_mem_kv": 2, "alibi_pos_bias": True},
}
CROSS_ONLY = ("cross_residual_attn", "cross_attn_inverted_attention")  # only their cross attention is composite

ALL_OPTIONS = {**FUSED_OPTIONS, **COMPOSITE_OPTIONS}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread only costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def known_to_installed_version(options: dict[str, Any]) -> bool:
    """False only where an older x-transformers does not have one of the options."""
    if Version("2.31.10") <= VERSION:
        return True
    try:
        x_transformers.Encoder(**{**BASE, **options})
    except (TypeError, AssertionError):
        return False
    return not (isinstance(options.get("attn_num_mem_kv"), tuple))


def make_pair(options: dict[str, Any], dtype: torch.dtype = torch.float64, **ours: Any) -> tuple[Any, Any]:
    """x-transformers' encoder and ours with the same weights, none of which is zero or one by initialisation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = x_transformers.Encoder(**options)
        mine = x_rope_cls.Encoder(**options, **ours)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs, mine = theirs.to(dtype), mine.to(dtype)
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine


def make_inputs(encoder: Any, batch: int = 2, tokens: int = 7) -> dict[str, Any]:
    """Arguments of forward: x, a key padding mask, and what the encoder's options need."""
    dtype = next(encoder.parameters()).dtype
    inputs: dict[str, Any] = {"x": torch.randn(batch, tokens, encoder.dim, dtype=dtype)}
    inputs["mask"] = torch.rand(batch, tokens) > 0.3
    if encoder.cross_attend:
        cross = [layer for (_, layer, _), t in zip(encoder.layers, encoder.layer_types, strict=True) if t == "c"]
        context_dim = encoder.dim
        for attention in (m for layer in cross for m in layer.modules() if isinstance(m, Attention)):
            context_dim = (attention.to_latent_kv or attention.to_k).in_features
        inputs["context"] = torch.randn(batch, tokens + 2, context_dim, dtype=dtype)
        inputs["context_mask"] = torch.rand(batch, tokens + 2) > 0.3
    if encoder.need_condition:
        inputs["condition"] = torch.randn(batch, encoder.dim_condition, dtype=dtype)
    return inputs


def run(encoder: Any, inputs: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Output, and gradients of all inputs and parameters, by name; random numbers start from the seed."""
    inputs = {
        name: value.detach().clone().requires_grad_() if _is_real(value) else value for name, value in inputs.items()
    }
    encoder.zero_grad()
    torch.manual_seed(seed)
    out = encoder(**inputs)
    out = out[0] if isinstance(out, tuple) else out
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weights).sum().backward()
    results = {"out": out.detach()}
    results |= {f"d{name}": value.grad for name, value in inputs.items() if _is_real(value) and value.grad is not None}
    results |= {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    return results


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Same names, and each tensor equal relative to the largest number in it, or in all of its kind."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    theirs = {name: t for name, t in theirs.items() if t.numel()}
    largest = max((t.abs().max().item() for name, t in theirs.items() if name != "out"), default=0.0)
    for name, expected in theirs.items():
        got = ours[name]
        assert torch.isfinite(expected).all(), f"{name}: x-transformers itself is not finite"
        scale = max(expected.abs().max().item(), 1e-3 * largest if name != "out" else 1e-3)
        error = (got - expected).abs().max().item() / scale
        assert error <= tolerance, f"{name}: relative error {error:.2e}, tolerance {tolerance:.0e}"
