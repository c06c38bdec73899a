"""Super-resolution: the condition that training makes, its noise, and `upscale`."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import ElucidatedDiffusion, GaussianDiffusion, RectifiedFlow, Unet, XMWrapper, noise
from ddpm_fast.diffusion import super_resolution

SIZE, FACTOR = 8, 4


class Recorder(torch.nn.Module):
    """A network that gives zeros, which is its x0, and keeps what it was told."""

    channels = out_dim = cond_channels = 3
    cond_dim, num_classes, cond_drop_prob = 1, None, 0.0
    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self):
        super().__init__()
        self.told = []

    def forward(self, x, t, x_self_cond=None, *, cond, cond_image):
        self.told.append((cond.clone(), cond_image.clone()))
        return torch.zeros_like(x)


def recorded(**options) -> GaussianDiffusion:
    options = {"image_size": SIZE, "timesteps": 20, "objective": "pred_x0", "super_resolution": FACTOR, **options}
    return GaussianDiffusion(Recorder(), **options)


def images(batch: int = 4, size: int = SIZE) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(5))


def clean_condition(x: torch.Tensor) -> torch.Tensor:
    """The condition of normalised images without noise, by torch's functions."""
    low = x.reshape(len(x), 3, SIZE // FACTOR, FACTOR, SIZE // FACTOR, FACTOR).mean((3, 5))
    return F.interpolate(low, size=(SIZE, SIZE), mode="bicubic", align_corners=False)


def test_without_noise_the_condition_is_the_small_image():
    diffusion = recorded(noise_augmentation=0.0)
    diffusion(images())
    cond, cond_image = diffusion.model.told[-1]
    assert cond.shape == (4, 1) and (cond == 0).all()
    torch.testing.assert_close(cond_image, clean_condition(images() * 2 - 1), rtol=1e-5, atol=1e-6)


def test_the_noise_has_the_level_that_the_network_is_told():
    """x0 = 0.5 everywhere: what is left of z_s without √(1 − s²)·x0, over s, is the noise function's."""
    generator = torch.Generator().manual_seed(0)
    low = torch.full((4000, 3, 2, 2), 0.5)
    levels = torch.rand(4000, generator=generator)
    made = super_resolution.augmented(low, levels, noise.seed_tensor(3))
    residuals = (made - (1 - levels**2).sqrt()[:, None, None, None] * 0.5) / levels[:, None, None, None]
    assert residuals.mean().item() == pytest.approx(0, abs=4 / math.sqrt(residuals.numel()))
    assert residuals.std().item() == pytest.approx(1, rel=4 / math.sqrt(2 * residuals.numel()))
    expected = noise.normal((4000, 3, 2, 2), seed=3, stream=noise.STREAM_AUGMENTATION)
    torch.testing.assert_close(residuals, expected, rtol=1e-3, atol=1e-3)


def test_levels_are_even():
    levels = super_resolution.random_levels(20_000, 0.4, noise.seed_tensor(1))
    sorted_levels = levels.sort().values
    steps = (torch.arange(20_000) + 0.5) / 20_000 * 0.4
    # Kolmogorov's statistic at a level of 1 in 1,000.
    assert ((sorted_levels - steps).abs().max() / 0.4).item() < 1.95 / math.sqrt(20_000)
    again = super_resolution.random_levels(7, 0.4, noise.seed_tensor(1))
    torch.testing.assert_close(again, levels[:7], rtol=0, atol=0)


def test_training_draws_new_noise_from_torchs_seed():
    diffusion = recorded()
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        diffusion(images())
    first, second, third = diffusion.model.told
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    assert (first[0] >= 0).all() and (first[0] <= super_resolution.LARGEST_LEVEL).all()


def test_bytes_and_mirrored_images_have_their_own_conditions():
    diffusion = recorded(noise_augmentation=0.0)
    as_bytes = (images() * 255).round().to(torch.uint8)
    flip = torch.tensor([True, False, True, False])
    diffusion(as_bytes, flip=flip)
    expected = torch.where(flip[:, None, None, None], as_bytes.flip(-1), as_bytes).float() / 127.5 - 1
    torch.testing.assert_close(diffusion.model.told[-1][1], clean_condition(expected), rtol=1e-4, atol=1e-5)


def test_a_given_condition_is_taken():
    diffusion = recorded()
    cond, cond_image = torch.full((4, 1), 0.25), torch.rand(4, 3, SIZE, SIZE)
    diffusion(images(), cond=cond, cond_image=cond_image)
    assert torch.equal(diffusion.model.told[-1][0], cond)
    torch.testing.assert_close(diffusion.model.told[-1][1], cond_image * 2 - 1)


def test_candidates_share_the_condition():
    wrapper = XMWrapper(recorded(), candidates=3)
    wrapper((images() * 255).to(torch.uint8), flip=torch.tensor([True, False, True, False]))
    told = wrapper.flow_model.model.told
    assert len(told) == 4
    assert all(torch.equal(a, b) for other in told[1:] for a, b in zip(told[0], other, strict=True))


def unet(**options) -> Unet:
    torch.manual_seed(0)
    return Unet(8, dim_mults=(1, 2), **super_resolution.unet_arguments(**options))


PROCESSES = {
    "ddpm": lambda **o: GaussianDiffusion(unet(), timesteps=20, sampling_timesteps=4, **o),
    "flow": lambda **o: RectifiedFlow(unet(), num_sample_steps=3, **o),
    "edm": lambda **o: ElucidatedDiffusion(unet(learned_sinusoidal_cond=True), num_sample_steps=3, **o),
    "unnormalised": lambda **o: GaussianDiffusion(
        unet(), timesteps=20, sampling_timesteps=4, auto_normalize=False, **o
    ),
    "classes": lambda **o: GaussianDiffusion(unet(num_classes=5), timesteps=20, sampling_timesteps=4, **o),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_every_process_trains_and_upscales(name):
    diffusion = PROCESSES[name](image_size=SIZE, super_resolution=FACTOR)
    told = {"classes": torch.tensor([1, 2, 3, 4])} if name == "classes" else {}
    diffusion(images(), **told).backward()
    gradients = {n: p.grad for n, p in diffusion.named_parameters() if "null" not in n}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    options = dict(seed=3, progress=False, **told)
    low = images(size=SIZE // FACTOR)
    made = diffusion.upscale(low, **options)
    assert made.shape == (4, 3, SIZE, SIZE) and made.isfinite().all()
    assert torch.equal(diffusion.upscale(low, graph=False, **options), made)
    noised = diffusion.upscale(low, noise_augmentation=0.3, **options)
    assert not torch.allclose(noised, made)
    # An image depends on its own index and the seed, its noise included.
    part = {**options, **{key: value[2:] for key, value in told.items()}}
    later = diffusion.upscale(low[2:], noise_augmentation=0.3, start_index=2, **part)
    torch.testing.assert_close(later, noised[2:], rtol=1e-4, atol=1e-4)


def test_guidance_upscales():
    diffusion = PROCESSES["classes"](image_size=SIZE, super_resolution=FACTOR)
    options = dict(classes=[0, 1, 2, 3], seed=3, progress=False)
    plain, guided = (diffusion.upscale(images(size=2), guidance=scale, **options) for scale in (1.0, 3.0))
    assert guided.isfinite().all() and not torch.allclose(plain, guided)


def test_upscale_tells_the_network_the_small_image_and_the_level():
    diffusion = recorded(sampling_timesteps=2)
    low = images(size=SIZE // FACTOR)
    diffusion.upscale(low, seed=3, progress=False, graph=False)
    cond, cond_image = diffusion.model.told[-1]
    expected = F.interpolate(low * 2 - 1, scale_factor=FACTOR, mode="bicubic", align_corners=False)
    assert (cond == 0).all()
    torch.testing.assert_close(cond_image, expected, rtol=1e-5, atol=1e-6)
    diffusion.upscale(low, noise_augmentation=0.2, seed=3, progress=False, graph=False)
    cond, cond_image = diffusion.model.told[-1]
    assert (cond == 0.2).all()
    noised = super_resolution.augmented(low * 2 - 1, torch.full((4,), 0.2), noise.seed_tensor(3))
    expected = F.interpolate(noised, scale_factor=FACTOR, mode="bicubic", align_corners=False)
    torch.testing.assert_close(cond_image, expected, rtol=1e-5, atol=1e-6)


def test_bytes_are_small_images():
    diffusion = PROCESSES["ddpm"](image_size=SIZE, super_resolution=FACTOR)
    low = (images(size=2) * 255).round().to(torch.uint8)
    expected = diffusion.upscale(low.float() / 255, seed=1, progress=False)
    torch.testing.assert_close(diffusion.upscale(low, seed=1, progress=False), expected, rtol=0, atol=0)


def test_arguments_reach_the_config():
    diffusion = PROCESSES["ddpm"](image_size=SIZE, super_resolution=FACTOR)
    config = diffusion.current_config()
    assert (config["super_resolution"], config["noise_augmentation"]) == (4, 0.5)
    again = GaussianDiffusion(unet(), **config)
    assert again.current_config() == config
    assert "super_resolution" not in GaussianDiffusion(Unet(8, dim_mults=(1,)), image_size=SIZE).current_config()
    for name, make in PROCESSES.items():
        cls = type(make(image_size=SIZE))
        assert {"super_resolution", "noise_augmentation"} <= cls.arguments(), name


def test_the_networks_arguments():
    assert super_resolution.unet_arguments() == dict(channels=3, cond_channels=3, cond_dim=1, cond_drop_prob=0.0)
    with_classes = super_resolution.unet_arguments(1, num_classes=10, dim_mults=(1, 2))
    assert with_classes == dict(channels=1, cond_channels=1, cond_dim=1, num_classes=10, dim_mults=(1, 2))


WRONG = {
    "super_resolution must be at least 2 and divide image_size": dict(super_resolution=1),
    r"divide image_size \(8, 8\), got 3": dict(super_resolution=3),
    "super_resolution must be a positive integer": dict(super_resolution=2.5),
    "noise_augmentation must be None where super_resolution is": dict(super_resolution=None, noise_augmentation=0.1),
    r"noise_augmentation must be a number in \[0, 1\]": dict(noise_augmentation=1.5),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_get_one_sentence(message):
    with pytest.raises((TypeError, ValueError), match=message):
        recorded(**WRONG[message])


def test_a_network_without_the_condition_is_refused():
    with pytest.raises(ValueError, match=r"model must have cond_channels=3 and cond_dim=1 for super_resolution"):
        GaussianDiffusion(Unet(8, dim_mults=(1,)), image_size=SIZE, super_resolution=2)


WRONG_LOW = {
    r"low must have shape \(B, 3, 2, 2\), got \(4, 3, 4, 4\)": dict(low=images(size=4)),
    r"noise_augmentation must be a number in \[0, 0.5\]": dict(noise_augmentation=0.6),
    "low must be floating point": dict(low=torch.zeros(4, 3, 2, 2, dtype=torch.int64)),
}


@pytest.mark.parametrize("message", WRONG_LOW)
def test_wrong_small_images_get_one_sentence(message):
    arguments = {"low": images(size=2), "seed": 0, "progress": False, **WRONG_LOW[message]}
    with pytest.raises((TypeError, ValueError), match=message):
        recorded().upscale(**arguments)


@pytest.mark.parametrize("name", ["batch_size", "cond", "cond_image"])
def test_what_upscale_makes_itself_is_no_argument_of_it(name):
    with pytest.raises(TypeError, match=f"upscale has no argument '{name}', which it makes of low"):
        recorded().upscale(images(size=2), progress=False, **{name: 1})


def test_upscale_needs_a_process_for_it():
    diffusion = GaussianDiffusion(Unet(8, dim_mults=(1,)), image_size=SIZE, timesteps=4)
    with pytest.raises(ValueError, match="super_resolution must be given to the process for upscale"):
        diffusion.upscale(images(size=2))


def test_sampling_without_the_small_image_says_what_is_missing():
    with pytest.raises(ValueError, match="must be given, since the network"):
        PROCESSES["ddpm"](image_size=SIZE, super_resolution=FACTOR).sample(2, progress=False)


def test_a_trained_model_is_closer_than_bicubic():
    """Images of one of two stripes, which their small image tells apart by a shade: a bicubic enlargement is grey."""
    torch.manual_seed(0)
    stripes = torch.zeros(2, 1, 8, 8)
    stripes[0, :, :, ::2], stripes[1, :, ::2] = 1.0, 0.4
    network = Unet(16, dim_mults=(1, 2), **super_resolution.unet_arguments(1))
    config = dict(image_size=8, timesteps=50, objective="pred_x0", super_resolution=4, noise_augmentation=0.05)
    diffusion = GaussianDiffusion(network, beta_schedule="cosine", **config)
    optimizer = torch.optim.Adam(diffusion.parameters(), 3e-3)
    for _ in range(60):
        which = torch.randint(0, 2, (16,))
        optimizer.zero_grad()
        diffusion(stripes[which]).backward()
        optimizer.step()
    low = F.avg_pool2d(stripes, 4)
    made = diffusion.upscale(low, sampling_timesteps=10, seed=1, progress=False)
    bicubic = F.interpolate(low, scale_factor=4, mode="bicubic").clamp(0, 1)
    assert (made - stripes).abs().mean() < 0.3 * (bicubic - stripes).abs().mean()
