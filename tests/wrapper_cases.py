"""Options and arguments of x_transformers.TransformerWrapper that the wrappers' tests go through in pairs."""

from __future__ import annotations

import copy
import inspect
import random
from typing import Any

import torch
import x_transformers
from torch import Tensor, nn
from xt_emulation import exact_softmax

BATCH, TOKENS, DIM, VOCABULARY = 2, 6, 32, 20

OPTIONS: dict[str, dict[str, Any]] = {
    "memory": {"num_memory_tokens": 3},
    "cls": {"use_cls_token": True},
    "two_cls": {"use_cls_token": True, "num_cls_tokens": 2},
    "average": {"average_pool_embed": True},
    "pool": {"attn_pool": True},
    "deep_pool": {"attn_pool": True, "num_pooled_tokens": 3, "attn_pool_depth": 2},
    "wide_pool": {"attn_pool": True, "dim_pooled_tokens": 48},
    "two_heads": {"num_output_heads": 2},
    "mixture": {"mixture_of_softmax": True},
    "sigsoftmax": {"sigsoftmax_logits": True},
    "squeeze": {"squeeze_out_last_dim": True, "logits_dim": 1},
    "tied": {"tie_embedding": True},
    "only_embed": {"return_only_embed": True},
    "emb_dim": {"emb_dim": 24},
    "emb_norm": {"post_emb_norm": True},
    "l2norm": {"l2norm_embed": True},
    "sinusoidal": {"scaled_sinu_pos_emb": True},
    "deep_embed": {"ff_deep_embed": True},
    "recycling": {"recycling": True},
    "looped": {"looped": True},
    "frac_gradient": {"emb_frac_gradient": 0.1},
    "shift_mems": {"shift_mem_down": 1, "max_mem_len": 4},
    "max_mems": {"max_mem_len": 4},
    "no_abs": {"use_abs_pos_emb": False},
    "types": {"embed_num_tokens": {"segment": 3}},
    "next_head": {"add_continuous_pred_head": True},
    "to_logits": {"to_logits": nn.Linear(DIM, 5)},
    "interspersed": {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 2},
}


def _calls(emb_dim: int) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]]).bool()
    embeds, mems = normal(BATCH, 2, emb_dim), [normal(BATCH, 4, DIM), normal(BATCH, 4, DIM)]
    mem_mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    return {
        "mask": {"mask": mask},
        "pos": {"pos": torch.tensor([2, 3, 5, 7, 8, 9])},
        "pos_by_batch": {"pos": torch.tensor([[2, 3, 5, 7, 8, 9], [0, 1, 2, 3, 4, 5]])},
        "pos_embedding": {"pos": normal(BATCH, TOKENS, emb_dim)},
        "start": {"seq_start_pos": torch.tensor([0, 2])},
        "prepend": {"prepend_embeds": embeds},
        "prepend_mask": {"prepend_embeds": embeds, "prepend_mask": torch.tensor([[1, 0], [1, 1]]).bool()},
        "excise": {"prepend_embeds": embeds, "excise_prepend_embeds": True},
        "no_ids": {"prepend_embeds": embeds, "x": None},
        "embeddings": {"return_embeddings": True},
        "both": {"return_logits_and_embeddings": True},
        "intermediates": {"return_intermediates": True},
        "embeddings_intermediates": {"return_embeddings_and_intermediates": True},
        "entropies": {"return_logit_entropies": True},
        "z_loss": {"return_attn_z_loss": True},
        "return_mems": {"return_mems": True},
        "attn": {"return_attn": True},
        "mems": {"mems": mems},
        "mem_masks": {"mems": mems, "mem_masks": [torch.ones(BATCH, 4).bool(), mem_mask]},
        "sum": {"sum_embeds": normal(BATCH, TOKENS, emb_dim)},
        "next": {"return_next_embed_pred": True},
        "attn_mask": {"attn_mask": torch.ones(TOKENS, TOKENS).bool().tril()},
        "attn_bias": {"attn_bias": normal(4, TOKENS, TOKENS)},
        "kv_mask": {"self_attn_kv_mask": mask},
        "in_attn_cond": {"in_attn_cond": normal(BATCH, TOKENS, DIM)},
        "rotary": {"rotary_pos_emb": (normal(1, TOKENS, 2).repeat_interleave(2, -1), 1.0)},
        "transform": {"transform_token_embeds": lambda t: t * 2},
        "transform_blocks": {"transform_block_inputs": lambda block, t: t * block},
    }


