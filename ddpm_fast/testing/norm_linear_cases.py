"""Shared by the tests of norm_linear: cases, and the comparison of one implementation with the reference."""

from __future__ import annotations

from typing import Any

import torch

from ddpm_fast.ops.norm_linear.op import norm_linear
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.truth import assert_close_to_truth, poisoned_memory

LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}

# B, C, H, W, K
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 1, 7, 5),
    (5, 24, 1, 1, 40),
    (1, 70, 9, 9, 100),
    (3, 8, 16, 17, 24),
    (2, 64, 12, 11, 72),
    (1, 130, 3, 5, 16),
]


def make(shape, layout: str, device="cpu") -> dict[str, torch.Tensor]:
    """Random float32 tensors that take a gradient."""
    B, C, H, W, K = shape
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(B, C, H, W, generator=generator) + 0.5
    gain = 1 + 0.3 * torch.randn(1, C, 1, 1, generator=generator)
    weight = torch.randn(K, C, 1, 1, generator=generator)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    return {"x": x.to(device), "gain": gain.to(device), "weight": weight.to(device)}


def run(backend: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The output and the gradient of every tensor, with poisoned memory: what is not written is NaN."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with poisoned_memory():
        with use_backend(backend):
            out = norm_linear(**leaves)
        out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


# Sums over pixels: the interpreter's numpy adds a tile's pixels one after another, torch in pairs.
SUMS = ("dgain", "dweight")


def assert_as_accurate_as_the_reference(tensors: dict[str, torch.Tensor]) -> None:
    """Triton against the reference in float64, output and every gradient, by the suite's rule of tolerance."""
    actual, expected = run("triton", tensors), run("reference", tensors)
    truth = run("reference", {name: tensor.double() for name, tensor in tensors.items()})
    assert actual["dx"].stride() == tensors["x"].stride()
    for memory_format in LAYOUTS.values():
        if tensors["x"].is_contiguous(memory_format=memory_format):
            assert actual["out"].is_contiguous(memory_format=memory_format) or 1 in tensors["x"].shape[1:]
    for name in truth:
        floor = 16 if name in SUMS else 4
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name, floor=floor)
