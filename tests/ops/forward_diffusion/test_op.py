"""Forward diffusion and its loss: the reference and the errors. test_triton.py and test_native.py test the kernels."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from ddpm_fast import noise, use_backend
from ddpm_fast.noise import Noise, epsilon
from ddpm_fast.ops.forward_diffusion.op import diffusion_loss, q_sample
from ddpm_fast.runtime import dispatch

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
SHAPE = (2, 3, 4, 5)


def make_inputs():
    """x_start, t, the table of q_sample, the table of diffusion_loss, ε."""
    return torch.rand(SHAPE), torch.tensor([1, 2]), torch.rand(4, 2), torch.rand(4, 3), torch.randn(SHAPE)


def test_the_reference_is_the_formula():
    x, t, forward_table, table, eps = make_inputs()
    a, b = forward_table[t].T[:, :, None, None, None]
    torch.testing.assert_close(q_sample(x, t, forward_table, eps), a * x + b * eps)
    c, d, w = table[t].T[:, :, None, None, None]
    output = torch.randn(SHAPE)
    expected = w.flatten() * (output - (c * eps + d * x)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(diffusion_loss(output, x, t, table, eps), expected)


def test_options_of_the_reference():
    x, t, forward_table, table, eps = make_inputs()
    images = (x * 255).round().to(torch.uint8)
    flip = torch.tensor([True, False])
    prepared = images / 255 * 2 - 1
    prepared[0] = prepared[0].flip(-1)
    made = noise.normal(SHAPE, seed=9, stream=noise.STREAM_TRAINING)
    offset = noise.normal(SHAPE[:2], seed=9, stream=noise.STREAM_OFFSET)[:, :, None, None]
    options = {"seed": 9, "normalize": True, "flip": flip, "offset_noise_strength": 0.3}
    for given in (None, eps):
        whole = (made if given is None else given) + 0.3 * offset
        actual = q_sample(images, t, forward_table, given, **options)
        torch.testing.assert_close(actual, q_sample(prepared, t, forward_table, whole))
        loss = diffusion_loss(eps, images, t, table, given, **options)
        torch.testing.assert_close(loss, diffusion_loss(eps, prepared, t, table, whole))
    x_t = q_sample(images, t, forward_table, **options, dtype=torch.bfloat16, memory_format=torch.channels_last)
    assert x_t.dtype == torch.bfloat16 and x_t.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x_t, q_sample(images, t, forward_table, **options).bfloat16())


def test_without_options_inputs_of_any_rank_keep_their_dtype():
    for shape in ((2,), (2, 7), (2, 3, 4), (2, 3, 4, 5, 6)):
        x, t = torch.rand(shape, dtype=torch.float64), torch.tensor([1, 2])
        x_t = q_sample(x, t, torch.rand(4, 2), torch.randn(shape, dtype=torch.float64))
        assert x_t.shape == shape and x_t.dtype == torch.float64
        if len(shape) > 1:
            assert diffusion_loss(x, x, t, torch.rand(4, 3), x).shape == (2,)


def test_the_reference_is_differentiable_in_everything_and_twice():
    x, t, _, table, eps = make_inputs()
    leaves = [tensor.double().requires_grad_() for tensor in (torch.randn(SHAPE), x, eps)]
    double = table.double()

    def function(output, x, eps):
        return diffusion_loss(output, x, t, double, eps)

    assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)


ERRORS = [
    ({"x_start": [1.0]}, TypeError, "x_start must be a tensor, got list"),
    ({"x_start": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "floating point or uint8, got torch.int64"),
    ({"t": torch.zeros(2, dtype=torch.int32)}, TypeError, "t must be int64, got torch.int32"),
    ({"t": torch.zeros(3, dtype=torch.int64)}, ValueError, r"t must have shape \(B,\)"),
    ({"t": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "t must be on the device of x_start, cpu"),
    ({"table": torch.zeros(4, 5)}, ValueError, r"table must have shape \(T, 2\), columns a, b, got \(4, 5\)"),
    ({"table": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "table must be floating point, got torch.int64"),
    ({"noise": torch.zeros(2, 3, 4, 4)}, ValueError, "noise must be floating point of x_start's shape"),
    ({"noise": None}, ValueError, "seed must be given where noise or its offset is generated, got None"),
    ({"offset_noise_strength": 0.1}, ValueError, "seed must be given"),
    ({"offset_noise_strength": -0.1}, ValueError, "offset_noise_strength must not be negative, got -0.1"),
    ({"seed": 1.5}, TypeError, "seed must be an int or a one-element int64 tensor, got float"),
    ({"flip": torch.zeros(2)}, ValueError, r"flip must be bool or uint8 of shape \(2,\), got torch.float32"),
    ({"dtype": torch.int32}, TypeError, "dtype must be a floating point type or None, got torch.int32"),
    ({"memory_format": torch.channels_last_3d}, ValueError, "memory_format must be contiguous_format, channels_last"),
]


@pytest.mark.parametrize("change, error, message", ERRORS)
def test_errors_are_named(change, error, message):
    x, t, table, _, eps = make_inputs()
    with pytest.raises(error, match=message):
        q_sample(**{"x_start": x, "t": t, "table": table, "noise": eps, **change})


def test_errors_of_the_loss():
    x, t, table, loss_table, eps = make_inputs()
    with pytest.raises(ValueError, match=r"table must have shape \(T, 3\), columns c, d, w"):
        diffusion_loss(x, x, t, table, eps)
    with pytest.raises(ValueError, match="model_output must have x_start's shape"):
        diffusion_loss(x[:1], x, t, loss_table, eps)
    with pytest.raises(ValueError, match=r"x_start must have at least two dimensions, got \(2,\)"):
        diffusion_loss(x[:, 0, 0, 0], x[:, 0, 0, 0], t, loss_table, x[:, 0, 0, 0])
    with pytest.raises(TypeError, match="model_output must be a floating point tensor, got torch.int64"):
        diffusion_loss(x.long(), x, t, loss_table, eps)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter accepts the CPU")
def test_on_the_cpu_triton_refuses_with_its_reason():
    x, t, table, loss_table, eps = make_inputs()
    reason = "tensors are on cpu, and Triton kernels need CUDA" if HAS_TRITON else "Triton is not installed"
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match=f"q_sample: backend 'triton' was forced and refuses: {reason}"):
            q_sample(x, t, table, eps)
        with pytest.raises(RuntimeError, match=f"diffusion_loss: backend 'triton' was forced and refuses: {reason}"):
            diffusion_loss(x, x, t, loss_table, eps)
    assert reason in dispatch.explain(devices=[torch.device("cpu")])


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_the_reference_stores_noise_once_for_both_ops(strength):
    x, t, table, loss_table, _ = make_inputs()
    noise, expected = Noise(None, 5, strength), epsilon(x, None, 5, strength, x.dtype)
    with use_backend("reference"):
        x_t = q_sample(x, t, table, noise)
        assert torch.equal(noise.tensor, expected) and noise.seed is None and noise.offset_noise_strength == 0
        stored = noise.tensor
        loss = diffusion_loss(x, x, t, loss_table, noise)
        assert noise.tensor is stored
        assert torch.equal(x_t, q_sample(x, t, table, expected))
        assert torch.equal(loss, diffusion_loss(x, x, t, loss_table, expected))


def test_noise_that_cannot_be_made_is_refused():
    x, t, table, _, eps = make_inputs()
    for make, message in (
        (lambda: Noise(), "seed must be given where noise or its offset is generated"),
        (lambda: Noise(eps, offset_noise_strength=0.1), "seed must be given where noise or its offset is generated"),
        (lambda: Noise(eps, 3, -0.1), "offset_noise_strength must not be negative, got -0.1"),
        (lambda: q_sample(x, t, table, Noise(eps), seed=3), "must not be given with a Noise"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_x_t_for_a_network_has_the_dtype_of_autocast():
    x, t, table, _, eps = make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert q_sample(x, t, table, eps, for_network=True).dtype == torch.bfloat16
        assert q_sample(x, t, table, eps).dtype == torch.float32
        assert q_sample(x, t, table, eps, for_network=True, dtype=torch.float32).dtype == torch.float32
    assert q_sample(x.to("meta"), t.to("meta"), table.to("meta"), eps.to("meta"), for_network=True).is_contiguous(
        memory_format=torch.channels_last
    )
