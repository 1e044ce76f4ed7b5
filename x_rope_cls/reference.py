"""Every operator in a few lines of plain PyTorch: what the kernels must compute, written to be read.

Any floating dtype, any device, differentiable as often as PyTorch is. Arithmetic is done in the dtype of the tensors
(rotation in float32 at least), so that a float64 call is the yardstick and a bfloat16 call shows what eager PyTorch
makes of the same inputs. Memory is O(N * M); nothing here is meant to be fast.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .tables import Rotary

ClsRope = Literal["rotate", "skip", "mask"]
PoolNorm = Literal["layer", "rms"]

_UINT32 = 0xFFFFFFFF
_PHILOX_ROUNDS = 7


def rope(x: Tensor, rotary: Rotary, *, inverse: bool = False) -> Tensor:
    """Rotates the first ``rotary_dim`` channels of every token that has a position.

    Args:
        x: (batch, heads, tokens, head_dim), floating.
        rotary: tables that broadcast to (batch, heads, tokens, rotary_dim / 2).
        inverse: multiply by the transpose, which undoes a pure rotation.

    Returns:
        Like x. Channels from rotary_dim on and tokens without a position are copied.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = rotary.cos.to(compute), rotary.sin.to(compute)
    if inverse:
        sin = -sin
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs].to(compute), x[..., 2 * pairs :]
    if rotary.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
    a, b = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack((a, b), dim=-1).flatten(-2) if rotary.interleaved else torch.cat((a, b), dim=-1)
    rotated = torch.cat((turned.to(x.dtype), rest), dim=-1)
    if rotary.rotate is None:
        return rotated
    return torch.where(_per_batch(rotary.rotate)[:, None, :, None], rotated, x)


