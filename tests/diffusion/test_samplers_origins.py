"""Samplers against the code that they come from: k-diffusion's and diffusers', from the same start and noise.

The denoiser is not linear, and the states of every step are compared: 1e-9 in float64 by the table, 1e-5 of the range
in float32 by the op.
"""

from __future__ import annotations

import importlib
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from ddpm_fast.diffusion import samplers, spacings
from ddpm_fast.diffusion.levels import TARGETS
from ddpm_fast.diffusion.schedules import Schedule, make_betas
from ddpm_fast.ops.sampler_step.op import sampler_step_
from ddpm_fast.testing.sampler_cases import TWO_CALLS, EdmScale, walk

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers gives tensors to numpy
REFERENCE_PACKAGES = Path(sys.prefix) / "reference-packages"
SHAPE = (2, 1, 3, 2)
SCALE = EdmScale()


def denoise(x: torch.Tensor, sigma) -> torch.Tensor:
    """A smooth x0 of x = x0 + σ·ε within (−1, 1)."""
    return 0.7 * torch.tanh(x / (1 + sigma**2)) + 0.1 * torch.sin(3 * x) / (1 + sigma)


@pytest.fixture(scope="module")
def k_diffusion():
    """k-diffusion's sampling, without its package's __init__, which imports what sampling does not need."""
    folder = REFERENCE_PACKAGES / "k_diffusion"
    if not folder.is_dir():
        pytest.fail("k-diffusion is not installed in the environment's reference-packages")
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(folder)]
    sys.modules["k_diffusion"] = package
    yield importlib.import_module("k_diffusion.sampling")
    for name in [name for name in sys.modules if name.split(".")[0] == "k_diffusion"]:
        del sys.modules[name]


CHURN = {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
# Ours, k-diffusion's, our options, and k-diffusion's where they differ.
K_DIFFUSION = [
    ("ddim", "sample_euler", {}, {}),
    ("ddim", "sample_euler_ancestral", {"eta": 0.7}, {"eta": 0.7}),
    ("euler", "sample_euler", {}, {}),
    ("euler", "sample_euler", CHURN, CHURN),
    ("heun", "sample_heun", {}, {}),
    ("heun", "sample_heun", CHURN, CHURN),
    ("heun", "sample_heun", {"s_churn": 40.0, "s_tmax": 1.0}, {"s_churn": 40.0, "s_tmax": 1.0}),  # γ = √2 − 1
    ("euler_ancestral", "sample_euler_ancestral", {}, {}),
    ("euler_ancestral", "sample_euler_ancestral", {"eta": 0.7, "s_noise": 0.9}, {"eta": 0.7, "s_noise": 0.9}),
    ("dpmpp_2m", "sample_dpmpp_2m", {}, {}),
    ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {}, {}),
    ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {"eta": 0.8, "solver": "heun"}, {"eta": 0.8, "solver_type": "heun"}),
    ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {"eta": 0.0}, {"eta": 0.0}),
    ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {}, {}),
    ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {"eta": 0.8, "s_noise": 1.1}, {"eta": 0.8, "s_noise": 1.1}),
    ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {"eta": 0.0}, {"eta": 0.0}),
    ("dpmpp_2s_a", "sample_dpmpp_2s_ancestral", {}, {}),
    ("dpmpp_2s_a", "sample_dpmpp_2s_ancestral", {"eta": 0.8, "s_noise": 1.1}, {"eta": 0.8, "s_noise": 1.1}),
    ("dpmpp_2s_a", "sample_dpmpp_2s_ancestral", {"eta": 0.0}, {"eta": 0.0}),
    ("lms", "sample_lms", {"order": 1}, {"order": 1}),
    ("lms", "sample_lms", {"order": 2}, {"order": 2}),
    ("lms", "sample_lms", {}, {"order": 3}),
]


