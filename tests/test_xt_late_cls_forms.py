"""What late CLS computes, in which form, and what an encoder with it returns: maps, hidden states, dropped layers."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

import x_rope_cls

pytest.importorskip("x_transformers")
import x_transformers
import xt_cases as cases
from xt_cases import one_thread  # noqa: F401  (used by every test)
from xt_emulation import exact_softmax

from x_rope_cls.xt import attention, class_step, devices, few

MODES = ("class_attention", "join")
NEW = cases.Version("2.31.10") <= cases.VERSION
OPTIONS: dict[str, Any] = {**cases.BASE, "depth": 3, "attn_flash": True}


def _encoder(mode: str | None, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    encoder = x_rope_cls.Encoder(**{**OPTIONS, "late_cls": mode, **more})
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return encoder.to(dtype)


def _x(batch: int = 2, tokens: int = 7, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, tokens, 32, dtype=dtype)


# ---- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "attn_kv_heads", "use_rmsnorm", "use_scalenorm", "attn_num_mem_kv"])
def test_class_attention_by_hand(name: str) -> None:
    """CaiT: queries are CLS, keys and values CLS and tokens, through x-transformers' own cross attention."""
    torch.manual_seed(1)
    options = {**cases.BASE, "depth": 3, **cases.ALL_OPTIONS[name], "attn_flash": True}
    theirs, _ = cases.make_pair(options)
    ours = x_rope_cls.Encoder(**options, cls_rope="rotate", late_cls="class_attention", num_cls_tokens=2).double()
    assert ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys == ["late_cls_tokens"]
    x, mask = _x(), torch.rand(2, 7) > 0.3
    shallow, _ = cases.make_pair({**options, "depth": 1})
    shallow.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in shallow.state_dict()})
    shallow.final_norm = torch.nn.Identity()
    tokens = shallow(x, mask=mask)
    cls = ours.late_cls_tokens.expand(2, -1, -1)
    mask = torch.nn.functional.pad(mask, (2, 0), value=True)
    for self_attention, feed_forward in (theirs.layers[2:4], theirs.layers[4:6]):
        (norm, *_), attend, _ = self_attention
        cls = cls + attend(norm(cls), context=norm(torch.cat((cls, tokens), dim=1)), context_mask=mask)
        (norm, *_), block, _ = feed_forward
        cls = cls + block(norm(cls))
    expected = theirs.final_norm(torch.cat((cls, tokens), dim=1))
    torch.testing.assert_close(ours(x, mask=mask[:, 2:]), expected)


def test_tokens_of_class_attention_are_those_of_a_shallower_encoder() -> None:
    for at, depth in ((0, 0), (1, 1), (-1, 2)):
        ours = _encoder("class_attention", late_cls_at=at, num_cls_tokens=3)
        x = _x()
        tokens = x
        if depth:
            shallow = _encoder(None, depth=depth)
            shallow.load_state_dict({k: v for k, v in ours.state_dict().items() if k in shallow.state_dict()})
            tokens = shallow(x)
        else:
            tokens = ours.final_norm(x)
        torch.testing.assert_close(ours(x)[:, 3:], tokens)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"attn_num_mem_kv": 2}, {"attn_qk_norm": True}, {"residual_attn": True}])
def test_cls_sees_no_positions(mode: str, options: dict[str, Any]) -> None:
    """Reordering (token, position) pairs or shifting all positions changes nothing for CLS."""
    ours = _encoder(mode, num_cls_tokens=2, **options, attn_flash=False)
    exact_softmax(ours)
    x, pos = _x(tokens=9), torch.arange(9)
    order = torch.randperm(9)
    out = ours(x, pos=pos)
    shuffled = ours(x[:, order], pos=pos[order])
    torch.testing.assert_close(shuffled[:, :2], out[:, :2])
    torch.testing.assert_close(shuffled[:, 2:], out[:, 2:][:, order])
    torch.testing.assert_close(ours(x, pos=pos + 5), out)
    assert not torch.allclose(ours(x, pos=pos[order])[:, :2], out[:, :2])  # tokens see each other's positions


def test_axial_positions_passed_by_the_caller() -> None:
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(3)).double()
    rotary = x_rope_cls.AxialRotaryEmbedding(8).double()
    for mode in MODES:
        ours = _encoder(mode, rotary_pos_emb=False)
        x = _x(tokens=9)
        out = ours(x, rotary_pos_emb=rotary(grid))
        torch.testing.assert_close(ours(x, rotary_pos_emb=rotary(grid + 3)), out)
        assert not torch.allclose(ours(x), out)


