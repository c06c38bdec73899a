"""The Triton kernels of attention against the reference in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see conftest.py.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.ops.attention import triton as kernel
from ddpm_fast.ops.attention.op import attention
from ddpm_fast.runtime import dispatch, extension, triton_launch
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.attention_cases import (
    LAYOUTS,
    SHAPES,
    SMALL,
    assert_as_accurate_as_the_reference,
    make,
    run,
    weights_like,
)

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"


# In the arithmetic of sm_80: a tile that is full, tiles that are not, and the widest heads.
@pytest.mark.release(
    but=lambda shape, layout, _arithmetic=None: (
        _arithmetic is None or (layout == "nhwc" and shape in (SHAPES[2], SHAPES[3], SHAPES[9]))
    )
)
@pytest.mark.arithmetic
@pytest.mark.parametrize(
    "shape, layout", [(s, "nhwc") for s in SHAPES] + [(s, "nchw") for s in (*SHAPES[:4], SHAPES[-1])], ids=str
)
def test_shapes(shape, layout):
    assert_as_accurate_as_the_reference("triton", *make(shape, layout, DEVICE))


@pytest.mark.arithmetic
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    """The map in a half type and the memory in float32, as under autocast; then both in half, then only the memory."""
    qkv, mem_kv, heads = make((1, 1, 24, 5, 13, 4), "nhwc", DEVICE, dtype)
    assert_as_accurate_as_the_reference("triton", qkv, mem_kv, heads)
    assert_as_accurate_as_the_reference("triton", qkv.contiguous(), mem_kv, heads)
    assert_as_accurate_as_the_reference("triton", qkv, mem_kv.to(dtype), heads)
    assert_as_accurate_as_the_reference("triton", qkv.float(), mem_kv.to(dtype), heads)


def test_memory_of_another_layout():
    qkv, mem_kv, heads = make(SMALL, "nhwc", DEVICE)
    other = mem_kv.transpose(-1, -2).contiguous().transpose(-1, -2)
    with use_backend("triton"):
        assert torch.equal(attention(qkv, other, heads=heads), attention(qkv, mem_kv, heads=heads))


def test_gradients_of_another_layout():
    """A contiguous and an expanded gradient of a channels-last output."""
    qkv, mem_kv, heads = make((2, 1, 16, 5, 7, 4), "nhwc", DEVICE)
    found = []
    for change in (lambda grad: grad, lambda grad: grad.contiguous(memory_format=torch.channels_last)):
        leaf = qkv.clone().requires_grad_()
        with use_backend("triton"):
            out = attention(leaf, mem_kv, heads=heads)
        found.append(torch.autograd.grad(out, leaf, change(weights_like(out)), retain_graph=True)[0])
        assert torch.isfinite(torch.autograd.grad(out.sum(), leaf)[0]).all()
    assert torch.equal(*found)


@pytest.mark.arithmetic
@pytest.mark.parametrize("scale", [8.0, 1e-4])
def test_large_and_small_scores(scale):
    """Scores of a few hundred, whose exponentials overflow unless the largest is subtracted; and a flat softmax.

    Where one key takes all, dp − delta cancels, and with delta from the rounded output less exactly than within torch's
    softmax: as accurate as torch's own fused attention, which does the same.
    """
    qkv, mem_kv, heads = make((1, 1, 16, 5, 13, 4), "nhwc", DEVICE)
    qkv[:, : 2 * qkv.shape[1] // 3] *= scale
    mem_kv[0] *= scale
    assert_as_accurate_as_the_reference("triton", qkv, mem_kv, heads, "sdpa")


@pytest.mark.arithmetic
def test_very_negative_scores():
    """Every score near −3000: keys that do not exist, with a score of 0, must not show."""
    qkv, mem_kv, heads = make((1, 1, 16, 5, 7, 2), "nhwc", DEVICE)
    qkv[:, :16], qkv[:, 16:32], mem_kv[0] = 30, -25 + 0.1 * qkv[:, 16:32], -25
    assert_as_accurate_as_the_reference("triton", qkv, mem_kv, heads)


def test_lse_is_what_the_docstring_says():
    qkv, mem_kv, heads = make((1, 2, 16, 5, 7, 4), "nhwc", DEVICE)
    lse = torch.ops.ddpm_fast.attention(qkv, mem_kv, heads)[1]
    q, k, _ = qkv.double().reshape(1, 3, 2, 16, 35).unbind(1)
    scores = q.transpose(-1, -2) @ torch.cat((mem_kv[0].double()[None], k.transpose(-1, -2)), 2).transpose(-1, -2) / 4
    expected = scores.logsumexp(-1) * 1.4426950408889634
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)


def test_finite_differences():
    """Central differences of the kernels' own forward along a random direction."""
    qkv, mem_kv, heads = make((2, 1, 16, 5, 7, 4), "nhwc", DEVICE)
    gradients = run("triton", qkv, mem_kv, heads)
    tensors = {"qkv": qkv, "mem_kv": mem_kv}
    for name, tensor in tensors.items():
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
        values = []
        with use_backend("triton"):
            for h in (1e-2, -1e-2):
                out = attention(**{**tensors, name: tensor + h * direction}, heads=heads).double()
                values.append((out * weights_like(out)).sum())
        expected = ((values[0] - values[1]) / 2e-2).item()
        actual = (gradients[f"d{name}"] * direction).sum().item()
        assert abs(actual - expected) < 5e-3 * max(1, abs(expected)), name