def their_walk(function, levels, x, noises, options, monkeypatch):
    """(the x and denoised of every step, the result, the noises that entered), of a sampler of k-diffusion's."""
    sigmas = torch.cat([levels.sigma, torch.zeros(1, dtype=torch.float64)])
    drawn = iter(noises)
    used, seen = [], []

    def draw(*unused, **options):
        used.append(next(drawn))
        return used[-1]

    if "sde" in function.__name__ or "ancestral" in function.__name__:
        options = {**options, "noise_sampler": draw}
    monkeypatch.setattr(torch, "randn_like", draw)  # of Euler's and Heun's churn
    model = lambda x, sigma: denoise(x, sigma.reshape(-1, 1, 1, 1))  # noqa: E731
    result = function(model, x.clone(), sigmas, disable=True, callback=lambda step: seen.append(dict(step)), **options)
    if "s_churn" in options:  # drawn at every step, and used where σ is raised
        used = [eps for eps, step in zip(used, seen, strict=True) if step["sigma_hat"] > step["sigma"]]
        assert used
    return [(step["x"], step["denoised"]) for step in seen], result, used


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 18])
@pytest.mark.parametrize("name, theirs, options, their_options", K_DIFFUSION)
def test_k_diffusion(k_diffusion, monkeypatch, name, theirs, options, their_options, steps):
    """The last step of LMS is of its order in k-diffusion and of first order here: its result is not compared.

    k-diffusion's SDE samplers cannot do one step (UnboundLocalError).
    """
    if "sde" in name:
        steps = max(steps, 2)
    if "s_churn" in options:
        steps = max(steps, 5)  # some σ must lie between s_tmin and s_tmax
    torch.manual_seed(steps)
    levels = SCALE.at(spacings.spaced_times(SCALE, "karras", steps))
    plan = samplers.sampler_table(SCALE, TARGETS["pred_x0"], name, steps, spacing="karras", options=options)
    noises = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(2 * steps)]
    start = torch.randn(SHAPE, dtype=torch.float64) * levels.sigma[0]
    seen, result, used = their_walk(getattr(k_diffusion, theirs), levels, start, noises, their_options, monkeypatch)

    x = start * levels.a[0]
    states, starts = walk(plan, SCALE, denoise, x, used)
    calls = 2 if name in TWO_CALLS else 1
    torch.testing.assert_close(starts[::calls], [denoised for _, denoised in seen], rtol=0, atol=1e-9)
    if "s_churn" not in options:  # with it our states have the noise of the next step already
        expected = [x * a for (x, _), a in zip(seen[1:], levels.a[1:], strict=True)]
        torch.testing.assert_close(states[calls - 1 : -1 : calls], expected, rtol=0, atol=1e-9)
    if name != "lms":
        torch.testing.assert_close(states[-1], result, rtol=0, atol=1e-9)

    by_op, _ = walk(plan, SCALE, denoise, x.float(), used, step=sampler_step_)
    for found, truth in zip(by_op, states, strict=True):
        assert_within_1e_5_of_the_range(found, truth)


def assert_within_1e_5_of_the_range(found: torch.Tensor, truth: torch.Tensor) -> None:
    """The range of images is 2, and that of a state at least as large."""
    reach = max(1.0, truth.abs().max().item())
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-5 * 2 * reach)


@pytest.mark.parametrize("first", [20.0, 60.0])
def test_the_churn_of_the_first_step_is_in_the_first_scale(k_diffusion, monkeypatch, first):
    """The start of σ and the noise that raises it are one normal of a larger deviation."""
    times = [math.log(sigma) / 4 for sigma in (first, 3.0, 0.5, 0.01)]
    options = {"s_churn": 1.0, "s_noise": 1.1}
    plan = samplers.sampler_table(SCALE, TARGETS["pred_x0"], "heun", 4, spacing=times, options=options)
    levels = SCALE.at(torch.tensor(times, dtype=torch.float64))
    noises = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(4)]
    start = torch.randn(SHAPE, dtype=torch.float64) * first
    seen, result, used = their_walk(k_diffusion.sample_heun, levels, start, noises, options, monkeypatch)
    raised = SCALE.at(torch.tensor([plan.times[0]], dtype=torch.float64))
    assert raised.sigma.item() == pytest.approx(seen[0][1].new_tensor(first * 1.25).item(), rel=1e-12)
    states, _ = walk(plan, SCALE, denoise, seen[0][0] * raised.a, used[1:])
    torch.testing.assert_close(states[-1], result, rtol=0, atol=1e-9)
    deviation = math.hypot(first, 1.1 * first * math.sqrt(1.25**2 - 1))
    assert plan.first_scale == pytest.approx(raised.a.item() * deviation, rel=1e-12)


LINEAR = Schedule(make_betas("linear", 1000))


