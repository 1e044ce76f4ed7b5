"""Late CLS in the wrappers: what the encoder gives for their tokens, with CLS where it stands in x-transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import x_rope_cls

pytest.importorskip("x_transformers")
import x_transformers
import xt_cases
from xt_cases import one_thread  # noqa: F401  (used by every test)

KINDS = ("class_attention", "join")
BASE: dict[str, Any] = {**xt_cases.BASE, "depth": 3}
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]]).bool()


def _encoder(late_cls: str | None, **options: Any) -> Any:
    options = {"disable_abs_pos_emb": False, "cls_rope": "mask", **options}
    return x_rope_cls.Encoder(**BASE, late_cls=late_cls, **options)


def _set_weights(model: Any) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(i)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1))
    return model.double().eval()


def _text(late_cls: str | None, encoder: Any = None, **options: Any) -> Any:
    layers = _encoder(late_cls) if encoder is None else encoder
    options = {"num_memory_tokens": 3, "use_cls_token": True, "num_cls_tokens": 2, **options}
    return _set_weights(x_rope_cls.TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=layers, **options))


def _vit(late_cls: str | None, encoder: Any = None, **options: Any) -> Any:
    layers = _encoder(late_cls) if encoder is None else encoder
    options = {"num_memory_tokens": 3, "use_cls_token": True, "num_cls_tokens": 2, "num_register_tokens": 1, **options}
    sizes = {"image_size": (8, 12), "patch_size": 4, "num_classes": 5, **options}
    return _set_weights(x_rope_cls.ViTransformerWrapper(attn_layers=layers, **sizes))


def _ids() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 20, (2, 6))


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def _embeds(model: Any, pos: Tensor | None = None) -> Tensor:
    ids = _ids()
    x = model.token_emb(ids) + model.pos_emb(ids, pos=pos)
    memory = getattr(model, "memory_tokens", None)
    return x if memory is None else torch.cat((memory.expand(2, -1, -1), x), dim=1)


@pytest.mark.parametrize("late_cls", KINDS)
@pytest.mark.parametrize("memory", [0, 3])
@pytest.mark.parametrize("call", ["plain", "mask", "pos", "pos_by_batch", "mems", "start", "deep_embed", "attn_bias"])
def test_text(late_cls: str, memory: int, call: str) -> None:
    model = _text(late_cls, num_memory_tokens=memory, ff_deep_embed=call == "deep_embed")
    assert model.attn_layers.num_prefix_tokens == memory
    kwargs: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    pos: Tensor | None = None
    if call == "mask":
        kwargs, ours = {"mask": F.pad(MASK, (memory, 0), value=True)}, {"mask": MASK}
    elif call.startswith("pos"):
        pos = torch.tensor([2, 3, 5, 7, 8, 9])
        pos = pos if call == "pos" else torch.stack((pos, pos.flip(0)))
        kwargs, ours = {"pos": F.pad(pos, (memory, 0))}, {"pos": pos}
    elif call == "mems":
        kwargs = ours = {"mems": [torch.randn(2, 4, 32, dtype=torch.float64) for _ in range(3)]}
    elif call == "start":
        present = torch.arange(6) >= torch.tensor([[0], [2]])
        kwargs, ours = {"mask": F.pad(present, (memory, 0), value=True)}, {"seq_start_pos": torch.tensor([0, 2])}
        pos = (torch.arange(6) - torch.tensor([[0], [2]])).clamp(min=0)
    elif call == "deep_embed":
        table = torch.cat((model.ff_deep_embed, torch.ones_like(model.ff_deep_embed[:1])))
        kwargs = {"deep_embeds_and_ids": (table, F.pad(_ids(), (memory, 0), value=20))}
    elif call == "attn_bias":
        bias = torch.randn(4, 6, 6, dtype=torch.float64)
        kwargs, ours = {"attn_bias": F.pad(bias, (memory, 0, memory, 0))}, {"attn_bias": bias}
    expected = model.attn_layers(_embeds(model, pos), cls_tokens=model.cls_token, **kwargs)
    cls, memories, tokens = expected.split([2, memory, 6], dim=1)

    logits, intermediates = model(_ids(), return_intermediates=True, **ours)
    _close(logits, model.to_logits(cls))
    _close(intermediates.last_layer_hiddens, tokens)
    _close(model(_ids(), return_embeddings=True, **ours), cls)
    if memory:
        _close(intermediates.memory_tokens, memories)


@pytest.mark.parametrize("late_cls", KINDS)
def test_text_with_prepended_embeddings(late_cls: str) -> None:
    model = _text(late_cls)
    prepended = torch.randn(2, 2, 32, dtype=torch.float64)
    embeds = _embeds(model)
    x = torch.cat((embeds[:, :3], prepended, embeds[:, 3:]), dim=1)
    mask = F.pad(MASK, (5, 0), value=True)
    expected = model.attn_layers(x, cls_tokens=model.cls_token, mask=mask)
    out = model(_ids(), mask=MASK, prepend_embeds=prepended, excise_prepend_embeds=True)
    _close(out, model.to_logits(expected[:, :2]))


@pytest.mark.parametrize("late_cls", KINDS)
def test_recycling(late_cls: str) -> None:
    """What is recycled of CLS goes to CLS, of memory to memory."""
    model = _text(late_cls, recycling=True)
    x, cls = _embeds(model), model.cls_token.expand(2, -1, -1)
    first = model.attn_layers(x, cls_tokens=cls)
    recycled = model.recycled_proj(first)
    second = model.attn_layers(x + recycled[:, 2:], cls_tokens=cls + recycled[:, :2])
    _close(model(_ids(), recycle_steps=2), model.to_logits(second[:, :2]))


@pytest.mark.parametrize("late_cls", KINDS)
def test_one_cls_token_has_no_dimension(late_cls: str) -> None:
    model = _text(late_cls, num_cls_tokens=1)
    assert model(_ids()).shape == (2, 20)
    assert _vit(late_cls, num_cls_tokens=1)(torch.randn(2, 3, 8, 12).double()).shape == (2, 5)


@pytest.mark.parametrize("late_cls", KINDS)
@pytest.mark.parametrize("memory", [0, 3])
@pytest.mark.parametrize("registers", [0, 1])
@pytest.mark.parametrize("rotary", ["1d", "axial"])
@pytest.mark.parametrize("masked", [False, True])
def test_vit(late_cls: str, memory: int, registers: int, rotary: str, masked: bool) -> None:
    model = _vit(late_cls, num_memory_tokens=memory, num_register_tokens=registers, patch_rotary=rotary)
    assert (model.attn_layers.num_prefix_tokens, model.attn_layers.num_suffix_tokens) == (memory, registers)
    images, mask = torch.randn(2, 3, 8, 12).double(), MASK if masked else None
    patches = images.unflatten(2, (2, 4)).unflatten(4, (3, 4)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    x = [model.patch_to_embedding(patches) + model.pos_embedding]
    if memory:
        x.insert(0, model.memory_tokens.expand(2, -1, -1))
    if registers:
        x.append(model.register_tokens.expand(2, -1, -1))
    kwargs: dict[str, Any] = {}
    if masked:
        kwargs["mask"] = F.pad(MASK, (memory, registers), value=True)
    if rotary == "axial":
        tables = x_rope_cls.AxialRotaryEmbedding(8, num_prefix_tokens=memory, num_suffix_tokens=registers)
        kwargs["rotary_pos_emb"] = tables.double()((2, 3))
    expected = model.attn_layers(torch.cat(x, dim=1), cls_tokens=model.cls_token, **kwargs)
    cls, memories, embeds, register = expected.split([2, memory, 6, registers], dim=1)

    (logits, embeddings), intermediates = model(
        images, return_logits_and_embeddings=True, return_intermediates=True, mask=mask
    )
    _close(logits, model.mlp_head(cls))
    _close(embeddings, embeds)
    _close(intermediates.cls_tokens, cls)
    for name, part in (("memory_tokens", memories), ("register_tokens", register)):
        got = getattr(intermediates, name)
        assert (got is None) == (part.shape[1] == 0)
        if got is not None:
            _close(got, part)
    _close(model(images, mask=mask), logits)


@pytest.mark.parametrize("late_cls", KINDS)
def test_attention_maps_of_cls(late_cls: str) -> None:
    model = _text(late_cls)
    _, intermediates = model(_ids(), mask=MASK, return_intermediates=True, need_weights=True)
    maps = intermediates.cls_weights
    assert [m.shape for m in maps] == [(2, 4, 2, 11)] * 2
    for weights in maps:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 2).double(), rtol=0, atol=1e-6)
        assert (weights[0, :, :, -2:] == 0).all()
    with pytest.raises(ValueError, match="need_weights must not be given without late_cls"):
        _text(None)(_ids(), need_weights=True)


@pytest.mark.parametrize("late_cls", KINDS)
@pytest.mark.parametrize("make", [_text, _vit])
def test_parameters(late_cls: str, make: Any) -> None:
    """The same as with CLS from the start, all of them used; the encoder's own CLS tokens are gone."""
    model = make(late_cls)
    assert "attn_layers.late_cls_tokens" not in model.state_dict()
    assert list(model.state_dict()) == list(make(None).state_dict())
    inputs = _ids() if make is _text else torch.randn(2, 3, 8, 12).double()
    outputs = model(inputs, return_logits_and_embeddings=True)
    sum(t.square().sum() for t in outputs).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # What entered with the memory tokens still counts: they are keys of the tokens and of CLS.
    assert unused == []
    torch.testing.assert_close(copy.deepcopy(model)(inputs), model(inputs))


