"""The calls that the report simulates, how kernels are launched in them, and the least times of larger calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cuda_sim
import torch
from cuda_occupancy import CHIPS, Launch
from cuda_sass import key

from x_rope_cls import RotaryEmbedding, apply_rope, late_cls_pool, rope_attention

HEAD_DIMS = (32, 64, 96, 128, 256)


@dataclass
class Call:
    """One call of an operator."""

    title: str
    run: Callable[[], Any]
    mma: float = 0.0  # m16n8k16 instructions that its matrix products take


def attention_call(
    cls_rope: str, special: int, backward: bool, head_dim: int = 64, tokens: int = 1024, biased: bool = False
) -> Call:
    q, k, v = (torch.randn(1, 1, tokens, head_dim).bfloat16().requires_grad_(backward) for _ in range(3))
    rotary = RotaryEmbedding(head_dim)(tokens, torch.arange(tokens) >= special)
    bias = torch.randn(tokens, tokens).bfloat16() if biased else None

    def forward() -> Any:
        out = rope_attention(q, k, v, rotary, cls_rope=cls_rope, attn_mask=bias)  # type: ignore[call-overload]
        return torch.autograd.grad(out, (q, k, v), torch.randn_like(out)) if backward else out

    products = 7 if backward else 2  # S and PV; S, dP, dQ, dK and dV
    title = f"rope_attention{' forward and backward' if backward else ''}, {cls_rope}, {special} special tokens"
    mma = products * 2.0 * tokens * tokens * head_dim / 4096
    return Call(f"{title}, bfloat16 (1, 1, {tokens}, {head_dim})", forward, mma)


def rope_call(interleaved: bool) -> Call:
    x = torch.randn(2, 1024, 8, 64).bfloat16().transpose(1, 2)
    rotary = RotaryEmbedding(64, interleaved=interleaved)(1024)
    layout = "interleaved" if interleaved else "halves"
    return Call(f"rope, {layout}, bfloat16 (2, 8, 1024, 64)", lambda: apply_rope(x, rotary))


def pool_call(backward: bool, dtype: torch.dtype = torch.bfloat16, queries: int = 8) -> Call:
    x = torch.randn(2, 1024, 512).to(dtype).requires_grad_(backward)
    query = (torch.randn(1, queries, 1, 512) * 512**-0.5).to(dtype).requires_grad_(backward)

    def forward() -> Any:
        out = late_cls_pool(x, query)
        return torch.autograd.grad(out, (x, query), torch.randn_like(out)) if backward else out

    name = str(dtype).removeprefix("torch.")
    title = f"late_cls_pool{' forward and backward' if backward else ''}, {name} (2, 1024, 512), {queries} queries"
    return Call(title, forward)


def calls() -> list[Call]:
    torch.manual_seed(0)
    found = [rope_call(True), rope_call(False), attention_call("rotate", 0, False), attention_call("mask", 4, False)]
    found += [attention_call("rotate", 0, False, head_dim) for head_dim in HEAD_DIMS if head_dim != 64]
    found += [attention_call("rotate", 0, True), attention_call("mask", 4, True)]
    found += [pool_call(False), pool_call(True)]
    return [*found, pool_call(True, torch.float32), pool_call(True, torch.float32, 16)]


def counted(call: Call) -> list[dict[str, Any]]:
    with cuda_sim.simulated_cuda(stats=True) as simulator:
        call.run()
        return simulator.stats()


def launch_of(stats: dict[str, Any]) -> Launch:
    x, y, z = stats["block"]
    return Launch(x * y * z, stats["static_shared"] + stats["dynamic_shared"])


def attention_launches() -> dict[str, Launch]:
    """How the attention kernels of every width are launched, by `key`: a small call of each."""
    found = {}
    for head_dim in HEAD_DIMS:
        for biased in (False, True):
            for stats in counted(attention_call("rotate", 0, True, head_dim, tokens=128, biased=biased)):
                found[key(stats["mangled"])] = launch_of(stats)
    return found


# ---- least times ---------------------------------------------------------------------------------


@dataclass
class Work:
    """What a kernel must do in one call at least: every tensor is read or written once."""

    kernel: str
    flops: float  # on tensor cores
    moved: float  # bytes

    def time(self, flops: float, bandwidth: float) -> float:
        """Microseconds."""
        return max(self.flops / flops, self.moved / bandwidth) * 1e6


def attention_work(batch: int, heads: int, tokens: int, head_dim: int, backward: bool) -> list[Work]:
    """The kernels of a call with cls_rope="rotate" in bfloat16; backward sums are float32 until they are finished."""
    tensor = 2.0 * batch * heads * tokens * head_dim
    product = 2.0 * batch * heads * tokens**2 * head_dim
    if not backward:
        return [Work("pack_kernel (K)", 0, 2 * tensor), Work("attention_forward_kernel", 2 * product, 4 * tensor)]
    if head_dim <= 128:
        keys = [Work("attention_backward_kernel (dK, dV)", 4 * product, 8 * tensor)]
    else:
        keys = [
            Work("attention_backward_kernel (dK)", 3 * product, 6 * tensor),
            Work("attention_backward_kernel (dV)", 2 * product, 5 * tensor),
        ]
    return [
        Work("pack_kernel (Q, K)", 0, 4 * tensor),
        Work("stats_kernel", 0, 2 * tensor),
        *keys,
        Work("attention_backward_kernel (dQ)", 3 * product, 6 * tensor),
        Work("finish_kernel (dQ, dK, dV)", 0, 9 * tensor),
    ]


def works() -> list[tuple[str, list[Work]]]:
    elements = 32 * 1024 * 512
    found = [("rope, bfloat16 (8, 8, 1024, 64)", [Work("rope_kernel", 0, 4.0 * 8 * 8 * 1024 * 64)])]
    for head_dim in HEAD_DIMS:
        title = f"rope_attention, bfloat16 (8, 8, 1024, {head_dim})"
        found += [(title, attention_work(8, 8, 1024, head_dim, False))]
        found += [(f"{title}, backward", attention_work(8, 8, 1024, head_dim, True))]
    # A tile has 16 rows, whatever part of them is queries: products with tokens, 2 forward, 5 backward.
    pool = "late_cls_pool, bfloat16 (32, 1024, 512), 8 queries"
    found += [(pool, [Work("forward_tiles_kernel", 2 * 2.0 * elements * 16, 2.0 * elements)])]
    backward = Work("backward_tiles_kernel", 5 * 2.0 * elements * 16, 4.0 * elements)
    return [*found, (f"{pool}, backward", [backward])]


def roofline_rows() -> list[list[object]]:
    """Kernel, GFLOP, MB, microseconds on each chip, and what limits it there."""
    rows: list[list[object]] = []
    for title, parts in works():
        sums = [sum(work.time(chip.bfloat16_flops, chip.bandwidth) for work in parts) for chip in CHIPS]
        rows.append([f"**{title}**", "", "", *(f"**{time:.1f}**" for time in sums), ""])
        for work in parts:
            times = [work.time(chip.bfloat16_flops, chip.bandwidth) for chip in CHIPS]
            limits = [
                "memory" if work.flops / chip.bfloat16_flops < work.moved / chip.bandwidth else "tensor cores"
                for chip in CHIPS
            ]
            limit = limits[0] if len(set(limits)) == 1 else ", ".join(limits)
            cells = [f"{work.flops / 1e9:.2f}", f"{work.moved / 1e6:.1f}", *(f"{time:.1f}" for time in times)]
            rows.append([f"`{work.kernel}`", *cells, limit])
    return rows
