"""AttentionPool with the weights of x_transformers.AttentionPool: the same outputs and gradients."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import x_rope_cls

pytest.importorskip("x_transformers")
import x_transformers
from x_transformers.x_transformers import Attention
from xt_cases import VERSION, one_thread  # noqa: F401  (used by every test)

from x_rope_cls.pooling import pool_attention
from x_rope_cls.xt import few
from x_rope_cls.xt.absorbed import absorbed_reasons, bare_weights, is_plain, option_reasons

DIM = 24
BASE: dict[str, Any] = {"dim": DIM, "heads": 3, "dim_head": 8}

# Options of AttentionPool that run absorbed.
PLAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "several_queries": {"num_pooled_tokens": 3},
    "context": {"dim_context": 13},
    "residual": {"add_residual": True},
    "squeeze": {"squeeze_output": True},
    "one_head": {"heads": 1, "dim_head": DIM},
    "flash": {"attn_kwargs": {"flash": True}},
    "grouped": {"heads": 6, "attn_kwargs": {"kv_heads": 2}},
    "one_kv_head": {"num_pooled_tokens": 2, "attn_kwargs": {"one_kv_head": True}},
    "value_dim": {"attn_kwargs": {"value_dim_head": 5}},
    "dim_out": {"attn_kwargs": {"dim_out": 10}},
    "on_attn": {"attn_kwargs": {"on_attn": True}},
}
# Options for which keys and values are formed, or that need x-transformers' code behind the softmax.
OTHER: dict[str, dict[str, Any]] = {
    "mem_kv": {"attn_kwargs": {"num_mem_kv": 2}},
    "qk_norm": {"attn_kwargs": {"qk_norm": True}},
    "qk_rmsnorm": {"attn_kwargs": {"qk_rmsnorm": True}},
    "value_rmsnorm": {"attn_kwargs": {"value_rmsnorm": True}},
    "laser": {"attn_kwargs": {"laser": True}},
    "add_zero_kv": {"attn_kwargs": {"add_zero_kv": True}},
    "sink": {"attn_kwargs": {"head_learned_sink": True}},
    "head_scale": {"attn_kwargs": {"head_scale": True}},
    "gates": {"attn_kwargs": {"gate_values": True, "gate_value_heads": True, "swiglu_values": True}},
    "output_gate": {"attn_kwargs": {"output_gate": True}},
    "latents": {"attn_kwargs": {"use_latent_q": True, "dim_latent_q": 12, "use_latent_kv": True, "dim_latent_kv": 12}},
    "l2_distance": {"attn_kwargs": {"l2_distance": True}},
    "talking_heads": {"attn_kwargs": {"pre_talking_heads": True, "post_talking_heads": True}},
    "topk": {"attn_kwargs": {"sparse_topk": 3}},
    "sigmoid": {"attn_kwargs": {"sigmoid": True}},
    "softclamp": {"attn_kwargs": {"softclamp_logits": True}},
    "queries_too_many": {"num_pooled_tokens": 9},
}
BLOCKS: dict[str, dict[str, Any]] = {
    "depth": {"depth": 2},
    "blocks": {"depth": 1, "use_transformer_blocks": True},
    "context": {"depth": 2, "dim_context": 13, "num_pooled_tokens": 2},
    "squeeze": {"depth": 3, "squeeze_output": True},
}


def known(options: dict[str, Any]) -> bool:
    """Whether the installed x-transformers has all of these options."""
    return set(options.get("attn_kwargs", {})) <= set(inspect.signature(Attention).parameters)


def make_pair(options: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    if not known(options):
        pytest.skip(f"x-transformers {VERSION} does not have this option")
    torch.manual_seed(1)
    theirs = x_transformers.AttentionPool(**{**BASE, **options})
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ours = x_rope_cls.AttentionPool(**{**BASE, **options})
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs.to(dtype).eval(), ours.to(dtype).eval()


def run(module: nn.Module, context: Tensor, *args: Any, **kwargs: Any) -> dict[Any, Tensor]:
    """Result and gradients by name."""
    context = context.detach().requires_grad_()
    out = module(context, *args, **kwargs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    leaves = {"context": context, **dict(module.named_parameters())}
    grads = torch.autograd.grad((out * weight).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_same(ours: dict[Any, Tensor], theirs: dict[Any, Tensor], tolerance: float = 2e-5) -> None:
    """Without attn_flash x-transformers computes the softmax in float32, whatever the dtype."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            ours[name], expected, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def make_inputs(options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    context = torch.randn(4, 11, options.get("dim_context", DIM)).double()
    mask = torch.rand(4, 11) < 0.7
    mask[:, 0] = True
    return context, mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [*PLAIN, *OTHER])
