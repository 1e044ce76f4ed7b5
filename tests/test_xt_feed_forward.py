"""Feed-forward layers that take tokens in pieces, beside x-transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from x_transformers import Encoder as XEncoder
from x_transformers.x_transformers import FeedForward

import x_rope_cls
from x_rope_cls.xt import feed_forward
from x_rope_cls.xt.feed_forward import PiecewiseFeedForward

DIM = 16
OPTIONS = (
    {},
    {"mult": 2, "no_bias": True},
    {"glu": True, "swish": True, "glu_mult_bias": True},
    {"relu_squared": True, "post_act_ln": True},
    {"solu": True},
    {"dim_out": 24, "dropout": 0.1, "sublayer_dropout": 0.2},
    {"custom_activation": nn.Identity()},
)


class Rows:
    """How many tokens each call of a linear layer has got, and which of them went through oneDNN."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.fused: list[str] = []

    def most(self) -> int:
        most = max(self.seen)
        self.seen.clear()
        return most


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Pieces of 4 KB, and what layers get."""
    found = Rows()
    forward, fused = nn.Linear.forward, feed_forward._fused_linear

    def watched(self: nn.Linear, x: Tensor) -> Tensor:
        found.seen.append(x.shape[:-1].numel())
        return forward(self, x)

    def watched_fused(weight: Tensor, bias: Tensor | None, activation: str, algorithm: str, x: Tensor) -> Tensor:
        found.seen.append(x.shape[:-1].numel())
        found.fused.append("dx" if weight.stride(0) == 1 and weight.stride(1) != 1 else activation)
        return fused(weight, bias, activation, algorithm, x)

    monkeypatch.setattr(nn.Linear, "forward", watched)
    monkeypatch.setattr(feed_forward, "_fused_linear", watched_fused)
    monkeypatch.setattr(feed_forward, "_LEAST_WORK", 1)
    monkeypatch.setattr(feed_forward, "_PIECE_BYTES_PER_THREAD", max(1, 4096 // torch.get_num_threads()))
    return found


def both(**options: Any) -> tuple[FeedForward, PiecewiseFeedForward]:
    theirs = FeedForward(DIM, **options).eval()
    ours = FeedForward(DIM, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    feed_forward.convert_feed_forwards(ours)
    assert type(ours) is PiecewiseFeedForward
    return theirs, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("shape", [(2, 301, DIM), (1, 512, DIM), (997, DIM), (3, 2, 150, DIM)], ids=str)
def test_pieces_are_the_whole(rows, options, dtype, shape):
    theirs, ours = (module.to(dtype) for module in both(**options))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        found = ours(x)
        assert rows.most() <= x.shape[:-1].numel() // 2
        expected = theirs(x)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


def test_any_strides(rows):
    theirs, ours = both()
    x = torch.randn(2 * DIM, 400, 3).transpose(0, 2)[..., ::2]
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        x = torch.randn(1, 1, DIM).expand(3, 400, DIM)
        torch.testing.assert_close(ours(x), theirs(x))


def test_the_whole_where_pieces_would_not_do(rows):
    _, ours = both(dropout=0.5)
    x = torch.randn(2, 300, DIM)

    def most(run: Any) -> int:
        run()
        return rows.most()

    with torch.no_grad():
        assert most(lambda: ours(x)) < 600
        assert most(lambda: ours(x, deep_embed=None)) < 600
        assert most(lambda: ours(x, deep_embed=torch.ones(DIM))) == 600
        assert most(lambda: ours(x[:, :8])) == 16  # so few are one piece
        assert most(lambda: torch.vmap(ours)(x)) == 300
        assert most(lambda: ours.train()(x)) == 600  # dropout draws as it did
        ours.eval()
        handle = ours.ff[-2].register_forward_hook(lambda *_: None)
        assert most(lambda: ours(x)) == 600
        handle.remove()
        ours.ff[0][1] = nn.Softmax(dim=1)  # over the tokens, for all that is known
        assert most(lambda: ours(x)) == 600
    ours.ff[0][1] = nn.GELU()
    assert most(lambda: ours(x)) == 600  # gradients


@pytest.fixture
def avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN, also on processors where torch's own choice is as fast."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("tokens", [1, 37, 512])
@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, ["gelu", "none"]),
        ({"custom_activation": nn.GELU("tanh"), "no_bias": True}, ["gelu", "none"]),
        ({"swish": True, "dropout": 0.1}, ["swish", "none"]),
        ({"custom_activation": nn.ReLU()}, ["relu", "none"]),
        ({"custom_activation": nn.Identity()}, ["none", "none"]),
        ({"relu_squared": True}, ["none", "none"]),
        ({"post_act_ln": True}, ["gelu", "none"]),
        ({"glu": True}, ["none"]),
    ],
    ids=str,
)
def test_linear_layers_bring_their_activation(rows, avx512, options, fused, tokens):
    theirs, ours = both(**options)
    x = torch.randn(2, tokens, DIM, generator=torch.Generator().manual_seed(tokens))
    for no_grad in (torch.no_grad(), torch.inference_mode()):
        with no_grad:
            rows.fused.clear()
            found = ours(x)
            pieces = len(rows.fused) // len(fused)
            assert rows.fused == fused * pieces
            assert pieces > 1 or tokens < 512
            expected, exact = theirs(x), theirs.double()(x.double())
            theirs.float()
        error, usual = ((t - exact).abs().max().item() for t in (found, expected))
        assert error <= 4 * usual + 1e-6 * exact.abs().max().item()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_where_torch_chooses_the_library(rows, avx512, monkeypatch):
    _, ours = both()
    x = torch.randn(2, 8, DIM)  # one piece

    def fused() -> int:
        rows.fused.clear()
        ours(x)
        return len(rows.fused)

    with torch.no_grad():
        assert fused() == 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fused() == 0
        with torch.backends.mkldnn.flags(enabled=False):
            assert fused() == 0
        with FlopCounterMode(display=False) as counter:
            assert fused() == 0
        assert counter.get_total_flops() == 2 * (2 * 16 * DIM * 4 * DIM)
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        assert fused() == 0
        handle.remove()
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
            assert fused() == 0
        parametrize.register_parametrization(ours.ff[2], "weight", nn.Identity())
        assert fused() == 0
        ours.double()
        x = x.double()
        assert fused() == 0


def gradients(module: nn.Module, x: Tensor, grad: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Of the input and of all parameters; behind the output."""
    x = x.detach().requires_grad_()
    out = module(x)
    return out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], grad, **options)


