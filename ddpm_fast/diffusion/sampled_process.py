"""What every process does with its network besides training: sampling, along tables and with conditions.

A process says its levels (`noise_scale`) and what its network gives (`target`). The rest is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ddpm_fast import noise as noise_function
from ddpm_fast.diffusion import multistep_samplers, samplers, sampling, single_step_samplers, spacings
from ddpm_fast.diffusion.conditions import Conditions, as_conditions, taken_by
from ddpm_fast.diffusion.guidance import Guidance, as_guidance, guided
from ddpm_fast.diffusion.images import as_floats, check_images, check_size_known, identity
from ddpm_fast.diffusion.levels import NoiseScale, Target, TrainingRows
from ddpm_fast.diffusion.samplers import SamplerTable
from ddpm_fast.diffusion.sampling import sample_loop
from ddpm_fast.diffusion.sampling_run import CondFn, Conditioning, SamplingRun
from ddpm_fast.models.derived_weights import free_inference_weights
from ddpm_fast.ops.noise.op import normal
from ddpm_fast.runtime.plain import as_flag, as_int, as_ints
from ddpm_fast.runtime.pretrained import Pretrained
from ddpm_fast.runtime.recording import GraphCache

if TYPE_CHECKING:
    from ddpm_fast.diffusion.inpainting import Resampling

# Importing them registers the samplers.
_SAMPLERS = (single_step_samplers, multistep_samplers)

# Tables of samplers that a process keeps.
_PLANS = 256

# Arguments of `sample` that say what images are of.
_CONDITIONING = ("classes", "cond", "cond_image", "guidance", "cond_fn")


def check_names(conditioning: Iterable[str]) -> None:
    """Raise TypeError unless all names are of arguments that say what images are of."""
    for name in conditioning:
        if name not in _CONDITIONING:
            raise TypeError(f"sampling has no argument {name!r}; of conditions it has {', '.join(_CONDITIONING)}")


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


class SampledProcess(Pretrained, nn.Module):
    """A network and the levels of noise around it, which samplers walk along."""

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

    image_size: tuple[int, int]  # None of a checkpoint that does not record it
    sampler: str | None
    spacing: str | Sequence[float] | None
    sampler_options: dict[str, float]
    sampling_timesteps: int
    clip_x_start: bool
    guidance: Any  # as the constructor takes it
    class_names: tuple[str, ...] | None = None  # of the classes 0, 1, ..., where a checkpoint records them
    normalize: Callable[[torch.Tensor], torch.Tensor]
    unnormalize: Callable[[torch.Tensor], torch.Tensor]
    graphs: GraphCache
    _plans: dict[tuple, SamplerTable]

    # what a process says of itself

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

    def _estimate(self, x: torch.Tensor, t: torch.Tensor, rows: TrainingRows, **conditions: Any) -> torch.Tensor:
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
        batch_size: int | None = None,
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
        **conditioning: Any,
    ) -> torch.Tensor:
        """Images from noise.

        Args:
            batch_size: B; None is that of the conditions, 16 without any.
            return_all_timesteps: also every state before, from the noise on.
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
            conditioning: any of
                classes: (B,) int64 on the process's device, or a sequence of ints.
                cond: (B, D), vectors.
                cond_image: (B, C', H, W), in [0, 1] with `auto_normalize`.
                guidance: a scale or a `Guidance`; None is the attribute. It needs a network with a null condition.
                cond_fn: (x, t, classes) -> ∇ log p(classes | x), shape of x, as OpenAI's guided-diffusion calls it. x
                    is a copy of the state, which autograd may watch, and t what the network is told. The ancestral
                    sampler adds it to a step's mean (Dhariwal & Nichol 2021, algorithm 1), others to its noise (2).

        Returns:
            (B, C, H, W) float32 in [0, 1] with `auto_normalize`; (B, N + 1, C, H, W) with `return_all_timesteps`, N
            being the sampler's network calls.

        Raises:
            TypeError, ValueError: an argument does not fit, named in one sentence.
        """
        shape = self._shape(batch_size, **conditioning)
        plan = self._plan(sampler, sampling_timesteps, spacing, sampler_options)
        clip = self.clip_x_start if clip_x_start is None else clip_x_start
        run: dict[str, Any] = {"start_index": start_index, "progress": progress, "graph": graph, "clip_x_start": clip}
        return self._sample(plan, shape, return_all_timesteps, seed, **run, **conditioning)

    def progressive(
        self,
        batch_size: int | None = None,
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
        **conditioning: Any,
    ) -> Progressive:
        """Estimates of x0 over the time of sampling: coarse features first (Ho et al. 2020, section 4.3, figure 6).

        Args:
            batch_size: B; None is that of the conditions, 4 without any.
            num_columns: K, evenly spaced among the sampler's network calls, the first and the last among them.
            others: as in `sample`; the same ones end at the same images.

        Returns:
            `Progressive`: times (K,), estimates (B, K, C, H, W), images (B, C, H, W).
        """
        shape = self._shape(batch_size, without=4, **conditioning)
        plan = self._plan(sampler, sampling_timesteps, spacing, sampler_options)
        columns = spacings.evenly_spaced(len(plan.times), as_int("num_columns", num_columns, 1))
        shown: list[torch.Tensor] = []
        row = iter(range(len(plan.times)))

        def on_x_start(x_start: torch.Tensor) -> None:
            if next(row) in columns:
                shown.append(x_start.clone())

        run: dict[str, Any] = {"progress": progress, "graph": graph, "on_x_start": on_x_start}
        run |= conditioning
        images = self._sample(plan, shape, seed=seed, start_index=start_index, **run)
        with torch.inference_mode():
            stacked = torch.stack(shown, dim=1)
            estimates = self.unnormalize(stacked if self.normalize is identity else stacked.clamp(-1, 1))
        times = torch.tensor([plan.times[column] for column in columns], dtype=torch.float64)
        return Progressive(times, estimates.clone(), images)

    def _shape(self, batch_size: int | None, *, without: int = 16, **conditioning: Any) -> tuple[int, ...]:
        """(B, C, H, W) of a batch: as given, or that of the conditions, or `without` any."""
        check_size_known(self.image_size)
        check_names(conditioning)
        if batch_size is None:
            batch_size = self._given_conditions(**conditioning).batch_size
            batch_size = without if batch_size is None else batch_size
        return (as_int("batch_size", batch_size, 0), self.channels, *self.image_size)

    # conditions and guidance

    def _given_conditions(
        self, classes: Any = None, cond: Any = None, cond_image: Any = None, **guides: Any
    ) -> Conditions:
        """Conditions as they were given; sequences of numbers become tensors. `guides` are no conditions."""
        return as_conditions(classes, cond, cond_image, device=self.device)

    def _conditions(
        self,
        batch_size: int,
        classes: Any = None,
        cond: Any = None,
        cond_image: Any = None,
        *,
        others_read: bool = False,
    ) -> Conditions:
        """Checked conditions of a batch, images normalised; see `Conditions.check`."""
        given = self._given_conditions(classes, cond, self._condition_images(cond_image))
        where: dict[str, Any] = {"device": self.device, "size": self.image_size, "others_read": others_read}
        return given.check(self.network, batch_size=batch_size, **where)

    def _condition_images(self, images: torch.Tensor | None, flip: torch.Tensor | None = None) -> torch.Tensor | None:
        """Condition images as the network reads them: normalised, and mirrored with the images."""
        if not isinstance(images, torch.Tensor) or not (images.is_floating_point() or images.dtype == torch.uint8):
            return images  # the check says so
        return self.normalize(as_floats(images, flip if images.ndim == 4 else None))

    def _guidance(self, guidance: Any, conditions: Conditions) -> Guidance:
        """The guidance of a call; raises where there is nothing that could guide."""
        found = as_guidance(self.guidance if guidance is None else guidance) or Guidance()
        if not found.is_on or found.network is not None:
            return found
        if conditions.classes is None and conditions.cond is None:
            if guidance is None:
                return replace(found, scale=1.0, cfg_plus_plus=False)
            raise ValueError("guidance must be None or 1 without classes and cond, whose absence it compares with")
        if not taken_by(self.network).has_null:
            raise ValueError(
                f"guidance must be None or 1, since the network, a {type(self.network).__name__}, has no null "
                "condition: it takes no cond_keep_mask, and has no null_class"
            )
        return found

    def _conditioned(
        self,
        plan: SamplerTable,
        batch_size: int,
        *,
        classes: Any = None,
        cond: Any = None,
        cond_image: Any = None,
        guidance: Any = None,
        cond_fn: CondFn | None = None,
    ) -> tuple[SamplerTable, Conditioning]:
        """A table with its guidance, and what its steps read besides."""
        if cond_fn is not None and not callable(cond_fn):
            raise TypeError(f"cond_fn must be a function (x, t, classes) -> gradient, got {type(cond_fn).__name__}")
        conditions = self._conditions(batch_size, classes, cond, cond_image, others_read=cond_fn is not None)
        found = self._guidance(guidance, conditions)
        if not conditions and cond_fn is None and not found.is_on:
            return plan, Conditioning()
        plan = self._guided_plan(plan, found, cond_fn is not None)
        guide = found.network if found.is_on else None
        is_doubled = found.is_on and guide is None
        if guide is not None:
            guide_conditions = conditions.check_others(guide, self.network)
        return plan, Conditioning(
            (conditions.doubled() if is_doubled else conditions).arguments(self.network),
            is_doubled=is_doubled,
            guide=None if guide is None else self._sampled(guide),
            guide_arguments={} if guide is None else guide_conditions.arguments(guide),
            cond_fn=cond_fn,
            classes=conditions.classes if cond_fn is not None else None,
        )

    def _guided_plan(self, plan: SamplerTable, found: Guidance, has_gradient: bool) -> SamplerTable:
        """A sampler's table with guidance in it, kept as the tables of samplers are."""
        if not (found.is_on or has_gradient):
            return plan
        found = found.with_numbers(len(plan.times))
        by_mean = plan.sampler == "ddpm" and not self.learned_variance
        key = (plan, has_gradient, *found.key)
        return self._kept(key, lambda: guided(plan, found, has_gradient=has_gradient, by_mean=by_mean))

    def _kept(self, key: tuple, make: Callable[[], SamplerTable]) -> SamplerTable:
        """The table of a key, made unless it is kept."""
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _PLANS:  # a program that never asks twice for the same would fill the memory
                self._plans.clear()
            plan = self._plans[key] = make()
        return plan

    def _plan(
        self,
        sampler: str | None = None,
        sampling_timesteps: int | None = None,
        spacing: str | Sequence[float] | None = None,
        options: Mapping[str, float] | None = None,
        resampling: Resampling | None = None,
    ) -> SamplerTable:
        """The sampler's table; what is None is the attribute of now, which users change."""
        if options is None:
            options = self.sampler_options if sampler in (None, self.sampler) else {}
        sampler = next(given for given in (sampler, self.sampler, self.default_sampler) if given is not None)
        samplers.check_sampler(sampler)
        options = {**self._default_options(sampler), **samplers.as_options(sampler, options)}
        steps = self.sampling_timesteps if sampling_timesteps is None else sampling_timesteps
        steps = as_int("sampling_timesteps", steps)
        spacing = next((given for given in (spacing, self.spacing, self.default_spacing) if given is not None), None)
        spacing = spacing if spacing is None or isinstance(spacing, str) else spacings.as_times(spacing)
        key = (sampler, steps, spacing, tuple(sorted(options.items())), resampling, *self._plan_key())
        return self._kept(key, lambda: self._make_plan(sampler, steps, spacing, options, resampling=resampling))

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
        self,
        sampler: str,
        steps: int,
        spacing: str | Sequence[float] | None,
        options: Mapping[str, float],
        **others: Any,
    ) -> SamplerTable:
        """A table by `samplers.sampler_table`, which takes `others` as well."""
        others = {"spacing": spacing, "options": options, "learned_variance": self.learned_variance, **others}
        return samplers.sampler_table(self.noise_scale, self.target, sampler, steps, **others)

    def explain_graphs(self, batch_size: int = 16, *, guidance: Any = None, cond_fn: CondFn | None = None) -> str:
        """Whether `sample(batch_size)` replays a recorded step now, and if not, why; one sentence.

        Args:
            guidance, cond_fn: as `sample` takes them.
        """
        x = torch.empty((as_int("batch_size", batch_size, 0), self.channels, 1, 1), device=self.device)
        guide = (as_guidance(self.guidance if guidance is None else guidance) or Guidance()).network
        reason = self._why_not_recorded(self._plan().sampler, x, False, Conditioning(guide=guide, cond_fn=cond_fn))
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
        *,
        known: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Images from noise; `options` are of `SamplingRun` and of conditioning, see `sample`."""
        shape = as_ints("shape", shape, 0)
        conditioning = {name: options.pop(name) for name in _CONDITIONING if name in options}
        plan, given = self._conditioned(plan, shape[0], **conditioning)
        if known is not None:
            given = replace(given, known=known, mask=mask)
        run = SamplingRun(plan, self._seed(seed), **{"clip_x_start": self.clip_x_start, **options}, conditioning=given)
        x = normal(
            shape, seed=run.seed, stream=noise_function.STREAM_INITIAL, start_index=run.start_index, device=self.device
        )
        if plan.first_scale != 1.0:
            x *= plan.first_scale
        if as_flag("return_all_timesteps", return_all_timesteps):
            states = x.new_empty(x.shape[0], len(run.plan.times) + 1, *x.shape[1:])  # (B, N + 1, C, H, W)
            unwritten = iter(states.unbind(1))
            on_step = run.on_step = lambda state: next(unwritten).copy_(state)
            on_step(x)
        x = self._denoise(x, run)
        with torch.inference_mode():
            images = self._clipped(x, run)
            if return_all_timesteps:
                states[:, -1] = images
            result = self.unnormalize(states if return_all_timesteps else images)
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
        return self._sampled(self.network)

    def _sampled(self, network: Any) -> Any:
        """A network, the process's own or one that guides it, as samplers see it."""
        return network

    def _check_recording(self, x: torch.Tensor, run: SamplingRun) -> str | None:
        """Why the run's steps are not recorded; raises where they have to be."""
        if run.graph is False:
            return "it was not asked for"
        reason = self._why_not_recorded(run.plan.sampler, x, bool(run.graph), run.conditioning)
        if run.graph and reason is not None:
            raise RuntimeError(f"graph=True, and a graph cannot replace the steps: {reason}")
        return reason

    def _why_not_recorded(
        self, sampler: str, x: torch.Tensor, any_module: bool, given: Conditioning | None = None
    ) -> str | None:
        """Why steps on x cannot be recorded, in one clause; None where they can."""
        if torch.compiler.is_compiling():
            return "sampling is being compiled"
        who = {} if given is None else {"guide": given.guide, "cond_fn": given.cond_fn}
        options: dict[str, Any] = {"self_condition": self.self_condition, "any_module": any_module, **who}
        return sampling.why_not_recorded(self._sampled_network(), x, self.graphs, **options)

    def _seed(self, seed: int | torch.Tensor | None) -> torch.Tensor:
        if seed is None:
            return noise_function.draw_seed(self.device)
        return noise_function.seed_tensor(seed, self.device)

    # checks

    def _check_images(self, name: str, img: torch.Tensor, sized: bool = True, bytes_too: bool = False) -> None:
        """Raise unless these are images of the process."""
        if sized:
            check_size_known(self.image_size)
        size = self.image_size if sized else None
        check_images(name, img, channels=self.channels, size=size, device=self.device, bytes_too=bytes_too)
