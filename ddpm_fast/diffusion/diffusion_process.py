"""What every diffusion process shares: a network, levels of noise, the training loss, sampling, and checks.

A process says its levels (`noise_scale`), what its network gives (`target`), the times of a training step
(`random_times`) and the rows of the ops' tables for them (`_rows`). The rest is here, in `sampled_process`, in
`editing_process` and in `measured_process`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ddpm_fast import noise as noise_function
from ddpm_fast.diffusion import samplers, spacings
from ddpm_fast.diffusion.conditions import as_conditions, check_classes
from ddpm_fast.diffusion.editing_process import EditingProcess
from ddpm_fast.diffusion.guidance import Guidance, as_guidance
from ddpm_fast.diffusion.images import (
    as_floats,
    check_flip,
    check_mean,
    identity,
    normalize_to_neg_one_to_one,
    unnormalize_to_zero_to_one,
)
from ddpm_fast.diffusion.levels import TrainingRows as TrainingRows
from ddpm_fast.diffusion.measured_process import MeasuredProcess
from ddpm_fast.diffusion.registry import PROCESSES as PROCESSES
from ddpm_fast.diffusion.registry import has_own
from ddpm_fast.diffusion.registry import process as process
from ddpm_fast.diffusion.samplers import SamplerTable
from ddpm_fast.diffusion.weightings import UncertaintyWeight
from ddpm_fast.noise import Noise
from ddpm_fast.ops.common.tables import lookup
from ddpm_fast.ops.forward_diffusion.op import diffusion_loss, q_sample
from ddpm_fast.ops.noise.op import normal
from ddpm_fast.runtime.autocast import autocast_dtype, call_model, narrow_dtype, uncached_autocast
from ddpm_fast.runtime.plain import as_number, as_size, plain
from ddpm_fast.runtime.pretrained import UndrawnWeights
from ddpm_fast.runtime.recording import GraphCache

if TYPE_CHECKING:
    from typing_extensions import Self


def check_is_network(model: object) -> None:
    """Raise TypeError for a class or for what cannot be called; the process checks the rest."""
    if isinstance(model, type) or not callable(model):
        got = f"the class {model.__name__} itself" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be a network, such as Unet(dim=64), got {got}")


class DiffusionProcess(MeasuredProcess, EditingProcess):
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
        guidance: of `sample`, where it is not told otherwise: a scale or a `Guidance`.
        super_resolution: factor by which `upscale` enlarges; training makes the low-resolution condition itself, for a
            network with `cond_channels` and `cond_dim` as `super_resolution.unet_arguments` has them.
        noise_augmentation: largest level of the noise on that condition, 0.5 if None (Ho et al. 2021, CDM).
    """

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
        guidance: float | Mapping[str, Any] | Guidance | None = None,
        super_resolution: int | None = None,
        noise_augmentation: float | None = None,
    ):
        super().__init__()
        check_is_network(model)
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
        self.guidance = guidance
        if guidance is not None:
            self.config["guidance"] = _recorded_guidance(guidance)
        self.super_resolution, self.noise_augmentation = None, None
        if super_resolution is not None or noise_augmentation is not None:
            self._set_super_resolution(super_resolution, noise_augmentation)
        self.uncertainty = UncertaintyWeight() if uncertainty_weighting else None
        self._plans: dict[tuple, SamplerTable] = {}
        self.graphs = GraphCache()
        self.normalize = normalize_to_neg_one_to_one if auto_normalize else identity
        self.unnormalize = unnormalize_to_zero_to_one if auto_normalize else identity

    def _set_super_resolution(self, factor: int | None, noise_augmentation: float | None) -> None:
        from ddpm_fast.diffusion.super_resolution import check_network, super_resolution_options

        options = super_resolution_options(factor, noise_augmentation, self.image_size)
        self.super_resolution, self.noise_augmentation = options
        check_network(self.network, self.channels)
        self.config |= {"super_resolution": self.super_resolution, "noise_augmentation": self.noise_augmentation}

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
        if "guidance" in config or self.guidance is not None:
            config["guidance"] = _recorded_guidance(self.guidance)
        return {**config, "image_size": None if self.image_size is None else list(self.image_size)}

    def pretrained_config(self) -> dict[str, Any]:
        """The constructor's arguments, and its network's, as a checkpoint records them."""
        from ddpm_fast.models.networks import network_name

        name = network_name(self.network)
        if name is None:
            raise TypeError(
                f"save_pretrained writes processes of this package's networks, and this network is a "
                f"{type(self.network).__name__}"
            )
        config = {
            "process": self.process_name,
            "diffusion": self.current_config(),
            "network": name,
            "unet": self.network.config,
            "class_names": None if self.class_names is None else list(self.class_names),
        }
        return plain("config", config)

    @classmethod
    def from_pretrained_config(cls, config: dict[str, Any], **arguments: Any) -> Self:
        """A process and its network; the arguments are the process's. A base class builds any process below it."""
        from ddpm_fast.models.networks import NETWORKS

        name = config.get("process")
        if name is None:
            raise ValueError(f"the folder holds a network alone, and no {cls.__name__}")
        own = PROCESSES.get(name)
        if own is None or not (issubclass(own, cls) or issubclass(cls, own)):
            raise ValueError(f"the folder holds the process {name!r}, not a {cls.__name__}")
        for part in ("unet", "diffusion"):
            if not isinstance(config.get(part), dict):
                raise ValueError(f"the folder's config.json lacks {part!r}, a dictionary of arguments")
        if config.get("network") not in list(NETWORKS):
            raise ValueError(f"the folder's config.json names no network of {', '.join(NETWORKS)}")
        made = own if issubclass(own, cls) else cls
        with UndrawnWeights():
            network = NETWORKS[config["network"]](**config["unet"])
        process = made(network, **{**config["diffusion"], **arguments})
        names = config.get("class_names")
        process.class_names = None if names is None else tuple(names)
        return process

    def recording_key(self) -> tuple:
        """What a recorded step depends on besides tensors and plain attributes: functions put on the process."""
        return tuple((name, value) for name, value in vars(self).items() if callable(value))

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
        if not isinstance(noise, torch.Tensor):
            raise TypeError(f"noise must be a tensor, got {type(noise).__name__}")
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
        **conditions: Any,
    ) -> torch.Tensor:
        """The weighted squared error of the network's output.

        Args:
            x_start: (B, C, H, W), normalised.
            t: (B,) times, as `random_times` gives them.
            noise: ε, shape of x_start; fresh if None.
            offset_noise_strength: the constructor's if None.
            loss_reduction: "mean", a scalar, or "none", (B,).
            self_conditioned: whether the network sees a first estimate of x0; None draws it.
            conditions: any of
                classes: (B,) int64.
                cond: (B, D), vectors.
                cond_image: (B, C', H, W), normalised.
                cond_keep_mask: (B,) bool, False gives the null condition; None drops each with the network's
                    `cond_drop_prob`.
        """
        self._check_images("x_start", x_start, sized=False)
        arguments = (x_start, t, noise, offset_noise_strength, loss_reduction, self_conditioned)
        return self._losses(*arguments, **conditions)

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
        **conditions: Any,
    ) -> torch.Tensor:
        """`p_losses` of images that the ops still mirror, normalise and, where they are bytes, divide by 255."""
        if loss_reduction not in ("mean", "none"):
            raise ValueError(f"loss_reduction must be 'mean' or 'none', got {loss_reduction!r}")
        check_mean(x_start, loss_reduction)
        t = self._check_times(t, x_start)
        options: dict[str, Any] = {"normalize": normalize, "flip": flip}
        told = self._training_conditions(x_start, options, **conditions)
        strength = self.offset_noise_strength
        if offset_noise_strength is not None:
            strength = as_number("offset_noise_strength", offset_noise_strength)
        drawn = self._noise(x_start, noise, strength)
        rows = self._rows(t)
        x = self._noised(x_start, t, rows, drawn, options)
        x_self_cond = None
        if self.draw_self_condition() if self_conditioned is None else self_conditioned:
            with torch.no_grad(), uncached_autocast(x.device, autocast_dtype(x.device.type)):
                x_self_cond = self._estimate(x, t, rows, **told)
        model_output = call_model(self.network, x, rows.times, x_self_cond, **told)
        loss = self._errors(model_output, x_start, x, t, rows, drawn, options)
        if self.uncertainty is not None:
            a, b = lookup(rows.forward_table, rows.of_images).unbind(1)
            loss = self.uncertainty(loss, torch.log(b) - torch.log(a))
        return loss if loss_reduction == "none" else loss.mean()

    def _training_conditions(
        self,
        x_start: torch.Tensor,
        options: dict[str, Any],
        *,
        classes: torch.Tensor | None = None,
        cond: torch.Tensor | None = None,
        cond_image: torch.Tensor | None = None,
        cond_keep_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """What the network is told of a batch, by keyword.

        Args:
            x_start: the images as `_losses` takes them.
            options: of `q_sample`, what is still to be done to them.
        """
        if self.super_resolution is not None and cond_image is None and cond is None:
            images = as_floats(x_start, options["flip"])
            made = self._low_resolution(self.normalize(images) if options["normalize"] else images)
            cond, cond_image = made["cond"], made["cond_image"]
        given = as_conditions(classes, cond, cond_image, cond_keep_mask, device=x_start.device)
        size = tuple(x_start.shape[2:])
        given = given.check(self.network, batch_size=x_start.shape[0], device=x_start.device, size=size)
        return given.with_drawn_mask(self.network, x_start.device).arguments(self.network)

    def _low_resolution(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """A fresh condition of super-resolution for normalised images: `cond_image` and `cond`."""
        from ddpm_fast.diffusion.super_resolution import training_condition

        assert self.super_resolution is not None and self.noise_augmentation is not None
        seed = noise_function.draw_seed(images.device)
        return training_condition(images, self.super_resolution, self.noise_augmentation, seed)

    def draw_conditions(self, img: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What a training step draws beside the given conditions, as `forward` takes it, for calls that share it."""
        if self.super_resolution is None or "cond_image" in conditions or "cond" in conditions:
            return self.draw_keep_mask(conditions, img.device)
        made = self._low_resolution(self.normalize(as_floats(img)))
        made["cond_image"] = self.unnormalize(made["cond_image"])
        return {**made, **self.draw_keep_mask({**conditions, **made}, img.device)}

    def draw_keep_mask(self, conditions: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        """{"cond_keep_mask": (B,)} as a training step draws it for these conditions; {} where it draws none."""
        if "cond_keep_mask" in conditions:
            return {}
        mask = as_conditions(**conditions, device=device).with_drawn_mask(self.network, device).keep_mask
        return {} if mask is None else {"cond_keep_mask": mask}

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
            args, kwargs: of `p_losses`; cond_image has the range of img, or is uint8, and is mirrored with it.

        Raises:
            TypeError, ValueError: an input does not fit, named in one sentence. NaN in images and t out of range are
                seen on the CPU only; on CUDA looking would wait for the device, and they make the loss NaN.
        """
        self._check_images("img", img, bytes_too=True)
        if flip is not None:
            check_flip(flip, img)
        if kwargs.get("cond_image") is not None:
            kwargs["cond_image"] = self._condition_images(kwargs["cond_image"], flip)
        times = self.random_times(img.shape[0]) if times is None else times
        if self._shows_images():
            x_start = self.normalize(as_floats(img, flip))
            return self.p_losses(x_start, times, *args, loss_reduction=loss_reduction, **kwargs)  # type: ignore[misc]
        # The ops read bytes and float32 as they are, so that no copy is made. Bits are the same, for 2·x is exact.
        reads_as_given = img.dtype in (torch.uint8, torch.float32) and not img.requires_grad
        options: dict[str, Any] = {"flip": flip, "normalize": reads_as_given and self.normalize is not identity}
        x_start = img if reads_as_given else self.normalize(img)
        return self._losses(x_start, times, *args, loss_reduction=loss_reduction, **options, **kwargs)  # type: ignore[misc]

    def check_values(self, img: torch.Tensor, *, classes: torch.Tensor | None = None, **others: torch.Tensor) -> None:
        """The checks of `forward` that read values, which a recording of it does not repeat."""
        self._check_images("img", img, bytes_too=True)
        if classes is not None:
            check_classes(classes, self.network)

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
        return has_own(self, name)

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


def _recorded_guidance(given: float | Mapping[str, Any] | Guidance | None) -> float | dict[str, Any] | None:
    """Guidance as a file records it."""
    found = as_guidance(given)
    return None if found is None else found.as_config()
