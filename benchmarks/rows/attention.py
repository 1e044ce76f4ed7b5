"""Attention with the rotation inside, beside x-transformers' rotation and PyTorch's attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_rope_cls import _C, Rotary, RotaryEmbedding, reference, rope_attention

from ..case import OURS, TOLERANCE, Case, Row, Run, Side, Work, has_bfloat16_dot, name_of, one_thread, with_gradients

_SHAPES = {197: (8, 8, 197), 1024: (2, 8, 1024), 4096: (1, 8, 4096)}  # batch, heads, tokens, by tokens
_PEER = "x-transformers + SDPA"
_NOTE = (
    "limit: 4·B·H·N²·D operations forward, 14·B·H·N²·D with the backward, at the peak of the multiply-add; "
    "half of those of float16 at that of dot products of 16-bit integers, where there are any"
)


@dataclass(frozen=True)
class _Targets:
    """By number of tokens: times as fast, and share of the limit."""

    times: dict[int, float]
    share: dict[int, float | None]


def _targets() -> dict[tuple[torch.dtype, bool], _Targets]:
    dot = has_bfloat16_dot()
    forward_peak = 0.85 if "avx512" in _C.cpu_isa() else 0.80
    none: dict[int, float | None] = dict.fromkeys(_SHAPES)
    return {
        (torch.float32, False): _Targets(
            {197: 2.0, 1024: 1.4, 4096: 1.3}, {197: 0.72, 1024: forward_peak, 4096: forward_peak}
        ),
        (torch.float32, True): _Targets({197: 1.8, 1024: 1.3, 4096: 1.2}, {**dict.fromkeys(_SHAPES, 0.72)}),
        (torch.bfloat16, False): _Targets(
            {197: 2.0, 1024: 1.5, 4096: 1.4}, {**dict.fromkeys(_SHAPES, 0.60 if dot else 0.75)}
        ),
        (torch.bfloat16, True): _Targets(
            dict.fromkeys(_SHAPES, 1.5 if dot else 6.0), {**dict.fromkeys(_SHAPES, 0.50 if dot else 0.65)}
        ),
        (torch.float16, False): _Targets(dict.fromkeys(_SHAPES, 2.5), none),
    }


def rows() -> list[Row]:
    """Lengths and dtypes; other head_dims; mask; key mask; small work; memory."""
    return [*_by_length(), *_by_head_dim(), *_mask_rows(), *_small_rows(), *_memory_rows()]


def _by_length() -> list[Row]:
    found = []
    for (dtype, backward), targets in _targets().items():
        work = "forward + backward" if backward else "forward"
        series = f"attention {work}, {name_of(dtype)}, head_dim 64"
        for tokens, shape in _SHAPES.items():
            found.append(
                Row(
                    name=f"attention/{work.replace(' + ', '-')}/{name_of(dtype)}/{tokens}",
                    title=f"attention {work}, {name_of(dtype)}, N {tokens}",
                    build=_rotate_case,
                    sizes={
                        "shape": shape,
                        "head_dim": 64,
                        "dtype": dtype,
                        "backward": backward,
                        "target": targets.times[tokens],
                        "others": dtype == torch.float32 and tokens == 1024,
                    },
                    tiny={"shape": (1, 2, 24)},
                    backward=backward,
                    tolerance=TOLERANCE[dtype],
                    share_target=targets.share[tokens],
                    series=(series, tokens),
                    quick=tokens == 1024,
                    note=_NOTE,
                )
            )
    return found


def _by_head_dim() -> list[Row]:
    targets = _targets()[torch.float32, False]
    return [
        Row(
            name=f"attention/head-dim/{head_dim}",
            title=f"attention forward, float32, N 1024, head_dim {head_dim}",
            build=_rotate_case,
            sizes={"shape": _SHAPES[1024], "head_dim": head_dim, "target": targets.times[1024]},
            tiny={"shape": (1, 2, 24)},
            share_target=targets.share[1024],
            quick=False,
            note=_NOTE,
        )
        for head_dim in (32, 80, 128)
    ]


def _mask_rows() -> list[Row]:
    found = []
    shape: dict[str, Any] = {"sizes": {"shape": _SHAPES[1024]}, "tiny": {"shape": (1, 2, 24)}}
    for backward, most in ((False, 1.03), (True, 1.05)):
        work = "forward + backward" if backward else "forward"
        for special in (1, 16):
            found.append(
                Row(
                    name=f"attention/mask-over-rotate/{work.replace(' + ', '-')}/{special}",
                    title=f"attention mask {work}, {special} special tokens, N 1024",
                    build=_mask_over_rotate,
                    sizes={**shape["sizes"], "special": special, "backward": backward, "target": 1 / most},
                    tiny={**shape["tiny"], "special": min(special, 4)},
                    backward=backward,
                    quick=special == 1,
                    note=f"the peer is rope_attention in another mode; at most {most:g} times its time is allowed",
                )
            )
    found.append(
        Row(
            name="attention/mask-over-emulation",
            title="attention mask forward, 4 special tokens, N 1024",
            build=_mask_over_emulation,
            sizes={**shape["sizes"], "special": 4, "target": 3.0},
            tiny=shape["tiny"],
            note="exact emulation of mask: special rows by themselves, the others on [Rq, q] x [m·Rk, (1 - m)·k]",
        )
    )
    found.append(
        Row(
            name="attention/key-mask",
            title="attention forward, half the keys padded, N 1024",
            build=_key_mask_case,
            sizes={**shape["sizes"], "target": 2.5},
            tiny=shape["tiny"],
        )
    )
    return found


def _small_rows() -> list[Row]:
    return [
        Row(
            name=f"attention/small/{work}/{shape[2]}",
            title=f"attention {work}, (1, 8, {shape[2]}, 64)",
            build=_rotate_case,
            sizes={"shape": shape, "head_dim": 64, "backward": backward, "target": target, "limit": False},
            tiny={},
            backward=backward,
            quick=False,
        )
        for work, backward, target in (("forward", False, 2.0), ("gradient", True, 1.5))
        for shape in ((1, 8, 64), (1, 8, 1))
    ]


def _memory_rows() -> list[Row]:
    shape = _SHAPES[4096]
    return [
        Row(
            name="attention/memory/rotate",
            title="attention rotate forward + backward, N 4096: memory",
            build=_rotate_case,
            sizes={"shape": shape, "head_dim": 64, "backward": True, "target": None, "memory_target": 0.85},
            tiny={"shape": (1, 2, 24)},
            backward=True,
            quick=False,
            note="memory: the most that the work needed beside its inputs, in a process of its own",
        ),
        Row(
            name="attention/memory/mask",
            title="attention mask forward + backward, N 4096: memory",
            build=_mask_over_emulation,
            sizes={"shape": shape, "special": 4, "backward": True, "target": None, "memory_target": 0.5},
            tiny={"shape": (1, 2, 24)},
            backward=True,
            quick=False,
            note="memory: the most that the work needed beside its inputs, in a process of its own",
        ),
    ]


@dataclass
class _Inputs:
    """q, k, v, the gradient of the output, tables of both packages."""

    qkv: list[Tensor]
    grad: Tensor
    rotary: Rotary
    freqs: Tensor

    @classmethod
    def make(cls, shape: tuple[int, int, int], head_dim: int, dtype: torch.dtype, backward: bool) -> _Inputs:
        from x_transformers.x_transformers import RotaryEmbedding as XRotaryEmbedding

        full = (*shape, head_dim)
        qkv = [torch.randn(full).to(dtype).requires_grad_(backward) for _ in range(3)]
        rotary_dim = max(32, head_dim // 2)
        freqs, _ = XRotaryEmbedding(rotary_dim).forward_from_seq_len(shape[2])
        return cls(qkv, torch.randn(full).to(dtype), RotaryEmbedding(rotary_dim)(shape[2]), freqs)

    def special(self, count: int) -> Rotary:
        """The tables with so many special tokens in front."""
        has_position = torch.arange(self.qkv[0].shape[2]) >= count
        return Rotary(self.rotary.cos, self.rotary.sin, has_position, self.rotary.interleaved)

    def rotate(self, x: Tensor) -> Tensor:
        """x-transformers' rotation."""
        from x_transformers.x_transformers import apply_rotary_pos_emb

        rotated: Tensor = apply_rotary_pos_emb(x, self.freqs)
        return rotated

    def run(self, attention: Callable[..., Tensor], backward: bool) -> Run:
        if not backward:
            return lambda: attention(*self.qkv)
        return with_gradients(lambda: attention(*self.qkv), self.qkv, self.grad)

    def work(self, backward: bool) -> Work:
        batch, heads, tokens, head_dim = self.qkv[0].shape
        flops = (14 if backward else 4) * batch * heads * tokens**2 * head_dim
        dtype = self.qkv[0].dtype
        int16 = flops / 2 if dtype == torch.float16 and not backward else 0.0  # queries times keys
        return Work(flops=flops, bfloat16=dtype == torch.bfloat16, int16=int16)


