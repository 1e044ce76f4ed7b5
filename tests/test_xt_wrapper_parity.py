"""TransformerWrapper against x-transformers' own: equal for every pair of options that works there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import x_rope_cls

pytest.importorskip("x_transformers")
import wrapper_cases as cases
import x_transformers
import xt_cases
from wrapper_cases import OPTIONS
from xt_cases import one_thread  # noqa: F401  (used by every test)

# Pairs that x-transformers runs through with a result that cannot be meant; see test_xt_wrapper_fixed.py.
WRONG_THERE = {
    *(frozenset({"start", other}) for other in ("memory", "cls", "two_cls")),  # padding counted from memory and CLS
    *(frozenset({"start", other}) for other in ("prepend", "prepend_mask", "excise", "no_ids")),  # or from these
    *(frozenset({"start", other}) for other in ("average", "pool", "deep_pool", "wide_pool")),  # padding is pooled
    frozenset({"start", "mask"}),  # the mask is dropped
    frozenset({"average", "prepend_mask"}),  # masked embeddings are averaged
    *(frozenset({"excise", other}) for other in ("cls", "two_cls", "average")),  # cuts channels or CLS tokens
    *(frozenset({"no_ids", other}) for other in ("pos", "pos_by_batch")),  # positions of no token: their last rows
}
# What stays an error, with a message that says why.
REFUSED = {
    *(frozenset({a, b}) for a in ("cls", "two_cls") for b in ("average", "pool", "deep_pool", "wide_pool")),
    *(frozenset({"average", b}) for b in ("pool", "deep_pool", "wide_pool")),
    *(frozenset({"two_heads", b}) for b in ("mixture", "tied", "entropies")),
    *(frozenset({"tied", "emb_dim"}),),
    *(frozenset({a, b}) for a in ("only_embed", "embeddings") for b in ("both", "entropies")),
    *(frozenset({"embeddings_intermediates", b}) for b in ("both", "entropies")),
    *(frozenset({"rotary", b}) for b in ("prepend", "prepend_mask", "excise", "mems", "mem_masks")),
    frozenset({"recycling", "looped"}),
}


def _outcome(wrapper: Any, names: tuple[str, ...], **options: Any) -> tuple[Any, Exception | None]:
    try:
        return cases.call(cases.build(wrapper, names, **options), names), None
    except (ValueError, TypeError, AssertionError, RuntimeError, KeyError, AttributeError, UnboundLocalError) as error:
        return None, error


def _refused(names: frozenset[str]) -> bool:
    if names in REFUSED or "interspersed" in names:
        return True
    if "next" in names and "next_head" not in names:
        return True
    # Arguments for six tokens, but none are given.
    sized = {"mask", "sum", "pos", "pos_by_batch", "pos_embedding", "attn_mask", "attn_bias", "kv_mask", "in_attn_cond"}
    return "no_ids" in names and bool(sized & names)


@pytest.mark.parametrize("first", ["none", *cases.NAMES])
def test_pairs(first: str) -> None:
    start = cases.NAMES.index(first) if first != "none" else 0
    compared = 0
    for second in cases.NAMES[start:]:
        names = tuple(name for name in cases.NAMES if name in (first, second))
        if not all(map(cases.known_to_installed_version, names)):
            continue
        theirs, their_error = _outcome(x_transformers.TransformerWrapper, names)
        ours, our_error = _outcome(x_rope_cls.TransformerWrapper, names, cls_rope="rotate")
        if their_error is None and frozenset(names) not in WRONG_THERE:
            assert our_error is None, (names, our_error)
            cases.assert_same(ours, theirs, names)
            compared += 1
        elif _refused(frozenset(names)):
            assert isinstance(our_error, (ValueError, TypeError)), (names, our_error)
        else:
            assert our_error is None, (names, our_error)
    assert compared or first in ("interspersed", "next") or not cases.known_to_installed_version(first)


ENCODERS: dict[str, dict[str, Any]] = {
    "flash": {"attn_flash": True},
    "no_rotary": {"rotary_pos_emb": False, "disable_abs_pos_emb": False},
    "alibi": {"alibi_pos_bias": True},
    "mem_kv": {"attn_num_mem_kv": 2, "attn_qk_norm": True},
    "residual_attn": {"residual_attn": True},
    "streams": {"num_residual_streams": 2},
}


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(
    "names",
    [
        ("memory", "two_cls", "mask", "intermediates"),
        ("memory", "cls", "prepend_mask", "mask", "embeddings"),
        ("memory", "average", "mask"),
        ("memory", "deep_pool", "both"),
        ("memory", "tied", "emb_norm", "sum", "intermediates"),
        ("memory", "recycling", "cls", "mask"),
        ("pos", "mask", "deep_pool"),
        ("cls", "two_heads", "mask", "both"),
    ],
)
def test_encoders(encoder: str, names: tuple[str, ...]) -> None:
    options = ENCODERS[encoder]
    theirs = cases.build(x_transformers.TransformerWrapper, names, options)
    ours = cases.build(x_rope_cls.TransformerWrapper, names, options, cls_rope="rotate")
    cases.assert_same(cases.call(ours, names), cases.call(theirs, names))


@pytest.mark.parametrize(
    "names", [("memory", "two_cls", "mask"), ("deep_pool", "types", "mask"), ("memory", "average")]
)
def test_gradients(names: tuple[str, ...]) -> None:
    """Of all parameters, with those of one and of the other loaded into both."""
    theirs = cases.build(x_transformers.TransformerWrapper, names)
    ours = cases.build(x_rope_cls.TransformerWrapper, names, cls_rope="rotate")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.1)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    gradients = []
    for model in (theirs, ours):
        out = cases.call(model, names, return_intermediates=True)
        sum(t.square().sum() for t in cases.tensors(out) if t.requires_grad).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for grad in gradients[1].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "interspersed"])
def test_state_dict(name: str) -> None:
    if not cases.known_to_installed_version(name):
        pytest.skip(f"x-transformers {xt_cases.VERSION} does not have this option")
    theirs = cases.build(x_transformers.TransformerWrapper, (name,))
    ours = cases.build(x_rope_cls.TransformerWrapper, (name,))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_initial_weights() -> None:
    """The same seed gives the same model."""
    models = []
    for package in (x_transformers, x_rope_cls):
        torch.manual_seed(5)
        encoder = package.Encoder(**xt_cases.BASE)
        options = {"num_memory_tokens": 2, "use_cls_token": True}
        models.append(package.TransformerWrapper(num_tokens=20, max_seq_len=8, attn_layers=encoder, **options))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
