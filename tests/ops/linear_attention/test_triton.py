"""The Triton kernels of linear_attention against the reference in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see conftest.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ddpm_fast.ops.linear_attention import triton as kernel
from ddpm_fast.ops.linear_attention.launch import Tile
from ddpm_fast.ops.linear_attention.op import linear_attention
from ddpm_fast.runtime import dispatch, triton_launch
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.linear_attention_cases import (
    LAYOUTS,
    MAPS,
    SMALL,
    assert_as_accurate_as_the_reference,
    make,
    run,
)

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"

# B, heads, D, C, M, H, W
SHAPES = [
    (1, 1, 8, 3, 0, 1, 1),
    (2, 4, 32, 64, 4, 4, 8),
    (1, 3, 10, 24, 5, 7, 9),
    (1, 1, 64, 130, 1, 5, 7),
    (1, 3, 20, 70, 2, 3, 3),
    (1, 1, 16, 16, 4, 33, 31),
]


# In the arithmetic of sm_80: heads and rows that fill no block, and the widest of both.
@pytest.mark.release(but=lambda shape, _arithmetic=None: _arithmetic is None or shape in (SHAPES[2], SHAPES[3]))
@pytest.mark.arithmetic
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    assert_as_accurate_as_the_reference(*make(shape, "nhwc", DEVICE))


@pytest.mark.release(but=lambda side, _arithmetic=None: _arithmetic is None or side < 64)
@pytest.mark.arithmetic
@pytest.mark.parametrize("side", [16, 32, 64])
def test_sums_over_many_positions(side):
    """Errors of the context and of the weights' gradients do not grow with the number of tiles."""
    assert_as_accurate_as_the_reference(*make((1, 1, 32, 32, 4, side, side), "nhwc", DEVICE))


def test_contiguous_maps():
    assert_as_accurate_as_the_reference(*make((1, 3, 10, 24, 5, 7, 9), "nchw", DEVICE))


def test_without_residual_and_with_a_weight_of_two_dimensions():
    tensors, others = make(SMALL, device=DEVICE, residual=False)
    tensors["weight"], tensors["gain"] = tensors["weight"].flatten(1), tensors["gain"].flatten()
    assert_as_accurate_as_the_reference(tensors, others)


@pytest.mark.release(but=lambda dtype, _arithmetic=None: (dtype == torch.float16) == bool(_arithmetic))
@pytest.mark.arithmetic
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    """Maps in a half type and parameters in float32, as under autocast; then all in half."""
    tensors, others = make((2, 4, 32, 72, 4, 4, 8), device=DEVICE)
    for name in MAPS:
        tensors[name] = tensors[name].to(dtype)
    assert_as_accurate_as_the_reference(tensors, others)
    tensors, others = make((1, 1, 100, 24, 2, 3, 5), device=DEVICE)
    assert_as_accurate_as_the_reference({name: tensor.to(dtype) for name, tensor in tensors.items()}, others)


@pytest.mark.arithmetic
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_and_queries_of_large_magnitude(dtype):
    """exp of them overflows or vanishes: softmax is finite only relative to the largest, memory included."""
    tensors, others = make((1, 2, 16, 16, 3, 13, 13), device=DEVICE)
    offset = torch.tensor([120.0, -120.0], device=DEVICE).repeat(16)  # of the channels of k
    steps = {name: (tensors[name] * 16).round() / 16 for name in ("qkv", "mem_kv")}  # exact in either dtype
    steps["qkv"][:, :64] += 120
    steps["qkv"][:, 32:64] += (offset - 120)[:, None, None]
    steps["mem_kv"][0] += offset.reshape(2, 16, 1)
    tensors |= steps
    tensors["qkv"] = tensors["qkv"].to(dtype).contiguous(memory_format=torch.channels_last)
    assert_as_accurate_as_the_reference(tensors, others)


