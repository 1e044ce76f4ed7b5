"""Bad input: a clear error, the same from the operators as from their fake kernels, and never a crash."""

from __future__ import annotations

import math
import re
import sys
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from strategies import examples
from torch._subclasses import FakeTensorMode

import x_rope_cls
from x_rope_cls import Rotary, RotaryEmbedding, apply_rope, late_cls_pool, ops, rope_attention

B, H, HKV, N, M, D, DV, P = 2, 4, 2, 5, 6, 8, 3, 2


def rope_arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(B, H, N, D),
        "cos": torch.randn(N, P),
        "sin": torch.randn(N, P),
        "rotate": torch.ones(N, dtype=torch.bool),
        "interleaved": True,
        "inverse": False,
    }


def rope_qk_arguments() -> dict[str, Any]:
    rest = attention_arguments()
    names = ("q", "k", "cos_q", "sin_q", "cos_k", "sin_k", "rotate_q", "rotate_k", "interleaved")
    return {**{name: rest[name] for name in names}, "inverse": False}


def table_grad_arguments() -> dict[str, Any]:
    arguments = {"grad": torch.randn(B, H, N, D), **rope_arguments()}
    del arguments["sin"]
    return arguments


def attention_arguments() -> dict[str, Any]:
    return {
        "q": torch.randn(B, H, N, D),
        "k": torch.randn(B, HKV, M, D),
        "v": torch.randn(B, HKV, M, DV),
        "cos_q": torch.randn(N, P),
        "sin_q": torch.randn(N, P),
        "cos_k": torch.randn(M, P),
        "sin_k": torch.randn(M, P),
        "rotate_q": torch.ones(N, dtype=torch.bool),
        "rotate_k": torch.ones(B, M, dtype=torch.bool),
        "attn_mask": torch.randn(H, N, M),
        "key_mask": torch.ones(B, M, dtype=torch.bool),
        "seed": torch.tensor(1),
        "cls_rope": 2,
        "interleaved": True,
        "scale": 0.5,
        "dropout_p": 0.1,
    }


def backward_arguments() -> dict[str, Any]:
    before = {
        "grad_out": torch.randn(B, H, N, DV),
        "grad_lse": torch.randn(B, H, N),
    }
    between = {"out": torch.randn(B, H, N, DV), "lse": torch.randn(B, H, N)}
    rest = attention_arguments()
    qkv = {name: rest.pop(name) for name in ("q", "k", "v")}
    return {**before, **qkv, **between, **rest, "need_bias_grad": True, "need_table_grad": True}


def pool_arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(B, N, D),
        "query": torch.randn(1, H, M, D),
        "key_mask": torch.ones(B, N, dtype=torch.bool),
        "norm_weight": torch.randn(D),
        "norm_bias": torch.randn(D),
        "scale": 0.5,
        "norm": 1,
        "norm_eps": 1e-5,
    }


def pool_backward_arguments() -> dict[str, Any]:
    rest = pool_arguments()
    tokens = {name: rest.pop(name) for name in ("x", "query")}
    before = {"grad": torch.randn(B, H, M, D), "grad_lse": torch.randn(B, H, M)}
    between = {"pooled": torch.randn(B, H, M, D), "lse": torch.randn(B, H, M)}
    return {**before, **tokens, **between, **rest, "need_x_grad": True}


OPERATORS = {
    "rope": (ops.rope, rope_arguments),
    "rope_qk": (ops.rope_qk, rope_qk_arguments),
    "rope_table_grad": (ops.rope_table_grad, table_grad_arguments),
    "rope_attention": (ops.rope_attention, attention_arguments),
    "rope_attention_backward": (ops.rope_attention_backward, backward_arguments),
    "late_cls_pool": (ops.late_cls_pool, pool_arguments),
    "late_cls_pool_backward": (ops.late_cls_pool_backward, pool_backward_arguments),
}
PATTERN = re.compile(rf"({'|'.join(OPERATORS)}): .+ must be .+, got .+", re.DOTALL)
REQUIRED = ("q", "k", "v", "grad_out", "out", "lse", "x", "query", "grad", "pooled")  # of those with optional tensors

