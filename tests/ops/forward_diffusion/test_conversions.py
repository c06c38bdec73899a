"""Half, bfloat16 and bytes in native tiles: the bits that torch gives, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.runtime import extension
from ddpm_fast.testing.native_cases import instruction_sets, instructions

pytestmark = pytest.mark.skipif(extension.load() is None, reason=f"no extension: {extension.reason()}")

ONE = torch.ones(1)


@pytest.fixture(autouse=True, params=instruction_sets())
def each_instruction_set(request):
    with instructions(request.param):
        yield


def q_sample(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x itself as another type: a = 1, b = 0, no noise."""
    time, table = torch.zeros(1, dtype=torch.long), torch.tensor([[1.0, 0.0]])
    arguments = (time, table, torch.zeros_like(x, dtype=torch.float32), None, None, False, 0.0, dtype, False)
    return torch.ops.ddpm_fast.native_q_sample(x, *arguments)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    number = ~expected.isnan()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[number], expected[number])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_of_a_half_type_there_and_back(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[None]
    assert_same_bits(q_sample(every, torch.float32), every.float())
    back = torch.ops.ddpm_fast.native_diffusion_loss_backward(every, ONE, ONE)
    assert_same_bits(back, every)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_is_rounded_to_nearest_even(dtype):
    """Between, next to and at ties of neighbouring values, and beyond the largest."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    finite = every[every.isfinite()].sort().values
    between = (finite[1:] + finite[:-1]) / 2
    nearby = [torch.nextafter(between, torch.full_like(between, to)) for to in (-float("inf"), float("inf"))]
    beyond = torch.tensor([65519.0, 65520.0, 3.4028e38, float("inf"), -float("inf"), float("nan"), 1e-45, -0.0])
    x = torch.cat([finite, between, *nearby, beyond])[None]
    assert_same_bits(q_sample(x, dtype), x.to(dtype))


def test_bytes_are_divided_by_255():
    every = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(q_sample(every, torch.float32), every.float() / 255)
