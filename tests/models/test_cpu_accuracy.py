"""A whole network in float32 on the CPU against eager upstream's accuracy: output and every gradient, tensor by tensor.

The truth is upstream in float64 with the same weights. An error is ‖a − truth‖ / ‖truth‖, its root mean square over a
few draws of weights and inputs, since in one draw either side may be lucky. Every instruction set of this processor is
held to upstream: output, gradients together and the gradient of the input to twice its error (measured on AVX2: 0.5 to
0.6, 0.9 to 1.1 and 1.0 to 1.1 times), each single tensor to five times (at most 3.0). What is left is the rounding of
Winograd's transforms, which gradients pass through in every layer, most of it where channels are few.
"""

from __future__ import annotations

import contextlib
import copy
import statistics

import pytest
import torch

from ddpm_fast import Unet
from ddpm_fast.runtime import extension
from ddpm_fast.testing.native_cases import PAIRS, instruction_sets, instructions

pytestmark = pytest.mark.skipif(extension.load() is None, reason=f"no extension: {extension.reason()}")

DRAWS = 12
# Below this share of a tensor of typical size, a gradient is the rounding of others: the loss hardly depends on it, as
# on a bias before a norm. Errors are then held to that share.
FLOOR = 1e-3
OUTPUT, TOGETHER, EACH = 2, 2, 5
# Two units in the last place, for what one rounding more costs on a short way.
LEAST = 2 * 2**-24

CONFIGS = {
    "dim 16, 32x32": (dict(dim=16, dim_mults=(1, 2, 4)), 2, 32),
    "dim 32, 32x32, flash": (dict(dim=32, dim_mults=(1, 2), flash_attn=True), 1, 32),
    "dim 64, 16x16": (dict(dim=64, dim_mults=(1, 2, 4), flash_attn=True), 1, 16),
    "dim 24, 16x16, batch 4": (dict(dim=24, dim_mults=(1, 2)), 4, 16),
    "self-conditioned": (dict(dim=16, dim_mults=(1, 2), self_condition=True), 3, 16),
    "full attention": (dict(dim=32, dim_mults=(1, 2), full_attn=True), 2, 16),
    "grey, odd size": (dict(dim=20, dim_mults=(1, 3), channels=1, attn_heads=3, attn_dim_head=10), 2, 22),
}


