"""How far a result may be from the float64 reference. Every constant of that kind lives here.

A result passes if ``max|out - exact| <= 2 * max|eager - exact| + k * eps * max(1, max|exact|)``, where `eager` is what
the reference makes of the same rounded inputs in the tensors' own dtype. The first term lets a kernel be no more than
twice as wrong as eager PyTorch. The second covers results on which eager happens to be exact (one key, zeros): `SLACK`
is k, in units of the dtype's last place. Loosening one needs a reason written here.

- float64 has no better reference: eager is `exact` itself, so that k has to cover the different order of summation
  over up to some hundred terms, and exp2 in place of exp.
- float32: the polynomial exp2 is good to about 2 units, its argument (a score times log2 e, up to 2^5) to as many.
  Rounding a larger score S moves its weight by S units, whatever one does; the operators round it once more than eager
  PyTorch (scale and log2 e are folded into q). A test with such scores multiplies k by S / 2^5.
- bfloat16 and float16: inputs are the same, arithmetic is in float32, one final rounding to half a unit. Where rotated
  rows are rounded for dot products (bfloat16, or 16-bit integers in float16), the first term covers it: eager PyTorch
  rounds them too, and its scores besides.
- Gradients of attention (`GRADIENT_SLACK`): they are sums of p (<v, grad_out> - <out, grad_out>), where each
  product reaches 20 and more for 80 value channels and the sum may be near 0.
- The same in bfloat16 and float16: `out` was rounded to half a unit in each of up to 80 value channels before it was
  multiplied with grad_out, which adds up to a few units (4 is 2 sigma for values N(0, 1) and dropout 0.3). Eager
  PyTorch subtracts a sum of its own rounded terms: with one key exactly.
- The gradient of a bias that is broadcast is a sum of so many (S) of these, often of sum 0 (a constant bias changes
  nothing), and its error a random walk: k grows by sqrt(S) / 8. So are gradients of late_cls_pool to a shared query,
  to norm_weight and to norm_bias.
- Pooling and the modules around it (`CHAIN`): the folded queries and the pooled tokens are rounded before the next
  matrix product, eager PyTorch rounds keys, scores and values instead; each of these intermediate values is up to a few
  times larger than the results. Both k are multiplied by it.
- late_cls_pool multiplies k by the factors of `late_cls_pool_cases.conditioning`: S / 2^5 as above; N / 64 where more
  than 64 tokens (N) are all alike, because then every addition rounds the same way (tokens that differ make it a random
  walk); with a norm, (largest |x|) / (8 spread), because x - mean loses digits where the mean is large beside the
  spread, in eager PyTorch too, but not the same ones (8: what an even spread may have).
"""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = {torch.float64: 64.0, torch.float32: 16.0, torch.bfloat16: 1.0, torch.float16: 1.0}
CHAIN = 4.0
GRADIENT_SLACK = {torch.float64: 256.0, torch.float32: 64.0, torch.bfloat16: 8.0, torch.float16: 8.0}


def gradient_slack(dtype: torch.dtype, summands: float = 1) -> float:
    """k for a gradient of attention that is the sum of so many independently rounded ones."""
    return GRADIENT_SLACK[dtype] * max(1.0, summands**0.5 / 8)


def allowance(eager: Tensor, exact: Tensor, dtype: torch.dtype, slack: float | None = None) -> float:
    """The largest absolute error that passes, for finite elements."""
    exact, eager = exact.double(), eager.double()
    finite = exact.isfinite() & eager.isfinite()
    error = largest((eager - exact)[finite])
    slack = SLACK[dtype] if slack is None else slack
    return 2 * error + slack * torch.finfo(dtype).eps * max(1.0, largest(exact[finite]))


def assert_close(
    out: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype, what: str = "out", slack: float | None = None
) -> None:
    """Fails if `out` is farther from `exact` than allowed, or not finite where `exact` is (and the reverse).

    Args:
        out: the result to judge.
        eager: the reference's result in `dtype`.
        exact: the reference's result in float64.
        dtype: of the tensors that went in.
        what: name for the message.
        slack: k, in place of `SLACK[dtype]`.
    """
    assert out.shape == exact.shape, f"{what}: shape {tuple(out.shape)}, expected {tuple(exact.shape)}"
    result, exact = out.double(), exact.double()
    special = ~exact.isfinite()
    assert torch.equal(~result.isfinite(), special), f"{what}: not finite where expected to be, or the reverse"
    assert torch.equal(result[special].nan_to_num(0.5), exact[special].nan_to_num(0.5)), f"{what}: wrong infinities"
    error, limit = largest((result - exact)[~special]), allowance(eager, exact, dtype, slack)
    assert error <= limit, f"{what}: error {error:.3e} is above {limit:.3e} ({dtype})"


def largest(t: Tensor) -> float:
    """The largest absolute value; 0 where there is none."""
    return t.abs().max().item() if t.numel() else 0.0
