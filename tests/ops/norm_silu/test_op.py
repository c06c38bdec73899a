"""norm_silu: the reference, errors, and the blocks that use it. test_triton.py and test_native.py test the kernels."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import nn

from ddpm_fast import use_backend
from ddpm_fast.models.resnet import Block, ResnetBlock
from ddpm_fast.ops.norm_silu import reference
from ddpm_fast.ops.norm_silu.op import group_norm_silu, rms_norm_silu
from ddpm_fast.runtime import dispatch
from ddpm_fast.testing.norm_silu_cases import NORMS, OPTIONS, make

HAS_TRITON = importlib.util.find_spec("triton") is not None
SHAPE = (2, 8, 3, 4, 2)

both_norms = pytest.mark.parametrize("norm", NORMS)


@both_norms
@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_of_the_reference_are_its_differences(norm, option):
    """Finite differences in float64."""
    tensors, others = make(norm, (2, 4, 2, 3, 2), option, "nhwc")
    names = list(tensors)
    leaves = [tensor.double().requires_grad_() for tensor in tensors.values()]
    function = getattr(reference, f"{norm}_norm_silu")
    assert torch.autograd.gradcheck(lambda *t: function(**dict(zip(names, t, strict=True)), **others), leaves)


def test_reference_is_upstreams_formula(upstream):
    tensors, _ = make("rms", SHAPE, "all but the activation", "nchw")
    norm = upstream.RMSNorm(SHAPE[1])
    norm.g.data = tensors["gain"]
    y = norm(tensors["x"] + tensors["bias"][:, None, None])
    y = y * (tensors["scale"][:, :, None, None] + 1) + tensors["shift"][:, :, None, None]
    with use_backend("reference"):
        actual = rms_norm_silu(**tensors | {"residual": None})
    torch.testing.assert_close(actual, nn.functional.silu(y))


def test_reference_is_torchs_group_norm():
    tensors, others = make("group", SHAPE, "plain", "nchw")
    norm = nn.GroupNorm(SHAPE[4], SHAPE[1])
    norm.weight.data, norm.bias.data = tensors["gain"], tensors["offset"]
    with use_backend("reference"):
        actual = group_norm_silu(**tensors, **others)
    assert torch.equal(actual, nn.functional.silu(norm(tensors["x"])))


@both_norms
def test_half_types_round_once(norm):
    """The reference computes in float32 and returns the dtype of x."""
    tensors, others = make(norm, SHAPE, "all", "nhwc")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    out = NORMS[norm](**tensors, **others)
    exact = NORMS[norm](**{name: tensor.float() for name, tensor in tensors.items()}, **others)
    assert torch.equal(out, exact.bfloat16())


@both_norms
def test_reference_takes_what_kernels_do_not(norm):
    for change in (lambda x: x[:0], lambda x: x[:, :, ::2], lambda x: x.double()):
        tensors, others = make(norm, SHAPE, "bias", "nhwc")
        x = tensors["x"] = change(tensors["x"]).requires_grad_()
        out = NORMS[norm](**tensors, **others)
        assert out.shape == x.shape and out.dtype == x.dtype
        out.sum().backward()
        assert x.grad is None or torch.isfinite(x.grad).all()


@both_norms
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_the_reference_compiles_whole(norm, layout):
    """Its fake output has the strides of the real one; a view, here of channels in pairs, depends on them."""
    tensors, others = make(norm, SHAPE, "plain", layout)
    x = torch.cat([tensors["x"], tensors["x"]], dim=1)[:, : SHAPE[1]]

    def in_pairs(x):
        y = getattr(reference, f"{norm}_norm_silu")(**tensors | {"x": x}, **others)
        return y.reshape(2, 4, 2, -1) + y.stride(1)

    expected = in_pairs(x)
    assert torch.equal(torch.compile(in_pairs, backend="aot_eager", fullgraph=True)(x), expected)


@both_norms
def test_the_gain_may_have_any_shape(norm):
    tensors, others = make(norm, SHAPE, "plain", "nhwc")
    with use_backend("reference"):
        expected = NORMS[norm](**tensors, **others)
        for shape in ((1, -1), (1, -1, 1, 1)):
            assert torch.equal(NORMS[norm](**tensors | {"gain": tensors["gain"].reshape(shape)}, **others), expected)


def test_keep_mask_known_answers():
    """Word i of block k of sample b decides about element 4k + i; the same words as noise's Philox."""
    from ddpm_fast import noise

    seed = torch.tensor([2**40 + 17])
    keep = reference.keep_mask(torch.Size((3, 2, 3, 3)), 0.4, seed).reshape(3, -1)
    for b, element in ((0, 0), (1, 5), (2, 17)):
        counter = [torch.tensor(n) for n in (element // 4, b, 0, noise.STREAM_DROPOUT)]
        word = noise.philox4x32(counter, [torch.tensor(17), torch.tensor(2**8)])[element % 4]
        assert keep[b, element].item() == (word.item() >= round(0.4 * 2**32))
    assert reference.keep_mask(torch.Size((2, 5)), 1.0, seed).sum() == 0


ERRORS = {
    "x": ({"x": torch.zeros(2, 8, 3)}, ValueError, r"x must have shape \(B, C, H, W\), got \(2, 8, 3\)"),
    "x type": ({"x": [1]}, TypeError, "x must be a tensor, got list"),
    "integers": ({"x": torch.zeros(2, 8, 3, 4).int()}, TypeError, "x must be float32, .* got torch.int32"),
    "gain": ({"gain": torch.zeros(7)}, ValueError, r"gain must have 8 elements, .* got shape \(7,\)"),
    "bias": ({"bias": torch.zeros(1, 8)}, ValueError, r"bias must have shape \(8,\)( or \(2, 8\))?, got \(1, 8\)"),
    "scale": ({"scale": torch.zeros(1, 8)}, ValueError, r"scale must have shape \(2, 8\), got \(1, 8\)"),
    "shift": ({"shift": torch.zeros(2, 8, 1, 1)}, ValueError, r"shift must have shape \(2, 8\), got \(2, 8, 1, 1\)"),
    "residual": ({"residual": torch.zeros(1, 8, 3, 4)}, ValueError, r"residual must have shape \(2, 8, 3, 4\)"),
    "device": ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias must be on the device of x, cpu, got meta"),
    "p": ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
    "no seed": ({"dropout_p": 0.5}, ValueError, "seed must be given where dropout_p > 0, got None"),
    "seed": (
        {"seed": torch.zeros(2, dtype=torch.int64)},
        TypeError,
        r"seed must be a one-element int64 tensor, got torch.int64 of shape \(2,\)",
    ),
}


@both_norms
@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_named(norm, name):
    change, error, message = ERRORS[name]
    tensors, others = make(norm, SHAPE, "plain", "nchw")
    with pytest.raises(error, match=message):
        NORMS[norm](**tensors | others | change)


@pytest.mark.parametrize("groups", [0, 3])
def test_groups_that_do_not_divide(groups):
    tensors, _ = make("group", SHAPE, "plain", "nchw")
    with pytest.raises(ValueError, match=f"groups must divide the 8 channels of x, got {groups}"):
        group_norm_silu(**tensors, groups=groups)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter accepts the CPU")
@both_norms
def test_on_the_cpu_triton_refuses_with_its_reason(norm):
    tensors, others = make(norm, SHAPE, "plain", "nchw")
    reason = "tensors are on cpu, and Triton kernels need CUDA" if HAS_TRITON else "Triton is not installed"
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match=f"{norm}_norm_silu: backend 'triton' was forced and refuses: {reason}"),
    ):
        NORMS[norm](**tensors, **others)
    assert reason in dispatch.explain(devices=[torch.device("cpu")])