@pytest.mark.parametrize("mode", MODES)
def test_masked_tokens_do_not_matter(mode: str) -> None:
    ours = _encoder(mode)
    x, mask = _x(), torch.rand(2, 7) > 0.4
    mask[1] = False
    out = ours(x, mask=mask)
    other = torch.where(mask[..., None], x, 100.0)
    torch.testing.assert_close(ours(other, mask=mask)[:, 0], out[:, 0])
    assert torch.isfinite(out).all()


# ---- forms ---------------------------------------------------------------------------------------

ABSORBED = [
    "plain",
    "no_rotary",
    "one_head",
    "ff_glu",
    "use_rmsnorm",
    "use_scalenorm",
    "simple_rmsnorm",
    "dynamic_tanh",
    "attn_value_dim_head",
    "attn_kv_heads",
    "attn_one_kv_head",
    "attn_num_mem_kv",
    "attn_num_mem_kv_grouped",
    "attn_add_zero_kv",
    "alibi",
    "data_dependent_alibi",
    "rel_proj_pos_bias",
    "attn_max_attend_past",
    "rotate_num_heads",
    "attn_head_scale",
    "attn_on_attn",
    "attn_gates",
    "attn_output_gate",
    "attn_orthog_projected_values",
    "residual_streams",
    "gate_residual",
    "reinject_input",
    "shift_tokens",
    "macaron",
    "post_norm",
    "unet_skips",
    "layerscale",
    "hybrid",
    "adaptive_layernorm",
    "attn_head_learned_sink",
    "attn_head_learned_sink_grouped",
]
ORDINARY = ["attn_qk_norm", "attn_qk_rmsnorm", "attn_value_rmsnorm", "attn_laser", "latent_q_kv", "attn_l2_distance"]
ORDINARY += ["value_residual", "polar", "residual_streams_qkv", "integrate_layers"]


def _option(name: str, mode: str) -> Any:
    options = {**cases.BASE, "depth": 3, **cases.ALL_OPTIONS[name]}
    if not cases.known_to_installed_version(options):
        pytest.skip(f"x-transformers {cases.VERSION} does not have this option")
    return _encoder(mode, **options, attn_flash=False, num_cls_tokens=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ABSORBED)