SHAPES = [
    *((), (N,), (P,), (N, P), (M, P), (N, P + 1), (N, 0), (N, D), (P, N), (1, P), (H, N, P), (HKV, M, P), (3, N, P)),
    *(
        (B, 1, N, P),
        (B, HKV, M, P),
        (1, H, N, P),
        (3, 1, N, P),
        (1, 1, 1, N, P),
        (B, N),
        (B, M),
        (3, N),
        (1, N),
        (N, M),
    ),
    *((B, H, N, M), (H, 1, 1), (3, N, M), (1, 1, 1, 1, 1), (B, H, N), (B, N, H), (B, H, N, D), (B, H, N, D + 1)),
    *((B, H, N, 0), (B, HKV, M, 0), (B, 3, M, D), (B, 0, M, D), (3, HKV, M, D), (B, HKV, N, D), (B, HKV, M, DV), (0,)),
    *((D,), (1, D), (D + 1,), (B, N, D), (B, N, 0), (B, N, D + 1), (B, M, D), (3, N, D), (1, H, M, D), (B, H, M, D)),
    *((3, H, M, D), (B, H, M), (1, HKV, M, D), (H, M, D)),
]
BAD_DTYPES = [torch.int64, torch.int32, torch.uint8, torch.complex64, torch.float8_e4m3fn, torch.bool]
ALL_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, *BAD_DTYPES]
BAD_NUMBERS = {
    "cls_rope": [-1, 3, 2**40],
    "scale": [math.nan, math.inf],
    "dropout_p": [-0.1, 1.5, math.nan],
    "norm": [-1, 0, 3, 2**40],
    "norm_eps": [-1e-5, math.nan, math.inf],
}


def message(op: Any, arguments: dict[str, Any], fake: bool) -> str | None:
    """The text of the error, None if there is none."""
    values = list(arguments.values())
    try:
        if fake:
            with FakeTensorMode() as mode:
                op(*(mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in values))
        else:
            op(*values)
    except RuntimeError as error:
        return str(error).split("\n")[0]
    return None


def check_same(name: str, arguments: dict[str, Any]) -> str | None:
    real, fake = (message(OPERATORS[name][0], arguments, fake) for fake in (False, True))
    assert real == fake
    assert real is None or PATTERN.fullmatch(real), real
    return real


@pytest.mark.parametrize("name", OPERATORS)
def test_good_arguments_are_accepted(name):
    assert check_same(name, OPERATORS[name][1]()) is None


