"""The parts of late layers as x-transformers' ``AttentionLayers.forward`` calls them.

Each class stands in the place of one module and calls the real one. In class attention x is CLS alone, and the tokens,
which stay as they are, go through the same modules only where a layer reads them. While joining x is CLS and tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import x_transformers.x_transformers as xt
from torch import Tensor
from x_transformers.x_transformers import AttentionLayers, ShiftTokens

from .class_step import ClassStep
from .joined import JoinedCall, TokenValues, entry_intermediates
from .late import LateCall, insert_cls, pad_rows
from .view import View

# Residual connections that are not a matter of single rows.
_MIXING = tuple(
    getattr(xt, name) for name in ("MVSplitResidualUpdate", "OrthogonalResidualUpdate") if hasattr(xt, name)
)


def forward_late(encoder: Any, x: Tensor, cls_tokens: Any, need_weights: bool, kwargs: dict[str, Any]) -> Any:
    """``AttentionLayers.forward`` of an encoder with late CLS.

    Args:
        encoder: configured by ``configure_late``.
        x: (batch, tokens, dim).
        cls_tokens: as :meth:`Encoder.forward` takes them.
        need_weights: return the attention maps of CLS too.
        kwargs: arguments of x-transformers' forward; changed here.
    """
    condition = kwargs.get("condition")
    if condition is not None and condition.dim() == 3 and condition.shape[1] != 1:
        expected = "(batch, dim) or (batch, 1, dim) with late_cls, since CLS has no condition of a token"
        raise ValueError(f"Encoder: condition must be {expected}, got {tuple(condition.shape)}")
    call = LateCall(encoder, x, cls_tokens, kwargs, need_weights)
    if kwargs.get("transform_block_inputs") is not None:
        kwargs["transform_block_inputs"] = _transforms(call, kwargs["transform_block_inputs"])
    return call.finish(AttentionLayers.forward(_view(call), x, **kwargs))


def _view(call: LateCall) -> Any:
    """The encoder with its layers in the order of execution, the late ones wrapped."""
    encoder, order = call.encoder, call.order
    late = range(call.entry, len(order))
    skips, integrators = ([each[i] for i in order] for each in (encoder.skip_combines, encoder.layer_integrators))
    layers = [encoder.layers[i] for i in order]
    if call.injected is not None:
        for position in range(call.entry):
            integrators[position] = _Inject(integrators[position], call.injected[1])
    for position in late:
        (pre_norm, *post_norms), block, residual = layers[position]
        if call.needs_tokens(position) and pre_norm is not None:
            pre_norm = _PreNorm(call, pre_norm)
        wrap = {"a": _SelfAttention, "c": _CrossAttention, "f": _FeedForward}[call.layer_type(position)]
        attend = wrap(call, block, layers[position][0][0])
        layers[position] = ((pre_norm, *post_norms), attend, _Residual(call, residual, position))
        skips[position] = _Skip(call, skips[position], position)
        integrators[position] = _Integrator(call, integrators[position], position)
    return View(
        encoder,
        layer_types=[encoder.layer_types[i] for i in order],
        layers=layers,
        skip_combines=skips,
        layer_integrators=integrators,
        layer_dropouts=[encoder.layer_dropouts[i] for i in order],
        layers_execute_order=range(len(order)),
        final_norm=encoder.final_norm if call.joins else _FinalNorm(call),
        reinject_input=False,
        learned_reinject_input_gate=None,
    )


class _Skip:
    """A U-net skip connection. Called for every late layer, dropped or not, so that CLS enters here."""

    def __init__(self, call: LateCall, real: Any, position: int) -> None:
        self.call, self.real, self.position = call, real, position

    def __call__(self, x: Tensor, skip_hiddens: list[Tensor]) -> Tensor:
        call, real = self.call, self.real
        if not call.entered:
            x = call.enter(x)
            skip_hiddens[-1] = x
        call.layer_tokens = call.frozen
        if real is None:
            return x
        source = real.prev_layer_ind
        skip = skip_hiddens[source]
        early = source < call.entry
        if call.joins:
            skip = torch.cat((call.cls_streams, skip), dim=-2) if early else skip
        else:
            if call.needs_tokens(self.position):
                call.layer_tokens = real(call.frozen, {source: skip if early else call.frozen})
            skip = call.cls_streams if early else skip
        combined: Tensor = real(x, {source: skip})
        return combined


class _Inject:
    """An early layer of an encoder that adds its input, or a condition, to every branch."""

    def __init__(self, real: Any, injected: Tensor) -> None:
        self.real, self.injected = real, injected

    def __call__(self, x: Tensor, layer_hiddens: list[Tensor]) -> Tensor:
        return (x if self.real is None else self.real(x, layer_hiddens)) + self.injected


class _Integrator:
    """Layer integration of a late layer, and what is added to its branch."""

    def __init__(self, call: LateCall, real: Any, position: int) -> None:
        self.call, self.real, self.position = call, real, position

    def __call__(self, x: Tensor, layer_hiddens: list[Tensor]) -> Tensor:
        call = self.call
        call.executed.append(self.position)
        if call.early_hiddens is None:
            call.early_hiddens = len(layer_hiddens) - 1
        if self.real is not None:
            x = self._integrate(x, layer_hiddens[: call.early_hiddens], layer_hiddens[call.early_hiddens :])
        if call.injected is None:
            return x
        cls, tokens = call.injected
        if call.joins:
            return x + torch.cat((cls.expand(-1, call.num_cls, -1), tokens.expand(-1, call.num_tokens, -1)), dim=-2)
        if call.needs_tokens(self.position):
            call.branch = call.branch + tokens
        return x + cls

    def _integrate(self, x: Tensor, early: list[Tensor], late: list[Tensor]) -> Tensor:
        call = self.call
        if call.joins:
            integrated: Tensor = self.real(x, [call.with_history(hidden) for hidden in early] + late)
            return integrated
        if call.layer_type(self.position) == "a":
            call.branch = self.real(call.branch, early + call.branches)
        cls_integrated: Tensor = self.real(x, [call.cls_history(hidden) for hidden in early] + late)
        return cls_integrated


class _PreNorm:
    """A pre-norm whose condition the tokens of class attention need too."""

    def __init__(self, call: LateCall, real: Any) -> None:
        self.call, self.real = call, real

    def __call__(self, x: Tensor, **condition: Any) -> Tensor:
        self.call.norm_condition = condition
        normed: Tensor = self.real(x, **condition)
        return normed


class _Residual:
    """A residual connection. What is not a matter of single rows treats CLS as a sequence of its own."""

    def __init__(self, call: LateCall, real: Any, position: int) -> None:
        self.call, self.real, self.position = call, real, position

    def prepare(self, x: Tensor) -> Any:
        call = self.call
        if call.needs_tokens(self.position):
            call.branch = self.real.prepare(call.layer_tokens)[0]
            call.branches.append(call.branch)
        return self.real.prepare(x)

    def __call__(self, out: Tensor, residual: Tensor, **kwargs: Any) -> Tensor:
        call, real = self.call, self.real
        mask = kwargs.pop("mask", None)

        def connect(out: Tensor, residual: Tensor, mask: Tensor | None) -> Tensor:
            more = {**kwargs, "mask": mask} if mask is not None else kwargs
            connected: Tensor = real(out, residual, **more)
            return connected

        if not call.joins:
            return connect(out, residual, None)
        if not isinstance(real, _MIXING):
            return connect(out, residual, call.pad_mask(mask))
        (cls, tokens), (cls_residual, token_residual) = self._split(out), self._split(residual)
        return torch.cat((connect(cls, cls_residual, None), connect(tokens, token_residual, mask)), dim=-2)

    def _split(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t[..., : self.call.num_cls, :], t[..., self.call.num_cls :, :]


class _SelfAttention:
    """The branch of a late self-attention layer."""

    def __init__(self, call: LateCall, block: Any, norm: Any) -> None:
        self.call, self.norm, self.whole = call, norm, block
        self.block, self.shift = _around_shift(block, call)

    def __call__(self, x: Tensor, **kwargs: Any) -> Any:
        call = self.call
        if not call.joins:
            previous = kwargs.pop("prev_attn") if call.attended else None
            result = self._class_attention(x, call.branch, self.norm, kwargs, previous)
        elif call.attended:
            result = self._joined(x, kwargs)
        else:
            result = self._enter(x, kwargs)
        call.attended = True
        if call.late_values is None:
            call.late_values = result[1].values
        return result

    def _class_attention(self, x: Tensor, tokens: Tensor, norm: Any, kwargs: dict[str, Any], previous: Any) -> Any:
        """CLS rows attend to themselves and to tokens, without positions, biases and masks over pairs."""
        call = self.call
        own_keys = ("additional_key_values", "additional_key_value_mask", "mem", "return_intermediates", "condition")
        values = kwargs.get("value_residual")
        shift = None if self.shift is None else partial(self.shift.shifted, mask=kwargs.get("mask"))
        mask, mem_mask = self._masks(kwargs)
        step = ClassStep(
            tokens,
            norm=norm,
            condition={} if norm is None else call.norm_condition,
            shift=shift,
            mask=mask,
            mem_mask=mem_mask,
            key_residual=kwargs.get("kv_input_residual"),
            polar=kwargs.get("polar_pos_emb"),
            add_values=call.encoder.add_value_residual,
            value_residual=values,
            values_have_cls=values is not None and values is call.late_values,
            keep_values=call.encoder.add_value_residual and not call.joins,
            keep_maps=call.weights is not None,
            previous=previous,
        )
        kwargs = {name: value for name, value in kwargs.items() if name in own_keys}
        result = self.block(x, rotary_pos_emb=step, **kwargs)
        call.add_weights(step.weights)
        return result

    def _enter(self, x: Tensor, kwargs: dict[str, Any]) -> Any:
        """The first late layer while joining: tokens attend to tokens, CLS to all."""
        num_cls = self.call.num_cls
        cls, tokens = x[..., :num_cls, :], x[..., num_cls:, :]
        cls_out, cls_intermediates = self._class_attention(cls, tokens, None, kwargs, None)
        out, intermediates = self.whole(tokens, **kwargs)
        entered = entry_intermediates(cls_intermediates, intermediates, num_cls, self.call.num_tokens)
        return torch.cat((cls_out, out), dim=-2), entered

    def _joined(self, x: Tensor, kwargs: dict[str, Any]) -> Any:
        """CLS and tokens as one sequence, in which CLS has no position."""
        call = self.call
        num_cls, num_tokens = call.num_cls, call.num_tokens
        for name in ("mask", "context_mask"):
            kwargs[name] = call.pad_mask(kwargs.get(name))
        for name, value in (("attn_mask", True), ("attn_bias", 0.0)):
            pairs = kwargs.get(name)
            if pairs is not None:
                pairs = insert_cls(pairs, num_cls, num_tokens, -1, value)
                kwargs[name] = insert_cls(pairs, num_cls, num_tokens, -2, value)
        if kwargs.get("pos") is not None:
            kwargs["pos"] = insert_cls(kwargs["pos"], num_cls, num_tokens, -1, 0)
        if kwargs.get("kv_input_residual") is not None:
            kwargs["kv_input_residual"] = pad_rows(kwargs["kv_input_residual"], num_cls)
        values = kwargs.get("value_residual")
        if values is not None and values is not call.late_values:
            kwargs["value_residual"] = TokenValues(values, num_cls, num_tokens)
        tables = call.late_tables(kwargs.pop("rotary_pos_emb", None))
        polar = kwargs.pop("polar_pos_emb", None)
        joined = JoinedCall(tables, polar, num_cls, num_tokens, call.weights is not None)
        result = self.block(x, rotary_pos_emb=joined, **kwargs)
        call.add_weights(joined.weights)
        return result

    def _masks(self, kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Key padding masks of tokens and of mems. x-transformers' ``context_mask`` covers both."""
        mask, num_tokens = kwargs.get("context_mask"), self.call.num_tokens
        if mask is None:
            return kwargs.get("mask"), kwargs.get("mem_mask")
        return mask[:, -num_tokens:], mask[:, :-num_tokens] if mask.shape[-1] > num_tokens else None


