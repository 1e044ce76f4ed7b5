"""ViTransformerWrapper: equal to x-transformers' own where that has the options, else to its parts put together."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import x_rope_cls

pytest.importorskip("x_transformers")
import x_transformers
import xt_emulation
from xt_cases import one_thread  # noqa: F401  (used by every test)

DIM, PATCH = 32, 4
MODES = ("rotate", "skip", "mask")
ALL = {"num_memory_tokens": 2, "use_cls_token": True, "num_cls_tokens": 2, "num_register_tokens": 3}


def _encoder(package: Any = x_transformers, **options: Any) -> Any:
    base = {"dim": DIM, "depth": 2, "heads": 4, "attn_dim_head": 8, "ff_mult": 2, "rotary_pos_emb": True}
    encoder = package.Encoder(**base, verbose=False, **options)
    xt_emulation.exact_softmax(encoder)
    return encoder


def _set_weights(model: nn.Module) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(i)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1))
    return model.double().eval()


def _vit(cls_rope: str | None = "rotate", image_size: Any = (8, 12), **options: Any) -> Any:
    options = {"num_classes": 5, "attn_layers": _encoder(), **options}
    return _set_weights(
        x_rope_cls.ViTransformerWrapper(image_size=image_size, patch_size=PATCH, cls_rope=cls_rope, **options)
    )


def _images(height: int = 8, width: int = 12, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("options", [{}, {"post_emb_norm": True, "channels": 1}, {"num_classes": None}])
def test_parity(registers: int, options: dict[str, Any]) -> None:
    options = {"image_size": 12, "patch_size": PATCH, "num_register_tokens": registers, "num_classes": 5, **options}
    theirs = _set_weights(x_transformers.ViTransformerWrapper(attn_layers=_encoder(), **options))
    ours = _set_weights(x_rope_cls.ViTransformerWrapper(attn_layers=_encoder(), cls_rope="rotate", **options))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for size in ((12, 12), (8, 12), (4, 4)):
        images = torch.randn(2, options.get("channels", 3), *size, dtype=torch.float64)
        _close(ours(images), theirs(images))
        _close(ours(images, return_embeddings=True), theirs(images, return_embeddings=True))
        both, expected = (m(images, return_logits_and_embeddings=True) for m in (ours, theirs))
        for a, b in zip(both, expected, strict=True):
            _close(a, b)
        _close(ours(images, True), theirs(images, True))
    (ours(images).sum() + theirs(images).sum()).backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-8, msg=name)


def test_initial_weights() -> None:
    models = []
    for package in (x_transformers, x_rope_cls):
        torch.manual_seed(4)
        options = {"image_size": 12, "patch_size": PATCH, "num_register_tokens": 2, "num_classes": 5}
        models.append(package.ViTransformerWrapper(attn_layers=_encoder(package), **options))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def _angles(kind: str, rows: int, columns: int, front: int, back: int) -> tuple[Tensor, Tensor]:
    """Angles (1, tokens, 8) and which tokens have a position, by hand."""
    frequencies = [1.0, 10000.0**-0.5]
    patches = []
    for i in range(rows):
        for j in range(columns):
            if kind == "axial":
                angles = [axis * f for axis in (i, j) for f in frequencies]
            else:
                angles = [(front + i * columns + j) * f for f in frequencies]
            patches.append([a for a in angles for _ in range(2)])
    width = len(patches[0])
    if kind == "axial":
        before, after = [[0.0] * width] * front, [[0.0] * width] * back
    else:
        at = lambda t: [t * f for f in frequencies for _ in range(2)]  # noqa: E731
        before = [at(t) for t in range(front)]
        after = [at(front + rows * columns + t) for t in range(back)]
    rotate = torch.tensor([False] * front + [True] * (rows * columns) + [False] * back)
    return torch.tensor([before + patches + after], dtype=torch.float64), rotate


def _expected(
    model: Any, kind: str, cls_rope: str, images: Tensor, mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """Output for [memory, CLS, patches, registers] of x-transformers' encoder with the pair rules patched into it."""
    rows, columns = images.shape[2] // PATCH, images.shape[3] // PATCH
    patches = [
        images[:, :, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH].permute(0, 2, 3, 1).flatten(1)
        for i in range(rows)
        for j in range(columns)
    ]
    x = model.patch_to_embedding(torch.stack(patches, dim=1))
    if model.pos_embedding is not None:
        x = x + model.pos_embedding[:, : x.shape[1]]
    names = ("memory_tokens", "cls_token", "register_tokens")
    memory, cls, registers = (
        torch.zeros(0, DIM) if getattr(model, name, None) is None else getattr(model, name) for name in names
    )
    x = torch.cat([*(t.double().expand(len(x), -1, -1) for t in (memory, cls)), x, registers.expand(len(x), -1, -1)], 1)
    front, back = len(memory) + len(cls), len(registers)
    freqs, rotate = _angles(kind, rows, columns, front, back)
    encoder = _encoder().double().eval()
    encoder.load_state_dict(model.attn_layers.state_dict())
    if mask is not None:
        mask = F.pad(mask, (front, back), value=True)
    rule = xt_emulation.emulated(cls_rope, rotate, monkeypatch, 4) if cls_rope != "rotate" else nullcontext()
    with rule:
        out: Tensor = encoder(x, mask=mask, rotary_pos_emb=(freqs, 1.0))
    return out


