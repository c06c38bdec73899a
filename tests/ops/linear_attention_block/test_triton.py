"""The Triton kernels of linear_attention_block against the reference in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see conftest.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ddpm_fast.ops.branches import branch, branching
from ddpm_fast.ops.linear_attention_block import composite
from ddpm_fast.ops.linear_attention_block import triton as kernel
from ddpm_fast.ops.linear_attention_block.op import linear_attention_block
from ddpm_fast.runtime import dispatch, triton_launch
from ddpm_fast.runtime.dispatch import use_backend, watch_choices
from ddpm_fast.testing.linear_attention_block_cases import (
    SMALL,
    assert_as_accurate_as_the_reference,
    kernels,
    make,
    run,
    with_residual,
)
from ddpm_fast.testing.truth import assert_close_to_truth

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])

# B, heads, D, C, M, H, W
SHAPES = [
    (1, 1, 8, 3, 0, 1, 1),
    (1, 3, 10, 24, 2, 7, 9),
    (2, 4, 32, 64, 4, 5, 7),
    (1, 1, 64, 100, 1, 17, 19),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(shape):
    """The formulas, without the rounding of half types. The op refuses float32, so that no GPU runs this."""
    if not triton_launch.interpreted() and shape[3] > 64:
        shape = (*shape[:3], 64, *shape[4:])  # a program has no registers for wider rows of float32
    assert_as_accurate_as_the_reference(*make(shape, device=DEVICE), kind="other")


@pytest.mark.release(
    but=lambda shape, dtype, _arithmetic=None: (
        (shape == SHAPES[2]) == ((dtype == torch.float16) != bool(_arithmetic))
        and (_arithmetic is None or shape not in (SHAPES[2], SHAPES[3]))
    )
)
@pytest.mark.arithmetic
@HALVES
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_half_types(shape, dtype):
    """x in a half type and parameters in float32, as under autocast; x is the residual, as in a network."""
    tensors, others = make(shape, dtype, DEVICE)
    assert_as_accurate_as_the_reference(tensors, others, kind="x")


def test_parameters_in_a_half_type_and_no_residual():
    tensors, others = make(SMALL, torch.bfloat16, DEVICE)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    tensors |= {"weight": tensors["weight"].flatten(1), "weight_qkv": tensors["weight_qkv"].flatten(1)}
    assert_as_accurate_as_the_reference(tensors | {"gain": tensors["gain"].flatten()}, others)


@pytest.mark.arithmetic
def test_sums_over_many_chunks(monkeypatch):
    """Seven chunks, the last one not full; the merge reads four at a time."""
    choose = kernel.choose_launch

    def cut(*arguments, **options):
        launch = choose(*arguments, **options)
        small = {n: dataclasses.replace(getattr(launch, n), rows=16) for n in ("context", "rows", "queries", "keys")}
        return dataclasses.replace(launch, chunk=32, span=48, **small)

    monkeypatch.setattr(kernel, "choose_launch", cut)
    assert_as_accurate_as_the_reference(*make((1, 2, 16, 16, 2, 13, 16), device=DEVICE), kind="x")


@pytest.mark.parametrize("group", [1, 2])
def test_groups_of_heads(group, monkeypatch):
    """Each program of the context has some of three heads; the last one of two has a head that does not exist."""
    choose = kernel.choose_launch

    def cut(*arguments, **options):
        launch = choose(*arguments, **options)
        return dataclasses.replace(launch, context=dataclasses.replace(launch.context, group=group))

    monkeypatch.setattr(kernel, "choose_launch", cut)
    assert_as_accurate_as_the_reference(*make((1, 3, 10, 24, 2, 4, 5), device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_and_queries_of_large_magnitude(dtype):
    """exp of them overflows or vanishes: softmax is finite only relative to the largest, memory included."""
    tensors, others = make((1, 2, 16, 16, 3, 9, 9), device=DEVICE)
    tensors["weight_qkv"][:64] *= 20
    tensors["mem_kv"][0] *= 60
    tensors["x"] = tensors["x"].to(dtype)
    found = run(kernels, tensors, others)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    with use_backend("reference"):
        expected = linear_attention_block(**{name: tensor.double() for name, tensor in tensors.items()}, **others)
    limit = 2e-4 if dtype == torch.float32 else 0.3
    assert (found["out"].double() - expected).abs().max() <= limit * expected.abs().max()


def test_float16_gradients_of_any_scale():
    """float16 holds neither sums over positions nor one over their number: gradients scale with grad all the same."""
    tensors, others = make((1, 2, 16, 16, 1, 16, 16), torch.float16, DEVICE)
    small, large = (run(kernels, tensors, others, scale=scale) for scale in (1.0, 512.0))
    for name in ("dx", "dweight_qkv", "dmem_kv", "dweight", "dgain_in", "dgain", "dbias"):
        expected, found = small[name].float(), large[name].float() / 512
        assert torch.isfinite(found).all(), name
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-3 * expected.abs().max().item())


def test_rows_of_zeros():
    """x is zero at some positions, and y at all: both norms are clamped, and nothing flows through them."""
    tensors, others = make(SMALL, device=DEVICE)
    tensors["x"][:, :, 1] = 0
    assert_as_accurate_as_the_reference(tensors, others)
    tensors["weight"].zero_(), tensors["bias"].zero_()
    x = tensors["x"].bfloat16()
    with use_backend("triton"):
        assert torch.equal(linear_attention_block(**tensors | {"x": x}, residual=x, **others), x)
    found = run(kernels, tensors, others)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_a_gradient_of_another_layout():
    tensors, others = make(SMALL, torch.bfloat16, DEVICE)
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
        with use_backend("triton"):
            out = linear_attention_block(**leaves, **others)
        grad = torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape).bfloat16()
        out.backward(grad.contiguous(memory_format=layout))
        results.append([out, *(leaf.grad for leaf in leaves.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_deterministic_and_independent_of_the_batch():
    tensors, others = make((2, 2, 16, 16, 2, 20, 20), torch.bfloat16, DEVICE)
    first, second, alone = (
        run(kernels, tensors | {"x": x}, others, "x") for x in (tensors["x"], tensors["x"], tensors["x"][:1])
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert torch.equal(alone["out"], first["out"][:1])


@pytest.mark.parametrize("recompute", [False, True])
def test_keeps_the_arguments_and_small_matrices(recompute):
    """No map but x: neither qkv nor the output."""
    B, heads, D, C, _, _, _ = SMALL
    tensors, others = make(SMALL, torch.bfloat16, DEVICE)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    kept: list[torch.Tensor] = []
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_attention_block(**leaves, residual=leaves["x"], recompute=recompute, **others)
    given = {tensor.data_ptr() for tensor in tensors.values()}
    new = sorted(tensor.numel() for tensor in kept if tensor.data_ptr() not in given)
    hidden = heads * D
    assert new == sorted([B * 2 * hidden, B * hidden * C, B * hidden * D, B * hidden * C])


def test_the_residuals_gradient_is_no_copy():
    tensors, others = make(SMALL, torch.bfloat16, DEVICE)
    residual = tensors["x"].clone().requires_grad_()
    with use_backend("triton"):
        out = linear_attention_block(**tensors, residual=residual, **others)
    grad = torch.ones_like(out)
    (found,) = torch.autograd.grad(out, residual, grad)
    assert found.data_ptr() == grad.data_ptr()


@HALVES
@pytest.mark.release(but=lambda dtype, layout, **_: (dtype == torch.bfloat16) == (layout == torch.channels_last))
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_two_readers_of_the_output(dtype, layout):
    """A branch's gradient joins the map's in the kernels: parameters' gradients are those of their rounded sum."""
    tensors, others = make(SHAPES[2], dtype, DEVICE)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    values = [torch.randn(leaves["x"].shape, device=DEVICE).to(dtype).contiguous(memory_format=layout) for _ in "12"]

    def block(leaves: dict[str, torch.Tensor], backend: str = "triton") -> torch.Tensor:
        with use_backend(backend):
            return linear_attention_block(**leaves, residual=leaves["x"], **others)

    with branching():
        out = block(leaves)
    beside = branch(out)
    assert beside is not out and branch(out) is out and out.grad_fn is beside.grad_fn
    inputs, plain = list(leaves.values()), block(leaves)
    assert torch.equal(plain, out)
    alone = torch.autograd.grad(beside, inputs, values[0], retain_graph=True)
    for one, expected in zip(alone, torch.autograd.grad(plain, inputs, values[0], retain_graph=True), strict=True):
        assert torch.equal(one, expected)
    made, total = torch.autograd.grad((out, beside), inputs, values), (values[0].float() + values[1].float()).to(dtype)
    for name, one, expected in zip(leaves, made, torch.autograd.grad(plain, inputs, total), strict=True):
        assert name == "x" or torch.equal(one, expected), name
    by_reference = []
    for wide in (torch.Tensor.clone, torch.Tensor.double):
        given = {name: wide(tensor.detach()).requires_grad_() for name, tensor in tensors.items()}
        out = block(given, "reference")
        by_reference += torch.autograd.grad((out, out.view_as(out)), given["x"], [wide(value) for value in values])
    assert_close_to_truth(made[0], *by_reference, name="dx")


