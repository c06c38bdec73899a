"""Loss weightings, learned weights, zero terminal SNR, draws of timesteps, and what a training step costs."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import (
    ContinuousTimeGaussianDiffusion,
    ElucidatedDiffusion,
    GaussianDiffusion,
    RectifiedFlow,
    Unet,
    VParamContinuousTimeGaussianDiffusion,
)
from ddpm_fast.diffusion.levels import TARGETS
from ddpm_fast.diffusion.schedules import Schedule, loss_weight, make_betas
from ddpm_fast.diffusion.timestep_history import LossSecondMoment
from ddpm_fast.diffusion.weightings import WEIGHTINGS, UncertaintyWeight, find_weighting, weight_of_output

SCHEDULE = Schedule(make_betas("cosine", 50))


def unet(**options) -> Unet:
    torch.manual_seed(0)
    return Unet(8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=4, **options)


EXPECTED = {
    "snr": lambda snr: snr,
    "min_snr": lambda snr: snr.clamp(max=5),
    "truncated_snr": lambda snr: snr.clamp(min=1),
    "p2": lambda snr: snr / (1 + snr),
    "edm": lambda snr: snr + 4,
    "x0": torch.ones_like,
}


@pytest.mark.parametrize("objective", TARGETS)
@pytest.mark.parametrize("name", EXPECTED)
def test_weightings_mean_the_same_for_every_output(name, objective):
    """An error of x0 weighs the same, whatever the network gives: out's error is x0's over q."""
    weight, snr = find_weighting(name), SCHEDULE.snr
    torch.testing.assert_close(weight(snr), EXPECTED[name](snr))
    found = weight_of_output(SCHEDULE.levels, TARGETS[objective], weight)
    torch.testing.assert_close(found, loss_weight(SCHEDULE, objective, weight), rtol=1e-9, atol=1e-15)
    errors = {"pred_noise": 1 / snr, "pred_x0": torch.ones_like(snr), "pred_v": 1 / (snr + 1)}[objective]
    torch.testing.assert_close(found, EXPECTED[name](snr) * errors, rtol=1e-9, atol=1e-15)


def test_every_weighting_is_tested():
    assert set(EXPECTED) | {"uniform"} == set(WEIGHTINGS)


@pytest.mark.parametrize("options", [{"gamma": 0.5, "k": 2.0}, {"k": 1}])
def test_options_of_a_weighting(options):
    snr = SCHEDULE.snr
    k, gamma = options.get("k", 1), options.get("gamma", 1)
    torch.testing.assert_close(find_weighting("p2", options)(snr), snr / (k + snr) ** gamma)
    diffusion = GaussianDiffusion(
        unet(), image_size=8, timesteps=50, loss_weighting="p2", loss_weighting_options=options, beta_schedule="cosine"
    )
    torch.testing.assert_close(
        diffusion.loss_weight.double(), (snr / (k + snr) ** gamma) / (snr + 1), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"loss_weighting": "p3"}, ValueError, "loss_weighting must be a function or one of snr, min_snr"),
        (
            {"loss_weighting": "p2", "loss_weighting_options": {"q": 1}},
            TypeError,
            "has no option 'q'; it takes gamma, k",
        ),
        ({"loss_weighting": "p2", "min_snr_loss_weight": True}, ValueError, "loss_weighting must be None with min_snr"),
        ({"loss_weighting": lambda snr: snr[:3]}, ValueError, "must give a weight of at least 0 for each"),
        ({"loss_weighting": lambda snr: -snr}, ValueError, "must give a weight of at least 0 for each"),
        ({"zero_terminal_snr": True, "objective": "pred_noise"}, ValueError, "objective must be pred_v or pred_x0"),
        ({"zero_terminal_snr": True, "loss_weighting": "snr"}, ValueError, "must not be 0 at T − 1"),
        ({"timestep_sampler": "importance"}, ValueError, "timestep_sampler must be one of uniform, loss-second-moment"),
    ],
)
def test_wrong_options_get_one_sentence(options, error, message):
    with pytest.raises(error, match=message):
        GaussianDiffusion(unet(), image_size=8, timesteps=50, **options)


def test_uncertainty_weight_finds_the_size_of_the_loss():
    """The best u of loss·e^(−u) + u is log(loss) (Karras et al. 2024, section B.5)."""
    torch.manual_seed(0)
    uncertainty = UncertaintyWeight(features=32)
    levels = torch.linspace(-3, 3, 16)
    losses = torch.exp(levels.sin())
    assert torch.equal(uncertainty(losses, levels), losses), "it begins with u = 0"
    optimizer = torch.optim.Adam(uncertainty.parameters(), lr=0.03)
    for _ in range(600):
        optimizer.zero_grad()
        uncertainty(losses, levels).mean().backward()
        optimizer.step()
    u = -torch.log((uncertainty(losses + 1, levels) - uncertainty(losses, levels)).detach())
    torch.testing.assert_close(u, levels.sin(), rtol=0, atol=0.1)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_zero_terminal_snr(schedule):
    rescaled = Schedule(make_betas(schedule, 50)).with_zero_terminal_snr()
    assert rescaled.alphas_cumprod[-1] == 0 and rescaled.betas[-1] == 1
    torch.testing.assert_close(rescaled.alphas_cumprod[0], Schedule(make_betas(schedule, 50)).alphas_cumprod[0])
    diffusion = GaussianDiffusion(
        unet(), image_size=8, timesteps=50, beta_schedule=schedule, zero_terminal_snr=True, sampling_timesteps=6
    )
    assert (diffusion.loss_weight == 1).all()
    assert all(buffer.isfinite().all() for buffer in diffusion.buffers()), "an average of weights moves buffers, too"
    for sampler in (None, "ddpm", "dpmpp_2m", "heun"):
        assert diffusion.sample(2, sampler=sampler, seed=1, progress=False).isfinite().all()
    diffusion(torch.rand(4, 3, 8, 8), times=torch.tensor([0, 20, 48, 49])).backward()
    t = torch.tensor([49, 10])
    x, x0 = torch.randn(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(diffusion.predict_noise_from_start(x, t, x0)[0], x[0])
    again = GaussianDiffusion(
        unet(), image_size=8, timesteps=50, beta_schedule=schedule, zero_terminal_snr=True, sampling_timesteps=6
    )
    again.load_state_dict(diffusion.state_dict())
    assert torch.equal(again.sample(1, seed=2, progress=False), diffusion.sample(1, seed=2, progress=False))


class Naive:
    """OpenAI's LossSecondMomentResampler, one loss after another."""

    def __init__(self, num_timesteps: int, length: int):
        self.history, self.length = [[] for _ in range(num_timesteps)], length

    def update(self, t, losses):
        for time, loss in zip(t.tolist(), losses.tolist(), strict=True):
            self.history[time] = [*self.history[time], loss][-self.length :]

    def probabilities(self, uniform=0.001):
        if any(len(losses) < self.length for losses in self.history):
            return torch.full((len(self.history),), 1 / len(self.history))
        weights = torch.tensor([math.sqrt(sum(x**2 for x in losses) / len(losses)) for losses in self.history])
        return weights / weights.sum() * (1 - uniform) + uniform / len(self.history)


