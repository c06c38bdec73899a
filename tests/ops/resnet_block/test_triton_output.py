"""A block's output with the residual's and the output's 1×1 convolution as one, against the steps in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see ../conftest.py.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_fast import Unet
from ddpm_fast.ops.resnet_block import composite as steps
from ddpm_fast.ops.resnet_block.op import resnet_block
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing import resnet_block_cases
from ddpm_fast.testing.truth import assert_close_to_truth, exact_convolutions, poisoned_memory

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"

# B, C0, C1, K, J, H, W
SMALL = (2, 12, 8, 12, 3, 3, 4)
SHAPES = [(1, 1, 1, 2, 1, 1, 1), (3, 3, 5, 7, 2, 1, 9), SMALL, (2, 20, 33, 68, 6, 9, 7), (1, 16, 8, 130, 16, 5, 5)]


@pytest.fixture(autouse=True)
def exact_products():
    with exact_convolutions():
        yield


def make(shape, dtype: torch.dtype = torch.float32, biased: bool = False) -> dict[str, torch.Tensor]:
    *of_block, J, H, W = shape
    return resnet_block_cases.make((*of_block, H, W), dtype, DEVICE, outputs=J, biased=biased)


@pytest.fixture
def joined(monkeypatch) -> list[bool]:
    """Of each block with a skip connection, whether the two convolutions were one."""
    found: list[bool] = []
    join = steps._joined_with_output

    def watched(*arguments):
        result = join(*arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(steps, "_joined_with_output", watched)
    return found


def run(backend: str | None, tensors: dict[str, torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """The output and the gradient of every tensor, with poisoned memory: what is not written is NaN."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with poisoned_memory(), use_backend(backend):
        out = resnet_block(**leaves, **options)
        out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape).to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def assert_as_accurate_as_the_steps(tensors: dict[str, torch.Tensor]) -> None:
    actual, expected = run("triton", tensors), run("reference", tensors)
    truth = run("reference", {name: tensor.double() for name, tensor in tensors.items()})
    for name in truth:
        floor = 4 if name in ("out", "dx", "dskip") else 16  # sums over pixels
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name, floor=floor)
    for name, tensor in tensors.items():
        apart = [d for d, size in enumerate(tensor.shape) if size > 1]  # strides of other dimensions say nothing
        assert all(actual[f"d{name}"].stride(d) == tensor.stride(d) for d in apart), name
    assert actual["out"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.arithmetic
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_shapes(biased, shape, dtype, joined):
    assert_as_accurate_as_the_steps(make(shape, dtype, biased))
    assert joined == [True, False, False]


def test_many_chunks_of_pixels(joined):
    """Programs walk over several tiles of pixels, and the last one is half outside."""
    assert_as_accurate_as_the_steps(make((2, 4, 4, 8, 3, 45, 37)))
    assert joined[0]


def test_without_gradients_and_again():
    tensors = make(SMALL, torch.bfloat16)
    first, second = run("triton", tensors), run("triton", tensors)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad(), use_backend("triton"):
        assert torch.equal(resnet_block(**tensors), first["out"])


def test_a_sample_does_not_depend_on_the_batch():
    x, residual, weight = (torch.randn(size).to(DEVICE) for size in ((3, 8, 12, 12), (3, 3, 12, 12), (3, 8, 1, 1)))
    x, residual = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, residual))
    row, operators = torch.linspace(0.5, 1.5, 8, device=DEVICE), torch.ops.ddpm_fast
    out, factors = operators.norm_silu_conv(x, row, row, residual, weight)
    assert torch.equal(operators.norm_silu_conv(x[:1], row, row, residual[:1], weight)[0], out[:1])
    made = operators.norm_silu_conv_gradients(out, x, factors, row, row, weight)
    alone = operators.norm_silu_conv_gradients(out[:1], x[:1], factors[:1], row, row, weight)
    assert all(torch.equal(one, several[:1]) for one, several in zip(alone, made, strict=True))


