"""ClassAttention and AttentionPoolLatent with timm's weights: the same outputs and gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_rope_cls import AttentionPoolLatent, ClassAttention

DIM = 24


def randomised(module: nn.Module) -> nn.Module:
    """In float64, with parameters at which every one of them matters."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.normal_(std=0.3)
    return module.eval()


def compare(
    theirs: nn.Module, ours: nn.Module, call: Any, inputs: tuple[Tensor, ...], tolerance: float = 1e-10
) -> None:
    """Loads timm's state_dict, compares results and gradients, and loads ours back."""
    randomised(theirs)
    ours.double().eval().load_state_dict(theirs.state_dict())
    results, grads = [], []
    for module in (theirs, ours):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = call(module, *leaves)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        names = dict(module.named_parameters())
        found = torch.autograd.grad((out * weight).sum(), [*leaves, *names.values()])
        results.append(out)
        grads.append(dict(zip([*range(len(leaves)), *names], found, strict=True)))
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=tolerance, atol=tolerance, msg=f"gradient of {name}")
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 0.5, "mlp_ratio": 2.5},
        {"norm_layer": partial(nn.LayerNorm, eps=1e-3)},
        {"norm_layer": nn.RMSNorm},
        {"norm_layer": partial(nn.RMSNorm, eps=1e-2), "act_layer": nn.SiLU},
    ],
)
def test_class_attention(backend, timm, bias, fused, options):
    from timm.models.cait import LayerScaleBlockClassAttn

    theirs = LayerScaleBlockClassAttn(DIM, 3, qkv_bias=bias, **options)
    theirs.attn.fused_attn = fused
    ours = ClassAttention(DIM, 3, qkv_bias=bias, **options)
    x, x_cls = torch.randn(2, 9, DIM).double(), torch.randn(2, 1, DIM).double()
    compare(theirs, ours, lambda m, x, x_cls: m(x, x_cls), (x, x_cls))


def test_class_attention_of_timm_norms(timm):
    """timm's own norms are none that the operator knows to be like PyTorch's; they are called."""
    from timm.layers import LayerNorm, RmsNorm
    from timm.models.cait import LayerScaleBlockClassAttn

    for norm in (LayerNorm, RmsNorm):
        theirs = LayerScaleBlockClassAttn(DIM, 2, norm_layer=norm)
        ours = ClassAttention(DIM, 2, norm_layer=norm)
        inputs = (torch.randn(2, 9, DIM).double(), torch.randn(2, 1, DIM).double())
        compare(theirs, ours, lambda m, x, x_cls: m(x, x_cls), inputs)


def test_cait_classifier(timm):
    """The class-attention stage of a whole CaiT, with its weights."""
    from timm.models.cait import Cait

    model = randomised(Cait(img_size=32, patch_size=8, embed_dim=DIM, depth=1, num_heads=3, num_classes=5))
    layers = nn.ModuleList(
        ClassAttention(DIM, 3, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)) for _ in range(2)
    )
    layers.double().load_state_dict(model.blocks_token_only.state_dict())
    x = torch.randn(2, 3, 32, 32).double()
    tokens = model.blocks(model.pos_drop(model.patch_embed(x) + model.pos_embed))
    x_cls = model.cls_token
    for layer in layers:
        x_cls = layer(tokens, x_cls)
    logits = model.head(model.norm(x_cls)[:, 0])  # CaiT normalises [CLS, tokens] token by token
    torch.testing.assert_close(logits, model(x), rtol=1e-10, atol=1e-10)


LATENT = [
    {},
    {"qkv_bias": False, "latent_len": 3},
    {"latent_len": 3, "pool_type": "avg"},
    {"latent_len": 3, "pool_type": ""},
    {"out_features": 10, "norm_layer": nn.LayerNorm, "latent_dim": 12, "mlp_ratio": 2.0},
    {"out_features": 0},
    {"q_proj": False, "act_layer": nn.SiLU},
    {"pos_embed": "abs", "feat_size": 9},
    {"qk_norm": True},
    {"qk_norm": True, "norm_layer": nn.RMSNorm, "latent_len": 2},
    {"num_heads": 1, "latent_len": 4},
]


@pytest.mark.parametrize("options", LATENT, ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_attention_pool_latent(backend, timm, options, mask):
    from timm.layers import AttentionPoolLatent as Theirs

    options = {"num_heads": 3, **options}
    theirs, ours = Theirs(DIM, **options), AttentionPoolLatent(DIM, **options)
    generator = torch.Generator().manual_seed(3)
    M = options.get("latent_len", 1)
    attn_mask = None
    if mask == "bool":
        attn_mask = torch.rand(2, 1, M, 9, generator=generator) < 0.7
    elif mask == "additive":
        attn_mask = torch.randn(M, 9, generator=generator).double()
    x = torch.randn(2, 9, DIM).double()
    compare(theirs, ours, lambda m, x: m(x, attn_mask=attn_mask), (x,))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"latent_len": 3, "pool_type": ""}], ids=str)
def test_key_mask_is_a_mask_over_all_queries(timm, options):
    from timm.layers import AttentionPoolLatent as Theirs

    theirs, ours = Theirs(DIM, num_heads=3, **options), AttentionPoolLatent(DIM, num_heads=3, **options)
    key_mask = torch.rand(4, 9) < 0.6
    key_mask[:, 2] = True
    x = torch.randn(4, 9, DIM).double()

    def call(module: nn.Module, x: Tensor) -> Tensor:
        return module(x, key_mask=key_mask) if module is ours else module(x, attn_mask=key_mask[:, None, None])

    compare(theirs, ours, call, (x,))


def test_initial_values(timm):
    """Latents and position embedding are drawn as timm draws them: cut off at two standard deviations."""
    from timm.layers import AttentionPoolLatent as Theirs

    for cls in (Theirs, AttentionPoolLatent):
        latent = cls(400, num_heads=4, latent_len=50).latent * 400**0.5
        assert 0.85 < latent.std() < 0.91
        assert latent.abs().max() <= 2.0001


def test_weights_of_class_attention(timm):
    """The map, times values, is what timm's attention makes before its output projection."""
    from timm.models.cait import LayerScaleBlockClassAttn

    theirs = randomised(LayerScaleBlockClassAttn(DIM, 3, qkv_bias=True))
    ours = ClassAttention(DIM, 3, qkv_bias=True).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x, x_cls = torch.randn(2, 9, DIM).double(), torch.randn(2, 1, DIM).double()
    _, weights = ours(x, x_cls, need_weights=True)
    u = theirs.norm1(torch.cat((x_cls, x), dim=1))
    q, k = (p(t).unflatten(-1, (3, -1)).transpose(1, 2) for p, t in ((theirs.attn.q, u[:, :1]), (theirs.attn.k, u)))
    torch.testing.assert_close(weights, F.softmax(q @ k.mT * theirs.attn.scale, dim=-1), rtol=1e-10, atol=1e-10)
