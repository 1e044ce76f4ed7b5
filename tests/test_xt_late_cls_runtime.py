"""How an encoder with late CLS behaves in programs: arguments, errors, state, compilation, dtypes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import x_rope_cls

pytest.importorskip("x_transformers")
import x_transformers
import xt_cases as cases
from xt_cases import one_thread  # noqa: F401  (used by every test)

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
    options = {"custom_layers": ("a",), "depth": None, "pre_norm_has_final_norm": False}  # linear in the weights
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
