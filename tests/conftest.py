"""Fixtures and settings of all tests."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from types import ModuleType

import hypothesis
import pytest
import torch
from backends import BACKENDS, running, why_not

from x_rope_cls import _C

_SETTINGS = {
    "deadline": None,
    "suppress_health_check": [
        hypothesis.HealthCheck.function_scoped_fixture,  # `isa` switches kernels once per test, which is what we want
        hypothesis.HealthCheck.too_slow,
    ],
    "print_blob": True,
}
# Small tensors gain nothing from threads, and threads that wait for each other on busy processors take ages.
torch.set_num_threads(1)

hypothesis.settings.register_profile("default", max_examples=40, derandomize=True, database=None, **_SETTINGS)
hypothesis.settings.register_profile("thorough", max_examples=800, **_SETTINGS)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every instruction set that was built and that this machine has."""
    chosen = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(chosen)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every instruction set, with the CUDA kernels simulated, and on a GPU where there is one."""
    reason = why_not(request.param)
    if reason is not None:
        pytest.skip(reason)
    with running(request.param):
        yield request.param


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test with one, two and three threads of torch's pool. All other tests have one, see below."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """The timm package, also where torchvision, which it imports, was built for another torch."""
    for _ in range(100):
        try:
            return importlib.import_module("timm")
        except RuntimeError as error:  # an operator of torchvision that its unloadable library should have defined
            missing = re.fullmatch(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(missing[1], "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    raise AssertionError("torchvision asks for ever more operators")