def results(network, x, t, x_self_cond, weight) -> dict[str, torch.Tensor]:
    """Output, and gradients of a random combination of its elements, in float64."""
    dtype = next(network.parameters()).dtype
    x = x.to(dtype, copy=True).requires_grad_()
    network.zero_grad(set_to_none=True)
    out = network(x, t.to(dtype), None if x_self_cond is None else x_self_cond.to(dtype))
    (out * weight.to(dtype)).sum().backward()
    found = {"output": out, "gradient of x": x.grad}
    found |= {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    return {name: tensor.detach().double() for name, tensor in found.items()}


def square(tensor: torch.Tensor) -> float:
    """The sum of the squares of all elements."""
    return torch.dot(tensor.flatten(), tensor.flatten()).item()


def squared_errors(side: dict, truth: dict) -> dict[str, float]:
    """Squares of the relative errors by tensor."""
    assert side.keys() == truth.keys()
    rms = {name: (square(tensor) / tensor.numel()) ** 0.5 for name, tensor in truth.items()}
    typical = statistics.median_low(rms[name] for name in truth if name != "output")
    scale = {name: max(rms[name], FLOOR * typical) for name in truth}
    return {name: square(side[name] - truth[name]) / truth[name].numel() / scale[name] ** 2 for name in truth}


def of_parameters(side: dict, truth: dict) -> float:
    """Square of the relative error of all parameters' gradients as one vector."""
    names = [name for name in truth if name not in ("output", "gradient of x")]
    return sum(square(side[name] - truth[name]) for name in names) / sum(square(truth[name]) for name in names)


def assert_as_accurate(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    """Over all draws, each tensor's error is at most so many times upstream's."""
    factors = {"output": OUTPUT, "gradient of x": TOGETHER, "all gradients": TOGETHER}
    worse = {}
    for name in theirs[0]:
        a, b = ((sum(draw[name] for draw in side) / len(side)) ** 0.5 for side in (ours, theirs))
        if not a <= factors.get(name, EACH) * b + LEAST:
            worse[name] = f"{a:.2e} against {b:.2e}"
    assert not worse, worse


def randomised(network) -> None:
    """Gains of one and biases of zero hide errors."""
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim < 2 or p.shape[0] == 1:
                p.add_(0.3 * torch.randn_like(p))


@pytest.mark.release(but=lambda name: not name.startswith(("dim 16", "dim 24", "dim 64")))
@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_gradients(upstream, name):
    """With memory="low" the bits are the same, so that one draw shows its accuracy."""
    config, batch, size = CONFIGS[name]
    ours, low = Unet(**config), Unet(**config, memory="low")
    errors = {side: [] for side in ["upstream", *instruction_sets()]}
    for draw in range(DRAWS):
        torch.manual_seed(3 + draw)
        theirs = upstream.Unet(**config)
        randomised(theirs)
        x, x_self_cond, weight = torch.randn(3, batch, config.get("channels", 3), size, size)
        inputs = x, torch.randint(0, 1000, (batch,)), x_self_cond if config.get("self_condition") else None, weight
        truth = results(copy.deepcopy(theirs).double(), *inputs)

        for network in (ours, low):
            network.load_state_dict(theirs.state_dict())
        for side in errors:
            with contextlib.nullcontext() if side == "upstream" else instructions(side):
                found = results(theirs if side == "upstream" else ours, *inputs)
                if side != "upstream" and draw == 0:
                    again = results(low, *inputs)
                    assert all(torch.equal(again[name], tensor) for name, tensor in found.items()), side
            errors[side].append(squared_errors(found, truth) | {"all gradients": of_parameters(found, truth)})
    upstreams = errors.pop("upstream")
    for side, found in errors.items():
        try:
            assert_as_accurate(found, upstreams)
        except AssertionError as error:
            raise AssertionError(f"{side}: {error}") from error


@pytest.mark.release(but=lambda name: name.startswith("dim 24"))
@pytest.mark.parametrize("name", ["dim 32, 32x32, flash", "dim 24, 16x16, batch 4"])
def test_under_bfloat16_autocast(upstream, name):
    """With products of bfloat16 where the processor has them, and without: each held to upstream under autocast."""
    config, batch, size = CONFIGS[name]
    sides = instruction_sets((PAIRS, "avx512", "avx2"))
    errors: dict[str, list] = {side: [] for side in ["upstream", *sides]}
    for draw in range(DRAWS):
        torch.manual_seed(3 + draw)
        theirs, ours = upstream.Unet(**config), Unet(**config)
        randomised(theirs)
        ours.load_state_dict(theirs.state_dict())
        x, weight = torch.randn(2, batch, 3, size, size)
        inputs = x, torch.randint(0, 1000, (batch,)), None, weight
        truth = results(copy.deepcopy(theirs).double(), *inputs)
        for side in errors:
            network = theirs if side == "upstream" else ours
            chosen = contextlib.nullcontext() if side == "upstream" else instructions(side)
            with chosen, torch.autocast("cpu", torch.bfloat16):
                found = results(network, *inputs)
            errors[side].append(squared_errors(found, truth) | {"all gradients": of_parameters(found, truth)})
    upstreams = errors.pop("upstream")
    for side, found in errors.items():
        try:
            assert_as_accurate(found, upstreams)
        except AssertionError as error:
            raise AssertionError(f"{side}: {error}") from error


def test_a_sloppy_network_is_noticed():
    exact, noise = torch.randn(2, 64, 64).double()
    truth = {"output": exact, "weight": exact, "gain": exact, "bias": 1e-9 * exact}
    noisy = {"output": exact, "gain": exact, "weight": exact + 3e-7 * noise, "bias": truth["bias"] + 1e-10 * noise}
    noisier = {**noisy, "weight": exact + 25e-7 * noise, "bias": truth["bias"] + 3e-10 * noise}
    theirs, ours = squared_errors(noisy, truth), squared_errors(noisier, truth)
    assert_as_accurate([theirs], [theirs])
    with pytest.raises(AssertionError, match="'weight': '2.*e-06 against 3.*e-07'}"):
        assert_as_accurate([ours], [theirs])
    missing = squared_errors({**truth, "weight": exact * float("nan")}, truth)
    with pytest.raises(AssertionError, match="weight.*nan"):
        assert_as_accurate([missing], [theirs])
