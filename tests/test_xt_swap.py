"""swap_ on x-transformers' models, explain, state dicts, copies, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

import x_rope_cls

pytest.importorskip("x_transformers")
import x_transformers
import x_transformers.x_transformers as xt
import xt_cases as cases
from xt_cases import one_thread  # noqa: F401  (used by every test)

from x_rope_cls.xt import version
from x_rope_cls.xt.explain import _cuda_kernels, _widest_head

OPTIONS: dict[str, Any] = {**cases.BASE, "attn_flash": True}


def _transformer(encoder_options: dict[str, Any] = OPTIONS, **options: Any) -> Any:
    encoder = x_transformers.Encoder(**encoder_options)
    return x_transformers.TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=encoder, **options).eval()


def _vit(**options: Any) -> Any:
    encoder = x_transformers.Encoder(**OPTIONS)
    return x_transformers.ViTransformerWrapper(image_size=8, patch_size=4, attn_layers=encoder, **options).eval()


def _seen_by_encoder(model: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """What a wrapper hands its encoder."""
    seen: list[Any] = []
    hook = model.attn_layers.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    model(*args, **kwargs)
    hook.remove()
    (args, kwargs) = seen[-1]
    return args[0], kwargs


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({}, 0),
        ({"num_memory_tokens": 3}, 3),
        ({"use_cls_token": True}, 1),
        ({"use_cls_token": True, "num_cls_tokens": 2, "num_memory_tokens": 3}, 5),
        ({"num_cls_tokens": 2}, 0),  # without use_cls_token there are none
        ({"average_pool_embed": True, "num_memory_tokens": 2}, 2),
        ({"recycling": True, "num_memory_tokens": 2}, 2),
    ],
)
def test_transformer_wrapper(options: dict[str, Any], prefix: int) -> None:
    model = _transformer(**options)
    tokens, mask = torch.randint(0, 20, (2, 6)), torch.rand(2, 6) > 0.3
    call = {"mask": mask, **({"recycle_steps": 2} if options.get("recycling") else {})}
    before = model(tokens, **call)
    assert x_rope_cls.swap_(model, cls_rope="rotate") is model
    torch.testing.assert_close(model(tokens, **call), before)

    x_rope_cls.swap_(model)
    encoder = model.attn_layers
    assert (encoder.cls_rope, encoder.num_prefix_tokens, encoder.num_suffix_tokens) == ("mask", prefix, 0)
    x, _ = _seen_by_encoder(model, tokens, **call)
    assert x.shape[1] == prefix + 6
    changed = (model(tokens, **call) - before).abs().max()
    assert (changed > 1e-6) == (prefix > 0)


def test_transformer_wrapper_puts_prepended_embeddings_behind_cls() -> None:
    model = x_rope_cls.swap_(_transformer(use_cls_token=True, num_memory_tokens=2))
    prepended = torch.randn(2, 3, 32)
    x, _ = _seen_by_encoder(model, torch.randint(0, 20, (2, 6)), prepend_embeds=prepended)
    torch.testing.assert_close(x[:, 3:6], prepended)
    assert model.attn_layers.num_prefix_tokens == 3
    x, kwargs = _seen_by_encoder(model, torch.randint(0, 20, (2, 6)), rotate=torch.arange(9) > 0)
    assert kwargs["rotate"].sum() == 8


@pytest.mark.parametrize("registers", [0, 3])
def test_vit_wrapper(registers: int) -> None:
    model = _vit(num_register_tokens=registers, num_classes=5)
    images = torch.randn(2, 3, 8, 8)
    before = model(images)
    x_rope_cls.swap_(model, cls_rope="rotate")
    torch.testing.assert_close(model(images), before)
    x_rope_cls.swap_(model, cls_rope="mask")
    assert (model.attn_layers.num_prefix_tokens, model.attn_layers.num_suffix_tokens) == (0, registers)
    assert ((model(images) - before).abs().max() > 1e-6) == (registers > 0)


def test_other_wrappers() -> None:
    model = x_transformers.ContinuousTransformerWrapper(
        dim_in=5, dim_out=3, max_seq_len=16, attn_layers=x_transformers.Encoder(**OPTIONS), num_memory_tokens=2
    ).eval()
    inputs = torch.randn(2, 6, 5)
    before = model(inputs)
    x_rope_cls.swap_(model, cls_rope="rotate")
    torch.testing.assert_close(model(inputs), before)
    assert x_rope_cls.swap_(model).attn_layers.num_prefix_tokens == 2
    multi = x_transformers.MultiInputTransformerWrapper(
        num_tokens={"a": 7}, max_seq_len=16, attn_layers=x_transformers.Encoder(**OPTIONS), num_memory_tokens=4
    )
    assert x_rope_cls.swap_(multi).attn_layers.num_prefix_tokens == 4
    multi({"a": torch.randint(0, 7, (2, 6))})


def test_given_counts_win() -> None:
    model = _transformer(num_memory_tokens=3)
    x_rope_cls.swap_(model, num_prefix_tokens=1, num_suffix_tokens=2)
    assert (model.attn_layers.num_prefix_tokens, model.attn_layers.num_suffix_tokens) == (1, 2)
    x_rope_cls.swap_(model, rotate=[False] * 3 + [True] * 6)
    assert model.attn_layers.num_prefix_tokens == 0
    by_mask = model(torch.arange(6)[None])
    x_rope_cls.swap_(model)
    torch.testing.assert_close(by_mask, model(torch.arange(6)[None]))


def test_encoder_itself() -> None:
    encoder = x_transformers.Encoder(**OPTIONS)
    x = torch.randn(1, 5, 32)
    before = encoder(x)
    assert x_rope_cls.swap_(encoder, num_prefix_tokens=1) is encoder
    assert isinstance(encoder, x_rope_cls.Encoder)
    assert isinstance(encoder, x_transformers.Encoder)
    x_rope_cls.swap_(encoder, cls_rope="rotate")
    assert encoder.num_prefix_tokens == 1
    torch.testing.assert_close(encoder(x), before)
    x_rope_cls.swap_(encoder, num_prefix_tokens=0, rotate=[False] + [True] * 4)
    x_rope_cls.swap_(encoder, "skip")
    assert encoder.rotate.tolist() == [False, True, True, True, True]


class Louder(x_transformers.Encoder):  # type: ignore[misc]
    """A user's own subclass, with an argument of its own."""

    def forward(self, x: torch.Tensor, *args: Any, loudness: float = 1.0, **kwargs: Any) -> Any:
        return super().forward(x, *args, **kwargs) * loudness


