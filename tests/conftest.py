"""Fixtures and settings of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from x_rope_cls import _C

_SETTINGS = {
    "deadline": None,
    "suppress_health_check": [
        hypothesis.HealthCheck.function_scoped_fixture,  # `isa` switches kernels once per test, which is what we want
        hypothesis.HealthCheck.too_slow,
    ],
    "print_blob": True,
}
hypothesis.settings.register_profile("default", max_examples=40, derandomize=True, database=None, **_SETTINGS)
hypothesis.settings.register_profile("thorough", max_examples=2000, **_SETTINGS)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every instruction set that was built and that this machine has."""
    chosen = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(chosen)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _stub_torchvision() -> None:
    """Lets torchvision, which timm imports, load beside a torch that its compiled operators were not built for."""
    try:
        import torchvision
    except ImportError:
        return
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_torchvision_library"] = library  # lives as long as the operator is needed
        import torchvision  # noqa: F401


_stub_torchvision()