@pytest.mark.release(but=lambda kind: kind == "x")
@pytest.mark.parametrize("kind", ["none", "x", "other"])
def test_opcheck(kind):
    tensors, others = make(SMALL, torch.bfloat16, DEVICE)
    given = with_residual(tensors, kind)
    residual = given.pop("residual", None)
    leaves = [tensor.requires_grad_() for tensor in given.values()]
    residual = None if residual is None else residual.detach().requires_grad_()
    operators, options = torch.ops.ddpm_fast, (others["heads"], kind == "x")
    torch.library.opcheck(operators.linear_attention_block.default, (*leaves, residual, *options))
    detached = [leaf.detach() for leaf in leaves]
    out, *saved = operators.linear_attention_block(*detached, residual, *options)
    torch.library.opcheck(operators.linear_attention_block_backward.default, (out, *detached, *saved, *options))
    for grad2 in (out, None) if kind == "x" else ():
        given = (out, grad2, *detached, *saved, others["heads"])
        torch.library.opcheck(operators.linear_attention_block_backward_of_readers.default, given)


@pytest.mark.release(but=lambda kind: kind == "x")
@pytest.mark.parametrize("kind", ["none", "x"])
def test_compiles_whole(kind):
    tensors, others = make(SMALL, torch.bfloat16, DEVICE)

    def loss(tensors):
        out = linear_attention_block(**tensors, **others, residual=tensors["x"] if kind == "x" else None)
        return (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape)).sum(), out

    results = []
    with use_backend("triton"):
        for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
            leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
            value, out = function(leaves)
            value.backward()
            results.append([out, *(leaf.grad for leaf in leaves.values())])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled) and eager.stride() == compiled.stride()


