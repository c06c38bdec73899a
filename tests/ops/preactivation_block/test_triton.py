"""The pre-activation block with Triton's kernels, which its norms run, against the reference in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see ../conftest.py.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.ops.preactivation_block.op import preactivation_block
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import watch_choices
from ddpm_fast.testing.preactivation_block_cases import assert_as_accurate_as_the_reference, make
from ddpm_fast.testing.truth import exact_convolutions

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"


@pytest.mark.arithmetic
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"biases": False},
        {"embedding": False, "scaled": True, "dropout_p": 0.25},
        {"resample": "up", "output_scale": 0.5},
        {"resample": "down"},
        {"resample": "down", "window": 3},
    ],
    ids=str,
)
def test_equals_the_reference(options):
    with exact_convolutions():
        assert_as_accurate_as_the_reference(*make(3, 10, 6, 12, 4, 6, device=DEVICE, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    tensors, others = make(2, 10, 6, 12, 4, 6, device=DEVICE, dtype=dtype)
    with watch_choices() as choices:
        out = preactivation_block(**tensors, **others)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    for name in ("group_norm_silu", "linear_residual"):
        assert {implementation for op, implementation, _ in choices if op == name} == {"triton"}
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    torch.testing.assert_close(out.float(), preactivation_block(**wide, **others), rtol=0.03, atol=0.03)
