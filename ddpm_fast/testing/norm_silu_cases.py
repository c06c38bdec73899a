"""Shared by the tests of norm_silu: cases, and the comparison of one implementation with the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ddpm_fast.ops.norm_silu.op import group_norm_silu, rms_norm_silu
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.truth import assert_close_to_truth, poisoned_memory

NORMS: dict[str, Callable[..., torch.Tensor]] = {"rms": rms_norm_silu, "group": group_norm_silu}
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}

# B, C, H, W, G
SHAPES = [
    (1, 3, 1, 1, 3),
    (5, 3, 1, 7, 1),
    (1, 3, 33, 31, 1),
    (3, 24, 1, 7, 4),
    (1, 24, 33, 31, 8),
    (3, 192, 2, 2, 8),
    (1, 192, 7, 1, 1),
    (1, 513, 1, 1, 9),
    (1, 513, 1, 7, 27),
    (2, 32, 40, 40, 4),
    (2, 32, 3, 7, 8),
]

ALL = ("bias", "scale", "shift", "residual")
OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": ((), {}),
    "no activation": ((), {"activation": False}),
    "bias": (("bias",), {}),
    "scale": (("scale",), {}),
    "shift": (("shift",), {}),
    "residual": (("residual",), {}),
    "dropout": ((), {"dropout_p": 0.25}),
    "everything dropped": (("residual",), {"dropout_p": 1.0}),
    "all but the activation": (ALL, {"activation": False, "dropout_p": 0.5}),
    "all": (ALL, {"dropout_p": 0.1}),
}


def make(norm: str, shape, option: str, layout: str, device="cpu", seed=0) -> tuple[dict, dict]:
    """Random float32 tensors that take a gradient, and the other arguments."""
    B, C, H, W, G = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    names, numbers = OPTIONS[option]
    tensors = {"x": 2 * normal(B, C, H, W) + 0.5, "gain": 1 + 0.3 * normal(C)}
    candidates = {"bias": normal(C), "scale": normal(B, C), "shift": normal(B, C), "residual": normal(B, C, H, W)}
    tensors |= {name: candidates[name] for name in names}
    others = dict(numbers)
    if "dropout_p" in others:
        others["seed"] = torch.tensor([0x1234_5678_9ABC], device=device)
    if norm == "rms":
        tensors["gain"] = tensors["gain"].reshape(1, C, 1, 1)
    else:
        tensors["offset"] = normal(C)
        others["groups"] = G
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    for name in ("x", "residual"):
        if name in tensors:
            tensors[name] = tensors[name].contiguous(memory_format=LAYOUTS[layout])
    return tensors, others


def run(norm: str, backend: str, tensors: dict, others: dict) -> dict[str, torch.Tensor]:
    """The output and the gradient of every tensor, with poisoned memory: what is not written is NaN."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with poisoned_memory():
        with use_backend(backend):
            out = NORMS[norm](**leaves, **others)
        out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


# Gradients that are sums over pixels: the interpreter's numpy adds a tile's pixels one after another, torch in pairs.
SUMS = ("dgain", "doffset", "dbias", "dscale", "dshift")


def assert_as_accurate_as_the_reference(norm: str, tensors: dict, others: dict) -> None:
    """Triton against the reference in float64, output and every gradient, by the suite's rule of tolerance."""
    actual = run(norm, "triton", tensors, others)
    expected = run(norm, "reference", tensors, others)
    truth = run(norm, "reference", {name: tensor.double() for name, tensor in tensors.items()}, others)
    assert actual["out"].stride() == actual["dx"].stride() == tensors["x"].stride()
    for name in truth:
        floor = 16 if name in SUMS else 4
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name, floor=floor)
