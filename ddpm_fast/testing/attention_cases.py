"""Shared by the tests of attention: cases, and the comparison of one implementation with the reference."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from ddpm_fast.ops.attention.op import attention
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.truth import assert_close_to_truth, poisoned_memory

LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}

# B, heads, D, h, w, M
SMALL = (1, 2, 16, 3, 5, 4)
SHAPES = [
    (2, 2, 8, 1, 1, 4),
    (2, 2, 16, 7, 7, 1),
    (1, 1, 32, 8, 8, 4),
    (1, 2, 40, 5, 13, 17),
    (1, 1, 16, 21, 25, 70),
    (1, 1, 8, 1, 1, 0),
    (2, 1, 32, 7, 9, 0),
    (1, 1, 64, 5, 13, 4),
    (1, 1, 96, 3, 11, 3),
    (1, 1, 128, 4, 8, 5),
    (1, 2, 32, 16, 16, 4),
]


def make(shape, layout: str, device="cpu", dtype=torch.float32, seed=0) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Random qkv and mem_kv, and the number of heads."""
    B, heads, D, h, w, M = shape
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, 3 * heads * D, h, w, generator=generator).to(device, dtype)
    mem_kv = torch.randn(2, heads, M, D, generator=generator).to(device)
    return qkv.contiguous(memory_format=LAYOUTS[layout]), mem_kv, heads


def weights_like(out: torch.Tensor) -> torch.Tensor:
    """Weights from -1 to 1 for a sum over the output: every element has another weight in the gradients."""
    return torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)


def run(backend: str | None, qkv: torch.Tensor, mem_kv: torch.Tensor, heads: int) -> dict[str, Any]:
    """The output and every gradient, with poisoned memory: what is not written is NaN."""
    qkv, mem_kv = (tensor.detach().clone().requires_grad_() for tensor in (qkv, mem_kv))
    with poisoned_memory():
        with use_backend(backend):
            out = attention(qkv, mem_kv, heads=heads)
        out.backward(weights_like(out))
    return {"out": out.detach(), "dqkv": qkv.grad, "dmem_kv": mem_kv.grad}


def assert_as_accurate_as_the_reference(
    backend: str, qkv: torch.Tensor, mem_kv: torch.Tensor, heads: int, reference: str = "reference"
) -> None:
    """An implementation against the reference in float64, output and every gradient, by the suite's tolerance.

    `reference` names the implementation in the same dtype whose error, times two, is the limit.
    """
    actual = run(backend, qkv, mem_kv, heads)
    expected = run(reference, qkv, mem_kv, heads)
    truth = run("reference", qkv.double(), mem_kv.double(), heads)
    for name, layout in product(("out", "dqkv"), LAYOUTS.values()):
        assert actual[name].is_contiguous(memory_format=layout) == qkv.is_contiguous(memory_format=layout), name
    for name in truth:
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name)
