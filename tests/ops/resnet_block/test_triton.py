"""The residual block's Triton kernels against the composite in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see ../conftest.py.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ddpm_fast import Unet
from ddpm_fast.models.resnet import ResnetBlock
from ddpm_fast.ops.resnet_block import composite as steps
from ddpm_fast.ops.resnet_block import triton as kernel
from ddpm_fast.ops.resnet_block.composite import convs_of_parts, skip_convs
from ddpm_fast.ops.resnet_block.op import resnet_block
from ddpm_fast.runtime import dispatch, triton_launch
from ddpm_fast.runtime.dispatch import use_backend, watch_choices
from ddpm_fast.testing.truth import assert_close_to_truth, exact_convolutions, poisoned_memory

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"

# B, C0, C1, K, H, W
SMALL = (2, 24, 8, 12, 3, 4)
SHAPES = [(1, 1, 1, 1, 1, 1), (3, 3, 5, 7, 1, 9), SMALL, (2, 70, 33, 68, 9, 7), (1, 64, 130, 16, 5, 5)]


@pytest.fixture(autouse=True)
def exact_products():
    with exact_convolutions():
        yield


def make(shape, dtype: torch.dtype = torch.float32, biased: bool = False) -> dict[str, torch.Tensor]:
    B, C0, C1, K, H, W = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    tensors = {
        "x": 2 * normal(B, C0, H, W) + 0.5,
        "skip": normal(B, C1, H, W),
        "weight": normal(K, C0 + C1, 3, 3) / (9 * (C0 + C1)) ** 0.5,
        "res_weight": normal(K, C0 + C1, 1, 1) / (C0 + C1) ** 0.5,
        "res_bias": normal(K),
    } | ({"x_bias": normal(C0)} if biased else {})
    tensors = {name: tensor.to(dtype).to(DEVICE) for name, tensor in tensors.items()}
    for name in ("x", "skip", "weight", "res_weight"):
        tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    return tensors


def composite(x, skip, weight, res_weight, res_bias, x_bias=None) -> tuple[torch.Tensor, ...]:
    x = x if x_bias is None else x + x_bias[:, None, None]
    return convs_of_parts((x, skip), (weight, None), (res_weight, res_bias))


def kernels(keeps_whole: bool = True, **tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with use_backend("triton"):
        return skip_convs(**tensors, keeps_whole=keeps_whole)


def run(function, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Both outputs and the gradient of every tensor, with poisoned memory: what is not written is NaN."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with poisoned_memory():
        outputs = function(**leaves)
        grads = [torch.linspace(-1, 1, y.numel(), device=DEVICE).reshape(y.shape).to(y.dtype) for y in outputs]
        torch.autograd.backward(outputs, grads)
    outputs = dict(zip(("y", "residual"), (y.detach() for y in outputs), strict=True))
    return outputs | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def assert_as_accurate_as_the_composite(tensors: dict[str, torch.Tensor], function=kernels) -> None:
    actual, expected = run(function, tensors), run(composite, tensors)
    truth = run(composite, {name: tensor.double() for name, tensor in tensors.items()})
    for name in truth:
        floor = 16 if name in ("dres_weight", "dres_bias", "dx_bias") else 4  # sums over pixels
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name, floor=floor)
    for name in ("x", "skip"):
        apart = [d for d, size in enumerate(tensors[name].shape) if size > 1]  # strides of others say nothing
        assert all(actual[f"d{name}"].stride(d) == tensors[name].stride(d) for d in apart)
    assert actual["residual"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.arithmetic
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_shapes(biased, shape, dtype):
    assert_as_accurate_as_the_composite(make(shape, dtype, biased))


@pytest.mark.parametrize("biased", [False, True])
def test_many_chunks_of_pixels(biased, monkeypatch):
    """Programs walk over several tiles of pixels, and the last one is half outside."""
    monkeypatch.setattr(kernel, "_PROGRAMS", 4)
    assert_as_accurate_as_the_composite(make((2, 20, 12, 8, 15, 13), biased=biased))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_maps_that_are_kept_are_as_accurate(dtype):
    tensors = make(SHAPES[3], dtype)
    assert_as_accurate_as_the_composite(tensors, partial(kernels, keeps_whole=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_bias_is_added_as_a_pass_of_its_own_adds_it(dtype):
    """The same bits: outputs, and all gradients but the bias's, which is a sum that is not rounded before."""
    tensors = make((2, 70, 33, 20, 9, 7), dtype, biased=True)
    plain = tensors | {"x": tensors["x"] + tensors["x_bias"][:, None, None]}
    del plain["x_bias"]
    actual, expected = run(kernels, tensors), run(kernels, plain)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_tf32_where_convolutions_may_use_it():
    """The interpreter ignores tf32, so this tests that the tiles for tf32 compute the same."""
    tensors = make((2, 40, 24, 36, 5, 6))
    exact = run(kernels, tensors)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    for name, value in run(kernels, tensors).items():
        torch.testing.assert_close(value, exact[name], rtol=2e-2, atol=2e-2 * exact[name].abs().max().item())


