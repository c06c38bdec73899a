"""What every diffusion process shares: a network, levels of noise, the training loss, sampling, and checks.

A process says its levels (`noise_scale`), what its network gives (`target`), the times of a training step
(`random_times`) and the rows of the ops' tables for them (`_rows`). The rest is here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import nn

from ddpm_fast import noise as noise_function
from ddpm_fast.diffusion import samplers, sampling, spacings
from ddpm_fast.diffusion.levels import NoiseScale, Target
from ddpm_fast.diffusion.samplers import SamplerTable
from ddpm_fast.diffusion.sampling import SamplingRun, sample_loop
from ddpm_fast.diffusion.weightings import UncertaintyWeight
from ddpm_fast.models.derived_weights import free_inference_weights
from ddpm_fast.noise import Noise
from ddpm_fast.ops.common.tables import lookup
from ddpm_fast.ops.forward_diffusion.op import diffusion_loss, q_sample
from ddpm_fast.ops.noise.op import normal
from ddpm_fast.runtime.autocast import autocast_dtype, call_model, narrow_dtype, uncached_autocast
from ddpm_fast.runtime.plain import as_int, as_number, as_size
from ddpm_fast.runtime.recording import GraphCache

if TYPE_CHECKING:
    from ddpm_fast.diffusion.likelihood import BitsPerDim, Chain, LikelihoodRun, ProgressiveCoding

_Process = TypeVar("_Process", bound="DiffusionProcess")

# Name of a process, as checkpoints and the command line have it → its class.
PROCESSES: dict[str, type[DiffusionProcess]] = {}


def process(name: str) -> Callable[[type[_Process]], type[_Process]]:
    """Register a class as the process `name`.

    Raises:
        ValueError: the name is taken.
    """

    def register(cls: type[_Process]) -> type[_Process]:
        if name in PROCESSES:
            raise ValueError(f"a process of the name {name!r} is registered already")
        PROCESSES[name] = cls
        cls.process_name = name
        if cls.__module__.startswith(f"{__package__}."):
            for base in cls.__mro__[: cls.__mro__.index(DiffusionProcess) + 1]:
                for attribute, value in vars(base).items():
                    _ORIGINALS.setdefault(attribute, []).append(value)
        return cls

    return register


# The methods of this package's processes by name, as their modules define them: a class may be patched, too.
_ORIGINALS: dict[str, list[Any]] = {}


# Methods that say how x0 is estimated, and the mean and the variance of a step.
_PREDICTING_METHODS = (
    "model_predictions",
    "p_mean_variance",
    "q_posterior",
    "predict_start_from_noise",
    "predict_start_from_v",
    "preconditioned_network_forward",
)


def normalize_to_neg_one_to_one(img: torch.Tensor) -> torch.Tensor:
    """[0, 1] → [−1, 1]."""
    return img * 2 - 1


def unnormalize_to_zero_to_one(t: torch.Tensor) -> torch.Tensor:
    """[−1, 1] → [0, 1]."""
    return (t + 1) * 0.5


def identity(t: torch.Tensor) -> torch.Tensor:
    """Replaces both with `auto_normalize=False`."""
    return t


def as_floats(images: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
    """Bytes as float32 in [0, 1], other images as they are; mirrored left to right where flip (B,) says so."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    if flip is not None:
        images = torch.where((flip != 0)[:, None, None, None], images.flip(-1), images)
    return images


class TrainingRows(NamedTuple):
    """What a training step reads of a process.

    Args:
        of_images: (B,) int64, the rows of the images in the tables.
        forward_table: (N, 2), columns a, b of x_t = a·x0 + b·ε.
        loss_table: (N, 3), columns c, d, w of w · mean((out − (c·ε + d·x0))²).
        times: (B,), what the network is told.
    """

    of_images: torch.Tensor
    forward_table: torch.Tensor
    loss_table: torch.Tensor
    times: torch.Tensor


class Progressive(NamedTuple):
    """Estimates of x0 along a sampling run (Ho et al. 2020, figure 6).

    Args:
        times: (K,) float64, the times of the columns, from most noise to least.
        estimates: (B, K, C, H, W) x0 as estimated there.
        images: (B, C, H, W), what the run ends at.
    """

    times: torch.Tensor
    estimates: torch.Tensor
    images: torch.Tensor