def test_absorbed_equals_ordinary(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms give the same outputs, gradients, maps and intermediates."""
    ours = _option(name, mode)
    inputs = cases.make_inputs(ours)
    assert {row.form for row in x_rope_cls.explain(ours) if row.kind == "class"} == {"absorbed"}
    pooled: list[int] = []
    real = few.pool_attention
    monkeypatch.setattr(few, "pool_attention", lambda *a, **k: (pooled.append(1), real(*a, **k))[1])
    got = cases.run(ours, inputs)
    assert len(pooled) == (2 if mode == "class_attention" else 1)
    _, hidden, maps = ours(**inputs, return_hiddens=True, need_weights=True)
    lazy = [each.post_softmax_attn for each in hidden.attn_intermediates[-2:]]
    monkeypatch.setattr(class_step, "step_reasons", lambda *_: ("for the test",))
    monkeypatch.setattr(few, "pool_attention", None)
    expected = cases.run(ours, inputs)
    cases.assert_same(got, expected, 1e-9)
    _, hidden, ordinary = ours(**inputs, return_hiddens=True, need_weights=True)
    tokens = inputs["x"].shape[1]
    for made, one, other, each in zip(lazy, maps, ordinary, hidden.attn_intermediates[-2:], strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(made, each.post_softmax_attn, equal_nan=True)  # of float64 rows without keys
        torch.testing.assert_close(one, each.post_softmax_attn[..., :2, -2 - tokens :])


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_form_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = _option(name, "class_attention")
    rows = [row for row in x_rope_cls.explain(ours) if row.kind == "class"]
    assert [row.form for row in rows] == ["ordinary"] * 2
    assert all(row.fused and row.reason for row in rows)
    monkeypatch.setattr(few, "pool_attention", None)
    ours(**cases.make_inputs(ours))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", ["plain", "attn_kv_heads", "attn_num_mem_kv", "alibi", "attn_max_attend_past", "cross_attend", "unet_skips"]
)
def test_without_operators(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no kernel for the device, x-transformers' own code computes the same."""
    ours = _option(name, mode)
    exact_softmax(ours)
    inputs = cases.make_inputs(ours)
    expected = cases.run(ours, inputs)
    monkeypatch.setattr(devices, "FUSED_DEVICE_TYPES", frozenset())
    monkeypatch.setattr(few, "pool_attention", None)
    monkeypatch.setattr(attention, "fused_attention", None)
    cases.assert_same(cases.run(ours, inputs), expected, 1e-9)
    assert {row.form for row in x_rope_cls.explain(ours) if row.kind == "class"} == {"composite"}


@pytest.mark.parametrize("where", ["to_k", "to_v", "attend"])
def test_hooks_are_called(where: str) -> None:
    ours = _encoder("class_attention")
    x = _x()
    expected = ours(x)
    calls: list[Any] = []
    getattr(ours.layers[4][1], where).register_forward_hook(lambda *given: calls.append(given))
    torch.testing.assert_close(ours(x), expected)
    assert len(calls) == 1
    assert [row.form for row in x_rope_cls.explain(ours)] == ["", "absorbed", "ordinary"]


def test_too_many_cls_tokens_are_not_absorbed() -> None:
    rows = list(x_rope_cls.explain(_encoder("class_attention", num_cls_tokens=9)))
    assert [(row.kind, row.form) for row in rows] == [("self", ""), ("class", "ordinary"), ("class", "ordinary")]
    assert "9 queries are too many" in rows[1].reason


def test_explain() -> None:
    report = x_rope_cls.explain(_encoder("join", num_cls_tokens=2, late_cls_at=1))
    assert [(row.kind, row.form) for row in report] == [("self", ""), ("self", ""), ("class", "absorbed"), ("self", "")]
    assert report.fused
    assert "2 CLS tokens enter at layers.2, step 3 of 6" in str(report)
    assert "absorbed" in str(report)
    report = x_rope_cls.explain(_encoder("class_attention", attn_sparse_topk=3, num_cls_tokens=0, attn_flash=False))
    assert [row.form for row in report] == ["", "composite", "composite"]
    assert "CLS tokens passed to forward enter" in str(report)
    assert "form" not in str(x_rope_cls.explain(_encoder(None))).splitlines()[0]
    training = _encoder("class_attention", attn_dropout=0.1)
    assert [row.form for row in x_rope_cls.explain(training)][1:] == ["ordinary"] * 2
    assert [row.form for row in x_rope_cls.explain(training.eval())][1:] == ["absorbed"] * 2
    tied = _encoder("class_attention", weight_tie_layers=True)
    assert [(row.kind, row.form) for row in x_rope_cls.explain(tied)] == [("self", ""), ("class", "absorbed")]


# ---- what it returns -----------------------------------------------------------------------------


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options", [{}, {"attn_sigmoid": True}, {"attn_qk_norm": True}, {"attn_kv_heads": 2}, {"alibi_pos_bias": True}]
)
def test_need_weights(options: dict[str, Any], mode: str, flash: bool) -> None:
    if flash and "attn_sigmoid" in options:
        pytest.skip("x-transformers has no such option with attn_flash")
    ours = _encoder(mode, num_cls_tokens=2, **options, attn_flash=flash)
    x, mask = _x(), torch.rand(2, 7) > 0.3
    out, maps = ours(x, mask=mask, need_weights=True)
    torch.testing.assert_close(out, ours(x, mask=mask))
    assert [each.shape for each in maps] == [(2, 4, 2, 9)] * 2
    for each in maps:
        if "attn_sigmoid" not in options:
            torch.testing.assert_close(each.sum(-1), torch.ones(2, 4, 2, dtype=torch.float64))
        assert not each[..., 2:][(~mask)[:, None, None].expand(-1, 4, 2, -1)].any()
    first, hidden, again = ours(x, mask=mask, need_weights=True, return_hiddens=True)
    torch.testing.assert_close(first, out)
    torch.testing.assert_close(again, maps)
    ours_eager = copy.deepcopy(ours)
    for module in ours_eager.modules():
        if isinstance(module, x_transformers.attend.Attend):
            module.flash = False
    _, hidden = ours_eager(x, mask=mask, return_hiddens=True)
    for each, layer in zip(maps, hidden.attn_intermediates[1:], strict=True):
        torch.testing.assert_close(each, layer.post_softmax_attn[..., :2, -9:])


def test_memory_keys_have_a_share_of_the_map() -> None:
    ours = _encoder("class_attention", attn_num_mem_kv=2)
    _, maps = ours(_x(), need_weights=True)
    assert all((each.sum(-1) < 1).all() for each in maps)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_cls", [2, 7])
