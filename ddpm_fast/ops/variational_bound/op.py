"""The hybrid loss of learned variance: declaration, public function, eligibility.

Nichol & Dhariwal 2021, eq. 13 to 16. With out and v the halves of the model's output along channels, of every element:

    x_t = a·x0 + b·ε
    squared = (out − (c·ε + d·x0))²
    x̂0 = p·x_t + q·out, clipped to [−1, 1] where asked
    log_var = low + (high − low)·(v + 1)/2
    bound = ½·(e^δ − 1 − δ + (m1·(x0 − x̂0))²·e^−log_var) with δ = log_var_true − log_var    the divergence, in nats
          = −ln P(bin of x0) under N(m1·x̂0 + m2·x_t, e^log_var)           where is_decoder (Ho et al. 2020, eq. 13)
    loss = mean(w·squared + weight·bound/ln 2) per sample

The true posterior's mean is m1·x0 + m2·x_t, so that x_t cancels in the difference of the means. A bin is 2/255 wide,
the first and the last are open; Φ is ½(1 + tanh(√(2/π)·(z + 0.044715·z³))), as in Ho et al.'s code.

A row of the table says all of it. Upstream's hybrid loss is w = 1 and weight = vb_loss_weight; OpenAI's RESCALED_MSE is
w = 1 and weight = T/1000, its KL w = 0 and weight = 1, its RESCALED_KL w = 0 and weight = T, both without detach_mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ddpm_fast.noise import Noise
from ddpm_fast.ops.images import (
    KERNEL_DTYPES,
    MAX_ELEMENTS,
    as_noise,
    check_images,
    why_not_by_native,
    why_not_by_triton,
    why_not_channels,
    why_not_images,
    why_not_tensor,
    with_noise,
)
from ddpm_fast.ops.operator import Operator
from ddpm_fast.ops.variational_bound import reference
from ddpm_fast.runtime.dispatch import Implementation, Op

COLUMNS = ("a", "b", "c", "d", "w", "p", "q", "m1", "m2", "low", "high", "log_var_true", "is_decoder", "weight")


def _fake(
    model_output: torch.Tensor, x_start: torch.Tensor, with_gradient: bool, **_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = torch.empty(x_start.shape[:1], dtype=torch.float32, device=x_start.device)
    gradient = torch.empty_like(model_output) if with_gradient else model_output.new_empty(0)
    return loss, loss.new_empty(x_start.shape[0], 2), loss.new_empty(x_start.shape[0], 2), gradient


_variational_bound = Operator(
    "variational_bound",
    "Tensor model_output, Tensor x_start, Tensor t, Tensor table, Tensor? noise, Tensor? seed, Tensor? flip, "
    "bool normalize, float offset_noise_strength, bool clip_x_start, bool detach_mean, float min_probability, "
    "bool with_gradient",
    returns="loss, terms, factor, gradient",
    fake=_fake,
    backward="gradient, factor, grad",
    gradients="model_output",
    maps="model_output",
    contiguous_grad=True,
    triton=f"{__package__}.triton",
    native=True,
)


def variational_bound(
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | Noise | None = None,
    *,
    seed: int | torch.Tensor | None = None,
    normalize: bool = False,
    flip: torch.Tensor | None = None,
    offset_noise_strength: float = 0.0,
    clip_x_start: bool = False,
    detach_mean: bool = True,
    min_probability: float = 1e-15,
    terms: bool = False,
) -> torch.Tensor:
    """Squared error and variational bound of a model that learns its variance (Nichol & Dhariwal 2021, eq. 13 to 16).

    The kernels are differentiable in model_output, once; the reference in everything, as often as wanted.

    Args:
        model_output: (B, 2·C, ...), any floating point dtype, out and v along channels; or (B, C, ...), where the
            variance is fixed: its logarithm is the column low. The loss is computed in float32 at least.
        x_start: (B, C, ...) floating point, or uint8, which is divided by 255.
        t: (B,) int64, rows of the table. Outside [0, T) its loss becomes NaN and nothing is read outside the table.
        table: (T, 14) floating point, columns a, b, c, d, w, p, q, m1, m2, low, high, log_var_true, is_decoder, weight;
            see this module for the formula, whose letters they are. is_decoder is 1 or 0.
        noise, seed, normalize, flip, offset_noise_strength: see `q_sample`; the same values mean the same x0 and ε.
        clip_x_start: clip the predicted x0 to [−1, 1] in the bound; no gradient passes where it is clipped.
        detach_mean: the bound trains the variance only, as in the hybrid loss; else also out, through the mean.
        min_probability: of the decoder's bin, in (0, 1); below it there is no gradient. OpenAI's code has 1e-12.
        terms: return both means instead of the loss, unweighted and without gradient.

    Returns:
        (B,) losses; with `terms` (B, 2): the means of squared and of bound/ln 2, in bits.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    noise = as_noise(noise, seed, offset_noise_strength)
    check_images(x_start, t, table, noise, flip, columns=COLUMNS)
    if x_start.ndim < 2:
        raise ValueError(f"x_start must have at least two dimensions, got {tuple(x_start.shape)}")
    if not isinstance(model_output, torch.Tensor) or not model_output.is_floating_point():
        got = getattr(model_output, "dtype", type(model_output).__name__)
        raise TypeError(f"model_output must be a floating point tensor, got {got}")
    shapes = [(x_start.shape[0], n * x_start.shape[1], *x_start.shape[2:]) for n in (1, 2)]
    if tuple(model_output.shape) not in shapes or model_output.device != x_start.device:
        raise ValueError(
            f"model_output must have x_start's shape {shapes[0]}, or {shapes[1]} with the variance, and device "
            f"{x_start.device}, got {tuple(model_output.shape)} on {model_output.device}"
        )
    if not 0 < min_probability < 1:
        raise ValueError(f"min_probability must be in (0, 1), got {min_probability}")
    options = {
        "normalize": normalize,
        "flip": flip,
        "clip_x_start": clip_x_start,
        "detach_mean": detach_mean,
        "min_probability": min_probability,
        "terms": terms,
    }
    return with_noise(_op, (model_output, x_start, t, table), noise, options)


