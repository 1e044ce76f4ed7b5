"""LateCLS: where CLS enters, what it sees, what stays as it is."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_rope_cls import ClassAttention, LateCLS

DIM = 16


class Layer(nn.Module):
    """A token layer with attention, in plain PyTorch; `key_mask` True: attend."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        mask = None if key_mask is None else key_mask[:, None]
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def layers(count: int) -> nn.ModuleList:
    return nn.ModuleList(Layer() for _ in range(count)).double()


def make(*args: object, **kwargs: object) -> LateCLS:
    module = LateCLS(DIM, *args, num_heads=2, **{"init_values": 0.5, **kwargs}).double()  # type: ignore[arg-type]
    with torch.no_grad():
        module.cls_tokens.normal_()
    return module.eval()


def test_class_attention_leaves_tokens_alone():
    own = layers(3)
    late = make(2, layers=own)
    x = torch.randn(4, 7, DIM).double()
    out = late(x)
    tokens = own[2](own[1](own[0](x)))
    x_cls = late.cls_tokens.expand(4, -1, -1)
    for layer in late.class_layers:
        x_cls = layer(tokens, x_cls)
    assert len(late.class_layers) == 2
    assert torch.equal(out[:, 2:], tokens)
    torch.testing.assert_close(out[:, :2], x_cls)


@pytest.mark.parametrize(("at", "before"), [(None, 2), (-1, 3), (0, 0), (3, 3), (4, 4)])
def test_join_runs_the_rest_on_one_sequence(at, before):
    own = layers(4)
    late = make(2, "join", layers=own, at=at)
    x = torch.randn(4, 7, DIM).double()
    expected = x
    for layer in own[:before]:
        expected = layer(expected)
    assert len(late.class_layers) == 1
    x_cls = late.class_layers[0](expected, late.cls_tokens.expand(4, -1, -1))
    expected = torch.cat((x_cls, expected), dim=1)
    for layer in own[before:]:
        expected = layer(expected)
    torch.testing.assert_close(late(x), expected)


@pytest.mark.parametrize("mode", ["class_attention", "join"])
def test_masked_tokens_never_matter(mode):
    late = make(2, mode, layers=layers(3))
    x, key_mask = torch.randn(4, 7, DIM).double(), torch.rand(4, 7) < 0.6
    key_mask[0], key_mask[1] = True, False
    short = late(x[:1], key_mask[:1])
    torch.testing.assert_close(short, late(x[:1]))
    out, weights = late(x, key_mask, need_weights=True)
    other = torch.where(key_mask[..., None], x, 100.0)
    keep = F.pad(key_mask, (2, 0), value=True)
    torch.testing.assert_close(late(other, key_mask)[keep], out[keep])
    assert out[:, :2].isfinite().all()
    assert weights.shape == (4, 2, 2, 9)
    assert weights[..., 2:].masked_select(~key_mask[:, None, None]).abs().max() == 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2, 2).double())


@pytest.mark.parametrize("mode", ["class_attention", "join"])
def test_map_is_that_of_the_last_class_attention(mode):
    late = make(3, mode, layers=layers(2), depth=2)
    x = torch.randn(4, 7, DIM).double()
    out, weights = late(x, need_weights=True)
    torch.testing.assert_close(out, late(x))
    tokens = x if mode == "join" else late.layers[1](late.layers[0](x))
    x_cls = late.class_layers[0](tokens, late.cls_tokens[None])
    assert torch.allclose(weights, late.class_layers[1](tokens, x_cls, need_weights=True)[1])


@pytest.mark.parametrize("mode", ["class_attention", "join"])
def test_cls_alone(mode):
    late = make(3, mode, layers=layers(2))
    x = torch.randn(4, 7, DIM).double()
    out, weights = late(x, need_weights=True)
    assert torch.equal(late(x, return_tokens=False), out[:, :3])
    alone, same = late(x, need_weights=True, return_tokens=False)
    assert torch.equal(alone, out[:, :3])
    assert torch.equal(same, weights)


def test_without_layers():
    x = torch.randn(4, 7, DIM).double()
    for mode in ("class_attention", "join"):
        out = make(1, mode)(x)
        assert out.shape == (4, 8, DIM)
        assert torch.equal(out[:, 1:], x)


def test_layers_of_torch():
    """torch.nn's masks are True where a token is not to be seen."""
    own = nn.ModuleList(nn.TransformerEncoderLayer(DIM, 2, 32, batch_first=True) for _ in range(3)).double().eval()
    late = make(1, "join", layers=own, mask_argument="src_key_padding_mask")
    x, key_mask = torch.randn(2, 7, DIM).double(), torch.arange(7) < torch.tensor([[7], [4]])
    out = late(x, key_mask)
    torch.testing.assert_close(out[1, :5], late(x[1:, :4])[0])
    torch.testing.assert_close(out[0], late(x[:1])[0])