@both_norms
def test_block_is_its_modules_in_a_row(norm):
    """Convolution with bias, norm, scale and shift, SiLU: the parameters are where upstream has them.

    A residual block computes two of them as one op.
    """
    both = ResnetBlock(4, 8, norm=norm, groups=2)
    block, block2 = both.block1, both.block2
    with torch.no_grad():
        for parameter in (*block.norm.parameters(), *block2.norm.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, scale, shift = (torch.randn(s) for s in ((2, 4, 5, 6), (2, 8), (2, 8)))
    y = block.norm(block.proj(x)) * (scale[:, :, None, None] + 1) + shift[:, :, None, None]
    maps = (scale[:, :, None, None], shift[:, :, None, None])
    torch.testing.assert_close(block(x, maps), block.act(y))
    torch.testing.assert_close(block(x), block.act(block.norm(block.proj(x))))
    y = block2.act(block2.norm(block2.proj(block.act(y))))
    for layout in (torch.contiguous_format, torch.channels_last):
        out = both.compute(x.contiguous(memory_format=layout), (scale, shift))
        torch.testing.assert_close(out, y + both.res_conv(x), rtol=1e-5, atol=1e-5)
    names = {"rms": ["norm.g"], "group": ["norm.weight", "norm.bias"]}[norm]
    assert sorted(block.state_dict()) == sorted(["proj.weight", "proj.bias", *names])


def test_dropout_of_blocks_follows_torchs_generator():
    block = ResnetBlock(8, 8, dropout=0.5)
    x = torch.randn(2, 8, 6, 6)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(block(x))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    block.eval()
    state = torch.get_rng_state()
    assert torch.equal(block(x), block(x))
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn where nothing is dropped"


def test_dropout_drops_the_right_share_of_a_block():
    block = Block(4, 64, dropout=0.25)
    out = block(torch.randn(2, 4, 16, 16))
    share = (out == 0).double().mean().item()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / out.numel()) ** 0.5


def test_group_norm_needs_an_offset():
    x, gain = torch.randn(2, 8, 3, 3), torch.ones(8)
    for backend in (None, "reference"):
        with use_backend(backend), pytest.raises(TypeError, match="offset must be a tensor, got NoneType"):
            group_norm_silu(x, gain, None, groups=2)
