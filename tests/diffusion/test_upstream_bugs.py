"""Upstream's bugs that a drop-in must not copy; each test also shows that it would fail on upstream's behaviour.

The image stretch and the all-reduce of every accumulation step are in test_data.py and test_trainer.py.
"""

from __future__ import annotations

import random

import pytest
import torch

from ddpm_fast import GaussianDiffusion, Unet
from ddpm_fast.models import attention as attention_layers

SMALL = dict(dim=8, dim_mults=(1, 2))


class Recorder(torch.nn.Module):
    """A model that returns zeros and keeps what it was given: the loss is then the mean square of the target."""

    channels = out_dim = 3

    def __init__(self, self_condition: bool = False):
        super().__init__()
        self.self_condition = self_condition
        self.seen, self.conditions = [], []

    def forward(self, x, t, x_self_cond=None):
        self.seen.append(x)
        self.conditions.append(x_self_cond)
        return torch.zeros_like(x)


def target_agrees_with_input(diffusion) -> bool:
    """pred_noise with a model that returns 0: is the loss the mean square of the noise that is in x_t?"""
    x = torch.rand(16, 3, 4, 4)
    t = torch.full((16,), 7)
    loss = diffusion(x, times=t, loss_reduction="none")
    x_t = diffusion.model.seen[-1]
    eps = diffusion.predict_noise_from_start(x_t, t, diffusion.normalize(x))
    return torch.allclose(loss, eps.square().flatten(1).mean(1), rtol=1e-3)


def test_immiscible_target_is_the_noise_that_was_added(upstream):
    config = dict(image_size=4, timesteps=20, objective="pred_noise", immiscible=True, beta_schedule="cosine")
    assert target_agrees_with_input(GaussianDiffusion(Recorder(), **config))
    assert not target_agrees_with_input(upstream.GaussianDiffusion(Recorder(), **config)), "upstream has been fixed"


def test_immiscible_assigns_the_nearest_noise():
    diffusion = GaussianDiffusion(Recorder(), image_size=4, timesteps=20, immiscible=True)
    x = torch.randn(16, 3, 4, 4)
    total = torch.cdist(x.flatten(1), diffusion.training_noise(x).flatten(1)).diagonal().sum()
    diffusion.immiscible = False
    fresh = [torch.cdist(x.flatten(1), diffusion.training_noise(x).flatten(1)).diagonal().sum() for _ in range(10)]
    assert total < min(fresh)


@pytest.mark.parametrize("ours", [True, False])
def test_offset_noise_leaves_the_callers_tensor_alone(upstream, ours):
    cls = GaussianDiffusion if ours else upstream.GaussianDiffusion
    diffusion = cls(Recorder(), image_size=4, timesteps=20, offset_noise_strength=0.5)
    eps = torch.randn(2, 3, 4, 4)
    before = eps.clone()
    diffusion(torch.rand(2, 3, 4, 4), noise=eps)
    assert torch.equal(eps, before) == ours


def test_offset_noise_has_the_right_statistics():
    diffusion = GaussianDiffusion(Recorder(), image_size=4, timesteps=20)
    eps = diffusion.training_noise(torch.zeros(4000, 3, 4, 4), 0.5)
    assert eps.var().item() == pytest.approx(1.25, rel=0.03)
    assert eps.mean((2, 3)).var().item() == pytest.approx(1 / 16 + 0.25, rel=0.05)


def test_flash_attention_takes_float32_everywhere():
    """Upstream pins one flash backend on CUDA, which has no float32 kernel, and excludes the A100 by `> 8.0`."""
    attention = attention_layers.Attention(8, flash=True)
    plain = attention_layers.Attention(8, flash=False)
    plain.load_state_dict(attention.state_dict())
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(attention(x), plain(x))
    assert not any("sdpa_kernel" in name for name in attention_layers.__dict__)


def test_interpolate_ends_are_reconstructions(upstream, monkeypatch):
    """With a perfect denoiser of one image, either end of the interpolation gives that image back, in its own range."""
    image = torch.rand(1, 3, 4, 4)

    class Oracle(Recorder):
        def forward(self, x, t, x_self_cond=None):
            self.seen.append(t)
            return (image * 2 - 1).expand_as(x)

    config = dict(image_size=4, timesteps=20, objective="pred_x0")
    diffusion = GaussianDiffusion(Oracle(), **config)
    result = diffusion.interpolate(image, image, t=12, seed=1, progress=False)
    torch.testing.assert_close(result, image, rtol=1e-5, atol=1e-5)
    assert diffusion.model.seen[0].item() == 12 and len(diffusion.model.seen) == 13
    theirs = upstream.GaussianDiffusion(Oracle(), **config)
    assert not torch.allclose(theirs.interpolate(image, image, t=12), image, atol=1e-2), "upstream has been fixed"
    assert theirs.model.seen[0].item() == 11


def test_interpolate_goes_from_one_image_to_the_other():
    class Identity(Recorder):
        def forward(self, x, t, x_self_cond=None):
            return x

    diffusion = GaussianDiffusion(Identity(), image_size=4, timesteps=50, objective="pred_x0", beta_schedule="linear")
    x1, x2 = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    ends = [diffusion.interpolate(x1, x2, t=0, lam=lam, seed=3, progress=False).mean() for lam in (0.0, 0.5, 1.0)]
    assert ends[0] < 0.1 and 0.4 < ends[1] < 0.6 and ends[2] > 0.9


@pytest.mark.parametrize("ours", [True, False])
def test_self_conditioning_coin_is_torchs(upstream, ours):
    """torch.manual_seed fixes which steps are self-conditioned; in upstream Python's `random` decides."""
    cls = GaussianDiffusion if ours else upstream.GaussianDiffusion
    diffusion = cls(Recorder(self_condition=True), image_size=4, timesteps=20)

    def coins(python_seed):
        torch.manual_seed(3)
        random.seed(python_seed)
        diffusion.model.conditions.clear()
        flips = []
        for _ in range(24):
            diffusion(torch.rand(1, 3, 4, 4))
            flips.append(diffusion.model.conditions[-1] is not None)
        return flips

    first, second = coins(1), coins(2)
    assert True in first and False in first
    assert (first == second) == ours


def test_full_attn_false_is_not_unset(upstream):
    def kinds(module, cls):
        return [isinstance(stage[2], cls) for stage in module.downs]

    assert kinds(Unet(**SMALL, full_attn=False), attention_layers.LinearAttention) == [True, True]
    assert kinds(Unet(**SMALL), attention_layers.LinearAttention) == [True, False]
    assert kinds(upstream.Unet(**SMALL, full_attn=False), upstream.LinearAttention) == [True, False], (
        "upstream has been fixed"
    )


def test_given_noise_is_used_exactly_also_with_immiscible():
    config = dict(image_size=4, timesteps=20, objective="pred_noise", immiscible=True)
    diffusion = GaussianDiffusion(Recorder(), **config)
    eps = torch.randn(8, 3, 4, 4)
    x, t = torch.rand(8, 3, 4, 4), torch.full((8,), 5)
    diffusion(x, times=t, noise=eps)
    expected = diffusion.q_sample(diffusion.normalize(x), t, eps)
    assert torch.equal(diffusion.model.seen[-1], expected)