def rope_qk(
    q: Tensor, k: Tensor, rotary: Rotary, *, rotary_k: Rotary | None = None, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`rope` of queries and of keys; ``rotary_k``: None, tables of the queries."""
    return rope(q, rotary, inverse=inverse), rope(k, rotary if rotary_k is None else rotary_k, inverse=inverse)


@overload
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Rotary | None = None,
    *,
    rotary_k: Rotary | None = None,
    cls_rope: ClsRope = "mask",
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    seed: int | Tensor | None = None,
) -> Tensor: ...
@overload
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Rotary | None = None,
    *,
    rotary_k: Rotary | None = None,
    cls_rope: ClsRope = "mask",
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: Literal[True],
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Rotary | None = None,
    *,
    rotary_k: Rotary | None = None,
    cls_rope: ClsRope = "mask",
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention with the rotation inside; the arguments of :func:`x_rope_cls.rope_attention`.

    Args:
        q: (batch, heads, queries, head_dim), floating.
        k: (batch, key_heads, keys, head_dim); query head h reads key head ``h // (heads / key_heads)``.
        v: (batch, key_heads, keys, value_dim).
        rotary: tables of the queries; None: no rotation at all.
        rotary_k: tables of the keys; None: those of the queries.
        cls_rope: what happens to tokens without a position.
        attn_mask: bool (True: attend) or additive, broadcastable to (batch, heads, queries, keys).
        key_mask: bool (batch, keys), True: attend. Values of k and v at masked keys never matter, NaN included.
        dropout_p: probability that an attention weight is dropped; see :func:`dropout_keep_mask`.
        scale: factor of the scores; default head_dim ** -0.5.
        return_lse: also return the natural logarithm of the softmax denominators.
        seed: of the dropout; required where dropout_p > 0.

    Returns:
        (batch, heads, queries, value_dim) and, if wanted, lse (batch, heads, queries), float32 at least. A query
        without any key to attend to gets output 0, gradient 0 and lse -inf.
    """
    (batch, heads, queries, head_dim), (key_heads, keys) = q.shape, k.shape[1:3]
    if key_mask is not None:
        k, v = (torch.where(key_mask[:, None, :, None], t, 0) for t in (k, v))

    scores = _scores(q, k, rotary, rotary if rotary_k is None else rotary_k, cls_rope)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(scores.dtype)
    elif attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)

    weights, lse = _softmax(scores)
    if dropout_p > 0:
        if seed is None:
            raise ValueError(f"rope_attention: seed must be given where dropout_p > 0, got None at {dropout_p}")
        keep = dropout_keep_mask(seed, batch, heads, queries, keys, dropout_p).to(weights.device)
        weights = weights * keep * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    out = weights @ v.repeat_interleave(heads // max(key_heads, 1), dim=1)
    return (out, lse) if return_lse else out


@overload
def late_cls_pool(
    x: Tensor,
    query: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    norm: PoolNorm | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor: ...
@overload
def late_cls_pool(
    x: Tensor,
    query: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    norm: PoolNorm | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor]: ...
def late_cls_pool(
    x: Tensor,
    query: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    norm: PoolNorm | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention whose keys and values are the token states; the arguments of :func:`x_rope_cls.late_cls_pool`.

    Args:
        x: (batch, tokens, channels), floating.
        query: (batch or 1, heads, queries, channels); projections to keys are folded into it.
        key_mask: bool (batch, tokens), True: attend. Values of x at masked tokens never matter, NaN included.
        scale: factor of the scores; default 1, because it belongs to the folded projections.
        return_lse: also return the natural logarithm of the softmax denominators.
        norm: how tokens are normalised over their channels before they are keys and values: "layer", "rms" or not.
        norm_weight: (channels,), factor after the normalisation.
        norm_bias: (channels,), added after the normalisation.
        norm_eps: added to the variance ("layer") or the mean square ("rms").

    Returns:
        (batch, heads, queries, channels) and, if wanted, lse (batch, heads, queries), float32 at least. A query
        without any token to attend to gets output 0, gradient 0 and lse -inf.
    """
    if key_mask is not None:
        x = torch.where(key_mask[:, :, None], x, 0)
    x = _normalise(x, norm, norm_weight, norm_bias, norm_eps, key_mask)
    scores = query @ x[:, None].mT * (1.0 if scale is None else scale)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    weights, lse = _softmax(scores)
    out = weights @ x[:, None]
    return (out, lse) if return_lse else out


def dropout_keep_mask(seed: int | Tensor, batch: int, heads: int, queries: int, keys: int, p: float) -> Tensor:
    """Which attention weights dropout keeps: counter-based, so the same on every device and for every tiling.

    Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed by the
    64-bit seed. One call at counter ((m >> 7) * 32 + (m & 31), n, bh low, bh high), with bh = b * heads + h, serves the
    four keys m, m + 32, m + 64, m + 96 of a group of 128. A weight is kept where its word is at least floor(p * 2^32).

    Args:
        seed: any 64-bit integer, or an int64 tensor of one element.
        batch: sizes of the attention weights.
        heads: see batch.
        queries: see batch.
        keys: see batch.
        p: probability that a weight is dropped, in [0, 1].

    Returns:
        bool (batch, heads, queries, keys) on the CPU, True: kept.
    """
    seed = int(seed)
    m = torch.arange(keys)
    n = torch.arange(queries)[:, None]
    bh = torch.arange(batch * heads).view(batch, heads, 1, 1)
    shape = (batch, heads, queries, keys)
    counter = tuple(part.expand(shape) for part in ((m >> 7) * 32 + (m & 31), n, bh & _UINT32, bh >> 32))
    words = philox_4x32(counter, (seed & _UINT32, (seed >> 32) & _UINT32))
    word = torch.stack(words, dim=-1).gather(-1, ((m >> 5) & 3).expand(shape)[..., None])
    return word.squeeze(-1) >= int(p * 2**32)


def philox_4x32(
    counter: tuple[Tensor, ...], key: tuple[int, int], rounds: int = _PHILOX_ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 in int64 arithmetic.

    Args:
        counter: four int64 tensors of one shape, values in [0, 2^32).
        key: two integers in [0, 2^32).
        rounds: 7 here; the generator of the paper's default has 10.

    Returns:
        Four int64 tensors of that shape: uniformly random words in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _UINT32, (k1 + 0xBB67AE85) & _UINT32
    return c0, c1, c2, c3


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32-bit product; int64 wraps around, which leaves all 64 bits right."""
    product = constant * word
    return (product >> 32) & _UINT32, product & _UINT32


def _scores(q: Tensor, k: Tensor, rotary_q: Rotary | None, rotary_k: Rotary | None, cls_rope: ClsRope) -> Tensor:
    """Scores before scale, (batch, heads, queries, keys), of rotated or raw pairs as ``cls_rope`` says."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.repeat_interleave(a.shape[1] // max(b.shape[1], 1), dim=1).mT

    if rotary_q is None or rotary_k is None:
        return dot(q, k)
    if cls_rope == "skip":
        return dot(rope(q, rotary_q), rope(k, rotary_k))
    rotated = dot(rope(q, rotary_q.without_rotate()), rope(k, rotary_k.without_rotate()))
    if cls_rope == "rotate":
        return rotated
    if cls_rope != "mask":
        raise ValueError(f"rope_attention: cls_rope must be 'rotate', 'skip' or 'mask', got {cls_rope!r}")
    has_q = torch.ones(1, 1, dtype=torch.bool) if rotary_q.rotate is None else _per_batch(rotary_q.rotate)
    has_k = torch.ones(1, 1, dtype=torch.bool) if rotary_k.rotate is None else _per_batch(rotary_k.rotate)
    both = has_q.to(q.device)[:, None, :, None] & has_k.to(q.device)[:, None, None, :]
    return torch.where(both, rotated, dot(q, k))


def _normalise(
    x: Tensor, norm: PoolNorm | None, weight: Tensor | None, bias: Tensor | None, eps: float, mask: Tensor | None
) -> Tensor:
    """Normalises x over its last axis; statistics in float32 at least, the result in the dtype of x.

    Tokens outside ``mask`` (batch, tokens) are 0; they are not divided by their own variance, which may be 0.
    """
    if norm is None:
        return x
    if norm not in ("layer", "rms"):
        raise ValueError(f"late_cls_pool: norm must be 'layer', 'rms' or None, got {norm!r}")
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    states = x.to(compute)
    if norm == "layer":
        states = states - states.mean(dim=-1, keepdim=True)
    variance = states.square().mean(dim=-1, keepdim=True) + eps
    if mask is not None:
        variance = torch.where(mask[:, :, None], variance, 1)
    states = states * variance.rsqrt()
    if weight is not None:
        states = states * weight.to(compute)
    if bias is not None:
        states = states + bias.to(compute)
    return states.to(x.dtype)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and logsumexp over the last axis; weights 0 and logsumexp -inf, without gradient, where all are -inf."""
    dead = (scores == -torch.inf).all(dim=-1, keepdim=True)
    scores = scores.masked_fill(dead, 0)
    weights = scores.softmax(dim=-1).masked_fill(dead, 0)
    compute = torch.float64 if scores.dtype == torch.float64 else torch.float32
    lse = scores.to(compute).logsumexp(dim=-1).masked_fill(dead.squeeze(-1), -torch.inf)
    return weights, lse


def _per_batch(rotate: Tensor) -> Tensor:
    return rotate if rotate.dim() == 2 else rotate[None]
