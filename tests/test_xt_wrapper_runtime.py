"""The wrappers in use: torch.compile, copies, gradients, training, explain and swap_, bad input."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import x_rope_cls

pytest.importorskip("x_transformers")
import x_transformers
import xt_cases
from xt_cases import one_thread  # noqa: F401  (used by every test)

FLASH: dict[str, Any] = {**xt_cases.BASE, "attn_flash": True}


def _encoder(**options: Any) -> Any:
    return x_rope_cls.Encoder(**FLASH, **options)


def _without_flash() -> Any:
    return x_rope_cls.Encoder(**xt_cases.BASE)


def _text(encoder: Any = None, **options: Any) -> Any:
    layers = _encoder() if encoder is None else encoder
    return x_rope_cls.TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=layers, **options)


def _vit(encoder: Any = None, **options: Any) -> Any:
    layers = _encoder() if encoder is None else encoder
    sizes = {"image_size": 8, "patch_size": 4, "num_classes": 3, **options}
    return x_rope_cls.ViTransformerWrapper(attn_layers=layers, **sizes)


CLS = {"num_memory_tokens": 2, "use_cls_token": True}
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]]).bool()


@pytest.mark.parametrize(
    ("options", "call"),
    [
        (CLS, {"mask": MASK, "pos": torch.arange(6) + 3}),
        ({"num_memory_tokens": 2, "attn_pool": True}, {"mask": MASK, "seq_start_pos": torch.tensor([0, 2])}),
        ({"average_pool_embed": True, "num_memory_tokens": 2}, {"prepend_embeds": torch.randn(2, 3, 32), "mask": MASK}),
        ({"ff_deep_embed": True, "use_cls_token": True}, {"return_embeddings": True}),
    ],
)
def test_compile_text(options: dict[str, Any], call: dict[str, Any]) -> None:
    model = _text(**options).eval()
    ids = torch.randint(0, 20, (2, 6))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, **call), model(ids, **call))


@pytest.mark.parametrize(("rotary", "backend"), [("1d", "aot_eager"), ("axial", "inductor")])
def test_compile_vit(rotary: str, backend: str) -> None:
    model = _vit(**CLS, num_register_tokens=1, patch_rotary=rotary).eval()
    images, mask = torch.randn(2, 3, 8, 8), torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]]).bool()
    expected = model(images, mask=mask)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(images, mask=mask), expected)


@pytest.mark.parametrize("late_cls", [None, "class_attention", "join"])
def test_export_and_low_precision(late_cls: str | None) -> None:
    encoder = _encoder(late_cls=late_cls)
    text, vit = _text(encoder, **CLS).eval(), _vit(_encoder(late_cls=late_cls), **CLS, patch_rotary="axial").eval()
    ids, images = torch.randint(0, 20, (2, 6)), torch.randn(2, 3, 8, 8)
    exported = torch.export.export(vit, (images,)).module()
    torch.testing.assert_close(exported(images), vit(images))
    expected, expected_vit = text(ids, pos=torch.arange(6) + 1000), vit(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = text(ids, pos=torch.arange(6) + 1000), vit(images)
    half = text.bfloat16()(ids, pos=torch.arange(6) + 1000), vit.bfloat16()(images.bfloat16())
    for a, b in (autocast, half):
        torch.testing.assert_close(a.float(), expected, rtol=0.05, atol=0.05)
        torch.testing.assert_close(b.float(), expected_vit, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "model",
    [
        _text(_without_flash(), **CLS, post_emb_norm=True),
        _vit(_without_flash(), **CLS, num_register_tokens=2, patch_rotary="axial"),
        _vit(_without_flash(), attn_pool=True, num_memory_tokens=2),
    ],
    ids=["text", "vit", "vit_pool"],
)
def test_copies_and_gradients(model: Any) -> None:
    """Without attn_flash, with which x-transformers cannot be pickled."""
    inputs = torch.randint(0, 20, (2, 6)) if hasattr(model, "token_emb") else torch.randn(2, 3, 8, 8)
    expected = model.eval()(inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(inputs), expected)
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    model(inputs).square().sum().backward()
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), "forward keeps nothing on modules"
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unused == []


def test_encoders_that_are_accepted() -> None:
    plain = x_transformers.Encoder(**FLASH)
    model = _text(plain, **CLS)
    assert model.attn_layers is plain
    assert type(plain) is x_rope_cls.Encoder
    assert (plain.cls_rope, plain.num_prefix_tokens, plain.num_suffix_tokens) == ("mask", 3, 0)

    model = _text(_encoder(cls_rope="skip"), **CLS)
    assert (model.attn_layers.cls_rope, model.attn_layers.num_prefix_tokens) == ("skip", 3)
    assert _text(_encoder(cls_rope="skip"), **CLS, cls_rope="rotate").attn_layers.cls_rope == "rotate"
    assert _text(_encoder(num_prefix_tokens=5), **CLS).attn_layers.num_prefix_tokens == 5
    rotate = torch.arange(9) > 4
    assert torch.equal(_text(_encoder(rotate=rotate), **CLS).attn_layers.rotate, rotate)

    encoder = _vit(**CLS, num_register_tokens=4).attn_layers
    assert (encoder.num_prefix_tokens, encoder.num_suffix_tokens) == (3, 4)


@pytest.mark.parametrize("make", [_text, _vit])
def test_explain_and_swap(make: Any) -> None:
    model = make(**CLS)
    report = x_rope_cls.explain(model)
    assert report.fused
    assert not any("swap_()" in note for note in report.notes), report
    assert any("3 in front, 0 at the end" in note for note in report.notes), report
    x_rope_cls.swap_(model, "skip")
    assert (model.attn_layers.cls_rope, model.attn_layers.num_prefix_tokens) == ("skip", 3)
    model.attn_layers.num_prefix_tokens = 1
    assert any("swap_()" in note for note in x_rope_cls.explain(model).notes)


def test_explain_rotation_of_patches() -> None:
    model = _vit(x_rope_cls.Encoder(**{**FLASH, "rotary_pos_emb": False}), **CLS, patch_rotary="axial")
    notes = x_rope_cls.explain(model).notes
    assert not any("nothing is rotated" in note for note in notes)
    assert any("AxialRotaryEmbedding" in note for note in notes)
    plain = _vit(x_rope_cls.Encoder(**{**FLASH, "rotary_pos_emb": False}), cls_rope="rotate")
    assert any("nothing is rotated" in note for note in x_rope_cls.explain(plain).notes)


@pytest.mark.parametrize("kind", ["1d", "axial"])
@pytest.mark.parametrize("head", [CLS, {"attn_pool": True, "num_memory_tokens": 2}, {"num_register_tokens": 2}])
def test_learns_shapes(kind: str, head: dict[str, Any]) -> None:
    """Horizontal bars, vertical bars and crosses, anywhere in a noisy image."""
    torch.manual_seed(0)
    images, labels = [], []
    for _ in range(96):
        label, image = int(torch.randint(3, ())), torch.randn(16, 16) * 0.3
        i, j = (int(torch.randint(16, ())) for _ in range(2))
        if label != 1:
            image[i] += 2
        if label != 0:
            image[:, j] += 2
        images.append(image[None])
        labels.append(label)
    x, y = torch.stack(images), torch.tensor(labels)
    model = _vit(image_size=16, channels=1, patch_rotary=kind, **head)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (model(x).argmax(dim=-1) == y).float().mean() > 0.9


def _ids() -> torch.Tensor:
    return torch.zeros(2, 6, dtype=torch.long)


@pytest.mark.parametrize(
    ("options", "call", "error", "message"),
    [
        ({"attn_layers": torch.nn.Linear(2, 2)}, None, TypeError, "attn_layers must be an x_transformers Encoder"),
        ({"use_cls_token": True, "attn_pool": True}, None, ValueError, "attn_pool must be False with use_cls_token"),
        ({"use_cls_token": True, "num_cls_tokens": 0}, None, ValueError, "num_cls_tokens must be at least 1, got 0"),
        ({"num_memory_tokens": -1}, None, ValueError, "num_memory_tokens must be at least 0, got -1"),
        ({"average_pool_embed": True, "attn_pool": True}, None, ValueError, "attn_pool must be False with average"),
        ({"tie_embedding": True, "emb_dim": 16}, None, ValueError, "emb_dim must be 32"),
        ({"num_output_heads": 2, "mixture_of_softmax": True}, None, ValueError, "num_output_heads must be 1"),
        (
            {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 2},
            None,
            ValueError,
            "memory_tokens_interspersed_every must be None",
        ),
        ({"cls_rope": "none"}, None, ValueError, "cls_rope must be one of"),
        ({}, {"x": None}, ValueError, "prepend_embeds must be given where x is None"),
        ({}, {"x": torch.zeros(6)}, ValueError, r"x must be of shape \(batch, tokens\), got \(6,\)"),
        ({}, {"mask": torch.ones(2, 5).bool()}, ValueError, r"mask must be of shape \(2, 6\), got \(2, 5\)"),
        ({}, {"mask": torch.ones(2, 6)}, TypeError, "mask must be bool, got torch.float32"),
        ({}, {"prepend_mask": torch.ones(2, 1).bool()}, ValueError, "prepend_mask must be None without"),
        (
            {},
            {"prepend_embeds": torch.ones(2, 3, 16)},
            ValueError,
            r"prepend_embeds must be of shape \(2, prepended, 32",
        ),
        (CLS, {"pos": torch.arange(5)}, ValueError, r"pos must be of shape \(6,\) or \(2, 6\), got \(5,\)"),
        (CLS, {"pos": torch.zeros(3, 6).long()}, ValueError, r"pos must be of shape \(6,\) or \(2, 6\), got \(3, 6\)"),
        (CLS, {"pos": torch.zeros(2, 6, 16)}, ValueError, r"pos must be of shape \(2, 6, 32\), got \(2, 6, 16\)"),
        (CLS, {"pos": torch.ones(6).bool()}, TypeError, "pos must be real numbers"),
        (
            {},
            {"seq_start_pos": torch.zeros(3).long()},
            ValueError,
            r"seq_start_pos must be of shape \(2,\), got \(3,\)",
        ),
        (CLS, {"rotate": torch.ones(6)}, TypeError, "rotate must be bool"),
        (CLS, {"rotate": torch.ones(4).bool()}, ValueError, "rotate must be of length 9, got 4"),
        (
            CLS,
            {"rotary_pos_emb": (torch.zeros(1, 4, 4), 1.0)},
            ValueError,
            "rotary_pos_emb must have a row for each of 9",
        ),
        (CLS, {"attn_mask": torch.ones(5, 5).bool()}, ValueError, r"attn_mask must have 6 tokens, got shape \(5, 5\)"),
        (CLS, {"self_attn_kv_mask": torch.ones(2, 8).bool()}, ValueError, "self_attn_kv_mask must have 6 tokens"),
        ({}, {"sum_embeds": torch.ones(2, 5, 32)}, ValueError, r"sum_embeds must be of shape \(2, 6, 32\), got"),
        ({}, {"cache": 1}, ValueError, "cache must be None"),
        ({}, {"return_next_embed_pred": True}, ValueError, "return_next_embed_pred must be False without"),
        (
            {"return_only_embed": True},
            {"return_logits_and_embeddings": True},
            ValueError,
            "return_logits_and_embeddings must be False where only embeddings",
        ),
    ],
)
def test_bad_input_text(options: dict[str, Any], call: dict[str, Any] | None, error: type, message: str) -> None:
    options = {"num_tokens": 20, "max_seq_len": 16, "attn_layers": _encoder(), **options}
    if call is None:
        with pytest.raises(error, match=f"^(TransformerWrapper|Encoder): {message}"):
            x_rope_cls.TransformerWrapper(**options)
        return
    model = x_rope_cls.TransformerWrapper(**options)
    with pytest.raises(error, match=f"^(TransformerWrapper|Encoder): {message}"):
        model(**{"x": _ids(), **call})


def test_float_positions_and_the_absolute_embedding() -> None:
    model = _text(_encoder(disable_abs_pos_emb=False), **CLS)
    with pytest.raises(TypeError, match="TransformerWrapper: pos must be integers for the absolute position embedding"):
        model(_ids(), pos=torch.arange(6) * 0.5)


def test_cls_without_any_rotation() -> None:
    model = _text(x_rope_cls.Encoder(**{**FLASH, "rotary_pos_emb": False}), **CLS)
    with pytest.raises(ValueError, match="Encoder: rotary_pos_emb must be True or passed to forward"):
        model(_ids())


@pytest.mark.parametrize(
    ("options", "call", "error", "message"),
    [
        ({"attn_layers": torch.nn.Linear(2, 2)}, None, TypeError, "attn_layers must be an x_transformers Encoder"),
        ({"image_size": 9}, None, ValueError, "image_size must be a multiple of patch_size 4, got 9"),
        ({"image_size": (8, 8, 8)}, None, ValueError, r"image_size must be an integer or \(height, width\)"),
        ({"patch_size": 0}, None, ValueError, "patch_size must be at least 1, got 0"),
        ({"num_memory_tokens": -1}, None, ValueError, "num_memory_tokens must be at least 0, got -1"),
        ({"use_cls_token": True, "num_cls_tokens": 0}, None, ValueError, "num_cls_tokens must be at least 1, got 0"),
        ({"use_cls_token": 1}, None, TypeError, "use_cls_token must be a bool, got 1"),
        ({"use_cls_token": True, "attn_pool": True}, None, ValueError, "attn_pool must be False with use_cls_token"),
        ({"patch_rotary": "2d"}, None, ValueError, "patch_rotary must be one of"),
        ({}, {"img": torch.zeros(2, 3, 8, 9)}, ValueError, "img must be of shape"),
        ({}, {"img": torch.zeros(2, 3, 12, 8)}, ValueError, "img must have at most 4 patches"),
        ({}, {"mask": torch.ones(2, 5).bool()}, ValueError, r"mask must be of shape \(2, 4\), got \(2, 5\)"),
        ({}, {"mask": torch.ones(2, 4)}, TypeError, "mask must be bool, got torch.float32"),
        (
            {},
            {"return_embeddings": True, "return_logits_and_embeddings": True},
            ValueError,
            "return_embeddings must be False with return_logits_and_embeddings",
        ),
        ({"patch_rotary": torch.nn.Identity()}, {}, ValueError, "patch_rotary must make a Rotary with 4 rows"),
        (
            {"patch_rotary": x_rope_cls.AxialRotaryEmbedding(8, num_prefix_tokens=1)},
            {},
            ValueError,
            r"patch_rotary must make a Rotary with 4 rows, got \(5, 4\)",
        ),
    ],
)
def test_bad_input_vit(options: dict[str, Any], call: dict[str, Any] | None, error: type, message: str) -> None:
    options = {"image_size": 8, "patch_size": 4, "attn_layers": _encoder(), **options}
    if call is None:
        with pytest.raises(error, match=f"^ViTransformerWrapper: {message}"):
            x_rope_cls.ViTransformerWrapper(**options)
        return
    model = x_rope_cls.ViTransformerWrapper(**options)
    with pytest.raises(error, match=f"^ViTransformerWrapper: {message}"):
        model(**{"img": torch.zeros(2, 3, 8, 8), **call})
