"""Accelerated pipelines of diffusers: the same images of a generator, each step one row of a table."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, PNDMScheduler, UNet2DModel

import ddpm_fast
from ddpm_fast.integrations import diffusers_pipelines as family
from ddpm_fast.integrations.accelerate import is_accelerated

DDPM = {
    "default": {},
    "large variance": {"variance_type": "fixed_large", "clip_sample": False},
    "log variance, trailing": {"variance_type": "fixed_small_log", "timestep_spacing": "trailing"},
    "learned variance": {"variance_type": "learned_range"},
    "v, cosine": {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    "sample, linspace": {"prediction_type": "sample", "timestep_spacing": "linspace"},
    "v, no signal at the end": {
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    },
}  # fmt: skip
DDIM = {
    "default": ({}, {}),
    "noise": ({"clip_sample": False, "set_alpha_to_one": False}, {"eta": 1.0}),
    "noise that agrees": ({"prediction_type": "v_prediction"}, {"eta": 0.5, "use_clipped_model_output": True}),
    "sample, kept noise": ({"prediction_type": "sample", "steps_offset": 1}, {"eta": 0.3}),
    "v, kept noise": ({"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}, {}),
}


def network(**options):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        **options,
    )


def accelerated(scheduler):
    pipeline = DDPMPipeline(unet=network(), scheduler=copy.deepcopy(scheduler))
    return ddpm_fast.accelerate(pipeline).scheduler


def assert_same_steps(scheduler, monkeypatch, **options):
    """Every step of a walk, from the states of the scheduler's own."""
    ours, rows = accelerated(scheduler), []
    take = family._Steps._take
    monkeypatch.setattr(family._Steps, "_take", lambda *args: rows.append(args) or take(*args))
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    channels = 6 if getattr(scheduler, "variance_type", None) == "learned_range" else 3
    for one in (scheduler, ours):
        one.set_timesteps(7)
    for step, t in enumerate(scheduler.timesteps):
        out = torch.tanh(torch.randn(2, channels, 8, 8))
        expected, found = (
            one.step(out, t, x, generator=torch.Generator().manual_seed(step), **options) for one in (scheduler, ours)
        )
        assert type(found) is type(expected)
        for name in ("prev_sample", "pred_original_sample"):
            largest = expected[name].abs().max().item()
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=2e-5 * largest)
        x = expected.prev_sample
    assert len(rows) == 7, "not every step was a row of a table"
    assert isinstance(ours.step(out, t, x, return_dict=False), tuple)


@pytest.mark.parametrize("name", DDPM)
def test_ancestral_steps(name, monkeypatch):
    assert_same_steps(DDPMScheduler(**DDPM[name]), monkeypatch)


@pytest.mark.parametrize("name", DDIM)
def test_steps_of_ddim(name, monkeypatch):
    options, call = DDIM[name]
    assert_same_steps(DDIMScheduler(**options), monkeypatch, **call)


def test_noise_that_is_given(monkeypatch):
    scheduler = DDIMScheduler(clip_sample=False)
    ours, noise, out, x = accelerated(scheduler), *(torch.randn(2, 3, 8, 8) for _ in range(3))
    for one in (scheduler, ours):
        one.set_timesteps(5)
    given = {"eta": 1.0, "variance_noise": noise}
    expected = scheduler.step(out, 400, x, **given).prev_sample
    torch.testing.assert_close(ours.step(out, 400, x, **given).prev_sample, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
        ours.step(out, 400, x, generator=torch.Generator(), **given)


@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline])
def test_pipelines(kind, tmp_path):
    scheduler = DDPMScheduler() if kind is DDPMPipeline else DDIMScheduler()
    pipeline = kind(unet=network().eval(), scheduler=scheduler)
    options = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
    draw = lambda: pipeline(generator=torch.Generator().manual_seed(3), **options).images  # noqa: E731
    expected = draw()
    assert ddpm_fast.accelerate(pipeline) is pipeline
    assert any(is_accelerated(module) for module in pipeline.unet.modules())
    assert abs(draw() - expected).max() < 1e-3
    text = ddpm_fast.explain(model=pipeline)
    assert f"scheduler  {type(scheduler).__name__}  sampler_step" in text
    assert "preactivation_block" in text and "are replayed from a tape, " in text
    assert (
        isinstance(pipeline.scheduler, type(scheduler)) and type(scheduler).__name__ == kind.__name__[:4] + "Scheduler"
    )
    pipeline.save_pretrained(tmp_path)
    assert type(kind.from_pretrained(tmp_path).scheduler) in (DDPMScheduler, DDIMScheduler)
    again = pickle.loads(pickle.dumps(pipeline.scheduler))
    assert type(again) is type(pipeline.scheduler) and again.config == pipeline.scheduler.config
    assert ddpm_fast.restore(pipeline) is pipeline
    assert type(pipeline.scheduler) in (DDPMScheduler, DDIMScheduler)
    assert (draw() == expected).all()


REFUSALS = {
    "its threshold depends": DDPMScheduler(thresholding=True),
    "it clips to 2": DDIMScheduler(clip_sample_range=2.0),
    "variance_type is 'learned'": DDPMScheduler(variance_type="learned"),
    "it is a PNDMScheduler": PNDMScheduler(),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_schedulers_that_keep_their_own_step(reason):
    pipeline = ddpm_fast.accelerate(DDPMPipeline(unet=network(), scheduler=copy.deepcopy(REFUSALS[reason])))
    assert type(pipeline.scheduler) is type(REFUSALS[reason])
    assert f"its own step: {reason}" in ddpm_fast.explain(model=pipeline)


def test_calls_that_keep_diffusers_step(monkeypatch):
    scheduler = accelerated(DDPMScheduler(50))
    own = DDPMScheduler(50)
    for one in (scheduler, own):
        one.set_timesteps(50)
    monkeypatch.setattr(family._Steps, "_take", lambda *args: pytest.fail("a row of a table"))
    draw = lambda one, x, out: one.step(out, 20, x, generator=torch.Generator().manual_seed(0)).prev_sample  # noqa: E731
    x, out = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    for given in ((x.double(), out.double()), (x.half(), out.half()), (x[0], out[0])):
        assert torch.equal(draw(scheduler, *given), draw(own, *given))
    with ddpm_fast.use_backend("reference"):
        assert torch.equal(draw(scheduler, x, out), draw(own, x, out))


def test_calls_of_ddim_that_keep_diffusers_step():
    ours, own = accelerated(DDIMScheduler()), DDIMScheduler()
    x, out = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    for one in (ours, own):
        one.set_timesteps(5)
    for options in ({"eta": -0.5}, {"eta": 0.5, "variance_noise": torch.randn(1, 3, 1, 1)}):
        expected = own.step(out, 400, x, **options).prev_sample
        assert torch.equal(ours.step(out, 400, x, **options).prev_sample, expected)
    for one in (ours, accelerated(DDPMScheduler())):
        with pytest.raises(IndexError, match="out of bounds for dimension 0 with size 1000"):
            one.step(out, 1000, x)


def test_levels_that_somebody_writes():
    scheduler, own = accelerated(DDIMScheduler()), DDIMScheduler()
    x, out = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    for one in (scheduler, own):
        one.set_timesteps(10)
        one.step(out, 500, x)
        one.alphas_cumprod.mul_(0.5)
    expected = own.step(out, 500, x).prev_sample
    torch.testing.assert_close(scheduler.step(out, 500, x).prev_sample, expected, rtol=1e-4, atol=1e-4)
