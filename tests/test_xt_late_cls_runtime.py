"""How an encoder with late CLS behaves in programs: forms, maps, hidden states, positions, dropout, compilation."""

from __future__ import annotations

import copy
import io
import pickle
import random
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import x_rope_cls

pytest.importorskip("x_transformers")
import x_transformers
import xt_cases as cases
from xt_cases import one_thread  # noqa: F401  (used by every test)
from xt_emulation import exact_softmax

from x_rope_cls.xt import class_step, few

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
    for attention, feed_forward in (theirs.layers[2:4], theirs.layers[4:6]):
        (norm, *_), attend, _ = attention
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


# ---- CLS tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_cls_tokens_of_the_caller(mode: str) -> None:
    ours, x = _encoder(mode, num_cls_tokens=2), _x()
    out = ours(x)
    torch.testing.assert_close(ours(x, cls_tokens=ours.late_cls_tokens.clone()), out)
    torch.testing.assert_close(ours(x, cls_tokens=ours.late_cls_tokens.expand(2, -1, -1)), out)
    other = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    ours(x, cls_tokens=other).sum().backward()
    assert other.grad.abs().min() > 0
    assert ours.late_cls_tokens.grad is None

    without = _encoder(mode, num_cls_tokens=0)
    assert without.late_cls_tokens is None
    assert "late_cls_tokens" not in without.state_dict()
    without.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "late_cls_tokens"})
    torch.testing.assert_close(without(x, cls_tokens=ours.late_cls_tokens), out)
    with pytest.raises(ValueError, match="cls_tokens must be passed to forward with num_cls_tokens=0, got None"):
        without(x)


def test_wrong_calls() -> None:
    ours, x = _encoder("join"), _x()
    for shape in ((32,), (1, 31), (3, 1, 32), (0, 32), (2, 0, 32), (1, 2, 1, 32)):
        with pytest.raises(ValueError, match=r"cls_tokens must be of shape \(cls, 32\) or \(2, cls, 32\)"):
            ours(x, cls_tokens=torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(TypeError, match="cls_tokens must be a tensor, got int"):
        ours(x, cls_tokens=3)
    plain = _encoder(None)
    for given in ({"cls_tokens": torch.zeros(1, 32)}, {"need_weights": True}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} must not be given without late_cls"):
            plain(x, **given)
    conditioned = _encoder("join", use_adaptive_layernorm=True)
    conditioned(x, condition=torch.randn(2, 1, 32).double())
    with pytest.raises(ValueError, match=r"condition must be \(batch, dim\).*got \(2, 7, 32\)"):
        conditioned(x, condition=torch.randn(2, 7, 32).double())
    with pytest.raises(ValueError, match="in_attn_cond must be None with reinject_input"):
        _encoder("join", reinject_input=True)(x, in_attn_cond=x)
    if NEW:
        with pytest.raises(ValueError, match="repeat_blocks must be None with layers_execute_order"):
            ours(x, repeat_blocks=((0, 2),), layers_execute_order=(0, 1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"late_cls": "class"}, ValueError, "late_cls must be one of .*, got 'class'"),
        ({"num_cls_tokens": -1}, ValueError, "num_cls_tokens must be at least 0, got -1"),
        ({"num_cls_tokens": 1.5}, TypeError, "num_cls_tokens must be an integer, got 1.5"),
        ({"late_cls_at": 3}, ValueError, "late_cls_at must be from -3 to 2 for 3 self-attention layers, got 3"),
        ({"late_cls_at": -4}, ValueError, "late_cls_at must be from -3 to 2"),
        ({"depth": 1}, ValueError, "late_cls_at must be from -1 to 0 for 1 self-attention layers, got -2"),
        ({"late_cls_at": 1.0}, TypeError, "late_cls_at must be an integer, got 1.0"),
        ({"late_cls_at": True}, TypeError, "late_cls_at must be an integer, got True"),
        ({"cross_attend": True, "only_cross": True}, ValueError, "without self-attention layers to enter at"),
    ],
)
def test_refused_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"Encoder: .*{message}"):
        x_rope_cls.Encoder(**{**OPTIONS, "late_cls": "join", **options})


