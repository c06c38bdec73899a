"""Explorative modelling (Gladstone et al. 2026): each image trains on the best of K candidates of noise."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ddpm_fast.diffusion.conditions import CONDITIONS
from ddpm_fast.diffusion.diffusion_process import DiffusionProcess
from ddpm_fast.diffusion.images import as_floats, check_mean
from ddpm_fast.runtime.plain import as_int


class XMWrapper(nn.Module):
    """A process whose loss is that of each image's best candidate of noise (Gladstone et al. 2026); as upstream's.

    Around a process of this package the candidates are compared without gradients, and the winners alone go forward
    and backward: (K + 3)/3K of the work of K candidates with gradients, and the same gradient (without dropout). With
    self-conditioning all candidates of a call see an estimate or none does.

    Args:
        flow_model: a process, or another module that gives a loss; its `loss_reduction="none"` is used where it has
            one.
        candidates: K.
        max_batch_size: images and candidates that go through the network at once; all if None.
        random_time_method, random_time_kwarg: what draws the times of another module, and its argument for them.

    Raises:
        ValueError: an argument does not fit, named in one sentence.
    """

    def __init__(
        self,
        flow_model: nn.Module,
        candidates: int = 1,
        max_batch_size: int | None = None,
        random_time_method: str = "random_times",
        random_time_kwarg: str = "times",
    ):
        super().__init__()
        self.flow_model = flow_model
        self.candidates = as_int("candidates", candidates, 1)
        self.max_batch_size = None if max_batch_size is None else as_int("max_batch_size", max_batch_size, 1)
        self.has_loss_reduction = "loss_reduction" in inspect.signature(flow_model.forward).parameters
        self.random_time_method, self.random_time_kwarg = random_time_method, random_time_kwarg

    def __getattr__(self, name: str) -> Any:
        """What the wrapper does not have is the process's: `image_size`, `channels`, `sample`, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "flow_model":
                raise
            return getattr(self.flow_model, name)

    @property
    def takes_bytes(self) -> bool:
        """True if uint8 images and `flip` reach a process that takes them, and nobody listens to this `forward`."""
        is_own = type(self).forward is XMWrapper.forward and "forward" not in vars(self)
        is_heard = bool(self._forward_hooks or self._forward_pre_hooks)
        return is_own and not is_heard and bool(getattr(self.flow_model, "takes_bytes", False))

    def sample(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.flow_model.sample(*args, **kwargs)  # type: ignore[operator]

    def forward(
        self, *args: Any, candidates: int | None = None, max_batch_size: int | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The training loss; arguments as the process's.

        Args:
            candidates, max_batch_size: the constructor's if None.
        """
        count = self.candidates if candidates is None else as_int("candidates", candidates, 1)
        at_once = self.max_batch_size if max_batch_size is None else as_int("max_batch_size", max_batch_size, 1)
        if count == 1:
            return self.flow_model(*args, **kwargs)
        if isinstance(self.flow_model, DiffusionProcess):
            return self._of_process(self.flow_model, count, at_once, *args, **kwargs)
        return self._of_any_module(count, at_once, args, kwargs)

    def _of_process(
        self,
        process: DiffusionProcess,
        count: int,
        at_once: int | None,
        img: torch.Tensor,
        *args: Any,
        times: torch.Tensor | None = None,
        flip: torch.Tensor | None = None,
        loss_reduction: str = "mean",
        **kwargs: Any,
    ) -> torch.Tensor:
        if kwargs.get("noise") is not None or args:
            raise ValueError("noise must not be given with candidates > 1, which are candidates of noise")
        batch = img.shape[0]
        check_mean(img, loss_reduction)
        times = process.random_times(batch) if times is None else times
        if kwargs.get("self_conditioned") is None:
            kwargs["self_conditioned"] = process.draw_self_condition()
        strength = kwargs.pop("offset_noise_strength", None)
        strength = process.offset_noise_strength if strength is None else strength
        options = {"loss_reduction": "none", "offset_noise_strength": 0.0, **kwargs}
        at_once = batch if at_once is None else at_once
        # Which images keep their conditions is the same for all candidates, as upstream.
        told = {name: kwargs.pop(name) for name in CONDITIONS if kwargs.get(name) is not None}
        told |= process.draw_conditions(img, told)
        options = {name: value for name, value in options.items() if name not in CONDITIONS}

        def losses(noise: torch.Tensor) -> torch.Tensor:
            chunks = [slice(start, start + at_once) for start in range(0, batch, at_once)]
            parts = [
                process(
                    img[c],
                    times=times[c],
                    flip=None if flip is None else flip[c],
                    noise=noise[c],
                    **options,
                    **{name: tensor[c] for name, tensor in told.items()},
                )
                for c in chunks
            ]
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        if process.assigns_noise:  # by the images
            images = process.normalize(as_floats(img, flip))
        else:
            images = img if img.is_floating_point() else img.new_empty(img.shape, dtype=torch.float32)
        with torch.no_grad():
            chosen = process.training_noise(images, strength)
            best = losses(chosen)
            for _ in range(count - 1):
                noise = process.training_noise(images, strength)
                found = losses(noise)
                is_better = found < best
                best = torch.where(is_better, found, best)
                chosen = torch.where(is_better[:, None, None, None], noise, chosen)
        loss = losses(chosen)
        return loss if loss_reduction == "none" else loss.mean()

    def _of_any_module(self, count: int, at_once: int | None, args: tuple, kwargs: dict) -> torch.Tensor:
        """Upstream's way: all candidates with gradients."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not tensors:
            raise ValueError("arguments must have a tensor whose first size is the batch's")
        batch = tensors[0].shape[0]
        if hasattr(self.flow_model, "xm_shared_random_kwargs"):  # such as upstream's mask of conditions
            kwargs = {**self.flow_model.xm_shared_random_kwargs(batch), **kwargs}  # type: ignore[operator]
        if self.random_time_kwarg not in kwargs:
            draw = getattr(self.flow_model, self.random_time_method, None)
            if draw is None:
                raise ValueError(f"flow_model must have a method {self.random_time_method!r}, which draws times")
            kwargs[self.random_time_kwarg] = draw(batch)

        def repeated(value: Any) -> Any:
            is_of_batch = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == batch
            return value.repeat_interleave(count, dim=0) if is_of_batch else value

        args, kwargs = tree_map(repeated, (args, kwargs))
        total = batch * count
        size = (at_once or total) if self.has_loss_reduction else 1
        extra = {"loss_reduction": "none"} if self.has_loss_reduction else {}
        losses = []
        for start in range(0, total, size):

            def part(value: Any, start: int = start) -> Any:
                is_of_all = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == total
                return value[start : start + size] if is_of_all else value

            some_args, some_kwargs = tree_map(part, (args, kwargs))
            loss = self.flow_model(*some_args, **some_kwargs, **extra)
            losses.append(loss.reshape(1, 1) if loss.ndim == 0 else loss.flatten(1) if loss.ndim > 1 else loss[:, None])
        return torch.cat(losses).mean(1).reshape(batch, count).amin(1).mean()


def process_of(module: Any) -> DiffusionProcess | None:
    """The process that a module is, or is a wrapper of; None if it is neither."""
    while isinstance(module, XMWrapper):
        module = module.flow_model
    return module if isinstance(module, DiffusionProcess) else None
