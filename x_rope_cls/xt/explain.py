"""Which attention layers of a model run in the fused operator, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, overload

import torch
from torch import nn
from x_transformers.x_transformers import Attention, AttentionLayers

from .. import _C
from . import devices
from .absorbed import absorbed_reasons
from .attention import RopeAttention
from .attention_pool import AttentionPool
from .class_step import step_reasons
from .encoder import RopeEncoderMixin, attention_layers
from .late import entry_position, late_roles
from .swap import special_tokens
from .version import installed_version
from .vit import ViTransformerWrapper

_WIDEST_TENSOR_CORE_HEAD = 256
_KINDS = {"a": "self", "c": "cross"}
_NOT_CONVERTED = "not converted: built by x_transformers; swap_() converts encoders"


@dataclass(frozen=True)
class Row:
    """One attention layer.

    Attributes:
        layer: path of the module in the model.
        kind: "self", "cross", or "other" for attention outside an encoder's layers; "class": late CLS attends to itself
            and to all tokens; "pool": the queries of an AttentionPool attend to all tokens.
        fused: attention runs in this package's operators.
        reason: why it does not; in the ordinary form, why keys and values are formed; else "".
        cls_rope: what happens to tokens without a position.
        backend: what computes the attention: the CPU's instruction set; on CUDA whether tensor cores do it, for this
            head_dim and dtype (that of the weights, or of autocast), or the slower kernels on the FMA units.
        form: of attention of late CLS and of an AttentionPool: "absorbed" (keys and values of the tokens are never
            formed), "ordinary" or "composite"; "" for other layers.
    """

    layer: str
    kind: str
    fused: bool
    reason: str
    cls_rope: str
    backend: str
    form: str = ""


class Report(Sequence[Row]):
    """Rows of :func:`explain`; prints as a table."""

    def __init__(self, rows: Sequence[Row], notes: Sequence[str]) -> None:
        self.rows = tuple(rows)
        self.notes = tuple(notes)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def fused(self) -> bool:
        """All attention layers are fused."""
        return all(row.fused for row in self.rows)

    def __str__(self) -> str:
        forms = any(row.form for row in self.rows)
        names = [field.name for field in fields(Row) if forms or field.name != "form"]
        cells = [[_cell(getattr(row, name)) for name in names] for row in self.rows]
        widths = [max(len(row[i]) for row in [names, *cells]) for i in range(len(names))]
        lines = ["  ".join(map(str.ljust, row, widths)) for row in [names, *cells]]
        lines.insert(1, "  ".join("-" * width for width in widths))
        total = f"{sum(row.fused for row in self.rows)} of {len(self.rows)} attention layers fused"
        return "\n".join(line.rstrip() for line in [*lines, total, *self.notes])

    __repr__ = __str__


def explain(model: nn.Module) -> Report:
    """Tells which attention layers of a model are fused, and why the others are not.

    Args:
        model: any module with x-transformers attention somewhere in it, swapped or not.

    Returns:
        One row for each attention layer, in the order of the model's modules; two for a layer in which tokens attend to
        tokens and late CLS to all.
    """
    encoders = [(name, m) for name, m in model.named_modules() if isinstance(m, AttentionLayers)]
    owner: dict[int, tuple[str, AttentionLayers]] = {}
    for _, encoder in encoders:
        for layer_type, attention in attention_layers(encoder):
            owner[id(attention)] = (_KINDS[layer_type], encoder)
    pools = {id(m): pool for pool in model.modules() if isinstance(pool, AttentionPool) for m in pool.pooler.modules()}
    rows = [
        row
        for name, module in model.named_modules()
        if isinstance(module, Attention)
        for row in _rows(name, module, *owner.get(id(module), ("other", None)), pools.get(id(module)))
    ]
    given = {id(m.attn_layers): m.patch_rotary for m in model.modules() if isinstance(m, ViTransformerWrapper)}
    notes = [note for name, encoder in encoders for note in _notes(name, encoder, given.get(id(encoder)))]
    notes += [note for name, module in model.named_modules() for note in _uncounted(name, module)]
    return Report(rows, [*notes, f"x-transformers {installed_version()}"])


def _rows(name: str, attention: Attention, kind: str, encoder: Any, pool: AttentionPool | None) -> list[Row]:
    row = _row(name, attention, kind, encoder)
    if pool is not None:
        return [_pool_row(row, attention, pool)]
    if kind != "self" or getattr(encoder, "late_cls", None) is None:
        return [row]
    early, pools = late_roles(encoder, attention)
    rows = [row] if early or not pools else []
    return [*rows, _class_row(row, attention, encoder)] if pools else rows


def _pool_row(row: Row, attention: Attention, pool: AttentionPool) -> Row:
    """The row of an attention in an AttentionPool, as it is now: in training or not."""
    if not row.fused:
        return replace(row, kind="pool", form="composite")
    learned: Any = pool.queries
    reasons = absorbed_reasons(attention, None if learned is None else learned.shape[0], memory_apart=True)
    return replace(row, kind="pool", form="ordinary" if reasons else "absorbed", reason="; ".join(reasons))


def _class_row(row: Row, attention: Attention, encoder: Any) -> Row:
    """The row of late CLS in a self-attention layer."""
    if not row.fused:
        return replace(row, kind="class", form="composite")
    own = encoder.late_cls_tokens
    reasons = step_reasons(
        attention,
        None if own is None else own.shape[0],
        encoder.add_value_residual,
        getattr(encoder, "polar_pos_emb", None) is not None,
        attention.qkv_receive_diff_residuals,
    )
    return replace(row, kind="class", form="ordinary" if reasons else "absorbed", reason="; ".join(reasons))


def _row(name: str, attention: Attention, kind: str, encoder: Any) -> Row:
    if not isinstance(attention, RopeAttention):
        return Row(name, kind, False, _NOT_CONVERTED, "rotate", "x_transformers")
    cls_rope = getattr(encoder, "cls_rope", "rotate")
    attend: Any = attention.attend
    device = next(attention.parameters()).device.type
    reasons = list(attend.composite_reasons)
    if device not in devices.FUSED_DEVICE_TYPES:
        reasons.append(_no_kernel(device))
    if reasons:
        return Row(name, kind, False, "; ".join(reasons), cls_rope, "x_transformers")
    return Row(name, kind, True, "", cls_rope, _backend(attention))


def _no_kernel(device: str) -> str:
    why = _C.build_info()["cuda_reason"] if device == "cuda" else ""
    return f"no kernel for {device} in this build" + (f" ({why})" if why else "")


def _notes(name: str, encoder: AttentionLayers, given_rotary: nn.Module | None) -> list[str]:
    """What holds for all layers of an encoder, which its wrapper may give a rotary embedding."""
    where = name or type(encoder).__name__
    if not isinstance(encoder, RopeEncoderMixin):
        return []
    notes = [f"{where}: {_positions(encoder)}", *_late_notes(where, encoder)]
    if given_rotary is not None:
        notes.append(f"{where}: the wrapper's patch_rotary ({type(given_rotary).__name__}) gives the rotation")
    elif encoder.rotary_pos_emb is None:
        notes.append(f"{where}: no rotary_pos_emb, so nothing is rotated unless forward is given one")
    bias = next((b for b in (encoder.rel_pos, encoder.layers) if _is_bias(b)), None)
    if bias is not None and encoder.cls_rope != "rotate":
        notes.append(f"{where}: position biases still see tokens without a position; cls_rope is about rotation only")
    notes.append(f"{where}: calls with prev_attn, attn_delta, causal=True or under torch.func take the composite path")
    return notes


def _late_notes(where: str, encoder: Any) -> list[str]:
    if encoder.late_cls is None:
        return []
    order = encoder.layers_execute_order
    position = entry_position(encoder.layer_types, order, encoder.late_cls_at)
    own = encoder.late_cls_tokens
    count = "CLS tokens passed to forward" if own is None else f"{own.shape[0]} CLS tokens"
    then = {
        "class_attention": "from there on they alone are updated",
        "join": "from there on they are part of the sequence",
    }[encoder.late_cls]
    return [f"{where}: {count} enter at layers.{order[position]}, step {position + 1} of {len(order)}; {then}"]


def _uncounted(name: str, wrapper: nn.Module) -> list[str]:
    """Warns of a wrapper that adds tokens without a position which its encoder was not told of."""
    encoder = getattr(wrapper, "attn_layers", None)
    if not isinstance(encoder, RopeEncoderMixin) or encoder.rotate is not None:
        return []
    added, counted = special_tokens(wrapper), special_tokens(encoder)
    if added[0] <= counted[0] and added[1] <= counted[1]:
        return []
    where = name or type(wrapper).__name__
    return [
        f"{where}: adds {added[0]} tokens in front and {added[1]} at the end that have no position, but the encoder "
        f"counts {counted[0]} and {counted[1]}; swap_() or num_prefix_tokens / num_suffix_tokens tell it"
    ]


def _is_bias(module: Any) -> bool:
    if isinstance(module, nn.ModuleList):
        names = ("data_dependent_alibi", "rel_proj_pos_bias")
        return any(getattr(m, name, None) is not None for m in module.modules() for name in names)
    return module is not None


def _positions(encoder: RopeEncoderMixin) -> str:
    if encoder.rotate is not None:
        return f"{int((~encoder.rotate).sum())} of {encoder.rotate.numel()} tokens have no position (rotate)"
    counts = f"{encoder.num_prefix_tokens} in front, {encoder.num_suffix_tokens} at the end"
    return f"tokens without a position: {counts}"


def _backend(attention: Attention) -> str:
    """Device, and which kernels of it attend: the instruction set, or tensor cores or the slower arithmetic units."""
    weight: Any = next(attention.parameters())
    device = weight.device.type
    if device == "cpu":
        return f"cpu ({_C.cpu_isa()})"
    if device != "cuda":
        return str(device)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
    return f"cuda ({_cuda_kernels(dtype, _widest_head(attention))})"


def _widest_head(attention: Any) -> int:
    """The wider of the head_dims of keys and of values."""
    return max(int(split.axes_lengths["d"]) for split in (attention.split_k_heads, attention.split_v_heads))


def _cuda_kernels(dtype: torch.dtype, head_dim: int) -> str:
    """What `native_dim` in csrc/kernels/cuda/attention_choices.h decides, in words."""
    name = str(dtype).removeprefix("torch.")
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FMA units: {name}; tensor cores take bfloat16 and float16"
    if head_dim > _WIDEST_TENSOR_CORE_HEAD:
        return f"FMA units: head_dim {head_dim}; tensor cores take up to {_WIDEST_TENSOR_CORE_HEAD}"
    return f"tensor cores, {name}"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