def test_dropout():
    tensors, seed = make(SMALL), torch.tensor([5], device=DEVICE)
    actual = run("triton", tensors, dropout_p=0.3, seed=seed)
    expected = run("reference", tensors, dropout_p=0.3, seed=seed)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "wanted",
    ["x", "skip", "weight1", "bias1", "gain1", "weight2", "bias2", "gain2", "scale", "shift", "res_weight", "res_bias",
     "out_weight", "out_bias", "x_bias"],
)  # fmt: skip
def test_only_the_gradient_that_is_asked_for(wanted):
    """Whether the two convolutions are one then or not."""
    tensors = make(SMALL, biased=True)
    expected = run("reference", tensors)
    tensors[wanted].requires_grad_()
    with use_backend("triton"):
        out = resnet_block(**tensors)
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape))
    torch.testing.assert_close(tensors[wanted].grad, expected[f"d{wanted}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "without, options",
    [("out_bias", {}), ("res_bias", {}), ("", {"recompute": True}), ("", {"groups": 4}), ("skip", {})],
)
def test_other_blocks_run_their_steps(without, options, joined):
    tensors = make(SMALL)
    if options.get("groups"):
        tensors |= {f"offset{i}": torch.linspace(-1, 1, SMALL[3], device=DEVICE) for i in (1, 2)}
    if without == "skip":
        tensors["x"] = torch.cat((tensors["x"], tensors["skip"]), dim=1).contiguous(memory_format=torch.channels_last)
    tensors.pop(without, None)
    actual, expected = run("triton", tensors, **options), run("reference", tensors, **options)
    assert not any(joined)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("sizes", [(1, 4, 4, 264, 3, 2, 2), (1, 4, 4, 8, 17, 2, 2)], ids=str)
def test_wide_blocks_and_many_outputs_run_their_steps(sizes, joined):
    tensors = make(sizes)
    actual, expected = run("triton", tensors), run("reference", tensors)
    assert joined == [False, False]
    torch.testing.assert_close(actual["out"], expected["out"], rtol=1e-4, atol=1e-4)


def test_opcheck():
    B, _, _, K, J, H, W = SMALL
    tensors, operators = make(SMALL), torch.ops.ddpm_fast
    outer = [tensors[name] for name in ("out_weight", "out_bias", "res_weight", "res_bias")]
    x = torch.randn(B, K, H, W).to(DEVICE).contiguous(memory_format=torch.channels_last)
    residual = torch.randn(B, J, H, W).to(DEVICE).contiguous(memory_format=torch.channels_last)
    given = (x, tensors["gain2"], tensors["bias2"])
    torch.library.opcheck(operators.norm_silu_conv.default, (*given, residual, tensors["out_weight"]))
    out, factors = operators.norm_silu_conv(*given, residual, tensors["out_weight"])
    kept = (x, factors, *given[1:], tensors["out_weight"])
    torch.library.opcheck(operators.norm_silu_conv_gradients.default, (out, *kept))
    _, _, products = operators.norm_silu_conv_gradients(out, *kept)
    torch.library.opcheck(operators.output_weights.default, tuple(outer))
    whole = operators.output_weights(*outer)
    torch.library.opcheck(operators.output_weights_gradients.default, (products, *whole, *outer))


def test_keeps_no_map_of_the_output():
    """Of the last norm its input alone: its output is neither written nor kept."""
    tensors = {name: tensor.requires_grad_() for name, tensor in make((2, 12, 8, 16, 3, 6, 5)).items()}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with use_backend("triton"):
            resnet_block(**tensors)
    maps = {t.data_ptr() for t in kept if t.dim() == 4 and t.shape[1:] == (16, 6, 5)}
    assert len(maps) == 3  # the convolutions' outputs, and the second one's input


def test_a_second_derivative_is_refused_and_not_wrong():
    tensors = {name: tensor.requires_grad_() for name, tensor in make(SMALL).items()}
    given = [tensors[name] for name in ("out_weight", "out_bias", "res_weight", "res_bias")]
    whole, _, _ = steps._OutputWeights.apply(tensors["x"], *given)
    (dweight,) = torch.autograd.grad(whole.square().sum(), tensors["res_weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        dweight.sum().backward()


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_network(with_gradients, joined):
    torch.manual_seed(0)
    model = Unet(8, dim_mults=(1, 2)).to(DEVICE)
    x = torch.linspace(-1, 1, 2 * 3 * 4 * 8, device=DEVICE).reshape(2, 3, 4, 8)
    results = []
    for backend in ("triton", "reference"):
        with torch.set_grad_enabled(with_gradients), use_backend(backend):
            out = model(x, torch.tensor([3, 500], device=DEVICE))
        parameters = list(model.parameters()) if with_gradients else []
        results.append([out, *(torch.autograd.grad(out.square().mean(), parameters) if parameters else ())])
    assert joined.count(True) == 1
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
