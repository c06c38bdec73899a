"""A residual block as one native op against its reference, forward and in every gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from ddpm_fast import use_backend
from ddpm_fast.ops.conv3x3.op import conv3x3
from ddpm_fast.ops.norm_silu.op import rms_norm_silu
from ddpm_fast.ops.resnet_block import reference
from ddpm_fast.ops.resnet_block.op import resnet_block
from ddpm_fast.runtime import extension
from ddpm_fast.runtime.dispatch import watch_choices
from ddpm_fast.testing.native_cases import without_pairs
from ddpm_fast.testing.truth import assert_close_to_truth, errors

pytestmark = pytest.mark.skipif(extension.load() is None, reason=f"no extension: {extension.reason()}")


class RowTerms(TorchFunctionMode):
    """While a reference runs: the rows that it broadcasts over pixels are maps, whose gradients are the terms.

    The gradient of a bias, gain, offset, scale or shift is a sum over pixels. Rounding errors of a sum are a share of
    the sum of its terms' magnitudes (Higham 1993, "The accuracy of floating point summation"), which says nothing of
    the sum itself where terms cancel.

    Args:
        rows: the tensors that may be broadcast, by name; leaves of the reference's graph.
        pixels: B, H and W of the maps.
    """

    def __init__(self, rows: Mapping[str, torch.Tensor], pixels: tuple[int, int, int]):
        super().__init__()
        self._names = {id(row): name for name, row in rows.items()}
        self._pixels = pixels
        self._maps: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def magnitudes(self) -> dict[str, torch.Tensor]:
        """Σ |term| of the gradients of all rows that were broadcast, after the backward of the reference's output."""
        sums = {}
        for name, (row, shaped, broadcast) in self._maps.items():
            assert broadcast.grad is not None, f"{name} has no gradient"
            sums[name] = broadcast.grad.abs().sum_to_size(shaped.shape).reshape(row.shape)
        return sums

    def _map(self, row: torch.Tensor, shaped: torch.Tensor | None = None) -> torch.Tensor:
        shaped = row.reshape(1, -1, 1, 1) if shaped is None else shaped  # (B or 1, C, 1, 1)
        B, H, W = self._pixels
        broadcast = shaped.expand(B, -1, H, W).clone()
        broadcast.retain_grad()
        self._maps[self._names[id(row)]] = (row, shaped, broadcast)
        return broadcast

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.conv2d and len(args) > 2 and id(args[2]) in self._names:
            x, weight, bias, *others = args
            return function(x, weight, None, *others, **kwargs) + self._map(bias)
        if function is torch.group_norm:
            x, groups, gain, offset, *others = args
            return function(x, groups, None, None, *others, **kwargs) * self._map(gain) + self._map(offset)
        out = function(*args, **kwargs)
        if function in (torch.Tensor.reshape, torch.Tensor.__getitem__) and id(args[0]) in self._names:
            return self._map(args[0], out) if out.shape[2:] == (1, 1) else out
        return out


def make(B, C, skip, K, H, W, groups=0, timed=True, dropout_p=0.0, seed=0) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    def weight(out, inputs, *window):
        return normal(out, inputs, *window) / (inputs * window[0] * window[1]) ** 0.5

    tensors = {
        "x": normal(B, C, H, W).contiguous(memory_format=torch.channels_last),
        "weight1": weight(K, C + skip, 3, 3),
        "bias1": normal(K),
        "gain1": 1 + 0.3 * normal(1, K, 1, 1),
        "weight2": weight(K, K, 3, 3),
        "bias2": normal(K),
        "gain2": 1 + 0.3 * normal(1, K, 1, 1),
    }
    if skip:
        tensors["skip"] = normal(B, skip, H, W).contiguous(memory_format=torch.channels_last)
    if skip or C != K:
        tensors |= {"res_weight": weight(K, C + skip, 1, 1), "res_bias": normal(K)}
    if timed:
        tensors |= {"scale": normal(B, K), "shift": normal(B, K)}
    if groups:
        tensors |= {"offset1": normal(K), "offset2": normal(K), "gain1": 1 + normal(K), "gain2": 1 + normal(K)}
    others = {"groups": groups, "dropout_p": dropout_p}
    if dropout_p:
        others["seed"] = torch.tensor([0x1234_5678_9ABC])
    return tensors, others


def gradient_of(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)


def run(function, tensors, others):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves, **others)
    gradients = torch.autograd.grad(out, list(leaves.values()), gradient_of(out))
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


def rows_of(tensors):
    return {name for name in tensors if name not in ("x", "skip") and not name.rstrip("12").endswith("weight")}


