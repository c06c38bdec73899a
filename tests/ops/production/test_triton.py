"""The kernels at the shapes of Unet(64, (1, 2, 4, 8)) on images of 128 × 128, in float32 and as under autocast.

They run first, and the float64 truth is computed on the device. In the interpreter the channels are the same and the
maps small.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.runtime import triton_launch
from ddpm_fast.testing import attention_cases, linear_attention_cases, norm_linear_cases, norm_silu_cases
from ddpm_fast.testing.truth import exact_convolutions

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"
BATCH = 1 if triton_launch.interpreted() else 4
# Channels and side of each stage's maps.
STAGES = {64: 128, 128: 64, 256: 32, 512: 16}
HEADS, HEAD_CHANNELS, MEMORY = 4, 32, 4

pytestmark = [pytest.mark.production]

# In float32 the interpreter runs one stage: production's tiles are those of a GPU, and small shapes are tested apart.
one_stage_of_float32 = pytest.mark.release(but=lambda channels, dtype, **_: dtype != torch.float32 or channels == 64)
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
stages = pytest.mark.parametrize("channels", STAGES)


@pytest.fixture(autouse=True)
def exact_products():
    with exact_convolutions():
        yield


def side_of(channels: int) -> int:
    return min(STAGES[channels], 4) if triton_launch.interpreted() else STAGES[channels]


def round_maps(tensors: dict, names: tuple[str, ...], dtype: torch.dtype) -> dict:
    """Maps in `dtype`, parameters in float32."""
    return {name: tensor.to(dtype) if name in names else tensor for name, tensor in tensors.items()}


@one_stage_of_float32
@both_dtypes
@stages
@pytest.mark.parametrize("norm, option", [("rms", "all"), ("rms", "plain"), ("group", "all")])
def test_norm_silu(norm, option, channels, dtype):
    shape = (BATCH, channels, side_of(channels), side_of(channels), 8)
    tensors, others = norm_silu_cases.make(norm, shape, option, "nhwc", DEVICE)
    tensors = round_maps(tensors, ("x", "scale", "shift", "residual"), dtype)
    norm_silu_cases.assert_as_accurate_as_the_reference(norm, tensors, others)


@one_stage_of_float32
@both_dtypes
@stages
def test_norm_linear(channels, dtype):
    shape = (BATCH, channels, side_of(channels), side_of(channels), 3 * HEADS * HEAD_CHANNELS)
    tensors = round_maps(norm_linear_cases.make(shape, "nhwc", DEVICE), ("x",), dtype)
    norm_linear_cases.assert_as_accurate_as_the_reference(tensors)


@one_stage_of_float32
@both_dtypes
@pytest.mark.parametrize("channels", [64, 128, 256])
def test_linear_attention(channels, dtype):
    shape = (BATCH, HEADS, HEAD_CHANNELS, channels, MEMORY, side_of(channels), side_of(channels))
    tensors, others = linear_attention_cases.make(shape, device=DEVICE)
    tensors = round_maps(tensors, linear_attention_cases.MAPS, dtype)
    linear_attention_cases.assert_as_accurate_as_the_reference(tensors, others)


@both_dtypes
def test_attention(dtype):
    shape = (BATCH, HEADS, HEAD_CHANNELS, side_of(512), side_of(512), MEMORY)
    inputs = attention_cases.make(shape, "nhwc", DEVICE, dtype)
    attention_cases.assert_as_accurate_as_the_reference("triton", *inputs)