@pytest.mark.parametrize("late_cls", KINDS)
def test_state_dict_of_x_transformers(late_cls: str) -> None:
    options = {"num_tokens": 20, "max_seq_len": 16, "num_memory_tokens": 3, "use_cls_token": True, "num_cls_tokens": 2}
    encoder = x_transformers.Encoder(**BASE, disable_abs_pos_emb=False)
    theirs = x_transformers.TransformerWrapper(attn_layers=encoder, **options)
    _text(late_cls).load_state_dict(theirs.state_dict())
    theirs.load_state_dict(_text(late_cls).state_dict())


@pytest.mark.parametrize("late_cls", KINDS)
@pytest.mark.parametrize("make", [_text, _vit])
def test_swap_and_explain(late_cls: str, make: Any) -> None:
    """CLS from the start, made late in place, is what it would have been if built so."""
    model, built = make(None), make(late_cls)
    inputs = _ids() if make is _text else torch.randn(2, 3, 8, 12).double()
    assert (model(inputs) - built(inputs)).abs().max() > 1e-3
    assert x_rope_cls.swap_(model, late_cls=late_cls) is model
    assert model.attn_layers.num_prefix_tokens == 3
    _close(model(inputs), built(inputs))
    x_rope_cls.swap_(model, "skip")
    assert (model.attn_layers.late_cls, model.attn_layers.num_prefix_tokens) == (late_cls, 3)
    for each in (model, built):
        notes = x_rope_cls.explain(each).notes
        assert not any("swap_()" in note for note in notes), notes
        assert any("CLS tokens passed to forward enter at" in note for note in notes), notes
    with pytest.raises(ValueError, match="late_cls must be None for"):
        x_rope_cls.swap_(make(None, use_cls_token=False), late_cls=late_cls)


