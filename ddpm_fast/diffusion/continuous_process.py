"""Processes in continuous time: the rows of a training step are made on the device from each image's own time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ddpm_fast.diffusion.diffusion_process import DiffusionProcess, TrainingRows
from ddpm_fast.diffusion.guidance import Guidance
from ddpm_fast.diffusion.levels import Levels, Target, prediction
from ddpm_fast.diffusion.weightings import Weighting, find_weighting, recorded_weighting, uniform, weight_of_output
from ddpm_fast.ops.forward_diffusion.op import q_sample
from ddpm_fast.runtime.autocast import call_model
from ddpm_fast.runtime.plain import as_int, plain

if TYPE_CHECKING:
    from typing_extensions import Self


class ContinuousProcess(DiffusionProcess):
    """The base of processes whose time is a real number; a subclass gives `noise_scale`, `target`, `random_times`.

    Args:
        config: the arguments that the subclass has beside those below.
        loss_weighting, loss_weighting_options: the weight of x0's squared error as a function of the SNR.
        others: see `DiffusionProcess`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        config: dict[str, Any],
        image_size: int | Sequence[int],
        channels: int | None,
        sampling_timesteps: int,
        clip_x_start: bool,
        loss_weighting: str | Weighting,
        auto_normalize: bool = True,
        offset_noise_strength: float = 0.0,
        immiscible: bool = False,
        uncertainty_weighting: bool = False,
        sampler: str | None = None,
        spacing: str | Sequence[float] | None = None,
        sampler_options: Mapping[str, float] | None = None,
        loss_weighting_options: Mapping[str, float] | None = None,
        guidance: float | Mapping[str, Any] | Guidance | None = None,
        super_resolution: int | None = None,
        noise_augmentation: float | None = None,
    ):
        weighting = find_weighting(loss_weighting, loss_weighting_options)
        common = dict(
            image_size=image_size,
            channels=None if channels is None else as_int("channels", channels, 1),
            auto_normalize=bool(auto_normalize),
            offset_noise_strength=offset_noise_strength,
            immiscible=bool(immiscible),
            uncertainty_weighting=bool(uncertainty_weighting),
            sampler=plain("sampler", sampler),
            spacing=spacing if spacing is None or isinstance(spacing, str) else [float(time) for time in spacing],
            sampler_options=plain("sampler_options", dict(sampler_options)) if sampler_options else None,
        )
        recorded = {
            **common,
            **config,
            "loss_weighting": recorded_weighting(loss_weighting),
            "loss_weighting_options": dict(loss_weighting_options) if loss_weighting_options else None,
        }
        super().__init__(
            model,
            **common,
            sampling_timesteps=as_int("sampling_timesteps", sampling_timesteps, 1),
            clip_x_start=bool(clip_x_start),
            config=recorded,
            guidance=guidance,
            super_resolution=super_resolution,
            noise_augmentation=noise_augmentation,
        )
        self._weighting = weighting
        self.register_buffer("constant_row", None, persistent=False)
        if self.constant_target is not None and weighting is uniform:
            self._fill_constant_row()

    fixed_arguments = frozenset({"config", "sampling_timesteps", "clip_x_start"})

    @classmethod
    def _check_others(cls, others: Iterable[str]) -> None:
        """Raise TypeError unless these, which a constructor hands on to its base, are arguments of the class."""
        for name in others:
            if name not in cls.arguments():
                steps = ": its steps are num_sample_steps" if name in ("timesteps", "sampling_timesteps") else ""
                raise TypeError(f"{cls.__name__} has no argument {name!r}{steps}")

    # c and d of out = c·ε + d·x0, where they are the same at every level.
    constant_target: tuple[float, float] | None = None
    constant_row: torch.Tensor | None  # (1, 3), the row of the loss's table where all are the same

    @property
    def target(self) -> Target:
        assert self.constant_target is not None
        c, d = self.constant_target
        return lambda levels: (torch.full_like(levels.a, c), torch.full_like(levels.a, d))

    def _fill_constant_row(self) -> None:
        assert self.constant_target is not None
        self.constant_row = torch.tensor([[*self.constant_target, 1.0]], device=self.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves and casts; a row that was on the meta device is written again."""
        was_meta = self.constant_row is not None and self.constant_row.is_meta
        super()._apply(fn, recurse)
        if was_meta:
            self._fill_constant_row()
        return self

    def _check_times(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, torch.Tensor) else type(t).__name__
            raise TypeError(f"times must be a floating point tensor, got {got}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"times must have shape ({x.shape[0]},), one per image, got {tuple(t.shape)}")
        for name, tensor in (("times", t), ("x_start", x)):
            if tensor.device != self.device:
                raise ValueError(f"{name} must be on the diffusion's device {self.device}, got {tensor.device}")
        return t

    def _rows(self, t: torch.Tensor) -> TrainingRows:
        levels = self.noise_scale.at(t)
        if self.constant_row is None:
            weight = weight_of_output(levels, self.target, self._weighting)
            loss_table = torch.stack((*self.target(levels), weight), dim=1)
        else:
            loss_table = self.constant_row.to(levels.a.dtype).expand(t.shape[0], 3).contiguous()
        of_images = torch.arange(t.shape[0], device=t.device)
        return TrainingRows(of_images, torch.stack((levels.a, levels.b), dim=1), loss_table, levels.times)

    def _estimate(self, x: torch.Tensor, t: torch.Tensor, rows: TrainingRows, **conditions: Any) -> torch.Tensor:
        a, b = rows.forward_table.unbind(1)
        c, d, _ = rows.loss_table.unbind(1)
        estimate = prediction(Levels(rows.times, a, b), lambda levels: (c, d))
        p, q = (factor.reshape(-1, 1, 1, 1).to(x) for factor in estimate)
        return p * x + q * call_model(self.network, x, rows.times, None, **conditions)

    def q_sample(self, x_start: torch.Tensor, times: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """x_t = a·x0 + b·ε.

        Args:
            x_start: (B, ...), in [−1, 1].
            times: (B,) times of the process.
            noise: exactly this ε; fresh if None.
        """
        if noise is None:
            noise = self.training_noise(x_start)
        rows = self._rows(self._check_times(times, x_start))
        return q_sample(x_start, rows.of_images, rows.forward_table, noise)
