"""The hybrid loss of learned variance in plain torch: the specification.

It computes in the widest of its inputs' dtypes, and in float32 at least. The probability of a bin is a difference of
two cdfs, which cancels in float32 where the bin is narrow or far from the mean; here it is a product.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ddpm_fast.noise import epsilon
from ddpm_fast.ops.common.reference import prepared_images
from ddpm_fast.ops.common.tables import columns, widest_dtype

HALF_BIN = 1 / 255  # images of 8 bits in [−1, 1]
OPEN_BEYOND = 0.999  # the first and the last bin are open
SATURATED = 20.0  # standard deviations from where the cdf is 0 or 1 in every dtype
BITS = 1 / math.log(2)  # of a nat


def gaussian_kl(
    squared_difference: torch.Tensor, log_variance1: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """KL(N(μ1, σ1²) ‖ N(μ2, σ2²)) in nats, of (μ1 − μ2)² and the logarithms of the variances."""
    difference = log_variance1 - log_variance2
    return 0.5 * (torch.exp(difference) - 1 - difference + squared_difference * torch.exp(-log_variance2))


def logit_of_cdf(z: torch.Tensor) -> torch.Tensor:
    """u with Φ(z) ≈ σ(u) = ½(1 + tanh(√(2/π)·(z + 0.044715·z³))) (Page 1977), as Ho et al. 2020 use it."""
    return 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)


def bin_log_probability(
    x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor, min_probability: float
) -> torch.Tensor:
    """ln of the probability of the bin of x under N(mean, exp(log_scale)²) (Ho et al. 2020, eq. 13).

    With both edges in logits, a above b, it is σ(a) − σ(b) = σ(a)·σ(−b)·(1 − exp(b − a)), and that of an open bin σ(a)
    or σ(−b).
    """
    inverse_scale = torch.exp(-log_scale)
    above, below = ((inverse_scale * (x - mean + edge)).clamp(-SATURATED, SATURATED) for edge in (HALF_BIN, -HALF_BIN))
    a, b = logit_of_cdf(above), logit_of_cdf(below)
    width = (2 * HALF_BIN * inverse_scale).clamp(max=2 * SATURATED)
    # a − b without its cancellation.
    distance = 2 * math.sqrt(2 / math.pi) * width * (1 + 0.044715 * (above**2 + above * below + below**2))
    log_left, log_right = F.logsigmoid(a), F.logsigmoid(-b)
    inner = log_left + log_right + torch.log(-torch.expm1(-distance))
    log_probability = torch.where(x < -OPEN_BEYOND, log_left, torch.where(x > OPEN_BEYOND, log_right, inner))
    return log_probability.clamp(min=math.log(min_probability))


def variational_bound(
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | None = None,
    *,
    seed: torch.Tensor | None = None,
    normalize: bool = False,
    flip: torch.Tensor | None = None,
    offset_noise_strength: float = 0.0,
    clip_x_start: bool = False,
    detach_mean: bool = True,
    min_probability: float = 1e-15,
    terms: bool = False,
) -> torch.Tensor:
    """See `ddpm_fast.ops.variational_bound.op.variational_bound`."""
    dtype = widest_dtype(table, x_start, noise)
    row = columns(table, t, x_start.ndim)
    a, b, c, d, w, p, q, m1, m2, low, high, log_variance_true, is_decoder, weight = row
    x = prepared_images(x_start, normalize, flip, dtype)
    eps = epsilon(x_start, noise, seed, offset_noise_strength, dtype)
    model_output = model_output.to(torch.promote_types(model_output.dtype, torch.float32))
    out, log_variance = model_output, low
    if model_output.shape[1] != x.shape[1]:
        out, v = model_output.chunk(2, dim=1)
        log_variance = low + (high - low) * (v + 1) / 2
    error = out - (c * eps + d * x)
    x_t = a * x + b * eps
    x_start_predicted = p * x_t + q * (out.detach() if detach_mean else out)
    if clip_x_start:
        x_start_predicted = x_start_predicted.clamp(-1, 1)
    kl = gaussian_kl((m1 * (x - x_start_predicted)).square(), log_variance_true, log_variance)
    mean = m1 * x_start_predicted + m2 * x_t
    negative_log = -bin_log_probability(x, mean, 0.5 * log_variance, min_probability)
    bound = BITS * torch.where(is_decoder > 0.5, negative_log, kl)
    means = torch.stack([error.square().flatten(1).mean(dim=1), bound.flatten(1).mean(dim=1)], dim=1)
    if terms:
        return means.detach()
    return w.flatten() * means[:, 0] + weight.flatten() * means[:, 1]
