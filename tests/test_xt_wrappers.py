"""x-transformers' own models with each Encoder in them swapped: same losses, same gradients."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import x_rope_cls

pytest.importorskip("x_transformers")
import x_transformers
import xt_cases as cases
from xt_cases import one_thread  # noqa: F401  (used by every test)

SMALL: dict[str, Any] = {"depth": 2, "heads": 4, "attn_dim_head": 8, "rotary_pos_emb": True, "verbose": False}


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 20, shape)


def _x_transformer() -> tuple[nn.Module, tuple[Any, ...]]:
    sides = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in SMALL.items()}
    sizes = {
        f"{side}_{name}": value for side in ("enc", "dec") for name, value in (("num_tokens", 20), ("max_seq_len", 16))
    }
    return x_transformers.XTransformer(dim=32, enc_num_memory_tokens=2, **sides, **sizes), (
        _tokens(2, 7),
        _tokens(2, 6),
    )


def _masked_language_model() -> tuple[nn.Module, tuple[Any, ...]]:
    encoder = x_transformers.Encoder(dim=32, **SMALL, attn_flash=True)
    wrapper = x_transformers.TransformerWrapper(num_tokens=21, max_seq_len=16, attn_layers=encoder)
    return x_transformers.NonAutoregressiveWrapper(wrapper, mask_id=20, steps=3), (_tokens(2, 16),)


def _gpt_vae() -> tuple[nn.Module, tuple[Any, ...]]:
    from x_transformers.gpt_vae import GPTVAE

    model = GPTVAE(num_tokens=20, dim=32, depth=1, enc_depth=2, max_seq_len=16, heads=4, attn_dim_head=8)
    return model, (_tokens(2, 9),)


def _free_transformer() -> tuple[nn.Module, tuple[Any, ...]]:
    from x_transformers.free_transformer import FreeTransformer

    model = FreeTransformer(
        num_tokens=20,
        dim=32,
        heads=4,
        attn_dim_head=8,
        dec_head_depth=1,
        dec_tail_depth=1,
        max_seq_len=16,
        latent_bits=4,
    )
    return model, (_tokens(2, 9),)


def _continuous_autoencoder() -> tuple[nn.Module, tuple[Any, ...]]:
    from x_transformers.continuous_autoencoder import ContinuousTransformerAutoencoder

    model = ContinuousTransformerAutoencoder(dim=32, enc_depth=2, dec_depth=1, max_seq_len=16, heads=4, attn_dim_head=8)
    return model, (torch.randn(2, 9, 32), torch.tensor([9, 4]))


def _neo_mlp() -> tuple[nn.Module, tuple[Any, ...]]:
    from x_transformers.neo_mlp import NeoMLP

    return NeoMLP(dim_in=5, dim_out=3, dim_hidden=6, depth=2, dim_model=32), (torch.randn(4, 5),)


MODELS = (_x_transformer, _masked_language_model, _gpt_vae, _free_transformer, _continuous_autoencoder, _neo_mlp)


def _run(model: nn.Module, args: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    random.seed(7)
    out = model(*args)
    while isinstance(out, tuple):
        out = out[0]
    out.square().sum().backward()
    return {"out": out.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("make", MODELS)
def test_model(make: Callable[[], tuple[nn.Module, tuple[Any, ...]]]) -> None:
    try:
        model, args = make()
    except ImportError:
        pytest.skip(f"x-transformers {cases.VERSION} does not have this model")
    torch.manual_seed(1)
    swapped = copy.deepcopy(model)
    encoders = [m for m in swapped.modules() if type(m) is x_transformers.Encoder]
    assert encoders
    for encoder in encoders:
        x_rope_cls.swap_(encoder, cls_rope="rotate")
    cases.assert_same(_run(swapped, args), _run(model, args), 1e-3)


def test_weights_by_torch_func() -> None:
    """torch.func differentiates and batches through a converted encoder as through the original."""
    theirs, ours = cases.make_pair(cases.BASE, torch.float32, cls_rope="rotate")
    x = torch.randn(3, 2, 7, 32)

    def grads(encoder: Any) -> Any:
        parameters = dict(encoder.named_parameters())
        loss = lambda p, x: torch.func.functional_call(encoder, p, (x,)).square().sum()  # noqa: E731
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)

    cases.assert_same({"out": torch.zeros(1), **grads(ours)}, {"out": torch.zeros(1), **grads(theirs)}, 1e-3)
