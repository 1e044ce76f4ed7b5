"""The CUDA kernels by family: what each is for, and why each template argument has the values it has."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from cuda_sass import Kernel

TYPES = ("bf16", "fp16", "float", "double")
ALL = "type of the elements, all four"
HALF = "type of the operands, the two of tensor cores"
FULL = "type of the elements, the two that tensor cores do not take"
SUM = "which sums a block has"


@dataclass(frozen=True)
class Family:
    """A kernel template."""

    purpose: str
    reasons: tuple[str, ...] = field(default=())  # of each template argument


FAMILIES = {
    "rope_kernel": Family(
        "`rope`, `rope_qk`, forward and backward (the inverse is a sign)",
        (ALL, "what a thread takes: 16 bytes of adjacent pairs, 16 bytes of each half, or one pair of any stride"),
    ),
    "table_grad_kernel": Family(
        "gradient of the cosines and sines",
        (ALL, "type of the gradient: that of the elements, or float32 where attention keeps it so"),
    ),
    "order_kernel": Family("lists of the tokens with and without a position; one type, the flags'"),
    "pack_kernel": Family("queries, keys and values rotated once, ordered and dense", (ALL,)),
    "attention_forward_kernel": Family(
        "attention on tensor cores",
        (
            HALF,
            "channels, others are padded to the next: sums are kept in registers, so that loops over channels must be "
            "unrolled; 32, 64 and 128 are usual, 96 saves a quarter of the work of 128, 256 is the most that fits",
            "true: 128 rows a block; false: 16 rows, whose keys four warps share, for a few queries such as CLS",
            "true: with biases or dropout, whose code would cost other calls registers; narrow blocks, which wait for "
            "memory, always have it",
        ),
    ),
    "attention_merge_kernel": Family("joins parts of the keys where one block a head would not fill the GPU", (HALF,)),
    "attention_tiled_kernel": Family("attention on the FMA units: float32, float64, more than 256 channels", (ALL,)),
    "attention_backward_kernel": Family(
        "attention backward on tensor cores",
        (
            HALF,
            "channels, as forward",
            f"{SUM}: dQ; dK and dV together up to 128 channels, apart at 256, where registers have room for one",
            "true: with biases or dropout",
        ),
    ),
    "plain_kernel": Family("attention backward on the FMA units", (ALL, f"{SUM}: dQ, dK or dV")),
    "bias_kernel": Family("gradient of the bias, for calls that want it", (ALL,)),
    "stats_kernel": Family("logsumexp and delta of every query before attention backward", (ALL,)),
    "finish_kernel": Family("float32 sums of attention backward to gradients, rotated back", (ALL,)),
    "clear_kernel": Family("zero gradients of masked tokens", (ALL,)),
    "forward_tiles_kernel": Family("`late_cls_pool` on tensor cores", (HALF,)),
    "backward_tiles_kernel": Family("`late_cls_pool` backward on tensor cores, up to 16 queries dx too", (HALF,)),
    "token_grads_kernel": Family("`late_cls_pool` backward: dx of more than 16 queries", (HALF,)),
    "forward_fma_kernel": Family("`late_cls_pool` of float32 and float64, on the FMA units", (FULL,)),
    "backward_fma_kernel": Family("`late_cls_pool` backward of float32 and float64, up to 8 queries dx too", (FULL,)),
    "token_grads_fma_kernel": Family(
        "`late_cls_pool` backward of float32 and float64: dx of more than 8 queries", (FULL,)
    ),
    "stack_rows_kernel": Family("queries, and gradients backward, padded to the rows of a tile", (ALL,)),
    "merge_kernel": Family("`late_cls_pool`: joins parts of the tokens", (ALL,)),
    "merge_grads_kernel": Family("`late_cls_pool` backward: joins parts of the tokens", (ALL,)),
    "add_up_kernel": Family(
        "`late_cls_pool` backward: sums over the batch, in order",
        ("type of the sums: float32, or float64 of float64", "type of the gradient of the queries, all four"),
    ),
    "simple_scores_kernel": Family("`late_cls_pool` of sizes beyond the others: scores", (ALL,)),
    "simple_softmax_kernel": Family("`late_cls_pool` of sizes beyond the others: weights", (ALL,)),
    "simple_score_grads_kernel": Family(
        "`late_cls_pool` of sizes beyond the others, backward: gradients of scores", (ALL,)
    ),
    "simple_sums_kernel": Family(
        "`late_cls_pool` of sizes beyond the others: sums over the tokens",
        (ALL, "sums at a time: 2 where the weight of a norm wants its gradient"),
    ),
    "simple_token_grads_kernel": Family("`late_cls_pool` of sizes beyond the others, backward: dx", (ALL,)),
}


def family_rows(kernels: Iterable[Kernel]) -> list[list[object]]:
    """Rows of the table: family and purpose, number of instances, arguments with their values and reasons."""
    counts = Counter(kernel.family for kernel in kernels)
    values: dict[str, list[dict[str, None]]] = defaultdict(list)
    for kernel in sorted(kernels, key=lambda k: [natural(a) for a in k.arguments]):
        places = values[kernel.family]
        places += [{} for _ in kernel.arguments[len(places) :]]
        for place, argument in zip(places, kernel.arguments, strict=True):
            place[argument] = None
    assert set(counts) == set(FAMILIES), f"tools/cuda_families.py: {set(counts) ^ set(FAMILIES)}"
    rows: list[list[object]] = []
    for name, family in FAMILIES.items():
        assert len(values[name]) == len(family.reasons), f"tools/cuda_families.py: arguments of {name}"
        # Of a bool the reason says what both mean.
        arguments = [
            why if set(found) <= {"false", "true"} else f"{', '.join(found)}: {why}"
            for found, why in zip(values[name], family.reasons, strict=True)
        ]
        rows.append([f"`{name}`: {family.purpose}", counts[name], "<br>".join(arguments) or "-"])
    return rows


def natural(argument: str) -> tuple[int, str]:
    """Types as usual, then numbers by size, then names."""
    if argument in TYPES:
        return TYPES.index(argument) - len(TYPES), ""
    return (int(argument), "") if argument.isdigit() else (1 << 30, argument)
