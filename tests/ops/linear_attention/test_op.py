"""linear_attention: the reference, errors, refusals. test_triton.py and test_native.py test the kernels."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from ddpm_fast import use_backend
from ddpm_fast.models.attention import LinearAttention
from ddpm_fast.ops.linear_attention.op import linear_attention
from ddpm_fast.runtime import dispatch
from ddpm_fast.testing.linear_attention_cases import LAYOUTS, SMALL, make, run
from ddpm_fast.testing.truth import assert_close_to_truth

HAS_TRITON = importlib.util.find_spec("triton") is not None

both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def upstream_tail(attention: torch.nn.Module, qkv: torch.Tensor, residual: torch.Tensor) -> dict[str, torch.Tensor]:
    """Upstream's LinearAttention after its qkv product, plus a residual; the output and every gradient."""
    qkv, residual = (tensor.clone().requires_grad_() for tensor in (qkv, residual))
    hook = attention.to_qkv.register_forward_hook(lambda module, args, out: qkv)
    attention.zero_grad()
    out = attention(torch.zeros_like(residual)) + residual
    hook.remove()
    out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype))
    conv, norm = attention.to_out
    leaves = {"qkv": qkv, "mem_kv": attention.mem_kv, "weight": conv.weight, "bias": conv.bias, "gain": norm.g}
    gradients = {f"d{name}": leaf.grad.clone() for name, leaf in (leaves | {"residual": residual}).items()}
    return {"out": out.detach()} | gradients


@both_layouts
@pytest.mark.parametrize("M", [1, 4])
def test_reference_is_upstreams_tail(upstream, layout, M):
    """Output and every gradient: the same in float64, and as accurate as upstream's own in float32."""
    tensors, others = make((2, 3, 10, 24, M, 5, 6), layout)
    attention = upstream.LinearAttention(24, heads=3, dim_head=10, num_mem_kv=M)
    conv, norm = attention.to_out
    attention.mem_kv.data, conv.weight.data, conv.bias.data, norm.g.data = list(tensors.values())[1:5]
    expected = upstream_tail(attention, tensors["qkv"], tensors["residual"])
    actual = run("reference", tensors, others)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    truth = run("reference", doubles, others)
    upstream_truth = upstream_tail(attention.double(), doubles["qkv"], doubles["residual"])
    for name in truth:
        torch.testing.assert_close(truth[name], upstream_truth[name], rtol=1e-9, atol=1e-11, msg=name)
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name)


@both_layouts
def test_gradients_of_the_reference_are_its_differences(layout):
    """Finite differences in float64, of the first and the second derivative."""
    tensors, others = make((1, 2, 3, 4, 2, 2, 2), layout)
    leaves = [tensor.double().requires_grad_() for tensor in tensors.values()]

    def function(*leaves):
        return linear_attention(**dict(zip(tensors, leaves, strict=True)), **others)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@both_layouts
def test_output_has_dtype_and_format_of_qkv(layout):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors, others = make(SMALL, layout)
        tensors["qkv"] = tensors["qkv"].to(dtype)
        out = linear_attention(**tensors, **others)
        assert out.dtype == dtype and out.is_contiguous(memory_format=LAYOUTS[layout])
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            assert torch.equal(linear_attention(**tensors, **others), out)


def test_reference_takes_what_kernels_do_not():
    for change in (lambda x: x[:0], lambda x: x[:, :, ::2], lambda x: x[:, :, :0]):
        tensors, others = make(SMALL, residual=False)
        qkv = tensors["qkv"] = change(tensors["qkv"]).requires_grad_()
        out = linear_attention(**tensors, **others)
        assert out.shape == (qkv.shape[0], SMALL[3], *qkv.shape[2:])
        out.sum().backward()
        assert torch.isfinite(qkv.grad).all()


def kept_bytes(function) -> int:
    """Of the distinct storages that autograd saves, without leaves."""
    storages = {}

    def pack(tensor):
        if not tensor.is_leaf:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    assert out.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@both_layouts
