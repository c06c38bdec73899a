"""What holds of every accelerated network, checked in one call by the tests of each family.

def test_block():
    check_accelerated(Block(32, 64), (torch.randn(2, 32, 8, 8), torch.randn(2, 128)), runs={"preactivation_block"})
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ddpm_fast.integrations.accelerate import accelerate, is_accelerated, restore, table
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.truth import assert_close_to_truth

# Units in the last place at the scale of the truth: whole networks round in other places than the eager ones, and
# native code convolves by Winograd's method. As in `networks.assert_equal_networks`.
FLOOR = 256.0


def outputs_and_gradients(
    model: nn.Module, args: Sequence[Any], seed: int = 0, call: Callable[..., Any] | None = None
) -> dict[str, torch.Tensor]:
    """The output, and the gradient of every floating point argument and parameter, by name.

    Args:
        args: of one call; floating point tensors get gradients.
        call: takes (model, *args) and returns the output; the model's own call, and its `sample`, if None.
    """
    args = [
        a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in args
    ]
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)  # dropout
    out = model(*args) if call is None else call(model, *args)
    out = getattr(out, "sample", out)
    out = out[0] if isinstance(out, tuple) else out
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    (out * weight).sum().backward()
    found = {"output": out.detach()}
    found |= {f"argument {i}": a.grad for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.grad is not None}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found


def randomise_all(model: nn.Module, scale: float = 0.1, seed: int = 7) -> nn.Module:
    """Random numbers added to every parameter: zeros and ones hide wrong gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def check_accelerated(
    model: nn.Module,
    args: Sequence[Any],
    *,
    runs: set[str] | None = None,
    floor: float = FLOOR,
    call: Callable[..., Any] | None = None,
    double: Callable[[Any], Any] | None = None,
) -> None:
    """Hold an accelerated network to all that `accelerate` promises; the model is as it was afterwards.

    Its error against float64 is at most twice the eager network's, in output and every gradient; its state dict and
    its parameters are the same objects; a deep copy is accelerated and computes the same; under
    `use_backend("reference")` and after `restore` it gives the eager network's bits.

    Args:
        args: of one call.
        runs: the ops that have to run, of `explain`'s table.
        call: see `outputs_and_gradients`.
        double: an argument in float64; floating point tensors in float64 and others as they are, if None.
    """
    double = double or (lambda a: a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a)
    randomise_all(model)
    truth = outputs_and_gradients(copy.deepcopy(model).double(), [double(a) for a in args], call=call)
    eager = outputs_and_gradients(model, args, call=call)
    classes = {name: type(module) for name, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}

    assert accelerate(model) is model
    found = {line.runs for line in table(model) if line.runs is not None}
    assert found and (runs is None or runs <= found), f"runs {sorted(found)}: {table(model)}"
    for name, module in model.named_modules():
        assert isinstance(module, classes[name]) and type(module).__name__ == classes[name].__name__
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    after = model.state_dict()
    assert_same_bits(dict(after), before)
    assert [value.stride() for value in after.values()] == [value.stride() for value in before.values()]

    fused = outputs_and_gradients(model, args, call=call)
    assert fused.keys() == eager.keys() <= truth.keys()
    for name, value in fused.items():
        assert_close_to_truth(value, eager[name], truth[name], floor=floor, name=name)
    assert any(not torch.equal(fused[name], eager[name]) for name in fused), "no fused forward ran"

    copied = outputs_and_gradients(copy.deepcopy(model), args, call=call)
    assert_same_bits(copied, fused)
    with use_backend("reference"):
        assert_same_bits(outputs_and_gradients(model, args, call=call), eager)

    assert restore(model) is model
    assert not any(is_accelerated(module) for module in model.modules())
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert_same_bits(outputs_and_gradients(model, args, call=call), eager)
    assert_same_bits(dict(model.state_dict()), before)


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Two dicts of tensors have the same keys and bits."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), f"{name} differs"
