"""The bound term by term: against Ho et al.'s formulas in float64, upstream's learned variance, and closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ddpm_fast import (
    ContinuousTimeGaussianDiffusion,
    ElucidatedDiffusion,
    GaussianDiffusion,
    RectifiedFlow,
    Unet,
    WeightedObjectiveGaussianDiffusion,
)
from ddpm_fast.diffusion import samplers
from ddpm_fast.diffusion.levels import prediction
from ddpm_fast.diffusion.likelihood import rate_distortion
from ddpm_fast.noise import STREAM_LIKELIHOOD, normal

SMALL = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 4, "channels": 1}
CONTINUOUS = {"learned_sinusoidal_cond": True}
SEED = 5


def bytes_of(n: int, channels: int = 1) -> torch.Tensor:
    """Random images of 8 bits, black and white among their pixels: the open bins."""
    images = torch.randint(0, 256, (n, channels, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    images[:, :, 0, 0], images[:, :, 0, 1] = 0, 255
    return images


def make(process: type, unet: dict | None = None, **options):
    torch.manual_seed(1)
    return process(Unet(**{**SMALL, **(unet or {})}), image_size=8, **options).eval()


# Ho et al.'s and OpenAI's formulas, in float64


def normal_kl(mean1, logvar1, mean2, logvar2):
    return 0.5 * (-1 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def cdf(x):
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_log_likelihood(x, means, log_scales, least=1e-12):
    inverse = torch.exp(-log_scales)
    plus, minus = cdf(inverse * (x - means + 1 / 255)), cdf(inverse * (x - means - 1 / 255))
    inner = torch.where(x > 0.999, 1 - minus, plus - minus)
    return torch.where(x < -0.999, plus, inner).clamp(min=least).log()


def terms_by_hand(diffusion, images, variance: str, betas: torch.Tensor):
    """(prior, terms, mse of x0) by the loop of Ho et al.'s calc_bpd_loop, over the same noise."""
    x0 = images.double() / 255 * 2 - 1
    alphas_bar = torch.cumprod(1 - betas, 0)
    before = torch.cat((torch.ones(1, dtype=torch.float64), alphas_bar[:-1]))
    posterior = betas * (1 - before) / (1 - alphas_bar)
    posterior_log = torch.log(torch.cat((posterior[1:2], posterior[1:])))
    model_log = posterior_log if variance == "small" else torch.log(torch.cat((posterior[1:2], betas[1:])))
    terms, errors = [], []
    for t in range(len(betas)):
        noise = normal(images.shape, seed=SEED, stream=STREAM_LIKELIHOOD, step=t, dtype=torch.float32).double()
        x_t = alphas_bar[t].sqrt() * x0 + (1 - alphas_bar[t]).sqrt() * noise
        with torch.no_grad():
            output = diffusion.model(x_t.float(), torch.full((len(images),), t)).double()
        guess = {
            "pred_noise": (x_t - (1 - alphas_bar[t]).sqrt() * output) / alphas_bar[t].sqrt(),
            "pred_x0": output,
            "pred_v": alphas_bar[t].sqrt() * x_t - (1 - alphas_bar[t]).sqrt() * output,
        }[diffusion.objective].clamp(-1, 1)
        c1 = betas[t] * before[t].sqrt() / (1 - alphas_bar[t])
        c2 = (1 - before[t]) * (1 - betas[t]).sqrt() / (1 - alphas_bar[t])
        true_mean, mean = c1 * x0 + c2 * x_t, c1 * guess + c2 * x_t
        bits = normal_kl(true_mean, posterior_log[t], mean, model_log[t])
        if t == 0:
            bits = -discretized_log_likelihood(x0, mean, 0.5 * model_log[t].expand_as(x0))
        terms.append(bits.flatten(1).mean(1) / math.log(2))
        errors.append((x0 - guess).square().flatten(1).mean(1))
    last = alphas_bar[-1]
    prior = normal_kl(last.sqrt() * x0, torch.log(1 - last), torch.zeros(()), torch.zeros(()))
    return prior.flatten(1).mean(1) / math.log(2), torch.stack(terms, 1), torch.stack(errors, 1)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(
    "objective, schedule", [("pred_noise", "linear"), ("pred_v", "cosine"), ("pred_x0", "sigmoid")]
)
def test_terms_are_those_of_the_paper(objective, schedule, variance):
    diffusion = make(GaussianDiffusion, timesteps=30, objective=objective, beta_schedule=schedule)
    images = bytes_of(4)
    bits = diffusion.bits_per_dim(images, seed=SEED, progress=False, variance=variance)
    prior, terms, errors = terms_by_hand(diffusion, images, variance, diffusion.noise_scale.betas)
    torch.testing.assert_close(bits.prior, prior, rtol=1e-6, atol=1e-9)
    # The network runs in float32, and so does the sum over an image.
    torch.testing.assert_close(bits.x_start_mse, errors, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(bits.terms, terms, rtol=1e-5, atol=1e-6)
    assert bits.terms.dtype == bits.prior.dtype == torch.float64
    torch.testing.assert_close(bits.total, prior + terms.sum(1), rtol=1e-5, atol=1e-6)
    alphas_bar = diffusion.noise_scale.alphas_cumprod
    torch.testing.assert_close(bits.noise_mse, errors * alphas_bar / (1 - alphas_bar), rtol=1e-5, atol=1e-7)
    assert bits.timesteps.tolist() == list(range(30))
    assert bits.mean == pytest.approx(bits.total.mean().item())
    assert bits.standard_error == pytest.approx(bits.total.std().item() / 2)


class Learned(GaussianDiffusion):
    """A process whose network gives its variance."""

    learned_variance = True


@pytest.mark.parametrize("clip", [False, True])
def test_learned_variance_is_upstreams(clip):
    module = pytest.importorskip("denoising_diffusion_pytorch.learned_gaussian_diffusion")
    options = {"timesteps": 25, "objective": "pred_noise", "beta_schedule": "linear"}
    ours = make(Learned, {"learned_variance": True}, **options)
    theirs = module.LearnedGaussianDiffusion(ours.model, 1.0, image_size=8, **options).double().eval()
    ours.model.float()
    images = bytes_of(3)
    bits = ours.bits_per_dim(images, seed=SEED, progress=False, clip_x_start=clip)
    theirs.model = ours.model.double()
    x0 = images.double() / 255 * 2 - 1
    for t in range(25):
        noise = normal(images.shape, seed=SEED, stream=STREAM_LIKELIHOOD, step=t).double()
        times = torch.full((3,), t)
        with torch.no_grad():
            loss = theirs.p_losses(x0, times, noise.clone(), clip_denoised=clip, loss_reduction="none")
            output = theirs.model(theirs.q_sample(x0, times, noise), times)
        bound = loss - (output[:, :1] - noise).square().flatten(1).mean(1)
        # Upstream's buffers are rounded to float32; its cdf cancels where a bin is narrow.
        torch.testing.assert_close(bits.terms[:, t], bound, rtol=2e-4, atol=2e-4)


# A Gaussian data distribution with its exact denoiser

MEAN, STD = 0.1, 0.25


class ExactDenoiser(nn.Module):
    """E[x0 | x_t] for x0 ~ N(MEAN, STD²), as a network that gives x0."""

    channels = out_dim = 1
    self_condition = False

    def __init__(self, alphas_bar: torch.Tensor):
        super().__init__()
        self.register_buffer("alphas_bar", alphas_bar)

    def factors(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a2 = self.alphas_bar[t]
        gain = STD**2 * a2.sqrt() / (a2 * STD**2 + 1 - a2)
        return gain, MEAN * (1 - gain * a2.sqrt())

    def forward(self, x, t, x_self_cond=None):
        gain, offset = (factor[:, None, None, None] for factor in self.factors(t))
        return (gain * x + offset).float()


def test_a_gaussian_has_the_terms_of_the_closed_form():
    """Over the noise x0's squared error is ((1 − g·a)·x0 − offset)² + g²b² on average, and a term is linear in it."""
    options = {"image_size": 16, "timesteps": 200, "objective": "pred_x0", "beta_schedule": "linear"}
    alphas_bar = GaussianDiffusion(ExactDenoiser(torch.ones(200)), **options).noise_scale.alphas_cumprod
    model = ExactDenoiser(alphas_bar)
    diffusion = GaussianDiffusion(model, **options)
    images = (MEAN + STD * torch.randn(100, 1, 16, 16) + 1) / 2
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    bits = diffusion.bits_per_dim(images, seed=SEED, progress=False, batch_size=100)
    x0 = images.double() / 255 * 2 - 1
    gain, offset = model.factors(torch.arange(200))
    keep = 1 - gain * alphas_bar.sqrt()
    error = torch.stack([(k * x0 - o).square().mean() for k, o in zip(keep, offset, strict=True)])
    error = error + gain**2 * (1 - alphas_bar)
    expected = 0.5 * (alphas_bar[:-1] / (1 - alphas_bar[:-1]) - alphas_bar[1:] / (1 - alphas_bar[1:])) * error[1:]
    found = bits.terms.mean(0)[1:] * math.log(2)
    count = x0.numel()
    # Four standard deviations of the mean of squares of so many normal numbers.
    torch.testing.assert_close(found, expected, rtol=4 * math.sqrt(2 / count), atol=0)
    torch.testing.assert_close(bits.x_start_mse.mean(0), error, rtol=4 * math.sqrt(2 / count), atol=0)

    # The least on average is the code length under the data's own distribution. A chain of exact denoisers loses to it
    # what its variances do: KL(N(μ, v*) ‖ N(μ, v)) = ½(v*/v − 1 − ln v*/v) per step, v* being the true reverse step's.
    exact = torch.distributions.Normal(MEAN, STD)
    least = -(exact.cdf(x0 + 1 / 255) - exact.cdf(x0 - 1 / 255)).log2().flatten(1).mean(1)
    gap = bits.total - least
    spread = 4 * (gap.std() / 10).item()
    of_x0 = STD**2 * (1 - alphas_bar) / (alphas_bar * STD**2 + 1 - alphas_bar)
    buffers = diffusion.noise_scale.buffers()
    posterior, m1 = buffers["posterior_variance"], buffers["posterior_mean_coef1"]
    assumed = torch.cat((posterior[1:2], posterior[1:]))
    ratio = (posterior + m1**2 * of_x0) / assumed
    lost = (0.5 * (ratio - 1 - ratio.log()).sum() / math.log(2)).item()
    assert lost > 0.5
    assert gap.mean().item() > -spread
    assert gap.mean().item() == pytest.approx(lost, abs=spread)


@pytest.mark.parametrize(
    "process, unet, options",
    [
        (GaussianDiffusion, {}, {"timesteps": 12, "zero_terminal_snr": True}),
        (GaussianDiffusion, {"self_condition": True}, {"timesteps": 12}),
        (GaussianDiffusion, {}, {"timesteps": 12, "auto_normalize": False}),
        (WeightedObjectiveGaussianDiffusion, {"out_dim": 4}, {"timesteps": 12}),
        (ElucidatedDiffusion, CONTINUOUS, {}),
        (ContinuousTimeGaussianDiffusion, CONTINUOUS, {}),
        (RectifiedFlow, {}, {}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else ",".join(value),
)
def test_every_process_has_the_bound_of_its_signal_to_noise_ratios(process, unet, options):
    """With the posterior's variance a term is ½(SNR(s) − SNR(t))·‖x0 − x̂0‖² (Kingma et al. 2021, eq. 13)."""
    diffusion = make(process, unet, **options)
    images = bytes_of(2)
    given = images.float() / 255 * 2 - 1 if options.get("auto_normalize") is False else images
    steps = None if "timesteps" in options else 12
    bits = diffusion.bits_per_dim(given, seed=SEED, progress=False, timesteps=steps)
    levels = diffusion.noise_scale.at(bits.timesteps if steps is None else diffusion.noise_scale.own_times(12).flip(0))
    snr = levels.snr
    by_snr = 0.5 * (snr[:-1] - snr[1:]) * bits.x_start_mse[:, 1:] / math.log(2)
    torch.testing.assert_close(bits.terms[:, 1:], by_snr, rtol=1e-5, atol=1e-9)
    assert (bits.prior >= 0).all() and bits.prior.max() < 0.1
    # The error of the least noise's estimate, by hand.
    x0 = images.float() / 255 * 2 - 1
    noise = normal(images.shape, seed=SEED, stream=STREAM_LIKELIHOOD, step=0)
    first = type(levels)(*(column[:1] for column in levels))
    x = first.a.float() * x0 + first.b.float() * noise
    p, q = (factor.float() for factor in prediction(first, diffusion.target))
    network = diffusion._sampled_network()
    t = first.times.expand(2)
    t = t.long() if diffusion.noise_scale.is_discrete else t.float()
    with torch.no_grad():
        estimate = (p * x + q * network(x, t, None)).clamp(-1, 1)
        if diffusion.self_condition:
            estimate = (p * x + q * network(x, t, estimate)).clamp(-1, 1)
    error = (x0 - estimate).double().square().flatten(1).mean(1)
    torch.testing.assert_close(bits.x_start_mse[:, 0], error, rtol=1e-4, atol=1e-9)


def test_the_seed_alone_decides():
    """Batch size, recording, bytes or floats and the place in a larger set change nothing."""
    diffusion = make(GaussianDiffusion, {"self_condition": True}, timesteps=15)
    images = bytes_of(5)
    bits = diffusion.bits_per_dim(images, seed=SEED, progress=False)
    others = {
        "smaller batches": diffusion.bits_per_dim(images, seed=SEED, progress=False, batch_size=2),
        "step by step": diffusion.bits_per_dim(images, seed=SEED, progress=False, graph=False),
        "floats": diffusion.bits_per_dim(images.float() / 255, seed=SEED, progress=False),
    }
    for name, other in others.items():
        torch.testing.assert_close(other.terms, bits.terms, rtol=1e-5, atol=1e-6, msg=name)
    later = diffusion.bits_per_dim(images[3:], seed=SEED, progress=False, start_index=3)
    torch.testing.assert_close(later.terms, bits.terms[3:], rtol=1e-5, atol=1e-6)
    assert not torch.equal(diffusion.bits_per_dim(images, seed=6, progress=False).terms, bits.terms)
    assert len(diffusion.bits_per_dim(images[:0], seed=SEED, progress=False).total) == 0


def test_a_shorter_chain_is_the_respaced_process():
    """Its betas are those between the chosen levels, and the network is told the original timesteps."""
    diffusion = make(GaussianDiffusion, timesteps=40, objective="pred_noise", beta_schedule="linear")
    images, times = bytes_of(3), [0, 13, 26, 39]
    bits = diffusion.bits_per_dim(images, seed=SEED, progress=False, timesteps=4)
    given = diffusion.bits_per_dim(images, seed=SEED, progress=False, timesteps=times)
    assert bits.timesteps.tolist() == times
    torch.testing.assert_close(bits.terms, given.terms)
    alphas_bar = diffusion.noise_scale.alphas_cumprod[times]
    betas = 1 - alphas_bar / torch.cat((torch.ones(1, dtype=torch.float64), alphas_bar[:-1]))
    told = SimpleNamespace(model=lambda x, t: diffusion.model(x, torch.tensor(times)[t]), objective="pred_noise")
    prior, terms, _ = terms_by_hand(told, images, "small", betas)
    torch.testing.assert_close(bits.terms, terms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bits.prior, prior, rtol=1e-6, atol=1e-9)


def test_rate_and_distortion_along_the_chain():
    diffusion = make(GaussianDiffusion, timesteps=20)
    images = bytes_of(4)
    bits = diffusion.bits_per_dim(images, seed=SEED, progress=False)
    curve = rate_distortion(bits)
    assert curve.timesteps.tolist() == list(range(19, -1, -1))
    assert curve.rate[0].item() == pytest.approx(bits.prior.mean().item())
    assert (curve.rate.diff() >= 0).all()
    assert (curve.rate[-1] + bits.decoder.mean()).item() == pytest.approx(bits.mean)
    torch.testing.assert_close(curve.distortion.flip(0), 127.5 * bits.x_start_mse.mean(0).sqrt())

    coding = diffusion.progressive_coding(images, 3, seed=SEED, progress=False)
    assert coding.times.tolist() == [19, 9, 0] and coding.noised.shape == coding.estimates.shape == (4, 3, 1, 8, 8)
    chosen = [0, 10, 19]
    torch.testing.assert_close(coding.rate.mean(0), curve.rate[chosen], rtol=1e-6, atol=1e-9)
    error = 255 * (coding.estimates - images[:, None].float() / 255).square().flatten(2).mean(2).sqrt()
    torch.testing.assert_close(coding.distortion, error.double(), rtol=1e-4, atol=1e-4)
    a, b = (column[9].item() for column in diffusion.noise_scale.levels[1:])
    noise = normal(images.shape, seed=SEED, stream=STREAM_LIKELIHOOD, step=9)
    noised = a * (images.float() / 255 * 2 - 1) + b * noise
    torch.testing.assert_close(coding.noised[:, 1] * 2 - 1, noised, rtol=1e-5, atol=1e-5)


def test_progressive_estimates_are_the_samplers():
    diffusion = make(GaussianDiffusion, timesteps=12, objective="pred_v")
    shown = diffusion.progressive(2, 4, seed=7, progress=False)
    states = diffusion.sample(2, True, seed=7, progress=False)
    assert shown.times.tolist() == [11, 7, 4, 0]
    assert torch.equal(shown.images, states[:, -1])
    for column, t in enumerate(shown.times.long().tolist()):
        x = states[:, 11 - t] * 2 - 1
        with torch.inference_mode():
            x_start = diffusion.p_mean_variance(x, torch.full((2,), t))[3]
        torch.testing.assert_close(shown.estimates[:, column], (x_start + 1) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", list(samplers.SAMPLERS))
def test_progressive_with_every_sampler(sampler):
    diffusion = make(GaussianDiffusion, {"self_condition": sampler == "ddim"}, timesteps=20, sampling_timesteps=6)
    shown = diffusion.progressive(1, 100, sampler=sampler, seed=7, progress=False)
    by_steps = diffusion.progressive(1, 100, sampler=sampler, seed=7, progress=False, graph=False)
    assert torch.equal(shown.images, diffusion.sample(1, sampler=sampler, seed=7, progress=False))
    assert shown.estimates.shape[1] == len(shown.times) >= 6 and shown.estimates.isfinite().all()
    assert shown.estimates.min() >= 0 and shown.estimates.max() <= 1
    torch.testing.assert_close(shown.estimates, by_steps.estimates, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("process, unet", [(ElucidatedDiffusion, CONTINUOUS), (RectifiedFlow, {})])
def test_progressive_with_other_processes(process, unet):
    diffusion = make(process, unet)
    shown = diffusion.progressive(2, 5, sampling_timesteps=8, seed=7, progress=False)
    assert torch.equal(shown.images, diffusion.sample(2, sampling_timesteps=8, seed=7, progress=False))
    assert shown.estimates.shape == (2, 5, 1, 8, 8)


class OwnPrediction(GaussianDiffusion):
    """Guided sampling, for example."""

    def model_predictions(self, *args, **kwargs):
        return super().model_predictions(*args, **kwargs)


def test_mistakes_get_a_sentence():
    diffusion, images = make(GaussianDiffusion, timesteps=10), bytes_of(2)
    for options, message in [
        ({"timesteps": 11}, "at most the process's 10, got 11"),
        ({"timesteps": 0}, "at least 1"),
        ({"timesteps": True}, "at least 1"),
        ({"timesteps": [3, 3]}, "differ"),
        ({"timesteps": [0.5, 3]}, "integers"),
        ({"timesteps": [0, 10]}, r"in \[0, 9\]"),
        ({"variance": "learned"}, "one of small, large for this process, got 'learned'"),
        ({"batch_size": 0}, "batch_size"),
        ({"graph": True}, "graph must be None or False"),
    ]:
        with pytest.raises(ValueError, match=message):
            diffusion.bits_per_dim(images, progress=False, **options)
    with pytest.raises(ValueError, match=r"images must be in \[0, 1\] or uint8, got values from -1"):
        diffusion.bits_per_dim(images.float() / 127.5 - 1, progress=False)
    with pytest.raises(ValueError, match=r"shape \(B, 1, 8, 8\)"):
        diffusion.bits_per_dim(images[:, :, 1:], progress=False)
    with pytest.raises(TypeError, match="uint8"):
        diffusion.bits_per_dim(images.int(), progress=False)
    with pytest.raises(ValueError, match="OwnPrediction has its own model_predictions"):
        make(OwnPrediction, timesteps=10).bits_per_dim(images, progress=False)
    with pytest.raises(ValueError, match="num_columns"):
        diffusion.progressive(1, 0)
