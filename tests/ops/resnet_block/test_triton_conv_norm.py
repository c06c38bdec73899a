"""A block whose convolutions make its norms, against its steps in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see ../conftest.py.
"""

from __future__ import annotations

import collections
import itertools

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import Unet
from ddpm_fast.ops.common.norm import rms_norm_silu
from ddpm_fast.ops.resnet_block import conv_norm
from ddpm_fast.ops.resnet_block.op import resnet_block
from ddpm_fast.runtime import measured, triton_launch
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.runtime.measured import use_form
from ddpm_fast.testing import resnet_block_cases
from ddpm_fast.testing.truth import assert_close_to_truth, exact_convolutions, poisoned_memory

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"
HALF = [torch.float16, torch.bfloat16]

# B, C0, C1 (of a skip connection), K, H, W
SMALL = (2, 12, 8, 12, 3, 4)
SHAPES = [(1, 1, 0, 2, 1, 1), (3, 3, 5, 7, 1, 9), (3, 20, 0, 20, 5, 3), (2, 70, 33, 68, 9, 7), (1, 16, 8, 128, 5, 15)]
ROWS = ("bias1", "gain1", "bias2", "gain2", "scale", "shift", "res_bias")


@pytest.fixture(autouse=True)
def exact_products():
    with exact_convolutions():
        yield


def make(shape, dtype: torch.dtype, **options) -> dict[str, torch.Tensor]:
    return resnet_block_cases.make(shape, dtype, DEVICE, **options)