def diffusers_walk(scheduler, plan, levels, x, dtype=torch.float64):
    """diffusers' states on our timesteps. Its σ are float32, so that they are replaced by ours in float64."""
    scheduler.set_timesteps(len(plan.times))
    scheduler.timesteps = torch.tensor(plan.times)
    scheduler.sigmas = torch.cat([levels.sigma, torch.zeros(1, dtype=torch.float64)]).to(dtype)
    states = []
    for i, time in enumerate(scheduler.timesteps):
        output = denoise(x / levels.a[i].to(dtype), levels.sigma[i].to(dtype))
        x = scheduler.step(output, time, x).prev_sample
        states.append(x)
    return states


def assert_equals_diffusers(scheduler, name, steps, options, last=None):
    torch.manual_seed(steps)
    plan = samplers.sampler_table(LINEAR, TARGETS["pred_x0"], name, steps, options=options)
    levels = LINEAR.at(torch.tensor(plan.times, dtype=torch.float64))
    x = torch.randn(SHAPE, dtype=torch.float64)
    theirs = diffusers_walk(scheduler, plan, levels, x.clone())
    ours, _ = walk(plan, LINEAR, denoise, x)
    torch.testing.assert_close(ours[:last], theirs[:last], rtol=0, atol=1e-9)
    by_op, _ = walk(plan, LINEAR, denoise, x.float(), step=sampler_step_)
    for found, truth in zip(by_op, ours, strict=True):
        assert_within_1e_5_of_the_range(found, truth)


OURS = {"num_train_timesteps": 1000, "trained_betas": LINEAR.betas.tolist(), "prediction_type": "sample"}


@pytest.mark.parametrize("solver", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25])
def test_unipc_is_diffusers(steps, order, solver):
    """With diffusers' σ replaced by ours in float64. The last step with bh1, onto the data, is NaN in diffusers."""
    from diffusers import UniPCMultistepScheduler

    theirs = UniPCMultistepScheduler(**OURS, solver_order=order, solver_type=solver, final_sigmas_type="zero")
    last = -1 if solver == "bh1" else None
    assert_equals_diffusers(theirs, "unipc", steps, {"order": order, "solver": solver}, last)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [2, 3, 10, 14])
def test_deis_is_diffusers(steps, order):
    """With diffusers' σ replaced by ours in float64, and up to the last step, which onto the data is NaN there."""
    from diffusers import DEISMultistepScheduler

    theirs = DEISMultistepScheduler(**OURS, solver_order=order, solver_type="logrho")
    assert_equals_diffusers(theirs, "deis", steps, {"order": order}, last=-1)


@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_dpmpp_2m_is_diffusers(steps):
    """diffusers computes in float32 whatever it is given, so that 1e-5 is asked for; k-diffusion's is held to 1e-9."""
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(**OURS, solver_order=2, solver_type="midpoint", final_sigmas_type="zero")
    plan = samplers.sampler_table(LINEAR, TARGETS["pred_x0"], "dpmpp_2m", steps)
    levels = LINEAR.at(torch.tensor(plan.times, dtype=torch.float64))
    x = torch.randn(SHAPE, dtype=torch.float64)
    states = diffusers_walk(theirs, plan, levels, x.clone())
    ours, _ = walk(plan, LINEAR, denoise, x)
    torch.testing.assert_close(ours, [state.double() for state in states], rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_diffusers(eta):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**OURS, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
    theirs.alphas_cumprod = LINEAR.alphas_cumprod
    theirs.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    theirs.set_timesteps(20)
    plan = samplers.sampler_table(LINEAR, TARGETS["pred_x0"], "ddim", 20, spacing="leading", options={"eta": eta})
    assert theirs.timesteps.tolist() == list(plan.times)
    levels = LINEAR.at(torch.tensor(plan.times, dtype=torch.float64))
    x = torch.randn(SHAPE, dtype=torch.float64)
    noises = [torch.randn(SHAPE, dtype=torch.float64) for _ in plan.times]
    ours, _ = walk(plan, LINEAR, denoise, x, noises)
    for i, time in enumerate(theirs.timesteps):
        output = denoise(x / levels.a[i], levels.sigma[i])
        x = theirs.step(output, time, x, eta=eta, variance_noise=noises[i]).prev_sample
        # diffusers adds the variance of the last step, too, where ᾱ_previous = 1 makes it 0.
        torch.testing.assert_close(ours[i], x, rtol=0, atol=1e-9)
