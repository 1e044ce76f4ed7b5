"""AttentionPool: one or a few CLS queries over all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from x_rope_cls import late_cls_pool

from ..case import OURS, TOLERANCE, Case, Row, Side, Work, one_thread, with_gradients

_NOTE = (
    "limit: x read once forward (read bandwidth); with the backward read twice and its gradient written once; "
    "or 4·B·N·C·H·M operations, 14·B·N·C·H·M with the backward"
)
_SIZES = {"batch": 8, "tokens": 1024, "dim": 512, "heads": 8, "queries": 1}
_LONG = {"batch": 1, "tokens": 65536, "dim": 768, "heads": 12, "queries": 1}
_TINY = {"batch": 2, "tokens": 19, "dim": 32, "heads": 2}


def rows() -> list[Row]:
    """Dtypes, forward and backward; several CLS tokens; one long sequence."""
    return [
        _row("forward/float32", "pool forward, float32", target=60.0, share_target=0.75),
        _row("forward-backward/float32", "pool forward + backward, float32", target=35.0, share_target=0.60),
        _row("forward/bfloat16", "pool forward, bfloat16", dtype=torch.bfloat16, target=40.0),
        _row("forward-backward/bfloat16", "pool forward + backward, bfloat16", dtype=torch.bfloat16, target=30.0),
        _row("forward/4-cls", "pool forward, 4 CLS", queries=4, target=20.0, share_target=0.75),
        _row("forward/16-cls", "pool forward, 16 CLS", queries=16, target=5.0, share_target=0.75),
        _row("forward/long", "pool forward, one sequence, N 65536", **_LONG, target=60.0, share_target=0.75, busy=0.9),
    ]


def _row(name: str, title: str, *, share_target: float | None = None, busy: float | None = None, **sizes: Any) -> Row:
    dtype = sizes.get("dtype", torch.float32)
    return Row(
        name=f"pool/{name}",
        title=title,
        build=_build,
        sizes={**_SIZES, "dtype": dtype, "backward": "backward" in name, **sizes},
        tiny={**_TINY, "queries": min(4, sizes.get("queries", 1))},
        backward="backward" in name,
        tolerance=TOLERANCE[dtype],
        share_target=share_target,
        busy_target=busy,
        note=_NOTE,
    )


def _build(
    batch: int, tokens: int, dim: int, heads: int, queries: int, dtype: torch.dtype, backward: bool, target: float
) -> Case:
    import x_transformers

    import x_rope_cls

    options = {"dim": dim, "num_pooled_tokens": queries, "heads": heads, "dim_head": dim // heads}
    theirs, ours = x_transformers.AttentionPool(**options), x_rope_cls.AttentionPool(**options)
    with torch.no_grad():
        theirs.queries.normal_(std=2.0)  # as new they are so small that every token would have the same weight
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    x = torch.randn(batch, tokens, dim).to(dtype).requires_grad_(backward)
    grad = torch.randn(batch, queries, dim).to(dtype)

    def run(module: Any, parameters: list[Tensor]) -> Any:
        return with_gradients(lambda: module(x), [x, *parameters], grad) if backward else lambda: module(x)

    ours_run = run(ours, list(ours.parameters()))
    compiled = torch.compile(theirs)
    peers = [
        Side("x-transformers", run(theirs, list(theirs.parameters())), target=target),
        Side("x-transformers compiled", run(compiled, list(theirs.parameters())), slow=True),
    ]
    if not backward:
        query = torch.randn(1, heads, queries, dim).to(dtype) / dim**0.5
        peers.append(Side("late_cls_pool alone", lambda: late_cls_pool(x, query), same=False))
        if batch == 1 and torch.get_num_threads() > 1:
            peers.append(Side(f"{OURS}, 1 thread", one_thread(ours_run)))
    return Case(ours_run, peers, _work(x, heads, queries, backward))


def _work(x: Tensor, heads: int, queries: int, backward: bool) -> Work:
    size = x.numel() * x.element_size()
    flops = (14 if backward else 4) * x.numel() * heads * queries
    # Copying counts bytes read plus bytes written: the backward reads x and writes as much.
    return Work(flops=flops, read=size, copied=2 * size if backward else 0)
