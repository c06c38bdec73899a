"""Inpainting by RePaint: its rows, its jumps, and what it ends at where the truth is known."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from ddpm_fast import (
    ContinuousTimeGaussianDiffusion,
    ElucidatedDiffusion,
    GaussianDiffusion,
    LearnedGaussianDiffusion,
    RectifiedFlow,
    Unet,
    WeightedObjectiveGaussianDiffusion,
)
from ddpm_fast.diffusion import samplers
from ddpm_fast.diffusion.guidance import column
from ddpm_fast.diffusion.inpainting import Resampling, with_known
from ddpm_fast.diffusion.levels import TARGETS
from ddpm_fast.diffusion.schedules import Schedule, make_betas
from ddpm_fast.testing.sampler_cases import scales

SMALL = dict(dim=8, dim_mults=(1, 2))
SCALES = scales()


def table_of(sampler: str, scale, steps: int, num_resamples: int, jump_length: int, **options) -> samplers.SamplerTable:
    spacing = options.pop("spacing", None)
    resampling = Resampling(num_resamples, jump_length)
    return samplers.sampler_table(
        scale, TARGETS["pred_x0"], sampler, steps, spacing=spacing, options=options, resampling=resampling
    )


def is_first_order(sampler: str) -> bool:
    """True if each step is one row, which reads its own x0 alone."""
    plan = samplers.sampler_table(SCALES["edm"], TARGETS["pred_x0"], sampler, 5)
    return len(plan.times) == 5 and plan.table.shape[1] == 6 and plan.num_previous == 0


# By name, the options that they are tested with.
FIRST_ORDER = {name: {"eta": 0.5} if name == "ddim" else {} for name in samplers.SAMPLERS if is_first_order(name)}


def test_the_samplers_that_the_documentation_names_inpaint():
    assert {"ddpm", "ddim", "euler", "euler_ancestral"} <= set(FIRST_ORDER)


def test_visits_are_repaints():
    assert Resampling(2, 2).visits(5) == [0, 1, 0, 1, 2, 3, 2, 3, 4]
    assert Resampling(1, 10).visits(4) == [0, 1, 2, 3]
    # T = 250, j = 10, r = 10 are 4,570 transitions (Lugmayr et al. 2022, section 5.1), 2,160 of them upwards.
    assert len(Resampling(10, 10).visits(250)) == 4570 - 2160


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("sampler", FIRST_ORDER)
@pytest.mark.parametrize("num_resamples, jump_length", [(1, 1), (3, 1), (2, 4)])
def test_every_row_arrives_at_its_level(kind, sampler, num_resamples, jump_length):
    """For data of the one image 0, the state's standard deviation is the level's b after every row, jumps included."""
    plan = table_of(sampler, SCALES[kind], 12, num_resamples, jump_length, **FIRST_ORDER[sampler])
    plan = with_known(plan)
    variance = plan.levels.b[0].item() ** 2
    for row in plan.table.tolist():
        s, sigma, expected = row[3], row[5], row[column("B")]
        variance = s**2 * variance + sigma**2
        assert math.sqrt(variance) == pytest.approx(expected, abs=1e-9)
    assert plan.table[-1, [column("A"), column("B")]].tolist() == [1, 0]
    assert plan.ends_on_x_start


def test_a_jump_is_no_row_of_its_own():
    plain, jumping = (table_of("ddpm", SCALES["discrete"], 12, count, 4) for count in (1, 3))
    assert len(jumping.times) == 12 + 2 * 2 * 4
    assert set(jumping.times) == set(plain.times)


@pytest.mark.parametrize("ours", [True, False])
def test_after_a_jump_the_state_has_the_noise_that_the_network_is_told(ours):
    """Upstream's jump sets t to `resample_jump` itself, adds one step's noise, and denoises that state at this t.

    The data is one image, 0, so that the state's standard deviation is √(1 − ᾱ_t).
    """

    class Zero(torch.nn.Module):
        channels = out_dim = 1
        self_condition = random_or_learned_sinusoidal_cond = False

        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x, t, x_self_cond=None):
            self.seen.append((int(t[0]), x.std().item()))
            return torch.zeros_like(x)

    torch.manual_seed(0)
    size, config = 64, dict(image_size=64, timesteps=120, objective="pred_x0", beta_schedule="cosine")
    image, mask = torch.full((1, 1, size, size), 0.5), torch.zeros(1, 1, size, size)
    if ours:
        diffusion = GaussianDiffusion(Zero(), **config)
        diffusion.inpaint(image, mask, sampling_timesteps=120, num_resamples=2, seed=0, progress=False)
    else:
        repaint = importlib.import_module("denoising_diffusion_pytorch.repaint")
        diffusion = repaint.GaussianDiffusion(Zero(), **config)
        diffusion.sample(gt=image, mask=mask, resample_iter=1)
    deviations = diffusion.sqrt_one_minus_alphas_cumprod.tolist()
    # Four standard deviations of the estimate.
    wrong = [t for t, std in diffusion.model.seen if abs(std / deviations[t] - 1) > 4 / math.sqrt(2 * size**2)]
    times = [t for t, _ in diffusion.model.seen]
    assert any(later > earlier for earlier, later in zip(times, times[1:], strict=False))
    assert (len(wrong) <= 1) == ours, "upstream has been fixed"


MEAN, STD, CORRELATION, KNOWN = 0.1, 0.25, 0.8, 0.4
CONDITIONAL = (MEAN + CORRELATION * (KNOWN - MEAN), STD * math.sqrt(1 - CORRELATION**2))


def gains(a: float, b: float) -> tuple[float, float]:
    """E[x0 | x] is m + g·(x − a·m), for the sum and the difference of two pixels, whose covariance is diagonal."""
    variances = (STD**2 * (1 + CORRELATION), STD**2 * (1 - CORRELATION))
    return tuple(a * variance / (a**2 * variance + b**2) for variance in variances)


def exact_conditional(plan: samplers.SamplerTable) -> tuple[float, float]:
    """Mean and standard deviation of the second pixel at the end, where the first is known: every row is linear.

    The known pixel is drawn afresh by every row, so that the two are independent before each.
    """
    mean, variance = 0.0, plan.first_scale**2
    of_known = (0.0, variance)
    for row, a, b in zip(plan.table.tolist(), plan.levels.a.tolist(), plan.levels.b.tolist(), strict=True):
        (r, s), sigma, (of_sum, of_difference) = row[2:4], row[5], gains(a, b)
        own, other = r * (of_sum + of_difference) / 2 + s, r * (of_sum - of_difference) / 2
        mean = own * mean + other * of_known[0] + r * MEAN * (1 - a * of_sum)
        variance = own**2 * variance + other**2 * of_known[1] + sigma**2
        signal, noise = row[column("A")], row[column("B")]
        of_known = (signal * KNOWN, noise**2)
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("sampler", FIRST_ORDER)
def test_resampling_finds_the_conditional_distribution(kind, sampler):
    """Without jumps the known pixel is a third ignored; with them the other's mean and deviation become the truth's."""
    errors = []
    for count in (1, 10, 40):
        options = {**FIRST_ORDER[sampler], "spacing": "log_snr"}
        mean, std = exact_conditional(with_known(table_of(sampler, SCALES[kind], 250, count, 10, **options)))
        errors.append((abs(mean - CONDITIONAL[0]) / abs(KNOWN - MEAN), abs(std / CONDITIONAL[1] - 1)))
    of_mean, of_std = zip(*errors, strict=True)
    assert of_mean[0] > 0.3 and of_std[0] > 0.14
    assert of_mean[1] < 0.075 and of_mean[2] < 0.022 and of_mean[2] < 0.5 * of_mean[1]
    assert max(of_std[1:]) < 0.05


class Exact(torch.nn.Module):
    """The optimal network for pairs of pixels (1, 1, 2): it gives x0."""

    channels = out_dim = 1
    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, schedule: Schedule):
        super().__init__()
        a, b = schedule.alphas_cumprod.sqrt().tolist(), (1 - schedule.alphas_cumprod).sqrt().tolist()
        self.table = torch.tensor([(level[0], *gains(*level)) for level in zip(a, b, strict=True)])

    def forward(self, x, t, x_self_cond=None):
        a, of_sum, of_difference = self.table[t][:, :, None, None].unbind(1)
        left, right = (x[:, 0] - MEAN * a[:, 0, None]).unbind(2)
        mean, half = of_sum[:, 0] * (left + right) / 2, of_difference[:, 0] * (left - right) / 2
        return MEAN + torch.stack((mean + half, mean - half), dim=2)[:, None]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler_ancestral"])
def test_inpainted_pixels_have_the_conditional_moments(sampler):
    """The whole way, with the noise function: the moments are those of the table, which are the truth's."""
    schedule = Schedule(make_betas("cosine", 1000))
    config = dict(image_size=(1, 2), objective="pred_x0", beta_schedule="cosine", auto_normalize=False)
    diffusion = GaussianDiffusion(Exact(schedule), **config)
    count = 6000
    image = torch.full((count, 1, 1, 2), KNOWN)
    mask = torch.tensor([True, False]).reshape(1, 1, 1, 2)
    options = {"sampler": sampler, "sampler_options": FIRST_ORDER[sampler], "spacing": "log_snr"}
    made = diffusion.inpaint(image, mask, sampling_timesteps=100, clip_x_start=False, seed=3, progress=False, **options)
    assert torch.equal(made[..., 0], image[..., 0])
    plan = table_of(sampler, schedule, 100, 10, 10, spacing="log_snr", **FIRST_ORDER[sampler])
    mean, std = exact_conditional(with_known(plan))
    found = made[..., 1]
    assert found.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(count))
    assert found.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * count))
    assert mean == pytest.approx(CONDITIONAL[0], abs=0.025)
    assert std == pytest.approx(CONDITIONAL[1], rel=0.1)


