"""Hypothesis strategies for the operators' arguments: awkward sizes, strides, masks, tables and dtypes.

Hypothesis draws what a case looks like; its values come from a seeded generator, which is fast and shrinks well.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import hypothesis
import hypothesis.strategies as st
import torch
from torch import Tensor

from x_rope_cls import Rotary

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODES = ("rotate", "skip", "mask")
LAYOUTS = (
    "contiguous",
    "tokens_first",
    "slice",
    "unaligned",
    "channel_step",
    "channels_first",
    "one_batch",
    "one_head",
)
MASKED_ROTATE = ("none", "front", "end", "scattered", "per_batch", "no_position", "all_positions")
ROTATE = (*MASKED_ROTATE, "expanded", "sliced")
TABLES = ("shared", "heads", "one_head", "batch", "full", "ones", "strided")
BIASES = ("none", "bool", "bias", "bias_with_inf")

# Around 4, 8 and 16 lanes, the 32 keys and 128 keys of dropout, and tiles of a few dozen rows.
TOKENS = st.sampled_from((0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 48, 63, 65, 97, 127, 130))
CHANNELS = st.sampled_from((1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 64, 65, 80))


def examples(count: int) -> hypothesis.settings:
    """Settings of a test with another number of examples than the default's 40; profiles scale it."""
    return hypothesis.settings(max_examples=count * hypothesis.settings.default.max_examples // 40)


@dataclass
class Generator:
    """Values of a case, reproducible from its seed."""

    seed: int
    _torch: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._torch = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self._torch, dtype=torch.float64).to(dtype)

    def chance(self, p: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._torch) < p

    def index(self, high: int) -> int:
        return int(torch.randint(max(high, 1), (), generator=self._torch))


def lay_out(t: Tensor, layout: str) -> Tensor:
    """A (batch, heads, tokens, channels) tensor of the same shape in the named memory layout.

    Values stay, except that "one_batch" and "one_head" repeat those of the first.
    """
    B, H, N, D = t.shape
    if layout == "tokens_first":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "slice":
        whole = t.new_full((B + 1, H + 2, N + 3, D + 5), torch.nan)
        whole[1:, 1:-1, 2:-1, 3:-2] = t
        return whole[1:, 1:-1, 2:-1, 3:-2]
    if layout == "unaligned":
        memory = t.new_full((t.numel() + 1,), torch.nan)
        memory[1:] = t.flatten()
        return memory[1:].view(B, H, N, D)
    if layout == "channel_step":
        whole = t.new_full((B, H, N, 2 * D), torch.nan)
        whole[..., ::2] = t
        return whole[..., ::2]
    if layout == "channels_first":
        return t.mT.contiguous().mT
    if layout == "one_batch" and B > 0:
        return t[:1].contiguous().expand(B, H, N, D)
    if layout == "one_head" and H > 0:
        return t[:, :1].contiguous().expand(B, H, N, D)
    return t.contiguous()


