"""ClassAttention: several CLS tokens, masks, forms, dtypes, dropout, errors."""

from __future__ import annotations

import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from strategies import DTYPES, Generator
from tolerance import CHAIN, GRADIENT_SLACK, assert_close
from torch import Tensor, nn

from x_rope_cls import ClassAttention
from x_rope_cls._layers import token_norm


def plain(module: ClassAttention, x: Tensor, x_cls: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """The layer written out: norm of [CLS, tokens], one softmax over all of them."""
    attn = module.attn
    if key_mask is not None:
        x = torch.where(key_mask[..., None], x, 0)
        key_mask = F.pad(key_mask, (x_cls.shape[1], 0), value=True)[:, None, None]
    x_cls = x_cls.expand(x.shape[0], -1, -1)
    u = module.norm1(torch.cat((x_cls, x), dim=1))
    q, k, v = (
        projection(t).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        for projection, t in ((attn.q, u[:, : x_cls.shape[1]]), (attn.k, u), (attn.v, u))
    )
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if key_mask is None else scores.masked_fill(~key_mask, -torch.inf)
    out = attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    gamma_1, gamma_2 = (1.0 if g is None else g for g in (module.gamma_1, module.gamma_2))
    x_cls = x_cls + gamma_1 * out
    return x_cls + gamma_2 * module.mlp(module.norm2(x_cls))


def make(dim: int = 16, heads: int = 2, dtype: torch.dtype = torch.float64, **options: Any) -> ClassAttention:
    module = ClassAttention(dim, heads, **{"init_values": 0.5, "qkv_bias": True, **options}).to(dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def outputs(function: Any, module: nn.Module, x: Tensor, x_cls: Tensor, key_mask: Tensor | None) -> list[Tensor]:
    x, x_cls = (t.detach().requires_grad_() for t in (x, x_cls))
    out = function(x, x_cls, key_mask)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), [x, x_cls, *module.parameters()])]


@hypothesis.given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    sizes=st.tuples(st.integers(1, 3), st.sampled_from((0, 1, 5, 17, 40)), st.integers(1, 4)),
    norm=st.sampled_from((nn.LayerNorm, nn.RMSNorm)),
    heads=st.sampled_from((1, 2, 8)),
    shared=st.booleans(),
    mask=st.sampled_from(("none", "some", "dead")),
)
def test_random_cases(seed, dtype, sizes, norm, heads, shared, mask):
    g, (B, N, M) = Generator(seed), sizes
    torch.manual_seed(seed)
    # Eps is explicit, since the default of RMSNorm depends on the dtype.
    module = make(heads=heads, dtype=dtype, norm_layer=lambda dim: norm(dim, eps=1e-3))
    x, x_cls = g.normal(B, N, 16, dtype=dtype), g.normal(1 if shared else B, M, 16, dtype=dtype)
    key_mask = None if mask == "none" else g.chance(0.6, B, N)
    if mask == "dead":
        key_mask[0] = False
    ours = outputs(module, module, x, x_cls, key_mask)
    eager = outputs(lambda *args: plain(module, *args), module, x, x_cls, key_mask)
    module.double()
    exact = outputs(lambda *args: plain(module, *args), module, x.double(), x_cls.double(), key_mask)
    assert ours[0].dtype == dtype
    names = ["out", "gradient of x", "gradient of x_cls", *(name for name, _ in module.named_parameters())]
    for name, *of in zip(names, ours, eager, exact, strict=True):
        assert_close(*of, dtype, name, CHAIN * GRADIENT_SLACK[dtype])


def test_cls_tokens_see_one_another():
    module = make()
    x, x_cls = torch.randn(2, 5, 16).double(), torch.randn(2, 3, 16).double()
    changed = x_cls.clone()
    changed[:, 2] = torch.randn(2, 16)
    assert (module(x, x_cls)[:, 0] - module(x, changed)[:, 0]).abs().min() > 1e-6
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(module(x, x_cls[:, order]), module(x, x_cls)[:, order])


def test_map():
    module = make()
    x, x_cls = torch.randn(2, 5, 16).double(), torch.randn(2, 3, 16).double()
    key_mask = torch.tensor([[True, True, False, True, False], [False] * 5])
    out, weights = module(x, x_cls, key_mask, need_weights=True)
    torch.testing.assert_close(out, module(x, x_cls, key_mask))
    assert weights.shape == (2, 2, 3, 8)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 3).double())
    assert weights[0, ..., [5, 7]].abs().max() == 0
    assert weights[1, ..., 3:].abs().max() == 0
    values = module.attn.v(module.norm1(torch.cat((x_cls, x), dim=1))).unflatten(-1, (2, -1)).transpose(1, 2)
    attended = module.attn.proj((weights @ values).transpose(1, 2).flatten(2))
    x_cls = x_cls + module.gamma_1 * attended
    torch.testing.assert_close(out, x_cls + module.gamma_2 * module.mlp(module.norm2(x_cls)))


def test_one_batch_of_cls_tokens_serves_all():
    module = make()
    x, x_cls = torch.randn(4, 5, 16).double(), torch.randn(1, 3, 16).double()
    torch.testing.assert_close(module(x, x_cls), module(x, x_cls.expand(4, -1, -1)))