def test_packed_sequences_are_refused() -> None:
    if not cases.known_to_installed_version({"attn_flash_pack_seq": True}):
        pytest.skip("no attn_flash_pack_seq")
    encoder = x_rope_cls.Encoder(**OPTIONS)
    encoder.layers[0][1].attend.flash_pack_seq = True  # setting the option needs flash-attn
    with pytest.raises(ValueError, match="late_cls must be None with attn_flash_pack_seq"):
        x_rope_cls.swap_(encoder, late_cls="join")
    assert encoder.late_cls is None


# ---- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_state(mode: str) -> None:
    torch.manual_seed(3)
    options = {**OPTIONS, "attn_flash": False}  # x-transformers' flash settings cannot be pickled
    plain = x_transformers.Encoder(**options)
    torch.manual_seed(3)
    ours = x_rope_cls.Encoder(**options, late_cls=mode, num_cls_tokens=64)
    own = ours.state_dict()
    assert set(own) == {"late_cls_tokens", *plain.state_dict()}
    assert all(torch.equal(own[name], t) for name, t in plain.state_dict().items())
    assert own["late_cls_tokens"].shape == (64, 32)
    assert 0.018 < own["late_cls_tokens"].std() < 0.022
    assert "late_cls_tokens" not in x_rope_cls.Encoder(**OPTIONS).state_dict()
    x = _x(dtype=torch.float32)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(again(x), ours(x))
    buffer = io.BytesIO()
    torch.save(own, buffer)
    buffer.seek(0)
    fresh = x_rope_cls.Encoder(**OPTIONS, late_cls=mode, num_cls_tokens=64)
    fresh.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(fresh(x), ours(x))


def test_pickle_of_a_version_without_late_cls() -> None:
    ours = _encoder(None, attn_flash=False)
    x = _x()
    expected = ours(x)
    old = pickle.loads(pickle.dumps(ours))
    for name in ("late_cls", "late_cls_at", "num_cls_tokens"):
        old.__dict__.pop(name)
    old._parameters.pop("late_cls_tokens")
    torch.testing.assert_close(old(x), expected)
    x_rope_cls.explain(old)
    x_rope_cls.swap_(old, late_cls="join")
    assert old(x).shape == (2, 8, 32)


@pytest.mark.parametrize("mode", MODES)
def test_swap(mode: str) -> None:
    theirs = x_transformers.Encoder(**OPTIONS).double()
    x = _x()
    parameters = dict(theirs.named_parameters())
    swapped = x_rope_cls.swap_(theirs, late_cls=mode, late_cls_at=-1, num_cls_tokens=3)
    assert swapped is theirs
    assert all(theirs.get_parameter(name) is p for name, p in parameters.items())
    assert theirs.late_cls_tokens.dtype == torch.float64
    built = x_rope_cls.Encoder(**OPTIONS, late_cls=mode, late_cls_at=-1, num_cls_tokens=3).double()
    built.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(theirs(x), built(x))
    own = theirs.late_cls_tokens
    x_rope_cls.swap_(theirs, cls_rope="skip")
    assert (theirs.late_cls, theirs.late_cls_at, theirs.num_cls_tokens) == (mode, -1, 3)
    assert theirs.late_cls_tokens is own
    x_rope_cls.swap_(theirs, late_cls="join", late_cls_at=0, num_cls_tokens=1)
    assert theirs(x).shape == (2, 8, 32)
    with pytest.raises(ValueError, match="late_cls_at"):
        x_rope_cls.swap_(theirs, late_cls_at=7)
    assert theirs.late_cls_at == 0


def test_swap_of_wrappers() -> None:
    def wrapper(**options: Any) -> Any:
        encoder = x_transformers.Encoder(**OPTIONS)
        return x_transformers.ContinuousTransformerWrapper(
            dim_in=5, dim_out=4, max_seq_len=16, attn_layers=encoder, **options
        )

    model = x_rope_cls.swap_(wrapper(), late_cls="class_attention", num_cls_tokens=2)
    assert model(torch.randn(2, 7, 5), mask=torch.ones(2, 7, dtype=torch.bool)).shape == (2, 9, 4)
    for option, name in (({"num_memory_tokens": 2}, "has_memory_tokens"), ({"average_pool_embed": True},) * 2):
        name = name if isinstance(name, str) else "average_pool_embed"
        model = wrapper(**option)
        with pytest.raises(ValueError, match=f"late_cls must be None for ContinuousTransformerWrapper with {name}"):
            x_rope_cls.swap_(model, late_cls="join")
        assert type(model.attn_layers) is x_transformers.Encoder
    model = x_transformers.TransformerWrapper(
        num_tokens=9, max_seq_len=8, attn_layers=x_transformers.Encoder(**OPTIONS)
    )
    with pytest.raises(ValueError, match="late_cls must be None for TransformerWrapper, which knows nothing of CLS"):
        x_rope_cls.swap_(model, late_cls="join")
    assert type(model.attn_layers) is x_transformers.Encoder


