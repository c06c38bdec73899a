"""attention: the reference, torch's sdpa, errors, the choice. test_triton.py and test_native.py test the kernels."""

from __future__ import annotations

import importlib.util
import os
import re

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import use_backend
from ddpm_fast.models.attention import Attention
from ddpm_fast.ops.attention import op, reference
from ddpm_fast.ops.attention.op import attention
from ddpm_fast.runtime import dispatch, extension, triton_launch
from ddpm_fast.testing.attention_cases import (
    LAYOUTS,
    SHAPES,
    SMALL,
    assert_as_accurate_as_the_reference,
    make,
    weights_like,
)

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[5]], ids=str)
def test_reference_is_torchs_attention_of_the_concatenated_memory(shape, layout):
    """Written out apart, from the docstring: float64, to rounding."""
    B, heads, D, h, w, M = shape
    qkv, mem_kv, _ = make(shape, layout, dtype=torch.float64)
    mem_kv = mem_kv.double()
    q, k, v = (t.reshape(B, heads, D, h * w).mT for t in qkv.chunk(3, dim=1))
    k, v = (torch.cat((memory.expand(B, -1, -1, -1), t), dim=2) for memory, t in zip(mem_kv, (k, v), strict=True))
    expected = F.scaled_dot_product_attention(q, k, v).mT.reshape(B, heads * D, h, w)
    with use_backend("reference"):
        torch.testing.assert_close(attention(qkv, mem_kv, heads=heads), expected)


def test_reference_without_memory_and_with_one_position():
    """A single key takes all of the softmax: out is v."""
    qkv, mem_kv, heads = make((2, 2, 8, 1, 1, 0), "nchw")
    assert torch.equal(reference.attention(qkv, mem_kv, heads=heads), qkv[:, 32:])


def test_reference_is_the_layer():
    """What Attention computes between its convolutions."""
    layer = Attention(8, heads=2, dim_head=4, num_mem_kv=3)
    x = torch.randn(2, 8, 3, 5)
    qkv = layer.to_qkv(layer.norm(x))
    for backend in ("reference", "sdpa"):
        with use_backend(backend):
            out = layer.to_out(attention(qkv, layer.mem_kv, heads=2))
        torch.testing.assert_close(out, layer(x))


