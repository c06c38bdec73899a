"""Conditions: what a network is told besides x and its time, and which networks are told what.

classes (B,) are numbers of classes, cond (B, D) vectors, cond_image (B, C', H, W) images. keep_mask (B,) says whose
classes and vectors are kept; the others have the null condition (Ho & Salimans 2022). All reach a network by keyword.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from ddpm_fast import noise as noise_function
from ddpm_fast.ops.noise.op import normal
from ddpm_fast.ops.registration import may_read
from ddpm_fast.runtime.plain import shown

# Keywords of a training step's conditions.
CONDITIONS = ("classes", "cond", "cond_image", "cond_keep_mask")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Takes(NamedTuple):
    """What a network takes, by the keywords of its forward and by its attributes.

    Args:
        classes: the keyword of the classes, "classes" or "y"; None: it takes none.
        cond, cond_image, keep_mask: whether it takes these.
        required: names of those without which it cannot run.
        num_classes, cond_dim, cond_channels: its sizes; None where it does not say them.
        null_class: the class that stands for none, where there is no keep_mask.
        draws_mask: without a mask it drops conditions at random.
    """

    classes: str | None
    cond: bool
    cond_image: bool
    keep_mask: bool
    required: tuple[str, ...]
    num_classes: int | None
    cond_dim: int | None
    cond_channels: int | None
    null_class: int | None
    draws_mask: bool

    @property
    def has_null(self) -> bool:
        """True if a condition can be left out."""
        return (self.classes is not None or self.cond) and (self.keep_mask or self.null_class is not None)


_SIZES = {"classes": "num_classes", "cond": "cond_dim", "cond_image": "cond_channels"}


def taken_by(network: Any) -> Takes:
    """What a network takes. torch.compile sees the attributes alone, which the networks of this package have."""
    network = _unwrapped(network)
    sizes = {size: getattr(network, size, None) for size in _SIZES.values()}
    keywords: tuple[str, ...] = CONDITIONS
    required: tuple[str, ...] = ()
    takes_any = False
    if torch.compiler.is_compiling():
        says_size = dict.fromkeys(_SIZES, True)
    else:
        forward = network.forward if isinstance(network, nn.Module) else network
        keywords, required, takes_any = _keywords(getattr(forward, "__func__", forward))
        says_size = {name: hasattr(network, size) for name, size in _SIZES.items()}
    by_class = "y" if "y" in keywords and "classes" not in keywords else "classes"
    words = {"classes": by_class, "cond": "cond", "cond_image": "cond_image"}
    taken = {
        name: (word in keywords or takes_any) and bool(sizes[_SIZES[name]]) if says_size[name] else word in keywords
        for name, word in words.items()
    }
    return Takes(
        by_class if taken["classes"] else None,
        taken["cond"],
        taken["cond_image"],
        "cond_keep_mask" in keywords or takes_any,
        tuple(name for name in taken if taken[name] and (says_size[name] or words[name] in required)),
        **sizes,
        null_class=getattr(network, "null_class", None),
        draws_mask="cond_drop_prob" in keywords,
    )


@lru_cache(maxsize=64)
def _keywords(forward: Callable) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Names of a function's arguments, of those without a default, and whether it takes any keyword."""
    parameters = list(inspect.signature(forward).parameters.values())
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = tuple(p.name for p in named if p.default is p.empty)
    return tuple(p.name for p in named), required, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _unwrapped(network: Any) -> Any:
    """The network in a wrapper of torch's, such as a compiled one."""
    while type(network).__module__.startswith("torch.") and isinstance(network, nn.Module):
        inner = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        if inner is None:
            break
        network = inner
    return network


