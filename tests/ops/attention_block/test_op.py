"""The attention block with GroupNorm: its reference against the networks that have it, its checks and its steps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import use_backend
from ddpm_fast.ops.attention_block import op, reference
from ddpm_fast.ops.attention_block.op import group_norm_attention_block
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import watch_choices
from ddpm_fast.testing.attention_block_cases import ORDERS, make, run
from ddpm_fast.testing.truth import assert_close_to_truth


def openai_legacy(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """`QKVAttentionLegacy` of guided-diffusion."""
    B, width, length = qkv.shape
    ch = width // (3 * heads)
    q, k, v = qkv.reshape(B * heads, ch * 3, length).split(ch, dim=1)
    scale = 1 / math.sqrt(math.sqrt(ch))
    weight = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
    return torch.einsum("bts,bcs->bct", weight, v).reshape(B, -1, length)


def openai_new(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """`QKVAttention` of guided-diffusion."""
    B, width, length = qkv.shape
    ch = width // (3 * heads)
    q, k, v = qkv.chunk(3, dim=1)
    scale = 1 / math.sqrt(math.sqrt(ch))
    q, k = (part.reshape(B * heads, ch, length) * scale for part in (q, k))
    weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k), dim=-1)
    return torch.einsum("bts,bcs->bct", weight, v.reshape(B * heads, ch, length)).reshape(B, -1, length)


def edm(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """`UNetBlock` of EDM."""
    B, width, length = qkv.shape
    q, k, v = qkv.reshape(B * heads, width // (3 * heads), 3, -1).unbind(2)
    weight = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(k.shape[1])).softmax(dim=2)
    return torch.einsum("nqk,nck->ncq", weight, v).reshape(B, -1, length)


@pytest.mark.parametrize("order, attend", [("h3d", openai_legacy), ("3hd", openai_new), ("hd3", edm)])
def test_the_reference_is_what_networks_compute(order, attend):
    tensors, options = make((2, 2, 12, 16, 3, 5), order=order, groups=4, output_scale=0.5**0.5)
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    x, gain, offset, weight_qkv, bias_qkv, weight, bias = tensors.values()
    y = F.group_norm(x, 4, gain, offset, 1e-5).flatten(2)
    out = attend(F.conv1d(y, weight_qkv[..., None], bias_qkv), 2)
    expected = (x.flatten(2) + F.conv1d(out, weight[..., 0], bias)) * 0.5**0.5
    actual = reference.group_norm_attention_block(**tensors, **options)
    torch.testing.assert_close(actual.flatten(2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kept", [{}, {"groups": 4, "output_scale": 0.5}, {"residual": False}, {"biases": False}])
def test_the_steps_are_as_accurate_as_the_reference(order, kept, layout):
    tensors, options = make((2, 2, 12, 16, 3, 5), order=order, **kept)
    tensors["x"] = tensors["x"].contiguous(memory_format=layout)
    with use_backend("reference"):
        actual = run(group_norm_attention_block, tensors, options)
    expected = run(reference.group_norm_attention_block, tensors, options)
    truth = run(reference.group_norm_attention_block, {k: t.double() for k, t in tensors.items()}, options)
    assert actual["out"].is_contiguous(memory_format=layout)
    for name in truth:
        assert_close_to_truth(actual[name], expected[name], truth[name], name=name, floor=8)


def test_the_steps_have_second_derivatives():
    tensors, options = make((1, 2, 3, 4, 2, 3), order="hd3", groups=2, output_scale=0.5)
    leaves = [tensor.double().requires_grad_() for tensor in tensors.values()]

    def block(*leaves):
        return group_norm_attention_block(**dict(zip(tensors, leaves, strict=True)), **options)

    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(block, leaves)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("function", [group_norm_attention_block, reference.group_norm_attention_block])
def test_the_steps_compile_whole(function, layout):
    """Traced by fake tensors, whose strides must be the real ones: torch's of group_norm are not."""
    tensors, options = make((2, 2, 12, 16, 3, 5), groups=4)
    tensors["x"] = tensors["x"].contiguous(memory_format=layout)
    with use_backend("reference"):
        expected = run(function, tensors, options)
        actual = run(torch.compile(function, backend="aot_eager", fullgraph=True), tensors, options)
    assert actual["out"].stride() == expected["out"].stride()
    torch.testing.assert_close(actual, expected)


