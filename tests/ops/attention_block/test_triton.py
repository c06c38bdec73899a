"""The attention block with GroupNorm with Triton's kernels against the reference in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see ../conftest.py.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.ops.attention_block.op import group_norm_attention_block
from ddpm_fast.ops.norm_silu import operators as norm_silu
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import use_backend, watch_choices
from ddpm_fast.testing.attention_block_cases import make, run
from ddpm_fast.testing.truth import assert_close_to_truth, exact_convolutions

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"


@pytest.mark.arithmetic
@pytest.mark.parametrize(
    "options",
    [{"groups": 4}, {"groups": 2, "biases": False}, {"groups": 4, "residual": False, "output_scale": 0.5}, {}],
    ids=str,
)
def test_equals_the_reference(options):
    tensors, options = make((2, 2, 8, 16, 3, 5), **options)
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    with exact_convolutions():
        with watch_choices() as choices:
            actual = run(group_norm_attention_block, tensors, options)
        with use_backend("reference"):
            expected = run(group_norm_attention_block, tensors, options)
            truth = run(group_norm_attention_block, {name: t.double() for name, t in tensors.items()}, options)
    ran = {(op, implementation) for op, implementation, _ in choices}
    assert ("group_norm_silu", "triton") in ran or not options["groups"]
    for name, value in truth.items():
        assert_close_to_truth(actual[name], expected[name], value, name=name, floor=16)


def test_one_pass_adds_the_gradient_of_the_residual(monkeypatch):
    """The norm's kernel adds it to its own."""
    made = []
    gradients_of = norm_silu.gradients_beside.triton
    monkeypatch.setattr(
        norm_silu.gradients_beside, "triton", lambda *given: made.append(given[-1]) or gradients_of(*given)
    )
    tensors, options = make((2, 2, 8, 16, 3, 5), groups=4)
    run(group_norm_attention_block, {name: tensor.to(DEVICE) for name, tensor in tensors.items()}, options)
    assert made == [False]  # without SiLU


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    tensors, options = make((2, 2, 8, 16, 3, 5), groups=4)
    tensors = {name: tensor.to(DEVICE, dtype) for name, tensor in tensors.items()}
    actual = run(group_norm_attention_block, tensors, options)
    expected = run(group_norm_attention_block, {name: tensor.float() for name, tensor in tensors.items()}, options)
    for name, value in actual.items():
        assert value.dtype == dtype
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(value.float(), expected[name], rtol=0.05, atol=0.05 * scale, msg=name)
