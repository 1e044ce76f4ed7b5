"""How a converted encoder behaves in programs: masks, memories, dropout, checkpointing, compilation, dtypes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import x_rope_cls

pytest.importorskip("x_transformers")
import x_transformers
import x_transformers.x_transformers as xt
import xt_cases as cases
from xt_cases import one_thread  # noqa: F401  (used by every test)

TOLERANCE = 1e-9
FLASH: dict[str, Any] = {**cases.BASE, "attn_flash": True}


def _pair(options: dict[str, Any] | None = None, **ours: Any) -> tuple[Any, Any]:
    return cases.make_pair({**FLASH, **(options or {})}, **{"cls_rope": "rotate", **ours})


def _assert_same(options: dict[str, Any] | None, inputs: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    theirs, ours = _pair(options)
    cases.assert_same(cases.run(ours, inputs), cases.run(theirs, inputs), tolerance)


def _x(batch: int = 2, tokens: int = 7) -> torch.Tensor:
    return torch.randn(batch, tokens, 32, dtype=torch.float64)


# ---- arguments of forward ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"attn_num_mem_kv": 2}, {"attn_kv_heads": 2}, {"attn_add_zero_kv": True}])
def test_fully_masked_rows(options: dict[str, Any]) -> None:
    mask = torch.rand(3, 7) > 0.4
    mask[1] = False
    _assert_same(options, {"x": _x(3), "mask": mask})


@pytest.mark.parametrize(
    "shape", [(7, 7), (4, 7, 7), (2, 1, 7, 7), (1, 4, 7, 7), (2, 4, 7, 7), (1, 1, 1, 7), (2, 1, 1, 7)]
)
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"attn_kv_heads": 2}, {"alibi_pos_bias": True, "attn_kv_heads": 2}, {"attn_max_attend_past": 2}]
)
def test_attn_mask(shape: tuple[int, ...], with_mask: bool, options: dict[str, Any]) -> None:
    attn_mask = torch.rand(shape) > 0.4
    inputs = {"x": _x(), "attn_mask": attn_mask, **({"mask": torch.rand(2, 7) > 0.3} if with_mask else {})}
    _assert_same(options, inputs)


def test_attn_mask_of_one_column() -> None:
    """It is broadcast over the keys: the only token, and memory key/values."""
    for value in (True, False):
        _assert_same({"attn_num_mem_kv": 2}, {"x": _x(tokens=1), "attn_mask": torch.tensor([[value]])})


def test_attn_mask_that_x_transformers_refuses() -> None:
    for encoder in _pair():
        with pytest.raises(TypeError):
            encoder(_x(), attn_mask=torch.zeros(7, 7))
        with pytest.raises(AssertionError):
            encoder(_x(), attn_mask=torch.ones(7, dtype=torch.bool))


def test_attn_bias() -> None:
    _assert_same({}, {"x": _x(), "attn_bias": torch.randn(4, 7, 7, dtype=torch.float64)})
    _assert_same(
        {}, {"x": _x(), "attn_bias": torch.randn(2, 1, 7, 7, dtype=torch.float64), "mask": torch.rand(2, 7) > 0.3}
    )


@pytest.mark.parametrize("options", [{}, {"attn_num_mem_kv": 2}, {"attn_kv_heads": 2}])
def test_mems(options: dict[str, Any]) -> None:
    theirs, ours = _pair(options)
    mems = [_x(tokens=3) for _ in range(2)]
    inputs = {"x": _x(), "mems": mems, "mask": torch.rand(2, 7) > 0.3, "mem_masks": [torch.rand(2, 3) > 0.3] * 2}
    cases.assert_same(cases.run(ours, inputs), cases.run(theirs, inputs), TOLERANCE)
    ours.cls_rope, ours.num_prefix_tokens = "skip", 1
    skipped = ours(**inputs)
    rotate = torch.tensor([True] * 3 + [False] + [True] * 6)
    torch.testing.assert_close(ours(**inputs, rotate=rotate), skipped)
    torch.testing.assert_close(ours(**inputs, rotate=rotate[3:]), skipped)  # mems have positions
    assert not torch.allclose(ours(**inputs, rotate=~rotate), skipped)


def test_positions() -> None:
    _assert_same({}, {"x": _x(), "pos": torch.randperm(7)})
    _assert_same({}, {"x": _x(), "pos": torch.randint(0, 50, (2, 7))})
    _assert_same({"alibi_pos_bias": True}, {"x": _x(), "pos": torch.randint(0, 50, (2, 7))})
    _assert_same({}, {"x": _x(), "seq_pos_offset": 3})
    _assert_same({}, {"x": _x(), "seq_start_pos": torch.tensor([0, 2])})


def test_rotary_passed_by_the_caller() -> None:
    embedding = xt.RotaryEmbedding(8).double()
    for options in ({}, {"rotary_pos_emb": False}):
        _assert_same(options, {"x": _x(), "rotary_pos_emb": embedding(torch.arange(7) * 3)})
        _assert_same(options, {"x": _x(), "rotary_pos_emb": embedding(torch.arange(20))})  # the last rows, as theirs
        _assert_same(options, {"x": _x(), "rotary_pos_emb": embedding(torch.randint(0, 9, (2, 7)))})
    xpos = xt.RotaryEmbedding(8, use_xpos=True, scale_base=16).double()
    _assert_same({}, {"x": _x(), "rotary_pos_emb": xpos(torch.arange(7))})
    _assert_same(
        {"attn_l2_distance": True, "attn_flash": False}, {"x": _x(), "rotary_pos_emb": xpos(torch.arange(7))}, 1e-4
    )


def test_rotary_of_this_package() -> None:
    theirs, ours = _pair()
    x = _x()
    rotary = x_rope_cls.RotaryEmbedding(4)(7)
    torch.testing.assert_close(ours(x, rotary_pos_emb=rotary), theirs(x), atol=1e-6, rtol=1e-6)
    rotate = torch.arange(7) > 1
    ours.cls_rope = "mask"
    expected = ours(x, rotary_pos_emb=rotary, rotate=rotate)
    torch.testing.assert_close(ours(x, rotary_pos_emb=x_rope_cls.Rotary(rotary.cos, rotary.sin, rotate)), expected)
    axial = x_rope_cls.AxialRotaryEmbedding(8)(torch.cartesian_prod(torch.arange(3), torch.arange(3))[:7].float())
    ours(x, rotary_pos_emb=axial).sum().backward()


@pytest.mark.parametrize("heads", [4, 2])
def test_additional_key_values(heads: int) -> None:
    added = [tuple(torch.randn(2, heads, 3, 8, dtype=torch.float64) for _ in range(2)) for _ in range(2)]
    inputs = {"x": _x(), "self_attn_additional_kv": added, "mask": torch.rand(2, 7) > 0.3}
    _assert_same({}, inputs)
    _assert_same({"attn_num_mem_kv": 1}, {**inputs, "additional_kv_mask": torch.rand(2, 3) > 0.5})


def test_cross_attention_with_positions() -> None:
    inputs = {
        "x": _x(),
        "context": _x(tokens=9),
        "context_pos": torch.arange(9),
        "context_mask": torch.rand(2, 9) > 0.3,
    }
    _assert_same({"cross_attend": True}, inputs)
    _assert_same({"cross_attend": True, "attn_num_mem_kv": 2}, inputs)


def test_positional_arguments() -> None:
    theirs, ours = _pair({"cross_attend": True})
    x, context, mask = _x(), _x(tokens=4), torch.rand(2, 7) > 0.3
    torch.testing.assert_close(ours(x, context, mask), theirs(x, context, mask))


def test_attention_called_alone() -> None:
    theirs, ours = _pair()
    x, rotary = _x(), xt.RotaryEmbedding(4).double()(torch.arange(7))
    theirs, ours = theirs.layers[0][1], ours.layers[0][1]
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x, rotary_pos_emb=rotary), theirs(x, rotary_pos_emb=rotary))
    q, k, v = (torch.randn(2, 4, 7, 8, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(ours.attend(q, k, v)[0], theirs.attend(q, k, v)[0])


@pytest.mark.skipif(not cases.known_to_installed_version({"polar_pos_emb": True}), reason="not in this version")
@pytest.mark.parametrize("flash", [False, True])
def test_causal_call(flash: bool) -> None:
    _assert_same({"attn_flash": flash}, {"x": _x(), "causal": True}, 2e-4)


# ---- what comes beside the output ----------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["plain", "attn_num_mem_kv", "alibi", "attn_kv_heads", "attn_add_zero_kv", "residual_attn"]
)
def test_attention_maps_on_request(name: str) -> None:
    theirs, ours = cases.make_pair({**cases.BASE, **cases.ALL_OPTIONS[name]}, cls_rope="rotate")
    inputs = {"x": _x(), "mask": torch.rand(2, 7) > 0.3, "return_hiddens": True}
    _, expected = theirs(**inputs)
    _, got = ours(**inputs)
    for mine, other in zip(got.attn_intermediates, expected.attn_intermediates, strict=True):
        for field in ("qk_similarities", "pre_softmax_attn", "post_softmax_attn", "values"):
            torch.testing.assert_close(getattr(mine, field), getattr(other, field), atol=1e-6, rtol=1e-6)
        assert mine.layer_type == other.layer_type
        assert len(mine.to_tuple()) == 3


def test_attention_maps_through_the_wrapper() -> None:
    encoder = x_rope_cls.Encoder(**cases.BASE, attn_dropout=0.5)
    model = x_transformers.TransformerWrapper(num_tokens=9, max_seq_len=9, attn_layers=encoder)
    tokens = torch.randint(0, 9, (2, 5))
    _, maps = model(tokens, return_attn=True)
    for weights in maps:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
    _, intermediates = model(tokens, return_attn_z_loss=True)
    intermediates.attn_z_loss.backward()
    assert encoder.layers[0][1].to_q.weight.grad.abs().sum() > 0
    assert (
        intermediates.attn_intermediates[0].post_softmax_attn is intermediates.attn_intermediates[0].post_softmax_attn
    )


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("composite", [False, True])
def test_attention_dropout(flash: bool, composite: bool) -> None:
    if flash and composite:
        pytest.skip("x-transformers has no such option with attn_flash")
    options = {**cases.BASE, "depth": 1, "attn_flash": flash, "attn_dropout": 0.4, "attn_softclamp_logits": composite}
    encoder = x_rope_cls.Encoder(**options, num_prefix_tokens=1)
    x = torch.randn(2, 7, 32)
    expected = encoder.eval()(x)
    torch.testing.assert_close(encoder(x), expected)
    encoder.train()
    torch.manual_seed(3)
    first = encoder(x)
    assert not torch.allclose(first, encoder(x))
    torch.manual_seed(3)
    torch.testing.assert_close(encoder(x), first)
    attention, hidden = encoder.layers[0][1], torch.randn(1, 7, 32)
    mean = torch.stack([attention(hidden) for _ in range(600)]).mean(0)
    assert (mean - attention.eval()(hidden)).abs().max() < 0.15


def test_layer_dropout_and_ff_dropout() -> None:
    theirs, ours = _pair({"layer_dropout": 0.5, "ff_dropout": 0.2, "depth": 4})
    import random

    for encoder in (theirs, ours):
        encoder.train()
    inputs = {"x": _x()}
    random.seed(1)
    expected = cases.run(theirs, inputs)
    random.seed(1)
    cases.assert_same(cases.run(ours, inputs), expected, TOLERANCE)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    encoder = x_rope_cls.Encoder(**FLASH, num_prefix_tokens=1, attn_dropout=0.3)
    x = torch.randn(2, 7, 32, requires_grad=True)
    torch.manual_seed(1)
    encoder(x).sum().backward()
    expected = [p.grad.clone() for p in (x, *encoder.parameters())]
    x.grad = None
    encoder.zero_grad()
    torch.manual_seed(1)
    checkpoint(encoder, x, use_reentrant=use_reentrant).sum().backward()
    for parameter, grad in zip((x, *encoder.parameters()), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_threads_do_not_meet() -> None:
    encoder = x_rope_cls.Encoder(**FLASH).eval()
    inputs = [torch.randn(1, 4 + i, 32) for i in range(4)]
    masks = [torch.arange(4 + i) >= i for i in range(4)]
    with torch.no_grad():
        expected = [encoder(x, rotate=m) for x, m in zip(inputs, masks, strict=True)]
    failures: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(30):
                if not torch.allclose(encoder(inputs[i], rotate=masks[i]), expected[i], atol=1e-6):
                    failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- compilation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({"attn_flash": True}, {"cls_rope": "rotate"}),
        ({"attn_num_mem_kv": 2, "attn_kv_heads": 2}, {"num_prefix_tokens": 2}),
        ({"attn_softclamp_logits": True, "attn_l2_distance": True}, {"num_prefix_tokens": 2}),
    ],
)
def test_compile(options: dict[str, Any], ours: dict[str, Any]) -> None:
    if "attn_softclamp_logits" in options and cases.Version("2.31.10") > cases.VERSION:
        pytest.skip("x-transformers looks at the values of masks there, which breaks the graph")
    torch._dynamo.reset()
    encoder = x_rope_cls.Encoder(**{**cases.BASE, "depth": 1, **options}, **ours)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    for tokens in (7, 9, 12):
        x, mask = torch.randn(2, tokens, 32, requires_grad=True), torch.rand(2, tokens) > 0.3
        expected, got = encoder(x, mask=mask), compiled(x, mask=mask)
        torch.testing.assert_close(got, expected)
        (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(torch.autograd.grad(got.square().sum(), x)[0], expected_grad)


def test_compile_does_not_recompile_for_each_length() -> None:
    torch._dynamo.reset()
    encoder = x_rope_cls.Encoder(**{**FLASH, "depth": 1}, num_prefix_tokens=2)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(encoder, backend=counter)
    with torch.no_grad():
        for tokens in (7, 9, 12, 15):
            x = torch.randn(2, tokens, 32)
            torch.testing.assert_close(compiled(x), encoder(x))
    assert counter.frame_count <= 2


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_module_keeps_its_angles(dtype: torch.dtype) -> None:
    encoder = x_rope_cls.Encoder(**FLASH, cls_rope="rotate").to(dtype)
    seen: list[Any] = []
    encoder.layers[0][1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["rotary_pos_emb"]), with_kwargs=True
    )
    assert encoder(torch.randn(1, 700, 32, dtype=dtype)).dtype == dtype
    angles = torch.arange(700)[:, None] * encoder.rotary_pos_emb.inv_freq.float()
    torch.testing.assert_close(seen[0].queries.cos, angles.cos())
    torch.testing.assert_close(seen[0].queries.sin, angles.sin())


def test_autocast() -> None:
    theirs, ours = cases.make_pair(FLASH, torch.float32, cls_rope="rotate")
    x = torch.randn(1, 700, 32)
    expected = theirs(x)
    with torch.autocast("cpu", torch.bfloat16):
        by_them, by_us = theirs(x), ours(x)
    by_us.sum().backward()
    assert by_us.dtype == by_them.dtype
    assert (by_us - expected).abs().max() <= 2 * (by_them - expected).abs().max()


def test_fake_tensors() -> None:
    with FakeTensorMode():
        encoder = x_rope_cls.Encoder(**FLASH, num_prefix_tokens=1)
        assert encoder(torch.randn(2, 7, 32)).shape == (2, 7, 32)


def test_empty() -> None:
    encoder = x_rope_cls.Encoder(**FLASH)
    assert encoder(torch.randn(0, 5, 32)).shape == (0, 5, 32)
    assert encoder(torch.randn(2, 1, 32)).shape == (2, 1, 32)