REFUSED = {
    "float64": (lambda x: x.double(), "an argument is torch.float64, and the kernels compute in float32"),
    "float32": (lambda x: x.float(), "x is torch.float32, and tiles of it are too large for a program's registers"),
    "empty": (lambda x: x[:0], "x is empty"),
    "contiguous": (lambda x: x.contiguous(), "x is not channels-last, its strides are "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_and_the_steps_run(name):
    change, reason = REFUSED[name]
    tensors, others = make(SMALL, torch.bfloat16, DEVICE)
    tensors["x"] = change(tensors["x"])
    assert why_refused(tensors, others).startswith(reason)
    assert linear_attention_block(**tensors, **others).dtype == tensors["x"].dtype


def why_refused(tensors: dict, others: dict) -> str:
    """The reason of the block's own kernels."""
    first = dispatch.ops()["linear_attention_block"].implementations[0]
    assert first.name == "triton"
    return first.refuses(**tensors, residual=None, **{"recompute": False, **others})


def test_forced_the_steps_run_where_the_block_refuses():
    tensors, others = make(SMALL, torch.float32, DEVICE)
    with watch_choices() as choices, use_backend("triton"):
        out = linear_attention_block(**tensors, **others)
    expected = composite.linear_attention_block(**tensors, **others)
    assert torch.equal(out, expected) and not any(name == "reference" for _, name, _ in choices)


@pytest.mark.parametrize(
    "shape, reason",
    [
        ((1, 1, 16, 129, 1, 2, 2), "x has 129 channels, and a program holds at most 128"),
        ((1, 5, 32, 16, 1, 2, 2), "5 heads of 32 channels take 256 columns, and a program holds at most 128"),
    ],
)
def test_refuses_what_a_program_does_not_hold(shape, reason):
    tensors, others = make(shape, torch.bfloat16, DEVICE)
    assert why_refused(tensors, others) == reason
    with watch_choices() as choices:
        assert linear_attention_block(**tensors, **others).shape == tensors["x"].shape
    assert ("linear_attention", "triton", "accepts") in choices


def test_triton_comes_first_and_agrees_with_the_steps():
    tensors, others = make(SMALL, torch.bfloat16, DEVICE)
    with watch_choices() as choices:
        out = linear_attention_block(**tensors, residual=tensors["x"], **others)
    assert choices == {("linear_attention_block", "triton", "accepts"): 1}
    steps = composite.linear_attention_block(**tensors, residual=tensors["x"], **others)
    torch.testing.assert_close(out, steps, rtol=0.05, atol=0.05)


def test_a_second_derivative_is_refused_and_not_wrong():
    tensors, others = make(SMALL, torch.bfloat16, DEVICE)
    x = tensors["x"].requires_grad_()
    with use_backend("triton"):
        out = linear_attention_block(**tensors, **others)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
