"""Late CLS by hand: x-transformers' own modules on a sequence with CLS in front, in plain PyTorch.

Every late layer runs on all of [CLS, tokens], as if CLS had stood there from the start. In class attention the tokens'
rows are then put back; in the entry layer of "join" the tokens' rows come from a run on the tokens alone. Which pairs
see which positions, biases and masks is decided at the scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import x_transformers.attend as xt_attend
import x_transformers.x_transformers as xt
from torch import Tensor, nn
from xt_emulation import emulated, rotated_heads

_plain_shift = xt.shift
_plain_attend = xt_attend.Attend.forward
_plain_orthog_project = getattr(xt, "orthog_project", None)
_plain_polar = getattr(xt, "apply_polar_pos_emb", None)


class LateEmulation:
    """Stands for an encoder with late CLS in ``xt_cases.run``."""

    def __init__(
        self, encoder: Any, cls: Tensor, mode: str, at: int, patch: pytest.MonkeyPatch, cls_rope: str = "mask"
    ) -> None:
        self.encoder, self.mode, self.at, self.patch, self.cls_rope = encoder, mode, at, patch, cls_rope
        self.cls_tokens = nn.Parameter(cls.clone())
        self.num_cls = cls.shape[0]

    def zero_grad(self) -> None:
        self.encoder.zero_grad()
        self.cls_tokens.grad = None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.encoder.named_parameters()
        yield "late_cls_tokens", self.cls_tokens

    def __call__(self, x: Tensor, **inputs: Any) -> Tensor:
        return _Run(self, x, **inputs).output()


class _Run:
    def __init__(self, model: LateEmulation, x: Tensor, **inputs: Any) -> None:
        self.model, self.encoder, self.num_cls = model, model.encoder, model.num_cls
        self.x, self.inputs = x, inputs
        self.batch, self.tokens = x.shape[:2]
        self.cls = model.cls_tokens.expand(self.batch, -1, -1)
        encoder = self.encoder
        self.mask = inputs.get("mask")
        self.rotate = inputs.get("rotate", torch.ones(self.tokens, dtype=torch.bool))
        self.kv_mask = inputs.get("self_attn_kv_mask", self.mask)
        self.layer: dict[str, Any] = {}  # arguments of the present self attention
        self.per_layer = {
            "mem": iter(inputs.get("mems", ())),
            "mem_mask": iter(inputs.get("mem_masks", ())),
            "additional_key_values": iter(inputs.get("self_attn_additional_kv", ())),
            "kv_input_residual": iter(inputs.get("self_attn_kv_residuals", ())),
        }
        embeds, ids = inputs.get("deep_embeds_and_ids", (None, None))
        self.deep_embeds = iter(() if embeds is None else embeds[ids].unbind(2))
        condition = inputs.get("condition")
        if condition is not None:
            condition = encoder.adaptive_mlp(condition[:, None])
        self.norm_condition = {"condition": condition} if encoder.norm_need_condition else {}
        self.branch_condition = {"condition": condition} if encoder.post_branch_fn_needs_condition else {}
        attentions = [p for p, i in enumerate(encoder.layers_execute_order) if encoder.layer_types[i] == "a"]
        self.entry = attentions[model.at]
        self.previous: dict[str, Any] = {"a": None, "c": None}
        self.first_values: dict[str, Any] = {"a": None, "c": None}

    def streams(self, x: Tensor) -> Tensor:
        encoder = self.encoder
        if encoder.num_residual_streams == 1:
            return x
        return torch.stack([x + each for each in encoder.stream_emb], dim=1).flatten(0, 1)

    def output(self) -> Tensor:
        encoder, order = self.encoder, self.encoder.layers_execute_order
        x, cls = self.streams(self.x), self.streams(self.cls)
        skips: list[Tensor] = []  # with CLS from the start
        hiddens: list[Tensor] = []
        for position, index in enumerate(order):
            late = position >= self.entry
            if position == self.entry:
                x = torch.cat((cls, x), dim=1)
            before = x
            whole = x if late else torch.cat((cls, x), dim=1)
            skips.append(whole)
            norms, block, residual = encoder.layers[index]
            combine = encoder.skip_combines[index]
            if combine is not None:
                whole = combine(whole, skips)
                x = whole if late else whole[:, self.num_cls :]
            x, inner, kwargs = residual.prepare(x)
            hiddens.append(x if late else torch.cat((self.cls.expand(*x.shape[:-2], -1, -1), x), dim=-2))
            integrator = encoder.layer_integrators[index]
            if integrator is not None:
                x = integrator(x, hiddens if late else [h[..., self.num_cls :, :] for h in hiddens])
            x = self.injected(x, late)
            pre_norm, post_branch_norm, post_main_norm = norms
            if encoder.layer_types[index] == "a":
                self.layer = {name: next(each, None) for name, each in self.per_layer.items()}
            if pre_norm is not None:
                x = pre_norm(x, **self.norm_condition)
                if encoder.layer_types[index] == "a" and self.layer["mem"] is not None:
                    self.layer["mem"] = pre_norm(self.layer["mem"], **self.norm_condition)
            kind = encoder.layer_types[index]
            out = {"a": self.attend, "c": self.cross, "f": self.feed_forward}[kind](x, block, position, late)
            if post_branch_norm is not None:
                out = post_branch_norm(out, **self.norm_condition)
            x = self.residual(residual, out, inner, kwargs, late)  # CLS and tokens apart
            if post_main_norm is not None:
                x = post_main_norm(x, **self.norm_condition)
            if late and self.model.mode == "class_attention":
                x = torch.cat((x[:, : self.num_cls], before[:, self.num_cls :]), dim=1)
        if encoder.softclamp_output:
            x = (x / encoder.softclamp_output_value).tanh() * encoder.softclamp_output_value
        if encoder.num_residual_streams > 1:
            x = x.unflatten(0, (-1, encoder.num_residual_streams)).sum(1)
        return encoder.final_norm(x, **self.norm_condition)

    def injected(self, x: Tensor, late: bool) -> Tensor:
        encoder, given = self.encoder, self.inputs.get("in_attn_cond")
        if given is not None:
            given = given[:, None] if given.dim() == 2 else given
            if late and given.shape[1] > 1:
                given = torch.cat((torch.zeros_like(self.cls), given), dim=1)
            return x + given
        if not encoder.reinject_input:
            return x
        whole = torch.cat((self.cls, self.x), dim=1) if late else self.x
        added = encoder.reinject_input_proj(whole)
        if encoder.learned_reinject_input_gate is not None:
            added = added * encoder.learned_reinject_input_gate(whole).sigmoid()
        return x + added

    def residual(self, residual: Any, out: Tensor, inner: Tensor, kwargs: dict[str, Tensor], late: bool) -> Tensor:
        def part(rows: slice, mask: Tensor | None) -> Tensor:
            beta = {name: t[:, rows] for name, t in kwargs.items()}
            if isinstance(residual, getattr(xt, "MVSplitResidualUpdate", ())):
                beta["mask"] = mask
            return residual(out[:, rows], inner[:, rows], **beta)

        if not late:
            return part(slice(None), self.mask)
        return torch.cat((part(slice(self.num_cls), None), part(slice(self.num_cls, None), self.mask)), dim=1)

    def feed_forward(self, x: Tensor, block: Any, position: int, late: bool) -> Tensor:
        embed = next(self.deep_embeds, None)
        if embed is not None and late:
            embed = torch.cat((torch.ones_like(self.cls), embed), dim=1)
        with self.shifted_tokens(late):
            return block(x, deep_embed=embed, **self.branch_condition)

    def padded(self, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        front = mask.shape[1] - self.tokens
        cls = torch.ones(self.batch, self.num_cls, dtype=torch.bool)
        return torch.cat((mask[:, :front], cls, mask[:, front:]), dim=1)

    def cross(self, x: Tensor, block: Any, position: int, late: bool) -> Tensor:
        shared = {
            "context": self.inputs["context"],
            "context_mask": self.inputs.get("context_mask"),
            "return_intermediates": True,
            "value_residual": self.first_values["c"] if self.encoder.add_value_residual else None,
            **self.branch_condition,
        }
        previous = self.previous["c"]
        alone = late and self.model.mode == "class_attention"
        if late and previous is not None and previous.shape[-2] == self.tokens:
            nothing = previous.new_zeros(*previous.shape[:2], self.num_cls, previous.shape[-1])
            previous = torch.cat((nothing, previous), dim=-2)
        mask = self.padded(self.mask) if late else self.mask
        if alone:
            previous = None if previous is None else previous[..., : self.num_cls, :]
            out, inter = block(x[:, : self.num_cls], mask=None, prev_attn=previous, **shared)
            out = torch.cat((out, torch.zeros_like(x[:, self.num_cls :])), dim=1)
            scores = inter.pre_softmax_attn  # with rows of tokens again, as the number of rows tells who is in
            if scores is not None:
                scores = nn.functional.pad(scores, (0, 0, 0, self.tokens))
        else:
            with self.shifted_tokens(late):
                out, inter = block(x, mask=mask, prev_attn=previous, **shared)
            scores = inter.pre_softmax_attn
        self.keep(inter, "c", scores)
        return out

    def keep(self, inter: Any, kind: str, scores: Any) -> None:
        residual_attn = {"a": self.encoder.residual_attn, "c": self.encoder.cross_residual_attn}[kind]
        self.previous[kind] = scores if residual_attn else None
        if self.first_values[kind] is None:
            self.first_values[kind] = inter.values

    # ---- self attention --------------------------------------------------------------------------

    def attend(self, x: Tensor, block: Any, position: int, late: bool) -> Tensor:
        values = self.first_values["a"] if self.encoder.add_value_residual else None
        if not late:
            out, inter = self.tokens_alone(x, block, values)
            self.keep(inter, "a", inter.pre_softmax_attn)
            return out
        previous = self.previous["a"]
        tokens_alone = position == self.entry and self.model.mode == "join"
        attention = next(m for m in block.modules() if isinstance(m, xt.Attention))
        if getattr(attention.attend.attn_fn, "keywords", {}).get("dim") == -2 and (
            tokens_alone or self.model.mode != "join"
        ):
            return self.softmax_over_queries(x, block, tokens_alone)
        out, inter = self.whole(x, block, values, self.pad_scores(previous))
        scores = inter.pre_softmax_attn
        if tokens_alone:
            token_out, token_inter = self.tokens_alone(x[..., self.num_cls :, :], block, values, previous)
            out = torch.cat((out[:, : self.num_cls], token_out), dim=1)
            if self.encoder.residual_attn:
                padded = self.pad_scores(token_inter.pre_softmax_attn)
                scores = torch.cat((scores[..., : self.num_cls, :], padded[..., self.num_cls :, :]), dim=-2)
        self.keep(inter, "a", scores)
        return out

    def softmax_over_queries(self, x: Tensor, block: Any, tokens_alone: bool) -> Tensor:
        """Where queries compete, those of CLS do so among themselves."""
        cls, tokens = x[:, : self.num_cls], x[:, self.num_cls :]
        out = block(cls, context=x, context_mask=self.padded(self.mask))
        token_out = self.tokens_alone(tokens, block, None)[0] if tokens_alone else torch.zeros_like(tokens)
        return torch.cat((out, token_out), dim=1)

    def pad_scores(self, scores: Tensor | None) -> Tensor | None:
        """No scores of earlier layers where one of the two is CLS."""
        if scores is None or scores.shape[-2] != self.tokens:
            return scores
        at = scores.shape[-1] - self.tokens
        scores = torch.cat(
            (scores[..., :at], scores.new_zeros(*scores.shape[:-1], self.num_cls), scores[..., at:]), dim=-1
        )
        return torch.cat((scores.new_zeros(*scores.shape[:-2], self.num_cls, scores.shape[-1]), scores), dim=-2)

    def arguments(self, num_cls: int) -> dict[str, Any]:
        encoder, inputs = self.encoder, self.inputs
        arguments: dict[str, Any] = {"return_intermediates": True, "rel_pos": encoder.rel_pos, **self.branch_condition}
        arguments.update(self.layer, additional_key_value_mask=inputs.get("additional_kv_mask"))
        mems = 0 if self.layer["mem"] is None else self.layer["mem"].shape[1]
        if encoder.rotary_pos_emb is not None:
            pos = inputs.get("pos", torch.arange(self.tokens + mems) - mems)
            freqs, scale = encoder.rotary_pos_emb(pos)
            if num_cls and self.model.cls_rope == "skip":
                freqs = torch.where(torch.cat((torch.ones(mems, dtype=torch.bool), self.rotate))[:, None], freqs, 0)
            cls = freqs.new_zeros(freqs.shape[0], num_cls, freqs.shape[2])
            freqs = torch.cat((freqs[:, :mems], cls, freqs[:, mems:]), dim=1)
            arguments["rotary_pos_emb"] = (freqs, scale)
            arguments["pos"] = torch.cat((torch.zeros(num_cls, dtype=pos.dtype), pos))
        residual = self.layer["kv_input_residual"]
        if residual is not None and num_cls:
            arguments["kv_input_residual"] = torch.cat((torch.zeros_like(self.cls), residual), dim=1)
        if "self_attn_kv_mask" in inputs:
            arguments["context_mask"] = self.padded(self.kv_mask) if num_cls else self.kv_mask
        if getattr(encoder, "polar_pos_emb", None) is not None:
            arguments["polar_pos_emb"] = encoder.polar_pos_emb(torch.arange(self.tokens + num_cls) - num_cls)
        return arguments

    def tokens_alone(self, x: Tensor, block: Any, values: Any, previous: Any = None) -> Any:
        previous = self.previous["a"] if previous is None else previous
        kwargs = self.arguments(0)
        kwargs["attn_mask"] = self.inputs.get("attn_mask")
        mems = 0 if self.layer["mem"] is None else self.layer["mem"].shape[1]
        rotate = torch.cat((torch.ones(mems, dtype=torch.bool), self.rotate))
        if self.model.cls_rope == "rotate":
            return block(x, mask=self.mask, value_residual=values, prev_attn=previous, **kwargs)
        with emulated(self.model.cls_rope, rotate, self.model.patch, rotated_heads(self.encoder)):
            return block(x, mask=self.mask, value_residual=values, prev_attn=previous, **kwargs)

    def whole(self, x: Tensor, block: Any, values: Any, previous: Any) -> Any:
        """All of [CLS, tokens], CLS free of positions, biases and masks over pairs."""
        attention = self.attention = next(m for m in block.modules() if isinstance(m, xt.Attention))
        num_cls = self.num_cls
        if values is not None and values.shape[-2] == self.tokens:  # CLS keeps its own values
            v_input = x if x.dim() == 3 else x[2]
            if attention.to_latent_kv is not None:
                v_input = attention.to_latent_kv(v_input)
            own = attention.split_v_heads(attention.to_v(v_input[:, :num_cls]))
            values = torch.cat((own, values), dim=-2)
        kwargs = self.arguments(num_cls)
        attn_mask = self.inputs.get("attn_mask")
        if attn_mask is not None:
            kwargs["attn_mask"] = nn.functional.pad(attn_mask, (num_cls, 0, num_cls, 0), value=True)
        mems = torch.ones(0 if self.layer["mem"] is None else self.layer["mem"].shape[1], dtype=torch.bool)
        tokens = self.rotate if self.model.cls_rope == "mask" else torch.ones_like(self.rotate)
        rotate = torch.cat((mems, torch.zeros(num_cls, dtype=torch.bool), tokens))
        with (
            self.model.patch.context() as patch,
            self.shifted_tokens(True),
            emulated("mask", rotate, patch, rotated_heads(self.encoder)),
            self.polar(patch),
        ):
            patch.setattr(xt_attend.Attend, "forward", self.free_of_positions)
            if kwargs["rel_pos"] is not None and "pos" not in kwargs:
                kwargs["rel_pos"] = lambda i, j: self.spread(self.encoder.rel_pos(i - num_cls, j - num_cls))
            rel_proj = getattr(attention, "rel_proj_pos_bias", None)
            if rel_proj is not None:
                plain = type(rel_proj).forward
                patch.setattr(
                    type(rel_proj),
                    "forward",
                    lambda bias, t, seq_len_k: self.spread(plain(bias, t[:, num_cls:], seq_len_k - num_cls)),
                )
            return block(x, mask=self.padded(self.mask), value_residual=values, prev_attn=previous, **kwargs)

    def pairs(self, keys: int) -> Tensor:
        """Which of [CLS, tokens] sees which of the keys [..., mems, CLS, tokens]."""
        num_cls, tokens, inputs = self.num_cls, self.tokens, self.inputs
        front = keys - tokens
        seen = torch.ones(self.batch, 1, num_cls + tokens, keys, dtype=torch.bool)
        mems = 0 if self.layer["mem"] is None else self.layer["mem"].shape[1]
        if self.kv_mask is not None:
            seen[..., front:] &= self.kv_mask[:, None, None, -tokens:]
        if self.layer["mem_mask"] is not None:
            seen[..., front - num_cls - mems : front - num_cls] &= self.layer["mem_mask"][:, None, None]
        added = inputs.get("additional_kv_mask")
        if added is not None:
            seen[..., : added.shape[1]] &= added[:, None, None]
        if self.attention.max_attend_past is not None:
            row = torch.arange(tokens)[:, None]
            seen[:, :, num_cls:, front:] &= row - torch.arange(tokens) <= self.attention.max_attend_past
            past = row - torch.arange(-mems, 0) <= self.attention.max_attend_past
            seen[:, :, num_cls:, front - num_cls - mems : front - num_cls] &= past
        if inputs.get("attn_mask") is not None:
            seen[:, :, num_cls:, front:] &= inputs["attn_mask"]
        return seen

    def spread(self, bias: Tensor) -> Tensor:
        """A bias of tokens as rows and of mems and tokens as keys, among rows and keys with CLS."""
        *batch, _, keys = bias.shape
        whole = bias.new_zeros(*batch, self.num_cls + self.tokens, keys + self.num_cls)
        whole[..., self.num_cls :, : keys - self.tokens] = bias[..., : keys - self.tokens]
        whole[..., self.num_cls :, keys - self.tokens + self.num_cls :] = bias[..., keys - self.tokens :]
        return whole

    @property
    def free_of_positions(self) -> Any:
        run = self

        def forward(attend: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
            num_cls, keys = run.num_cls, k.shape[-2]
            row_is_cls = (torch.arange(q.shape[-2]) < num_cls)[:, None]
            key_is_cls = torch.arange(keys) - (keys - run.tokens)
            key_is_cls = (key_is_cls < 0) & (key_is_cls >= -num_cls)
            if kwargs.get("attn_bias") is not None:
                kwargs["attn_bias"] = kwargs["attn_bias"].masked_fill(row_is_cls | key_is_cls, 0.0)
            if kwargs.get("mask") is not None:
                kwargs["mask"] = run.pairs(keys) | (key_is_cls & ~row_is_cls)
            return _plain_attend(attend, q, k, v, **kwargs)

        return forward

    @contextmanager
    def shifted_tokens(self, late: bool) -> Iterator[None]:
        num_cls = self.num_cls

        def shift(t: Tensor, amount: int, mask: Tensor | None = None) -> Tensor:
            mask = None if mask is None else mask[:, num_cls:]
            tokens = _plain_shift(t[:, num_cls:], amount, mask=mask)
            return torch.cat((t[:, :num_cls], tokens), dim=1)

        with self.model.patch.context() as patch:
            if late:
                patch.setattr(xt, "shift", shift)
                patch.setattr(xt, "orthog_project", self.orthog_project, raising=False)
            yield

    def orthog_project(self, x: Tensor, y: Tensor) -> Tensor:
        rows = slice(self.num_cls), slice(self.num_cls, None)
        return torch.cat([_plain_orthog_project(x[:, r], y[:, r]) for r in rows], dim=1)

    @contextmanager
    def polar(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        """Scores of x-transformers' polar embedding, with both at position 0 where one of the two is CLS."""
        freqs: list[Tensor] = []

        def remember(t: Tensor, f: Tensor) -> Tensor:
            freqs.append(f)
            return t

        def scores(q: Tensor, k: Tensor) -> Tensor:
            q_freqs, k_freqs = freqs
            bias = (k_freqs - q_freqs)[:, :1]
            still = torch.zeros_like(q_freqs)
            moved = _plain_polar(q, q_freqs) @ _plain_polar(k, k_freqs).mT
            raw = _plain_polar(q, still) @ _plain_polar(k, still + bias).mT
            is_cls = torch.arange(q.shape[-2]) < self.num_cls
            return torch.where(is_cls[:, None] | is_cls, raw, moved)

        def einsum(equation: str, *operands: Tensor) -> Tensor:
            return scores(*operands) if equation.endswith("-> b h i j") else torch.einsum(equation, *operands)

        if getattr(self.encoder, "polar_pos_emb", None) is not None:
            patch.setattr(xt, "apply_polar_pos_emb", remember)
            patch.setattr(xt_attend, "einsum", einsum)
        yield