def _rotate_case(
    shape: tuple[int, int, int],
    head_dim: int,
    target: float | None,
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
    memory_target: float | None = None,
    others: bool = False,
    limit: bool = True,
) -> Case:
    inputs = _Inputs.make(shape, head_dim, dtype, backward)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(inputs.rotate(q), inputs.rotate(k), v)

    ours = inputs.run(lambda q, k, v: rope_attention(q, k, v, inputs.rotary, cls_rope="rotate"), backward)
    peers = [Side(_PEER, inputs.run(theirs, backward), target=target, memory_target=memory_target)]
    if others:
        compiled = torch.compile(theirs)
        peers.append(Side(f"{_PEER} compiled", inputs.run(compiled, backward), slow=True))
        if not backward:
            peers.append(Side("x-transformers + FlexAttention", inputs.run(_flex(inputs), backward), slow=True))
        if torch.get_num_threads() > 1:
            peers.append(Side(f"{OURS}, 1 thread", one_thread(ours), target=0.95 * torch.get_num_threads()))
    return Case(ours, peers, inputs.work(backward) if limit else None)


def _flex(inputs: _Inputs) -> Callable[..., Tensor]:
    """x-transformers' rotation and FlexAttention, compiled, as FlexAttention has to be."""
    from torch.nn.attention.flex_attention import flex_attention

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flex_attention(inputs.rotate(q), inputs.rotate(k), v)
        return out

    compiled: Callable[..., Tensor] = torch.compile(attention)
    return compiled