def test_subclass_keeps_its_own_forward() -> None:
    encoder = Louder(**cases.BASE)  # with attn_flash, x-transformers' modules cannot be pickled
    x = torch.randn(1, 5, 32)
    before = encoder(x, loudness=3.0)
    x_rope_cls.swap_(encoder, cls_rope="rotate")
    assert isinstance(encoder, Louder)
    torch.testing.assert_close(encoder(x, loudness=3.0), before)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert isinstance(other, Louder)
        torch.testing.assert_close(other(x, loudness=3.0), before)
        assert x_rope_cls.explain(other).fused


def test_state_dict_both_ways() -> None:
    options = {**OPTIONS, "attn_num_mem_kv": 2, "attn_qk_norm": True, "attn_qk_norm_dim_scale": True}
    theirs = x_transformers.Encoder(**options)
    ours = x_rope_cls.Encoder(**options, rotate=[False, True, True, True, True])
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in ours.named_parameters()]
    x = torch.randn(2, 5, 32)
    ours.cls_rope = "rotate"
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    theirs = x_transformers.Encoder(**options)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def test_copy_pickle_and_save() -> None:
    model = x_rope_cls.swap_(_transformer(cases.BASE, num_memory_tokens=2))
    tokens = torch.randint(0, 20, (2, 6))
    expected = model(tokens)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        torch.testing.assert_close(other(tokens), expected)
        assert other.attn_layers.num_prefix_tokens == 2
        assert x_rope_cls.explain(other).fused