def run(form: str, backend: str, tensors: dict[str, torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """The output and the gradient of every tensor, with poisoned memory: what is not written is NaN."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with poisoned_memory(), use_backend(backend), use_form(form):
        out = resnet_block(**leaves, **options)
        out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape).to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The fused computations that ran."""
    found: list[str] = []
    for name in ("_conv_norm", "_conv_norm_gradients"):
        operator = getattr(conv_norm, name)
        call = operator.triton

        def counted(*values, name=name, call=call):
            found.append(name)
            return call(*values)

        monkeypatch.setattr(operator, "triton", counted)
    return found


def assert_as_accurate_as_the_steps(tensors: dict[str, torch.Tensor], **options) -> None:
    actual, expected = run("fused", "triton", tensors, **options), run("separate", "reference", tensors, **options)
    truth = run("separate", "reference", {name: tensor.double() for name, tensor in tensors.items()}, **options)
    for name in truth:
        floor = 4 if name in ("out", "dx", "dskip") else 16  # sums over pixels
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name, floor=floor)
    for name, tensor in tensors.items():
        apart = [d for d, size in enumerate(tensor.shape) if size > 1]  # strides of other dimensions say nothing
        assert all(actual[f"d{name}"].stride(d) == tensor.stride(d) for d in apart), name
    assert actual["out"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.arithmetic
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaled", [True, False])
def test_shapes(scaled, shape, dtype, launches):
    assert_as_accurate_as_the_steps(make(shape, dtype, scaled=scaled))
    assert launches == ["_conv_norm", "_conv_norm", "_conv_norm_gradients"]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [SMALL, (2, 20, 33, 68, 9, 7)], ids=str)
def test_with_the_network_s_last_convolution(shape, dtype, launches):
    """The last norm is with the 1×1 convolution then, and not with the 3×3 one."""
    assert_as_accurate_as_the_steps(make(shape, dtype, outputs=3))
    assert launches == ["_conv_norm", "_conv_norm_gradients"]


@pytest.mark.parametrize("dtype", HALF)
def test_several_tiles_of_a_sample(dtype):
    """The last tile is half outside, and rows of the map go on in the next tile."""
    assert_as_accurate_as_the_steps(make((2, 12, 0, 12, 21, 19), dtype))


@pytest.mark.parametrize("shape", [(2, 12, 0, 12, 5, 3), (2, 12, 0, 12, 4, 40)], ids=str)
@pytest.mark.parametrize("dtype", HALF)
def test_dropout(dtype, shape):
    """Of four pixels at a time, and where there are other numbers of them."""
    assert_as_accurate_as_the_steps(make(shape, dtype), dropout_p=0.3, seed=torch.tensor([5], device=DEVICE))


def test_the_same_numbers_without_gradients_and_again():
    tensors = make(SMALL, torch.bfloat16)
    first, second = (run("fused", "triton", tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad(), use_backend("triton"), use_form("fused"):
        assert torch.equal(resnet_block(**tensors), first["out"])


def call_kernels(tensors: dict[str, torch.Tensor], how: str, seed: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Everything that both computations return, of the first convolution and its norm and of the second one's input."""
    rows = tuple(tensors[name] for name in ("gain1", "bias1", "scale", "shift"))
    dropout_p = 0.0 if seed is None else 0.5
    made = conv_norm.conv_and_norm(tensors["x"], tensors["weight1"], rows, None, seed, dropout_p, True, how)
    y, out, factors = made
    B, K, H, W = y.shape
    grad = torch.linspace(-1, 1, H * W * K, device=DEVICE).reshape(H, W, K).permute(2, 0, 1).to(out.dtype)
    grad = grad.expand(B, K, H, W).contiguous(memory_format=torch.channels_last)
    last_sums = torch.linspace(0, 1, 5 * 3 * K, device=DEVICE).reshape(5, 3, K).expand(B, 5, 3, K).contiguous()
    given = (grad, tensors["weight2"], y, factors, rows, seed, last_sums, dropout_p, how)
    return [*made, *conv_norm.gradients_of_conv_and_norm(*given)]


def test_a_sample_does_not_depend_on_the_batch():
    tensors = make((3, 12, 0, 12, 12, 12), torch.bfloat16)
    alone = {n: t[:1] if n in ("x", "scale", "shift") else t for n, t in tensors.items()}
    several, one = call_kernels(tensors, measured.FUSED), call_kernels(alone, measured.FUSED)
    per_sample = [0, 1, 2, 3, 6, 7]
    assert all(torch.equal(several[i][:1], one[i]) for i in per_sample)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_both_forms_give_the_same_tensors(dtype, dropout):
    """Also in float32, for which no block takes the kernels."""
    tensors, seed = make((2, 20, 0, 20, 6, 7), dtype), torch.tensor([7], device=DEVICE) if dropout else None
    fused, separate = (call_kernels(tensors, how, seed) for how in (measured.FUSED, measured.SEPARATE))
    for a, b in zip(fused, separate, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        eps = torch.finfo(a.dtype).eps if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(a.float(), b.float(), rtol=16 * eps, atol=16 * eps * b.abs().max().item())


@pytest.mark.parametrize("wanted", ["x", "skip", "weight1", *ROWS, "weight2", "res_weight"])
def test_only_the_gradient_that_is_asked_for(wanted):
    tensors = make(SMALL, torch.bfloat16)
    expected = run("fused", "triton", tensors)
    tensors[wanted].requires_grad_()
    with use_backend("triton"), use_form("fused"):
        out = resnet_block(**tensors)
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape).to(out.dtype))
    assert torch.equal(tensors[wanted].grad, expected[f"d{wanted}"])


def test_a_second_derivative_is_refused_and_not_wrong():
    tensors = {name: tensor.requires_grad_() for name, tensor in make(SMALL, torch.bfloat16).items()}
    with use_backend("triton"), use_form("fused"):
        out = resnet_block(**tensors)
    (dx,) = torch.autograd.grad(out.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        dx.sum().backward()


def test_opcheck():
    tensors = make((2, 12, 0, 12, 3, 4), torch.bfloat16)
    rows = tuple(tensors[name] for name in ("gain1", "bias1", "scale", "shift"))
    operators = torch.ops.ddpm_fast
    for keeps in (True, False):
        given = (tensors["x"], tensors["weight1"], *rows, tensors["x"], None, 0.0, keeps)
        torch.library.opcheck(operators.conv_norm.default, given)
    y, out, factors = operators.conv_norm(*given[:-1], True)
    last_sums = torch.zeros(2, 3, 3, 12, device=DEVICE)
    for without in (rows, (*rows[:2], None, None)):
        given = (out, tensors["weight2"], y, factors, *without, None, last_sums, 0.0)
        torch.library.opcheck(operators.conv_norm_gradients.default, given)


def test_the_reference_in_plain_torch():
    """What both computations are, in float64, with torch's autograd."""
    tensors = {name: tensor.double() for name, tensor in make((2, 12, 0, 12, 5, 4), torch.float32).items()}
    y = F.conv2d(tensors["x"], tensors["weight1"], padding=1).requires_grad_()
    v = y + tensors["bias1"][:, None, None]
    normed = rms_norm_silu(v, tensors["gain1"], scale=tensors["scale"], shift=tensors["shift"])
    z = F.conv2d(normed, tensors["weight2"], padding=1)
    grad = torch.linspace(-1, 1, 5 * 4 * 12, device=DEVICE).reshape(5, 4, 12).permute(2, 0, 1)
    z.backward(grad.expand(2, 12, 5, 4).double())
    made = call_kernels({name: tensor.float() for name, tensor in tensors.items()}, measured.FUSED)
    for actual, expected in ((made[0], y), (made[1], normed), (made[3], y.grad)):
        torch.testing.assert_close(actual.double(), expected.detach(), rtol=1e-4, atol=1e-5)


REFUSED = {
    "float32": (SMALL, lambda t: t.float(), "x is torch.float32, and the kernels are for tensor cores of half types"),
    "empty": (SMALL, lambda t: t[:0], "x is empty"),
    "contiguous": (SMALL, lambda t: t.contiguous(), "x is not channels-last, its strides are "),
    "wide": ((1, 4, 0, 130, 3, 3), lambda t: t, "the block has 130 channels, and a program holds at most 128"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    shape, change, reason = REFUSED[name]
    tensors = make(shape, torch.bfloat16)
    x = change(tensors["x"])
    rows = tuple(tensors[row] for row in ("gain1", "bias1", "scale", "shift"))
    assert conv_norm.why_not(x, tensors["weight1"], rows, (rows[0], rows[1])).startswith(reason)
    with use_backend("reference"):
        assert conv_norm.why_not(tensors["x"], tensors["weight1"], rows, rows[:2]) == "backend 'reference' is forced"


def run_network(model: Unet, form: str, backend: str) -> dict[str, torch.Tensor]:
    dtype = next(model.parameters()).dtype
    x = torch.linspace(-1, 1, 2 * 3 * 8 * 8, device=DEVICE).reshape(2, 3, 8, 8).to(dtype)
    with use_backend(backend), use_form(form):
        out = model(x.contiguous(memory_format=torch.channels_last), torch.tensor([3, 500], device=DEVICE))
        gradients = torch.autograd.grad(out.square().mean(), list(model.parameters()))
    return {"out": out.detach(), **dict(zip((name for name, _ in model.named_parameters()), gradients, strict=True))}


def test_a_network(launches):
    """Blocks whose output three ops read, whose input is two maps, and the last one, all in one network."""
    torch.manual_seed(0)
    model = Unet(8, dim_mults=(1, 2)).to(DEVICE).bfloat16()
    actual = run_network(model, "fused", "triton")
    assert collections.Counter(launches) == {"_conv_norm": 2 * 11 - 1, "_conv_norm_gradients": 11}
    expected = run_network(model, "separate", "triton")
    assert len(launches) == 32
    truth = run_network(model.double(), "separate", "reference")
    for name, value in truth.items():
        assert_close_to_truth(actual[name], expected[name], value, name=name, floor=16)


@pytest.mark.parametrize("form", [measured.FUSED, measured.SEPARATE])
def test_a_recording_measures_each_computation_and_takes_the_faster_form(form, monkeypatch, launches):
    """Backward, which may run in another thread, chooses as forward does; the capture gives the chosen form's bits."""
    turns = itertools.cycle((measured.FUSED, measured.SEPARATE))  # the order of the forms of both computations

    def time(call):
        call()
        return 1.0 if next(turns) == form else 2.0

    monkeypatch.setattr(measured, "_timed", time)
    measured.forget()
    tensors = make(SMALL, torch.bfloat16)
    expected = run(form, "triton", tensors)
    launches.clear()

    def step(stage: str) -> list[torch.Tensor]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        with use_backend("triton"), measured.stage(stage):
            out = resnet_block(**leaves)
        out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape).to(out.dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves.values())]

    step(measured.MEASURE)
    names = [name for name, _ in measured._choices]
    assert sorted(names) == ["conv_norm", "conv_norm", "conv_norm_gradients"]
    assert all(choice.form == form for choice in measured._choices.values())
    assert len(launches) > 3 * measured._ROUNDS
    launches.clear()
    captured = step(measured.LOOK_UP)
    assert len(launches) == (3 if form == measured.FUSED else 0)
    for a, b in zip(captured, expected.values(), strict=True):
        # Of a block on the CPU without these computations, the convolutions' gradients are native code's.
        exact = form == measured.FUSED or DEVICE == "cuda"
        torch.testing.assert_close(a, b, rtol=0, atol=0 if exact else 0.05 * b.abs().max().item())
    measured.forget()
