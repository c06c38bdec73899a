"""A dataset's items, an image with or without conditions, and how they become a batch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate

from ddpm_fast.diffusion.images import as_floats

# The conditions of an image, by the names under which a process takes them.
CONDITIONS = ("classes", "cond", "cond_image")

# Items of a user's dataset that are read ahead, and how far resizing and rounding may lead out of a range.
_CHECKED_IMAGES = 8
_OVERSHOOT = 0.05


class Items(NamedTuple):
    """Items as one batch: images (B, C, h, w), uint8 or float32, and conditions by name.

    classes: (B,) int64.
    cond: (B, D) float32.
    cond_image: (B, C', h, w), uint8 or float32.
    """

    images: torch.Tensor
    conditions: dict[str, torch.Tensor]


class Given(NamedTuple):
    """What a dataset gives of each image: whether classes, how many numbers, how many channels; 0 for none.

    class_names: of the dataset, where it has some.
    """

    has_classes: bool = False
    cond_dim: int = 0
    cond_channels: int = 0
    class_names: tuple[str, ...] | None = None

    @property
    def is_conditional(self) -> bool:
        return self.has_classes or self.cond_dim > 0 or self.cond_channels > 0


class Unbound(list[Any]):
    """The items of a batch (B, C, h, w) with conditions (B, ...), which `collate` takes as they are."""

    def __init__(self, batch: torch.Tensor, conditions: Mapping[str, torch.Tensor] | None = None):
        self.batch = batch
        self.conditions = dict(conditions or {})
        images = batch.unbind()
        if self.conditions:
            values = [tensor.unbind() for tensor in self.conditions.values()]
            items = zip(images, *values, strict=True)
            super().__init__(dict(zip(("image", *self.conditions), item, strict=True)) for item in items)
        else:
            super().__init__(images)


def split_item(item: Any) -> tuple[Any, dict[str, Any]]:
    """(image, conditions by name) of an image, a dictionary, or a pair (image, label) as torchvision's ImageFolder has.

    Raises:
        TypeError: a dictionary without "image" or with other keys.
    """
    if isinstance(item, Mapping):
        unknown = [str(name) for name in item if name not in ("image", *CONDITIONS)]
        if "image" not in item or unknown:
            raise TypeError(
                f'folder must give dictionaries of "image" and {", ".join(CONDITIONS)}; its item has the keys '
                f"{', '.join(map(str, item))}"
            )
        return item["image"], {name: item[name] for name in CONDITIONS if name in item}
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], {"classes": item[1]}
    return item, {}


def collate(items: list[Any]) -> torch.Tensor:
    """The images of items as one batch (B, C, h, w): uint8 if all are, else float32, to which bytes are 1/255."""
    if isinstance(items, Unbound):
        return _as_batch(items.batch)
    return _stacked([split_item(item)[0] for item in items])


def collate_items(items: list[Any]) -> Items:
    """Items as one batch with their conditions; ValueError where one lacks a condition that another has."""
    if isinstance(items, Unbound):
        return Items(_as_batch(items.batch), items.conditions)
    pairs = [split_item(item) for item in items]
    names = pairs[0][1].keys()
    for _, conditions in pairs:
        if conditions.keys() != names:
            raise ValueError(
                f"folder must give the same conditions with each image; it gives {_shown(names)} with one and "
                f"{_shown(conditions)} with another"
            )
    columns = {name: [conditions[name] for _, conditions in pairs] for name in names}
    return Items(_stacked([image for image, _ in pairs]), {n: _collated(n, values) for n, values in columns.items()})


def conditions_at(
    indices: Sequence[int], classes: torch.Tensor | None = None, cond: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Rows of classes (N,) and vectors (N, D), of those that there are."""
    rows = torch.as_tensor(indices, dtype=torch.int64)
    columns = {"classes": classes, "cond": cond}
    return {name: values[rows] for name, values in columns.items() if values is not None}


def read_conditions(dataset: Any, indices: Sequence[int], given: Given) -> dict[str, torch.Tensor]:
    """The conditions of these items, of a dataset that gives them; only images as conditions need their files."""
    if not given.is_conditional:
        return {}
    if given.cond_channels == 0 and hasattr(dataset, "conditions_at"):
        return dataset.conditions_at(indices)
    conditions = collate_items([dataset[index] for index in indices]).conditions
    return {name: as_floats(value) if name == "cond_image" else value for name, value in conditions.items()}


def names_of_classes(dataset: Any) -> tuple[str, ...] | None:
    """The names of a dataset's classes: its `class_names`, or `classes` of text as torchvision's have; else None."""
    for name in ("class_names", "classes"):
        names = getattr(dataset, name, None)
        if isinstance(names, (list, tuple)) and names and all(isinstance(one, str) for one in names):
            return tuple(names)
    return None


def check_items(dataset: Any, shape: tuple[int, ...], value_range: tuple[float, float] | None) -> Given:
    """Read a few items of a dataset; the image of each must be a tensor of `shape` (C, h, w), floating point or uint8.

    Floats plainly outside of `value_range` get one warning that names those found; None looks at the first item only.
    Returns what the items give besides images.

    Raises:
        TypeError, ValueError: the dataset has no images, or other items.
    """
    if len(dataset) == 0:
        raise ValueError("folder is a dataset without images")
    count = 1 if value_range is None else min(_CHECKED_IMAGES, len(dataset))
    given_items = [dataset[index * (len(dataset) - 1) // max(count - 1, 1)] for index in range(count)]
    items = [split_item(item) for item in given_items]
    images = [image for image, _ in items]
    for which, image, item in zip(["first item", *["item"] * count], images, given_items, strict=False):
        if not isinstance(image, torch.Tensor):
            raise TypeError(f"folder must give image tensors; its {which} is a {type(item).__name__}")
        is_number = image.is_floating_point() or image.dtype == torch.uint8
        if not is_number or tuple(image.shape) != shape:
            raise ValueError(
                f"folder must give images of shape {shape}, floats in [0, 1] or uint8 in 0..255; its "
                f"{which.removesuffix(' item')} is {image.dtype} {tuple(image.shape)}"
            )
    given = _check_conditions(dataset, items[0][1], shape)
    images = [image for image in images if image.is_floating_point()]
    if value_range is None or not images:
        return given
    least, largest = min(image.min().item() for image in images), max(image.max().item() for image in images)
    low, high = value_range
    if least < low - _OVERSHOOT or largest > high + _OVERSHOOT:
        warnings.warn(
            f"folder gives images with values from {least:.4g} to {largest:.4g}, and the diffusion expects them in "
            f"[{low}, {high}]: scale them in the dataset",
            stacklevel=3,
        )
    return given


def _check_conditions(dataset: Any, conditions: dict[str, Any], shape: tuple[int, ...]) -> Given:
    """What the first item gives besides the image."""
    tensors = {name: _collated(name, [value])[0] for name, value in conditions.items()}
    image = tensors.get("cond_image")
    if image is not None and (image.ndim != 3 or tuple(image.shape[1:]) != shape[1:]):
        raise ValueError(
            f"folder must give cond_image of shape (C, {shape[1]}, {shape[2]}), as high and wide as its images; its "
            f"first is {tuple(image.shape)}"
        )
    return Given(
        "classes" in tensors,
        len(tensors["cond"]) if "cond" in tensors else 0,
        0 if image is None else len(image),
        names_of_classes(dataset) if "classes" in tensors else None,
    )


def _collated(name: str, values: list[Any]) -> torch.Tensor:
    """Values of one condition as a batch."""
    if name == "cond_image":
        if not all(isinstance(value, torch.Tensor) for value in values):
            raise TypeError(f"folder must give cond_image as tensors (C, h, w); got a {type(values[0]).__name__}")
        return _stacked(values)
    if name == "cond":
        return torch.stack([torch.as_tensor(value, dtype=torch.float32).reshape(-1) for value in values])
    if isinstance(values[0], str):
        raise TypeError(f"folder must give classes as integers, one for each image; got {values[0]!r}")
    classes = torch.stack([torch.as_tensor(value) for value in values])
    if classes.ndim != 1 or classes.is_floating_point() or classes.dtype == torch.bool:
        raise TypeError(f"folder must give classes as integers, one for each image; got {values[0]!r}")
    return classes.to(torch.int64)


def _stacked(images: list[torch.Tensor]) -> torch.Tensor:
    """Images (C, h, w) as one batch: uint8 if all are, else float32, to which bytes are 1/255."""
    shapes = [tuple(image.shape) for image in images]
    other = next((shape for shape in shapes if shape != shapes[0]), None)
    if other is not None:
        raise ValueError(f"folder must give images of one shape; it gives {shapes[0]} and {other}")
    if len({image.dtype for image in images}) != 1:
        images = [as_floats(image).float() for image in images]
    return _as_batch(default_collate(images))


def _as_batch(images: torch.Tensor) -> torch.Tensor:
    return images if images.dtype == torch.uint8 else images.to(torch.float32)


def _shown(names: Mapping[str, Any] | Any) -> str:
    return ", ".join(names) or "none"