def _by(operator: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., torch.Tensor]:
    def run(
        model_output: torch.Tensor,
        x_start: torch.Tensor,
        t: torch.Tensor,
        table: torch.Tensor,
        noise: torch.Tensor | None,
        *,
        seed: torch.Tensor | None,
        normalize: bool,
        flip: torch.Tensor | None,
        offset_noise_strength: float,
        clip_x_start: bool,
        detach_mean: bool,
        min_probability: float,
        terms: bool,
    ) -> torch.Tensor:
        if terms:
            model_output = model_output.detach()
        with_gradient = torch.is_grad_enabled() and model_output.requires_grad
        options = (normalize, offset_noise_strength, clip_x_start, detach_mean, min_probability, with_gradient)
        return operator(model_output, x_start, t, table, noise, seed, flip, *options)[1 if terms else 0]

    return run


def _triton_refuses(
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | None,
    *,
    flip: torch.Tensor | None,
    offset_noise_strength: float,
    **others: object,
) -> str | None:
    reason = why_not_by_triton(x_start) or why_not_images(x_start, t, table, noise, flip)
    if reason is not None:
        return reason
    reason = why_not_tensor("model_output", model_output, KERNEL_DTYPES)
    if reason is not None:
        return reason
    if model_output[0].numel() > MAX_ELEMENTS:
        return f"an output has {model_output[0].numel()} elements, and the kernels count up to {MAX_ELEMENTS}"
    return why_not_channels(x_start, not model_output.is_contiguous() or offset_noise_strength > 0)


def _native_refuses(
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | None,
    *,
    flip: torch.Tensor | None,
    **others: object,
) -> str | None:
    reason = why_not_by_native(x_start) or why_not_images(x_start, t, table, noise, flip)
    return why_not_tensor("model_output", model_output, KERNEL_DTYPES) if reason is None else reason


def _example(device: torch.device) -> tuple[tuple, dict]:
    output, image = torch.zeros(2, 6, 8, 8, device=device), torch.zeros(2, 3, 8, 8, device=device)
    t, table = torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(10, len(COLUMNS), device=device)
    options = {
        "seed": None,
        "normalize": False,
        "flip": None,
        "offset_noise_strength": 0.0,
        "clip_x_start": False,
        "detach_mean": True,
        "min_probability": 1e-15,
        "terms": False,
    }
    return (output, image, t, table, image), options


_op = Op(
    "variational_bound",
    [
        Implementation("triton", _by(_variational_bound.triton), _triton_refuses),
        Implementation("native", _by(_variational_bound.native), _native_refuses),
        Implementation("reference", reference.variational_bound),
    ],
    _example,
)