def test_the_steps_ignore_autocast():
    tensors, options = make((2, 2, 12, 16, 3, 5))
    with use_backend("reference"):
        expected = group_norm_attention_block(**tensors, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(group_norm_attention_block(**tensors, **options), expected)


def test_the_steps_of_half_maps_are_half():
    tensors, options = make((2, 2, 12, 16, 3, 5), groups=4, output_scale=0.5)
    tensors["x"] = tensors["x"].bfloat16()
    with use_backend("reference"):
        out = group_norm_attention_block(**tensors, **options)
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
    tensors["x"] = tensors["x"].float()
    with use_backend("reference"):
        torch.testing.assert_close(out.float(), group_norm_attention_block(**tensors, **options), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 16, 15)}, r"x must have shape \(B, C, h, w\), got \(2, 16, 15\)"),
        ({"order": "dh3"}, "order must be one of 3hd, h3d, hd3, got 'dh3'"),
        ({"heads": 0}, "heads must be a positive integer, got 0"),
        ({"groups": 3}, "groups must divide the 16 channels of x, or be 0, got 3"),
        ({"groups": 0}, "gain must be None where groups is 0, and only there, got groups = 0"),
        ({"offset": None}, "offset must be None where groups is 0, and only there, got groups = 4"),
        ({"heads": 5}, r"weight must have shape \(16, 5·D\), 1s may follow, got \(16, 24, 1, 1\)"),
        ({"weight": torch.zeros(16)}, r"weight must have shape \(16, 2·D\), 1s may follow, got \(16,\)"),
        (
            {"weight_qkv": torch.zeros(72, 8)},
            r"weight_qkv must have shape \(72, 16\), 1s may follow, got \(72, 8\)",
        ),
        (
            {"weight_qkv": torch.zeros(72, 16, 3, 3)},
            r"weight_qkv must have shape \(72, 16\), 1s may follow, got \(72, 16, 3, 3\)",
        ),
        ({"bias_qkv": torch.zeros(24)}, r"bias_qkv must have shape \(72,\), got \(24,\)"),
        ({"gain": torch.zeros(1, 16)}, r"gain must have shape \(16,\), got \(1, 16\)"),
        ({"bias": torch.zeros(16, device="meta")}, "bias must be on the device of x, cpu, got meta"),
    ],
)
def test_errors_name_the_argument(change, message):
    tensors, options = make((2, 2, 12, 16, 3, 5), groups=4)
    with pytest.raises(ValueError, match=message):
        group_norm_attention_block(**(tensors | options | change))


def test_type_errors_name_the_argument():
    tensors, options = make((2, 2, 12, 16, 3, 5), groups=4)
    with pytest.raises(TypeError, match="weight must be a tensor, got NoneType"):
        group_norm_attention_block(**(tensors | {"weight": None}), **options)
    with pytest.raises(TypeError, match="bias must be float32, float16, bfloat16 or float64, got torch.int64"):
        group_norm_attention_block(**(tensors | {"bias": torch.zeros(16, dtype=torch.int64)}), **options)


def test_a_wide_head_leaves_attention_to_torch_with_a_reason(monkeypatch):
    """On CUDA; meta tensors stand for it. The steps copy no keys and values where there is no memory."""
    monkeypatch.setattr(triton_launch, "why_not_triton", lambda device: None)
    qkv = torch.empty(1, 768, 16, 16, device="meta").contiguous(memory_format=torch.channels_last)
    with watch_choices() as choices:
        op.composite.attention(qkv, qkv.new_empty(2, 1, 0, 256), heads=1)
    reason = "triton: heads have 256 dimensions, and a program of the kernels holds at most 128"
    assert [key for key in choices if key[1] == "sdpa" and reason in key[2]]