def test_deterministic_and_independent_of_the_batch():
    tensors = make((3, 24, 8, 12, 20, 20))
    one = {name: tensor[:1] if name in ("x", "skip") else tensor for name, tensor in tensors.items()}
    first, second = run(kernels, tensors), run(kernels, tensors)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with use_backend("triton"):
        assert torch.equal(skip_convs(**one)[1], first["residual"][:1])


def test_gradients_of_another_layout():
    tensors, results = make(SMALL, torch.bfloat16), []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        outputs = kernels(**leaves)
        grads = [torch.linspace(-1, 1, y.numel(), device=DEVICE).reshape(y.shape).to(y.dtype) for y in outputs]
        torch.autograd.backward(outputs, [grad.contiguous(memory_format=memory_format) for grad in grads])
        results.append([leaf.grad for leaf in leaves.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_that_nothing_reads(unused):
    tensors = make(SMALL)
    results = []
    for function in (kernels, composite):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        function(**leaves)[1 - unused].sum().backward()
        results.append([leaf.grad for leaf in leaves.values()])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, torch.zeros_like(actual) if expected is None else expected)


@pytest.mark.parametrize("wanted", ["x", "skip", "weight", "res_weight", "res_bias"])
def test_only_the_gradient_that_is_asked_for(wanted):
    tensors = make(SMALL)
    expected = run(kernels, tensors)
    tensors[wanted].requires_grad_()
    outputs = kernels(**tensors)
    torch.autograd.backward(
        outputs, [torch.linspace(-1, 1, y.numel(), device=DEVICE).reshape(y.shape) for y in outputs]
    )
    assert torch.equal(tensors[wanted].grad, expected[f"d{wanted}"])


def kept_by(tensors: dict[str, torch.Tensor], **options) -> list[torch.Tensor]:
    """What is kept for backward that is none of the arguments."""
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), use_backend("triton"):
        skip_convs(**tensors, **options)
    return [t for t in kept if t.data_ptr() not in {tensor.data_ptr() for tensor in tensors.values()}]


@pytest.mark.parametrize("biased", [False, True])
def test_keeps_the_maps_side_by_side(biased):
    tensors = make(SMALL, biased=biased)
    (whole,) = kept_by(tensors)
    x = tensors["x"] + tensors["x_bias"][:, None, None] if biased else tensors["x"]
    assert torch.equal(whole, torch.cat((x, tensors["skip"]), dim=1))
    assert biased or not kept_by(tensors, keeps_whole=False)


@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(biased):
    tensors = make(SMALL, biased=biased)
    given = [tensors.get(name) for name in ("x", "skip", "res_weight", "res_bias", "x_bias")]
    operators = torch.ops.ddpm_fast
    torch.library.opcheck(operators.residual_conv.default, tuple(given))
    grad, h = operators.residual_conv(*given)
    torch.library.opcheck(operators.residual_conv_gradients.default, (grad, *given, h))


