"""One tolerance rule for the whole suite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def errors(actual: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """RMS and largest absolute error against a float64 truth."""
    if truth.numel() == 0:
        return 0.0, 0.0
    difference = actual.detach().double() - truth.detach().double()
    return difference.pow(2).mean().sqrt().item(), difference.abs().max().item()


def assert_close_to_truth(
    actual: torch.Tensor,
    reference: torch.Tensor,
    truth: torch.Tensor,
    *,
    factor: float = 2.0,
    floor: float = 4.0,
    name: str = "",
    scale: torch.Tensor | None = None,
) -> None:
    """Hold `actual` to the accuracy of plain PyTorch in the same dtype.

    The error against the float64 truth is at most `factor` times that of the reference in the same dtype, plus a floor
    of `floor` units in the last place at the scale of the truth, or of `scale`: for sums that cancel, of their terms'
    magnitudes (tests/ops/resnet_block/test_native.py). For the RMS and for the largest element alike.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)} is not {tuple(truth.shape)}"
    assert actual.dtype == reference.dtype, f"{name}: dtype {actual.dtype} is not {reference.dtype}"
    assert truth.dtype == torch.float64, f"{name}: the truth must be float64"
    assert torch.isfinite(truth).all(), f"{name}: the truth is not finite"
    if truth.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    scale = truth if scale is None else scale
    scale_rms = scale.pow(2).mean().sqrt().item()
    scale_max = scale.abs().max().item()
    (rms, largest), (reference_rms, reference_largest) = errors(actual, truth), errors(reference, truth)
    for kind, ours, theirs, unit in (
        ("RMS", rms, reference_rms, scale_rms),
        ("largest", largest, reference_largest, scale_max),
    ):
        bound = factor * theirs + floor * eps * unit
        assert ours <= bound, f"{name}: {kind} error {ours:.3e} > {bound:.3e} (reference {theirs:.3e}, {actual.dtype})"


Draws = list[dict[str, torch.Tensor]]


def assert_draws_close_to_truth(actual: Draws, reference: Draws, truth: Draws) -> None:
    """`assert_close_to_truth` of tensors by name over several draws of weights, in one of which the rounding of half
    precision may favour either side."""
    for name in truth[0]:
        drawn = (torch.stack([draw[name] for draw in side]) for side in (actual, reference, truth))
        assert_close_to_truth(*drawn, name=name)


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions of float32, torch's and this package's, with all their digits: no TF32, where a GPU would use it."""
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    was = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = was


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, new memory is filled with NaN, so that what a kernel does not write is seen."""
    earlier = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(earlier)
