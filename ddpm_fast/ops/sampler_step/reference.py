"""The universal sampler update in torch only: the specification and the oracle.

It computes in the dtype of x, so that float64 tensors give a truth to measure float32 against. Nothing here reads a
value on the host: a step outside the table gives NaN, and what a zero coefficient multiplies cannot spoil the result.
"""

from __future__ import annotations

import torch

from ddpm_fast import noise as noise_function
from ddpm_fast.noise import STREAM_STEP


def sampler_step(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    seed: torch.Tensor,
    *,
    x_start_previous: torch.Tensor | None = None,
    x_start_previous2: torch.Tensor | None = None,
    x_start_previous3: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    clip_x_start: bool = True,
    start_index: int = 0,
    stream: int = STREAM_STEP,
    second_output: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    update: torch.Tensor | None = None,
    reduces: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ddpm_fast.ops.sampler_step.op.sampler_step`."""
    p, q, r, s, u, sigma, u2, u3, lo, hi, _, _, *guidance = table_row(table, step).to(x.dtype)
    has_guidance = table.shape[1] == 25
    a, b, _, _, _, _, _, space, kg, kn, kc, h, j = guidance
    output, variance = split_output(x, model_output.to(x.dtype))
    if has_guidance:
        second = previous(x, None if second_output is None else split_output(x, second_output.to(x.dtype))[0])
        output = guided_output(x, output, second, [p, q, *guidance[2:8]], update, reduces)
        x_start_guided = torch.where(space == 1, output, p * x + q * output)
        x_start = x_start_guided + scaled(h, previous(x, gradient))
    else:
        x_start = p * x + q * output
    if clip_x_start:
        x_start = x_start.clamp(-1, 1)
    if noise is None:
        noise = noise_function.normal(
            x.shape, seed=seed, stream=stream, step=step, start_index=start_index, device=x.device, dtype=x.dtype
        )
    step_noise = noise
    if variance is not None:
        step_noise = noise * (lo + (hi - lo) * (variance + 1) / 2).exp()
    x_next = r * x_start + s * x + scaled(u, previous(x, x_start_previous)) + scaled(sigma, step_noise)
    if x_start_previous2 is not None or table.shape[1] > 6:
        x_next = x_next + scaled(u2, previous(x, x_start_previous2)) + scaled(u3, previous(x, x_start_previous3))
    if has_guidance:
        x_start_second = p * x + q * second
        clipped = x_start_second.clamp(-1, 1) if clip_x_start else x_start_second
        x_next = x_next + scaled(kg, x_start_guided) + scaled(kn, x_start_second) + scaled(kc, clipped)
        x_next = x_next + scaled(j, previous(x, gradient))
    if mask is not None:
        known = scaled(a, previous(x, known)) + scaled(b, noise)
        x_next = scaled(mask, known) + scaled(1 - mask, x_next)
    return x_next, x_start


def guided_output(
    x: torch.Tensor,
    output: torch.Tensor,
    second: torch.Tensor,
    columns: list[torch.Tensor],
    update: torch.Tensor | None,
    reduces: bool,
) -> torch.Tensor:
    """g: the output, or its x0 where space is 1, guided by a second one; `update` is renewed in place.

    Args:
        columns: p, q, w, phi, eta, rho, mu, space.
    """
    p, q, w, phi, eta, rho, mu, space = columns
    y = torch.where(space == 1, p * x + q * output, output)
    u = y - torch.where(space == 1, p * x + q * second, second)
    if update is not None:
        u = u + scaled(mu, update)
        update.copy_(torch.where((w == 1) & (mu == 0), update, u))
    else:
        u = u + scaled(mu, previous(x, None))
    needs_sums = (phi != 0) | (eta != 1) | (rho > 0)
    if not reduces or x.numel() == 0:
        g = y + (w - 1) * torch.where(needs_sums, float("nan"), u)
        return torch.where(w == 1, y, g)
    y, u = y.reshape(x.shape[0], -1), u.reshape(x.shape[0], -1)  # (B, C·H·W)
    norm = u.square().sum(1, keepdim=True).sqrt()
    u = u * torch.where(rho > 0, (rho / norm).clamp(max=1), 1.0)
    squares = y.square().sum(1, keepdim=True)
    parallel = (u * y).sum(1, keepdim=True) / torch.where(squares == 0, 1.0, squares)
    g = y + (w - 1) * (u - scaled(1 - eta, parallel * y))
    std_y, std_g = (tensor.std(1, correction=0, keepdim=True) for tensor in (y, g))
    # A constant g stays as it is: its deviation is rounding, which is below 1e-6 of its values.
    is_constant = std_g.square() <= 1e-12 * g.square().mean(1, keepdim=True)
    g = torch.where(phi == 0, g, (phi * torch.where(is_constant, 1.0, std_y / std_g) + 1 - phi) * g)
    return torch.where(w == 1, y, g).reshape(x.shape)


def sampler_step_(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    step: torch.Tensor,
    seed: torch.Tensor,
    *,
    x_start: torch.Tensor | None = None,
    x_start2: torch.Tensor | None = None,
    x_start3: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    clip_x_start: bool = True,
    start_index: int = 0,
    stream: int = STREAM_STEP,
    second_output: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    update: torch.Tensor | None = None,
    reduces: bool = False,
) -> torch.Tensor:
    """See `ddpm_fast.ops.sampler_step.op.sampler_step_`."""
    x_next, new_x_start = sampler_step(
        x,
        model_output,
        table,
        step,
        seed,
        x_start_previous=x_start,
        x_start_previous2=x_start2,
        x_start_previous3=x_start3,
        noise=noise,
        clip_x_start=clip_x_start,
        start_index=start_index,
        stream=stream,
        second_output=second_output,
        gradient=gradient,
        known=known,
        mask=mask,
        update=update,
        reduces=reduces,
    )
    if x_start3 is not None and x_start2 is not None:
        x_start3.copy_(x_start2)
    if x_start2 is not None and x_start is not None:
        e, f = table_row(table, step).to(x.dtype)[10:12]
        x_start2.copy_(torch.where((e == 0) & (f == 0), x_start, e * x + f * new_x_start))
    if x_start is not None:
        x_start.copy_(new_x_start)
    return x.copy_(x_next)


def table_row(table: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Row `step` of the table, NaN where it has none, and neutral values for the columns that the table does not have.

    Returns:
        (25,) in the table's dtype.
    """
    rows, columns = table.shape
    step = step.reshape(1)
    row = table.index_select(0, step.clamp(0, rows - 1))[0]  # (6,), (10,), (12,) or (25,)
    row = torch.where((step >= 0) & (step < rows), row, float("nan"))
    if columns == 25:
        return row
    zeros, one = row.new_zeros(14), row.new_ones(1)
    return torch.cat([row, zeros[columns:], one, zeros[:1], one, zeros[:8]])  # w and eta are neutral at 1


def split_output(x: torch.Tensor, model_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output and, of twice the channels of x, its second half, the variance."""
    if model_output.shape == x.shape:
        return model_output, None
    return model_output[:, : x.shape[1]], model_output[:, x.shape[1] :]


def previous(x: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """A state of an earlier step, NaN where there is none."""
    return torch.full_like(x, float("nan")) if given is None else given


def scaled(coefficient: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """coefficient · tensor, and 0 if the coefficient is 0, even if the tensor holds NaN."""
    return torch.where(coefficient == 0, 0.0, coefficient * tensor)