def make_rotate(kind: str, generator: Generator, batch: int, tokens: int) -> Tensor | None:
    """A `rotate` mask; special tokens are few, as in a model."""
    special = 1 + generator.index(max(tokens // 3, 1))
    index = torch.arange(tokens)
    if kind == "none":
        return None
    if kind == "front":
        return index >= special
    if kind == "end":
        return index < tokens - special
    if kind == "scattered":
        return generator.chance(0.7, tokens)
    if kind == "per_batch":
        return generator.chance(0.7, batch, tokens)
    if kind == "expanded":
        return generator.chance(0.7, tokens).expand(batch, tokens)
    if kind == "sliced":
        return generator.chance(0.7, batch, 2 * tokens + 1)[:, 1::2]
    return torch.full((tokens,), kind == "all_positions")


def make_tables(
    kind: str, generator: Generator, batch: int, heads: int, tokens: int, pairs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of a rotation that also stretches, as with xpos."""
    lead = {"heads": (heads,), "one_head": (1,), "batch": (batch, 1), "full": (batch, heads), "ones": (1, 1)}
    shape = (*lead.get(kind, ()), tokens, pairs)
    angles, stretch = 3 * generator.normal(*shape), 1 + 0.2 * generator.normal(*shape)
    tables = [(turn * stretch).to(dtype) for turn in (angles.cos(), angles.sin())]
    if kind == "strided":
        tables = [torch.cat((table, table), dim=-1).mT.contiguous().mT[:, :pairs] for table in tables]
    return tables[0], tables[1]


@dataclass(frozen=True)
class RopeCase:
    """Arguments of apply_rope."""

    x: Tensor
    rotary: Rotary
    inverse: bool


@st.composite
def rope_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> RopeCase:
    """Any call of apply_rope that is allowed."""
    generator = Generator(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(dtypes))
    B, H, N = draw(st.integers(0, 3)), draw(st.integers(0, 5)), draw(TOKENS)
    D = draw(CHANNELS.filter(lambda size: size > 1))
    pairs = draw(st.integers(1, D // 2))
    cos, sin = make_tables(draw(st.sampled_from(TABLES)), generator, B, H, N, pairs, torch.float64)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    rotate = make_rotate(draw(st.sampled_from(ROTATE)), generator, B, N)
    x = lay_out(generator.normal(B, H, N, D, dtype=dtype), draw(st.sampled_from(LAYOUTS)))
    return RopeCase(x, Rotary(cos.to(compute), sin.to(compute), rotate, draw(st.booleans())), draw(st.booleans()))


@dataclass(frozen=True)
class AttentionCase:
    """Arguments of the operator rope_attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    rotary_q: Rotary | None
    rotary_k: Rotary | None
    cls_rope: str
    attn_mask: Tensor | None
    key_mask: Tensor | None
    scale: float
    dropout_p: float
    seed: int

    def differentiable(self) -> dict[str, Tensor]:
        """Everything that can have a gradient, by name."""
        tensors = {"q": self.q, "k": self.k, "v": self.v}
        if self.attn_mask is not None and self.attn_mask.is_floating_point():
            tensors["attn_mask"] = self.attn_mask
        for suffix, rotary in (("q", self.rotary_q), ("k", self.rotary_k)):
            if rotary is not None:
                tensors |= {f"cos_{suffix}": rotary.cos, f"sin_{suffix}": rotary.sin}
        return tensors

    def with_tensors(self, tensors: dict[str, Tensor]) -> AttentionCase:
        """The same case with some tensors, named as in `differentiable`, replaced."""
        rotaries = {}
        for suffix, rotary in (("q", self.rotary_q), ("k", self.rotary_k)):
            if rotary is not None:
                cos, sin = tensors.get(f"cos_{suffix}", rotary.cos), tensors.get(f"sin_{suffix}", rotary.sin)
                rotaries[f"rotary_{suffix}"] = replace(rotary, cos=cos, sin=sin)
        others = {name: t for name, t in tensors.items() if name in ("q", "k", "v", "attn_mask")}
        return replace(self, **rotaries, **others)


@st.composite
def attention_cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    tokens: st.SearchStrategy[int] = TOKENS,
    channels: st.SearchStrategy[int] = CHANNELS,
    dropout: tuple[float, ...] = (0.0, 0.0, 0.0, 0.3, 1.0),
) -> AttentionCase:
    """Any call of rope_attention that is allowed."""
    generator = Generator(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(dtypes))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    B, Hkv = draw(st.sampled_from((1, 2, 2, 3, 0))), draw(st.sampled_from((1, 2, 2, 3, 0)))
    H = Hkv * draw(st.integers(1, 3))
    N = draw(tokens)
    M = draw(st.one_of(st.just(N), tokens))
    D, Dv = draw(channels), draw(channels)

    rotary_q = rotary_k = None
    if D > 1 and draw(st.integers(0, 5)):
        pairs, interleaved = draw(st.integers(1, D // 2)), draw(st.booleans())
        kind, rotate_kind = draw(st.sampled_from(TABLES)), draw(st.sampled_from(ROTATE))
        cos, sin = make_tables(kind, generator, B, H, N, pairs, compute)
        rotary_q = rotary_k = Rotary(cos, sin, make_rotate(rotate_kind, generator, B, N), interleaved)
        same_heads = Hkv == H or kind not in ("heads", "full")
        if N != M or not same_heads or draw(st.booleans()):
            kind, rotate_kind = draw(st.sampled_from(TABLES)), draw(st.sampled_from(ROTATE))
            cos, sin = make_tables(kind, generator, B, Hkv, M, pairs, compute)
            rotary_k = Rotary(cos, sin, make_rotate(rotate_kind, generator, B, M), interleaved)

    layouts = st.sampled_from(LAYOUTS)
    return AttentionCase(
        q=lay_out(generator.normal(B, H, N, D, dtype=dtype), draw(layouts)),
        k=lay_out(generator.normal(B, Hkv, M, D, dtype=dtype), draw(layouts)),
        v=lay_out(generator.normal(B, Hkv, M, Dv, dtype=dtype), draw(layouts)),
        rotary_q=rotary_q,
        rotary_k=rotary_k,
        cls_rope=draw(st.sampled_from(MODES)),
        attn_mask=_draw_attn_mask(draw, generator, (B, H, N, M)),
        key_mask=_draw_key_mask(draw, generator, B, M),
        scale=draw(st.sampled_from((D**-0.5, D**-0.5, 0.3, 0.0, -0.2))),
        dropout_p=draw(st.sampled_from(dropout)),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
    )


def _draw_attn_mask(draw: st.DrawFn, generator: Generator, full: tuple[int, ...]) -> Tensor | None:
    kind = draw(st.sampled_from(BIASES))
    if kind == "none":
        return None
    shape = [size if draw(st.booleans()) else 1 for size in full][draw(st.integers(0, 4)) :]
    if kind == "bool":
        mask = generator.chance(0.7, *shape)
    else:
        mask = generator.normal(*shape, dtype=draw(st.sampled_from(DTYPES)))
        if kind == "bias_with_inf":
            mask = mask.masked_fill(generator.chance(0.3, *shape), -torch.inf)
    if len(shape) > 1 and draw(st.booleans()):
        return mask.mT.contiguous().mT
    if draw(st.booleans()):
        return mask.expand(full)
    return mask


def _draw_key_mask(draw: st.DrawFn, generator: Generator, batch: int, keys: int) -> Tensor | None:
    kind = draw(st.sampled_from(("none", "none", "random", "lengths", "one_dead", "transposed")))
    if kind == "none":
        return None
    mask = generator.chance(0.7, batch, keys)
    if kind == "lengths":
        mask = torch.arange(keys) < torch.tensor([generator.index(keys + 1) for _ in range(batch)]).view(batch, 1)
    if kind == "one_dead" and batch:
        mask[generator.index(batch)] = False
    return mask.T.contiguous().T if kind == "transposed" else mask
