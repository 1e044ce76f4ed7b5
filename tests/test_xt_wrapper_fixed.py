"""What x-transformers' TransformerWrapper crashes on or gets wrong, against its own parts put together by hand."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import x_rope_cls

pytest.importorskip("x_transformers")
import wrapper_cases as cases
import x_transformers
import xt_emulation
from xt_cases import one_thread  # noqa: F401  (used by every test)

BATCH, TOKENS = cases.BATCH, cases.TOKENS
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]]).bool()
POS = {"shared": torch.tensor([2, 3, 5, 7, 8, 9]), "by_batch": torch.tensor([[2, 3, 5, 7, 8, 9], [4, 1, 0, 3, 6, 5]])}
MODES = ("rotate", "skip", "mask")
NO_ABS = {"disable_abs_pos_emb": True}


def _pair(
    *names: str, cls_rope: str = "rotate", encoder: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, Any]:
    """x-transformers' model, for its parts, and ours, with the same weights."""
    theirs = cases.build(x_transformers.TransformerWrapper, names, encoder, **options)
    ours = cases.build(x_rope_cls.TransformerWrapper, names, encoder, cls_rope=cls_rope, **options)
    return theirs, ours


def _ids() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, cases.VOCABULARY, (BATCH, TOKENS))


def _front(theirs: Any) -> Tensor:
    tokens = [getattr(theirs, name, None) for name in ("memory_tokens", "cls_token")]
    rows = [t for t in tokens if t is not None]
    front = torch.cat(rows) if rows else torch.zeros(0, cases.DIM, dtype=torch.float64)
    return front.expand(BATCH, -1, -1)


