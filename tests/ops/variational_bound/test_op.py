"""The variational bound: the reference against upstream's class and the papers' formula, and the errors."""

from __future__ import annotations

import importlib.util
import math
import os

import pytest
import torch

from ddpm_fast import noise, use_backend
from ddpm_fast.noise import Noise, epsilon
from ddpm_fast.ops import diffusion_loss, variational_bound
from ddpm_fast.ops.variational_bound import reference
from ddpm_fast.runtime import dispatch
from ddpm_fast.testing.variational_bound_cases import WEIGHTS, as_written, make_table

HAS_TRITON = importlib.util.find_spec("triton") is not None
SHAPE = (2, 3, 4, 5)
T = 20


@pytest.fixture(autouse=True)
def the_reference():
    with use_backend("reference"):
        yield


def make_inputs(objective: str = "pred_noise", shape=(8, 3, 5, 6), learned: bool = True, **table):
    """model_output near its target, x_start with pixels of the open bins, t with 0, a table, ε, in float64."""
    torch.manual_seed(0)
    rows = make_table(objective, T, **table)
    x, eps = 2 * torch.rand(shape, dtype=torch.float64) - 1, torch.randn(shape, dtype=torch.float64)
    x.view(shape[0], -1)[:, ::7], x.view(shape[0], -1)[:, 1::7] = -1, 1
    t = torch.arange(shape[0]).clamp(max=T) * 3 % T
    t[: (shape[0] + 1) // 3] = 0
    c, d = (rows[t, i].reshape(-1, *(1,) * (x.ndim - 1)) for i in (2, 3))
    out = c * eps + d * x + 0.1 * torch.randn(shape, dtype=torch.float64)
    output = torch.cat([out, 0.5 * torch.randn(shape, dtype=torch.float64)], dim=1) if learned else out
    return output, x, t, rows, eps


def loss_and_gradient(function, output, *args, **options):
    output = output.detach().requires_grad_()
    loss = function(output, *args, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), output)[0]


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("detach_mean", [True, False])
@pytest.mark.parametrize("clip_x_start", [True, False])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_the_reference_is_the_papers_formula(objective, clip_x_start, detach_mean, learned):
    output, x, t, table, eps = make_inputs(objective, learned=learned, first_variance="next", weights="rescaled-mse")
    options = {"clip_x_start": clip_x_start, "detach_mean": detach_mean, "min_probability": 1e-12}

    def weighted(output, *args, **options):
        return (table[t][:, [4, 13]] * as_written(output, *args, **options)).sum(dim=1)

    expected = loss_and_gradient(weighted, output, x, t, table, eps, **options)
    actual = loss_and_gradient(variational_bound, output, x, t, table, eps, **options)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12 * theirs.abs().max().item())
    terms = variational_bound(output, x, t, table, eps, **options, terms=True)
    torch.testing.assert_close(terms, as_written(output, x, t, table, eps, **options), rtol=1e-10, atol=0)
    assert not variational_bound(output.requires_grad_(), x, t, table, eps, terms=True).requires_grad


@pytest.mark.parametrize("beta_schedule", ["cosine", "sigmoid", "linear"])
def test_the_reference_is_upstreams_hybrid_loss(beta_schedule):
    """Loss and gradient of LearnedGaussianDiffusion.p_losses, its buffers and inputs in float64."""
    upstream = pytest.importorskip("denoising_diffusion_pytorch.learned_gaussian_diffusion")

    class Fixed(torch.nn.Module):
        channels, out_dim, self_condition, random_or_learned_sinusoidal_cond = 3, 6, False, False

        def __init__(self, output):
            super().__init__()
            self.output = torch.nn.Parameter(output)

        def forward(self, x, t):
            return self.output

    timesteps = 100
    torch.manual_seed(1)
    shape = (12, 3, 8, 8)
    x, eps = 2 * torch.rand(shape, dtype=torch.float64) - 1, torch.randn(shape, dtype=torch.float64)
    x[:, :, 0], x[:, :, 1] = -1, 1
    t = torch.tensor([0, 0, 0, 1, 2, 5, 10, 30, 50, 80, 98, 99])
    # At t = 0 upstream interpolates from the logarithm of 1e-20: bins are narrower than a scale for v near 1 only.
    v = torch.where(t[:, None, None, None] == 0, 0.9 + 0.4 * torch.rand(shape), torch.randn(shape)).double()
    output = torch.cat([eps + 0.1 * torch.randn(shape), v], dim=1)
    model = Fixed(output)
    diffusion = upstream.LearnedGaussianDiffusion(
        model, image_size=8, timesteps=timesteps, objective="pred_noise", beta_schedule=beta_schedule
    ).double()
    from ddpm_fast.diffusion import schedules

    betas = schedules.make_betas(beta_schedule, timesteps)
    exact = schedules.Schedule(betas).buffers()
    for name, value in exact.items():  # upstream rounds its buffers to float32
        assert torch.equal(getattr(diffusion, name), value.float().double()), name
        getattr(diffusion, name).copy_(value)
    theirs = diffusion.p_losses(x, t, noise=eps, loss_reduction="none")
    gradient = torch.autograd.grad(theirs.sum(), model.output)[0]
    table = make_table("pred_noise", timesteps, beta_schedule=beta_schedule)
    loss, ours = loss_and_gradient(variational_bound, output, x, t, table, eps)
    torch.testing.assert_close(loss, theirs.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(ours, gradient, rtol=1e-6, atol=1e-11 * gradient.abs().max().item())
    assert (gradient[:, 3:].flatten(1).abs().amax(dim=1) > 0).all()


def test_without_a_weight_it_is_the_plain_loss():
    output, x, t, table, eps = make_inputs()
    table[:, 13] = 0
    loss, gradient = loss_and_gradient(variational_bound, output, x, t, table, eps)
    expected, dout = loss_and_gradient(diffusion_loss, output[:, :3], x, t, table[:, 2:5].contiguous(), eps)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.cat([dout, torch.zeros_like(dout)], dim=1))


