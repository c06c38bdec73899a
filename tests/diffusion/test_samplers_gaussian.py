"""Samplers against a closed form: a Gaussian data distribution, whose exact denoiser is known.

For x0 ~ N(m, v) and x_t = a·x0 + b·ε the posterior mean of x0 is m + v·a/(a²v + b²)·(x_t − a·m). Every sampler that is
given this denoiser must end at mean m and variance v, up to its discretisation error and the sampling error.
"""

from __future__ import annotations

import math

import pytest
import torch

from ddpm_fast import GaussianDiffusion, Unet
from ddpm_fast.diffusion import samplers, schedules
from ddpm_fast.diffusion.levels import TARGETS
from ddpm_fast.diffusion.sampling import SamplingRun, sample_loop
from ddpm_fast.diffusion.schedules import Schedule
from ddpm_fast.noise import STREAM_INITIAL, normal, seed_tensor

MEAN, STD = 0.1, 0.25  # the clip at ±1 is more than three standard deviations away
N = 40_000
TIMESTEPS = 1000
SCHEDULE = Schedule(schedules.make_betas("cosine", TIMESTEPS))


def exact_coefficients(t: int) -> tuple[float, float]:
    """x0 = gain·x_t + offset of the exact denoiser of N(MEAN, STD²)."""
    a2 = SCHEDULE.alphas_cumprod[t].item()
    a = math.sqrt(a2)
    gain = STD**2 * a / (a2 * STD**2 + 1 - a2)
    return gain, MEAN - gain * a * MEAN


def exact_model(objective: str):
    """The exact denoiser, as a network's output for the objective."""

    def model(x, t, x_self_cond=None):
        a, b = (c.item() for c in schedules.forward_table(SCHEDULE)[t[0]])
        gain, offset = exact_coefficients(int(t[0]))
        x0 = gain * x + offset
        eps = (x - a * x0) / b
        return {"pred_noise": eps, "pred_x0": x0, "pred_v": a * eps - b * x0}[objective]

    return model


def exact_moments(plan: samplers.SamplerTable) -> tuple[float, float]:
    """Mean and standard deviation at which a table ends with the exact denoiser: each step is linear and Gaussian."""
    mean = torch.zeros(2, dtype=torch.float64)  # of (x, x0_previous)
    covariance = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    for t, (_, _, r, s, u, sigma) in zip(plan.times, plan.table.tolist(), strict=True):
        gain, offset = exact_coefficients(t)
        step = torch.tensor([[r * gain + s, u], [gain, 0.0]], dtype=torch.float64)
        mean = step @ mean + torch.tensor([r * offset, offset], dtype=torch.float64)
        covariance = step @ covariance @ step.T
        covariance[0, 0] += sigma**2
    return mean[0].item(), covariance[0, 0].sqrt().item()


def table_of(sampler: str, steps: int, objective: str = "pred_x0", eta: float = 0.0, *, schedule=SCHEDULE, **kwargs):
    options = {"eta": eta} if "eta" in samplers.SAMPLERS[sampler].options else {}
    return samplers.sampler_table(schedule, TARGETS[objective], sampler, steps, options=options, **kwargs)


# The discretisation error allowed: of the standard deviation, relative.
CASES = [
    ("ddpm", 1000, 0.0, 0.01),
    ("ddpm", 250, 0.0, 0.03),
    ("ddim", 1000, 0.0, 0.004),
    ("ddim", 100, 0.0, 0.03),
    ("ddim", 200, 0.5, 0.02),
    ("ddim", 500, 1.0, 0.02),
    ("dpmpp_2m", 100, 0.0, 0.001),
    ("dpmpp_2m", 50, 0.0, 0.004),
    ("dpmpp_2m", 25, 0.0, 0.03),
]


@pytest.mark.parametrize("objective", schedules.OBJECTIVES)
@pytest.mark.parametrize("sampler, steps, eta, tolerance", CASES)
def test_ends_at_the_data_distribution(objective, sampler, steps, eta, tolerance):
    plan = table_of(sampler, steps, objective, eta, spacing="own")
    mean, std = exact_moments(plan)
    assert mean == pytest.approx(MEAN, abs=1e-4)
    assert std == pytest.approx(STD, rel=tolerance)

    seed = seed_tensor(11)
    x = normal((N // 4, 1, 2, 2), seed=seed, stream=STREAM_INITIAL)  # one call of Philox makes four numbers
    x = sample_loop(exact_model(objective), x, SamplingRun(plan, seed))
    # Four standard deviations of the estimates themselves.
    assert x.mean().item() == pytest.approx(mean, abs=4 * STD / math.sqrt(N))
    assert x.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * N))
    kurtosis = ((x - x.mean()) / x.std()).pow(4).mean().item()
    assert kurtosis == pytest.approx(3, abs=4 * math.sqrt(24 / N))


