"""What PyTorch asks of an operator: opcheck, compile, export, inference mode, autocast, strides of fake tensors."""

from __future__ import annotations

import io
from dataclasses import replace

import hypothesis
import pytest
import torch
from cases import CODES, call_operator
from strategies import DTYPES, MODES, AttentionCase, attention_cases
from test_attention_forward import model_case
from torch._subclasses import FakeTensorMode

from x_rope_cls import (
    AxialRotaryEmbedding,
    LearnedRotaryEmbedding,
    Rotary,
    RotaryEmbedding,
    apply_rope,
    apply_rope_qk,
    late_cls_pool,
    ops,
    reference,
    rope_attention,
)


def attention_arguments(case: AttentionCase) -> tuple:
    def parts(rotary: Rotary | None) -> tuple:
        return (None,) * 3 if rotary is None else (rotary.cos, rotary.sin, rotary.rotate)

    (cos_q, sin_q, rotate_q), (cos_k, sin_k, rotate_k) = parts(case.rotary_q), parts(case.rotary_k)
    seed = torch.tensor(case.seed) if case.dropout_p > 0 else None
    interleaved = case.rotary_q is None or case.rotary_q.interleaved
    tensors = (case.q, case.k, case.v, cos_q, sin_q, cos_k, sin_k, rotate_q, rotate_k, case.attn_mask, case.key_mask)
    return (*tensors, seed, CODES[case.cls_rope], interleaved, case.scale, case.dropout_p)


def backward_arguments(case: AttentionCase) -> tuple:
    args = attention_arguments(case)
    out, lse = ops.rope_attention(*args)
    need_bias = case.attn_mask is not None and case.attn_mask.is_floating_point()
    tensors = (torch.randn_like(out), torch.randn_like(lse), *args[:3], out, lse)
    return (*tensors, *args[3:], need_bias, case.rotary_q is not None)


CASES = {
    "plain": replace(model_case(5, 5, "mask", D=8, Dv=6), rotary_q=None, rotary_k=None),
    "mask": model_case(5, 7, "mask", D=8, Dv=6, rotate="per_batch"),
    "skip": model_case(5, 7, "skip", torch.float64, D=8, Dv=6),
    "rotate": model_case(1, 1, "rotate", torch.bfloat16, D=8, Dv=6),
    "bias": replace(model_case(5, 7, "mask", D=8, Dv=6), attn_mask=torch.randn(2, 1, 5, 7)),
    "bool": replace(model_case(5, 7, "mask", D=8, Dv=6), attn_mask=torch.rand(5, 7) < 0.7),
    "keys": replace(model_case(5, 7, "mask", D=8, Dv=6), key_mask=torch.rand(2, 7) < 0.7),
    "dropout": replace(model_case(5, 7, "mask", D=8, Dv=6), dropout_p=0.5, seed=3),
}


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck_rope(grads, interleaved):
    x, tables = torch.randn(2, 3, 5, 8), RotaryEmbedding(6)(5, torch.arange(5) > 1)
    cos, sin = tables.cos, tables.sin
    x, cos, sin = (t.requires_grad_(grads) for t in (x, cos, sin))
    torch.library.opcheck(ops.rope, (x, cos, sin, tables.rotate, interleaved, False))
    torch.library.opcheck(ops.rope, (x, cos, sin, None, interleaved, True))
    grad = torch.randn_like(x)
    torch.library.opcheck(ops.rope_table_grad, (grad, x, cos.detach(), tables.rotate, interleaved, False))


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck_rope_qk(grads, interleaved):
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    rotary, rotary_k = RotaryEmbedding(6)(5, torch.arange(5) > 1), RotaryEmbedding(4)(7)
    tensors = (q, k, rotary.cos, rotary.sin, rotary_k.cos, rotary_k.sin)
    tensors = tuple(t.requires_grad_(grads) for t in tensors)
    torch.library.opcheck(ops.rope_qk, (*tensors, rotary.rotate, rotary_k.rotate, interleaved, True))