def test_one_key_that_leads_by_far():
    tensors, others = make((1, 2, 16, 16, 3, 13, 13), device=DEVICE)
    tensors["qkv"][:, :64] *= 100
    tensors["qkv"][:, 40, -1, -1] = 1e6
    tensors["mem_kv"][0, 1, 3, 1] = 1e8
    with use_backend("reference"):
        expected = linear_attention(**{name: tensor.double() for name, tensor in tensors.items()}, **others)
    found = run("triton", tensors, others)
    torch.testing.assert_close(found["out"].double(), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_float16_gradients_of_any_scale():
    """float16 holds neither sums over positions nor one over their number: gradients scale with grad all the same."""
    tensors, others = make((1, 1, 16, 16, 1, 16, 16), device=DEVICE, residual=False)
    tensors = {n: t.half() if n == "qkv" else t for n, t in tensors.items()}
    results = []
    for scale in (1.0, 1024.0):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
        with use_backend("triton"):
            out = linear_attention(**leaves, **others)
        out.backward(torch.full_like(out, 0.5) * scale)
        results.append({name: leaf.grad.float() / scale for name, leaf in leaves.items()})
    for name, small in results[0].items():
        assert torch.isfinite(results[1][name]).all(), name
        torch.testing.assert_close(results[1][name], small, rtol=2e-3, atol=1e-4 * small.abs().max().item())


@pytest.mark.parametrize("C", [32, 72])
def test_float16_of_rows_that_are_small(C, monkeypatch):
    """√C / ‖y‖ is beyond float16, its products with q̂ and grad are not. Sums with the rows, and in a kernel apart."""
    if triton_launch.interpreted():
        monkeypatch.setattr(
            kernel, "kernel_precision", lambda: "ieee"
        )  # factors of products are float16 then, as on a GPU
    tensors, others = make((2, 2, 16, C, 2, 5, 7), device=DEVICE, residual=False)
    tensors |= {"qkv": tensors["qkv"].half(), "weight": 3e-5 * tensors["weight"], "bias": 0 * tensors["bias"]}
    assert_as_accurate_as_the_reference(tensors, others, scale=1e-4)


@pytest.mark.arithmetic
def test_chunks_that_are_no_power_of_two(monkeypatch):
    """18 of them, which the merge adds eight at a time."""
    choose = kernel.choose_launch

    def cut(*args, **options):
        return dataclasses.replace(choose(*args, **options), context=Tile(16, 1))

    monkeypatch.setattr(kernel, "choose_launch", cut)
    assert_as_accurate_as_the_reference(*make((1, 1, 32, 16, 2, 18, 16), device=DEVICE))


def test_rows_of_zeros():
    """No values and no bias: the norm is clamped, and the output is the residual."""
    tensors, others = make(SMALL, device=DEVICE)
    tensors["qkv"][:, 32:] = 0
    tensors["mem_kv"][1] = 0
    tensors["bias"].zero_()
    with use_backend("triton"):
        assert torch.equal(linear_attention(**tensors, **others), tensors["residual"])
    gradients = run("triton", tensors, others)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_maps_of_other_layouts_and_dtypes():
    """A residual and a gradient in another layout than the output."""
    tensors, others = make(SMALL, device=DEVICE)
    plain = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    other = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    other["residual"] = tensors["residual"].contiguous().double().float().requires_grad_()
    results = []
    for leaves, layout in ((plain, torch.channels_last), (other, torch.contiguous_format)):
        with use_backend("triton"):
            out = linear_attention(**leaves, **others)
        grad = torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape)
        out.backward(grad.contiguous(memory_format=layout))
        results.append([out, *(leaf.grad for leaf in leaves.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_deterministic_and_independent_of_the_batch():
    tensors, others = make((2, 2, 16, 16, 2, 20, 20), device=DEVICE)
    first, second = run("triton", tensors, others), run("triton", tensors, others)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    alone = {name: tensor[:1] if name in MAPS else tensor for name, tensor in tensors.items()}
    with use_backend("triton"):
        assert torch.equal(linear_attention(**alone, **others), first["out"][:1])


def test_keeps_the_arguments_and_small_matrices():
    B, heads, D, C, M, H, W = SMALL
    tensors, others = make(SMALL, device=DEVICE)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    kept = []
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = linear_attention(**leaves, **others)
    given = {tensor.data_ptr() for tensor in tensors.values()}
    new = sorted(tensor.numel() for tensor in kept if tensor.data_ptr() not in given)
    assert new == sorted([B * heads * D * D, B * heads * 2 * D, B * heads * D * C])
    assert not {tensors["residual"].data_ptr(), out.data_ptr()} & {tensor.data_ptr() for tensor in kept}


def test_the_residuals_gradient_is_no_copy():
    tensors, others = make(SMALL, device=DEVICE)
    residual = tensors["residual"].requires_grad_()
    with use_backend("triton"):
        out = linear_attention(**tensors, **others)
    grad = torch.ones_like(out)
    (found,) = torch.autograd.grad(out, residual, grad)
    assert found.data_ptr() == grad.data_ptr()


@pytest.mark.release(but=lambda residual: residual)
@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(residual):
    tensors, others = make((2, 2, 8, 70, 3, 3, 4) if residual else SMALL, device=DEVICE, residual=residual)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()] + ([] if residual else [None])
    torch.library.opcheck(torch.ops.ddpm_fast.linear_attention.default, (*leaves, others["heads"]))
    detached = [None if leaf is None else leaf.detach() for leaf in leaves]
    out, *saved = torch.ops.ddpm_fast.linear_attention(*detached, others["heads"])
    arguments = (out, *detached[:5], *saved, others["heads"])
    torch.library.opcheck(torch.ops.ddpm_fast.linear_attention_backward.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_whole(layout):
    tensors, others = make(SMALL, layout, DEVICE)

    def loss(tensors):
        out = linear_attention(**tensors, **others)
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


def test_autocast_and_inference_mode_keep_the_dtype_of_qkv():
    tensors, others = make(SMALL, device=DEVICE)
    with use_backend("triton"), torch.inference_mode(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert linear_attention(**tensors, **others).dtype == torch.float32
        tensors["qkv"] = tensors["qkv"].bfloat16()
        out = linear_attention(**tensors, **others)
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)


REFUSED = {
    "float64": (lambda t: t["qkv"].double(), "qkv is torch.float64, and the kernels compute in float32"),
    "empty": (lambda t: t["qkv"][:0], "qkv is empty"),
    "strided": (lambda t: t["qkv"][:, :, ::2], "qkv is neither contiguous nor channels-last, its strides are "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_and_the_reference_runs(name):
    change, reason = REFUSED[name]
    tensors, others = make(SMALL, device=DEVICE, residual=False)
    tensors["qkv"] = change(tensors)
    with use_backend("triton"), pytest.raises(RuntimeError, match=f"linear_attention: .* refuses: {reason}"):
        linear_attention(**tensors, **others)
    assert linear_attention(**tensors, **others).dtype == tensors["qkv"].dtype


@pytest.mark.parametrize("dtype, D", [(torch.float32, 65), (torch.bfloat16, 129)])
def test_refuses_heads_that_a_program_does_not_hold(dtype, D):
    tensors, others = make((1, 1, D, 16, 1, 2, 2), device=DEVICE)
    tensors["qkv"] = tensors["qkv"].to(dtype)
    reason = f"a head has {D} channels, and the kernels hold at most {D - 1} of {dtype}"
    with use_backend("triton"), pytest.raises(RuntimeError, match=reason):
        linear_attention(**tensors, **others)
    assert linear_attention(**tensors, **others).shape == (1, 16, 2, 2)


def test_triton_is_preferred_where_it_runs():
    table = dispatch.explain(devices=[torch.device(DEVICE)]).splitlines()
    rows = [line for line in table if line.startswith("linear_attention ")]
    assert len(rows) == 3
    assert all(("* triton" in row and "accepts" in row) == ("triton" in row) for row in rows)


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_an_output_without_a_gradient_gives_none():
    tensors, others = make(SMALL, device=DEVICE)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    with use_backend("triton"):
        WithoutGradient.apply(linear_attention(**leaves, **others)).sum().backward()
    assert all(leaf.grad is None for leaf in leaves.values())


def test_a_second_derivative_is_refused_and_not_wrong():
    tensors, others = make(SMALL, device=DEVICE)
    qkv = tensors["qkv"].requires_grad_()
    with use_backend("triton"):
        out = linear_attention(**tensors, **others)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