@pytest.mark.parametrize("late_cls", KINDS)
def test_compile(late_cls: str) -> None:
    for model, inputs in ((_text(late_cls), _ids()), (_vit(late_cls), torch.randn(2, 3, 8, 12).double())):
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(inputs, mask=MASK), model(inputs, mask=MASK))


@pytest.mark.parametrize("late_cls", KINDS)
def test_shift_of_positions(late_cls: str) -> None:
    model = _text(late_cls, _encoder(late_cls, disable_abs_pos_emb=True))
    pos = torch.tensor([2, 3, 5, 7, 8, 9])
    _close(model(_ids(), pos=pos + 11), model(_ids(), pos=pos))
    assert (model(_ids(), pos=pos.flip(0)) - model(_ids(), pos=pos)).abs().max() > 1e-3


@pytest.mark.parametrize("late_cls", KINDS)
def test_learns_shapes(late_cls: str) -> None:
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
    model = x_rope_cls.ViTransformerWrapper(
        image_size=16,
        patch_size=4,
        channels=1,
        num_classes=3,
        attn_layers=_encoder(late_cls),
        use_cls_token=True,
        num_memory_tokens=2,
        patch_rotary="axial",
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (model(x).argmax(dim=-1) == y).float().mean() > 0.9


@pytest.mark.parametrize("make", [_text, _vit])
def test_bad_input(make: Any) -> None:
    with pytest.raises(ValueError, match="use_cls_token must be True for an encoder with late_cls='join', got False"):
        make("join", use_cls_token=False)
    with pytest.raises(ValueError, match="num_cls_tokens must be 3, as of the encoder, got 2"):
        make("join", _encoder("join", num_cls_tokens=3))
    assert make("join", _encoder("join", num_cls_tokens=3), num_cls_tokens=3).cls_token.shape == (3, 32)


def test_z_loss() -> None:
    with pytest.raises(ValueError, match="return_attn_z_loss must be False with late_cls"):
        _text("join")(_ids(), return_attn_z_loss=True)
