"""Tables and inputs of the variational bound, its formula as upstream and OpenAI write it, and the comparison."""

from __future__ import annotations

import math

import torch

from ddpm_fast.diffusion import schedules
from ddpm_fast.ops.common.reference import prepared_images
from ddpm_fast.ops.variational_bound import reference
from ddpm_fast.ops.variational_bound.op import variational_bound
from ddpm_fast.testing.truth import assert_close_to_truth

# What the rows of a table say: w and weight of upstream's hybrid loss, OpenAI's RESCALED_MSE and RESCALED_KL.
WEIGHTS = {"hybrid": (1.0, 0.001), "rescaled-mse": (1.0, 0.02), "rescaled-kl": (0.0, 20.0)}


def make_table(
    objective: str = "pred_noise",
    timesteps: int = 20,
    weights: str = "hybrid",
    beta_schedule: str = "cosine",
    first_variance: str = "clipped",
) -> torch.Tensor:
    """(T, 14) float64.

    Args:
        first_variance: the posterior's at t = 0, which is 0, is "clipped" to 1e-20, as upstream has it, or is that of
            the "next" timestep, as OpenAI has it.
    """
    schedule = schedules.Schedule(schedules.make_betas(beta_schedule, timesteps))
    buffers = schedule.buffers()
    w, weight = (torch.full((timesteps,), value, dtype=torch.float64) for value in WEIGHTS[weights])
    low = buffers["posterior_log_variance_clipped"].clone()
    if first_variance == "next":
        low[0] = low[1]
    tables = [
        schedules.forward_table(schedule),
        schedules.loss_table(schedule, objective, w),
        schedules.prediction_table(schedule, objective),
    ]
    is_decoder = (torch.arange(timesteps) == 0).double()
    rest = [
        buffers["posterior_mean_coef1"],
        buffers["posterior_mean_coef2"],
        low,
        schedule.betas.log(),
        low,
        is_decoder,
        weight,
    ]
    return torch.cat([*tables, torch.stack(rest, dim=1)], dim=1)


def as_written(
    output: torch.Tensor,
    x: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    eps: torch.Tensor,
    *,
    clip_x_start: bool = False,
    detach_mean: bool = True,
    min_probability: float = 1e-15,
) -> torch.Tensor:
    """(B, 2): the means of error² and of the bound in bits, with the cdfs' difference as the papers write it."""
    row = table[t]
    a, b, c, d, _, p, q, m1, m2, low, high, true, is_decoder, _ = (
        column.reshape(-1, *(1,) * (x.ndim - 1)) for column in row.unbind(1)
    )
    out, log_variance = output, low.expand_as(x)
    if output.shape[1] != x.shape[1]:
        out, v = output.chunk(2, dim=1)
        fraction = (v + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
    x_t = a * x + b * eps
    predicted = p * x_t + q * out
    predicted = predicted.clamp(-1, 1) if clip_x_start else predicted
    mean = m1 * predicted + m2 * x_t
    mean = mean.detach() if detach_mean else mean
    true_mean = m1 * x + m2 * x_t
    kl = 0.5 * (
        -1 + log_variance - true + torch.exp(true - log_variance) + (true_mean - mean) ** 2 * torch.exp(-log_variance)
    )

    def cdf(z: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    def log(probability: torch.Tensor) -> torch.Tensor:
        return torch.log(probability.clamp(min=min_probability))

    above, below = (cdf(torch.exp(-0.5 * log_variance) * (x - mean + edge)) for edge in (1 / 255, -1 / 255))
    inner = torch.where(x > 0.999, log(1 - below), log(above - below))
    nll = -torch.where(x < -0.999, log(above), inner)
    bound = torch.where(is_decoder > 0.5, nll, kl) / math.log(2)
    return torch.stack([(out - (c * eps + d * x)).square().flatten(1).mean(1), bound.flatten(1).mean(1)], dim=1)


FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def laid_out(x: torch.Tensor, memory_format: str) -> torch.Tensor:
    return x.contiguous(memory_format=FORMATS[memory_format]) if x.ndim == 4 else x


def make_images(shape, dtype: torch.dtype, memory_format: str = "contiguous", device: str = "cpu") -> torch.Tensor:
    """x_start in [−1, 1] with both open bins, or bytes."""
    x = torch.rand(shape, device=device) * 2.2 - 0.6
    x = x.clamp(0, 1)
    x = (x * 255).round().to(torch.uint8) if dtype == torch.uint8 else (2 * x - 1).to(dtype)
    return laid_out(x, memory_format)


def make_times(batch: int, timesteps: int = 20, device: str = "cpu") -> torch.Tensor:
    """The decoder's row first, then any."""
    t = torch.randint(0, timesteps, (batch,))
    t[0] = 0
    return t.to(device)


def make_output(
    x: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor,
    options: dict,
    dtype: torch.dtype = torch.float32,
    memory_format: str = "contiguous",
    learned: bool = True,
) -> torch.Tensor:
    """A network's output near its target, with a variance in the range of the table and a little beyond.

    Of few elements it is not near: the rounding of a difference of near numbers is a matter of luck for each, and only
    that of many can be compared with the reference's.
    """
    spread = 0.1 if x.numel() > 100 else 1.0
    c, d = (table[t, i].float().reshape(-1, *(1,) * (x.ndim - 1)) for i in (2, 3))
    images = prepared_images(x, options["normalize"], options["flip"], torch.float32).float()
    out = c * noise + d * images + spread * torch.randn_like(noise)
    output = torch.cat([out, 0.5 * torch.randn_like(noise)], dim=1) if learned else out
    return laid_out(output.to(dtype), memory_format)


def loss_and_gradient(function, output, *args, dloss, **options) -> tuple[torch.Tensor, torch.Tensor]:
    output = output.detach().requires_grad_()
    loss = function(output, *args, **options)
    return loss.detach(), torch.autograd.grad(loss, output, dloss.to(loss.dtype))[0]


def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor


def check(output, x, t, table, eps, options: dict) -> None:
    """The forced implementation against the reference in float64: loss, gradient and both terms.

    Args:
        table: float64.
    """
    single, dloss = table.float().to(x.device), torch.randn(x.shape[0], device=x.device)
    actual = loss_and_gradient(variational_bound, output, x, t, single, eps, dloss=dloss, **options)
    with torch.no_grad():
        assert torch.equal(variational_bound(output, x, t, single, eps, **options), actual[0])
    expected = loss_and_gradient(reference.variational_bound, output, x, t, single, eps, dloss=dloss, **options)
    arguments = (wide(output), wide(x), t, single.double(), wide(eps))
    truth = loss_and_gradient(reference.variational_bound, *arguments, dloss=dloss, **options)
    assert actual[1].dtype == output.dtype and actual[1].stride() == output.stride()
    terms = [
        function(*inputs, **options, terms=True)
        for function, inputs in (
            (variational_bound, (output, x, t, single, eps)),
            (reference.variational_bound, (output, x, t, single, eps)),
            (reference.variational_bound, arguments),
        )
    ]
    halves = [result[1].split(x.shape[1], dim=1) for result in (actual, expected, truth)]
    assert_close_to_truth(actual[0], expected[0], truth[0], name="loss")
    for i, half in enumerate(("out", "v")[: len(halves[0])]):
        assert_close_to_truth(*(gradients[i] for gradients in halves), name=f"gradient of {half}")
    for i, term in enumerate(("squared error", "bound")):
        assert_close_to_truth(*(values[:, i] for values in terms), name=term)