class _CrossAttention:
    """The branch of a late cross-attention layer: CLS queries are not rotated, so neither are their keys."""

    def __init__(self, call: LateCall, block: Any, norm: Any) -> None:
        self.call = call
        self.block, _ = _around_shift(block, call)

    def __call__(self, x: Tensor, **kwargs: Any) -> Any:
        call = self.call
        previous = kwargs.get("prev_attn")
        if call.joins:
            kwargs["mask"] = call.pad_mask(kwargs.get("mask"))
            if kwargs.get("rotary_pos_emb") is not None:
                kwargs["rotary_pos_emb"] = call.late_tables(kwargs["rotary_pos_emb"])
            if previous is not None and not call.cross_attended:
                kwargs["prev_attn"] = pad_rows(previous, call.num_cls)
        else:
            kwargs.update(mask=None, rotary_pos_emb=None, context_rotary_pos_emb=None)
            kwargs["prev_attn"] = previous if call.cross_attended else None
        call.cross_attended = True
        return self.block(x, **kwargs)


class _FeedForward:
    """The branch of a late feed-forward layer. A deep embedding is a token's: CLS has none."""

    def __init__(self, call: LateCall, block: Any, norm: Any) -> None:
        self.call = call
        self.block, _ = _around_shift(block, call)

    def __call__(self, x: Tensor, deep_embed: Tensor | None = None, **kwargs: Any) -> Any:
        if deep_embed is not None:
            deep_embed = pad_rows(deep_embed, self.call.num_cls, 1.0) if self.call.joins else None
        return self.block(x, deep_embed=deep_embed, **kwargs)


