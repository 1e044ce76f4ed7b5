"""What PyTorch asks of the pooling modules: compile, export, autocast, inference mode, copies, other devices."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import x_rope_cls
from x_rope_cls import AttentionPoolLatent, ClassAttention, LateCLS

DIM = 16


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        mean = x.mean(1, keepdim=True) if key_mask is None else (x * key_mask[..., None]).sum(1, keepdim=True)
        return self.linear(x) + mean


class WithCls(nn.Module):
    """ClassAttention as a module of the tokens alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = ClassAttention(DIM, 2, qkv_bias=True, init_values=0.3, **options)
        self.x_cls = nn.Parameter(torch.randn(1, 2, DIM))

    def forward(self, x: Tensor, key_mask: Tensor | None = None, need_weights: bool = False) -> Any:
        return self.layer(x, self.x_cls, key_mask, need_weights=need_weights)


class Latent(nn.Module):
    """AttentionPoolLatent with the key mask second."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.pool = AttentionPoolLatent(DIM, num_heads=2, **options)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, need_weights: bool = False) -> Any:
        return self.pool(x, key_mask=key_mask, need_weights=need_weights)


def attention_pool(**options: Any) -> nn.Module:
    if importlib.util.find_spec("x_transformers") is None:
        pytest.skip("x-transformers is not installed")
    return x_rope_cls.AttentionPool(DIM, heads=2, dim_head=8, **options)


MODULES: dict[str, Any] = {
    "class_attention": WithCls,
    "class_attention_rms": lambda: WithCls(norm_layer=nn.RMSNorm),
    "latent": Latent,
    "latent_ordinary": lambda: Latent(qk_norm=True),
    "late_class_attention": lambda: LateCLS(DIM, 2, num_heads=2, layers=[Layer(), Layer()], init_values=0.3),
    "late_join": lambda: LateCLS(DIM, 2, "join", num_heads=2, layers=[Layer(), Layer()], at=1, init_values=0.3),
    "attention_pool": attention_pool,
    "attention_pool_residual": lambda: attention_pool(
        add_residual=True, num_pooled_tokens=3, attn_kwargs={"kv_heads": 1}
    ),
    "attention_pool_ordinary": lambda: attention_pool(num_pooled_tokens=9),
}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    return MODULES[request.param]().eval()


def inputs(batch: int = 3, tokens: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    mask = torch.rand(batch, tokens) < 0.7
    mask[-1] = False
    return torch.randn(batch, tokens, DIM, dtype=dtype), mask


def grads(module: nn.Module, call: Any, x: Tensor, mask: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = call(x, mask)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), [x, *module.parameters()])]


def test_compiles_as_one_graph(module):
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch, tokens in ((3, 7), (2, 9), (4, 12)):  # dynamic from the second size on
        x, mask = inputs(batch, tokens)
        for a, b in zip(grads(module, compiled, x, mask), grads(module, module, x, mask), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    x, mask = inputs()
    for a, b in zip(compiled(x, mask, need_weights=True), module(x, mask, need_weights=True), strict=True):
        torch.testing.assert_close(a, b)


def test_exports(module):
    x, mask = inputs()
    batch, tokens = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("tokens", min=2, max=64)
    shapes = ({0: batch, 1: tokens}, {0: batch, 1: tokens})
    program = torch.export.export(module, (x, mask), dynamic_shapes=shapes)
    for sizes in ((3, 7), (5, 11)):
        x, mask = inputs(*sizes)
        torch.testing.assert_close(program.module()(x, mask), module(x, mask))


def test_inference_mode_and_copies(module):
    x, mask = inputs()
    expected = module(x, mask)
    with torch.inference_mode():
        torch.testing.assert_close(module(x, mask), expected)
    torch.testing.assert_close(copy.deepcopy(module)(x, mask), expected)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x, mask), expected)


def test_pickles():
    for name in ("class_attention", "latent", "attention_pool"):
        module = MODULES[name]().eval()
        x, mask = inputs()
        torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x, mask), module(x, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(module, dtype):
    """Results near to those in float32; gradients in the parameters' dtype."""
    x, mask = inputs()
    x = x.requires_grad_()
    expected = module(x, mask)
    with torch.autocast("cpu", dtype):
        out = module(x, mask)
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()
    out.float().square().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (x, *module.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(module, dtype):
    x, mask = inputs()
    expected = module(x, mask)
    out = module.to(dtype)(x.to(dtype), mask)
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
    assert (out - expected).abs().max() < tolerance * expected.abs().max()


def test_every_parameter_has_a_gradient(module):
    """Those that do not matter have zeros: DistributedDataParallel waits for all of them."""
    x, mask = inputs()
    module(x, mask).sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_meta_device(module):
    x, mask = inputs()
    expected = module(x, mask)
    on_meta = copy.deepcopy(module).to("meta")
    out, weights = on_meta(x.to("meta"), mask.to("meta"), need_weights=True)
    assert (out.shape, out.dtype, out.device.type) == (expected.shape, expected.dtype, "meta")
    assert weights.shape == module(x, mask, need_weights=True)[1].shape


def test_gradients_of_the_map(module):
    """It is differentiable, with rows of masked sequences in it."""
    x, mask = inputs(dtype=torch.float64)
    module.double()

    def value() -> Tensor:
        weights = module(x, mask, need_weights=True)[1]
        return (weights * torch.linspace(-1, 1, weights.numel()).view_as(weights)).sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(value(), x)
    assert gradient.isfinite().all()
    assert gradient[-1].abs().max() < (1 if "Late" in type(module).__name__ else 1e-12)
    direction = torch.randn_like(x)
    step = 1e-6
    with torch.no_grad():
        x += step * direction
        up = value()
        x -= 2 * step * direction
        down = value()
    torch.testing.assert_close((up - down) / (2 * step), (gradient * direction).sum(), rtol=1e-4, atol=1e-7)
