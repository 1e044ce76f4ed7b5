"""The whole encoder beside x-transformers', with the same weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..case import Case, Row, Run, Side, Work, with_gradients

_BATCH = {256: 4, 1024: 1, 4096: 1}
_EAGER = {256: 1.05, 1024: 1.1, 4096: 1.2}
_COMPILED = {256: 1.0, 1024: 1.05, 4096: 1.15}


def rows() -> list[Row]:
    """Forward and training step over lengths; both sides compiled in rows of their own."""
    found = []
    for compiled, targets in ((False, _EAGER), (True, _COMPILED)):
        for backward in (False, True):
            work = "training step" if backward else "forward"
            for tokens, target in targets.items():
                found.append(
                    Row(
                        name=f"encoder/{'compiled' if compiled else 'eager'}/{work.replace(' ', '-')}/{tokens}",
                        title=f"Encoder {work}, {'compiled, ' if compiled else ''}N {tokens}",
                        build=_build,
                        sizes={
                            "batch": _BATCH[tokens],
                            "tokens": tokens,
                            "dim": 512,
                            "depth": 6,
                            "backward": backward,
                            "compiled": compiled,
                            "target": target,
                        },
                        tiny={"batch": 1, "tokens": 24, "dim": 64, "depth": 2},
                        backward=backward,
                        tolerance=1e-3,
                        series=(f"Encoder {work}{', compiled' if compiled else ''}", tokens),
                        quick=tokens == 1024 and not compiled and not backward,
                        note="dim 512, depth 6, heads 8; a training step is forward and backward to all parameters",
                    )
                )
    return found


def encoder_run(encoder: nn.Module, x: Tensor, grad: Tensor, backward: bool, compiled: bool = False) -> Run:
    """Forward, or forward and backward to all parameters."""
    call: Callable[[Tensor], Tensor] = torch.compile(encoder) if compiled else encoder
    return with_gradients(lambda: call(x), list(encoder.parameters()), grad) if backward else lambda: call(x)


def encoder_flops(batch: int, tokens: int, dim: int, depth: int, backward: bool) -> float:
    """Of the linear layers (heads * dim_head = dim, feed-forward 4 * dim) and the attention."""
    linear = depth * 24 * batch * tokens * dim**2
    attention = depth * 4 * batch * tokens**2 * dim
    return 3.0 * linear + 3.5 * attention if backward else float(linear + attention)


def _build(batch: int, tokens: int, dim: int, depth: int, backward: bool, compiled: bool, target: float) -> Case:
    import x_transformers

    import x_rope_cls

    options = {"dim": dim, "depth": depth, "heads": dim // 64, "rotary_pos_emb": True, "attn_flash": True}
    theirs = x_transformers.Encoder(**options)
    ours = x_rope_cls.Encoder(**options, cls_rope="rotate", num_prefix_tokens=1)
    ours.load_state_dict(theirs.state_dict())
    x, grad = torch.randn(batch, tokens, dim), torch.randn(batch, tokens, dim)
    name = f"x-transformers{' compiled' if compiled else ''}"
    peer = Side(name, encoder_run(theirs, x, grad, backward, compiled), target=target)
    flops = encoder_flops(batch, tokens, dim, depth, backward)
    return Case(encoder_run(ours, x, grad, backward, compiled), [peer], Work(flops=flops))
