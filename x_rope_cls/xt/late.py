"""Late CLS: the settings of an encoder, and what one forward keeps while CLS enters and pools.

The layers are run by x-transformers' own ``AttentionLayers.forward`` on a :class:`View` of the encoder whose late
layers are wrapped (``late_layers``). Before the entry x holds the tokens alone and nothing is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
import x_transformers.x_transformers as xt
from torch import Tensor, nn

from .._checks import check_choice, check_count
from .positions import PositionTables

LateCls = Literal["class_attention", "join"]
LATE_CLS = ("class_attention", "join")
_STD = 0.02


def configure_late(encoder: Any, late_cls: LateCls | None, late_cls_at: int, num_cls_tokens: int) -> None:
    """Gives an encoder late CLS tokens, or takes them away. As many as it had stay the same parameter.

    Raises:
        TypeError, ValueError: see :func:`check_late`.
    """
    check_late(encoder, late_cls, late_cls_at, num_cls_tokens)
    tokens = getattr(encoder, "late_cls_tokens", None)
    count = num_cls_tokens if late_cls is not None else 0
    if count == 0:
        tokens = None
    elif tokens is None or tokens.shape[0] != count:
        like = next(encoder.parameters())
        tokens = nn.Parameter(torch.empty(count, encoder.dim, device=like.device, dtype=like.dtype))
        nn.init.normal_(tokens, std=_STD)
    encoder.late_cls, encoder.late_cls_at, encoder.num_cls_tokens = late_cls, late_cls_at, num_cls_tokens
    encoder.register_parameter("late_cls_tokens", tokens)


def check_late(encoder: Any, late_cls: LateCls | None, late_cls_at: int, num_cls_tokens: int) -> None:
    """Checks settings of late CLS, and refuses what leaves them no meaning.

    Raises:
        TypeError, ValueError: see :class:`x_rope_cls.Encoder`.
    """
    if late_cls is None:
        return
    check_choice("Encoder", "late_cls", late_cls, LATE_CLS)
    check_count("Encoder", "num_cls_tokens", num_cls_tokens)
    if "a" not in encoder.layer_types:
        raise ValueError(f"Encoder: late_cls must be None without self-attention layers to enter at, got {late_cls!r}")
    if any(getattr(module, "flash_pack_seq", False) for module in encoder.modules()):
        raise ValueError(
            "Encoder: late_cls must be None with attn_flash_pack_seq, whose rows hold several sequences and would "
            f"share their CLS tokens, got {late_cls!r}"
        )
    if encoder.has_own_forward:
        raise ValueError(
            f"Encoder: late_cls must be None for {type(encoder).__name__}, whose own forward would run without it, "
            f"got {late_cls!r}"
        )
    entry_position(encoder.layer_types, encoder.layers_execute_order, late_cls_at)


def entry_position(layer_types: Sequence[str], order: Sequence[int], late_cls_at: int) -> int:
    """Where in the order of execution CLS tokens enter: the position of a self-attention layer.

    Raises:
        TypeError, ValueError: late_cls_at is no integer, or there is no such layer.
    """
    if isinstance(late_cls_at, bool) or not isinstance(late_cls_at, int):
        raise TypeError(f"Encoder: late_cls_at must be an integer, got {late_cls_at!r}")
    found = [position for position, layer in enumerate(order) if layer_types[layer] == "a"]
    if not -len(found) <= late_cls_at < len(found):
        expected = f"from {-len(found)} to {len(found) - 1} for {len(found)} self-attention layers"
        raise ValueError(f"Encoder: late_cls_at must be {expected}, got {late_cls_at}")
    return found[late_cls_at]


def late_roles(encoder: Any, attention: nn.Module) -> tuple[bool, bool]:
    """Whether a self-attention layer of an encoder serves tokens, and whether late CLS attends in it to all."""
    order, joins = encoder.layers_execute_order, encoder.late_cls == "join"
    entry = entry_position(encoder.layer_types, order, encoder.late_cls_at)
    positions = [p for p, i in enumerate(order) if any(m is attention for m in encoder.layers[i].modules())]
    tokens = any(position < entry or joins for position in positions)
    return tokens, any(position == entry or (position > entry and not joins) for position in positions)


def given_cls_tokens(encoder: Any, cls_tokens: Any, x: Tensor) -> Tensor:
    """The CLS tokens of a call as (batch, cls, dim).

    Raises:
        TypeError, ValueError: there are none, or of another shape.
    """
    if cls_tokens is None:
        cls_tokens = encoder.late_cls_tokens
        if cls_tokens is None:
            raise ValueError("Encoder: cls_tokens must be passed to forward with num_cls_tokens=0, got None")
    if not isinstance(cls_tokens, Tensor):
        raise TypeError(f"Encoder: cls_tokens must be a tensor, got {type(cls_tokens).__name__}")
    batch, _, dim = x.shape
    shape = cls_tokens.shape
    if cls_tokens.dim() not in (2, 3) or shape[-1] != dim or shape[-2] == 0 or (len(shape) == 3 and shape[0] != batch):
        expected = f"(cls, {dim}) or ({batch}, cls, {dim}), with cls at least 1"
        raise ValueError(f"Encoder: cls_tokens must be of shape {expected}, got {tuple(shape)}")
    return cls_tokens.to(x.dtype).expand(batch, -1, -1)


class LateCall:
    """One forward of an encoder with late CLS.

    Attributes:
        joins: CLS joins the sequence; else the tokens stay as they are from the entry on.
        cls: (batch, cls, dim), the CLS tokens as they enter.
        num_cls, num_tokens: rows of CLS and of the sequence.
        order: indices of the layers in the order of execution.
        entry: position in that order at which CLS enters.
        entered: the entry is behind us.
        attended, cross_attended: a late self, or cross, attention is behind us.
        frozen: (batch * streams, tokens, dim), the tokens as they were at the entry; None while joining.
        layer_tokens: frozen as the input of the present layer, after its skip connection.
        branch: what the present layer's branch reads of layer_tokens: (batch, tokens, dim), or three of them.
        branches: the same of every late layer, before any layer integration.
        norm_condition: what the present pre-norm is called with beside its input.
        early_hiddens: how many layer_hiddens x-transformers had collected at the entry.
        executed: positions of the late layers that were not dropped.
        late_values: values of the first self attention, if that was a late one.
        weights: attention maps of CLS, one for each late self attention; None: not asked for.
    """

    def __init__(self, encoder: Any, x: Tensor, cls_tokens: Any, kwargs: dict[str, Any], need_weights: bool) -> None:
        self.encoder = encoder
        self.joins: bool = encoder.late_cls == "join"
        self.cls = given_cls_tokens(encoder, cls_tokens, x)
        self.num_cls, self.num_tokens = self.cls.shape[1], x.shape[1]
        self.order = _execution_order(encoder, kwargs)
        self.entry = entry_position(encoder.layer_types, self.order, encoder.late_cls_at)
        self.entered = self.attended = self.cross_attended = False
        self.frozen: Tensor | None = None
        self.layer_tokens: Tensor | None = None
        self.branch: Any = None
        self.branches: list[Tensor] = []
        self.norm_condition: dict[str, Any] = {}
        self.early_hiddens: int | None = None
        self.executed: list[int] = []
        self.late_values: Any = None
        self.weights: list[Tensor] | None = [] if need_weights else None
        self.all_branches = bool(kwargs.get("return_hiddens")) or any(m is not None for m in encoder.layer_integrators)
        self.injected = _injection(encoder, x, self.cls, kwargs)
        self._tables: tuple[Any, Any] = (None, None)

    def layer_type(self, position: int) -> str:
        """Self attention ("a"), cross attention ("c") or feed-forward ("f")."""
        kind: str = self.encoder.layer_types[self.order[position]]
        return kind

    def needs_tokens(self, position: int) -> bool:
        """In class attention: the layer at this position reads the tokens."""
        return not self.joins and (self.all_branches or self.layer_type(position) == "a")

    @property
    def cls_streams(self) -> Tensor:
        """The CLS tokens as x-transformers lays out residual streams: (batch * streams, cls, dim)."""
        streams = self.encoder.num_residual_streams
        if streams == 1:
            return self.cls
        by_stream: Tensor = self.cls[:, None] + self.encoder.stream_emb[:, None]
        return by_stream.flatten(0, 1)

    def enter(self, x: Tensor) -> Tensor:
        """From the tokens to what the late layers carry: CLS alone, or CLS and tokens."""
        self.entered = True
        if self.joins:
            return torch.cat((self.cls_streams, x), dim=-2)
        self.frozen = x
        return self.cls_streams

    def with_history(self, hidden: Tensor) -> Tensor:
        """A hidden state from before the entry, with CLS in front as if it had stood there unchanged."""
        return torch.cat((self.cls_history(hidden), hidden), dim=-2)

    def cls_history(self, hidden: Tensor) -> Tensor:
        """What CLS was when this hidden state, (..., batch, tokens, dim), was that of the tokens."""
        return self.cls.expand(*hidden.shape[:-2], -1, -1)

    def late_tables(self, tables: Any) -> PositionTables | None:
        """The rotation tables of CLS and tokens."""
        if tables is None:
            return None
        if self._tables[0] is not tables:
            self._tables = (tables, tables.with_cls(self.num_cls, self.num_tokens))
        late: PositionTables = self._tables[1]
        return late

    def pad_mask(self, mask: Tensor | None) -> Tensor | None:
        """A key padding mask over (mems and) tokens, with CLS in front of the tokens."""
        return None if mask is None else insert_cls(mask, self.num_cls, self.num_tokens, -1, True)

    def add_weights(self, weights: Tensor | None) -> None:
        """Keeps an attention map (batch, heads, cls, keys); CLS and tokens are the last of the keys."""
        if self.weights is not None and weights is not None:
            self.weights.append(weights[..., -(self.num_cls + self.num_tokens) :])

    def finish(self, result: Any) -> Any:
        """What forward returns, from what x-transformers returned."""
        if isinstance(result, tuple):
            self._finish_hiddens(result[1])
        if self.weights is None:
            return result
        return (*result, self.weights) if isinstance(result, tuple) else (result, self.weights)

    def _finish_hiddens(self, intermediates: Any) -> None:
        """``hiddens`` (what mems are made of) hold tokens alone, all other late states CLS in front of the tokens."""
        attentions = sum(self.layer_type(position) == "a" for position in self.executed)
        hiddens = intermediates.hiddens
        for index in range(len(hiddens) - attentions, len(hiddens)):
            hiddens[index] = hiddens[index][..., self.num_cls :, :] if self.joins else self.frozen
        if self.frozen is None:
            return
        layer_hiddens = intermediates.layer_hiddens
        late = [*self.branches, self.frozen]
        for index, tokens in zip(range(len(layer_hiddens) - len(late), len(layer_hiddens)), late, strict=True):
            layer_hiddens[index] = torch.cat((layer_hiddens[index], tokens), dim=-2)
        block_hiddens = getattr(intermediates, "block_hiddens", None)
        if not block_hiddens:
            return
        ends = sum(self._ends_block(position) for position in self.executed)
        for index in range(max(0, len(block_hiddens) - ends), len(block_hiddens) - 1):  # the last is the output
            block_hiddens[index] = torch.cat((block_hiddens[index], self.frozen), dim=-2)

    def _ends_block(self, position: int) -> bool:
        return (position + 1) % self.encoder.len_default_block == 0 or position == len(self.order) - 1


def insert_cls(t: Tensor, num_cls: int, num_tokens: int, dim: int, value: Any) -> Tensor:
    """Rows for CLS in front of the last ``num_tokens`` of a dimension; one that is broadcast stays as it is."""
    if t.shape[dim] == 1 != num_tokens:
        return t
    at = t.shape[dim] - num_tokens
    front, tokens = t.narrow(dim, 0, at), t.narrow(dim, at, num_tokens)
    shape = list(t.shape)
    shape[dim] = num_cls
    return torch.cat((front, t.new_full(shape, value), tokens), dim=dim)


def _execution_order(encoder: Any, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The order of this call, as x-transformers makes it from its arguments, which are taken away."""
    order = kwargs.pop("layers_execute_order", None)
    repeats = kwargs.pop("repeat_blocks", None)
    if repeats is not None:
        if order is not None or encoder.has_custom_layer_types:
            got = "layers_execute_order" if order is not None else "custom layer types"
            raise ValueError(f"Encoder: repeat_blocks must be None with {got}, got {repeats!r}")
        length = encoder.len_default_block
        blocks = len(encoder.layer_types) // length
        order = xt.resolve_repeat_blocks_to_layer_execute_order(repeats, blocks, length)
    return tuple(encoder.layers_execute_order if order is None else order)


def _injection(encoder: Any, x: Tensor, cls: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """What is added to the input of every layer's branch, for CLS and for tokens.

    With reinject_input both are projections of what entered. A condition given per token (in_attn_cond) has nothing
    for CLS.
    """
    given = kwargs.pop("in_attn_cond", None)
    if encoder.reinject_input:
        if given is not None:
            raise ValueError("Encoder: in_attn_cond must be None with reinject_input, got a tensor")
        rows = [encoder.reinject_input_proj(cls), encoder.reinject_input_proj(x)]
    elif given is None:
        return None
    elif given.dim() == 2:
        rows = [given[:, None], given[:, None]]
    else:
        rows = [cls.new_zeros(()).expand_as(cls), given]
    if encoder.learned_reinject_input_gate is not None:
        gate: Callable[[Tensor], Tensor] = encoder.learned_reinject_input_gate
        rows = [row * gate(t).sigmoid() for row, t in zip(rows, (cls, x), strict=True)]
    return rows[0], rows[1]


def pad_rows(t: Tensor, num_cls: int, value: float = 0.0) -> Tensor:
    """(..., tokens, dim) with rows of one value in front."""
    return F.pad(t, (0, 0, num_cls, 0), value=value)