def wrong(name: str) -> list[tuple[str, Any, str]]:
    """(argument, value, what the message must say)."""
    tables = "of shape (tokens, pairs), (heads, tokens, pairs) or (batch, heads, tokens, pairs)"
    rope = [
        ("x", torch.randn(N, D), "x must be of shape (batch, heads, tokens, head_dim), got (5, 8)"),
        ("x", torch.zeros(B, H, N, D, dtype=torch.int64), "got torch.int64"),
        ("cos", torch.randn(N + 1, P), f"cos must be {tables}"),
        ("cos", torch.randn(1, P), f"cos must be {tables}"),
        ("cos", torch.randn(N, D // 2 + 1), "1 to 4 pairs, got (5, 5)"),
        ("cos", torch.randn(N, P).double(), "cos must be torch.float32, got torch.float64"),
        ("sin", torch.randn(N, P + 1), "sin must be of shape (5, 2), got (5, 3)"),
        ("rotate", torch.ones(N), "rotate must be torch.bool, got torch.float32"),
        ("rotate", torch.ones(N - 1, dtype=torch.bool), "rotate must be of shape (5,) or (2, 5), got (4,)"),
    ]
    rope_qk = [
        ("q", torch.randn(N, D), "q must be of shape (batch, heads, tokens, head_dim), got (5, 8)"),
        ("k", torch.randn(B, HKV, M), "k must be of shape (batch, heads, tokens, head_dim), got (2, 2, 6)"),
        ("k", torch.randn(B, HKV, M, D).half(), "k must be torch.float32, got torch.float16"),
        ("cos_q", torch.randn(M, P), f"cos_q must be {tables}"),
        ("cos_k", torch.randn(N, P), f"cos_k must be {tables}"),
        ("sin_q", torch.randn(N, P + 1), "sin_q must be of shape (5, 2), got (5, 3)"),
        ("sin_k", torch.randn(M, P).double(), "sin_k must be torch.float32, got torch.float64"),
        ("rotate_q", torch.ones(N), "rotate_q must be torch.bool, got torch.float32"),
        ("rotate_k", torch.ones(3, M, dtype=torch.bool), "rotate_k must be of shape (6,) or (2, 6), got (3, 6)"),
    ]
    attention = [
        ("k", torch.randn(B, HKV, M, D + 1), "k must be of shape (2, *, *, 8), got (2, 2, 6, 9)"),
        ("k", torch.randn(B, 3, M, D), "v must be of shape (2, 3, 6, *), got (2, 2, 6, 3)"),
        ("k", torch.randn(B, HKV, M, D).half(), "k must be torch.float32, got torch.float16"),
        ("v", torch.randn(B, HKV, M, 0), "head_dim of v must be at least 1, got 0"),
        ("v", torch.randn(B, HKV, M + 1, DV), "v must be of shape (2, 2, 6, *), got (2, 2, 7, 3)"),
        ("cos_q", None, "cos_q, sin_q, cos_k and sin_k must be given together or not at all, got 3 of them"),
        ("cos_k", torch.randn(N, P), f"cos_k must be {tables}"),
        ("rotate_k", torch.ones(3, M, dtype=torch.bool), "rotate_k must be of shape (6,) or (2, 6), got (3, 6)"),
        ("attn_mask", torch.randn(3, N, M), "attn_mask must be broadcastable to (2, 4, 5, 6), got (3, 5, 6)"),
        ("attn_mask", torch.zeros(N, M, dtype=torch.int32), "got torch.int32"),
        ("key_mask", torch.ones(M, dtype=torch.bool), "key_mask must be of shape (2, 6), got (6,)"),
        ("seed", None, "seed must be given where dropout_p is above 0, got None"),
        ("seed", torch.tensor([1]), "seed must be of shape (), got (1,)"),
        ("seed", torch.tensor(1.0), "seed must be torch.int64, got torch.float32"),
        ("cls_rope", 3, "cls_rope must be 0, 1 or 2, got 3"),
        ("scale", math.nan, "scale must be finite, got nan"),
        ("dropout_p", 1.5, "dropout_p must be between 0 and 1, got 1.5"),
    ]
    backward = [
        ("grad_out", torch.randn(B, H, N, DV + 1), "grad_out must be of shape (2, 4, 5, 3), got (2, 4, 5, 4)"),
        ("grad_lse", torch.randn(B, N, H), "grad_lse must be of shape (2, 4, 5), got (2, 5, 4)"),
        ("lse", torch.randn(B, H, N).double(), "lse must be torch.float32, got torch.float64"),
        ("attn_mask", torch.ones(N, M, dtype=torch.bool), "attn_mask must be floating where need_bias_grad is set"),
    ]
    grad = [("grad", torch.randn(B, H, N, D + 1), "grad must be of shape (2, 4, 5, 8), got (2, 4, 5, 9)")]
    query_shape = "query must be of shape (batch, heads, queries, channels) with batch 2 or 1 and 8 channels, got "
    pool = [
        ("x", torch.randn(N, D), "x must be of shape (batch, tokens, channels), got (5, 8)"),
        (
            "x",
            torch.zeros(B, N, D, dtype=torch.int32),
            "x must be float32, float64, bfloat16 or float16, got torch.int32",
        ),
        ("x", torch.randn(B, N, 0), "channels of x must be at least 1, got 0"),
        ("query", torch.randn(1, H, M, D).double(), "query must be torch.float32, got torch.float64"),
        ("query", torch.randn(H, M, D), query_shape + "(4, 6, 8)"),
        ("query", torch.randn(3, H, M, D), query_shape + "(3, 4, 6, 8)"),
        ("query", torch.randn(B, H, M, D - 1), query_shape + "(2, 4, 6, 7)"),
        ("key_mask", torch.ones(1, N, dtype=torch.bool), "key_mask must be of shape (2, 5), got (1, 5)"),
        ("key_mask", torch.ones(B, N), "key_mask must be torch.bool, got torch.float32"),
        ("norm_weight", torch.randn(1, D), "norm_weight must be of shape (8,), got (1, 8)"),
        ("norm_bias", torch.randn(D).half(), "norm_bias must be torch.float32, got torch.float16"),
        ("norm", 0, "norm_weight must be None where norm is 0, got a tensor"),
        ("norm", 3, "norm must be 0, 1 or 2, got 3"),
        ("scale", math.inf, "scale must be finite, got inf"),
        ("norm_eps", -1e-5, "norm_eps must be finite and at least 0, got -1e-05"),
        ("norm_eps", math.nan, "norm_eps must be finite and at least 0, got nan"),
    ]
    pool_backward = [
        ("grad", torch.randn(1, H, M, D), "grad must be of shape (2, 4, 6, 8), got (1, 4, 6, 8)"),
        ("grad_lse", torch.randn(B, H, M).double(), "grad_lse must be torch.float32, got torch.float64"),
        ("pooled", torch.randn(B, H, M, D).half(), "pooled must be torch.float32, got torch.float16"),
        ("lse", torch.randn(B, M, H), "lse must be of shape (2, 4, 6), got (2, 6, 4)"),
    ]
    return {
        "rope": rope,
        "rope_qk": rope_qk,
        "rope_table_grad": [case for case in rope if case[0] != "sin"] + grad,
        "rope_attention": attention,
        "rope_attention_backward": attention + backward,
        "late_cls_pool": pool,
        "late_cls_pool_backward": pool + pool_backward,
    }[name]


@pytest.mark.parametrize(
    ("name", "argument", "value", "text"), [(name, *case) for name in OPERATORS for case in wrong(name)]
)
def test_message_says_what_was_expected_and_what_came(name, argument, value, text):
    arguments = {**OPERATORS[name][1](), argument: value}
    said = check_same(name, arguments)
    assert said is not None
    assert said.startswith(f"{name}: ")
    assert text in said


def test_tables_missing_altogether_with_rotate():
    arguments = {**attention_arguments(), **dict.fromkeys(("cos_q", "sin_q", "cos_k", "sin_k"))}
    said = check_same("rope_attention", arguments)
    assert said == "rope_attention: rotate_q must be None where there are no tables, got a tensor"
    arguments["rotate_q"] = arguments["rotate_k"] = None
    assert check_same("rope_attention", arguments) is None


@pytest.mark.parametrize("name", OPERATORS)
@hypothesis.given(data=st.data())
@examples(300)
def test_anything_wrong_is_refused_alike(name, data):
    """One or two arguments replaced by something of another shape, dtype or value."""
    arguments = OPERATORS[name][1]()
    for argument in data.draw(st.lists(st.sampled_from(list(arguments)), min_size=1, max_size=2, unique=True)):
        value = arguments[argument]
        if isinstance(value, torch.Tensor):
            shape = data.draw(st.one_of(st.just(tuple(value.shape)), st.sampled_from(SHAPES)))
            dtype = data.draw(st.one_of(st.just(value.dtype), st.sampled_from(ALL_DTYPES)))
            required = argument in REQUIRED or (name == "rope_qk" and argument.startswith(("cos", "sin")))
            optional = name not in ("rope", "rope_table_grad") and not required
            arguments[argument] = data.draw(st.sampled_from([torch.zeros(shape).to(dtype), None][: 1 + optional]))
        elif isinstance(value, bool):
            arguments[argument] = not value
        else:
            arguments[argument] = data.draw(st.sampled_from(BAD_NUMBERS[argument]))
    check_same(name, arguments)


def test_numbers_beyond_32_bit_lengths_are_refused():
    x = torch.empty(1, 1, 1, 1).expand(1, 1, 2**31, 1)
    cos = torch.empty(1, 1).expand(2**31, 1)
    for q in (x, x.expand(1, 1, 2**31, 2)):
        with pytest.raises(RuntimeError, match="must be of at most 2147483647 tokens, got 2147483648"):
            ops.rope(q, cos, cos, None, True, False)
    with pytest.raises(RuntimeError, match="x must be of at most 2147483647 tokens, got 2147483648"):
        ops.late_cls_pool(x[0], x[:, :, :1], None, None, None, 1.0, 0, 0.0)


def test_another_device_is_refused():
    x, cos = torch.randn(B, H, N, D, device="meta"), torch.randn(N, P)
    with pytest.raises(RuntimeError, match="cos must be on another device, got cpu"):
        ops.rope(x, cos, cos, None, True, False)
    with pytest.raises(RuntimeError, match="query must be on another device, got cpu"):
        ops.late_cls_pool(x[:, 0], torch.randn(1, 1, 1, D), None, None, None, 1.0, 0, 0.0)


class TestPublicFunctions:
    rotary = RotaryEmbedding(4)(N)
    q = torch.randn(B, H, N, D)
    k = torch.randn(B, H, M, D)

    def test_rotary_must_be_a_rotary(self):
        with pytest.raises(TypeError, match="apply_rope: rotary must be a Rotary, got tuple"):
            apply_rope(self.q, (self.rotary.cos, self.rotary.sin))
        with pytest.raises(TypeError, match="rope_attention: rotary must be a Rotary, got Tensor"):
            rope_attention(self.q, self.q, self.q, self.rotary.cos)
        with pytest.raises(TypeError, match="rope_attention: rotary_k must be a Rotary, got str"):
            rope_attention(self.q, self.q, self.q, self.rotary, rotary_k="none")

    def test_modes(self):
        for mode in ("Mask", "", None, 2):
            with pytest.raises(ValueError, match="cls_rope must be 'rotate', 'skip' or 'mask', got"):
                rope_attention(self.q, self.q, self.q, self.rotary, cls_rope=mode)

    def test_key_tables_are_needed_where_lengths_differ(self):
        with pytest.raises(
            ValueError, match="rotary_k must be given where lengths differ, got None at 5 queries and 6 keys"
        ):
            rope_attention(self.q, self.k, self.k, self.rotary)
        with pytest.raises(ValueError, match="rotary must be given with rotary_k, got None"):
            rope_attention(self.q, self.k, self.k, rotary_k=self.rotary)

    def test_layouts_must_agree(self):
        other = Rotary(self.rotary.cos, self.rotary.sin, None, interleaved=False)
        with pytest.raises(ValueError, match="interleaved of rotary and rotary_k must be the same, got True and False"):
            rope_attention(self.q, self.q, self.q, self.rotary, rotary_k=other)

    def test_a_table_of_another_length_is_never_sliced(self):
        with pytest.raises(RuntimeError, match="cos must be of shape"):
            apply_rope(self.q, RotaryEmbedding(4)(N + 1))
        with pytest.raises(RuntimeError, match="cos_q must be of shape"):
            rope_attention(self.q, self.q, self.q, RotaryEmbedding(4)(N + 1))

    def test_tensors_of_too_few_axes(self):
        for shape in ((), (3,), (3, 4), (2, 3, 4)):
            t = torch.randn(shape)
            with pytest.raises(RuntimeError, match=r"q must be of shape \(batch, heads, tokens, head_dim\)"):
                rope_attention(t, t, t)
            with pytest.raises(RuntimeError, match=r"x must be of shape \(batch, heads, tokens, head_dim\)"):
                apply_rope(t, self.rotary)

    def test_norms_of_a_pool(self):
        x, query = torch.randn(B, N, D), torch.randn(1, 1, 1, D)
        for norm in ("batch", "", "Layer", 1):
            with pytest.raises(ValueError, match=f"late_cls_pool: norm must be 'layer', 'rms' or None, got {norm!r}"):
                late_cls_pool(x, query, norm=norm)
        with pytest.raises(RuntimeError, match="norm_weight must be None where norm is 0, got a tensor"):
            late_cls_pool(x, query, norm_weight=torch.ones(D))
        with pytest.raises(RuntimeError, match="norm_eps must be finite and at least 0, got -1"):
            late_cls_pool(x, query, norm="rms", norm_eps=-1.0)

    def test_pools_of_too_few_axes(self):
        for shape in ((), (3,), (3, 4), (1, 2, 3, 4)):
            with pytest.raises(RuntimeError, match=r"x must be of shape \(batch, tokens, channels\), got"):
                late_cls_pool(torch.randn(shape), self.q)

    def test_dropout_out_of_range(self):
        for p in (-0.1, 1.1, math.nan):
            with pytest.raises(RuntimeError, match="dropout_p must be between 0 and 1, got"):
                rope_attention(self.q, self.q, self.q, dropout_p=p)


def test_unknown_names_of_the_package():
    with pytest.raises(AttributeError, match="module 'x_rope_cls' has no attribute 'Enkoder'"):
        _ = x_rope_cls.Enkoder
    assert "Encoder" in dir(x_rope_cls)


def test_without_x_transformers(monkeypatch):
    """The operators work; the parts for x-transformers say what is missing."""
    for name in [
        name for name in sys.modules if name.split(".")[0] == "x_transformers" or name.startswith("x_rope_cls.xt")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "x_transformers", None)
    monkeypatch.delattr(x_rope_cls, "xt", raising=False)
    for name in ("Encoder", "swap_", "explain"):
        with pytest.raises(ImportError, match=f"x_rope_cls.{name} needs x-transformers, which is not installed"):
            getattr(x_rope_cls, name)
    namespace: dict[str, Any] = {}
    exec("from x_rope_cls import *", namespace)
    assert "rope_attention" in namespace