def test_gradients_of_the_reference_are_its_differences():
    qkv, mem_kv, heads = make((2, 2, 3, 2, 2, 2), "nhwc", dtype=torch.float64)
    leaves = qkv.requires_grad_(), mem_kv.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, m: reference.attention(q, m, heads=heads), leaves)
    assert torch.autograd.gradgradcheck(lambda q, m: reference.attention(q, m, heads=heads), leaves)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sdpa(shape, layout):
    qkv, mem_kv, heads = make(shape, layout)
    assert_as_accurate_as_the_reference("sdpa", qkv, mem_kv, heads)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(backend, dtype):
    """The memory stays float32, as a parameter does under autocast, and its gradient too."""
    qkv, mem_kv, heads = make((2, 2, 24, 5, 13, 4), "nhwc", dtype=dtype)
    assert_as_accurate_as_the_reference(backend, qkv, mem_kv, heads)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_autocast_keeps_the_dtype_of_qkv(backend):
    qkv, mem_kv, heads = make(SMALL, "nhwc")
    with use_backend(backend):
        plain = attention(qkv, mem_kv, heads=heads)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(attention(qkv, mem_kv, heads=heads), plain)
            assert attention(qkv.bfloat16(), mem_kv, heads=heads).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_what_kernels_do_not_take(backend):
    for change in (lambda q: q[:0], lambda q: q[:, :, ::2], lambda q: q.double(), lambda q: q[:, :, :0]):
        qkv, mem_kv, heads = make(SMALL, "nhwc")
        qkv = change(qkv).requires_grad_()
        with use_backend(backend):
            out = attention(qkv, mem_kv, heads=heads)
        assert out.shape == (qkv.shape[0], qkv.shape[1] // 3, *qkv.shape[2:]) and out.dtype == qkv.dtype
        out.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_compiles_whole(backend, layout):
    qkv, mem_kv, heads = make(SMALL, layout)

    def loss(qkv, mem_kv):
        out = attention(qkv, mem_kv, heads=heads)
        return (out * weights_like(out)).sum(), out

    results = []
    with use_backend(backend):
        for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
            leaves = [tensor.detach().clone().requires_grad_() for tensor in (qkv, mem_kv)]
            value, out = function(*leaves)
            value.backward()
            results.append([out, *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)
    assert results[0][0].stride() == results[1][0].stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
def test_meta_tensors(backend, layout, monkeypatch):
    """Shapes, dtypes and memory formats without a kernel, as benchmarks/traffic.py counts them."""
    monkeypatch.setattr(triton_launch, "why_not_triton", lambda device: None)
    qkv, mem_kv, heads = make((2, 3, 8, 4, 5, 4), layout, "meta", torch.bfloat16)
    qkv.requires_grad_(), mem_kv.requires_grad_()
    with use_backend(backend):
        out = attention(qkv, mem_kv, heads=heads)
    assert out.shape == (2, 24, 4, 5) and out.dtype == qkv.dtype
    assert out.is_contiguous(memory_format=LAYOUTS[layout])
    out.backward(torch.empty_like(out))
    assert qkv.grad.shape == qkv.shape and mem_kv.grad.shape == mem_kv.shape and mem_kv.grad.dtype == torch.float32


ERRORS = {
    "qkv type": ({"qkv": [1]}, TypeError, "qkv must be a tensor, got list"),
    "memory type": ({"mem_kv": None}, TypeError, "mem_kv must be a tensor, got NoneType"),
    "integers": (
        {"qkv": torch.zeros(1, 12, 2, 2).int()},
        TypeError,
        "qkv must be float32, float16, bfloat16 or float64, got torch.int32",
    ),
    "complex memory": (
        {"mem_kv": torch.zeros(2, 2, 3, 2, dtype=torch.complex64)},
        TypeError,
        "mem_kv must be float32, float16, bfloat16 or float64, got torch.complex64",
    ),
    "device": (
        {"mem_kv": torch.zeros(2, 2, 3, 2, device="meta")},
        ValueError,
        "mem_kv must be on the device of qkv, cpu, got meta",
    ),
    "no heads": ({"heads": 0}, ValueError, "heads must be a positive integer, got 0"),
    "part of a head": ({"heads": 2.0}, ValueError, "heads must be a positive integer, got 2.0"),
    "three dimensions": (
        {"qkv": torch.zeros(1, 12, 4)},
        ValueError,
        "qkv must have shape (B, 3·2·D, h, w), got (1, 12, 4)",
    ),
    "channels": (
        {"qkv": torch.zeros(1, 15, 2, 2)},
        ValueError,
        "qkv must have shape (B, 3·2·D, h, w), got (1, 15, 2, 2)",
    ),
    "no channels": (
        {"qkv": torch.zeros(1, 0, 2, 2)},
        ValueError,
        "qkv must have shape (B, 3·2·D, h, w), got (1, 0, 2, 2)",
    ),
    "memory heads": (
        {"mem_kv": torch.zeros(2, 3, 3, 2)},
        ValueError,
        "mem_kv must have shape (2, 2, M, 2), got (2, 3, 3, 2)",
    ),
    "memory dimensions": (
        {"mem_kv": torch.zeros(2, 2, 2, 3)},
        ValueError,
        "mem_kv must have shape (2, 2, M, 2), got (2, 2, 2, 3)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_named(name):
    change, error, message = ERRORS[name]
    arguments = {"qkv": torch.zeros(1, 12, 2, 2), "mem_kv": torch.zeros(2, 2, 3, 2), "heads": 2}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        attention(**arguments | change)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter accepts the CPU")
def test_on_the_cpu_triton_refuses_with_its_reason_and_native_or_sdpa_runs():
    qkv, mem_kv, heads = make(SMALL, "nhwc")
    reason = "tensors are on cpu, and Triton kernels need CUDA" if HAS_TRITON else "Triton is not installed"
    message = f"attention: backend 'triton' was forced and refuses: {reason}"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        attention(qkv, mem_kv, heads=heads)
    lines = dispatch.explain(devices=[torch.device("cpu")]).splitlines()
    rows = [line for line in lines if line.startswith(("attention ", "attention,"))]
    runs = "* sdpa" if extension.load() is None else "* native"
    assert [reason in row for row in rows] == [True, False, False, False] * 4
    assert sum(runs in row for row in rows) == 4 and sum("* " in row for row in rows) == 4


def test_ours_stays_where_deterministic_algorithms_are_asked_for(monkeypatch):
    """Torch's backward adds with atomics; what is compiled follows the switch as well."""
    monkeypatch.setattr(triton_launch, "why_not_triton", lambda device: None)
    qkv, mem_kv = torch.empty(1, 48, 64, 64, device="meta"), torch.empty(2, 2, 4, 8, device="meta")

    def reason(qkv, mem_kv):
        return op._triton_yields(qkv, mem_kv, heads=2) or "stays"

    compiled = torch.compile(reason, backend="eager", fullgraph=True)
    was = torch.are_deterministic_algorithms_enabled()
    chosen = {}
    try:
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            choice = op._attention_op.choose(qkv, mem_kv, heads=2).name
            chosen[deterministic] = choice, compiled(qkv, mem_kv) == "stays"
    finally:
        torch.use_deterministic_algorithms(was)
    assert chosen == {False: ("sdpa", False), True: ("triton", True)}


def test_refuses_samples_past_32_bits(monkeypatch):
    monkeypatch.setattr(triton_launch, "why_not_triton", lambda device: None)
    qkv, mem_kv = torch.empty(1, 384, 2**12, 2**11, device="meta"), torch.empty(2, 4, 4, 32, device="meta")
    reason = "a sample has 3221225472 elements, and the kernels take at most 2147418112"
    assert op._triton_refuses(qkv, mem_kv, heads=4) == reason


@pytest.mark.parametrize("dtype, largest", [(torch.float32, 16), (torch.float16, 32), (torch.bfloat16, 32)])
def test_the_rule_between_triton_and_sdpa(dtype, largest, monkeypatch):
    """By positions, heads and dtype; what it leaves to sdpa can still be forced."""
    monkeypatch.setattr(triton_launch, "why_not_triton", lambda device: None)
    mem_kv = torch.empty(2, 2, 4, 8, device="meta")
    chosen = {}
    for side in (1, largest, largest + 1):
        qkv = torch.empty(1, 48, largest, side, device="meta", dtype=dtype)
        chosen[side] = op._attention_op.choose(qkv, mem_kv, heads=2).name
        with use_backend("triton"):
            assert op._attention_op.choose(qkv, mem_kv, heads=2).name == "triton"
    assert chosen == {1: "triton", largest: "triton", largest + 1: "sdpa"}
    wide = torch.empty(1, 3 * 65, 1, 1, device="meta", dtype=dtype), torch.empty(2, 1, 4, 65, device="meta")
    reason = op._triton_yields(*wide, heads=1)
    if dtype == torch.float32:
        assert reason == "D = 65 is past the 64 up to which ours is assumed faster than sdpa in torch.float32"
    else:
        assert reason is None
