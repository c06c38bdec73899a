"""Shared by the tests of linear_attention_block: cases, and runs of one implementation."""

from __future__ import annotations

import torch

from ddpm_fast.ops.linear_attention_block.op import linear_attention_block
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.truth import assert_close_to_truth, poisoned_memory

# B, heads, D, C, M, H, W
SMALL = (2, 2, 8, 24, 3, 3, 4)


def make(shape, dtype: torch.dtype = torch.float32, device="cpu", seed: int = 0) -> tuple[dict, dict]:
    """x in `dtype` and channels-last, parameters in float32, and the other arguments."""
    B, heads, D, C, M, H, W = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    tensors = {
        "x": normal(B, C, H, W).to(dtype).contiguous(memory_format=torch.channels_last),
        "gain_in": 1 + 0.3 * normal(1, C, 1, 1),
        "weight_qkv": 2 * normal(3 * heads * D, C, 1, 1) / C**0.5,
        "mem_kv": normal(2, heads, D, M),
        "weight": normal(C, heads * D, 1, 1) / (heads * D) ** 0.5,
        "bias": 0.5 * normal(C),
        "gain": 1 + 0.3 * normal(1, C, 1, 1),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}, {"heads": heads}


def with_residual(tensors: dict, kind: str) -> dict:
    """Tensors with a residual of the kind: "none", "x" (x itself) or "other"."""
    x = tensors["x"]
    return tensors | {"none": {}, "x": {}, "other": {"residual": 0.5 * x.flip(0).flip(2)}}[kind]


def kernels(x, gain_in, weight_qkv, mem_kv, weight, bias, gain, *, heads: int, residual=None) -> torch.Tensor:
    """The block by Triton's operator, float32 included, which the block leaves to its steps."""
    adds_x = residual is x
    arguments = (x, gain_in, weight_qkv, mem_kv, weight, bias, gain, None if adds_x else residual, heads, adds_x)
    return torch.ops.ddpm_fast.linear_attention_block(*arguments)[0]


def run(function, tensors: dict, others: dict, kind: str = "none", scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The output and the gradient of every tensor, with poisoned memory: what is not written is NaN."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    residual = {"residual": leaves["x"]} if kind == "x" else {}
    with poisoned_memory():
        out = function(**leaves, **residual, **others)
        grad = torch.linspace(-scale, scale, out.numel(), device=out.device)
        out.backward(grad.reshape(out.shape).to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def reference(**arguments) -> torch.Tensor:
    with use_backend("reference"):
        return linear_attention_block(**arguments)


def assert_as_accurate_as_the_reference(
    tensors: dict, others: dict, kind: str = "none", scale: float = 1.0, function=kernels
) -> None:
    """The kernels against the reference in float64, output and every gradient, by the suite's rule of tolerance."""
    tensors = with_residual(tensors, kind)
    actual = run(function, tensors, others, kind, scale)
    expected = run(reference, tensors, others, kind, scale)
    truth = run(reference, {name: tensor.double() for name, tensor in tensors.items()}, others, kind, scale)
    assert actual["out"].is_contiguous(memory_format=torch.channels_last)  # whatever the strides of one sample are
    assert expected["out"].is_contiguous(memory_format=torch.channels_last)
    assert actual["dx"].stride() == tensors["x"].stride()
    for name in truth:
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name)