def _mask_over_rotate(shape: tuple[int, int, int], special: int, backward: bool, target: float) -> Case:
    inputs = _Inputs.make(shape, 64, torch.float32, backward)
    rotary = inputs.special(special)
    rotate = inputs.run(lambda q, k, v: rope_attention(q, k, v, rotary, cls_rope="rotate"), backward)
    return Case(
        inputs.run(lambda q, k, v: rope_attention(q, k, v, rotary, cls_rope="mask"), backward),
        [Side("rotate", rotate, target=target, same=False)],
        inputs.work(backward),
        expected=inputs.run(lambda q, k, v: reference.rope_attention(q, k, v, rotary, cls_rope="mask"), backward),
    )


def _mask_over_emulation(
    shape: tuple[int, int, int],
    special: int,
    target: float | None,
    backward: bool = False,
    memory_target: float | None = None,
) -> Case:
    inputs = _Inputs.make(shape, 64, torch.float32, backward)
    rotary = inputs.special(special)
    has_position = torch.arange(shape[2]) >= special
    keep = has_position.to(torch.float32)[:, None]

    def emulation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = F.scaled_dot_product_attention(q[:, :, :special], k, v)
        both_q = torch.cat((inputs.rotate(q), q), dim=-1)[:, :, special:]
        both_k = torch.cat((inputs.rotate(k) * keep, k * (1 - keep)), dim=-1)
        rest = F.scaled_dot_product_attention(both_q, both_k, v, scale=q.shape[-1] ** -0.5)
        return torch.cat((first, rest), dim=2)

    ours = inputs.run(lambda q, k, v: rope_attention(q, k, v, rotary, cls_rope="mask"), backward)
    peer = Side("emulation + SDPA", inputs.run(emulation, backward), target=target, memory_target=memory_target)
    return Case(ours, [peer], inputs.work(backward))


def _key_mask_case(shape: tuple[int, int, int], target: float) -> Case:
    inputs = _Inputs.make(shape, 64, torch.float32, False)
    key_mask = (torch.arange(shape[2]) < shape[2] // 2).expand(shape[0], -1)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            inputs.rotate(q), inputs.rotate(k), v, attn_mask=key_mask[:, None, None, :]
        )

    ours = inputs.run(
        lambda q, k, v: rope_attention(q, k, v, inputs.rotary, cls_rope="rotate", key_mask=key_mask), False
    )
    return Case(ours, [Side(_PEER, inputs.run(theirs, False), target=target)])