def test_layers_that_take_no_mask():
    late = make(1, layers=[nn.Linear(DIM, DIM).double()], mask_argument=None)
    x, key_mask = torch.randn(2, 5, DIM).double(), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    torch.testing.assert_close(late(x, key_mask)[1, :1], late(x[1:, :3])[0, :1])


def test_order_of_tokens_does_not_matter_to_cls():
    late = make(2)
    x = torch.randn(4, 7, DIM).double()
    torch.testing.assert_close(late(x)[:, :2], late(x.flip(1))[:, :2])


def test_parameters():
    late = LateCLS(DIM, 50, num_heads=2, layers=layers(2), depth=3, qkv_bias=True, norm_layer=nn.RMSNorm)
    assert late.cls_tokens.shape == (50, DIM)
    assert late.num_cls_tokens == 50
    assert 0.015 < late.cls_tokens.std() < 0.025
    assert {name.split(".")[0] for name, _ in late.named_parameters()} == {"cls_tokens", "layers", "class_layers"}
    assert all((layer.gamma_1 == 1e-4).all() for layer in late.class_layers)
    assert all(isinstance(layer.norm1, nn.RMSNorm) for layer in late.class_layers)
    assert all(layer.attn.q.bias is not None for layer in late.class_layers)
    assert LateCLS(DIM, num_heads=2, init_values=None).class_layers[0].gamma_1 is None
    half = LateCLS(DIM, num_heads=2, dtype=torch.bfloat16, device="meta")
    assert {(p.dtype, p.device.type) for p in half.parameters()} == {(torch.bfloat16, "meta")}


@pytest.mark.parametrize("mode", ["class_attention", "join"])
def test_trains(mode):
    """Every parameter gets a gradient, and CLS learns what the tokens' mean is."""
    torch.manual_seed(0)
    late = LateCLS(DIM, 1, mode, num_heads=2, layers=layers(2).float(), init_values=0.1)
    optimiser = torch.optim.Adam(late.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        x = torch.randn(16, 9, DIM)
        loss = (late(x)[:, 0] - 3 * x.mean(1)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in late.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"num_cls_tokens": 0}, ValueError, "num_cls_tokens must be at least 1, got 0"),
        ({"mode": "cross"}, ValueError, "mode must be one of ('class_attention', 'join'), got 'cross'"),
        ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
        ({"at": -1}, ValueError, "at must be None for 'class_attention', where CLS enters last, got -1"),
        ({"mode": "join", "at": -1}, ValueError, "at must be None without layers, got -1"),
        ({"mode": "join", "at": 3, "layers": 2}, ValueError, "at must be in [-2, 2] for 2 layers, got 3"),
        ({"mode": "join", "layers": 1}, ValueError, "at must be in [-1, 1] for 1 layers, got -2"),
        ({"mode": "join", "at": 0.5, "layers": 2}, TypeError, "at must be an integer, got 0.5"),
    ],
)
def test_constructor_errors(kwargs, error, message):
    if "layers" in kwargs:
        kwargs = {**kwargs, "layers": layers(kwargs["layers"])}
    with pytest.raises(error, match=re.escape(f"LateCLS: {message}")):
        LateCLS(**{"dim": DIM, "num_heads": 2, **kwargs})


def test_forward_errors():
    late = make(1, layers=layers(1))
    with pytest.raises(ValueError, match=re.escape("LateCLS: x must be (batch, tokens, 16), got (2, 5, 8)")):
        late(torch.randn(2, 5, 8).double())
    x = torch.randn(2, 5, DIM).double()
    with pytest.raises(ValueError, match=re.escape("key_mask must be bool (2, 5), got torch.float64 (2, 5)")):
        late(x, torch.ones(2, 5).double())
    for layer, got in ((nn.Linear(DIM, 3), "(2, 5, 3)"), (nn.MultiheadAttention(DIM, 2), "tuple")):
        if isinstance(layer, nn.MultiheadAttention):
            layer.forward = lambda x, attention=layer: nn.MultiheadAttention.forward(attention, x, x, x)
        bad = make(1, layers=[layer.double()])
        with pytest.raises(TypeError, match=re.escape(f"layers[0] must return a tensor (2, 5, 16), got {got}")):
            bad(x)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        LateCLS(DIM, num_heads=2, drop=0.1)
    assert isinstance(late.class_layers[0], ClassAttention)
