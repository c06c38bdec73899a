"""A trainer's conditions: whether dataset and network agree on them, and what its samples are asked for."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ddpm_fast.training.items import Given, read_conditions


class Grid(NamedTuple):
    """The images of a milestone: how many, columns of the picture, and conditions (N, ...) by name."""

    size: int
    columns: int
    conditions: dict[str, torch.Tensor]


def check_agreement(given: Given, network: Any, makes_condition: bool) -> None:
    """Raise ValueError where a dataset gives other conditions than a network takes, as far as the network says it.

    makes_condition: the process itself makes `cond` and `cond_image`, as super-resolution does.
    """
    if hasattr(network, "num_classes"):  # a network that does not say it checks for itself
        count = network.num_classes
        if given.has_classes and not count:
            raise ValueError(
                "the dataset gives classes, and the network takes none: make it with num_classes=K, or train on the "
                "images alone"
            )
        if count and not given.has_classes:
            raise ValueError(
                f"the network has num_classes={count}, and the dataset gives no classes: labels= says those of a folder"
            )
        if given.class_names is not None and len(given.class_names) > count:
            raise ValueError(
                f"the dataset has {len(given.class_names)} classes, and the network has num_classes={count}"
            )
    for name, what, found in (
        ("cond_dim", "vectors of {} numbers", given.cond_dim),
        ("cond_channels", "condition images of {} channels", given.cond_channels),
    ):
        if makes_condition and found:
            raise ValueError(
                f"super_resolution makes its condition from the images, and the dataset gives {what.format(found)}"
            )
        taken = getattr(network, name, found) or 0
        if makes_condition or taken == found:
            continue
        gives = what.format(found) if found else f"no {what.split(' of')[0]}"
        raise ValueError(f"the dataset gives {gives}, and the network has {name}={taken}")


def plan_grid(dataset: Any, given: Given, num_classes: int | None, count: int, of_images: bool = False) -> Grid:
    """Up to `count` samples: a row for each class, the first ones if there are many, or conditions of the dataset.

    With vectors or images as conditions, or where the samples are `of_images` of the dataset, they are those of images
    that are evenly spaced in it.
    """
    if given.has_classes and not (given.cond_dim or given.cond_channels or of_images):
        known = len(given.class_names) if given.class_names is not None else num_classes
        if known:
            columns = count // known if 2 * known <= count else math.ceil(math.sqrt(count))
            rows = min(known, max(1, count // columns))
            return Grid(rows * columns, columns, {"classes": torch.arange(rows).repeat_interleave(columns)})
    conditions = read_conditions(dataset, spread(len(dataset), count), given)
    return Grid(count, math.ceil(math.sqrt(count)), conditions)


def spread(size: int, count: int, start: int = 0, end: int | None = None) -> list[int]:
    """Of `count` indices below `size` those from `start` to `end`; all are evenly spaced, as their classes are."""
    return [number * size // count for number in range(start, count if end is None else end)]
