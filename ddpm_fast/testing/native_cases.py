"""Shared by the tests of native operators: instruction sets, gradients of everything, comparison with the truth."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ddpm_fast.runtime import extension
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.truth import assert_close_to_truth, poisoned_memory

CHANNELS_LAST = torch.channels_last
PAIRS = "avx512_bf16"  # avx512 with products of bfloat16, and otherwise the same functions
GRADS = {
    "channels-last": lambda grad: grad.contiguous(memory_format=CHANNELS_LAST),
    "contiguous": lambda grad: grad.contiguous(),
    "expanded": lambda grad: grad[:1, :1].expand_as(grad),
}


def instruction_sets(names: tuple[str, ...] = ("avx512", "avx2", "portable")) -> list[str]:
    """Those that this build and processor have."""
    module = extension.load()
    found: list[str] = []
    if module is None:
        return found
    before = module.instruction_set()
    for name in names:
        with contextlib.suppress(ValueError):
            module.use_instruction_set(name)
            found.append(name)
    module.use_instruction_set(before)
    return found


@contextlib.contextmanager
def instructions(name: str) -> Iterator[None]:
    module = extension.load()
    assert module is not None, extension.reason()
    before = module.use_instruction_set(name)
    try:
        yield
    finally:
        module.use_instruction_set(before)


def without_pairs() -> contextlib.AbstractContextManager:
    """Without products of bfloat16, where this processor has them: a half map then is its float32 copy, rounded."""
    has_pairs = extension.load() is not None and extension.instruction_set() == PAIRS
    return instructions("avx512") if has_pairs else contextlib.nullcontext()


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(op, backend: str | None, tensors: dict, options: dict, grad=GRADS["channels-last"]) -> dict[str, torch.Tensor]:
    """The output and the gradient of every tensor, with poisoned memory: what is not written is NaN."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    with poisoned_memory():
        with use_backend(backend):
            out = op(**leaves, **options)
        weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
        gradients = torch.autograd.grad(out, list(leaves.values()), grad(weights))
    return {"out": out.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def assert_as_accurate_as_the_reference(
    op, tensors: dict, options: dict, grad=GRADS["channels-last"], least: float = 0.0, **tolerance
) -> None:
    """Native against the reference in float64, output and every gradient.

    Tensors whose truth is all below `least` are held to the accuracy of one that reaches it.
    """
    actual = run(op, "native", tensors, options, grad)
    expected = run(op, "reference", tensors, options, grad)
    truth = run(op, "reference", {name: tensor.double() for name, tensor in tensors.items()}, options, grad)
    for name in truth:
        if truth[name].numel() and truth[name].abs().max() < least:
            error = (actual[name].double() - truth[name]).abs().max().item()
            bound = tolerance["factor"] * (expected[name].double() - truth[name]).abs().max().item()
            assert error <= bound + tolerance["floor"] * torch.finfo(actual[name].dtype).eps * least, (name, error)
            continue
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name, **tolerance)


def assert_equal(actual: dict, expected: dict) -> None:
    """Bit by bit."""
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
