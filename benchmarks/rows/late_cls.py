"""Encoder whose CLS token enters in the penultimate layer, beside the one that has it in all layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Row, Run, Side
from .encoder import encoder_run


def rows() -> list[Row]:
    """Both ways to go on after CLS has entered, forward and training step."""
    return [
        Row(
            name=f"late-cls/{late_cls}/{work.replace(' ', '-')}",
            title=f"Encoder late_cls={late_cls!r} {work}",
            build=_build,
            sizes={"batch": 1, "tokens": 1024, "dim": 512, "depth": 6, "late_cls": late_cls, "backward": backward},
            tiny={"batch": 1, "tokens": 20, "dim": 64, "depth": 3},
            backward=backward,
            tolerance=1e-3,
            quick=not backward,
            note=(
                "dim 512, depth 6, heads 8, N 1024 and CLS; the peer has CLS in all layers, cls_rope 'mask'; "
                "ours is compared with itself in float64"
            ),
        )
        for late_cls in ("class_attention", "join")
        for work, backward in (("forward", False), ("training step", True))
    ]


def _build(batch: int, tokens: int, dim: int, depth: int, late_cls: str, backward: bool) -> Case:
    import x_rope_cls

    options: dict[str, Any] = {"dim": dim, "depth": depth, "heads": dim // 64, "rotary_pos_emb": True}
    options |= {"attn_flash": True, "cls_rope": "mask"}
    late = x_rope_cls.Encoder(**options, late_cls=late_cls)
    everywhere = x_rope_cls.Encoder(**options, num_prefix_tokens=1)
    x, cls_token = torch.randn(batch, tokens, dim), torch.randn(batch, 1, dim)
    grad = torch.randn(batch, 1 + tokens, dim)
    return Case(
        encoder_run(late, x, grad, backward),
        [
            Side(
                "CLS in all layers",
                encoder_run(everywhere, torch.cat((cls_token, x), 1), grad, backward),
                1.0,
                same=False,
            )
        ],
        expected=_exact(late, x, grad, backward),
    )


def _exact(encoder: Any, x: Tensor, grad: Tensor, backward: bool) -> Run:
    """The same encoder in float64, made when it is called: once."""
    return lambda: encoder_run(copy.deepcopy(encoder).double(), x.double(), grad.double(), backward)()