class _FinalNorm:
    """The end of class attention: CLS and the tokens as they were at the entry, in one sequence."""

    def __init__(self, call: LateCall) -> None:
        self.call = call

    def __call__(self, x: Tensor, **condition: Any) -> Tensor:
        encoder, tokens = self.call.encoder, self.call.frozen
        assert tokens is not None
        if encoder.softclamp_output:
            tokens = xt.softclamp(tokens, encoder.softclamp_output_value)
        if encoder.num_residual_streams > 1:
            tokens = tokens.unflatten(0, (-1, encoder.num_residual_streams)).sum(1)
        normed: Tensor = encoder.final_norm(torch.cat((x, tokens), dim=-2), **condition)
        return normed


class _Shift:
    """Token shifting: among the tokens; CLS has no neighbours and stays as it is."""

    def __init__(self, call: LateCall, real: ShiftTokens) -> None:
        self.call, self.real = call, real

    def __call__(self, x: Tensor, **kwargs: Any) -> Any:
        if self.call.joins and x.shape[-2] == self.call.num_cls + self.call.num_tokens:
            num_cls, mask = self.call.num_cls, kwargs.get("mask")
            tokens = self.shifted(x[..., num_cls:, :], None if mask is None else mask[:, num_cls:])
            x = torch.cat((x[..., :num_cls, :], tokens), dim=-2)
        return self.real.fn(x, **kwargs)

    def shifted(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens as the layer behind the shift reads them."""
        moved: Tensor = ShiftTokens.forward(View(self.real, fn=_first_argument), tokens, mask=mask)
        return moved


def _first_argument(x: Tensor, **_: Any) -> Tensor:
    return x


def _around_shift(block: Any, call: LateCall) -> tuple[Any, _Shift | None]:
    """A branch with its token shift, if any, replaced by one that leaves CLS alone."""
    if isinstance(block, ShiftTokens):
        shift = _Shift(call, block)
        return shift, shift
    if not any(isinstance(module, ShiftTokens) for module in block.modules()):
        return block, None
    inner, shifted = _around_shift(block.fn, call)
    return partial(type(block).forward, View(block, fn=inner)), shifted


def _transforms(call: LateCall, given: Any) -> Any:
    """transform_block_inputs: what the user transforms is CLS and tokens once CLS is there."""

    def around(transform: Any, x: Tensor, *depth: int) -> Tensor:
        if call.frozen is None:
            unchanged: Tensor = transform(*depth, x)
            return unchanged
        both: Tensor = transform(*depth, torch.cat((x, call.frozen), dim=-2))
        return both[..., : call.num_cls, :]

    if isinstance(given, dict):
        return {depth: partial(around, transform) for depth, transform in given.items()}
    return lambda depth, x: around(given, x, depth)