def assert_as_exact(found: tuple[Tensor, ...], usual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """The errors are about those of x-transformers' own layer."""
    for own, other, reference in zip(found, usual, exact, strict=True):
        assert own.shape == reference.shape
        error, allowed = ((t - reference).abs().max().item() for t in (own, other))
        assert error <= 4 * allowed + 1e-6 * reference.abs().max().item()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("shape", [(2, 37, DIM), (101, DIM), (3, 2, 5, DIM)], ids=str)
@pytest.mark.parametrize(("options", "fused"), [(o, 1 if "glu" in o else 2) for o in OPTIONS], ids=str)
def test_gradients(rows, avx512, options, fused, shape):
    theirs, ours = both(**options)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g)
    grad = torch.randn(*shape[:-1], options.get("dim_out", DIM), generator=g)
    found = gradients(ours, x, grad)
    assert rows.fused == ["none"] * fused + ["dx"] * fused
    usual = gradients(theirs, x, grad)
    exact = gradients(theirs.double(), x.double(), grad.double())
    assert_as_exact(found, usual, exact)
    expanded = torch.ones(()).expand_as(grad)
    assert_as_exact(
        gradients(ours, x, expanded),
        gradients(theirs.float(), x, expanded),
        gradients(theirs.double(), x.double(), expanded.double()),
    )


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_gradients_of_gradients_and_many_at_once(rows, avx512):
    theirs, ours = both()
    x = torch.randn(3, 7, DIM)

    def second(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        first = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()], create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), [x, *module.parameters()])

    found, usual = second(ours, x), second(theirs, x)
    assert_as_exact(found, usual, second(theirs.double(), x.double()))
    theirs.float()
    rows.fused.clear()
    grads = torch.randn(4, 3, 7, DIM)
    found = gradients(ours, x, grads, is_grads_batched=True)
    assert rows.fused == ["none"] * 2
    usual = gradients(theirs, x, grads, is_grads_batched=True)
    for own, other in zip(found, usual, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_what_is_respected_with_gradients(rows, avx512):
    theirs, ours = both(dropout=0.3)
    x, grad = torch.randn(2, 9, DIM), torch.randn(2, 9, DIM)

    def fused(module: nn.Module = ours) -> int:
        rows.fused.clear()
        gradients(module, x, grad)
        return len(rows.fused)

    assert fused() == 4
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        for module in (ours.ff, ours.ff[0], ours.ff[2], ours.ff[0][1]):
            handle = getattr(module, register)(lambda *_: None)
            rows.fused.clear()
            ours(x)
            assert rows.fused == []
            handle.remove()
    rows.fused.clear()
    with FlopCounterMode(display=False) as counter:
        ours(x.clone().requires_grad_()).backward(grad)
    assert rows.fused == []
    assert counter.get_total_flops() == 3 * 2 * (2 * 18 * DIM * 4 * DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused() == 0
    torch.func.jvp(ours, (x,), (x,))
    with forward_ad.dual_level():
        rows.fused.clear()
        ours(forward_ad.make_dual(x, x))
    assert rows.fused == []

    theirs.train()
    ours.train()
    torch.manual_seed(3)
    found = gradients(ours, x, grad)
    torch.manual_seed(3)
    usual = gradients(theirs, x, grad)  # the same units are dropped
    for own, other in zip(found, usual, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)

    ours.zero_grad()
    ours.eval().requires_grad_(False)
    ours.ff[2].bias.requires_grad_()
    rows.fused.clear()
    ours(x).sum().backward()
    assert rows.fused == ["none"] * 2  # nothing asks for the gradients of tokens
    torch.testing.assert_close(ours.ff[2].bias.grad, torch.full((DIM,), 18.0))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("place", [(), (0,), (0, 0), (0, 1), (2,)], ids=str)
def test_a_forward_of_its_own_is_called(rows, avx512, place, grad):
    """As offloading and some adapters put it there."""
    _, ours = both()
    module = ours.ff
    for i in place:
        module = module[i]
    seen = []
    module.forward = lambda x, forward=module.forward: seen.append(x.shape) or forward(x)
    with torch.set_grad_enabled(grad):
        ours(torch.randn(2, 8, DIM))
    assert seen
    assert rows.fused == []


@pytest.mark.parametrize("grad", [False, True])
def test_errors_are_those_of_torch(rows, avx512, grad):
    theirs, ours = both()
    with torch.set_grad_enabled(grad):
        for x in (torch.randn(2, 8, DIM + 1), torch.randn(2, 8, DIM).double()):
            with pytest.raises(RuntimeError) as expected:
                theirs(x)
            with pytest.raises(RuntimeError) as found:
                ours(x)
            assert str(found.value) == str(expected.value)


def test_no_other_class_is_converted():
    class Own(FeedForward):
        pass

    model = nn.ModuleList([Own(DIM), nn.Linear(DIM, DIM)])
    feed_forward.convert_feed_forwards(model)
    assert type(model[0]) is Own


def test_an_encoder_in_pieces(rows):
    options = {"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 16, "rotary_pos_emb": True}
    theirs = XEncoder(**options).eval()
    ours = x_rope_cls.Encoder(**options, cls_rope="rotate", num_prefix_tokens=1).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 200, 32)
    with torch.inference_mode():
        expected = theirs(x)
        rows.seen.clear()
        torch.testing.assert_close(ours(x), expected)
    wide = [seen for seen in rows.seen if seen < 400]
    assert len(wide) > 2 * 2 * 2  # both layers of each of two blocks, in more than two pieces