class DiffusionProcess(nn.Module):
    """A network and a process around it; the base of them all.

    Args:
        model: takes (x, t, x_self_cond).
        image_size: one int, or (height, width).
        channels: of the images; the model's if None.
        auto_normalize: images are in [0, 1] outside and [−1, 1] inside; without it they are taken as they are.
        offset_noise_strength: adds one normal number per channel to the noise, 0.1 is usual.
        immiscible: assign noise to images by distance within the batch (Li et al. 2024).
        uncertainty_weighting: learn a weight per level of noise beside the network (EDM2).
        sampler, spacing, sampler_options: how `sample` walks, where it is not told otherwise.
        sampling_timesteps: steps of that walk.
        clip_x_start: estimates of x0 are clipped to [−1, 1] in every step of sampling.
        config: the arguments of the process, plain values, for checkpoints.
    """

    # Where the network is, for state dicts as upstream's.
    network_name = "model"
    process_name: str
    # The sampler where none is asked for.
    default_sampler = "dpmpp_2m"
    # The spacing where none is asked for; None: the sampler's.
    default_spacing: str | None = None
    # Whether the network's output has a second half, the variance (Nichol & Dhariwal 2021, eq. 15).
    learned_variance = False

    channels: int
    self_condition: bool

    # Arguments of base classes that a class sets itself, or has no use for.
    fixed_arguments: frozenset[str] = frozenset({"config"})

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | Sequence[int],
        channels: int | None,
        auto_normalize: bool,
        offset_noise_strength: float,
        immiscible: bool,
        uncertainty_weighting: bool,
        sampler: str | None,
        spacing: str | Sequence[float] | None,
        sampler_options: Mapping[str, float] | None,
        sampling_timesteps: int,
        clip_x_start: bool,
        config: dict[str, Any],
    ):
        super().__init__()
        setattr(self, self.network_name, model)
        own_channels = getattr(model, "channels", channels)
        if own_channels is None:
            raise TypeError("channels must be given for a model without an attribute `channels`")
        if channels is not None and channels != own_channels:
            raise ValueError(f"channels must be the model's, {own_channels}, got {channels}")
        self.channels = own_channels
        self.self_condition = getattr(model, "self_condition", False)
        self.image_size = as_size("image_size", image_size)
        self.offset_noise_strength = as_number("offset_noise_strength", offset_noise_strength)
        self.immiscible = immiscible
        self.sampler, self.spacing = sampler, spacing
        self.sampler_options = dict(sampler_options or {})
        self.sampling_timesteps = sampling_timesteps
        self.clip_x_start = clip_x_start
        if sampler is not None:
            samplers.check_sampler(sampler)
            samplers.check_options(sampler, self.sampler_options)
        elif self.sampler_options:
            raise TypeError("sampler_options must be None where sampler is")
        if isinstance(spacing, str):
            spacings.check_spacing(spacing)
        self.config = {**config, "image_size": list(self.image_size)}
        self.uncertainty = UncertaintyWeight() if uncertainty_weighting else None
        self._plans: dict[tuple, SamplerTable] = {}
        self.graphs = GraphCache()
        self.normalize = normalize_to_neg_one_to_one if auto_normalize else identity
        self.unnormalize = unnormalize_to_zero_to_one if auto_normalize else identity

    # what a process says of itself

    @classmethod
    def arguments(cls) -> set[str]:
        """Names of the constructor's arguments, those of base classes included, but for the network."""
        names: set[str] = set()
        for base in cls.__mro__:
            if "__init__" not in vars(base):
                continue
            parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[2:]  # self, network
            rests = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            own = {parameter.name for parameter in parameters if parameter.kind not in rests}
            names |= own - (cls.fixed_arguments if names else set())
            if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
                break
        return names - {"config"}

    def current_config(self) -> dict[str, Any]:
        """The constructor's arguments, plain values; of those that are attributes the values of now."""
        config = {name: getattr(self, name, value) for name, value in self.config.items()}
        later = {"spacing": self.spacing, "sampler_options": dict(self.sampler_options) or None}
        config |= {name: value for name, value in later.items() if name in config or value}
        return {**config, "image_size": None if self.image_size is None else list(self.image_size)}

    def recording_key(self) -> tuple:
        """What a recorded step depends on besides tensors and plain attributes: functions put on the process."""
        return tuple((name, value) for name, value in vars(self).items() if callable(value))

    @property
    def noise_scale(self) -> NoiseScale:
        """The levels of noise as functions of time."""
        raise NotImplementedError

    @property
    def target(self) -> Target:
        """What the network gives."""
        raise NotImplementedError

    def random_times(self, batch_size: int) -> torch.Tensor:
        """(B,) the times of a training step."""
        raise NotImplementedError

    def _check_times(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Times as the process takes them, one per image; raises where they do not fit."""
        raise NotImplementedError

    def _rows(self, t: torch.Tensor) -> TrainingRows:
        """The rows of tables for times that fit."""
        raise NotImplementedError

    def _estimate(self, x: torch.Tensor, t: torch.Tensor, rows: TrainingRows) -> torch.Tensor:
        """x0 as the network estimates it from x, shape of x; for self-conditioning."""
        raise NotImplementedError

    # sampling

    @property
    def network(self) -> Any:
        return getattr(self, self.network_name)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    def sample(
        self,
        batch_size: int = 16,
        return_all_timesteps: bool = False,
        *,
        sampler: str | None = None,
        sampling_timesteps: int | None = None,
        spacing: str | Sequence[float] | None = None,
        sampler_options: Mapping[str, float] | None = None,
        clip_x_start: bool | None = None,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        progress: bool = True,
        graph: bool | None = None,
    ) -> torch.Tensor:
        """Images from noise.

        Args:
            batch_size: B.
            return_all_timesteps: also every intermediate state, from the noise on.
            sampler, sampling_timesteps, spacing, sampler_options: how to walk; None is the attribute of that name.
            clip_x_start: clip estimates of x0 to [−1, 1] in every step; None is the attribute.
            seed: 64-bit seed of the noise; None draws one from torch's generator, so `torch.manual_seed` fixes it.
            start_index: index of the first image: `sample(6, seed=7)` is `sample(2, seed=7)` followed by
                `sample(4, seed=7, start_index=2)`.
            progress: show a progress bar.
            graph: record a step (as a CUDA graph, on the CPU as a tape of operator calls) and replay it; the result is
                the same. None does so where it can (`explain_graphs` says why not), True raises where it cannot, False
                never does. CUDA graphs are kept: what Python changes in the model besides its weights, settings of
                torch and train/eval needs `clear_graphs`.

        Returns:
            (B, C, H, W) float32 in [0, 1] with `auto_normalize`; (B, N + 1, C, H, W) with `return_all_timesteps`, N
            being the sampler's network calls.

        Raises:
            TypeError, ValueError: an argument does not fit, named in one sentence.
        """
        shape = self._shape(batch_size)
        plan = self._plan(sampler, sampling_timesteps, spacing, sampler_options)
        clip = self.clip_x_start if clip_x_start is None else clip_x_start
        run = {"start_index": start_index, "progress": progress, "graph": graph, "clip_x_start": clip}
        return self._sample(plan, shape, return_all_timesteps, seed, **run)

    def progressive(
        self,
        batch_size: int = 4,
        num_columns: int = 10,
        *,
        sampler: str | None = None,
        sampling_timesteps: int | None = None,
        spacing: str | Sequence[float] | None = None,
        sampler_options: Mapping[str, float] | None = None,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        progress: bool = True,
        graph: bool | None = None,
    ) -> Progressive:
        """Estimates of x0 over the time of sampling: coarse features first (Ho et al. 2020, section 4.3, figure 6).

        Args:
            batch_size: B.
            num_columns: K, evenly spaced among the sampler's network calls, the first and the last among them.
            others: as in `sample`; the same ones end at the same images.

        Returns:
            `Progressive`: times (K,), estimates (B, K, C, H, W), images (B, C, H, W).
        """
        shape = self._shape(batch_size)
        plan = self._plan(sampler, sampling_timesteps, spacing, sampler_options)
        from ddpm_fast.diffusion.likelihood import evenly_spaced  # with its op, which nothing else here needs

        columns = evenly_spaced(len(plan.times), as_int("num_columns", num_columns, 1))
        shown: list[torch.Tensor] = []
        row = iter(range(len(plan.times)))

        def on_x_start(x_start: torch.Tensor) -> None:
            if next(row) in columns:
                shown.append(x_start.clone())

        run: dict[str, Any] = {"progress": progress, "graph": graph, "on_x_start": on_x_start}
        images = self._sample(plan, shape, seed=seed, start_index=start_index, **run)
        with torch.inference_mode():
            stacked = torch.stack(shown, dim=1)
            estimates = self.unnormalize(stacked if self.normalize is identity else stacked.clamp(-1, 1))
        times = torch.tensor([plan.times[column] for column in columns], dtype=torch.float64)
        return Progressive(times, estimates.clone(), images)

    # likelihood

    def bits_per_dim(
        self,
        images: torch.Tensor,
        *,
        seed: int | torch.Tensor | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        timesteps: int | Sequence[float] | None = None,
        variance: str | None = None,
        clip_x_start: bool | None = None,
        start_index: int = 0,
        graph: bool | None = None,
    ) -> BitsPerDim:
        """The variational bound on −log₂ of images' probability, in bits per dimension (Ho et al. 2020, eq. 5 and 13).

        Args:
            images: (N, C, H, W) uint8, or floats in [0, 1] ([−1, 1] without `auto_normalize`), which are rounded to
                8 bits. They may be on another device.
            seed: of the noise, one draw per image and level; None draws it from torch's generator.
            batch_size: images at once, 64 if None; does not change the result.
            progress: show a progress bar.
            timesteps: the chain: how many, or which. None: all T, or 1,000 in continuous time. Each chain has a bound
                of its own, that of the images which it samples.
            variance: of p(x_{t−1} | x_t): "small" is the posterior's, "large" is β, "learned" is the network's; None
                is "learned" where the network gives it, else "small".
            clip_x_start: clip estimates of x0 to [−1, 1]; None is the attribute.
            start_index: index of the first image, for the noise, as in `sample`.
            graph: False never records a step; None does so where it can.

        Returns:
            `BitsPerDim`: the terms of every image.

        Raises:
            TypeError, ValueError: an argument does not fit, named in one sentence.
        """
        from ddpm_fast.diffusion import likelihood

        run = likelihood.LikelihoodRun(self._seed(seed), start_index, progress=progress)
        run.batch_size = likelihood.BATCH_SIZE if batch_size is None else as_int("batch_size", batch_size, 1)
        chain = self._chain(timesteps, variance)
        return likelihood.bits_per_dim(*self._bound_arguments(images, chain, run, clip_x_start, graph))

    def progressive_coding(
        self,
        images: torch.Tensor,
        num_columns: int = 10,
        *,
        seed: int | torch.Tensor | None = None,
        progress: bool = True,
        timesteps: int | Sequence[float] | None = None,
        variance: str | None = None,
        clip_x_start: bool | None = None,
        start_index: int = 0,
        graph: bool | None = None,
    ) -> ProgressiveCoding:
        """Images sent step by step: what is received, x0 as estimated from it, its rate and its distortion.

        Args:
            images: a few, as `bits_per_dim` takes them.
            num_columns: K, evenly spaced along the chain, the most and the least noise among them.
            others: as in `bits_per_dim`.

        Returns:
            `ProgressiveCoding`: times, noised, estimates, rate, distortion.
        """
        from ddpm_fast.diffusion import likelihood

        num_columns = as_int("num_columns", num_columns, 1)
        chain = self._chain(timesteps, variance)
        run = likelihood.LikelihoodRun(self._seed(seed), start_index, max(1, len(images)), progress=progress)
        arguments = self._bound_arguments(images, chain, run, clip_x_start, graph)
        coding = likelihood.progressive_coding(*arguments, num_columns=num_columns)
        with torch.inference_mode():
            noised, estimates = (self.unnormalize(shown) for shown in (coding.noised, coding.estimates))
        return coding._replace(noised=noised.clone(), estimates=estimates.clone())

    def _chain(self, timesteps: int | Sequence[float] | None, variance: str | None) -> Chain:
        from ddpm_fast.diffusion import likelihood

        own = "learned" if self.learned_variance else "small"
        variance = own if variance is None else variance
        if variance not in likelihood.VARIANCES or (variance == "learned" and not self.learned_variance):
            allowed = likelihood.VARIANCES if self.learned_variance else likelihood.VARIANCES[:2]
            raise ValueError(f"variance must be one of {', '.join(allowed)} for this process, got {variance!r}")
        times = likelihood.chain_times(self.noise_scale, timesteps)
        return likelihood.make_chain(self.noise_scale, self.target, times, variance)

    def _bound_arguments(
        self, images: torch.Tensor, chain: Chain, run: LikelihoodRun, clip_x_start: bool | None, graph: bool | None
    ) -> tuple[Any, torch.Tensor, Chain, Callable[[torch.Tensor], torch.Tensor], LikelihoodRun]:
        """Arguments of the functions in `likelihood`, checked."""
        from ddpm_fast.diffusion import likelihood

        if graph not in (None, False):
            raise ValueError(f"graph must be None or False for a bound, got {graph!r}")
        own = [name for name in _PREDICTING_METHODS if hasattr(type(self), name) and self._has_own(name)]
        if own:
            raise ValueError(f"{type(self).__name__} has its own {', '.join(own)}, which the bound would leave out")
        if self.normalize not in (normalize_to_neg_one_to_one, identity):
            raise ValueError("normalize must be this package's, which gives 256 values in [−1, 1], for a bound")
        self._check_images("images", images[:1].to(self.device), bytes_too=True)
        as_bytes = likelihood.as_bytes(images, is_signed=self.normalize is identity)
        run.self_condition = self.self_condition
        run.clip_x_start = self.clip_x_start if clip_x_start is None else clip_x_start
        run.cache = None if graph is False or torch.compiler.is_compiling() else self.graphs
        return self._sampled_network(), as_bytes, chain, normalize_to_neg_one_to_one, run

    def _shape(self, batch_size: int) -> tuple[int, ...]:
        if self.image_size is None:
            raise ValueError(
                "image_size is not known, since the loaded checkpoint does not record it: set "
                "diffusion.image_size = (height, width), or pass image_size= to load_checkpoint"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 0:
            raise ValueError(f"batch_size must be an int of at least 0, got {batch_size!r}")
        return (batch_size, self.channels, *self.image_size)

    def _plan(
        self,
        sampler: str | None = None,
        sampling_timesteps: int | None = None,
        spacing: str | Sequence[float] | None = None,
        options: Mapping[str, float] | None = None,
    ) -> SamplerTable:
        """The sampler's table; what is None is the attribute of now, which users change."""
        if options is None:
            options = self.sampler_options if sampler in (None, self.sampler) else {}
        sampler = sampler or self.sampler or self.default_sampler
        samplers.check_sampler(sampler)
        options = {**self._default_options(sampler), **options}
        steps = self.sampling_timesteps if sampling_timesteps is None else sampling_timesteps
        spacing = next((given for given in (spacing, self.spacing, self.default_spacing) if given is not None), None)
        spacing = spacing if spacing is None or isinstance(spacing, str) else tuple(spacing)
        key = (sampler, steps, spacing, tuple(sorted(options.items())), *self._plan_key())
        if key not in self._plans:
            self._plans[key] = self._make_plan(sampler, steps, spacing, options)
        return self._plans[key]

    def network_calls(
        self,
        sampler: str | None = None,
        sampling_timesteps: int | None = None,
        spacing: str | Sequence[float] | None = None,
        sampler_options: Mapping[str, float] | None = None,
    ) -> int:
        """How often `sample` calls the network with these arguments; raises what it raises."""
        return len(self._plan(sampler, sampling_timesteps, spacing, sampler_options).times)

    def _default_options(self, sampler: str) -> dict[str, float]:
        """Options that the process gives a sampler where the caller does not."""
        return {}

    def _plan_key(self) -> tuple:
        """The settings that tables of samplers depend on."""
        return ()

    def _make_plan(
        self, sampler: str, steps: int, spacing: str | Sequence[float] | None, options: Mapping[str, float]
    ) -> SamplerTable:
        return samplers.sampler_table(self.noise_scale, self.target, sampler, steps, spacing=spacing, options=options)

    def explain_graphs(self, batch_size: int = 16) -> str:
        """Whether `sample(batch_size)` replays a recorded step now, and if not, why; one sentence."""
        x = torch.empty((batch_size, self.channels, 1, 1), device=self.device)
        reason = self._why_not_recorded(self._plan().sampler, x, False)
        if reason is not None:
            return f"sampling runs step by step: {reason}"
        recorder = self.graphs.recorder_on(self.device)
        if not recorder.is_kept:
            return f"sampling replays {recorder.what}; every run makes one"
        return f"sampling replays {recorder.what}; {len(self.graphs)} are kept, {self.graphs.limit} at most"

    def clear_graphs(self) -> None:
        """Drop recorded graphs and the memory they hold, derived weights included; the next `sample` records again."""
        self.graphs.clear()
        free_inference_weights(self.network)

    def _sample(
        self,
        plan: SamplerTable,
        shape: Sequence[int],
        return_all_timesteps: bool = False,
        seed: int | torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Images from noise; `options` are of `SamplingRun`."""
        run = SamplingRun(plan, self._seed(seed), **{"clip_x_start": self.clip_x_start, **options})
        x = normal(
            shape, seed=run.seed, stream=noise_function.STREAM_INITIAL, start_index=run.start_index, device=self.device
        )
        if plan.first_scale != 1.0:
            x *= plan.first_scale
        if return_all_timesteps:
            states = x.new_empty(x.shape[0], len(run.plan.times) + 1, *x.shape[1:])  # (B, N + 1, C, H, W)
            unwritten = iter(states.unbind(1))
            on_step = run.on_step = lambda state: next(unwritten).copy_(state)
            on_step(x)
        x = self._denoise(x, run)
        with torch.inference_mode():
            result = self.unnormalize(states if return_all_timesteps else self._clipped(x, run))
        return result.clone()  # outside inference mode: an ordinary tensor, which may be trained on

    def _clipped(self, x: torch.Tensor, run: SamplingRun) -> torch.Tensor:
        """Images in their range, in which clipped estimates of x0 are already."""
        is_inside = run.clip_x_start and run.plan.ends_on_x_start
        return x if is_inside or self.normalize is identity else x.clamp(-1.0, 1.0)

    def _denoise(self, x: torch.Tensor, run: SamplingRun) -> torch.Tensor:
        """Walk along the run's table."""
        reason = self._check_recording(x, run)
        with self.graphs.try_lock(x.device) if reason is None else nullcontext(False) as locked:
            return sample_loop(
                self._sampled_network(),
                x,
                run,
                self_condition=self.self_condition,
                cache=self.graphs if locked else None,
            )

    def _sampled_network(self) -> Any:
        """The network as samplers see it, whose output `target` describes."""
        return self.network

    def _check_recording(self, x: torch.Tensor, run: SamplingRun) -> str | None:
        """Why the run's steps are not recorded; raises where they have to be."""
        if run.graph is False:
            return "it was not asked for"
        reason = self._why_not_recorded(run.plan.sampler, x, bool(run.graph))
        if run.graph and reason is not None:
            raise RuntimeError(f"graph=True, and a graph cannot replace the steps: {reason}")
        return reason

    def _why_not_recorded(self, sampler: str, x: torch.Tensor, any_module: bool) -> str | None:
        """Why steps on x cannot be recorded, in one clause; None where they can."""
        if torch.compiler.is_compiling():
            return "sampling is being compiled"
        return sampling.why_not_recorded(
            self._sampled_network(), x, self.graphs, self_condition=self.self_condition, any_module=any_module
        )

    def _seed(self, seed: int | torch.Tensor | None) -> torch.Tensor:
        if seed is None:
            return noise_function.draw_seed(self.device)
        return noise_function.seed_tensor(seed, self.device)

    def interpolate(
        self,
        x1: torch.Tensor,
        x2: torch.Tensor,
        t: float | None = None,
        lam: float = 0.5,
        *,
        seed: int | torch.Tensor | None = None,
        start_index: int = 0,
        progress: bool = True,
        graph: bool | None = None,
    ) -> torch.Tensor:
        """Images between x1 and x2: both are noised to t, mixed, and denoised from t on (Ho et al. 2020, section 4.2).

        Args:
            x1, x2: (B, C, H, W) images, in [0, 1] with `auto_normalize`.
            t: a time of the process; that of the most noise if None.
            lam: 0 gives x1's side, 1 gives x2's.
            seed, start_index, progress, graph: as in `sample`.

        Returns:
            (B, C, H, W) images in the range of x1.
        """
        if x1.shape != x2.shape:
            raise ValueError(f"x2 must have x1's shape {tuple(x1.shape)}, got {tuple(x2.shape)}")
        self._check_images("x1", x1)
        self._check_images("x2", x2)
        plan = self._interpolation_plan(t)
        seed = self._seed(seed)
        noised = []
        for image, stream in (
            (x1, noise_function.STREAM_TRAINING),
            (x2, noise_function.STREAM_INTERPOLATE),
        ):
            noise = normal(image.shape, seed=seed, stream=stream, start_index=start_index, device=image.device)
            with torch.inference_mode():
                noised.append(self._noised_to(self.normalize(image.float()), t, noise))
        x = ((1 - lam) * noised[0] + lam * noised[1]).contiguous()
        run = SamplingRun(plan, seed, start_index, progress=progress, graph=graph, clip_x_start=self.clip_x_start)
        run.first_step, run.desc = self._interpolation_start(plan, t), "interpolation sample time step"
        x = self._denoise(x, run)
        with torch.inference_mode():
            result = self.unnormalize(self._clipped(x, run))
        return result.clone()

    def _interpolation_plan(self, t: float | None) -> SamplerTable:
        """Ancestral sampling from t on."""
        scale = self.noise_scale
        first = scale.first if t is None else as_number("t", t, *sorted((scale.first, scale.last)))
        times = scale.own_times(self.sampling_timesteps)
        later = times[times > first] if scale.last > scale.first else times[times < first]
        return self._make_plan("ddpm", self.sampling_timesteps, (first, *later.tolist()), {})

    def _interpolation_start(self, plan: SamplerTable, t: float | None) -> int:
        return 0

    def _noised_to(self, x_start: torch.Tensor, t: float | None, noise: torch.Tensor) -> torch.Tensor:
        """Normalised images at time t."""
        time = torch.full((), self.noise_scale.first if t is None else t, device=x_start.device)
        rows = self._rows(time.expand(x_start.shape[0]))
        return q_sample(x_start, rows.of_images, rows.forward_table, noise)

    # training

    def _can_fuse_noise(self) -> bool:
        """True if fresh ε may stay a seed: nobody but the ops looks at it."""
        return not self.assigns_noise

    def _noise(self, x_start: torch.Tensor, noise: torch.Tensor | None, offset_noise_strength: float) -> Noise:
        """ε of a training step: as given, or fresh, with its offset."""
        if noise is None and self._can_fuse_noise():
            return Noise(None, noise_function.draw_seed(x_start.device), offset_noise_strength)
        if noise is None:
            return Noise(self.training_noise(x_start, offset_noise_strength))
        if noise.shape != x_start.shape or noise.device != x_start.device:
            raise ValueError(
                f"noise must have x_start's shape {tuple(x_start.shape)} and device {x_start.device}, "
                f"got {tuple(noise.shape)} on {noise.device}"
            )
        if offset_noise_strength > 0:
            noise = self._offset(noise, offset_noise_strength, noise_function.draw_seed(noise.device))
        return Noise(noise)

    def _network_input(self, x_start: torch.Tensor) -> dict:
        """Options of q_sample for x_t that the network reads; {} leaves dtype and memory format as they are.

        Autocast would cast the input of a network that begins with a convolution at once. With self-conditioning x_t is
        read by the conversion to x0 as well, and keeps its dtype.
        """
        if not getattr(self.network, "begins_with_convolution", False):
            return {}
        dtype = torch.promote_types(x_start.dtype, torch.float32) if self._reads_x_t() else narrow_dtype(self.network)
        return {"for_network": True, "dtype": dtype}

    def _reads_x_t(self) -> bool:
        """True if something besides the network reads x_t in training."""
        return self.self_condition

    def p_losses(
        self,
        x_start: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
        *,
        self_conditioned: bool | None = None,
    ) -> torch.Tensor:
        """The weighted squared error of the network's output.

        Args:
            x_start: (B, C, H, W), normalised.
            t: (B,) times, as `random_times` gives them.
            noise: ε, shape of x_start; fresh if None.
            offset_noise_strength: the constructor's if None.
            loss_reduction: "mean", a scalar, or "none", (B,).
            self_conditioned: whether the network sees a first estimate of x0; None draws it.
        """
        self._check_images("x_start", x_start, sized=False)
        return self._losses(x_start, t, noise, offset_noise_strength, loss_reduction, self_conditioned)

    def _losses(
        self,
        x_start: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
        self_conditioned: bool | None = None,
        *,
        normalize: bool = False,
        flip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`p_losses` of images that the ops still mirror and, where they are bytes, divide by 255 and normalise."""
        if loss_reduction not in ("mean", "none"):
            raise ValueError(f"loss_reduction must be 'mean' or 'none', got {loss_reduction!r}")
        t = self._check_times(t, x_start)
        options: dict[str, Any] = {"normalize": normalize, "flip": flip}
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        drawn = self._noise(x_start, noise, strength)
        rows = self._rows(t)
        x = self._noised(x_start, t, rows, drawn, options)
        x_self_cond = None
        if self.draw_self_condition() if self_conditioned is None else self_conditioned:
            with torch.no_grad(), uncached_autocast(x.device, autocast_dtype(x.device.type)):
                x_self_cond = self._estimate(x, t, rows)
        model_output = call_model(self.network, x, rows.times, x_self_cond)
        loss = self._errors(model_output, x_start, x, t, rows, drawn, options)
        if self.uncertainty is not None:
            a, b = lookup(rows.forward_table, rows.of_images).unbind(1)
            loss = self.uncertainty(loss, torch.log(b) - torch.log(a))
        return loss if loss_reduction == "none" else loss.mean()

    def _noised(
        self, x_start: torch.Tensor, t: torch.Tensor, rows: TrainingRows, drawn: Noise, options: dict[str, Any]
    ) -> torch.Tensor:
        """x_t, as the network reads it."""
        return q_sample(x_start, rows.of_images, rows.forward_table, drawn, **options, **self._network_input(x_start))

    def _errors(
        self,
        model_output: torch.Tensor,
        x_start: torch.Tensor,
        x: torch.Tensor,
        t: torch.Tensor,
        rows: TrainingRows,
        drawn: Noise,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """The loss of each image, (B,)."""
        return diffusion_loss(model_output, x_start, rows.of_images, rows.loss_table, drawn, **options)

    def forward(
        self,
        img: torch.Tensor,
        *args: Any,
        times: torch.Tensor | None = None,
        loss_reduction: str = "mean",
        flip: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The training loss of a batch of images, at random times unless `times` gives them.

        Args:
            img: (B, C, H, W) floating point, in [0, 1] with `auto_normalize`; or uint8, which stands for img/255.
            times: (B,), as `random_times` gives them.
            flip: (B,) bool or uint8: mirror these images left to right.
            args, kwargs: of `p_losses`.

        Raises:
            TypeError, ValueError: an input does not fit, named in one sentence. NaN in images and t out of range are
                seen on the CPU only; on CUDA looking would wait for the device, and they make the loss NaN.
        """
        self._check_images("img", img, bytes_too=True)
        if flip is not None:
            self._check_flip(flip, img)
        times = self.random_times(img.shape[0]) if times is None else times
        if self._shows_images():
            x_start = self.normalize(as_floats(img, flip))
            return self.p_losses(x_start, times, *args, loss_reduction=loss_reduction, **kwargs)  # type: ignore[misc]
        # Bytes are read as they are by the ops, so that no float copy of the images is made.
        is_bytes = img.dtype == torch.uint8
        options: dict[str, Any] = {"flip": flip, "normalize": is_bytes and self.normalize is not identity}
        x_start = img if is_bytes else self.normalize(img)
        return self._losses(x_start, times, *args, loss_reduction=loss_reduction, **options, **kwargs)  # type: ignore[misc]

    def _shows_images(self) -> bool:
        """True if a method of the user's, or the assignment of noise, looks at the images of a training step."""
        is_own_range = self.normalize in (normalize_to_neg_one_to_one, identity)
        return self.assigns_noise or not is_own_range or self._has_own("p_losses")

    @property
    def takes_bytes(self) -> bool:
        """True if `forward` is this package's and nobody listens to it: it then takes uint8 images and `flip`."""
        return not (self._has_own("forward") or self._forward_hooks or self._forward_pre_hooks)

    def _has_own(self, name: str) -> bool:
        """True if a subclass, this object, or whoever patched the class has a method of its own."""
        found = getattr(type(self), name)
        return name in self.__dict__ or not any(found is original for original in _ORIGINALS[name])

    # what training draws

    def noise_assignment(self, x_start: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Which noise each image gets, by smallest total distance (Li et al. 2024, immiscible diffusion).

        Returns:
            (B,) int64, a permutation of the batch.
        """
        from ddpm_fast.runtime.extras import needed_for

        with needed_for("immiscible=True"):
            from scipy.optimize import linear_sum_assignment

        _, assignment = linear_sum_assignment(self._distance(x_start, noise).cpu())
        return torch.from_numpy(assignment).to(x_start.device)

    def _distance(self, x_start: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """(B, B) cost of giving an image a noise."""
        return torch.cdist(x_start.flatten(1), noise.flatten(1))

    @property
    def assigns_noise(self) -> bool:
        """True if each image's noise is chosen among the batch's, on the host."""
        return self.immiscible

    def training_noise(self, x_start: torch.Tensor, offset_noise_strength: float = 0.0) -> torch.Tensor:
        """Fresh ε for x_start, offset and assigned to the images as configured."""
        seed = noise_function.draw_seed(x_start.device)
        kwargs: dict[str, Any] = {"seed": seed, "device": x_start.device, "dtype": x_start.dtype}
        noise = normal(x_start.shape, stream=noise_function.STREAM_TRAINING, **kwargs)
        if offset_noise_strength > 0:
            noise = self._offset(noise, offset_noise_strength, seed)
        if self.assigns_noise:
            noise = noise[self.noise_assignment(x_start, noise)]
        return noise

    def _offset(self, noise: torch.Tensor, strength: float, seed: torch.Tensor) -> torch.Tensor:
        """Noise plus one normal number per image and channel (Guttenberg 2023, offset noise); not in place."""
        offset = normal(
            noise.shape[:2], seed=seed, stream=noise_function.STREAM_OFFSET, device=noise.device, dtype=noise.dtype
        )
        return noise + strength * offset[:, :, None, None]

    def draw_self_condition(self) -> bool:
        """True in half of the calls: the network then sees a first estimate (Chen et al. 2022, section 2).

        False without self-conditioning. The number is torch's, on the CPU, so that it costs no synchronisation and
        `torch.manual_seed` fixes it.
        """
        return self.self_condition and torch.rand(()).item() < 0.5

    # checks

    def _check_images(self, name: str, img: torch.Tensor, sized: bool = True, bytes_too: bool = False) -> None:
        if not isinstance(img, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(img).__name__}")
        is_bytes = bytes_too and img.dtype == torch.uint8
        if bytes_too and not is_bytes and not img.is_floating_point():
            raise TypeError(f"{name} must be floating point in [0, 1] or uint8 in 0..255, got {img.dtype}")
        if not is_bytes and not img.is_floating_point():
            raise TypeError(f"{name} must be floating point in [0, 1] (divide 8-bit images by 255), got {img.dtype}")
        if self.image_size is None and sized:
            raise ValueError(
                "image_size is not known, since the loaded checkpoint does not record it: set "
                "diffusion.image_size = (height, width), or pass image_size= to load_checkpoint"
            )
        size = tuple(self.image_size) if sized else tuple(img.shape[2:])
        if img.ndim != 4 or tuple(img.shape[1:]) != (self.channels, *size):
            expected = ", ".join(map(str, (self.channels, *(self.image_size if sized else ("H", "W")))))
            raise ValueError(f"{name} must have shape (B, {expected}), got {tuple(img.shape)}")
        if img.device != self.device:
            raise ValueError(f"{name} must be on the diffusion's device {self.device}, got {img.device}")
        if is_bytes:
            return
        # One pass that stores nothing: a sum is finite only of finite numbers, though it may overflow.
        if img.device.type == "cpu" and not torch.compiler.is_compiling() and not math.isfinite(img.detach().sum()):
            bad = (~torch.isfinite(img)).flatten(1).any(dim=1).nonzero().flatten().tolist()
            if bad:
                raise ValueError(f"{name} must be finite, got NaN or infinity in images {bad[:10]} of the batch")

    def _check_flip(self, flip: torch.Tensor, img: torch.Tensor) -> None:
        if not isinstance(flip, torch.Tensor):
            raise TypeError(f"flip must be a tensor, got {type(flip).__name__}")
        if flip.dtype not in (torch.bool, torch.uint8) or flip.shape != img.shape[:1]:
            raise ValueError(
                f"flip must be bool or uint8 of shape ({img.shape[0]},), one per image, "
                f"got {flip.dtype} {tuple(flip.shape)}"
            )
        if flip.device != img.device:
            raise ValueError(f"flip must be on the device of img, {img.device}, got {flip.device}")