@dataclass(frozen=True, eq=False)
class Conditions:
    """The conditions of a batch.

    Args:
        classes: (B,) integers.
        cond: (B, D) floating point.
        cond_image: (B, C', H, W) floating point, normalised.
        keep_mask: (B,) bool, False has the null condition; None keeps all.
    """

    classes: torch.Tensor | None = None
    cond: torch.Tensor | None = None
    cond_image: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None

    def __bool__(self) -> bool:
        return any(tensor is not None for tensor in self._named().values())

    def _named(self) -> dict[str, torch.Tensor | None]:
        return {"classes": self.classes, "cond": self.cond, "cond_image": self.cond_image}

    @property
    def batch_size(self) -> int | None:
        """B; None without conditions."""
        return next((tensor.shape[0] for tensor in self._named().values() if tensor is not None), None)

    def doubled(self) -> Conditions:
        """Those of the batch, kept, and then again, classes and vectors null."""
        twice = {name: None if t is None else torch.cat((t, t)) for name, t in self._named().items()}
        given = next(tensor for tensor in self._named().values() if tensor is not None)
        kept = (
            torch.ones(len(given), dtype=torch.bool, device=given.device) if self.keep_mask is None else self.keep_mask
        )
        return Conditions(**twice, keep_mask=torch.cat((kept, torch.zeros_like(kept))))

    def check(
        self,
        network: Any,
        *,
        batch_size: int,
        device: torch.device,
        size: Sequence[int] | None,
        others_read: bool = False,
    ) -> Conditions:
        """These conditions with classes in int64; raises unless they are those that the network takes.

        Args:
            size: (height, width) of the images; None is any.
            others_read: somebody else reads classes, so that a network that takes none is no fault.
        """
        takes = taken_by(network)
        kind = type(_unwrapped(network)).__name__
        taken = {"classes": takes.classes is not None, "cond": takes.cond, "cond_image": takes.cond_image}
        for name, given in self._named().items():
            if given is None and name in takes.required:
                raise ValueError(f"{name} must be given, since the network, a {kind}, takes {_TEXTS[name]}; got None")
            if given is not None and not taken[name] and not (others_read and name == "classes"):
                raise ValueError(f"{name} must be None, since the network, a {kind}, takes no {_TEXTS[name]}")
        for name, given in {**self._named(), "cond_keep_mask": self.keep_mask}.items():
            if given is not None:
                _check_tensor(name, given, batch_size, device)
        if self.classes is not None:
            _check_classes(self.classes, takes)
        if self.cond is not None:
            _check_vectors(self.cond, takes.cond_dim)
        if self.cond_image is not None:
            _check_condition_images(self.cond_image, takes.cond_channels, size)
        if self.keep_mask is not None:
            _check_mask(self.keep_mask, takes, kind)
        return self if self.classes is None else replace(self, classes=self.classes.long())

    def check_others(self, guide: Any, network: Any) -> Conditions:
        """These for a network that guides `network`; raises where it needs another condition, or is elsewhere."""
        names = [name for name in taken_by(guide).required if self._named()[name] is None]
        device = next((parameter.device for parameter in guide.parameters()), None)
        own = next((parameter.device for parameter in network.parameters()), None)
        if None not in (device, own) and device != own:
            raise ValueError(f"guidance's network must be on the diffusion's device {own}, got {device}")
        if names:
            raise ValueError(
                f"{names[0]} must be given, since guidance's network, a {type(guide).__name__}, takes "
                f"{_TEXTS[names[0]]}; got None"
            )
        return self

    def with_drawn_mask(self, network: Any, device: torch.device) -> Conditions:
        """These with a random keep_mask, as training wants it: each is dropped with the network's `cond_drop_prob`.

        It is a function of a seed that is drawn from torch's generator, as noise is.
        """
        rate = float(getattr(_unwrapped(network), "cond_drop_prob", 0.0) or 0.0)
        if self.keep_mask is not None or rate <= 0 or (self.classes is None and self.cond is None):
            return self
        if not taken_by(network).has_null:
            return self
        batch = self.batch_size
        assert batch is not None
        seed = noise_function.draw_seed(device)
        drawn = normal((batch,), seed=seed, stream=noise_function.STREAM_CONDITION, device=device)
        return replace(self, keep_mask=drawn >= _quantile(rate))

    def arguments(self, network: Any) -> dict[str, torch.Tensor]:
        """The keyword arguments of the network; those that it does not take are left out."""
        if not self:
            return {}
        takes = taken_by(network)
        classes, mask = self.classes, self.keep_mask
        if mask is not None and not takes.keep_mask and takes.null_class is not None and classes is not None:
            classes = torch.where(mask, classes, takes.null_class)
        given: dict[str, torch.Tensor] = {}
        if classes is not None and takes.classes is not None:
            given[takes.classes] = classes
        if self.cond is not None and takes.cond:
            given["cond"] = self.cond
        if takes.keep_mask and given:
            first = next(iter(given.values()))
            if mask is None and takes.draws_mask:
                mask = torch.ones(len(first), dtype=torch.bool, device=first.device)
            if mask is not None:
                given["cond_keep_mask"] = mask
        if self.cond_image is not None and takes.cond_image:
            given["cond_image"] = self.cond_image
        return given


