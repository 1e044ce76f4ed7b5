"""Whether the operators compute what they should on the data that trained models make of real recordings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from x_rope_cls import Rotary, late_cls_pool, reference, rope_attention

from .data import Split, Task
from .model import (
    CLS_IN_FRONT,
    NUM_SPECIAL,
    OWN_POOL,
    PLAIN,
    POOL,
    VARIANTS,
    Classifier,
    Size,
    build,
    tables,
    tables_for,
    token_positions,
    with_own_pool,
)
from .train import logits

_NORMS = (None, "layer", "rms")  # as late_cls_pool's operator numbers them

# A function of leaves in any dtype, through the operators and through the reference, and its leaves in float32.
_Case = tuple[Callable[..., Tensor], Callable[..., Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Agreement:
    """Largest error of outputs and gradients, over all layers of a trained model on real recordings.

    Errors are in units of the dtype's eps times the largest element of the float64 reference.

    Attributes:
        variant: a key of VARIANTS.
        dtype: of the inputs.
        output: of the operator.
        output_eager: of the reference's formulas in plain PyTorch, in this dtype.
        gradient: of the operator, over all its inputs.
        gradient_eager: likewise of plain PyTorch.
    """

    variant: str
    dtype: str
    output: float
    output_eager: float
    gradient: float
    gradient_eager: float


def agreement(model: Classifier, split: Split, rotary: Rotary, size: Size) -> list[Agreement]:
    """Compares an operator with the float64 reference on what a trained model makes of recordings.

    With CLS in front that is rope_attention, on q, k and v of every layer. With late CLS it is late_cls_pool, on all
    calls that the model makes; with a pool, on those of this package's AttentionPool with the same weights.

    Args:
        model: trained.
        split: the recordings.
        rotary: tables of [memory, CLS, tokens].
        size: of the encoder.
    """
    in_front = model.variant in CLS_IN_FRONT
    cases = (_attention_cases if in_front else _pool_cases)(model, split, rotary, size)
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        eps = torch.finfo(dtype).eps
        worst = [0.0] * 4
        for operator, plain, leaves in cases:
            rounded = [t.to(dtype) for t in leaves]
            exact = _run(plain, [t.double() for t in rounded])
            errors = []
            for function in (operator, plain):
                got = _run(function, rounded)
                errors.append([_error(a, b) / eps for a, b in zip(got, exact, strict=True)])
            found = [errors[0][0], errors[1][0], max(errors[0][1:]), max(errors[1][1:])]
            worst = [max(pair) for pair in zip(worst, found, strict=True)]
        rows.append(Agreement(model.variant, str(dtype).removeprefix("torch."), *worst))
    return rows


def _run(function: Callable[..., Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Output, and gradients of its product with fixed random numbers."""
    leaves = [t.detach().requires_grad_() for t in given]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(leaves[0].dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))]


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def _attention_cases(model: Classifier, split: Split, rotary: Rotary, size: Size) -> list[_Case]:
    mask = None if split.mask is None else nn.functional.pad(split.mask, (NUM_SPECIAL, 0), value=True)
    options = {
        "rotary": with_special(rotary),
        "cls_rope": VARIANTS[model.variant]["cls_rope"],
        "key_mask": mask,
    }
    functions = partial(rope_attention, **options), partial(reference.rope_attention, **options)
    return [(*functions, qkv) for qkv in record_qkv(model, split, rotary, size)]


def _pool_cases(model: Classifier, split: Split, rotary: Rotary, size: Size) -> list[_Case]:
    if model.variant == POOL:
        model = with_own_pool(model, size)
    recorder = _PoolCalls()
    with recorder:
        logits(model, split, tables_for(model.variant, rotary))
    if not recorder.calls:
        raise RuntimeError(f"demo: {model.variant} must run late_cls_pool, got no call of it")
    return [_pool_case(*call) for call in recorder.calls]


def _pool_case(
    x: Tensor,
    query: Tensor,
    key_mask: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: float,
    norm: int,
    norm_eps: float,
) -> _Case:
    """Of one call of late_cls_pool's operator."""
    given = {"x": x, "query": query, "norm_weight": norm_weight, "norm_bias": norm_bias}
    leaves = {name: t for name, t in given.items() if t is not None}
    options: dict[str, Any] = {"key_mask": key_mask, "scale": scale, "norm": _NORMS[norm], "norm_eps": norm_eps}

    def call(function: Any, *tensors: Tensor) -> Tensor:
        pooled: Tensor = function(**dict(zip(leaves, tensors, strict=True)), **options)
        return pooled

    return partial(call, late_cls_pool), partial(call, reference.late_cls_pool), list(leaves.values())


class _PoolCalls(TorchDispatchMode):
    """Keeps the arguments of every call of late_cls_pool's operator.

    Attributes:
        calls: in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.x_rope_cls.late_cls_pool.default:
            self.calls.append(tuple(a.clone() if isinstance(a, Tensor) else a for a in args))
        return func(*args, **(kwargs or {}))


def with_special(rotary: Rotary) -> Rotary:
    """Tables of [memory, CLS, tokens], saying that the special tokens have no position."""
    has_position = torch.arange(rotary.cos.shape[0]) >= NUM_SPECIAL
    return Rotary(rotary.cos, rotary.sin, has_position, rotary.interleaved)


def record_qkv(model: Classifier, split: Split, rotary: Rotary, size: Size) -> list[list[Tensor]]:
    """q, k and v of each attention layer with CLS in front, (recordings, heads, tokens, head_dim)."""
    found: dict[str, list[Tensor]] = {"to_q": [], "to_k": [], "to_v": []}
    with _outputs_of(model, found):
        logits(model, split, rotary)
    heads = [[t.unflatten(-1, (size.heads, size.dim_head)).transpose(1, 2) for t in ts] for ts in found.values()]
    return [list(layer) for layer in zip(*heads, strict=True)]


@contextmanager
def _outputs_of(model: nn.Module, found: dict[str, list[Tensor]]) -> Iterator[None]:
    """Appends the outputs of all submodules with these names, in the order of the calls."""

    def recorder(name: str) -> Any:
        return lambda module, inputs, output: found[name].append(output.clone())

    handles = []
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in found:
            handles.append(module.register_forward_hook(recorder(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def parity(model: Classifier, task: Task, size: Size) -> float:
    """Largest difference of a test logit between a trained model and x-transformers' code with its weights.

    Args:
        model: of the variant "rotate", beside x_transformers.Encoder; or with x_transformers.AttentionPool, beside this
            package's.
        task: the data.
        size: of the encoder.
    """
    if model.variant == POOL:
        peer, name = with_own_pool(model, size), OWN_POOL
    else:
        peer, name = build(PLAIN, task, size, seed=0), PLAIN
        peer.load_state_dict(model.state_dict())
    rotary = tables(token_positions(task.positions), size)
    theirs = logits(peer, task.test, tables_for(name, rotary))
    return (logits(model, task.test, tables_for(model.variant, rotary)) - theirs).abs().max().item()