def test_history_of_losses_is_openais():
    history, naive = LossSecondMoment(5, length=3), Naive(5, 3)
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        t = torch.randint(0, 5, (7,), generator=generator) if step % 4 else torch.full((7,), step % 5)
        losses = torch.rand(7, generator=generator)
        history.update(t, losses)
        naive.update(t, losses)
        torch.testing.assert_close(history.probabilities(), naive.probabilities(), rtol=1e-5, atol=1e-7)
    assert len(set(history.probabilities().tolist())) > 1, "the history is full by now"
    torch.manual_seed(0)
    t, weights = history.draw(20_000)
    share = torch.bincount(t, minlength=5) / 20_000
    torch.testing.assert_close(share, history.probabilities(), rtol=0, atol=0.02)
    torch.testing.assert_close(weights, 1 / (5 * history.probabilities()[t]))


def test_timesteps_drawn_by_their_losses():
    diffusion = GaussianDiffusion(
        unet(), image_size=8, timesteps=4, timestep_sampler="loss-second-moment", beta_schedule="cosine"
    )
    for _ in range(30):
        diffusion(torch.rand(8, 3, 8, 8)).backward()
    history = diffusion.timestep_history
    assert (history.counts >= 10).all() and history.counts.sum() == 240
    assert history.probabilities().std() > 0
    before = history.counts.clone()
    diffusion.eval()
    diffusion(torch.rand(8, 3, 8, 8))
    diffusion.train()
    diffusion(torch.rand(8, 3, 8, 8), times=torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    assert torch.equal(history.counts, before), "only training on drawn timesteps counts"
    again = GaussianDiffusion(
        unet(), image_size=8, timesteps=4, timestep_sampler="loss-second-moment", beta_schedule="cosine"
    )
    again.load_state_dict(diffusion.state_dict())
    losses = []
    for process in (diffusion, again):
        torch.manual_seed(9)
        losses.append(process(torch.ones(8, 3, 8, 8)))
    assert torch.equal(*losses)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operators_of_a_step(diffusion) -> int:
    images = torch.rand(2, 3, 8, 8)
    diffusion(images).backward()
    with Operators() as mode:
        diffusion(images).backward()
    return sum(mode.counts.values())


@pytest.mark.parametrize(
    "process, options",
    [
        (ElucidatedDiffusion, {}),
        (ContinuousTimeGaussianDiffusion, {}),
        (ContinuousTimeGaussianDiffusion, {"noise_schedule": "cosine"}),
        (VParamContinuousTimeGaussianDiffusion, {}),
        (RectifiedFlow, {}),
        (RectifiedFlow, {"time_distribution": "logit_normal"}),
    ],
)
def test_a_training_step_has_at_most_15_operators_more_than_discrete_diffusions(process, options):
    discrete = operators_of_a_step(GaussianDiffusion(unet(), image_size=8, timesteps=50))
    discrete += 1  # aminmax, the check of timesteps, which is left out where a mode watches
    assert operators_of_a_step(process(unet(), image_size=8, **options)) <= discrete + 15