def test_explain_names_every_layer() -> None:
    model = _transformer(num_memory_tokens=2)
    before = x_rope_cls.explain(model)
    assert [row.layer for row in before] == ["attn_layers.layers.0.1", "attn_layers.layers.2.1"]
    assert not before.fused
    assert all("swap_" in row.reason for row in before)

    report = x_rope_cls.explain(x_rope_cls.swap_(model, "skip"))
    assert report.fused
    assert len(report) == 2
    assert report[0].cls_rope == "skip"
    assert report[0].kind == "self"
    assert report[0].backend.startswith("cpu")
    assert "2 of 2 attention layers fused" in str(report)
    assert "2 in front" in str(report)


@pytest.mark.parametrize(
    ("dtype", "dims", "expected"),
    [
        (torch.bfloat16, {"attn_dim_head": 64}, "tensor cores, bfloat16"),
        (torch.float16, {"attn_dim_head": 256}, "tensor cores, float16"),
        (torch.float32, {"attn_dim_head": 64}, "FMA units: float32; tensor cores take bfloat16 and float16"),
        (torch.bfloat16, {"attn_dim_head": 264}, "FMA units: head_dim 264; tensor cores take up to 256"),
        (
            torch.bfloat16,
            {"attn_dim_head": 64, "attn_value_dim_head": 320},
            "FMA units: head_dim 320; tensor cores take up to 256",
        ),
    ],
)
def test_explain_tells_which_cuda_kernels_attend(dtype: torch.dtype, dims: dict[str, int], expected: str) -> None:
    encoder = x_rope_cls.Encoder(dim=32, depth=1, heads=2, rotary_pos_emb=True, attn_flash=True, **dims)
    attention = encoder.layers[0][1]
    assert _cuda_kernels(dtype, _widest_head(attention)) == expected
    if torch.cuda.is_available():
        assert x_rope_cls.explain(encoder.to("cuda", dtype))[0].backend == f"cuda ({expected})"


@pytest.mark.parametrize("name", cases.COMPOSITE_OPTIONS)
def test_explain_names_the_option(name: str) -> None:
    options = cases.COMPOSITE_OPTIONS[name]
    if not cases.known_to_installed_version(options):
        pytest.skip(f"x-transformers {cases.VERSION} does not have this option")
    report = x_rope_cls.explain(x_rope_cls.Encoder(**{**cases.BASE, **options}))
    reasons = " ".join(row.reason for row in report)
    assert any(option in reasons for option in options), reasons
    kinds = {row.kind for row in report if not row.fused}
    assert kinds == ({"cross"} if name in cases.CROSS_ONLY else {"self"})
    for option in set(options) & set(reasons.split()):
        assert option in str(report)


def test_explain_warns_of_tokens_the_encoder_does_not_know() -> None:
    encoder = x_rope_cls.Encoder(**OPTIONS)
    model = x_transformers.TransformerWrapper(num_tokens=5, max_seq_len=9, attn_layers=encoder, num_memory_tokens=2)
    assert "adds 2 tokens in front" in str(x_rope_cls.explain(model))
    assert "adds" not in str(x_rope_cls.explain(x_rope_cls.swap_(model)))


