"""The Triton kernels of the 2×2 convolution of stride 2 against torch's, in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see ../conftest.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import Unet
from ddpm_fast.ops.branches import branch, branching
from ddpm_fast.ops.resample import composite
from ddpm_fast.ops.resample.op import downsample_conv
from ddpm_fast.runtime import dispatch, triton_launch
from ddpm_fast.runtime.dispatch import use_backend, watch_choices
from ddpm_fast.testing.operator_names import OperatorNames
from ddpm_fast.testing.truth import assert_close_to_truth, exact_convolutions, poisoned_memory

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"

# B, C, K, H, W
SMALL = (2, 6, 5, 4, 6)
SHAPES = [(1, 1, 1, 2, 2), SMALL, (3, 5, 7, 2, 18), (2, 70, 68, 6, 10), (1, 16, 130, 10, 14), (2, 40, 20, 18, 2)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@pytest.fixture(autouse=True)
def exact_products():
    with exact_convolutions():
        yield


def make(shape, dtype: torch.dtype = torch.float32, biased: bool = True) -> dict[str, torch.Tensor]:
    B, C, K, H, W = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": 2 * torch.randn(B, C, H, W, generator=generator) + 0.5,
        "weight": torch.randn(K, C, 2, 2, generator=generator) / (4 * C) ** 0.5,
    } | ({"bias": torch.randn(K, generator=generator)} if biased else {})
    tensors = {name: tensor.to(dtype).to(DEVICE) for name, tensor in tensors.items()}
    tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    return tensors


def by_torch(x, weight, bias=None) -> torch.Tensor:
    return F.conv2d(x, weight, bias, stride=2)


def by_triton(**tensors: torch.Tensor) -> torch.Tensor:
    with use_backend("triton"):
        return downsample_conv(**tensors)


def run(function, tensors: dict[str, torch.Tensor], readers: int = 1) -> dict[str, torch.Tensor]:
    """Output and gradients, of which each reader gives another; with poisoned memory: what is not written is NaN."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with poisoned_memory(), branching():
        out = function(**leaves)
        maps = [out, *(branch(out) for _ in range(readers - 1))]
        grads = [torch.linspace(-1, i + 1, out.numel(), device=DEVICE).reshape(out.shape) for i in range(readers)]
        torch.autograd.backward(maps, [grad.to(out.dtype).to(memory_format=torch.channels_last) for grad in grads])
    return {"out": out.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


@pytest.mark.arithmetic
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("readers", [1, 2, 3])
def test_shapes(readers, shape, dtype):
    tensors = make(shape, dtype)
    actual, expected = run(by_triton, tensors, readers), run(by_torch, tensors, readers)
    truth = run(by_torch, {name: tensor.double() for name, tensor in tensors.items()}, readers)
    for name in truth:
        floor = 16 if name in ("dweight", "dbias") else 4  # sums over pixels
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name, floor=floor)
    for name in ("out", "dx"):
        assert actual[name].is_contiguous(memory_format=torch.channels_last)


def test_without_a_bias():
    tensors = make(SMALL, biased=False)
    actual, expected = run(by_triton, tensors, 2), run(by_torch, tensors, 2)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)


def test_deterministic_and_independent_of_the_batch():
    tensors = make((3, 24, 12, 20, 20), torch.bfloat16)
    first, second = run(by_triton, tensors, 2), run(by_triton, tensors, 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(by_triton(**tensors | {"x": tensors["x"][:1]}), first["out"][:1])


def test_tf32_where_convolutions_may_use_it():
    """The interpreter ignores tf32, so this tests that the tiles for tf32 compute the same."""
    tensors = make((2, 40, 36, 6, 8))
    exact = run(by_triton, tensors, 2)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    for name, value in run(by_triton, tensors, 2).items():
        torch.testing.assert_close(value, exact[name], rtol=2e-2, atol=2e-2 * exact[name].abs().max().item())


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_the_gradient_that_is_asked_for(wanted):
    tensors = make(SMALL)
    expected = run(by_triton, tensors)
    tensors[wanted].requires_grad_()
    out = by_triton(**tensors)
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape))
    assert torch.equal(tensors[wanted].grad, expected[f"d{wanted}"])
    assert all(tensor.grad is None for name, tensor in tensors.items() if name != wanted)


