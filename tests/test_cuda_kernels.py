"""The CUDA kernels under the simulator's further checks: races, the adder of tensor cores, statistics of memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import cuda_sim
import pytest
import torch
from strategies import Generator

from x_rope_cls import RotaryEmbedding, apply_rope, late_cls_pool, reference, rope_attention

pytestmark = pytest.mark.skipif(cuda_sim.missing() is not None, reason=str(cuda_sim.missing()))
CHECKS = {"plain": {}, "race": {"CUDASIM_RACECHECK": "1"}, "truncate": {"CUDASIM_MMA": "truncate"}}


@pytest.fixture(scope="module")
def simulator() -> Iterator[cuda_sim.Simulator]:
    return cuda_sim.load()


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("kind", "cases"), [("rope", 200), ("attention", 40), ("pooling", 100)])
def test_native_cases(simulator, kind, cases, check):
    """Random shapes, strides and masks against plain loops; also in place, and two tensors in a launch."""
    program = cuda_sim.BUILD / "tests" / "sim" / "cuda_kernels_test"
    environment = {"CUDASIM_HOST_POINTERS": "1", "CUDASIM_THREADS": "1", **CHECKS[check]}
    first = {"plain": "0", "race": "10000", "truncate": "20000"}[check]
    count = str(cases if check == "plain" else cases // 2)
    result = subprocess.run(
        [program, count, first, kind], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:] + result.stdout[-2000:]
    assert f"{count} passed, 0 failed" in result.stdout


def run_each_operator(dtype: torch.dtype, head_dim: int, special: int, gradients: bool = True) -> float:
    """Rows as a model has them: aligned, whole tiles and a rest; returns the largest error."""
    generator, tokens = Generator(head_dim), 200
    q, k, v, weight = (generator.normal(1, 2, tokens, head_dim, dtype=dtype) for _ in range(4))
    x, query = generator.normal(2, tokens, 128, dtype=dtype), generator.normal(1, 4, 1, 128, dtype=dtype)
    rotary = RotaryEmbedding(head_dim, interleaved=head_dim != 96)(tokens, torch.arange(tokens) >= special)

    def results(rope, attention, pool, convert):
        leaves = [convert(t).detach().requires_grad_() for t in (q, k, v, x, query)]
        tables = rotary if convert(q).dtype != torch.float64 else rotary.to(dtype=torch.float64)
        out = [rope(leaves[0], tables), attention(*leaves[:3], tables), pool(leaves[3], leaves[4], scale=0.1)]
        if not gradients:
            return out
        total = (out[0] * convert(weight)).sum() + (out[1] * convert(weight)).sum() + out[2].square().sum()
        return [*out, *torch.autograd.grad(total, leaves)]

    ours = results(apply_rope, rope_attention, late_cls_pool, lambda t: t)
    exact = results(reference.rope, reference.rope_attention, reference.late_cls_pool, torch.Tensor.double)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_no_races_and_no_need_to_round_sums(simulator, dtype, head_dim):
    tolerance = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.004}
    with cuda_sim.simulated_cuda(race=True, truncate=True):
        assert run_each_operator(dtype, head_dim, special=3) < tolerance[dtype]


def test_memory_accesses_are_without_conflicts_and_gaps(simulator):
    with cuda_sim.simulated_cuda(stats=True) as running:
        run_each_operator(torch.bfloat16, 64, special=0)
        kernels = running.stats()
    assert sum(kernel["mma"] for kernel in kernels) > 0
    for kernel in kernels:
        assert kernel["shared"]["conflict_wavefronts"] <= 0.02 * kernel["shared"]["wavefronts"], kernel["name"]
    rope = next(kernel for kernel in kernels if "rope_kernel" in kernel["name"])
    assert rope["global"]["coalescing_percent"] > 99


def assert_sectors_are_used(kernels: list[dict[str, Any]], expected: dict[str, int]) -> None:
    """Of the sectors that each kernel moves, 99 % of the bytes: rows, lists of tokens, numbers beside rows."""
    # A list, because two files may each have a kernel of one name.
    used = [(kernel["name"], kernel["global"]["coalescing_percent"]) for kernel in kernels]
    for name, count in expected.items():
        assert sum(f"::{name}_kernel" in full for full, _ in used) == count, (name, used)
    assert len(used) == sum(expected.values()), used
    assert min(percent for _, percent in used) >= 99, used


@pytest.mark.parametrize("special", [4, 5])
def test_attention_uses_what_it_moves(simulator, special):
    generator, tokens, head_dim = Generator(special), 1024, 64
    q, k, v, grad = (generator.normal(1, 1, tokens, head_dim, dtype=torch.bfloat16) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    rotary = RotaryEmbedding(head_dim)(tokens, torch.arange(tokens) >= special)
    with cuda_sim.simulated_cuda(stats=True) as running:
        torch.autograd.grad(rope_attention(*leaves, rotary, cls_rope="mask"), leaves, grad)
        kernels = running.stats()
    # Forward wide and narrow, backward of keys and of queries.
    expected = {"attention_forward": 2, "attention_backward": 2, "attention_merge": 1}
    assert_sectors_are_used(kernels, expected | dict.fromkeys(("order", "pack", "stats", "finish"), 1))


def pooling_stats(dtype: torch.dtype, queries: int) -> list[dict[str, Any]]:
    generator, channels = Generator(0), 512
    x = generator.normal(2, 1024, channels, dtype=dtype).requires_grad_()
    query = generator.normal(1, queries, 1, channels, dtype=dtype).requires_grad_()
    grad = generator.normal(2, queries, 1, channels, dtype=dtype)
    with cuda_sim.simulated_cuda(stats=True) as running:
        torch.autograd.grad(late_cls_pool(x, query, scale=channels**-0.5), (x, query), grad)
        return running.stats()


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "tiles"), (torch.float32, "fma")])
def test_pooling_uses_what_it_moves(simulator, dtype, kind):
    once = (f"forward_{kind}", "merge", f"backward_{kind}", "merge_grads", "add_up")
    assert_sectors_are_used(pooling_stats(dtype, 8), {"stack_rows": 2} | dict.fromkeys(once, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("queries", [8, 20])
def test_float32_pooling_reads_tokens_once(simulator, dtype, queries):
    """A group of 8 rows reads the tokens once in each direction, dx is written once, and no access conflicts."""
    kernels = {k["name"].partition("_kernel<")[0].rpartition("::")[2]: k for k in pooling_stats(dtype, queries)}
    assert not any("simple" in name for name in kernels)
    assert sum(kernel["shared"]["conflict_wavefronts"] for kernel in kernels.values()) == 0
    tokens = 2 * 1024 * 512 * dtype.itemsize / 32  # sectors
    groups = -(-queries // 8)
    assert kernels["forward_fma"]["global"]["sectors"] < 1.35 * groups * tokens
    one_group = queries <= 8
    assert kernels["backward_fma"]["global"]["sectors"] < (2.4 if one_group else 1.5 * groups) * tokens
    assert one_group == ("token_grads_fma" not in kernels)


def test_a_report_is_the_text_of_the_exception(simulator):
    simulator.set_option("MAX_INSTRUCTIONS", "1")
    try:
        with (
            cuda_sim.simulated_cuda(),
            pytest.raises(RuntimeError, match=r"rope: CUDA error: [\s\S]*budget of the launch[\s\S]*rope_kernel"),
        ):
            apply_rope(torch.randn(1, 2, 64, 64), RotaryEmbedding(64)(64))
    finally:
        simulator.set_option("MAX_INSTRUCTIONS", "")


def test_the_kernels_of_the_cpu_are_back_afterwards(simulator):
    x, rotary = torch.randn(1, 2, 64, 64), RotaryEmbedding(64)(64)
    with cuda_sim.simulated_cuda(stats=True) as running:
        apply_rope(x, rotary)
        assert sum(kernel["launches"] for kernel in running.stats()) == 1
    simulator.set_option("STATS", str(simulator.stats_path))
    try:
        simulator.library.cudasim_reset_stats()
        apply_rope(x, rotary)
        assert simulator.stats() == []
    finally:
        simulator.set_option("STATS", "")
