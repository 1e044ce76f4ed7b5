"""Where the operators can be called."""

from __future__ import annotations

import torch
from torch import Tensor


def _fused_device_types() -> frozenset[str]:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    found = [device for device, key in keys.items() if has_kernel("x_rope_cls::rope_attention", key)]
    return frozenset([*found, "meta"])


FUSED_DEVICE_TYPES = _fused_device_types()


def takes_operators(t: Tensor) -> bool:
    """There is a kernel for the device, and no torch.func transform, which the operators do not go through."""
    return t.device.type in FUSED_DEVICE_TYPES and not torch._C._are_functorch_transforms_active()