def test_options_of_the_reference():
    output, x, t, table, eps = make_inputs(shape=SHAPE, first_variance="next")
    images = ((x + 1) * 127.5).round().to(torch.uint8)
    flip = torch.tensor([True, False])
    prepared = images.double() / 255 * 2 - 1
    prepared[0] = prepared[0].flip(-1)
    offset = noise.normal(SHAPE[:2], seed=9, stream=noise.STREAM_OFFSET, dtype=torch.float64)[:, :, None, None]
    made = noise.normal(SHAPE, seed=9, stream=noise.STREAM_TRAINING, dtype=torch.float64)
    for given in (None, eps):
        whole = (made if given is None else given) + 0.3 * offset
        options = {"seed": 9, "normalize": True, "flip": flip, "offset_noise_strength": 0.3}
        actual = variational_bound(output, images, t, table, given, **options)
        torch.testing.assert_close(actual, variational_bound(output, prepared, t, table, whole))
        given_as = Noise(given, 9, 0.3)
        again = variational_bound(output, images, t, table, given_as, normalize=True, flip=flip)
        assert torch.equal(again, actual)
        assert given_as.seed is None  # stored, for whoever reads it next


def test_inputs_of_any_rank():
    for shape in ((2, 7), (2, 3, 4), (2, 3, 2, 5, 6)):
        output, x, t, table, eps = make_inputs(shape=shape, first_variance="next")
        expected = (table[t][:, [4, 13]] * as_written(output, x, t, table, eps)).sum(dim=1)
        torch.testing.assert_close(variational_bound(output, x, t, table, eps), expected)


@pytest.mark.parametrize("log_scale, distance", [(0.0, 3.0), (-5.0, 0.05)])
def test_narrow_and_distant_bins_keep_their_digits_in_float32(log_scale, distance):
    """Bins of less than a hundredth of a scale, and bins seven scales from the mean."""
    mean = torch.linspace(-distance, distance, 2000, dtype=torch.float64)
    x, scale = torch.zeros_like(mean), torch.full_like(mean, log_scale)
    truth = reference.bin_log_probability(x, mean, scale, 1e-15)
    actual = reference.bin_log_probability(x.float(), mean.float(), scale.float(), 1e-15)
    torch.testing.assert_close(actual.double(), truth, rtol=2e-6, atol=0)
    table = torch.zeros(1, 14)
    table[0, 6] = table[0, 7] = table[0, 12] = 1.0  # the mean is the output
    table[0, 9] = 2 * log_scale
    pixels = mean.float().reshape(-1, 1, 1)
    t = torch.zeros(2000, dtype=torch.long)
    written = -math.log(2) * as_written(pixels, 0 * pixels, t, table, 0 * pixels)[:, 1]
    assert ((written - truth) / truth).abs().max() > 1e-5  # the difference of the cdfs does not


def test_the_reference_is_differentiable_in_everything_and_twice():
    output, x, t, table, eps = make_inputs(shape=(2, 3, 2, 3), first_variance="next", weights="rescaled-mse")
    leaves = [tensor.requires_grad_() for tensor in (output, x, eps)]

    def function(output, x, eps):
        return variational_bound(output, 0.9 * x, t, table, eps, detach_mean=False)

    assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)