def test_explain_sees_attention_outside_encoders() -> None:
    model = _transformer(attn_pool=True)
    report = x_rope_cls.explain(x_rope_cls.swap_(model))
    assert [(row.kind, row.fused) for row in report] == [("self", True), ("self", True), ("other", False)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cls_rope": "none"}, ValueError, "cls_rope must be"),
        ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens must be at least 0, got -1"),
        ({"num_suffix_tokens": 1.5}, TypeError, "num_suffix_tokens must be an integer, got 1.5"),
        ({"rotate": [1, 0]}, TypeError, "rotate must be bool, got torch.int64"),
        ({"rotate": [[True]]}, ValueError, r"rotate must be of shape \(tokens,\), got \(1, 1\)"),
        ({"rotate": [True], "num_prefix_tokens": 1}, ValueError, "rotate must be None beside token counts"),
        ({"late_cls": "both"}, ValueError, "late_cls must be one of .*, got 'both'"),
        (
            {"rotary_pos_emb": False, "polar_pos_emb": True, "num_prefix_tokens": 1},
            ValueError,
            "cls_rope must be 'rotate' with polar_pos_emb",
        ),
        ({"causal": True}, AssertionError, "causality"),
        ({"no_such_option": True}, AssertionError, "unrecognized"),
    ],
)
def test_refused_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    if not cases.known_to_installed_version({k: v for k, v in options.items() if "polar" in k}):
        pytest.skip(f"x-transformers {cases.VERSION} does not have this option")
    with pytest.raises(error, match=message):
        x_rope_cls.Encoder(**{**cases.BASE, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"rotate": torch.ones(4, dtype=torch.bool)}, ValueError, "rotate must be of length 5, got 4"),
        ({"rotate": torch.ones(5)}, TypeError, "rotate must be bool, got torch.float32"),
        ({"rotary_pos_emb": torch.ones(5)}, TypeError, r"must be a \(freqs, scale\) pair or a Rotary, got Tensor"),
        ({"rotary_pos_emb": (torch.ones(5, 4), 1.0)}, ValueError, r"must be \(1 or batch, tokens, even rotary_dim\)"),
        ({"rotary_pos_emb": (torch.ones(1, 4, 4), 1.0)}, ValueError, "a row for each of 5 tokens, got 4"),
        ({"rotary_pos_emb": (torch.randn(1, 5, 4), 1.0)}, ValueError, "each angle twice"),
    ],
)
def test_refused_calls(call: dict[str, Any], error: type[Exception], message: str) -> None:
    encoder = x_rope_cls.Encoder(**cases.BASE)
    with pytest.raises(error, match=message):
        encoder(torch.randn(1, 5, 32), **call)


def test_refuses_a_choice_without_effect() -> None:
    encoder = x_rope_cls.Encoder(**{**cases.BASE, "rotary_pos_emb": False}, num_prefix_tokens=1)
    x = torch.randn(1, 5, 32)
    with pytest.raises(ValueError, match="rotary_pos_emb must be True or passed to forward for cls_rope='mask'"):
        encoder(x)
    encoder(x, rotary_pos_emb=xt.RotaryEmbedding(4)(torch.arange(5)))
    encoder.cls_rope = "rotate"
    encoder(x)


def test_refuses_too_many_special_tokens() -> None:
    encoder = x_rope_cls.Encoder(**cases.BASE, num_prefix_tokens=4, num_suffix_tokens=2)
    with pytest.raises(ValueError, match=r"must be at most 5 tokens, got 4 \+ 2"):
        encoder(torch.randn(1, 5, 32))


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), x_transformers.Decoder(**cases.BASE)])
def test_swap_refuses_other_models(model: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"swap_: model must be an x_transformers Encoder .*, got {type(model).__name__}"
    ):
        x_rope_cls.swap_(model)


def test_swap_refuses_decoders() -> None:
    model = x_transformers.TransformerWrapper(
        num_tokens=5, max_seq_len=5, attn_layers=x_transformers.Decoder(**cases.BASE)
    )
    with pytest.raises(TypeError, match="attn_layers must be an x_transformers Encoder, got Decoder"):
        x_rope_cls.swap_(model)


def test_failed_swap_changes_nothing() -> None:
    encoder = x_transformers.Encoder(**OPTIONS)
    with pytest.raises(ValueError, match="cls_rope must be"):
        x_rope_cls.swap_(encoder, "no")  # type: ignore[arg-type]
    assert type(encoder) is x_transformers.Encoder
    assert not any(isinstance(m, x_rope_cls.Encoder) for m in encoder.modules())
    encoder(torch.randn(1, 5, 32))


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert version.installed_version() == str(cases.VERSION)
    monkeypatch.setattr(version.metadata, "version", lambda _: "2.10.2")
    with pytest.raises(ImportError, match=r"x-transformers must be at least 2\.11\.23, got 2\.10\.2"):
        version.installed_version()

    def missing(name: str) -> str:
        raise version.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(version.metadata, "version", missing)
    with pytest.raises(ModuleNotFoundError, match=r"x-transformers>=2\.11\.23 must be installed"):
        version.installed_version()


def test_hooks_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any, mask: Any = None, attn_bias: Any = None) -> None: ...

    version.check_hooks(xt.Attention, xt.Attend, xt.AttentionLayers)
    with pytest.raises(ImportError, match=r"Attend\.forward of x-transformers must take prev_attn"):
        version.check_hooks(xt.Attention, Attend, xt.AttentionLayers)