def processes() -> dict:
    config = dict(image_size=8)
    return {
        "ddpm": lambda: GaussianDiffusion(Unet(**SMALL), timesteps=30, **config),
        "learned": lambda: LearnedGaussianDiffusion(Unet(**SMALL, learned_variance=True), timesteps=30, **config),
        "self_condition": lambda: GaussianDiffusion(Unet(**SMALL, self_condition=True), timesteps=30, **config),
        "unnormalised": lambda: GaussianDiffusion(Unet(**SMALL), timesteps=30, auto_normalize=False, **config),
        "flow": lambda: RectifiedFlow(Unet(**SMALL), **config),
        "edm": lambda: ElucidatedDiffusion(Unet(**SMALL, learned_sinusoidal_cond=True), **config),
        "continuous": lambda: ContinuousTimeGaussianDiffusion(Unet(**SMALL, learned_sinusoidal_cond=True), **config),
        "weighted": lambda: WeightedObjectiveGaussianDiffusion(Unet(**SMALL, out_dim=8), timesteps=30, **config),
    }


def image_and_mask(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.rand(batch, 3, 8, 8, generator=generator), torch.rand(batch, 1, 8, 8, generator=generator) < 0.5


SHORT = dict(sampling_timesteps=6, num_resamples=2, jump_length=2, seed=5, progress=False)


@pytest.mark.parametrize("name", processes())
@pytest.mark.parametrize("sampler", FIRST_ORDER)
def test_known_pixels_are_the_images_bit_for_bit(name, sampler):
    torch.manual_seed(0)
    diffusion = processes()[name]()
    image, mask = image_and_mask()
    made = diffusion.inpaint(image, mask, sampler=sampler, graph=True, **SHORT)
    where = mask.expand_as(image)
    assert made.shape == image.shape and made.isfinite().all()
    assert torch.equal(made[where], image[where])
    assert (made[~where] != image[~where]).all()
    assert torch.equal(diffusion.inpaint(image, mask, sampler=sampler, graph=False, **SHORT), made)


def test_what_is_unknown_is_not_read():
    diffusion = processes()["ddpm"]()
    image, mask = image_and_mask()
    other = torch.where(mask, image, 1 - image)
    assert torch.equal(diffusion.inpaint(image, mask, **SHORT), diffusion.inpaint(other, mask, **SHORT))


def test_the_batch_changes_nothing():
    diffusion = processes()["ddpm"]()
    image, mask = image_and_mask(5)
    whole = diffusion.inpaint(image, mask, **SHORT)
    parts = [
        diffusion.inpaint(image[:2], mask[:2], **SHORT),
        diffusion.inpaint(image[2:], mask[2:], start_index=2, **SHORT),
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole, diffusion.inpaint(image, mask, **{**SHORT, "seed": 6}))


@pytest.mark.parametrize("shape", [(3, 3), (3, 1), (1, 3), (1, 1)])
def test_masks_of_every_shape_and_dtype(shape):
    diffusion = processes()["ddpm"]()
    image = image_and_mask()[0]
    mask = torch.rand(*shape, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    made = diffusion.inpaint(image, mask, **SHORT)
    for other in (mask.double(), mask.half(), mask.expand(3, 3, -1, -1)):
        assert torch.equal(diffusion.inpaint(image, other, **SHORT), made)
    assert torch.equal(made[mask.expand_as(image)], image[mask.expand_as(image)])


def test_a_mask_between_blends():
    diffusion = processes()["ddpm"]()
    image = image_and_mask()[0]
    half = torch.full((1, 1, 8, 8), 0.5)
    made = diffusion.inpaint(image, half, **SHORT)
    assert made.isfinite().all() and not torch.equal(made, image)
    # Closer to the image than a sample is, which does not know it.
    assert (made - image).abs().mean() < (diffusion.sample(3, seed=5, progress=False) - image).abs().mean()


def test_bytes_are_images():
    diffusion = processes()["ddpm"]()
    image, mask = image_and_mask()
    as_bytes = (image * 255).round().to(torch.uint8)
    expected = diffusion.inpaint(as_bytes.float() / 255, mask, **SHORT)
    assert torch.equal(diffusion.inpaint(as_bytes, mask, **SHORT), expected)


def test_learned_variance_stays_in_its_range_through_a_jump():
    """A row with a jump has, at v = −1 and v = 1, the variance of the step with that v and then the jump."""
    schedule = Schedule(make_betas("cosine", 30))
    options = {"spacing": "own", "learned_variance": True}
    plain = samplers.sampler_table(schedule, TARGETS["pred_noise"], "ddpm", 30, **options)
    jumping = samplers.sampler_table(
        schedule, TARGETS["pred_noise"], "ddpm", 30, resampling=Resampling(2, 4), **options
    )
    a, b = schedule.alphas_cumprod.sqrt(), (1 - schedule.alphas_cumprod).sqrt()
    checked = 0
    for row, time in enumerate(jumping.times[:-1]):
        following = jumping.times[row + 1]
        if following <= time:
            continue
        checked += 1
        arrived = time - 1
        factor = a[following] / a[arrived]
        jump = b[following] ** 2 - (factor * b[arrived]) ** 2
        sigma, low, high = plain.table[29 - time, [5, 8, 9]]
        made_sigma, made_low, made_high = jumping.table[row, [5, 8, 9]]
        for bound, made_bound in ((low, made_low), (high, made_high)):
            expected = ((factor * sigma * bound.exp()) ** 2 + jump).sqrt()
            assert (made_sigma * made_bound.exp()).item() == pytest.approx(expected.item(), rel=1e-9)
    assert checked == 7


@pytest.mark.parametrize("sampler", sorted(set(samplers.SAMPLERS) - set(FIRST_ORDER)))
def test_other_samplers_are_refused(sampler):
    image, mask = image_and_mask()
    with pytest.raises(ValueError, match="sampler must take each step by one network call and its x0 alone"):
        processes()["ddpm"]().inpaint(image, mask, sampler=sampler, **SHORT)


def test_churn_is_no_hindrance():
    """Euler's churn raises a level before its step: known pixels go to the raised one."""
    plan = with_known(table_of("euler", SCALES["edm"], 12, 2, 3, s_churn=4.0))
    raised = plan.levels.b / plan.levels.a
    own = table_of("euler", SCALES["edm"], 12, 2, 3)
    assert (raised > own.levels.b / own.levels.a * 1.001).any()
    variance = plan.first_scale**2
    for row in plan.table.tolist():
        variance = row[3] ** 2 * variance + row[5] ** 2
        assert math.sqrt(variance) == pytest.approx(row[column("B")], rel=1e-3, abs=1e-9)


WRONG = {
    "mask must be a tensor": dict(mask=[[1]]),
    "mask must be bool or floating point": dict(mask=torch.ones(1, 1, 8, 8, dtype=torch.int64)),
    r"mask must have shape \(3 or 1, 3 or 1, 8, 8\)": dict(mask=torch.ones(1, 2, 8, 8)),
    r"mask must be in \[0, 1\]": dict(mask=torch.full((1, 1, 8, 8), 1.5)),
    "image must have shape": dict(image=torch.rand(3, 3, 8, 4)),
    "num_resamples must be a positive integer": dict(num_resamples=0),
    "jump_length must be a positive integer": dict(jump_length=-1),
    "jump_length must be less than the number of steps, 6": dict(jump_length=6),
    "sampler must be one of": dict(sampler="none"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_get_one_sentence(message):
    image, mask = image_and_mask()
    arguments = {"image": image, "mask": mask, **SHORT, **WRONG[message]}
    with pytest.raises((TypeError, ValueError), match=message):
        processes()["ddpm"]().inpaint(**arguments)


class TestSubclasses:
    def test_own_predictions_are_used(self):
        class Guided(GaussianDiffusion):
            calls = 0

            def model_predictions(self, *args, **kwargs):
                self.calls += 1
                return super().model_predictions(*args, **kwargs)

        network = Unet(**SMALL)
        image, mask = image_and_mask()
        guided, plain = (cls(network, image_size=8, timesteps=30) for cls in (Guided, GaussianDiffusion))
        made = guided.inpaint(image, mask, **SHORT)
        torch.testing.assert_close(made, plain.inpaint(image, mask, **SHORT), rtol=1e-4, atol=1e-4)
        assert guided.calls == len(Resampling(2, 2).visits(6))

    def test_an_own_p_sample_is_refused(self):
        class Frozen(GaussianDiffusion):
            def p_sample(self, x, t, x_self_cond=None):
                return x, x

        image, mask = image_and_mask()
        with pytest.raises(ValueError, match="mask must be None where Frozen has its own p_sample"):
            Frozen(Unet(**SMALL), image_size=8, timesteps=30).inpaint(image, mask, **SHORT)