class _Own(x_transformers.Encoder):
    def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(2 * x, **kwargs)


def test_swap_of_subclasses() -> None:
    with pytest.raises(ValueError, match="late_cls must be None for _Own, whose own forward would run without it"):
        x_rope_cls.swap_(_Own(**OPTIONS), late_cls="join")

    class Ours(x_rope_cls.Encoder):
        def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
            return super().forward(2 * x, **kwargs)

    ours = Ours(**OPTIONS, late_cls="join").double()
    plain = _encoder("join")
    plain.load_state_dict(ours.state_dict())
    x = _x()
    torch.testing.assert_close(ours(x), plain(2 * x))


# ---- programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"attn_qk_norm": True, "attn_num_mem_kv": 2}, {"num_residual_streams": 2}])
def test_compile(mode: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    ours = _encoder(mode, torch.float32, num_cls_tokens=2, **options)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=not options.get("num_residual_streams"))
    inputs = {"x": _x(dtype=torch.float32), "mask": torch.rand(2, 7) > 0.3}
    expected = cases.run(ours, inputs)
    got = {name.removeprefix("_orig_mod."): t for name, t in cases.run(compiled, inputs).items()}
    cases.assert_same(got, expected, 1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_export(mode: str) -> None:
    ours = _encoder(mode, torch.float32, num_cls_tokens=2)
    x = _x(dtype=torch.float32)
    tokens = torch.export.Dim("tokens", min=3, max=64)
    program = torch.export.export(ours, (x,), dynamic_shapes=({1: tokens},), strict=False)
    longer = _x(tokens=13, dtype=torch.float32)
    torch.testing.assert_close(program.module()(longer), ours(longer))


@pytest.mark.parametrize("mode", MODES)
def test_checkpointing(mode: str) -> None:
    ours = _encoder(mode)
    inputs = {"x": _x()}
    expected = cases.run(ours, inputs)

    class Checkpointed:
        zero_grad, named_parameters = ours.zero_grad, ours.named_parameters

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(ours, x, use_reentrant=False)

    cases.assert_same(cases.run(Checkpointed(), inputs), expected, 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("flash", [False, True])
def test_dropout(mode: str, flash: bool) -> None:
    """Weights are dropped in training alone: the mean over many masks is the output without."""
    options = {"only_attn": True, "depth": 1, "pre_norm_has_final_norm": False}  # linear in the weights
    ours = _encoder(mode, late_cls_at=-1, attn_dropout=0.2, attn_flash=flash, **options)
    x = _x(batch=1)
    expected = ours.eval()(x)
    ours.train()
    many = ours(x.expand(4000, -1, -1)).detach()
    assert many[:, 0].std(0).min() > 1e-3
    close = (many[:, 0].mean(0) - expected[0, 0]).abs() < 5 * many[:, 0].std(0) / 4000**0.5
    assert close.all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"use_rmsnorm": True}, {"attn_qk_norm": True}])
def test_low_precision(mode: str, options: dict[str, Any]) -> None:
    ours = _encoder(mode, torch.float32, num_cls_tokens=2, **options)
    x = _x(dtype=torch.float32)
    expected = ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x).float(), expected, atol=0.1, rtol=0.1)
    out = ours.to(torch.bfloat16)(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.15, rtol=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_torch_func(mode: str) -> None:
    ours = _encoder(mode)
    x = _x(batch=3)

    def loss(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(ours, parameters, (row[None],)).square().mean()

    parameters = dict(ours.named_parameters())
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for index in range(3):
        single = torch.autograd.grad(loss(parameters, x[index]), list(parameters.values()))
        for (name, _), expected in zip(parameters.items(), single, strict=True):
            torch.testing.assert_close(per_sample[name][index], expected, msg=name)


def test_no_tokens() -> None:
    for mode in MODES:
        ours = _encoder(mode, num_cls_tokens=2, rotary_pos_emb=False)
        assert ours(_x(tokens=0)).shape == (2, 2, 32)
        assert ours(_x(batch=0)).shape == (0, 9, 32)