NAMES = (*OPTIONS, *_calls(DIM))

# What newer x-transformers than the oldest supported one have.
_NEWER = {
    "looped": "looped",
    "excise": "excise_prepend_embeds",
    "transform": "transform_token_embeds",
    "transform_blocks": "transform_block_inputs",
}


def known_to_installed_version(name: str) -> bool:
    wrapper = x_transformers.TransformerWrapper
    parameters = {*inspect.signature(wrapper).parameters, *inspect.signature(wrapper.forward).parameters}
    return name not in _NEWER or _NEWER[name] in parameters


def build(wrapper: Any, names: tuple[str, ...] = (), encoder: dict[str, Any] | None = None, **more: Any) -> Any:
    """A wrapper with these options, in float64, whose weights depend on nothing but their shapes and order."""
    options: dict[str, Any] = {}
    for name in names:
        options.update(copy.deepcopy(OPTIONS.get(name, {})))
    base = {"heads": 4, "attn_dim_head": 8, "ff_mult": 2, "rotary_pos_emb": True, "disable_abs_pos_emb": False}
    if options.get("looped"):
        base["pre_and_post_norm"] = True
    layers = x_transformers.Encoder(dim=DIM, depth=2, verbose=False, **{**base, **(encoder or {})})
    torch.manual_seed(0)
    model = wrapper(num_tokens=VOCABULARY, max_seq_len=16, attn_layers=layers, **options, **more)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(i)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1))
    exact_softmax(model)
    return model.double().eval()


def call(model: Any, names: tuple[str, ...] = (), **more: Any) -> Any:
    """The wrapper's result for fixed tokens and these arguments."""
    kwargs: dict[str, Any] = {}
    for name in names:
        kwargs.update(_calls(model.emb_dim).get(name, {}))
    kwargs.update(more)
    torch.manual_seed(1)
    random.seed(1)
    x, segment = torch.randint(0, VOCABULARY, (BATCH, TOKENS)), torch.randint(0, 3, (BATCH, TOKENS))
    if "x" in kwargs:
        x, segment = kwargs.pop("x"), segment[:, :0]
    if model.embeds is not None:
        kwargs["embed_ids"] = {"segment": segment}
    if model.recycling:
        kwargs["recycle_steps"] = 2
    if getattr(model, "looped", False):
        kwargs["looped_steps"] = 2
    return model(x, **kwargs)


_FIELDS = (
    *("last_hidden", "hiddens", "layer_hiddens", "attn_intermediates", "attn_z_loss", "mems", "last_layer_hiddens"),
    *("initial_embeds", "initial_embed", "attn_pooled_tokens", "memory_tokens", "logit_entropies", "logits"),
    *("exit_logits", "all_pred_logits", "post_softmax_attn", "cached_kv", "block_hiddens"),
)


def tensors(result: Any) -> list[Tensor]:
    """All tensors in what a wrapper returned, in a fixed order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [t for each in result for t in tensors(each)]
    if result is None or isinstance(result, (bool, int, float, str)):
        return []
    return [t for name in _FIELDS for t in tensors(getattr(result, name, None))]


def assert_same(ours: Any, theirs: Any, what: Any = "") -> None:
    mine, expected = tensors(ours), tensors(theirs)
    assert len(mine) == len(expected), what
    assert expected, what
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}")
