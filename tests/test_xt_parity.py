"""``cls_rope="rotate"`` equals x-transformers, outputs and gradients, for every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import x_rope_cls

pytest.importorskip("x_transformers")
import xt_cases as cases
from xt_cases import one_thread  # noqa: F401  (used by every test)

# x-transformers computes the softmax in float32 unless attn_flash or attn_qk_norm is set, whatever the dtype.
# Its polar embedding goes through float32 too.
TOLERANCE = {"exact": 1e-9, "float32_inside": 1e-5, "float32_softmax": 2e-4}


def _pair(name: str, **more: Any) -> tuple[Any, Any]:
    options = cases.ALL_OPTIONS[name]
    if not cases.known_to_installed_version({**options, **more}):
        pytest.skip(f"x-transformers {cases.VERSION} does not have this option")
    dtype = torch.float32 if name in cases.FLOAT32_ONLY else torch.float64
    return cases.make_pair({**cases.BASE, **options, **more}, dtype, cls_rope="rotate")


@pytest.mark.parametrize("name", [n for n in cases.FUSED_OPTIONS if n not in cases.NO_FLASH])
def test_fused_option_equals_flash(name: str) -> None:
    torch.manual_seed(1)
    theirs, ours = _pair(name, attn_flash=True)
    assert x_rope_cls.explain(ours).fused
    inputs = cases.make_inputs(theirs)
    cases.assert_same(
        cases.run(ours, inputs), cases.run(theirs, inputs), TOLERANCE["float32_inside" if name == "polar" else "exact"]
    )


@pytest.mark.parametrize("name", cases.FUSED_OPTIONS)
def test_fused_option_equals_eager(name: str) -> None:
    torch.manual_seed(2)
    theirs, ours = _pair(name)
    assert x_rope_cls.explain(ours).fused
    inputs = cases.make_inputs(theirs)
    cases.assert_same(cases.run(ours, inputs), cases.run(theirs, inputs), TOLERANCE["float32_softmax"])


@pytest.mark.parametrize("name", cases.COMPOSITE_OPTIONS)
def test_composite_option_equals(name: str) -> None:
    torch.manual_seed(3)
    theirs, ours = _pair(name)
    composite = [row for row in x_rope_cls.explain(ours) if not row.fused]
    assert composite
    assert all(row.reason for row in composite)
    inputs = cases.make_inputs(theirs)
    cases.assert_same(cases.run(ours, inputs), cases.run(theirs, inputs), TOLERANCE["float32_softmax"])