def _expected(
    theirs: Any,
    cls_rope: str,
    monkeypatch: pytest.MonkeyPatch,
    pos: Tensor | None = None,
    mask: Tensor | None = None,
    prepended: Tensor | None = None,
    absolute: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Output of the encoder for [memory, CLS, prepended, tokens], with the pair rules patched into x-transformers."""
    ids = _ids()
    embeds = theirs.token_emb(ids) + (theirs.pos_emb(ids, pos=pos) if absolute is None else absolute)
    embeds = theirs.post_emb_norm(embeds)
    if prepended is not None:
        embeds = torch.cat((prepended, embeds), dim=1)
    front = _front(theirs)
    x = torch.cat((front, theirs.project_emb(embeds)), dim=1)
    special, total = front.shape[1], x.shape[1]
    if pos is not None:
        missing = total - TOKENS
        before = [pos[..., :1] - i for i in range(missing, 0, -1)]
        pos = torch.cat((*before, pos), dim=-1)
        if cls_rope != "rotate":  # they have none, so any will do
            pos[..., :special] = torch.randint(0, 50, (special,))
    if mask is not None:
        mask = F.pad(mask, (total - mask.shape[1], 0), value=True)
    rotate = torch.arange(total) >= special
    rule = xt_emulation.emulated(cls_rope, rotate, monkeypatch, 4) if cls_rope != "rotate" else nullcontext()
    with rule:
        out: Tensor = theirs.attn_layers(x, mask=mask, pos=pos, **kwargs)
    return out


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cls_rope", MODES)
@pytest.mark.parametrize("which", POS)
@pytest.mark.parametrize("names", [(), ("memory",), ("cls",), ("memory", "two_cls"), ("memory", "cls", "emb_dim")])
def test_pos(cls_rope: str, which: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = _pair(*names, cls_rope=cls_rope)
    expected = _expected(theirs, cls_rope, monkeypatch, POS[which], MASK)
    out, intermediates = ours(_ids(), pos=POS[which], mask=MASK, return_intermediates=True)
    _close(intermediates.last_hidden, expected)
    rows = expected[:, 3 if "memory" in names else 0 :]
    rows = rows[:, : ours.num_cls_tokens] if ours.cls_token is not None else rows
    _close(out, theirs.to_logits(rows).squeeze(1))


@pytest.mark.parametrize("cls_rope", MODES)
def test_pos_with_prepended_embeddings(cls_rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = _pair("memory", "cls", cls_rope=cls_rope)
    prepended = torch.randn(BATCH, 2, cases.DIM, dtype=torch.float64)
    expected = _expected(theirs, cls_rope, monkeypatch, POS["shared"], MASK, prepended)
    options = {"prepend_embeds": prepended, "mask": MASK, "return_intermediates": True}
    _, intermediates = ours(_ids(), pos=POS["shared"], **options)
    _close(intermediates.last_hidden, expected)
    given = torch.cat((torch.tensor([0, 1]), POS["shared"]))  # here: the same positions, all given
    _, intermediates = ours(_ids(), pos=given, **options)
    _close(intermediates.last_hidden, expected)


def test_pos_of_all_tokens_as_in_x_transformers() -> None:
    """Where there is no absolute embedding, x-transformers takes positions of the whole sequence."""
    theirs, ours = _pair("memory", "cls", encoder=NO_ABS)
    pos = torch.tensor([9, 4, 1, 0, 2, 3, 5, 7, 8, 9])
    _close(ours(_ids(), pos=pos), theirs(_ids(), pos=pos))


@pytest.mark.parametrize("names", [("memory",), ("memory", "two_cls")])
def test_default_pos_up_to_a_shift(names: tuple[str, ...]) -> None:
    for cls_rope in MODES:
        _, ours = _pair(*names, cls_rope=cls_rope, encoder=NO_ABS)
        difference = (ours(_ids(), pos=torch.arange(TOKENS)) - ours(_ids())).abs().max()
        assert (difference < 1e-9) == (cls_rope != "skip"), cls_rope


@pytest.mark.parametrize("cls_rope", MODES)
def test_shift_of_positions(cls_rope: str) -> None:
    """In "mask" nothing changes; in "skip" the distance from CLS and memory does; in "rotate" they move along."""
    _, ours = _pair("memory", "cls", cls_rope=cls_rope, encoder=NO_ABS)
    pos = POS["by_batch"]
    difference = (ours(_ids(), pos=pos + 11, mask=MASK) - ours(_ids(), pos=pos, mask=MASK)).abs().max()
    assert (difference < 1e-9) == (cls_rope != "skip")


def test_float_positions() -> None:
    _, ours = _pair("memory", "cls", encoder=NO_ABS)
    _close(ours(_ids(), pos=POS["shared"].double()), ours(_ids(), pos=POS["shared"]))
    _close(ours(_ids(), pos=POS["shared"].int()), ours(_ids(), pos=POS["shared"]))
    assert (ours(_ids(), pos=POS["shared"] * 0.5) - ours(_ids(), pos=POS["shared"])).abs().max() > 1e-3


@pytest.mark.parametrize("names", [(), ("memory", "cls")])
def test_absolute_embedding_from_outside(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no position, so that rotation counts as it does without one."""
    theirs, ours = _pair(*names)
    given = torch.randn(BATCH, TOKENS, cases.DIM, dtype=torch.float64)
    expected = _expected(theirs, "rotate", monkeypatch, absolute=given)
    _close(ours(_ids(), pos=given, return_intermediates=True)[1].last_hidden, expected)


@pytest.mark.parametrize("pos", [None, *POS.values()])
@pytest.mark.parametrize("start", [None, torch.tensor([0, 2])])
def test_sinusoidal_positions(pos: Tensor | None, start: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = _pair("sinusoidal", "memory", encoder={"rotary_pos_emb": False})
    absolute, mask = [], None
    for row in range(BATCH):
        at = torch.arange(TOKENS) if pos is None else pos if pos.dim() == 1 else pos[row]
        absolute.append(theirs.pos_emb(_ids(), pos=at if start is None else at - start[row]))
    if start is not None:
        mask = torch.arange(TOKENS) >= start[:, None]
    expected = _expected(theirs, "rotate", monkeypatch, None, mask, absolute=torch.stack(absolute))
    out = ours(_ids(), pos=pos, seq_start_pos=start, return_intermediates=True)[1].last_hidden
    _close(out, expected)


def test_sinusoidal_positions_with_l2norm() -> None:
    options = ("memory", "l2norm", "sinusoidal")
    ours = cases.build(x_rope_cls.TransformerWrapper, options, {"rotary_pos_emb": False}, cls_rope="rotate")
    assert ours(_ids()).isfinite().all()


@pytest.mark.parametrize("names", [("memory",), ("cls",), ("memory", "cls"), ("average",), ("memory", "pool")])
@pytest.mark.parametrize("mask", [None, MASK])
def test_left_padding(names: tuple[str, ...], mask: Tensor | None) -> None:
    """Sequences that start late give what they give without the padding in front."""
    _, ours = _pair(*names, cls_rope="mask")
    start = torch.tensor([2, 2])
    out = ours(_ids(), seq_start_pos=start, mask=mask)
    cut = None if mask is None else mask[:, 2:]
    alone = ours(_ids()[:, 2:], mask=cut)
    _close(out if out.shape == alone.shape else out[:, 2:], alone)


@pytest.mark.parametrize("names", [("memory", "pool"), ("memory", "deep_pool"), ("memory", "wide_pool"), ("pool",)])
@pytest.mark.parametrize("cls_rope", MODES)
def test_pool_with_mask(names: tuple[str, ...], cls_rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = _pair(*names, cls_rope=cls_rope)
    hidden = _expected(theirs, cls_rope, monkeypatch, mask=MASK)
    tokens = hidden[:, 3:] if "memory" in names else hidden
    expected = theirs.attn_pool(tokens, mask=MASK)
    out, intermediates = ours(_ids(), mask=MASK, return_intermediates=True)
    _close(out, expected)
    _close(intermediates.attn_pooled_tokens, expected)
    _close(intermediates.logits, theirs.to_logits(tokens))
    changed = _ids().masked_fill(~MASK, 0)
    _close(ours(changed, mask=MASK), expected)


@pytest.mark.parametrize("memory", [(), ("memory",)])
@pytest.mark.parametrize("given", ["mask", "prepend_mask", "both", "neither"])
def test_average_with_prepended(memory: tuple[str, ...], given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = _pair("average", "emb_norm", "frac_gradient", *memory)
    prepended = torch.randn(BATCH, 2, cases.DIM, dtype=torch.float64)
    prepend_mask = torch.tensor([[1, 0], [1, 1]]).bool() if given in ("prepend_mask", "both") else None
    mask = MASK if given in ("mask", "both") else None
    present = torch.cat(
        (
            torch.ones(BATCH, 2).bool() if prepend_mask is None else prepend_mask,
            torch.ones_like(MASK) if mask is None else mask,
        ),
        dim=1,
    )
    encoder_mask = None if given == "neither" else present
    hidden = _expected(theirs, "rotate", monkeypatch, None, encoder_mask, prepended)[:, 3 if memory else 0 :]
    expected = torch.stack([row[there].mean(dim=0) for row, there in zip(hidden, present, strict=True)])
    call = {"prepend_embeds": prepended, "mask": mask, "prepend_mask": prepend_mask}
    _close(ours(_ids(), **call), theirs.to_logits(expected))
    _close(ours(_ids(), **call, excise_prepend_embeds=True), theirs.to_logits(expected))


def test_mask_of_prepended_and_cls(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = _pair("memory", "cls", cls_rope="mask")
    prepended = torch.randn(BATCH, 2, cases.DIM, dtype=torch.float64)
    prepend_mask = torch.tensor([[1, 0], [1, 1]]).bool()
    both = torch.cat((prepend_mask, MASK), dim=1)
    expected = _expected(theirs, "mask", monkeypatch, mask=both, prepended=prepended)
    call = {"prepend_embeds": prepended, "mask": MASK, "prepend_mask": prepend_mask}
    _close(ours(_ids(), **call), theirs.to_logits(expected[:, 3]))
    _close(ours(_ids(), **call, excise_prepend_embeds=True), theirs.to_logits(expected[:, 3]))


@pytest.mark.parametrize("names", [("memory",), ("memory", "cls")])
def test_mems_with_pos(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Mems come right before all other tokens."""
    _, ours = _pair(*names, cls_rope="mask", encoder=NO_ABS)
    mems = [torch.randn(BATCH, 4, cases.DIM, dtype=torch.float64) for _ in range(2)]
    special = ours.num_memory_tokens + (0 if ours.cls_token is None else 1)
    by_default = ours(_ids(), mems=mems)  # tokens are at special, special + 1, ...; mems at -4 .. -1
    _close(ours(_ids(), mems=mems, pos=torch.arange(TOKENS) + special), by_default)
    _close(ours(_ids(), mems=mems, pos=torch.arange(TOKENS) + special + 7), by_default)
    assert (ours(_ids(), mems=mems, pos=POS["shared"]) - by_default).abs().max() > 1e-3


@pytest.mark.parametrize("names", [("memory",), ("cls",), ("memory", "prepend"), ("prepend",)])
def test_deep_embed(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that no id stands for get no factor."""
    options = tuple(name for name in names if name != "prepend")
    theirs, ours = _pair("deep_embed", *options)
    prepended = torch.randn(BATCH, 2, cases.DIM, dtype=torch.float64) if "prepend" in names else None
    table = torch.cat((theirs.ff_deep_embed, torch.ones_like(theirs.ff_deep_embed[:1])))
    front = _front(theirs).shape[1] + (0 if prepended is None else 2)
    ids = F.pad(_ids(), (front, 0), value=cases.VOCABULARY)
    expected = _expected(theirs, "rotate", monkeypatch, prepended=prepended, deep_embeds_and_ids=(table, ids))
    out = ours(_ids(), prepend_embeds=prepended, return_intermediates=True)[1].last_hidden
    _close(out, expected)


@pytest.mark.parametrize("name", ["attn_mask", "attn_bias", "kv_mask", "in_attn_cond"])
@pytest.mark.parametrize("mems", [False, True])
def test_arguments_of_the_encoder(name: str, mems: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given for the caller's tokens, they leave the others as they are."""
    theirs, ours = _pair("memory", "cls")
    ((key, given),) = cases._calls(cases.DIM)[name].items()
    front = 4
    earlier = [torch.randn(BATCH, 4, cases.DIM, dtype=torch.float64) for _ in range(2)] if mems else None
    keys = front + (4 if mems else 0)
    pads = {"attn_mask": (keys, 0, front, 0), "attn_bias": (keys, 0, front, 0), "kv_mask": (keys, 0)}
    whole = F.pad(given, pads.get(name, (0, 0, front, 0)), value=given.dtype == torch.bool)
    expected = _expected(theirs, "rotate", monkeypatch, mems=earlier, **{key: whole})
    out = ours(_ids(), **{key: given}, mems=earlier, return_intermediates=True)[1].last_hidden
    _close(out, expected)


@pytest.mark.parametrize("cls_rope", MODES)
def test_rotation_from_outside(cls_rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Axial tables of the tokens alone, as x-transformers' pair and as Rotary; CLS and memory are at angle 0."""
    theirs, ours = _pair("memory", "two_cls", cls_rope=cls_rope, encoder={"rotary_pos_emb": False})
    rotary = x_rope_cls.AxialRotaryEmbedding(8).double()((2, 3))
    angles = torch.atan2(rotary.sin, rotary.cos).repeat_interleave(2, dim=-1)[None]
    whole = F.pad(angles, (0, 0, 5, 0))
    expected = _expected(theirs, cls_rope, monkeypatch, mask=MASK, rotary_pos_emb=(whole, 1.0))
    for given in ((angles, 1.0), rotary):
        out = ours(_ids(), mask=MASK, rotary_pos_emb=given, return_intermediates=True)[1].last_hidden
        _close(out, expected)


@pytest.mark.parametrize("prepended", [0, 2])
def test_rotate_by_call(prepended: int) -> None:
    _, ours = _pair("memory", "cls", encoder=NO_ABS)
    has_position = torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    embeds = torch.randn(BATCH, prepended, cases.DIM, dtype=torch.float64) if prepended else None
    x_rope_cls.swap_(ours, "mask")
    out = ours(_ids(), rotate=has_position, prepend_embeds=embeds)
    whole = F.pad(F.pad(has_position, (prepended, 0), value=True), (4, 0), value=False)
    _close(out, ours(_ids(), rotate=whole, prepend_embeds=embeds))
    assert (out - ours(_ids(), prepend_embeds=embeds)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["mixture", "sigsoftmax", "squeeze", "two_heads", "tied", "emb_norm"])
@pytest.mark.parametrize("returns", ["return_embeddings", "return_embeddings_and_intermediates", "only_embed"])
def test_embeddings(name: str, returns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not depend on what is made of logits."""
    names = (name, "only_embed") if returns == "only_embed" else (name,)
    theirs, ours = _pair(*names)
    expected = _expected(theirs, "rotate", monkeypatch)
    out = ours(_ids(), **({} if returns == "only_embed" else {returns: True}))
    _close(cases.tensors(out)[0], expected)


def test_sigsoftmax_with_several_heads() -> None:
    _, ours = _pair("two_heads", "sigsoftmax")
    _, plain = _pair("two_heads")
    for a, b in zip(ours(_ids()), plain(_ids()), strict=True):
        _close(a, b + b.sigmoid().log())


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"return_embeddings": True},
        {"return_logits_and_embeddings": True},
        {"return_embeddings_and_intermediates": True},
        {"return_intermediates": True},
        {"return_logit_entropies": True},
        {"return_next_embed_pred": True},
        {"return_next_embed_pred": True, "return_embeddings": True, "return_attn": True},
        {"return_mems": True, "return_embeddings": True},
        {"return_attn_z_loss": True, "return_logits_and_embeddings": True},
    ],
)
@pytest.mark.parametrize("names", [(), ("two_heads",), ("memory", "pool"), ("squeeze",)])
def test_excise(flags: dict[str, bool], names: tuple[str, ...]) -> None:
    """Rows of prepended embeddings are gone from what has a row for each token, and from nothing else."""
    if "two_heads" in names and "return_logit_entropies" in flags:
        flags = {}
    _, ours = _pair("next_head", *names)
    prepended = torch.randn(BATCH, 2, cases.DIM, dtype=torch.float64)
    whole = cases.tensors(ours(_ids(), prepend_embeds=prepended, **flags))
    cut = cases.tensors(ours(_ids(), prepend_embeds=prepended, excise_prepend_embeds=True, **flags))
    assert len(cut) == len(whole)
    shorter = [a.shape != b.shape for a, b in zip(whole, cut, strict=True)]
    for a, b in zip(whole, cut, strict=True):
        _close(b, a[:, 2:] if a.shape != b.shape else a)
    embeddings = {"return_embeddings", "return_embeddings_and_intermediates"} & {*flags}
    pooled = "pool" in names and not embeddings and "return_logits_and_embeddings" not in flags
    results = 0 if pooled else 2 if "two_heads" in names and not embeddings else 1
    assert any(shorter) == (results > 0 or len(flags) > 0)
    assert all(shorter[:results])


def test_tied_embedding_is_copied() -> None:
    """x-transformers keeps the first model's embedding in the copy, and cannot be pickled."""
    _, ours = _pair("tied", "memory")
    before = ours(_ids())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with torch.no_grad():
            other.token_emb.emb.weight.mul_(2)
        other.to(torch.float32)
        assert other(_ids()).dtype == torch.float32
        _close(ours(_ids()), before)
