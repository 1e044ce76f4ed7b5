"""What PyTorch asks of an operator, for late_cls_pool; see test_dispatcher.py."""

from __future__ import annotations

import io
from dataclasses import replace

import hypothesis
import pytest
import torch
from late_cls_pool_cases import PoolCase, call_pool, model_case, pool_cases, pool_weights
from test_dispatcher import count_compilations
from torch._subclasses import FakeTensorMode

from x_rope_cls import late_cls_pool, ops, reference

CASES = {
    "plain": model_case(2, 5, 8),
    "keys": model_case(2, 5, 8, masked=0.3, shared=False),
    "layer": model_case(2, 5, 8, norm="layer"),
    "layer_float64": model_case(2, 5, 8, torch.float64, "layer", masked=0.3),
    "rms_bfloat16": model_case(2, 5, 8, torch.bfloat16, "rms", shared=False),
    "norm_without_weights": replace(model_case(2, 5, 8, norm="rms"), norm_weight=None, norm_bias=None),
}


def backward_arguments(case: PoolCase, need_x_grad: bool = True) -> tuple:
    x, query, *rest = case.arguments()
    return (*pool_weights(case), x, query, *call_pool(case), *rest, need_x_grad)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("frozen", [None, (), ("x",), ("query",)])
def test_opcheck(name, frozen):
    case = CASES[name]
    if frozen is not None:
        leaves = {key: t.detach().requires_grad_() for key, t in replace(case, frozen=frozen).differentiable().items()}
        case = case.with_tensors(leaves)
    torch.library.opcheck(ops.late_cls_pool, case.arguments())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("need_x_grad", [True, False])
def test_opcheck_backward(name, need_x_grad):
    torch.library.opcheck(ops.late_cls_pool_backward, backward_arguments(CASES[name], need_x_grad))


@hypothesis.given(case=pool_cases())
def test_fake_outputs_look_like_real_ones(case):
    """Shape, dtype, device and strides, of the forward and of the backward operator."""
    need_x_grad = "x" not in case.frozen
    for op, args in (
        (ops.late_cls_pool, case.arguments()),
        (ops.late_cls_pool_backward, backward_arguments(case, need_x_grad)),
    ):
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.device, r.stride()) == (f.shape, f.dtype, f.device, f.stride())