def test_dpmpp_is_second_order():
    """Halving the step divides DDIM's error by about two and DPM-Solver++(2M)'s by about four or more."""

    def error(sampler: str, steps: int) -> float:
        return abs(exact_moments(table_of(sampler, steps, spacing="own"))[1] - STD)

    assert 1.5 < error("ddim", 25) / error("ddim", 50) < 2.8
    assert error("dpmpp_2m", 25) / error("dpmpp_2m", 50) > 3.5
    assert error("dpmpp_2m", 50) < 0.1 * error("ddim", 50)


def test_ddpm_on_fewer_steps_is_respaced_and_on_all_steps_upstream():
    schedule = Schedule(schedules.make_betas("cosine", 50))
    full = table_of("ddpm", 50, "pred_noise", schedule=schedule)
    buffers = schedule.buffers()
    assert full.times == tuple(range(49, -1, -1))
    torch.testing.assert_close(full.table[:, 2], buffers["posterior_mean_coef1"].flip(0))
    torch.testing.assert_close(full.table[:, 3], buffers["posterior_mean_coef2"].flip(0))
    torch.testing.assert_close(full.table[:, 5] ** 2, buffers["posterior_variance"].flip(0))
    assert full.table[-1, 5] == 0, "no noise at t = 0"
    # DDIM with eta = 1 has ancestral sampling's variance on the same steps (Song et al. 2021, section 4.1).
    few, ddim = (table_of(s, 10, "pred_noise", 1.0, schedule=schedule) for s in ("ddpm", "ddim"))
    torch.testing.assert_close(few.table[:, 5], ddim.table[:, 5])
    torch.testing.assert_close(few.table[:, 2:4], ddim.table[:, 2:4], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 399, 400])
def test_tables_are_finite_and_end_on_x_start(sampler, steps):
    schedule = Schedule(schedules.make_betas("sigmoid", 400))
    plan = table_of(sampler, steps, "pred_v", 0.7, schedule=schedule)
    assert plan.table.shape == (len(plan.times), 6) and plan.table.dtype == torch.float64
    assert torch.isfinite(plan.table).all()
    # A sampler of higher order may call the network at a timestep more than once.
    assert 1 <= len(set(plan.times)) <= steps and list(plan.times) == sorted(plan.times, reverse=True)
    assert plan.table[-1, 2:].tolist() == [1, 0, 0, 0]
    assert plan.table[0, 4] == 0, "the first step has no previous x0 to read"


def test_diffusers_agrees_on_dpmpp_2m():
    """diffusers' DPMSolverMultistepScheduler on the same model and timesteps ends at the same images."""
    from diffusers import DPMSolverMultistepScheduler

    plan = table_of("dpmpp_2m", 12)
    model = exact_model("pred_x0")
    theirs = DPMSolverMultistepScheduler(
        num_train_timesteps=TIMESTEPS,
        trained_betas=SCHEDULE.betas.tolist(),
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="sample",
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    theirs.set_timesteps(timesteps=list(plan.times))
    x = torch.randn(5, 1, 2, 2)
    expected = x.clone()
    for t in theirs.timesteps:
        expected = theirs.step(model(expected, torch.tensor([int(t)])), t, expected).prev_sample
    actual = sample_loop(model, x.clone(), SamplingRun(plan, seed_tensor(0)))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def euler(monkeypatch):
    """Euler's method for the probability flow in σ̂ = √(1 − ᾱ)/√ᾱ, as a user would add it: one decorated function."""
    monkeypatch.setattr(samplers, "SAMPLERS", dict(samplers.SAMPLERS))

    @samplers.sampler("euler")
    def rows(walk):
        now, after = walk.now, walk.after
        s = after.sigma / now.sigma * (after.a / now.a)
        r = after.a * (1 - after.sigma / now.sigma)
        return samplers.Rows(now, r, s, torch.zeros_like(r), torch.zeros_like(r))


def test_a_sampler_is_one_function(euler):
    """It is sampled by name, in few steps and many, and is DDIM with η = 0 in other words."""
    ours, ddim = (table_of(name, 25, "pred_v", spacing="own") for name in ("euler", "ddim"))
    torch.testing.assert_close(ours.table, ddim.table, rtol=1e-9, atol=1e-12)
    network = Unet(8, dim_mults=(1, 2))
    images = [
        GaussianDiffusion(network, image_size=8, sampling_timesteps=4, sampler=name).sample(2, seed=1, progress=False)
        for name in ("euler", "ddim")
    ]
    torch.testing.assert_close(*images)
    with pytest.raises(ValueError, match="a sampler of the name 'euler' is registered already"):
        samplers.sampler("euler")(None)
