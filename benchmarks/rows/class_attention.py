"""The class-attention layer of CaiT: attention of CLS over all tokens, and its feed-forward."""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any

import torch

from ..case import Case, Row, Side, with_gradients


def rows() -> list[Row]:
    """CaiT-S at 384 x 384 pixels: 576 patches."""
    return [
        Row(
            name=f"class-attention/{work.replace(' + ', '-')}",
            title=f"class attention (CaiT) {work}",
            build=_build,
            sizes={"batch": 16, "tokens": 576, "dim": 384, "heads": 8, "backward": backward, "target": target},
            tiny={"batch": 2, "tokens": 20, "dim": 32, "heads": 2},
            backward=backward,
            tolerance=1e-4,
            note="dim 384, 8 heads, N 576, batch 16, float32; gradients to tokens, CLS and weights",
        )
        for work, backward, target in (("forward", False, 3.0), ("forward + backward", True, None))
    ]


def _build(batch: int, tokens: int, dim: int, heads: int, backward: bool, target: float | None) -> Case:
    import_timm()
    from timm.models.cait import LayerScaleBlockClassAttn

    from x_rope_cls import ClassAttention

    options: dict[str, Any] = {"dim": dim, "num_heads": heads, "qkv_bias": True, "init_values": 1.0}
    theirs, ours = LayerScaleBlockClassAttn(**options), ClassAttention(**options)
    with torch.no_grad():
        for layer in (theirs.attn.q, theirs.attn.k):
            layer.weight.normal_(std=dim**-0.5)  # as new they are so small that every token would have the same weight
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(batch, tokens, dim).requires_grad_(backward)
    x_cls = torch.randn(batch, 1, dim).requires_grad_(backward)
    grad = torch.randn(batch, 1, dim)

    def run(module: Any) -> Any:
        if not backward:
            return lambda: module(x, x_cls)
        # The key's bias adds the same to all scores: its gradient is 0, and PyTorch's is rounding.
        weights = [weight for name, weight in module.named_parameters() if name != "attn.k.bias"]
        return with_gradients(lambda: module(x, x_cls), [x, x_cls, *weights], grad)

    names = [name for name, _ in theirs.named_parameters()]
    assert names == [name for name, _ in ours.named_parameters()], "parameters are in another order"
    return Case(run(ours), [Side("timm", run(theirs), target=target)])


def import_timm() -> ModuleType:
    """The timm package, also where torchvision, which it imports, was built for another torch.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    while True:
        try:
            return importlib.import_module("timm")
        except RuntimeError as error:  # an operator of torchvision that its unloadable library should have defined
            missing = re.fullmatch(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(missing[1], "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