@pytest.mark.parametrize("options", [{}, {"num_residual_streams": 2}, {"pre_norm": False}])
def test_hidden_states(mode: str, num_cls: int, options: dict[str, Any]) -> None:
    ours = _encoder(mode, num_cls_tokens=num_cls, **options)
    x, streams = _x(), options.get("num_residual_streams", 1)
    out, hidden = ours(x, return_hiddens=True)
    torch.testing.assert_close(out, ours(x))
    torch.testing.assert_close(hidden.last_hidden, out)
    assert [h.shape for h in hidden.hiddens] == [(2 * streams, 7, 32)] * 3
    assert [h.shape[-2] for h in hidden.layer_hiddens] == [7] * 2 + [7 + num_cls] * 5
    blocks = getattr(hidden, "block_hiddens", None)
    if blocks is not None:
        assert [h.shape[-2] for h in blocks] == [7] + [7 + num_cls] * 2
    if mode == "class_attention":
        torch.testing.assert_close(hidden.hiddens[2], hidden.hiddens[1])
        if streams == 1:
            torch.testing.assert_close(hidden.layer_hiddens[-1][:, num_cls:], hidden.hiddens[1])
            torch.testing.assert_close(hidden.layer_hiddens[2][:, :num_cls], ours.late_cls_tokens.expand(2, -1, -1))
    if streams == 1:
        ours(x, mems=hidden.hiddens)


def test_layers_that_are_dropped() -> None:
    for mode in MODES:
        ours = _encoder(mode, num_cls_tokens=2, layer_dropout=0.5).train()
        shapes = set()
        for seed in range(30):
            random.seed(seed)
            out, hidden, maps = ours(_x(), return_hiddens=True, need_weights=True)
            assert out.shape == (2, 9, 32)
            shapes.add(len(maps))
            assert all(h.shape[1] == 7 for h in hidden.hiddens)
            assert all(h.shape[1] in (7, 9) for h in hidden.layer_hiddens)
            assert hidden.layer_hiddens[-1].shape[1] == 9
        assert shapes == {0, 1, 2}
        nothing = _encoder(mode, num_cls_tokens=2, layer_dropout=1.0).train()
        x = _x()
        both = torch.cat((nothing.late_cls_tokens.expand(2, -1, -1), x), dim=1)
        torch.testing.assert_close(nothing(x), nothing.final_norm(both))


def test_dropped_entry_layer() -> None:
    """CLS enters at the next layer that is executed: there tokens do not see it yet."""
    for mode in MODES:
        ours = _encoder(mode, num_cls_tokens=2, layer_dropout=(0.0, 0.0, 1.0, 0.0, 0.0, 0.0)).train()
        without = _encoder(mode, num_cls_tokens=2, late_cls_at=-1, layers_execute_order=(0, 1, 3, 4, 5))
        without.load_state_dict(ours.state_dict())
        x = _x()
        tokens = ours(x)
        if mode == "join":  # the feed-forward between them sees single rows
            other = without(x)
            torch.testing.assert_close(tokens[:, 2:], other[:, 2:])
            assert not torch.allclose(tokens[:, :2], other[:, :2])


def test_block_inputs_can_be_transformed() -> None:
    if not NEW:
        pytest.skip("no transform_block_inputs")
    for mode in MODES:
        ours = _encoder(mode, num_cls_tokens=2)
        x, seen = _x(), []

        def double(depth: int, h: torch.Tensor, seen: list[Any] = seen) -> torch.Tensor:
            seen.append((depth, h.shape[1]))
            return 2 * h

        out = ours(x, transform_block_inputs=double)
        assert seen == [(2, 7), (3, 9)]
        torch.testing.assert_close(out, ours(x, transform_block_inputs={d: lambda h: 2 * h for d in (2, 3)}))
        assert not torch.allclose(out, ours(x))


def test_order_of_execution_per_call() -> None:
    for mode in MODES:
        ours = _encoder(mode, late_cls_at=-1)
        order = (0, 1, 2, 3, 2, 3)
        fixed = _encoder(mode, late_cls_at=-1, layers_execute_order=order)
        fixed.load_state_dict(ours.state_dict())
        x = _x()
        torch.testing.assert_close(ours(x, layers_execute_order=order), fixed(x))
        if NEW:
            repeats = (((0, 1), 2),)
            same = ours(x, layers_execute_order=(0, 1, 2, 3, 0, 1, 2, 3, 4, 5))
            torch.testing.assert_close(ours(x, repeat_blocks=repeats), same)
        with pytest.raises(ValueError, match="late_cls_at must be from -1 to 0 for 1 self-attention layers, got 2"):
            _encoder(mode, late_cls_at=2)(x, layers_execute_order=(0, 1))