@pytest.mark.parametrize("cls_rope", MODES)
@pytest.mark.parametrize("kind", ["1d", "axial"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options", [ALL, {"use_cls_token": True}, {"num_memory_tokens": 2, "num_register_tokens": 1}, {}]
)
def test_against_parts(
    options: dict[str, Any], masked: bool, kind: str, cls_rope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within what frequencies computed in float32 allow."""
    model = _vit(cls_rope, patch_rotary=kind, **options)
    images = _images()
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 0, 1]]).bool() if masked else None
    expected = _expected(model, kind, cls_rope, images, mask, monkeypatch)
    memory = options.get("num_memory_tokens", 0)
    front = memory + (options.get("num_cls_tokens", 1) if "use_cls_token" in options else 0)
    patches = expected[:, front : front + 6]

    (logits, embeddings), intermediates = model(
        images, return_logits_and_embeddings=True, return_intermediates=True, mask=mask
    )
    _close(embeddings, patches, 1e-5)
    _close(intermediates.last_hidden, expected, 1e-5)
    _close(intermediates.last_layer_hiddens, patches, 1e-5)
    parts = {
        "memory_tokens": expected[:, :memory],
        "cls_tokens": expected[:, memory:front],
        "register_tokens": expected[:, front + 6 :],
    }
    for name, part in parts.items():
        got = getattr(intermediates, name)
        assert got is None if part.shape[1] == 0 else got is not None, name
        if got is not None:
            _close(got, part, 1e-5)
    if front > memory:
        _close(logits, model.mlp_head(parts["cls_tokens"]).squeeze(1), 1e-5)
    else:
        present = torch.ones(2, 6).bool() if mask is None else mask
        means = [row[there].mean(dim=0) for row, there in zip(patches, present, strict=True)]
        _close(logits, model.mlp_head(torch.stack(means)), 1e-5)
    _close(model(images, mask=mask), logits)


@pytest.mark.parametrize("options", [{}, {"num_memory_tokens": 2, "num_register_tokens": 3}])
@pytest.mark.parametrize(("tokens", "depth"), [(1, 1), (3, 2)])
def test_pool(options: dict[str, Any], tokens: int, depth: int) -> None:
    model = _vit("mask", attn_pool=True, num_pooled_tokens=tokens, attn_pool_depth=depth, **options)
    images, mask = _images(), torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 0, 1]]).bool()
    pooled = model.attn_pool(model(images, return_embeddings=True, mask=mask), mask=mask)
    assert pooled.shape == (2, tokens, DIM)
    logits, intermediates = model(images, mask=mask, return_intermediates=True)
    _close(intermediates.attn_pooled_tokens, pooled)
    _close(logits, model.mlp_head(pooled).squeeze(1))
    assert logits.shape == ((2, 5) if tokens == 1 else (2, 3, 5))
    changed = images.clone()
    changed[0, :, 0:4, 8:12] = torch.randn(3, 4, 4)  # a masked patch
    changed[1, :, 0:4, 4:8] = torch.randn(3, 4, 4)
    _close(model(changed, mask=mask), logits)
    assert (model(changed) - model(images)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["1d", "axial"])
def test_masked_patches_change_nothing(kind: str) -> None:
    model = _vit("mask", patch_rotary=kind, num_register_tokens=2, num_memory_tokens=1)
    images, mask = _images(), torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 0, 1, 1, 1]]).bool()
    changed = images.clone()
    changed[:, :, 0:4, 8:12] = torch.randn(2, 3, 4, 4)
    _close(model(changed, mask=mask), model(images, mask=mask))
    nothing = model(images, mask=torch.zeros_like(mask))
    assert nothing.isfinite().all()


def test_where_the_grid_starts() -> None:
    """With the axial rotation and no absolute embedding, "mask" does not see where the patches are, "skip" does."""

    class Shifted(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.axial, self.by = x_rope_cls.AxialRotaryEmbedding(8).double(), by

        def forward(self, grid: tuple[int, int]) -> Any:
            rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
            return self.axial(torch.stack((rows.flatten(), columns.flatten()), dim=-1) + self.by)

    images = _images()
    for cls_rope in MODES:
        here, there = (
            _vit(cls_rope, patch_rotary=Shifted(by), use_abs_pos_emb=False, **ALL)(images) for by in (0.0, 5.0)
        )
        assert ((here - there).abs().max() < 1e-9) == (cls_rope == "mask"), cls_rope


def test_any_image_size_without_absolute_embeddings() -> None:
    model = _vit("mask", image_size=8, patch_rotary="axial", use_abs_pos_emb=False, **ALL)
    assert "pos_embedding" not in model.state_dict()
    assert model(_images(20, 4)).shape == (2, 2, 5)
    assert model(_images(8, 24), return_embeddings=True).shape == (2, 12, DIM)


def test_learned_rotation_gets_gradients() -> None:
    rotation = x_rope_cls.LearnedRotaryEmbedding(8, num_axes=2, heads=4)
    model = _vit("mask", patch_rotary=rotation, **ALL)
    model(_images()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_no_classes() -> None:
    """Then what logits would come from is returned, as x-transformers does."""
    model = _vit("mask", num_classes=None, **ALL)
    out, intermediates = model(_images(), return_intermediates=True)
    _close(out, intermediates.cls_tokens)


def test_intermediates_hold_attention_maps() -> None:
    model = _vit("mask", **ALL)
    _, intermediates = model(_images(), return_intermediates=True)
    maps = [each.post_softmax_attn for each in intermediates.attn_intermediates]
    assert [m.shape for m in maps] == [(2, 4, 13, 13)] * 2
    _close(maps[0].sum(dim=-1), torch.ones(2, 4, 13, dtype=torch.float64))