def test_probabilities_below_the_least_have_no_gradient():
    output, x, _, table, eps = make_inputs(shape=SHAPE, first_variance="next", weights="rescaled-kl")
    x = 0.9 * x  # no open bin
    output[:, :3] += 100.0  # far from every bin
    t = torch.zeros(2, dtype=torch.int64)
    loss, gradient = loss_and_gradient(variational_bound, output, x, t, table, eps, detach_mean=False)
    assert (gradient == 0).all()
    torch.testing.assert_close(loss, torch.full_like(loss, 20 * 15 * torch.tensor(10.0).log2().item()))
    loss = variational_bound(output, x, t, table, eps, min_probability=1e-12)
    torch.testing.assert_close(loss, torch.full_like(loss, 20 * 12 * torch.tensor(10.0).log2().item()))


def test_a_time_outside_the_table_gives_nan():
    output, x, _, table, eps = make_inputs(shape=(4, 3, 2, 2))
    t = torch.tensor([-1, 3, T, 2**40])
    loss, gradient = loss_and_gradient(variational_bound, output, x, t, table, eps)
    for i in range(4):
        assert all(r[i].isfinite().all() if i == 1 else r[i].isnan().all() for r in (loss, gradient))


ERRORS = [
    ({"x_start": [1.0]}, TypeError, "x_start must be a tensor, got list"),
    ({"model_output": [1.0]}, TypeError, "model_output must be a floating point tensor, got list"),
    (
        {"model_output": torch.zeros(2, 6, 4, 5, dtype=torch.int64)},
        TypeError,
        "model_output must be a floating point tensor, got torch.int64",
    ),
    (
        {"model_output": torch.zeros(2, 9, 4, 5)},
        ValueError,
        r"model_output must have x_start's shape \(2, 3, 4, 5\), or \(2, 6, 4, 5\) with the variance, and device cpu, "
        r"got \(2, 9, 4, 5\) on cpu",
    ),
    ({"t": torch.zeros(2, dtype=torch.int32)}, TypeError, "t must be int64, got torch.int32"),
    ({"t": torch.zeros(3, dtype=torch.int64)}, ValueError, r"t must have shape \(B,\)"),
    ({"table": torch.zeros(4, 3)}, ValueError, r"table must have shape \(T, 14\), columns a, b, c, d, w, p, q, m1"),
    ({"noise": torch.zeros(2, 6, 4, 5)}, ValueError, "noise must be floating point of x_start's shape"),
    ({"noise": None}, ValueError, "seed must be given where noise or its offset is generated, got None"),
    ({"flip": torch.zeros(2)}, ValueError, r"flip must be bool or uint8 of shape \(2,\)"),
    ({"min_probability": 0.0}, ValueError, r"min_probability must be in \(0, 1\), got 0.0"),
    ({"min_probability": 1.0}, ValueError, r"min_probability must be in \(0, 1\), got 1.0"),
]


@pytest.mark.parametrize("change, error, message", ERRORS)
def test_errors_are_named(change, error, message):
    output, x, t, table, eps = make_inputs(shape=SHAPE)
    with pytest.raises(error, match=message):
        variational_bound(**{"model_output": output, "x_start": x, "t": t, "table": table, "noise": eps, **change})
    with pytest.raises(ValueError, match=r"x_start must have at least two dimensions, got \(2,\)"):
        variational_bound(x[:, 0, 0, 0], x[:, 0, 0, 0], t, table, x[:, 0, 0, 0])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter accepts the CPU")
def test_on_the_cpu_triton_refuses_with_its_reason():
    output, x, t, table, eps = make_inputs(shape=SHAPE)
    reason = "tensors are on cpu, and Triton kernels need CUDA" if HAS_TRITON else "Triton is not installed"
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match=f"variational_bound: backend 'triton' was forced and refuses: {reason}"):
            variational_bound(output, x, t, table, eps)
    with use_backend(None):
        text = dispatch.explain(devices=[torch.device("cpu")])
    assert any(line.startswith("variational_bound ") and reason in line for line in text.splitlines())


def test_every_weighting_of_openai_is_a_table():
    """RESCALED_MSE is MSE + T/1000 of the bound in bits, RESCALED_KL is T times it."""
    assert WEIGHTS["rescaled-mse"] == (1.0, T / 1000) and WEIGHTS["rescaled-kl"] == (0.0, T)
    for weights in ("rescaled-mse", "rescaled-kl"):
        output, x, t, table, eps = make_inputs(weights=weights, first_variance="next")
        mse, bound = as_written(output, x, t, table, eps).unbind(1)
        expected = mse + bound * T / 1000 if weights == "rescaled-mse" else bound * T
        torch.testing.assert_close(variational_bound(output, x, t, table, eps), expected)


def test_the_reference_stores_the_noise_that_q_sample_reads():
    output, x, t, table, _ = make_inputs(shape=SHAPE)
    given = Noise(None, 5, 0.2)
    expected = epsilon(x, None, 5, 0.2, x.dtype)
    loss = variational_bound(output, x, t, table, given)
    assert torch.equal(given.tensor, expected)
    assert torch.equal(loss, variational_bound(output, x, t, table, expected))
