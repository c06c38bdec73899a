"""Folders of diffusers' pipelines as processes of this package, and back."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, PNDMScheduler, UNet2DModel
from safetensors.torch import load_file

import ddpm_fast
from ddpm_fast.integrations import diffusers_network
from ddpm_fast.integrations.accelerate import is_accelerated
from ddpm_fast.integrations.diffusers_folders import DiffusersNetwork, from_diffusers, process_options, to_diffusers
from ddpm_fast.ops.sampler_step.op import sampler_step


def network(**options):
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "block_out_channels": (16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**defaults, **options}).eval()


SCHEDULERS = {
    "ddpm": DDPMScheduler(),
    "large variance": DDPMScheduler(variance_type="fixed_large", clip_sample=False),
    "v, cosine": DDPMScheduler(50, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    "sample, other ends": DDPMScheduler(40, beta_start=0.001, beta_end=0.3, prediction_type="sample"),
    "given betas": DDPMScheduler(4, trained_betas=[0.1, 0.2, 0.5, 0.9], timestep_spacing="trailing"),
    "no signal at the end": DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "learned": DDPMScheduler(60, beta_end=0.2, variance_type="learned_range"),
    "ddim": DDIMScheduler(),
    "ddim, scaled linear": DDIMScheduler(30, 0.001, 0.3, "scaled_linear", clip_sample=False),
}


def pipeline(name, **options):
    scheduler = SCHEDULERS[name]
    kind = DDIMPipeline if isinstance(scheduler, DDIMScheduler) else DDPMPipeline
    channels = {"out_channels": 6} if name == "learned" else {}
    return kind(unet=network(**channels, **options), scheduler=scheduler)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipeline_comes_back_as_it_was(name, tmp_path):
    there = pipeline(name)
    there.save_pretrained(tmp_path / "theirs")
    diffusion = from_diffusers(tmp_path / "theirs")
    assert any(is_accelerated(module) for module in diffusion.modules())
    to_diffusers(diffusion, tmp_path / "ours")
    theirs, ours = (
        load_file(tmp_path / x / "unet" / "diffusion_pytorch_model.safetensors") for x in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)

    again = type(there).from_pretrained(tmp_path / "ours")
    assert type(again.unet) is UNet2DModel and type(again.scheduler) is type(there.scheduler)
    configs = [json.loads(json.dumps(dict(p.unet.config))) for p in (again, there)]
    assert all(configs[0][key] == value for key, value in configs[1].items() if key[0] != "_")
    torch.testing.assert_close(again.scheduler.betas, there.scheduler.betas, rtol=1e-3, atol=1e-6)
    for key in ("prediction_type", "clip_sample", "variance_type", "timestep_spacing", "num_train_timesteps"):
        assert again.scheduler.config.get(key) == there.scheduler.config.get(key), key
    drawn = [p(2, torch.Generator().manual_seed(1), num_inference_steps=3, output_type="np") for p in (there, again)]
    torch.testing.assert_close(*[torch.from_numpy(d.images) for d in drawn], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sampling_takes_the_schedulers_steps(name):
    """From the same noise, with the noise of each step given: the walk of the scheduler, step by step."""
    there = pipeline(name)
    diffusion = from_diffusers(there, accelerate=False)
    is_ddim = isinstance(there.scheduler, DDIMScheduler)
    steps = 10 if is_ddim else 4
    plan = diffusion._plan(None, steps, None, None)
    there.scheduler.set_timesteps(steps)
    assert list(plan.times) == there.scheduler.timesteps.tolist()
    x = torch.randn(2, 3, 8, 8)
    table, seed = plan.table.float(), torch.zeros(1, dtype=torch.int64)
    for row, time in enumerate(there.scheduler.timesteps[:-1]):
        with torch.no_grad():
            out = there.unet(x, time).sample
            ours_out = diffusion.model(x, torch.full((2,), int(time)))
        torch.testing.assert_close(ours_out, out)
        # Our DDIM goes along the noise that agrees with the clipped x0.
        options = {"use_clipped_model_output": True} if is_ddim else {}
        generator = torch.Generator().manual_seed(row)
        expected = there.scheduler.step(out, time, x, generator=generator, **options).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(row))
        given = {"noise": noise, "clip_x_start": diffusion.clip_x_start}
        ours, _ = sampler_step(x, out, table, torch.tensor([row]), seed, **given)
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
        x = expected


def test_training_is_the_squared_error_of_the_output():
    diffusion = from_diffusers(pipeline("v, cosine"), accelerate=False)
    images, noise, t = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([3, 40])
    loss = diffusion(images, times=t, noise=noise)
    scheduler = SCHEDULERS["v, cosine"]
    x = scheduler.add_noise(2 * images - 1, noise, t)
    target = scheduler.get_velocity(2 * images - 1, noise, t)
    expected = torch.nn.functional.mse_loss(diffusion.model.unet(x, t).sample, target)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in diffusion.parameters())


def test_a_network_with_classes():
    diffusion = from_diffusers(pipeline("ddpm", num_class_embeds=4), sampling_timesteps=2)
    images, classes = torch.rand(2, 3, 8, 8), torch.tensor([0, 3])
    assert diffusion(images, classes=classes).isfinite()
    assert diffusion.sample(classes=classes, progress=False).shape == images.shape
    with pytest.raises(ValueError, match="classes must be in"):
        diffusion(images, classes=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="classes must be given"):
        diffusion(images)


def test_the_process_samples_and_its_steps_have_the_schedulers_clipping():
    torch.manual_seed(0)
    diffusion = from_diffusers(pipeline("large variance"), sampling_timesteps=3)
    assert diffusion.clip_x_start is False and diffusion.sampler_options == {"large": 1.0}
    images = diffusion.sample(2, seed=1, progress=False)
    assert images.shape == (2, 3, 8, 8) and not torch.equal(images, diffusion.sample(2, seed=2, progress=False))
    clipped = diffusion.sample(2, seed=1, progress=False, clip_x_start=True)
    assert not torch.equal(images, clipped)


OURS = {
    "rms": {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 8},
    "group": {
        "dim": 8,
        "dim_mults": (1, 2),
        "attn_heads": 2,
        "attn_dim_head": 8,
        "norm": "group",
        "resnet_block_groups": 4,
    },
}


@pytest.mark.parametrize("name", OURS)
def test_a_network_of_this_package_in_a_pipeline(name, tmp_path):
    torch.manual_seed(0)
    diffusion = ddpm_fast.GaussianDiffusion(
        ddpm_fast.Unet(**OURS[name]), image_size=(8, 16), timesteps=30, beta_schedule="cosine", sampler="ddim"
    ).eval()
    to_diffusers(diffusion, tmp_path)
    there = DDIMPipeline.from_pretrained(tmp_path)
    assert type(there.unet) is diffusers_network.FastUnet2D
    x, t = torch.randn(2, 3, 8, 16), torch.tensor(7)
    with torch.no_grad():
        expected = diffusion.model(x, t)
        assert torch.equal(there.unet(x, t).sample, expected)
        assert torch.equal(there.unet(x, t, return_dict=False)[0], expected)
    assert there(1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 16, 3)
    again = from_diffusers(tmp_path)
    assert type(again.model) is ddpm_fast.Unet
    assert (again.objective, again.image_size, again.num_timesteps) == ("pred_v", (8, 16), 30)
    ours, theirs = diffusion.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_folders_of_no_pipeline_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder /nowhere does not exist"):
        from_diffusers("/nowhere")
    with pytest.raises(FileNotFoundError, match=f"folder {tmp_path} has no model_index.json, so it is of no pipeline"):
        from_diffusers(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=f"folder {tmp_path / 'file'} is no folder"):
        from_diffusers(str(tmp_path / "file"))


def test_what_no_process_does():
    cases = {
        "scheduler must be a DDPMScheduler or a DDIMScheduler, got a PNDMScheduler": PNDMScheduler(),
        "thresholding must be False": DDPMScheduler(thresholding=True),
        "clip_sample_range must be 1": DDPMScheduler(clip_sample_range=2.0),
        "steps_offset must be 0": DDIMScheduler(steps_offset=1),
        "variance_type must be one of .* got 'learned'": DDPMScheduler(variance_type="learned"),
    }
    for sentence, scheduler in cases.items():
        with pytest.raises(ValueError, match=sentence):
            process_options(scheduler)
    with pytest.raises(ValueError, match="class_embed_type must be None"):
        DiffusersNetwork(network(class_embed_type="timestep"))
    with pytest.raises(ValueError, match="time_embedding_type must be positional"):
        DiffusersNetwork(network(time_embedding_type="fourier"))
    with pytest.raises(TypeError, match="unet must be a UNet2DModel of diffusers, got Conv2d"):
        DiffusersNetwork(torch.nn.Conv2d(3, 3, 1))
    with pytest.raises(TypeError, match="pipeline with unet and scheduler"):
        from_diffusers(network())
    with pytest.raises(ValueError, match="image_size must be given"):
        from_diffusers(pipeline("ddpm", sample_size=None))


def test_what_no_pipeline_does(tmp_path):
    unet = ddpm_fast.Unet(8, dim_mults=(1, 2), self_condition=True)
    with pytest.raises(ValueError, match="self_condition must not be set"):
        to_diffusers(ddpm_fast.GaussianDiffusion(unet, image_size=8), tmp_path)
    unet = ddpm_fast.Unet(8, dim_mults=(1, 2))
    with pytest.raises(ValueError, match="auto_normalize must be True"):
        to_diffusers(ddpm_fast.GaussianDiffusion(unet, image_size=8, auto_normalize=False), tmp_path)
    with pytest.raises(TypeError, match="got RectifiedFlow"):
        to_diffusers(ddpm_fast.RectifiedFlow(unet, image_size=8), tmp_path)
    half = ddpm_fast.GaussianDiffusion(unet, image_size=8, sampler="ddpm", sampler_options={"large": 0.5})
    with pytest.raises(ValueError, match="large must be 0 or 1"):
        to_diffusers(half, tmp_path)
    assert not list(tmp_path.iterdir())
