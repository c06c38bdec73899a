"""Samplers against closed forms: a Gaussian data distribution and a mixture of two, whose exact denoisers are known.

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
from ddpm_fast.testing.sampler_cases import TWO_CALLS, exact_moments, scales, walk

MEAN, STD = 0.1, 0.25  # the clip at ±1 is more than three standard deviations away
N = 10_000
TIMESTEPS = 1000
SCHEDULE = Schedule(schedules.make_betas("cosine", TIMESTEPS))
FORWARD = schedules.forward_table(SCHEDULE).tolist()
SCALES = scales()


def exact_model(objective: str):
    """The exact denoiser, as a network's output for the objective."""

    def model(x, t, x_self_cond=None):
        a, b = FORWARD[int(t[0])]
        gain = STD**2 * a / (a**2 * STD**2 + b**2)
        x0 = gain * x + (MEAN - gain * a * MEAN)
        eps = (x - a * x0) / b
        return {"pred_noise": eps, "pred_x0": x0, "pred_v": a * eps - b * x0}[objective]

    return model


def table_of(sampler: str, steps: int, objective: str = "pred_x0", eta: float = 0.0, *, schedule=SCHEDULE, **kwargs):
    options = {"eta": eta} if "eta" in samplers.SAMPLERS[sampler].options else {}
    return samplers.sampler_table(schedule, TARGETS[objective], sampler, steps, options=options, **kwargs)


def moments(plan: samplers.SamplerTable) -> tuple[float, float]:
    """Mean and standard deviation at which a table over `SCHEDULE` ends with the exact denoiser."""
    return exact_moments(plan, SCHEDULE, MEAN, STD)


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
    mean, std = moments(plan)
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
        return abs(moments(table_of(sampler, steps, spacing="own"))[1] - STD)

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


# The largest relative error of the standard deviation after 48 network calls with the sampler's own spacing, on any of
# the processes; and the least by which it falls from 24 calls to 48.
AFTER_48_CALLS = {
    "ddpm": (0.275, 1.5),
    "ddim": (0.164, 1.85),
    "euler_ancestral": (0.15, 1.8),
    "euler": (0.08, 1.9),
    "heun": (0.036, 4.0),
    "dpmpp_2m": (0.004, 4.0),
    "dpmpp_2m_sde": (0.011, 3.5),
    "dpmpp_3m_sde": (0.01, 4.0),
    "dpmpp_2s_a": (0.061, 3.2),
    "unipc": (0.0008, 8.0),
    "lms": (0.0073, 4.5),
    "deis": (0.00125, 2.2),
}


def test_every_sampler_has_bounds():
    assert set(AFTER_48_CALLS) == set(samplers.SAMPLERS)


def plan_of_calls(sampler: str, scale, calls: int, **kwargs) -> samplers.SamplerTable:
    steps = calls // 2 if sampler in TWO_CALLS else calls
    return samplers.sampler_table(scale, TARGETS["pred_x0"], sampler, steps, **kwargs)


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("sampler", AFTER_48_CALLS)
def test_a_gaussian_on_every_process(sampler, kind):
    """The mean is as wrong as the start makes it, which has none of the data's: a·m at the first level."""
    scale = SCALES[kind]
    bound, factor = AFTER_48_CALLS[sampler]
    errors = []
    for calls in (24, 48):
        plan = plan_of_calls(sampler, scale, calls)
        mean, std = exact_moments(plan, scale, MEAN, STD)
        errors.append(abs(std / STD - 1))
        assert mean == pytest.approx(MEAN, abs=0.01 * MEAN)
    assert errors[1] < bound
    assert errors[0] > factor * errors[1]


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("calls, bound", [(10, 0.003), (25, 0.002)])
def test_the_default_of_few_steps_keeps_the_deviation(beta_schedule, calls, bound):
    schedule = Schedule(schedules.make_betas(beta_schedule, 1000))
    plan = plan_of_calls(samplers.FEW_STEPS, schedule, calls)
    assert len(plan.times) == calls
    assert abs(exact_moments(plan, schedule, 0.0, 0.15)[1] - 0.15) <= bound


