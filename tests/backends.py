"""Everything that operators called with CPU tensors can run on here, as one list of names.

- an instruction set of the CPU;
- "cuda-simulated": the CUDA kernels in the simulator, see cuda_sim.py;
- "cuda": the CUDA kernels on a GPU, to which arguments are copied with their strides and alignment.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import cuda_sim
import torch
from torch import Tensor

from x_rope_cls import _C

SIMULATED, GPU = "cuda-simulated", "cuda"
BACKENDS = (*_C.cpu_isas(), SIMULATED, GPU)


@functools.cache
def why_not(name: str) -> str | None:
    """Why the named backend cannot run here, or None."""
    if name == SIMULATED:
        return cuda_sim.missing()
    if name == GPU and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    if name == GPU and not torch._C._dispatch_has_kernel_for_dispatch_key("x_rope_cls::rope", "CUDA"):
        return f"built without CUDA: {_C.build_info()['cuda_reason']}"
    return None


@contextlib.contextmanager
def running(name: str) -> Iterator[None]:
    """Operators called with CPU tensors run on the named backend."""
    chosen = _C.cpu_isa()
    try:
        if name == SIMULATED:
            with cuda_sim.simulated_cuda():
                yield
        elif name == GPU:
            with cuda_sim.cpu_kernels({op: _on_gpu(getattr(torch.ops.x_rope_cls, op)) for op in cuda_sim.OPERATORS}):
                yield
        else:
            _C.set_cpu_isa(name)
            yield
    finally:
        _C.set_cpu_isa(chosen)


def each_backend(work: float = 0.0) -> Iterator[str]:
    """Switches to every backend in turn; for tests whose reference is dear, in place of the fixture `backend`.

    Args:
        work: multiplications in the call. Cases above five million are left out of the simulation, which would take
            seconds.
    """
    for name in BACKENDS:
        if why_not(name) is None and not (name == SIMULATED and work > 5e6):
            with running(name):
                yield name


def _on_gpu(operator: Any) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        results = operator(*(moved(a, "cuda") if isinstance(a, Tensor) else a for a in arguments))
        return results.cpu() if isinstance(results, Tensor) else tuple(r.cpu() for r in results)

    return kernel


def moved(t: Tensor, device: str) -> Tensor:
    """A copy with the same strides, expanded axes and gaps included, and the same place between two 16-byte borders."""
    if t.numel() == 0:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    offset = t.data_ptr() % 16 // t.element_size()
    memory = torch.empty(offset + extent, dtype=t.dtype, device=device)
    memory[offset:] = t.detach().as_strided((extent,), (1,)).to(device)
    return memory.as_strided(t.shape, t.stride(), offset)
