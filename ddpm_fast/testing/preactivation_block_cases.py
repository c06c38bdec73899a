"""Shared by the tests of preactivation_block: cases, and the comparison of one implementation with the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ddpm_fast.ops.preactivation_block import reference
from ddpm_fast.ops.preactivation_block.op import preactivation_block
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.truth import errors, poisoned_memory

# Sums over pixels that nearly cancel; Winograd's rounding errors are the same in every tile.
_OF_SUMS = ("bias1", "bias2", "embedding", "res_bias", "gain1", "gain2", "offset1", "offset2", "scale", "shift")


def make(
    B: int, C: int, skip: int, K: int, H: int, W: int, groups1: int = 2, groups2: int = 2, *,
    window: int | None = None, embedding: bool = True, scaled: bool = False, biases: bool = True,
    device: str = "cpu", dtype: torch.dtype = torch.float32, **others: Any,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:  # fmt: skip
    """Random tensors, and the other arguments.

    Args:
        window: of the residual's convolution; by default 1, or none where nothing needs one.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = C + skip
    window = (1 if skip or C != K else 0) if window is None else window

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    def weight(out: int, inputs: int, side: int) -> torch.Tensor:
        return normal(out, inputs, side, side) / (inputs * side * side) ** 0.5

    tensors = {
        "x": 2 * normal(B, C, H, W) + 0.5,
        "weight1": weight(K, inputs, 3),
        "gain1": 1 + 0.3 * normal(inputs),
        "offset1": normal(inputs),
        "weight2": weight(K, K, 3),
        "gain2": 1 + 0.3 * normal(K),
        "offset2": normal(K),
    }
    if biases:
        tensors |= {"bias1": normal(K), "bias2": normal(K)}
    if skip:
        tensors["skip"] = normal(B, skip, H, W)
    if embedding:
        tensors["embedding"] = normal(B, K)
    if scaled:
        tensors |= {"scale": normal(B, K), "shift": normal(B, K)}
    if window:
        tensors["res_weight"] = weight(K, inputs, window)
        if biases:
            tensors["res_bias"] = normal(K)
    tensors = {name: tensor.to(dtype).to(device) for name, tensor in tensors.items()}
    for name in ("x", "skip"):
        if name in tensors:
            tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    others |= {"groups1": groups1, "groups2": groups2}
    if others.get("dropout_p"):
        others["seed"] = torch.tensor([0x1234_5678_9ABC], device=device)
    return tensors, others


def run(
    function: Callable[..., torch.Tensor], tensors: dict[str, torch.Tensor], others: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The output and the gradient of every tensor, with poisoned memory: what is not written is NaN."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with poisoned_memory():
        out = function(**{"bias1": None, "bias2": None, **leaves}, **others)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype).to(out.device)
        gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


def assert_as_accurate_as_the_reference(
    tensors: dict[str, torch.Tensor], others: dict[str, Any], backend: str | None = None
) -> None:
    """Relative RMS error at most twice the reference's in the same dtype, and some units in the last place.

    The block is a chain: what one step rounds the next ones pass on, so errors are a share of a tensor.
    """
    with use_backend(backend):
        actual = run(preactivation_block, tensors, others)
    expected = run(reference.preactivation_block, tensors, others)
    truth = run(reference.preactivation_block, {name: t.double() for name, t in tensors.items()}, others)
    for name in truth:
        assert actual[name].shape == truth[name].shape and actual[name].dtype == expected[name].dtype, name
        (ours, _), (theirs, _) = errors(actual[name], truth[name]), errors(expected[name], truth[name])
        scale = truth[name].pow(2).mean().sqrt().item()
        bound = 2 * theirs + (64 if name in _OF_SUMS else 16) * torch.finfo(torch.float32).eps * scale
        assert ours <= bound, f"{name}: RMS error {ours:.3e} > {bound:.3e} (reference {theirs:.3e})"