WEIGHTS, CENTRES, WIDTH = (0.35, 0.65), (-0.6, 0.4), 0.15
MIXTURE_MEAN, MIXTURE_STD = 0.05, 0.5


def mixture_denoiser(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The posterior mean of x0 under two Gaussians, from x = x0 + σ·ε."""
    if math.isinf(sigma):
        return torch.full_like(x, MIXTURE_MEAN)
    variance = WIDTH**2 + sigma**2
    logs = [math.log(w) - (x - m) ** 2 / (2 * variance) for w, m in zip(WEIGHTS, CENTRES, strict=True)]
    shares = torch.stack(logs).softmax(0)
    return sum(share * (m + WIDTH**2 / variance * (x - m)) for share, m in zip(shares, CENTRES, strict=True))


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_mixture_on_every_process(sampler, kind):
    """From evenly spaced quantiles of the start, so that samplers without noise have no sampling error."""
    scale, count = SCALES[kind], 8000
    plan = plan_of_calls(sampler, scale, 64, spacing="log_snr")
    torch.manual_seed(0)
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    noises = (torch.randn(count, dtype=torch.float64) for _ in plan.times)
    x = walk(plan, scale, mixture_denoiser, plan.first_scale * quantiles, noises)[0][-1]
    is_noisy = bool((plan.table[:, 5] != 0).any())
    is_first_order = sampler in ("ddpm", "ddim", "euler", "euler_ancestral")
    # Four standard deviations of the estimates, and the discretisation error.
    sampling = 4 / math.sqrt(count) if is_noisy else 0.0
    discretisation = 0.03 if is_first_order else 0.01
    assert x.mean().item() == pytest.approx(MIXTURE_MEAN, abs=MIXTURE_STD * sampling + 0.003)
    assert x.std().item() == pytest.approx(MIXTURE_STD, rel=sampling / math.sqrt(2) + discretisation)
    share = (x > (CENTRES[0] + CENTRES[1]) / 2).double().mean().item()
    exact = sum(
        w * (0.5 + 0.5 * math.erf((m + 0.1) / WIDTH / math.sqrt(2))) for w, m in zip(WEIGHTS, CENTRES, strict=True)
    )
    assert share == pytest.approx(exact, abs=sampling * math.sqrt(exact * (1 - exact)) + 0.004)


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
def users_euler(monkeypatch):
    """Euler's method for the probability flow in σ̂ = √(1 − ᾱ)/√ᾱ, as a user would add it: one decorated function."""
    monkeypatch.setattr(samplers, "SAMPLERS", dict(samplers.SAMPLERS))

    @samplers.sampler("users_euler")
    def rows(walk):
        now, after = walk.now, walk.after
        s = after.sigma / now.sigma * (after.a / now.a)
        r = after.a * (1 - after.sigma / now.sigma)
        return samplers.Rows(now, r, s, torch.zeros_like(r), torch.zeros_like(r))


def test_a_sampler_is_one_function(users_euler):
    """It is sampled by name, in few steps and many, and is DDIM with η = 0 in other words."""
    ours, ddim = (table_of(name, 25, "pred_v", spacing="own") for name in ("users_euler", "ddim"))
    torch.testing.assert_close(ours.table, ddim.table, rtol=1e-9, atol=1e-12)
    network = Unet(8, dim_mults=(1, 2))
    images = [
        GaussianDiffusion(network, image_size=8, sampling_timesteps=4, sampler=name).sample(2, seed=1, progress=False)
        for name in ("users_euler", "ddim")
    ]
    torch.testing.assert_close(*images)
    with pytest.raises(ValueError, match="a sampler of the name 'users_euler' is registered already"):
        samplers.sampler("users_euler")(None)