def block_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arguments of a residual block around these convolutions."""
    K = tensors["res_bias"].numel()
    row = torch.linspace(0.5, 1.5, K, device=DEVICE)
    square = torch.linspace(-0.1, 0.1, 9 * K * K, device=DEVICE).reshape(K, K, 3, 3)
    given = {"x": tensors["x"], "weight1": tensors["weight"], "bias1": row, "gain1": row, "weight2": square}
    given |= {"bias2": row.flip(0), "gain2": row.flip(0), "skip": tensors["skip"]}
    given |= {"res_weight": tensors["res_weight"], "res_bias": tensors["res_bias"]}
    return given | ({"x_bias": tensors["x_bias"]} if "x_bias" in tensors else {})


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_with_a_skip_connection_runs_them(recompute, biased):
    given = block_of(make(SMALL, biased=biased))
    results = []
    for backend in ("triton", "reference"):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
        with use_backend(backend):
            out = resnet_block(**leaves, recompute=recompute)
        results.append([out, *torch.autograd.grad(out.sin().sum(), list(leaves.values()))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with watch_choices() as choices:
        resnet_block(**given)
    assert choices["skip_convs", "triton", "accepts"] == 1


def run_network(model: Unet, with_gradients: bool) -> dict[str, torch.Tensor]:
    x = torch.linspace(-1, 1, 2 * 3 * 4 * 8, device=DEVICE).reshape(2, 3, 4, 8)
    with torch.set_grad_enabled(with_gradients):
        out = model(x.contiguous(memory_format=torch.channels_last), torch.tensor([3, 500], device=DEVICE))
    if not with_gradients:
        return {"out": out}
    gradients = torch.autograd.grad(out.square().mean(), list(model.parameters()))
    return {"out": out, **dict(zip((name for name, _ in model.named_parameters()), gradients, strict=True))}


@pytest.fixture
def biases_added(monkeypatch) -> list[bool]:
    """Of each block with a skip connection, whether it adds a bias to x."""
    found: list[bool] = []
    operator = steps._residual_conv.triton

    def watched(x, skip, weight, bias, x_bias):
        found.append(x_bias is not None)
        return operator(x, skip, weight, bias, x_bias)

    monkeypatch.setattr(steps._residual_conv, "triton", watched)
    return found


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_network_leaves_biases_to_the_blocks_that_follow(with_gradients, biases_added, monkeypatch):
    """Bits are those of a pass that adds the bias, but in the gradients of these biases: sums in another order."""
    torch.manual_seed(0)
    model = Unet(8, dim_mults=(1, 2, 2)).to(DEVICE)
    made = run_network(model, with_gradients)
    assert biases_added == [False, False, True, False, True, False, True]
    monkeypatch.setattr(ResnetBlock, "adds_bias", lambda self: False)
    expected = run_network(model, with_gradients)
    assert biases_added[7:] == [False] * 7
    sums = {"ups.0.3.1.bias", "ups.1.3.1.bias", "ups.2.3.bias"} & expected.keys()
    assert len(sums) == (3 if with_gradients else 0)
    for name, value in expected.items():
        if name in sums:
            torch.testing.assert_close(made[name], value, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(made[name], value), name


def change_nothing(model: Unet) -> None:
    pass


def watch_upsample(model: Unet) -> None:
    model.ups[0][3].register_forward_hook(lambda module, inputs, out: None)


def watch_its_convolution(model: Unet) -> None:
    model.ups[0][3][1].register_forward_hook(lambda module, inputs, out: None)


def watch_the_block(model: Unet) -> None:
    model.ups[1][0].register_forward_pre_hook(lambda module, inputs: None)


def replace_the_last_convolution(model: Unet) -> None:
    model.ups[1][3] = torch.nn.Conv2d(8, 8, 3, padding=1).to(DEVICE)


@pytest.mark.parametrize(
    "change, blocks",
    [(change_nothing, 2), (watch_upsample, 1), (watch_its_convolution, 1), (watch_the_block, 1),
     (replace_the_last_convolution, 1)],
)  # fmt: skip
def test_biases_of_modules_that_a_user_changed_are_theirs(change, blocks, biases_added):
    torch.manual_seed(0)
    model = Unet(8, dim_mults=(1, 2)).to(DEVICE)
    change(model)
    made = run_network(model, True)
    assert sum(biases_added) == blocks
    with use_backend("reference"):
        for name, expected in run_network(model, True).items():
            torch.testing.assert_close(made[name], expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("biased", [False, True])
def test_compiles_whole(biased):
    given, results = block_of(make(SMALL, biased=biased)), []

    def loss(given):
        out = resnet_block(**given)
        return (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape)).sum(), out

    with use_backend("triton"):
        for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
            leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
            value, out = function(leaves)
            value.backward()
            results.append([out, *(leaf.grad for leaf in leaves.values())])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled) and eager.stride() == compiled.stride()


def test_a_second_derivative_is_refused_and_not_wrong():
    tensors = {name: tensor.requires_grad_() for name, tensor in make(SMALL).items()}
    (dx,) = torch.autograd.grad(kernels(**tensors)[1].square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        dx.sum().backward()


REFUSED = {
    "float64": (lambda x: x.double(), "x is torch.float64, and the kernels compute in float32"),
    "empty": (lambda x: x[:0], "a map is empty"),
    "contiguous": (lambda x: x.contiguous(), "x is not channels-last, its strides are "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_and_the_steps_run(name):
    change, reason = REFUSED[name]
    tensors = make(SMALL)
    tensors["x"] = change(tensors["x"])
    tensors["skip"] = tensors["skip"][: tensors["x"].shape[0]].to(tensors["x"].dtype)
    first = dispatch.ops()["skip_convs"].implementations[0]
    assert first.name == "triton" and first.refuses(**tensors).startswith(reason)
    assert [y.shape[1] for y in kernels(**tensors)] == [SMALL[3]] * 2
