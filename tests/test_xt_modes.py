"""``"skip"`` and ``"mask"`` against x-transformers itself, its rotation and its scores replaced by plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("x_transformers")
import x_transformers.attend as xt_attend
import x_transformers.x_transformers as xt
import xt_cases as cases
from xt_cases import one_thread  # noqa: F401  (used by every test)

TOLERANCE = 1e-9
WITHOUT_ROTATION = ("no_rotary", "polar", "rel_pos_bias", "dynamic_pos_bias")
NAMES = [name for name in cases.ALL_OPTIONS if name not in WITHOUT_ROTATION]
_plain_rotation = xt.apply_rotary_pos_emb


def _rotated(t: Tensor, freqs: Tensor, heads: int) -> Tensor:
    """The last tokens of the last heads rotated; tokens in front (memory key/values) are left as they are."""
    front = max(t.shape[-2] - freqs.shape[-2], 0)
    still, turned = t[:, : t.shape[1] - heads], t[:, t.shape[1] - heads :]
    turned = torch.cat((turned[..., :front, :], _plain_rotation(turned[..., front:, :], freqs)), dim=-2)
    return torch.cat((still, turned), dim=1)


@contextmanager
def emulated(cls_rope: str, rotate: Tensor, monkeypatch: pytest.MonkeyPatch, heads: int) -> Iterator[None]:
    """Makes x-transformers score tokens without a position (rotate False) as cls_rope says."""
    freqs_of: dict[str, Tensor] = {}

    def skip(t: Tensor, freqs: Tensor, scale: float = 1) -> Tensor:
        keep = rotate if freqs.shape[-2] == rotate.shape[-1] else torch.ones(freqs.shape[-2], dtype=torch.bool)
        keep = keep[..., -t.shape[-2] :, None]
        return torch.where(keep if keep.dim() == 2 else keep[:, None], _plain_rotation(t, freqs, scale), t)

    def remember(t: Tensor, freqs: Tensor, scale: float = 1) -> Tensor:
        freqs_of["k" if "q" in freqs_of else "q"] = freqs
        return t

    def scores(q: Tensor, k: Tensor) -> Tensor:
        k = k[:, None] if k.dim() == 3 else k
        raw = torch.matmul(q, k.transpose(-1, -2))
        if not freqs_of:
            return raw
        freqs_q, freqs_k = freqs_of.pop("q"), freqs_of.pop("k")
        rotated_k = _rotated(k, freqs_k, heads if k.shape[1] > 1 else 1)
        rotated = torch.matmul(_rotated(q, freqs_q, heads), rotated_k.transpose(-1, -2))
        mask_k = rotate if freqs_k.shape[-2] == rotate.shape[-1] else torch.ones(freqs_k.shape[-2], dtype=torch.bool)
        mask_k = F.pad(mask_k, (k.shape[-2] - mask_k.shape[-1], 0), value=False)
        mask_q = rotate[..., -q.shape[-2] :]
        both = mask_q[..., :, None] & mask_k[..., None, :]
        return torch.where(both if both.dim() == 2 else both[:, None], rotated, raw)

    def einsum(equation: str, *operands: Tensor) -> Tensor:
        is_scores = equation.endswith("-> b h i j")
        return scores(*operands) if is_scores else torch.einsum(equation, *operands)

    def squared_distance(q: Tensor, k: Tensor) -> Tensor:
        k = k[:, None] if k.dim() == 3 else k
        return q.square().sum(-1)[..., None] + k.square().sum(-1)[..., None, :] - 2 * scores(q, k)

    with monkeypatch.context() as patch:
        patch.setattr(xt, "apply_rotary_pos_emb", skip if cls_rope == "skip" else remember)
        if cls_rope == "mask":
            patch.setattr(xt_attend, "einsum", einsum)
            patch.setattr(xt_attend, "qk_l2_dist_squared", squared_distance)
        yield


def _make(name: str, **ours: Any) -> tuple[Any, Any]:
    options = cases.ALL_OPTIONS[name]
    if not cases.known_to_installed_version(options):
        pytest.skip(f"x-transformers {cases.VERSION} does not have this option")
    theirs, mine = cases.make_pair({**cases.BASE, **options}, **ours)
    for encoder in (theirs, mine):  # x-transformers' softmax is in float32 otherwise
        for module in encoder.modules():
            if isinstance(module, xt_attend.Attend) and getattr(module.attn_fn, "func", None) is F.softmax:
                module.attn_fn = partial(F.softmax, dim=module.attn_fn.keywords["dim"])
    return theirs, mine


def _rotated_heads(encoder: Any) -> int:
    return next(m for m in encoder.modules() if isinstance(m, xt.Attention)).rotate_num_heads


@pytest.mark.parametrize("cls_rope", ["skip", "mask"])
@pytest.mark.parametrize("name", NAMES)
def test_option(name: str, cls_rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = _make(name, cls_rope=cls_rope, num_prefix_tokens=2, num_suffix_tokens=1)
    inputs = cases.make_inputs(theirs, tokens=8)
    rotate = torch.tensor([False] * 2 + [True] * 5 + [False])
    if theirs.cross_attend:
        inputs["context_pos"] = torch.arange(inputs["context"].shape[1])
    with emulated(cls_rope, rotate, monkeypatch, _rotated_heads(theirs)):
        expected = cases.run(theirs, inputs)
    got = cases.run(ours, inputs)
    cases.assert_same(got, expected, TOLERANCE)
    ours.cls_rope = "rotate"
    assert not torch.allclose(ours(**inputs), got["out"])


@pytest.mark.parametrize("cls_rope", ["skip", "mask"])
@pytest.mark.parametrize(
    "name", ["plain", "attn_num_mem_kv", "attn_kv_heads", "attn_softclamp_logits", "residual_attn"]
)
@pytest.mark.parametrize("where", ["scattered", "per_batch", "all", "none"])
def test_rotate_per_call(name: str, cls_rope: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = _make(name, cls_rope=cls_rope, num_prefix_tokens=1)
    inputs = cases.make_inputs(theirs, tokens=8)
    rotate = {
        "scattered": torch.tensor([True, False, True, True, False, True, True, False]),
        "per_batch": torch.rand(2, 8) > 0.4,
        "all": torch.ones(8, dtype=torch.bool),
        "none": torch.zeros(8, dtype=torch.bool),
    }[where]
    with emulated(cls_rope, rotate, monkeypatch, _rotated_heads(theirs)):
        expected = cases.run(theirs, inputs)
    cases.assert_same(cases.run(ours, {**inputs, "rotate": rotate}), expected, TOLERANCE)
    ours.num_prefix_tokens = 0
    ours.rotate = rotate if rotate.dim() == 1 else None
    if rotate.dim() == 1:
        cases.assert_same(cases.run(ours, inputs), expected, TOLERANCE)


@pytest.mark.parametrize("name", ["plain", "attn_num_mem_kv", "attn_pre_talking_heads", "value_residual"])
def test_mask_sees_no_positions(name: str) -> None:
    """Reordering (token, position) pairs, or shifting all positions, changes nothing for tokens without a position."""
    _, ours = _make(name, cls_rope="mask", num_prefix_tokens=2)
    x, pos = torch.randn(2, 9, 32, dtype=torch.float64), torch.arange(9)
    order = torch.cat((torch.arange(2), 2 + torch.randperm(7)))
    out = ours(x, pos=pos)
    torch.testing.assert_close(ours(x[:, order], pos=pos[order]), out[:, order])
    torch.testing.assert_close(ours(x, pos=pos + 5), out)
    moved = pos.clone()
    moved[:2] = 100
    torch.testing.assert_close(ours(x, pos=moved), out)
    torch.testing.assert_close(ours(x, pos=pos[2:]), out)  # positions of the ordinary tokens are enough


def test_mask_without_special_tokens_is_rotate() -> None:
    theirs, ours = _make("plain", cls_rope="mask")
    inputs = cases.make_inputs(theirs)
    cases.assert_same(cases.run(ours, inputs), cases.run(theirs, inputs), TOLERANCE)


def test_all_special_is_no_rotation() -> None:
    theirs, ours = _make("plain", cls_rope="mask", num_prefix_tokens=7)
    inputs = cases.make_inputs(theirs)
    theirs.rotary_pos_emb = None
    cases.assert_same(cases.run(ours, inputs), cases.run(theirs, inputs), TOLERANCE)


def test_memory_keys_are_raw_in_mask_only(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = _make("attn_num_mem_kv", cls_rope="mask")
    inputs = cases.make_inputs(theirs)
    everywhere = torch.ones(7, dtype=torch.bool)
    with emulated("mask", everywhere, monkeypatch, 4):
        cases.assert_same(cases.run(ours, inputs), cases.run(theirs, inputs), TOLERANCE)
    ours.cls_rope = "skip"
    cases.assert_same(cases.run(ours, inputs), cases.run(theirs, inputs), TOLERANCE)
