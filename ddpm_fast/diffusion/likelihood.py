"""The variational bound of a process on images, in bits per dimension, term by term (Ho et al. 2020, eq. 5 and 13).

    bits = prior + Σ terms
    prior     KL(q(x_T | x0) ‖ N(0, I))
    terms[0]  −log₂ P(x0 | x_0), the discretised decoder at the least noise
    terms[i]  KL(q(x_{i−1} | x_i, x0) ‖ p(x_{i−1} | x_i))

A chain of S levels of noise has all that a process says of it, so that every process has a bound. A shorter chain has a
bound of its own: that of the images which it samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ddpm_fast.diffusion import sampling, sampling_run
from ddpm_fast.diffusion.likelihood_chain import BITS, Chain
from ddpm_fast.diffusion.likelihood_chain import CONTINUOUS_STEPS as CONTINUOUS_STEPS
from ddpm_fast.diffusion.likelihood_chain import VARIANCES as VARIANCES
from ddpm_fast.diffusion.likelihood_chain import chain_times as chain_times
from ddpm_fast.diffusion.likelihood_chain import make_chain as make_chain
from ddpm_fast.diffusion.likelihood_chain import posterior as posterior
from ddpm_fast.diffusion.spacings import evenly_spaced
from ddpm_fast.models.derived_weights import inference_weights, may_derive
from ddpm_fast.noise import STREAM_LIKELIHOOD
from ddpm_fast.ops.forward_diffusion.op import q_sample
from ddpm_fast.ops.noise.op import normal
from ddpm_fast.ops.variational_bound.op import variational_bound
from ddpm_fast.runtime import recording
from ddpm_fast.runtime.autocast import autocast_dtype, call_model, uncached_autocast
from ddpm_fast.runtime.plain import as_int

BATCH_SIZE = 64

_TO_BYTES = 127.5  # of 8-bit values in a unit of [−1, 1]


@dataclass(frozen=True, eq=False)
class BitsPerDim:
    """The bound of N images over a chain of S levels; all float64 on the CPU.

    Args:
        timesteps: (S,), the times of the chain, from least noise to most.
        prior: (N,) bits per dimension of x at the most noise.
        terms: (N, S) bits per dimension; the first is the discretised decoder's.
        x_start_mse: (N, S), mean (x0 − x̂0)² of the network's estimates, images being in [−1, 1].
        noise_mse: (N, S), mean (ε − ε̂)², ε̂ being what x̂0 says of the noise.
    """

    timesteps: torch.Tensor
    prior: torch.Tensor
    terms: torch.Tensor
    x_start_mse: torch.Tensor
    noise_mse: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """(N,) bits per dimension: at most so many are needed for the image without loss."""
        return self.prior + self.terms.sum(dim=1)

    @property
    def decoder(self) -> torch.Tensor:
        """(N,) L_0, bits per dimension."""
        return self.terms[:, 0]

    @property
    def mean(self) -> float:
        """Bits per dimension of all images."""
        return self.total.mean().item()

    @property
    def standard_error(self) -> float:
        """Of the mean over images; NaN of a single image."""
        return (self.total.std() / math.sqrt(len(self.total))).item()


class RateDistortion(NamedTuple):
    """What a receiver of more and more steps has (Ho et al. 2020, section 4.3, figure 5), from most noise to least.

    Args:
        timesteps: (S,).
        rate: (S,) bits per dimension that have come, x at that time included.
        distortion: (S,) root mean squared error of x̂0 on a scale of 0 to 255.
    """

    timesteps: torch.Tensor
    rate: torch.Tensor
    distortion: torch.Tensor


def rate_distortion(bits: BitsPerDim) -> RateDistortion:
    """The mean rate and the distortion over all images of `bits` along the chain."""
    terms = bits.terms.mean(dim=0)
    received = terms.flip(0).cumsum(0) - terms.flip(0)  # the terms of more noise than each
    distortion = _TO_BYTES * bits.x_start_mse.mean(dim=0).sqrt()
    return RateDistortion(bits.timesteps.flip(0), bits.prior.mean() + received, distortion.flip(0))


class ProgressiveCoding(NamedTuple):
    """Images as a receiver of more and more steps sees them (Ho et al. 2020, section 4.3).

    Args:
        times: (K,) float64, the times of the columns, from most noise to least.
        noised: (N, K, C, H, W), x at that time, scaled to a² + b² = 1.
        estimates: (N, K, C, H, W), x0 as estimated from it.
        rate: (N, K) float64, bits per dimension that have come.
        distortion: (N, K) float64, root mean squared error of the estimates on a scale of 0 to 255.
    """

    times: torch.Tensor
    noised: torch.Tensor
    estimates: torch.Tensor
    rate: torch.Tensor
    distortion: torch.Tensor


def as_bytes(images: torch.Tensor, is_signed: bool) -> torch.Tensor:
    """Images of 8 bits: uint8 as they are, floats in [0, 1], or in [−1, 1] if `is_signed`, rounded to such.

    Raises:
        ValueError: a value is not in the range.
    """
    if images.dtype == torch.uint8:
        return images
    low = -1.0 if is_signed else 0.0
    if images.numel() and not bool(((images >= low) & (images <= 1)).all()):
        raise ValueError(f"images must be in [{low:g}, 1] or uint8, got values from {images.min()} to {images.max()}")
    return (((images.float() - low) / (1 - low)) * 255).round().to(torch.uint8)


class _Step:
    """One level of the chain, from the most noise to the least: what it reads and writes, on the device, and itself."""

    def __init__(
        self,
        network: Any,
        shape: tuple[int, ...],
        num_rows: int,
        options: _Options,
        device: torch.device,
        told: dict[str, torch.Tensor],
    ):
        self.network, self.shape, self.options = network, shape, options
        self.told = {name: torch.zeros_like(tensor) for name, tensor in told.items()}
        self.forward_table = torch.zeros(num_rows, 2, device=device)
        self.table, self.error_table = (torch.zeros(num_rows, 14, device=device) for _ in range(2))
        times_dtype = torch.int64 if options.num_timesteps is not None else torch.float32
        self.times = torch.zeros(num_rows, dtype=times_dtype, device=device)
        self.x_start = torch.zeros(shape, device=device)
        self.x_t, self.estimate = (torch.zeros(shape if options.keeps else (0,), device=device) for _ in range(2))
        self.found = torch.zeros(shape[0], num_rows, 2, device=device)
        self.row, self.seed = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))

    def load(self, x_start: torch.Tensor, chain: Chain, seed: torch.Tensor, told: dict[str, torch.Tensor]) -> None:
        """Be ready for a walk; `told` are the network's keywords, of the layout of the constructor's."""
        for name, tensor in told.items():
            self.told[name].copy_(tensor)
        self.x_start.copy_(x_start)
        self.forward_table.copy_(chain.table[:, :2])
        self.table.copy_(chain.table)
        self.error_table.copy_(chain.error_table)
        self.times.copy_(chain.levels.times)
        self.seed.copy_(seed)
        self.row.fill_(len(self.table) - 1)

    def advance(self) -> None:
        """Write the terms of a row, and go on to that of less noise."""
        rows = self.row.expand(self.shape[0])
        where: dict[str, Any] = {"stream": STREAM_LIKELIHOOD, "step": self.row, "start_index": self.options.start_index}
        noise = normal(self.shape, seed=self.seed, device=self.x_start.device, **where)
        x = q_sample(self.x_start, rows, self.forward_table, noise)
        t = rows if self.options.times is not None else self.times.index_select(0, rows)
        output = call_model(self.network, x, t, **self.told)
        if self.options.self_condition:
            output = call_model(self.network, x, t, self._estimated(x, rows, output), **self.told)
        given = {"clip_x_start": self.options.clip_x_start, "min_probability": self.options.min_probability}
        found = [
            variational_bound(output, self.x_start, rows, table, noise, terms=True, **given)[:, 1]  # type: ignore[arg-type]
            for table in (self.table, self.error_table)
        ]
        self.found.index_copy_(1, self.row, torch.stack(found, dim=1)[:, None])
        if self.options.keeps:
            self.x_t.copy_(x)
            self.estimate.copy_(self._estimated(x, rows, output))
        self.row -= 1

    def _estimated(self, x: torch.Tensor, rows: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """x̂0 of an output, with or without a variance."""
        p, q = self.table.index_select(0, rows)[:, 5:7, None, None, None].unbind(1)
        x_start = p * x + q * output[:, : x.shape[1]].float()
        return x_start.clamp(-1, 1) if self.options.clip_x_start else x_start


class _Options(NamedTuple):
    """What a recording of the step depends on besides the network and the shapes.

    Args:
        start_index: index of the first image, for the noise.
        self_condition: the network sees its own estimate of the same x_t, as in training.
        clip_x_start: clip estimates to [−1, 1].
        keeps: x_t and x̂0 are kept for `on_step`.
        min_probability: of a bin.
        num_timesteps: of the chain.
        times: those of the chain, where the network is told a row and looks the time up.
    """

    start_index: int
    self_condition: bool
    clip_x_start: bool
    keeps: bool
    min_probability: float
    num_timesteps: int | None
    times: tuple[float, ...] | None


# Called after every row with the row, x_t and x̂0, which the next overwrites.
OnStep = Callable[[int, torch.Tensor, torch.Tensor], object]


@dataclass
class LikelihoodRun:
    """How a bound is computed.

    Args:
        seed: one-element int64 tensor on the device.
        start_index: index of the first image, for the noise.
        batch_size: images at once.
        self_condition: the network sees an estimate.
        clip_x_start: clip estimates to [−1, 1].
        progress: show a progress bar.
        on_step: called after every row.
        cache: where steps may be recorded; None runs step by step.
        told: of all images, what the network is told by keyword, (N, ...) each.
    """

    seed: torch.Tensor
    start_index: int = 0
    batch_size: int = BATCH_SIZE
    self_condition: bool = False
    clip_x_start: bool = True
    progress: bool = False
    on_step: OnStep | None = None
    cache: recording.GraphCache | None = None
    told: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start_index = as_int("start_index", self.start_index, 0)


@torch.inference_mode()
def bits_per_dim(
    network: Any,
    images: torch.Tensor,
    chain: Chain,
    normalize: Callable[[torch.Tensor], torch.Tensor],
    run: LikelihoodRun,
) -> BitsPerDim:
    """The bound of images along a chain.

    Args:
        network: takes (x, t, x_self_cond), returns the target's output, with a variance where the chain has one.
        images: (N, C, H, W) uint8.
        normalize: [0, 1] → the range of the process, [−1, 1].
    """
    device, rows = run.seed.device, len(chain.table)
    starts = range(0, len(images), run.batch_size)
    told = chain.levels.times.tolist()
    known = {"times": told} if chain.num_timesteps is None else {"num_timesteps": chain.num_timesteps}
    derived = inference_weights(network, **known, record=False) if may_derive(network) else nullcontext()
    priors, found = [], []
    bar = sampling_run.progress_on(device, rows * len(starts), desc="likelihood time step", enabled=run.progress)
    with derived, bar:
        for start in starts:
            x_start = normalize(images[start : start + run.batch_size].to(device).float() / 255)
            priors.append(chain.prior(x_start))
            found.append(_walk(network, x_start, chain, run, start, bar).double().cpu())
    terms, errors = (torch.cat(found) if found else torch.zeros(0, rows, 2, dtype=torch.float64)).unbind(2)
    x_start_mse = errors * math.log(2)
    return BitsPerDim(
        timesteps=torch.tensor(told, dtype=torch.float64),
        prior=torch.cat(priors) if priors else terms.new_zeros(0),
        terms=terms + BITS * chain.constant,
        x_start_mse=x_start_mse,
        noise_mse=x_start_mse * chain.levels.snr,
    )


def _walk(
    network: Any, x_start: torch.Tensor, chain: Chain, run: LikelihoodRun, start: int, bar: sampling_run.Progress
) -> torch.Tensor:
    """(B, S, 2): the bound without its constant, and the error, both in bits."""
    by_row = chain.num_timesteps is None and getattr(network, "has_table_of_times", False)
    told = {name: tensor[start : start + run.batch_size] for name, tensor in run.told.items()}
    options = _Options(
        run.start_index + start,
        run.self_condition,
        run.clip_x_start,
        run.on_step is not None,
        chain.min_probability,
        chain.num_timesteps,
        tuple(chain.levels.times.tolist()) if by_row else None,
    )
    device, shape, num_rows = x_start.device, tuple(x_start.shape), len(chain.table)
    with _try_lock(network, x_start, run) as locked:
        if locked and run.cache is not None:
            step, advance = _recorded(run.cache, network, shape, num_rows, options, device, told)
        else:
            step = _Step(network, shape, num_rows, options, device, told)
            advance = step.advance
        step.load(x_start, chain, run.seed, told)
        for row in range(num_rows - 1, -1, -1):
            advance()
            if run.on_step is not None:
                run.on_step(row, step.x_t, step.estimate)
            bar.step_done()
        return step.found.clone()


def _try_lock(network: Any, x: torch.Tensor, run: LikelihoodRun) -> AbstractContextManager[bool]:
    """True inside if the steps may be recorded, and this thread has the recordings."""
    if run.cache is None:
        return nullcontext(False)
    given: dict[str, Any] = {"self_condition": run.self_condition, "any_module": False}
    reason = sampling.why_not_recorded(network, x, run.cache, **given)
    return run.cache.try_lock(x.device) if reason is None else nullcontext(False)


def _recorded(
    cache: recording.GraphCache,
    network: Any,
    shape: tuple[int, ...],
    num_rows: int,
    options: _Options,
    device: torch.device,
    told: dict[str, torch.Tensor],
) -> tuple[_Step, Callable[[], None]]:
    autocast = autocast_dtype(device.type)
    layout = tuple((name, tensor.shape, tensor.dtype) for name, tensor in told.items())
    key = ("likelihood", shape, device, num_rows, options, autocast, recording.settings(), layout)

    def make(recorder: Any) -> tuple[_Step, Callable[[], None]]:
        with torch.inference_mode(False), torch.no_grad():
            step = _Step(network, shape, num_rows, options, device, told)

            def body() -> None:
                with uncached_autocast(device, autocast):
                    step.advance()

            return step, recorder.record(body, step.row.zero_)

    return cache.find(device, key, network, make)


def progressive_coding(
    network: Any,
    images: torch.Tensor,
    chain: Chain,
    normalize: Callable[[torch.Tensor], torch.Tensor],
    run: LikelihoodRun,
    *,
    num_columns: int,
) -> ProgressiveCoding:
    """Images along a chain, in the range of the process; arguments as in `bits_per_dim`, all images in one batch."""
    num_rows = len(chain.table)
    columns = evenly_spaced(num_rows, num_columns)  # counted from the most noise
    scale = (chain.levels.a**2 + chain.levels.b**2).sqrt()
    shape = (len(columns), *images.shape)
    noised, estimates = (torch.zeros(shape, device=run.seed.device) for _ in range(2))

    def on_step(row: int, x: torch.Tensor, x_start: torch.Tensor) -> None:
        if num_rows - 1 - row in columns:
            place = columns.index(num_rows - 1 - row)
            noised[place].copy_(x / scale[row].item())
            estimates[place].copy_(x_start)

    run.on_step = on_step
    bits = bits_per_dim(network, images, chain, normalize, run)
    terms = bits.terms.flip(1)
    rate = bits.prior[:, None] + terms.cumsum(1) - terms
    distortion = _TO_BYTES * bits.x_start_mse.flip(1).sqrt()
    return ProgressiveCoding(
        times=bits.timesteps.flip(0)[columns],
        noised=noised.transpose(0, 1),
        estimates=estimates.transpose(0, 1),
        rate=rate[:, columns],
        distortion=distortion[:, columns],
    )