def test_equals_x_transformers(isa, name, masked):
    options = {**PLAIN, **OTHER}[name]
    theirs, ours = make_pair(options)
    context, mask = make_inputs(options)
    args = (mask,) if masked else ()
    assert_same(run(ours, context, *args), run(theirs, context, *args))
    plain = is_plain(ours.pooler) and not absorbed_reasons(ours.pooler, max(options.get("num_pooled_tokens", 1), 1))
    assert plain == (name in PLAIN)
    bare = bare_weights(ours.pooler)
    assert bare is None or name in PLAIN or name == "queries_too_many"
    if name == "plain":
        names = ("to_k", "to_v", "to_q", "to_out")
        assert [id(w) for w in bare] == [id(getattr(ours.pooler, n).weight) for n in names]


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        *(("", name, True) for name in ("qk_norm", "laser", "use_latent_kv", "head_scale")),
        *(("", name, value) for name in ("max_attend_past",) for value in (0, 3)),
        *(("", name, nn.Identity()) for name in ("to_v_gate", "k_rmsnorm", "value_rmsnorm", "rel_proj_pos_bias")),
        ("", "num_mem_kv", 2),
        *(("attend", name, True) for name in ("l2_distance", "add_zero_kv", "head_learned_sink")),
        ("attend", "composite_reasons", ("another softmax",)),
    ],
)
def test_options_set_later_are_seen(owner, name, value):
    """By the quick look and by the thorough one."""
    _, ours = make_pair({})
    attention = ours.pooler
    assert bare_weights(attention) is not None
    setattr(attention.get_submodule(owner), name, value)
    assert bare_weights(attention) is None
    assert not is_plain(attention) or option_reasons(attention)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_equal_x_transformers(name, masked):
    theirs, ours = make_pair(BLOCKS[name])
    context, mask = make_inputs(BLOCKS[name])
    args = (mask,) if masked else ()
    assert_same(run(ours, context, *args), run(theirs, context, *args))


@pytest.mark.parametrize(
    "options", [{}, {"add_residual": True}, {"attn_kwargs": {"num_mem_kv": 2}}, {"depth": 2}], ids=str
)
def test_passed_queries(options):
    theirs, ours = make_pair(options)
    if "queries" not in inspect.signature(theirs.forward).parameters:
        pytest.skip(f"x-transformers {VERSION} takes no queries")
    context, mask = make_inputs(options)
    queries = torch.randn(4, 2, DIM).double()
    assert_same(run(ours, context, mask, queries=queries), run(theirs, context, mask, queries=queries))


def test_no_learned_queries():
    pool = x_rope_cls.AttentionPool(DIM, num_pooled_tokens=0, heads=3, dim_head=8)
    assert "queries" not in pool.state_dict()
    assert pool(torch.randn(2, 5, DIM), queries=torch.randn(2, 4, DIM)).shape == (2, 4, DIM)
    with pytest.raises(ValueError, match="queries must be given with num_pooled_tokens=0, got None"):
        pool(torch.randn(2, 5, DIM))


@pytest.mark.parametrize(
    "options", [{}, {"num_pooled_tokens": 9}, {"attn_kwargs": {"head_scale": True}}, {"depth": 2}], ids=str
)
def test_rows_without_tokens(options):
    """x-transformers gives the mean of masked tokens, or NaN with flash. Here the attention gives 0."""
    _, ours = make_pair(options, torch.float32)
    context, mask = make_inputs(options)
    context, context[1] = context.float(), torch.nan
    mask[1] = False
    results = run(ours, context, mask)
    assert all(t.isfinite().all() for t in results.values())
    assert results["context"][1].abs().max() == 0
    if "depth" not in options:
        assert results["out"][1].abs().max() == 0
    alone = run(ours, context[:1], mask[:1])
    torch.testing.assert_close(results["out"][:1], alone["out"])
    empty = ours(context[:, :0])
    assert empty.isfinite().all()


def test_blocks_run_absorbed(monkeypatch):
    """Keys and values of the tokens are not formed at any depth."""
    calls = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["form"])
        return pool_attention(*args, **kwargs)

    monkeypatch.setattr(few, "pool_attention", spy)
    _, ours = make_pair({"depth": 3})
    context, mask = make_inputs({})
    ours(context, mask)
    assert calls == ["absorbed"] * 3