def truth_and_units(tensors, others):
    """`run` of the reference in float64, and what errors are a share of: the tensor, or the terms that a row sums."""
    leaves = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    B, _, H, W = tensors["x"].shape
    with RowTerms({name: leaves[name] for name in rows_of(tensors)}, (B, H, W)) as terms:
        out = reference.resnet_block(**leaves, **others)
    out.backward(gradient_of(out))
    truth = {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
    assert rows_of(tensors) == terms.magnitudes().keys()
    return truth, truth | terms.magnitudes()


def check(tensors, others, backend="native"):
    """Relative RMS error at most twice the reference's in float32, and some units in the last place.

    The block is a chain: what one step rounds the next ones pass on, so errors are a share of a tensor. In 1400 random
    shapes, with every option and instruction set, those of rows are at most 4.9 units and those of others 14.3.
    """
    with use_backend(backend):
        actual = run(resnet_block, tensors, others)
    expected = run(reference.resnet_block, tensors, others)
    truth, units = truth_and_units(tensors, others)
    for name in truth:
        assert actual[name].shape == truth[name].shape and actual[name].dtype == torch.float32
        (ours, _), (theirs, _) = errors(actual[name], truth[name]), errors(expected[name], truth[name])
        scale = units[name].pow(2).mean().sqrt().item()
        floor = 8 if name in rows_of(tensors) else 16
        bound = 2 * theirs + floor * torch.finfo(torch.float32).eps * scale
        assert ours <= bound, f"{name}: RMS error {ours:.3e} > {bound:.3e} (reference {theirs:.3e})"


SHAPES = [
    # B, C, skip, K, H, W
    (1, 64, 0, 64, 8, 8),
    (3, 8, 0, 24, 7, 3),
    (2, 16, 8, 32, 4, 4),
    (1, 33, 17, 50, 5, 9),
    (1, 8, 0, 8, 49, 43),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape):
    check(*make(*shape))


@pytest.mark.parametrize(
    "options", [{"groups": 4}, {"timed": False}, {"dropout_p": 0.25}, {"groups": 2, "dropout_p": 0.5}]
)
def test_options(options):
    check(*make(2, 16, 8, 32, 6, 5, **options))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference", None])
def test_a_final_convolution_and_recomputation(backend, recompute):
    tensors, others = make(2, 16, 8, 32, 6, 5, dropout_p=0.25)
    tensors |= {"out_weight": torch.randn(3, 32, 1, 1) / 32**0.5, "out_bias": torch.randn(3)}
    check(tensors, others | {"recompute": recompute}, backend)


def test_the_steps_have_second_derivatives():
    tensors, others = make(1, 3, 2, 4, 3, 4, groups=2)
    leaves = [tensor.double().requires_grad_() for tensor in tensors.values()]

    def block(*leaves):
        return resnet_block(**dict(zip(tensors, leaves, strict=True)), **others)

    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(block, leaves)


def test_tangents_of_maps_side_by_side():
    tensors, others = make(1, 3, 2, 4, 4, 4)
    x = tensors.pop("x")
    _, tangent = torch.func.jvp(lambda x: resnet_block(x, **tensors, **others), (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(lambda x: reference.resnet_block(x, **tensors, **others), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_every_instruction_set(name):
    module = extension.load()
    try:
        before = module.use_instruction_set(name)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        check(*make(1, 33, 17, 50, 5, 9))
        check(*make(2, 16, 0, 16, 8, 8))
    finally:
        module.use_instruction_set(before)


@settings(max_examples=150)
@given(
    st.integers(1, 3),
    *(st.integers(low, high) for low, high in ((4, 40), (0, 30), (8, 40), (3, 10), (3, 10))),
    st.booleans(),
)
def test_random_shapes(B, C, skip, K, H, W, timed):
    check(*make(B, C, skip, K, H, W, timed=timed))


def test_without_gradients_it_is_the_same():
    """Where nothing is kept for backward, the norms join the convolutions."""
    for shape in (*SHAPES, (2, 64, 64, 64, 32, 32)):
        tensors, others = make(*shape)
        with_graph = resnet_block(**{name: t.clone().requires_grad_() for name, t in tensors.items()}, **others)
        with torch.no_grad():
            torch.testing.assert_close(resnet_block(**tensors, **others), with_graph.detach(), rtol=1e-6, atol=1e-6)


def test_threads_do_not_matter():
    before = torch.get_num_threads()
    for shape in ((1, 8, 0, 8, 49, 43), (2, 130, 24, 70, 8, 8)):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(resnet_block, *make(*shape)))
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_threads_that_help_each_other_change_nothing():
    """A thread that helps another is done with its tile before the norm of it is made."""
    tensors, others = make(6, 64, 0, 96, 16, 16)
    before = torch.get_num_threads()
    with torch.no_grad():
        torch.set_num_threads(1)
        alone = resnet_block(**tensors, **others)
        torch.set_num_threads(3)
        results = [resnet_block(**tensors, **others) for _ in range(40)]
        torch.set_num_threads(before)
    assert all(torch.equal(alone, result) for result in results)


def test_half_types_round_once():
    tensors, others = make(2, 16, 8, 32, 6, 5)
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    with without_pairs():
        actual = run(resnet_block, half, others)
    exact = run(resnet_block, {name: tensor.float() for name, tensor in half.items()}, others)
    assert torch.equal(actual["out"], exact["out"].bfloat16())
    assert all(tensor.dtype == torch.bfloat16 for tensor in actual.values())


def test_scale_and_shift_may_be_slices():
    tensors, others = make(3, 8, 0, 8, 4, 4)
    rows = torch.randn(3, 40)
    tensors |= {"scale": rows[:, 3:11], "shift": rows[:, 20:28]}
    expected = resnet_block(**tensors | {name: tensors[name].clone() for name in ("scale", "shift")}, **others)
    assert torch.equal(resnet_block(**tensors, **others), expected)


def test_operator_keeps_torchs_rules():
    tensors, _ = make(2, 16, 8, 32, 4, 4)
    t = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    arguments = (
        t["x"], t["skip"], t["weight1"], t["bias1"], t["gain1"], None, t["scale"], t["shift"],
        t["weight2"], t["bias2"], t["gain2"], None, t["res_weight"], t["res_bias"], None, 0, 1e-5, 0.0, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.ddpm_fast.native_resnet_block.default, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight2": torch.zeros(32, 24, 3, 3)}, "weight2 must have shape"),
        ({"skip": torch.zeros(2, 8, 4, 4)}, "skip must have shape"),
        ({"x_bias": torch.zeros(8)}, "x_bias must have shape"),
        ({"scale": torch.zeros(2, 31)}, "scale must have shape"),
        ({"gain1": torch.zeros(31)}, "gain1 must have 32 elements"),
        ({"res_weight": None}, "res_weight must be given"),
        ({"groups": 5}, "groups must divide"),
        ({"groups": 4}, "offset1 and offset2 must be given"),
        ({"offset1": torch.zeros(32)}, "must not be given with groups = 0"),
        ({"offset2": torch.zeros(32)}, "must not be given with groups = 0"),
        ({"dropout_p": 0.5}, "seed must be given"),
        ({"bias1": 3.0}, "bias1 must be a tensor"),
        ({"out_weight": torch.zeros(3, 31, 1, 1)}, "out_weight must have shape"),
        ({"out_bias": torch.zeros(3)}, "out_bias must not be given without out_weight"),
    ],
)
def test_wrong_arguments(changes, message):
    tensors, others = make(2, 16, 8, 32, 6, 5)
    with pytest.raises((TypeError, ValueError), match=message):
        resnet_block(**tensors | others | changes)


@pytest.mark.parametrize("name", ["skip", "scale", "shift", "res_weight", "res_bias"])
def test_options_of_float64_run_the_steps(name):
    tensors, others = make(2, 16, 8, 32, 6, 5)
    tensors[name] = tensors[name].double()
    expected = reference.resnet_block(**tensors, **others)
    truth = reference.resnet_block(**{name: t.double() for name, t in tensors.items()}, **others)
    with watch_choices() as choices:
        actual = resnet_block(**tensors, **others)
    assert {implementation for op, implementation, _ in choices if op == "resnet_block"} == {"composite"}
    assert actual.dtype == torch.float32
    assert_close_to_truth(actual, expected, truth)
    with use_backend("native"), pytest.raises(RuntimeError, match="float64"):
        resnet_block(**tensors, **others)


def test_tangents_agree_with_gradients():
    """<u, J·v> = <Jᵀ·u, v>: the tangents are the reference's, the gradients native."""
    torch.manual_seed(0)
    x, v, u = (torch.randn(2, 8, 8, 8).contiguous(memory_format=torch.channels_last) for _ in range(3))
    weight, row = torch.randn(8, 8, 3, 3), torch.randn(8)
    for block in (
        lambda x: conv3x3(x, weight, row),
        lambda x: resnet_block(x, weight, row, row, weight, row, row),
        lambda x: rms_norm_silu(x, row),
    ):
        _, tangent = torch.func.jvp(block, (x,), (v,))
        given = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(block(given), given, u)
        torch.testing.assert_close((u * tangent).sum(), (gradient * v).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip_channels", [0, 8])
def test_a_bias_of_x_runs_the_steps(skip_channels):
    tensors, others = make(2, 16, skip_channels, 32, 6, 5)
    tensors["x_bias"] = torch.linspace(-1, 1, 16)
    expected = run(reference.resnet_block, tensors, others)
    for recompute in (False, True):
        for name, value in run(resnet_block, tensors, others | {"recompute": recompute}).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=name)
    with use_backend("native"), pytest.raises(RuntimeError, match="takes x with its bias"):
        resnet_block(**tensors, **others)