def test_reference_keeps_less_than_the_formula_in_a_row(layout):
    """The map between attention and the output projection does not exist."""
    C, heads, D, size = 24, 2, 16, 24
    attention = LinearAttention(C, heads, D)
    qkv = torch.randn(2, 3 * heads * D, size, size).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    conv, norm = attention.to_out
    arguments = (qkv, attention.mem_kv, conv.weight, conv.bias, norm.g)

    def in_a_row():
        q, k, v = qkv.reshape(2, 3, heads, D, size * size).unbind(1)
        mem_k, mem_v = attention.mem_kv[:, None].expand(-1, 2, -1, -1, -1)
        k = torch.cat((mem_k, k), dim=-1).softmax(dim=-1)
        context = (k @ torch.cat((mem_v, v), dim=-1).transpose(-1, -2)) * D**-0.5
        return attention.to_out((context.transpose(-1, -2) @ q.softmax(dim=-2)).reshape(2, heads * D, size, size))

    with use_backend("reference"):  # of the norm in a row, too
        ours = kept_bytes(lambda: linear_attention(*arguments, heads=heads))
        torch.testing.assert_close(linear_attention(*arguments, heads=heads), in_a_row(), rtol=1e-4, atol=1e-5)
        one_map = 2 * size**2 * heads * D * 4
        assert ours <= kept_bytes(in_a_row) - 0.9 * one_map  # and small matrices


def test_compiles_whole():
    tensors, others = make(SMALL)
    qkv = tensors["qkv"].requires_grad_()
    compiled = torch.compile(linear_attention, backend="aot_eager", fullgraph=True)(**tensors, **others)
    torch.testing.assert_close(compiled, linear_attention(**tensors, **others))
    compiled.sum().backward()
    assert torch.isfinite(qkv.grad).all()


ERRORS = {
    "qkv": ({"qkv": torch.zeros(2, 48, 3)}, ValueError, r"qkv must have shape \(B, 3·heads·D, H, W\), got \(2, 48, 3"),
    "qkv type": ({"qkv": [1]}, TypeError, "qkv must be a tensor, got list"),
    "integers": ({"bias": torch.zeros(24).int()}, TypeError, "bias must be float32, .* got torch.int32"),
    "device": ({"bias": torch.zeros(24, device="meta")}, ValueError, "bias must be on the device of qkv, cpu"),
    "heads": ({"heads": 5}, ValueError, "heads must divide a third of the 48 channels of qkv, got 5"),
    "no heads": ({"heads": 0}, ValueError, "heads must be a positive integer, got 0"),
    "a fraction of heads": ({"heads": 1.0}, ValueError, "heads must be a positive integer, got 1.0"),
    "memory": ({"mem_kv": torch.zeros(2, 2, 4, 8)}, ValueError, r"mem_kv must have shape \(2, 2, 8, M\), got"),
    "weight": (
        {"weight": torch.zeros(24, 15)},
        ValueError,
        r"weight must have shape \(C, 16\) or \(C, 16, 1, 1\), got \(24, 15\)",
    ),
    "3×3 weight": ({"weight": torch.zeros(24, 16, 3, 3)}, ValueError, r"weight must have shape .* got \(24, 16, 3"),
    "bias": ({"bias": torch.zeros(1, 24)}, ValueError, r"bias must have shape \(24,\), got \(1, 24\)"),
    "gain": ({"gain": torch.zeros(23)}, ValueError, r"gain must have 24 elements, .* got shape \(23,\)"),
    "residual": ({"residual": torch.zeros(1, 24, 3, 4)}, ValueError, r"residual must have shape \(2, 24, 3, 4\), got"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_named(name):
    change, error, message = ERRORS[name]
    tensors, others = make(SMALL)
    with pytest.raises(error, match=message):
        linear_attention(**tensors | others | change)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter accepts the CPU")
def test_on_the_cpu_triton_refuses_with_its_reason():
    tensors, others = make(SMALL)
    reason = "tensors are on cpu, and Triton kernels need CUDA" if HAS_TRITON else "Triton is not installed"
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match=f"linear_attention: backend 'triton' was forced and refuses: {reason}"),
    ):
        linear_attention(**tensors, **others)
    assert reason in dispatch.explain(devices=[torch.device("cpu")])