def test_attention_options_reach_the_blocks():
    """x_transformers.AttentionPool drops them."""
    options = {"num_mem_kv": 2, "kv_heads": 1, "flash": True}
    pool = x_rope_cls.AttentionPool(**BASE, depth=2, dim_context=13, attn_kwargs=options)
    found = [m for m in pool.modules() if isinstance(m, Attention)]
    assert [(a.num_mem_kv, a.kv_heads, a.attend.flash, a.to_k.in_features) for a in found] == [(2, 1, True, 13)] * 2
    per_block = x_rope_cls.AttentionPool(**BASE, depth=2, attn_kwargs={"gate_value_heads": (True, False)})
    gates = [m.to_v_head_gate is not None for m in per_block.modules() if isinstance(m, Attention)]
    assert gates == ([True, False] if "gate_values_rank" in inspect.signature(Attention).parameters else [True, True])


def test_blocks_with_options_equal_a_cross_attender():
    pool = x_rope_cls.AttentionPool(**BASE, depth=2, attn_kwargs={"num_mem_kv": 2, "head_scale": True}).double().eval()
    cross = x_transformers.CrossAttender(
        dim=DIM, depth=2, heads=3, attn_dim_head=8, cross_attn_num_mem_kv=2, cross_attn_head_scale=True
    )
    cross.double().eval().load_state_dict(pool.pooler.state_dict())
    context, mask = make_inputs({})
    expected = cross(pool.queries.expand(4, -1, -1), context, context_mask=mask)
    torch.testing.assert_close(pool(context, mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_pooled_tokens": 3},
        {"heads": 6, "attn_kwargs": {"kv_heads": 2}},
        {"attn_kwargs": {"num_mem_kv": 2}},
        {"depth": 2},
    ],
    ids=str,
)
def test_attention_map(flash, options):
    """The map is the one that x-transformers keeps of its last attention; rows of masked sequences are 0."""
    options = {**options, "attn_kwargs": {**options.get("attn_kwargs", {}), "flash": flash}}
    _, ours = make_pair(options)
    context, mask = make_inputs({})
    mask[1] = False
    out, weights = ours(context, mask, need_weights=True)
    torch.testing.assert_close(out, ours(context, mask))
    theirs = copy.deepcopy(ours.pooler)
    for attention in (m for m in theirs.modules() if isinstance(m, Attention)):
        attention.__class__, attention.attend.__class__ = Attention, x_transformers.attend.Attend
        attention.attend.flash = False
    returns = {"return_hiddens": True} if "depth" in options else {"return_intermediates": True}
    _, found = theirs(ours.queries.expand(4, -1, -1), context, context_mask=mask, **returns)
    expected = (found.attn_intermediates[-1] if "depth" in options else found).post_softmax_attn
    rows = torch.tensor([0, 2, 3])
    torch.testing.assert_close(weights[rows], expected[rows], rtol=1e-5, atol=1e-5)
    memory = options["attn_kwargs"].get("num_mem_kv", 0)
    assert weights[1, ..., memory:].abs().max() == 0


def test_further_arguments_go_to_the_pooler():
    _, ours = make_pair({"add_residual": True, "squeeze_output": True})
    context, mask = make_inputs({})
    pairs = torch.rand(4, 1, 1, 11) < 0.7
    pairs[..., 0] = True
    torch.testing.assert_close(ours(context, attn_mask=pairs), ours(context, pairs[:, 0, 0]))
    pooled, intermediates = ours(context, mask, return_intermediates=True)
    torch.testing.assert_close(pooled, ours(context, mask))
    assert intermediates.post_softmax_attn.shape == (4, 3, 1, 11)
    pooled, _, weights = ours(context, mask, return_intermediates=True, need_weights=True)
    torch.testing.assert_close(weights, ours(context, mask, need_weights=True)[1])


def test_dropout_in_training():
    """It drops attention weights, reproducibly, and not in evaluation."""
    options = {"attn_kwargs": {"dropout": 0.5}}
    theirs, ours = make_pair(options)
    context, mask = make_inputs({})
    assert_same(run(ours, context, mask), run(theirs, context, mask))
    assert absorbed_reasons(ours.train().pooler) == ("attention dropout in training",)
    assert option_reasons(ours.pooler) == ()
    torch.manual_seed(5)
    first, second = ours(context), ours(context)
    torch.manual_seed(5)
    assert torch.equal(ours(context), first)
    assert not torch.allclose(first, second)
    mean = torch.stack([ours(context) for _ in range(2000)]).mean(0)
    assert (mean - ours.eval()(context)).abs().max() < 0.15


def test_hooks_of_the_pooler_run():
    _, ours = make_pair({})
    context, _ = make_inputs({})
    expected, seen = ours(context), []
    ours.pooler.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(ours(context), expected)
    assert seen == [1]