def test_which_norms_are_folded():
    class Louder(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    hooked = nn.LayerNorm(16)
    hooked.register_forward_hook(lambda *_: None)
    folded = token_norm(nn.LayerNorm(16, eps=1e-3), 16, torch.float32)
    assert (folded.kind, folded.eps) == ("layer", 1e-3)
    assert token_norm(nn.LayerNorm(16, bias=False), 16, torch.float32).bias is None
    assert token_norm(nn.LayerNorm(16, elementwise_affine=False), 16, torch.float32).weight is None
    assert token_norm(nn.RMSNorm(16), 16, torch.bfloat16).eps == torch.finfo(torch.bfloat16).eps
    for norm in (Louder(16), hooked, nn.GroupNorm(2, 16), nn.Identity(), nn.LayerNorm((4, 4))):
        assert token_norm(norm, 16, torch.float32) is None
    x, x_cls = torch.randn(2, 5, 16).double(), torch.randn(2, 1, 16).double()
    for norm in (Louder, lambda dim: nn.Identity()):
        module = make(norm_layer=norm)
        torch.testing.assert_close(module(x, x_cls), plain(module, x, x_cls))


class Adapter(nn.Module):
    """Like those of LoRA: the weight it shows is not all that it does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x.sin()


@pytest.mark.parametrize("name", ["q", "k", "v", "proj"])
def test_replaced_projections_are_called(name):
    module = make()
    x, x_cls = torch.randn(2, 5, 16).double(), torch.randn(2, 2, 16).double()
    before, seen = module(x, x_cls), []
    handle = getattr(module.attn, name).register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(module(x, x_cls), before)
    assert seen
    handle.remove()
    setattr(module.attn, name, Adapter(getattr(module.attn, name)))
    torch.testing.assert_close(module(x, x_cls), plain(module, x, x_cls))
    assert not torch.allclose(module(x, x_cls), before)


def test_no_layer_scale():
    module = make(init_values=None)
    assert not any("gamma" in name for name in module.state_dict())
    x, x_cls = torch.randn(2, 5, 16).double(), torch.randn(2, 1, 16).double()
    torch.testing.assert_close(module(x, x_cls), plain(module, x, x_cls))


def test_dropout():
    module = make(attn_drop=0.4, proj_drop=0.2)
    x, x_cls = torch.randn(2, 5, 16).double(), torch.randn(2, 2, 16).double()
    expected = plain(module, x, x_cls)
    torch.testing.assert_close(module(x, x_cls), expected)
    module.train()
    torch.manual_seed(1)
    first, second = module(x, x_cls), module(x, x_cls)
    torch.manual_seed(1)
    assert torch.equal(module(x, x_cls), first)
    assert not torch.equal(first, second)
    only_attention = make(attn_drop=0.4).train()
    assert not torch.equal(only_attention(x, x_cls), only_attention(x, x_cls))
    nn.init.zeros_(only_attention.gamma_2)  # what follows is not linear
    mean = torch.stack([only_attention(x, x_cls) for _ in range(3000)]).mean(0)
    assert (mean - plain(only_attention, x, x_cls)).abs().max() < 0.05  # dropout keeps the mean


def test_drop_path():
    module = make(drop_path=0.5).train()
    x, x_cls = torch.randn(400, 3, 16).double(), torch.randn(1, 1, 16).double().expand(400, -1, -1)
    x = x[:1].expand(400, -1, -1)
    out = module(x, x_cls)
    kinds = {tuple(row.tolist()) for row in out[:, 0].round(decimals=8)}
    assert len(kinds) == 4  # each of two branches is there or not
    kept = (out[:, 0] - x_cls[:, 0]).abs().amax(-1) > 0
    assert 0.65 < kept.double().mean() < 0.85
    nn.init.zeros_(module.gamma_2)  # what follows is not linear
    expected = module.eval()(x[:1], x_cls[:1])[0, 0] - x_cls[0, 0]
    branch = module.train()(x, x_cls)[:, 0] - x_cls[0, 0]
    torch.testing.assert_close(branch[branch.abs().amax(-1) > 0][0], 2 * expected)  # scaled to keep the mean
    assert torch.equal(module.eval()(x, x_cls)[0], module(x, x_cls)[1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dim": 15}, "dim must be a multiple of 2 heads, got 15"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"mlp_ratio": 0}, "mlp_ratio must be finite and above 0, got 0"),
        ({"attn_drop": 1.5}, "attn_drop must be in [0, 1], got 1.5"),
        ({"proj_drop": -0.1}, "proj_drop must be finite and at least 0, got -0.1"),
        ({"drop_path": 1.0}, "drop_path must be in [0, 1), got 1.0"),
        ({"init_values": float("nan")}, "init_values must be finite"),
    ],
)
def test_constructor_errors(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(f"ClassAttention: {message}")):
        ClassAttention(**{"dim": 16, "num_heads": 2, **kwargs})


def test_forward_errors():
    module = make(dtype=torch.float32)
    x, x_cls = torch.randn(2, 5, 16), torch.randn(2, 1, 16)
    for bad, message in (
        ((x[..., :8], x_cls), "x must be (batch, tokens, 16), got (2, 5, 8)"),
        ((x[0], x_cls), "x must be (batch, tokens, 16), got (5, 16)"),
        ((x, x_cls[..., :8]), "x_cls must be (2 or 1, at least 1, 16), got (2, 1, 8)"),
        ((x, x_cls[:, :0]), "x_cls must be (2 or 1, at least 1, 16), got (2, 0, 16)"),
        ((x, x_cls.repeat(3, 1, 1)), "x_cls must be (2 or 1, at least 1, 16), got (6, 1, 16)"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"ClassAttention: {message}")):
            module(*bad)
    with pytest.raises(RuntimeError, match="key_mask must be"):
        module(x, x_cls, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="key_mask must be"):
        module(x, x_cls, torch.ones(2, 5))