def test_deterministic_and_independent_of_the_batch():
    qkv, mem_kv, heads = make((2, 1, 16, 10, 10, 4), "nhwc", DEVICE)
    first, second = (run("triton", qkv, mem_kv, heads) for _ in range(2))
    alone = run("triton", qkv[:1], mem_kv, heads)["out"]
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert torch.equal(alone, first["out"][:1])


def test_keeps_only_the_inputs_the_output_and_one_float_per_position():
    B, heads, D, h, w, _ = SMALL
    qkv, mem_kv, _ = make(SMALL, "nhwc", DEVICE)
    qkv.requires_grad_(), mem_kv.requires_grad_()
    kept = []
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = attention(qkv, mem_kv, heads=heads)
    given = {tensor.data_ptr() for tensor in (qkv, mem_kv, out)}
    assert given <= {tensor.data_ptr() for tensor in kept}
    assert [t.shape for t in kept if t.data_ptr() not in given] == [(B, heads, h * w)]


@pytest.mark.release(but=lambda layout, dtype: layout == "nhwc")
@pytest.mark.parametrize("layout, dtype", [("nhwc", torch.bfloat16), ("nchw", torch.float32)])
def test_opcheck(layout, dtype):
    qkv, mem_kv, heads = make(SMALL, layout, DEVICE, dtype)
    arguments = (qkv.requires_grad_(), mem_kv.requires_grad_(), heads)
    torch.library.opcheck(torch.ops.ddpm_fast.attention.default, arguments)
    qkv, mem_kv = qkv.detach(), mem_kv.detach()
    out, lse = torch.ops.ddpm_fast.attention(qkv, mem_kv, heads)
    arguments = (torch.ones_like(out), qkv, mem_kv, out, lse, heads)
    torch.library.opcheck(torch.ops.ddpm_fast.attention_backward.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_whole(layout):
    qkv, mem_kv, heads = make(SMALL, layout, DEVICE)

    def loss(qkv, mem_kv):
        out = attention(qkv, mem_kv, heads=heads)
        return (out * weights_like(out)).sum(), out

    results = []
    with use_backend("triton"):
        for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
            leaves = [tensor.detach().clone().requires_grad_() for tensor in (qkv, mem_kv)]
            value, out = function(*leaves)
            value.backward()
            results.append([out, *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled) and eager.stride() == compiled.stride()


def test_autocast_keeps_the_dtype_of_qkv_and_inference_mode_runs():
    qkv, mem_kv, heads = make(SMALL, "nhwc", DEVICE)
    with use_backend("triton"):
        plain = attention(qkv, mem_kv, heads=heads)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert torch.equal(attention(qkv, mem_kv, heads=heads), plain)
            assert attention(qkv.bfloat16(), mem_kv, heads=heads).dtype == torch.bfloat16
        with torch.inference_mode():
            assert torch.equal(attention(qkv, mem_kv, heads=heads), plain)


def test_a_second_derivative_is_refused_and_not_wrong():
    qkv, mem_kv, heads = make(SMALL, "nhwc", DEVICE)
    with use_backend("triton"):
        out = attention(qkv.requires_grad_(), mem_kv, heads=heads)
    with pytest.raises(RuntimeError, match="attention: the Triton kernel's gradient cannot be differentiated again"):
        torch.autograd.grad(out.square().sum(), qkv, create_graph=True)


REFUSED = {
    "float64": (lambda q, m: (q.double(), m), "qkv is torch.float64, and the kernels compute in float32"),
    "float64 memory": (lambda q, m: (q, m.double()), "mem_kv is torch.float64, and the kernels compute in float32"),
    "empty": (lambda q, m: (q[:0], m), "qkv is empty"),
    "strided": (lambda q, m: (q[:, :, ::2], m), "qkv is neither contiguous nor channels-last, its strides are "),
    "large heads": (
        lambda q, m: (q.new_zeros(1, 3 * 2 * 129, 1, 1), m.new_zeros(2, 2, 1, 129)),
        "heads have 129 dimensions, and a program of the kernels holds at most 128",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_and_another_runs(name):
    change, reason = REFUSED[name]
    qkv, mem_kv, heads = make(SMALL, "nhwc", DEVICE)
    qkv, mem_kv = change(qkv, mem_kv)
    with use_backend("triton"), pytest.raises(RuntimeError, match=f"attention: .* refuses: {reason}"):
        attention(qkv, mem_kv, heads=heads)
    out = attention(qkv, mem_kv, heads=heads)
    assert out.shape == (qkv.shape[0], qkv.shape[1] // 3, *qkv.shape[2:]) and torch.isfinite(out).all()


def test_many_positions_are_left_to_torch_unless_forced():
    table = dispatch.explain(devices=[torch.device(DEVICE)]).splitlines()
    rows = [line for line in table if line.startswith(("attention ", "attention,"))]
    other = "native" if DEVICE == "cpu" and extension.load() is not None else "sdpa"
    assert [row.split("* ")[1].split()[0] for row in rows if "* " in row] == ["triton", *[other] * 3]
    whys = [row for row in rows if " up to which ours is assumed faster than sdpa in " in row]
    assert ["N = 4096 is past the 256 " in row for row in whys] == [True, False, False]
    assert ["N = 4096 is past the 1024 " in row for row in whys] == [False, True, False]
    assert ["D = 128 is past the 64 " in row for row in whys] == [False, False, True]
    qkv, mem_kv, heads = make((1, 1, 8, 33, 32, 0), "nhwc", DEVICE, torch.float16)
    outs = {}
    for backend in (None, other, "triton"):
        with use_backend(backend):
            outs[backend] = attention(qkv, mem_kv, heads=heads)
    assert torch.equal(outs[None], outs[other]) and not torch.equal(outs[None], outs["triton"])


def test_tf32_only_where_the_user_lets_torch_use_it():
    assert kernel.product_kind(torch.float32) == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert kernel.product_kind(torch.float32) == "tf32"
        assert kernel.product_kind(torch.bfloat16) == "half"
        qkv, mem_kv, heads = make(SMALL, "nhwc", DEVICE)
        torch.testing.assert_close(
            run("triton", qkv, mem_kv, heads)["out"], run("reference", qkv, mem_kv, heads)["out"], rtol=1e-2, atol=1e-2
        )
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("name", ["fwd", "dq", "dkv"])
def test_tiles_of_every_size(name):
    """A row of the table for every head, and blocks that a product takes, no larger than the map needs."""
    for kind in ("half", "tf32", "ieee"):
        for D in (1, 8, 32, 33, 64, 65, 128):
            tile = kernel.choose_tile(name, kind, 4096, D)
            assert tile.queries >= 16 and tile.keys >= 16
            small = kernel.choose_tile(name, kind, 1, D)
            assert small.queries == small.keys == 16