class Layer(torch.nn.Module):
    """Class tokens that pool the token states, as a user writes it."""

    def __init__(self, dim: int = 32, heads: int = 4, norm: str | None = "layer") -> None:
        super().__init__()
        self.norm = norm
        self.tokens = torch.nn.Parameter(torch.randn(1, heads, 2, dim))
        self.weight, self.bias = (torch.nn.Parameter(torch.randn(dim)) for _ in range(2))
        self.before, self.values = torch.nn.Linear(dim, dim), torch.nn.Linear(dim, dim // heads)

    def forward(self, x: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
        vectors = {"norm_weight": self.weight, "norm_bias": self.bias} if self.norm else {}
        pooled, lse = late_cls_pool(
            self.before(x), self.tokens, key_mask=key_mask, scale=0.2, return_lse=True, norm=self.norm, **vectors
        )
        return self.values(pooled).transpose(1, 2).flatten(2) + 0.1 * lse.mean()


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("masked", [False, True])
def test_compile_fullgraph_dynamic(norm, masked):
    """One graph for all batches and lengths, and the numbers of eager mode."""
    torch._dynamo.reset()
    layer = Layer(norm=norm)
    graphs, backend = count_compilations()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for b, n in ((2, 5), (3, 6), (5, 9), (2, 700)):
        x = torch.randn(b, n, 32)
        key_mask = torch.rand(b, n) < 0.8 if masked else None
        torch.testing.assert_close(compiled(x, key_mask), layer(x, key_mask))
    assert len(graphs) == 1


def test_compile_with_inductor_and_backward():
    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for n in (5, 9):
        x = torch.randn(2, n, 32)
        grads = []
        for function in (layer, compiled):
            layer.zero_grad()
            function(x).square().sum().backward()
            grads.append([p.grad.clone() for p in layer.parameters()])
        torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_batch_and_length(strict):
    layer = Layer().eval()
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=3)}
    example = (torch.randn(4, 5, 32), torch.rand(4, 5) < 0.8)
    program = torch.export.export(layer, example, dynamic_shapes=(sizes, sizes), strict=strict)
    assert any(node.target is ops.late_cls_pool for node in program.graph.nodes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for b, n in ((2, 3), (3, 8), (5, 600)):
        x, key_mask = torch.randn(b, n, 32), torch.rand(b, n) < 0.8
        torch.testing.assert_close(loaded(x, key_mask), layer(x, key_mask))


def test_inference_mode_and_no_grad():
    case = CASES["layer"]
    expected = call_pool(case)
    x = case.x.clone().requires_grad_()
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            out = call_pool(replace(case, x=x))
        assert torch.equal(out[0], expected[0])
        assert not out[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_tokens_and_queries_and_keeps_the_norm(dtype):
    case = CASES["layer"]
    leaves = {name: t.clone().requires_grad_() for name, t in case.tensors().items()}
    case = case.with_tensors(leaves)
    with torch.autocast("cpu", dtype=dtype):
        pooled, lse = call_pool(case)
    assert pooled.dtype == dtype
    assert lse.dtype == torch.float32
    expected = call_pool(replace(case, x=case.x.to(dtype), query=case.query.to(dtype)))
    assert torch.equal(pooled, expected[0])
    assert torch.equal(lse, expected[1])
    pooled.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves.values())


def test_autocast_mixes_dtypes_and_leaves_float64_alone_and_can_be_off():
    case = CASES["plain"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call_pool(replace(case, query=case.query.half()))[0].dtype == torch.bfloat16
        assert call_pool(CASES["layer_float64"])[0].dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert call_pool(case)[0].dtype == torch.float32
    with pytest.raises(RuntimeError, match=r"query must be torch.float32, got torch.float16"):
        call_pool(replace(case, query=case.query.half()))


def test_autocast_in_a_compiled_function():
    torch._dynamo.reset()
    layer = Layer().eval()

    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_meta_tensors():
    x, query = (
        torch.empty(s, device="meta", dtype=torch.bfloat16, requires_grad=True) for s in ((2, 9, 8), (1, 4, 3, 8))
    )
    weight = torch.empty(8, device="meta", requires_grad=True)
    pooled, lse = late_cls_pool(x, query, norm="rms", norm_weight=weight, return_lse=True)
    assert pooled.is_meta
    assert pooled.shape == (2, 4, 3, 8)
    assert (pooled.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    gradients = torch.autograd.grad(pooled.sum() + lse.sum(), (x, query, weight))
    assert [g.shape for g in gradients] == [x.shape, query.shape, weight.shape]


def test_reference_compiles_too():
    torch._dynamo.reset()
    case = CASES["keys"]
    function = torch.compile(reference.late_cls_pool, fullgraph=True, backend="eager")
    out = function(case.x, case.query, key_mask=case.key_mask, scale=case.scale)
    torch.testing.assert_close(out, call_pool(case)[0])


def test_gradients_through_checkpointing():
    layer = Layer()
    x = torch.randn(2, 9, 32, requires_grad=True)
    grads = []
    for run in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        grads.append(torch.autograd.grad(run(x).square().sum(), x)[0])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_calls_the_operator_for_each_sample():
    """Outputs, and gradients by reverse mode outside of vmap."""
    case = model_case(2, 6, 8, norm="layer")
    x = torch.randn(3, 2, 6, 8, requires_grad=True)
    pool = lambda x: call_pool(replace(case, x=x))  # noqa: E731
    pooled, lse = torch.func.vmap(pool)(x)
    expected = [torch.stack(parts) for parts in zip(*map(pool, x.unbind()), strict=True)]
    torch.testing.assert_close([pooled, lse], expected)
    gradients = (torch.autograd.grad(out.square().sum(), x)[0] for out in (pooled, expected[0]))
    torch.testing.assert_close(*gradients)


def test_torch_func_grad_is_refused_clearly():
    """As by the other operators, and by every autograd.Function without a functorch rule."""
    case = CASES["plain"]
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: call_pool(replace(case, x=x))[0].sum())(case.x)