def test_opcheck():
    tensors, operators = make(SMALL), torch.ops.ddpm_fast
    torch.library.opcheck(operators.downsample_conv.default, tuple(tensors.values()))
    grad = operators.downsample_conv(*tensors.values())
    for further in ((None, None), (grad, None), (grad, grad)):
        torch.library.opcheck(operators.downsample_conv_gradients.default, (grad, *further, tensors["weight"]))


def test_compiles_whole():
    tensors, results = make(SMALL), []
    with use_backend("triton"):
        for function in (downsample_conv, torch.compile(downsample_conv, backend="aot_eager", fullgraph=True)):
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
            out = function(**leaves)
            results.append([out, *torch.autograd.grad(out.sin().sum(), list(leaves.values()))])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


def test_a_second_derivative_is_refused_and_not_wrong():
    tensors = {name: tensor.requires_grad_() for name, tensor in make(SMALL).items()}
    (dx,) = torch.autograd.grad(by_triton(**tensors).square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        dx.sum().backward()


REFUSED = {
    "float64": (lambda x: x.double(), "an argument is torch.float64, and the kernels compute in float32"),
    "empty": (lambda x: x[:0], "an argument is empty"),
    "odd": (lambda x: x[..., :5], "x is 4 × 5, and the kernels take even sizes"),
    "contiguous": (lambda x: x.contiguous(), "x is not channels-last, its strides are "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_and_torchs_runs(name):
    change, reason = REFUSED[name]
    tensors = make(SMALL)
    tensors["x"] = change(tensors["x"])
    first = dispatch.ops()["downsample_conv"].implementations[0]
    assert first.name == "triton" and first.refuses(**tensors).startswith(reason)
    with use_backend("triton"):
        found = downsample_conv(**tensors)
    torch.testing.assert_close(found, by_torch(*(tensor.to(tensors["x"].dtype) for tensor in tensors.values())))


def gradients_of(model: Unet) -> dict[str, torch.Tensor]:
    x = torch.linspace(-1, 1, 2 * 3 * 8 * 8, device=DEVICE).reshape(2, 3, 8, 8)
    out = model(x.contiguous(memory_format=torch.channels_last), torch.tensor([3, 500], device=DEVICE))
    gradients = torch.autograd.grad(out.square().mean(), list(model.parameters()))
    return {"out": out, **dict(zip((name for name, _ in model.named_parameters()), gradients, strict=True))}


def test_a_network_runs_it_and_adds_no_gradients_of_its_output(monkeypatch):
    torch.manual_seed(0)
    model = Unet(8, dim_mults=(1, 2, 2)).to(DEVICE)
    readers = []
    operator = composite._downsample_conv_gradients.triton

    def watched(grad, grad2, grad3, weight):
        readers.append([g is not None for g in (grad, grad2, grad3)])
        return operator(grad, grad2, grad3, weight)

    monkeypatch.setattr(composite._downsample_conv_gradients, "triton", watched)
    with OperatorNames() as names:
        made = gradients_of(model)
    assert names.seen.count("downsample_conv") == 2 and readers == [[True, True, False]] * 2
    with use_backend("reference"):
        for name, expected in gradients_of(model).items():
            torch.testing.assert_close(made[name], expected, rtol=1e-3, atol=1e-5, msg=name)
    with watch_choices() as choices, torch.no_grad():
        model(torch.zeros(1, 3, 8, 8, device=DEVICE), torch.tensor([3], device=DEVICE))
    assert choices["downsample_conv", "triton", "accepts"] == 2