def test_compile_rope_qk():
    torch._dynamo.reset()
    rotary = RotaryEmbedding(6)(5, torch.arange(5) > 1)

    def loss(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        rotated_q, rotated_k = apply_rope_qk(q, k, rotary)
        return (rotated_q * rotated_k).sum()

    q, k = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(2))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(q, k), (q, k))
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k), (q, k)), expected)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grads", [False, True])
def test_opcheck_attention(name, grads):
    case = CASES[name]
    if grads:
        leaves = {key: t.detach().requires_grad_() for key, t in case.differentiable().items()}
        case = case.with_tensors(leaves)
    torch.library.opcheck(ops.rope_attention, attention_arguments(case))


@pytest.mark.parametrize("name", CASES)
def test_opcheck_attention_backward(name):
    torch.library.opcheck(ops.rope_attention_backward, backward_arguments(CASES[name]))


@hypothesis.given(case=attention_cases())
def test_fake_outputs_look_like_real_ones(case):
    """Shape, dtype, device and strides, of the forward and of the backward operator."""
    for op, args in (
        (ops.rope_attention, attention_arguments(case)),
        (ops.rope_attention_backward, backward_arguments(case)),
    ):
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


class Layer(torch.nn.Module):
    """Self-attention as a user writes it."""

    def __init__(self, dim: int = 32, heads: int = 4, dropout: float = 0.0, cls_rope: str = "mask") -> None:
        super().__init__()
        self.heads, self.dropout, self.cls_rope = heads, dropout, cls_rope
        self.qkv = torch.nn.Linear(dim, 3 * dim)
        self.rotary = RotaryEmbedding(dim // heads // 2)

    def forward(self, x: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        rotary = self.rotary(x.shape[1], torch.arange(x.shape[1], device=x.device) > 1)
        out = rope_attention(
            q, k, v, rotary, cls_rope=self.cls_rope, key_mask=key_mask, dropout_p=self.dropout if self.training else 0.0
        )
        return out.transpose(1, 2).flatten(2)


def count_compilations() -> tuple[list[int], object]:
    graphs: list[int] = []

    def backend(module: torch.fx.GraphModule, example_inputs: list) -> object:
        graphs.append(len(module.graph.nodes))
        return module.forward

    return graphs, backend


@pytest.mark.parametrize("cls_rope", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_compile_fullgraph_dynamic(cls_rope, masked):
    """One graph for all lengths, and the numbers of eager mode."""
    torch._dynamo.reset()
    layer = Layer(cls_rope=cls_rope).eval()
    graphs, backend = count_compilations()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for n in (5, 6, 9, 17):
        x = torch.randn(2, n, 32)
        key_mask = torch.rand(2, n) < 0.8 if masked else None
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
            grads.append(layer.qkv.weight.grad.clone())
        torch.testing.assert_close(grads[0], grads[1])


def test_compile_learned_tables_with_backward():
    torch._dynamo.reset()
    embedding = LearnedRotaryEmbedding(8, num_axes=2, heads=2, num_prefix_tokens=1)
    q = torch.randn(1, 2, 7, 8)

    def loss(q):
        return rope_attention(q, q, q, embedding((2, 3))).square().sum()

    (expected,) = torch.autograd.grad(loss(q), embedding.freqs)
    (grad,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(q), embedding.freqs)
    torch.testing.assert_close(grad, expected)


def test_compile_takes_and_returns_rotary():
    torch._dynamo.reset()
    embedding = AxialRotaryEmbedding(8, num_prefix_tokens=1)

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def double(rotary: Rotary, x: torch.Tensor) -> tuple[Rotary, torch.Tensor]:
        return Rotary(rotary.cos * 2, rotary.sin * 2, rotary.rotate, rotary.interleaved), apply_rope(x, rotary)

    for grid in ((2, 3), (4, 4)):
        rotary = embedding(grid)
        x = torch.randn(1, 2, rotary.cos.shape[0], 8)
        doubled, rotated = double(rotary, x)
        assert isinstance(doubled, Rotary)
        torch.testing.assert_close(doubled.cos, rotary.cos * 2)
        torch.testing.assert_close(rotated, apply_rope(x, rotary))


def test_compile_dropout_draws_anew_each_time():
    torch._dynamo.reset()
    compiled = torch.compile(Layer(dropout=0.5), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 16, 32)
    assert not torch.equal(compiled(x), compiled(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_length(strict):
    layer = Layer().eval()
    length = torch.export.Dim("length", min=3)
    program = torch.export.export(layer, (torch.randn(2, 5, 32),), dynamic_shapes=({1: length},), strict=strict)
    assert any(node.target is ops.rope_attention for node in program.graph.nodes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for n in (3, 8, 33):
        x = torch.randn(2, n, 32)
        torch.testing.assert_close(loaded(x), layer(x))


def test_export_takes_rotary():
    class Rotate(torch.nn.Module):
        def forward(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
            return apply_rope(x, rotary)

    x, rotary = torch.randn(1, 2, 5, 8), RotaryEmbedding(8)(5, torch.arange(5) > 0)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Rotate(), (x, rotary)), buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x, rotary), apply_rope(x, rotary))


def test_inference_mode_and_no_grad():
    case = CASES["mask"]
    expected = call_operator(case)
    q = case.q.clone().requires_grad_()
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            out = call_operator(replace(case, q=q))
            rotated = apply_rope(q, case.rotary_q)
        assert torch.equal(out[0], expected[0])
        assert not out[0].requires_grad
        assert not rotated.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_q_k_v_and_keeps_tables_and_bias(dtype):
    case = replace(CASES["bias"], rotary_q=None, rotary_k=None, attn_mask=torch.randn(5, 7))
    case = replace(case, rotary_q=CASES["bias"].rotary_q, rotary_k=CASES["bias"].rotary_k)
    q, k, v = (t.clone().requires_grad_() for t in (case.q, case.k, case.v))
    with torch.autocast("cpu", dtype=dtype):
        out, lse = rope_attention(
            q, k, v, case.rotary_q, rotary_k=case.rotary_k, attn_mask=case.attn_mask, return_lse=True
        )
        sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        rotated = apply_rope(q, case.rotary_q)
    assert out.dtype == sdpa.dtype == dtype
    assert lse.dtype == torch.float32
    assert rotated.dtype == torch.float32
    expected = call_operator(replace(case, q=q.to(dtype), k=k.to(dtype), v=v.to(dtype), scale=8**-0.5))
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (q, k, v))


def test_autocast_leaves_float64_alone_and_can_be_off():
    case = model_case(5, 5, "mask", torch.float64, D=8, Dv=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call_operator(case)[0].dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert call_operator(model_case(5, 5, "mask"))[0].dtype == torch.float32


def test_autocast_in_a_compiled_function():
    torch._dynamo.reset()
    layer = Layer().eval()

    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    x = torch.randn(2, 7, 32)
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, run(x))


def test_meta_tensors():
    rotary = RotaryEmbedding(8)(5).to("meta")
    q = torch.empty(2, 4, 5, 8, device="meta", dtype=torch.bfloat16)
    out = rope_attention(q, q[:, :2], q[:, :2], rotary)
    assert out.is_meta
    assert out.shape == q.shape
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_heads_is_a_view(dtype):
    case = model_case(5, 7, "mask", dtype)
    out, _ = call_operator(case)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


def test_reference_compiles_too():
    torch._dynamo.reset()
    case = CASES["keys"]
    function = torch.compile(reference.rope_attention, fullgraph=True, backend="eager")
    out = function(case.q, case.k, case.v, case.rotary_q, rotary_k=case.rotary_k, key_mask=case.key_mask)
    torch.testing.assert_close(out, call_operator(replace(case, scale=8**-0.5))[0])


def test_gradients_through_checkpointing():
    layer = Layer(dropout=0.3)
    x = torch.randn(2, 9, 32, requires_grad=True)
    grads = []
    for run in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(x).square().sum(), x)[0])
    torch.testing.assert_close(grads[0], grads[1])


FUNCTIONS = {
    "rope": lambda x: apply_rope(x, RotaryEmbedding(8)(x.shape[2])),
    "rope_attention": lambda x: rope_attention(x, x, x),
    "late_cls_pool": lambda x: late_cls_pool(x[:, 0], x[:, :, :1].detach()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused_clearly(name, requires_grad):
    """A tangent never gets lost; where there is none, being in a dual level changes nothing."""
    x = torch.randn(1, 2, 5, 8, requires_grad=requires_grad)
    function, refusal = FUNCTIONS[name], rf"{name}: mode of differentiation must be reverse, got forward"
    with pytest.raises(RuntimeError, match=refusal):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        torch.testing.assert_close(function(x), function(x.detach()))
        with pytest.raises(RuntimeError, match=refusal):
            function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