_TEXTS = {"classes": "classes", "cond": "condition vectors", "cond_image": "condition images"}


def _quantile(rate: float) -> float:
    """Φ⁻¹(rate): a standard normal number is below it with that probability."""
    from statistics import NormalDist  # with decimal and fractions, which nothing else here imports

    return NormalDist().inv_cdf(rate) if rate < 1 else float("inf")


# As in runtime/autocast.py: dynamo cannot trace the C function, and the answer never changes.
_quantile._dynamo_marked_constant = True  # type: ignore[attr-defined]


def as_conditions(
    classes: Any = None, cond: Any = None, cond_image: Any = None, keep_mask: Any = None, *, device: torch.device
) -> Conditions:
    """Conditions from tensors, which stay where they are, and from sequences of numbers, which go to the device."""
    given = {"classes": classes, "cond": cond, "cond_image": cond_image, "cond_keep_mask": keep_mask}
    return Conditions(*(_as_tensor(name, value, device) for name, value in given.items()))


def _as_tensor(name: str, value: Any, device: torch.device) -> torch.Tensor | None:
    if value is None or isinstance(value, torch.Tensor):
        return value
    is_array = hasattr(value, "tolist") or (isinstance(value, Sequence) and not isinstance(value, str))
    if not is_array:
        raise TypeError(f"{name} must be a tensor or a sequence of numbers, got {shown(value)}")
    try:
        # Through a list: numbers of numpy's arrays become torch's default dtypes.
        return torch.tensor(value.tolist() if hasattr(value, "tolist") else value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or a sequence of numbers, got {shown(value)}") from error


def _check_tensor(name: str, given: torch.Tensor, batch_size: int, device: torch.device) -> None:
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
    if given.ndim == 0 or given.shape[0] != batch_size:
        raise ValueError(f"{name} must have one entry per image, {batch_size}, got shape {tuple(given.shape)}")
    if given.device != device:
        raise ValueError(f"{name} must be on the diffusion's device {device}, got {given.device}")


def check_classes(classes: torch.Tensor, network: Any) -> None:
    """Raise unless these are classes of a network."""
    _check_classes(classes, taken_by(network))


def _check_classes(classes: torch.Tensor, takes: Takes) -> None:
    if classes.dtype not in _INTEGERS:
        raise TypeError(f"classes must be a tensor of integers, got {classes.dtype}")
    if classes.ndim != 1:
        raise ValueError(f"classes must have shape (B,), one per image, got {tuple(classes.shape)}")
    count = takes.num_classes
    if count is None or takes.classes is None or not classes.numel() or not may_read(classes):
        return
    low, high = (bound.item() for bound in classes.aminmax())
    last = count if takes.keep_mask or takes.null_class == count else count - 1
    if low < 0 or high > last:
        null = f", {count} being no class" if last == count else ""
        raise ValueError(f"classes must be in [0, {last}]{null}, got values from {low} to {high}")


def _check_vectors(cond: torch.Tensor, width: int | None) -> None:
    if not cond.is_floating_point():
        raise TypeError(f"cond must be floating point, got {cond.dtype}")
    if width is not None and tuple(cond.shape[1:]) != (width,):
        raise ValueError(f"cond must have shape (B, {width}), got {tuple(cond.shape)}")


def _check_condition_images(images: torch.Tensor, channels: int | None, size: Sequence[int] | None) -> None:
    if not images.is_floating_point():
        raise TypeError(f"cond_image must be floating point in [0, 1] (divide 8-bit images by 255), got {images.dtype}")
    wanted = (channels or images.shape[1:2].numel(), *(images.shape[2:] if size is None else size))
    if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
        text = ", ".join(map(str, (channels or "C", *(("H", "W") if size is None else size))))
        raise ValueError(f"cond_image must have shape (B, {text}), got {tuple(images.shape)}")


def _check_mask(mask: torch.Tensor, takes: Takes, kind: str) -> None:
    if mask.dtype != torch.bool or mask.ndim != 1:
        raise ValueError(f"cond_keep_mask must be bool of shape (B,), got {mask.dtype} {tuple(mask.shape)}")
    if not takes.has_null:
        raise ValueError(f"cond_keep_mask must be None, since the network, a {kind}, has no null condition")
