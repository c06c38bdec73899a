"""Shared by the tests of linear_attention: cases, and the comparison of one implementation with the reference."""

from __future__ import annotations

import torch

from ddpm_fast.ops.linear_attention.op import linear_attention
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.truth import assert_close_to_truth, poisoned_memory

LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
MAPS = ("qkv", "residual")

# B, heads, D, C, M, H, W
SMALL = (2, 2, 8, 24, 3, 3, 4)


def make(shape, layout: str = "nhwc", device="cpu", residual: bool = True, seed: int = 0) -> tuple[dict, dict]:
    """Random float32 tensors that take a gradient, and the other arguments."""
    B, heads, D, C, M, H, W = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    tensors = {
        "qkv": 2 * normal(B, 3 * heads * D, H, W),
        "mem_kv": normal(2, heads, D, M),
        "weight": normal(C, heads * D, 1, 1) / (heads * D) ** 0.5,
        "bias": 0.5 * normal(C),
        "gain": 1 + 0.3 * normal(1, C, 1, 1),
    }
    if residual:
        tensors["residual"] = normal(B, C, H, W)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    for name in set(MAPS) & set(tensors):
        tensors[name] = tensors[name].contiguous(memory_format=LAYOUTS[layout])
    return tensors, {"heads": heads}


def run(backend: str, tensors: dict, others: dict, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The output and the gradient of every tensor, with poisoned memory: what is not written is NaN.

    `scale` is the largest element of the output's gradient.
    """
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with poisoned_memory():
        with use_backend(backend):
            out = linear_attention(**leaves, **others)
        grad = torch.linspace(-scale, scale, out.numel(), device=out.device)
        out.backward(grad.reshape(out.shape).to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def assert_as_accurate_as_the_reference(tensors: dict, others: dict, scale: float = 1.0) -> None:
    """Triton against the reference in float64, output and every gradient, by the suite's rule of tolerance."""
    actual = run("triton", tensors, others, scale)
    expected = run("reference", tensors, others, scale)
    truth = run("reference", {name: tensor.double() for name, tensor in tensors.items()}, others, scale)
    assert actual["out"].stride() == expected["out"].stride() and actual["dqkv"].stride() == tensors["qkv"].stride()
    for name in truth:
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name)