@pytest.mark.parametrize(
    ("options", "form", "reason"),
    [
        ({}, "absorbed", ""),
        ({"depth": 2, "num_pooled_tokens": 4}, "absorbed", ""),
        ({"attn_kwargs": {"num_mem_kv": 2, "gate_values": True}}, "absorbed", ""),
        ({"attn_kwargs": {"qk_norm": True}}, "ordinary", "keys are normalised after their projection"),
        ({"num_pooled_tokens": 9}, "ordinary", "9 queries are too many for 3 heads"),
        ({"depth": 2, "attn_kwargs": {"dropout": 0.1}}, "ordinary", "attention dropout in training"),
        ({"attn_kwargs": {"sigmoid": True}}, "composite", "attn_sigmoid replaces the softmax"),
    ],
)
def test_explain(options, form, reason):
    pool = x_rope_cls.AttentionPool(**{**BASE, **options})
    report = x_rope_cls.explain(nn.Sequential(pool))
    assert len(report) == options.get("depth", 1)
    for row in report:
        assert (row.kind, row.form, row.fused) == ("pool", form, form != "composite")
        assert row.reason.startswith(reason)
        assert bool(row.reason) == bool(reason)
    assert form in str(report)
    if reason == "attention dropout in training":
        assert {row.form for row in x_rope_cls.explain(pool.eval())} == {"absorbed"}


def test_replaced_projection_is_called():
    """A module in the place of to_k (an adapter, a quantised layer) is not looked into."""
    _, ours = make_pair({})
    context, _ = make_inputs({})
    ours.pooler.to_k = nn.Sequential(ours.pooler.to_k, nn.Tanh())
    assert option_reasons(ours.pooler) == ("to_k is a Sequential, not a Linear",)
    theirs, _ = make_pair({})
    theirs.pooler.to_k = nn.Sequential(theirs.pooler.to_k, nn.Tanh())
    torch.testing.assert_close(ours(context), theirs(context), rtol=1e-5, atol=1e-5)


class _Shift(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return 3 * t + 1


@pytest.mark.parametrize("name", ["to_q", "to_k", "to_v", "to_out"])
def test_projections_with_a_forward_of_their_own(name):
    """As offloading puts it there."""
    pair = make_pair({})
    context, _ = make_inputs({})
    for pool in pair:
        layer = getattr(pool.pooler, name)
        layer.forward = lambda x, forward=layer.forward: 3 * forward(x)
    theirs, ours = pair
    torch.testing.assert_close(ours(context), theirs(context), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changed", ["bias", "parametrized bias", "parametrized weight"])
@pytest.mark.parametrize("name", ["to_q", "to_k", "to_v", "to_out"])
def test_projections_that_are_more_than_a_weight(name, changed):
    """x-transformers makes none with a bias, but a model may have put one there."""
    pair = make_pair({})
    context, _ = make_inputs({})
    layer = nn.Linear(DIM, DIM).to(context.dtype)
    for pool in pair:
        setattr(pool.pooler, name, copy.deepcopy(layer))
        if changed != "bias":
            register_parametrization(getattr(pool.pooler, name), changed.split()[1], _Shift())
    theirs, ours = pair
    torch.testing.assert_close(ours(context), theirs(context), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"num_pooled_tokens": -1}, "num_pooled_tokens must be at least 0, got -1"),
        ({"depth": 2, "use_transformer_blocks": False}, "depth must be 1 without use_transformer_blocks, got 2"),
        ({"depth": 2, "add_residual": True}, "add_residual must be False with transformer blocks, got True"),
        ({"num_pooled_tokens": 2, "squeeze_output": True}, "num_pooled_tokens must be at most 1 to squeeze, got 2"),
        (
            {"add_residual": True, "attn_kwargs": {"dim_out": 9}},
            r"dim_out must be 24 \(dim\) to add the residual, got 9",
        ),
    ],
)
def test_constructor_errors(options, message):
    with pytest.raises(ValueError, match=f"AttentionPool: {message}"):
        x_rope_cls.AttentionPool(**{**BASE, **options})


def test_forward_errors():
    pool = x_rope_cls.AttentionPool(**BASE, dim_context=13, squeeze_output=True)
    with pytest.raises(ValueError, match=r"context must be \(batch, tokens, 13\), got \(2, 5, 24\)"):
        pool(torch.randn(2, 5, DIM))
    with pytest.raises(ValueError, match=r"queries must be \(2, 1, 24\), got \(2, 3, 24\)"):
        pool(torch.randn(2, 5, 13), queries=torch.randn(2, 3, DIM))
    with pytest.raises(ValueError, match=r"mask must be bool \(2, 5\), got torch.bool \(2, 4\)"):
        pool(torch.randn(2, 5, 13), torch.ones(2, 4, dtype=torch.bool))
