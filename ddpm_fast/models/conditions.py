"""What a network is told besides the time: classes, vectors and images. Checks, and embeddings of classes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ddpm_fast.ops.registration import may_read


class GivenConditions(NamedTuple):
    """Conditions of a batch, as `Unet.forward` takes them; None where the network has no such condition."""

    classes: torch.Tensor | None = None
    cond: torch.Tensor | None = None
    cond_image: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None


def check_conditions(network: Any, x: torch.Tensor, given: GivenConditions) -> None:
    """One sentence for what does not fit a network with `num_classes`, `cond_dim` and `cond_channels`."""
    classes: Any
    classes, cond, cond_image, keep_mask = given
    B, _, H, W = x.shape
    num_classes, cond_dim, cond_channels = network.num_classes, network.cond_dim, network.cond_channels
    if _is_due("classes", classes, num_classes, "num_classes", f"{num_classes} itself means no class"):
        _check("classes", classes, (B,), "one class per image", x.device)
        if classes.dtype is not torch.int64:
            raise TypeError(f"classes must be int64, got {classes.dtype}")
        check_range(classes, num_classes)
    if _is_due("cond", cond, cond_dim, "cond_dim", "where cond_keep_mask is False it is not read"):
        _check("cond", cond, (B, cond_dim), "one vector per image", x.device)
        _check_floating("cond", cond)
    if _is_due("cond_image", cond_image, cond_channels, "cond_channels", "channels beside those of x"):
        _check("cond_image", cond_image, (B, cond_channels, H, W), "one image as large as x for each", x.device)
        _check_floating("cond_image", cond_image)
    if keep_mask is not None:
        if num_classes is None and cond_dim is None:
            raise ValueError("cond_keep_mask must be None, since this Unet has neither num_classes nor cond_dim")
        _check("cond_keep_mask", keep_mask, (B,), "whether to keep the conditions of an image", x.device)
        if keep_mask.dtype is not torch.bool:
            raise TypeError(f"cond_keep_mask must be bool, got {keep_mask.dtype}")


def check_range(classes: torch.Tensor, num_classes: int) -> None:
    """Refuse classes outside [0, num_classes], where the host may read them: on CUDA it would wait for the device."""
    if classes.numel() == 0 or not may_read(classes):
        return
    least, most = classes.aminmax()
    wrong = int(least) if least < 0 else int(most)
    if not 0 <= wrong <= num_classes:
        raise ValueError(f"classes must be in [0, {num_classes}], where {num_classes} means no class; got {wrong}")


def _is_due(name: str, given: object, setting: int | None, argument: str, hint: str) -> bool:
    """True where the network has a setting that needs this condition; an error where only one of both is there."""
    if not setting:
        if given is not None:
            raise ValueError(f"{name} must be None, since this Unet has no {argument} and would not read it")
        return False
    if given is None:
        raise ValueError(f"{name} must be given, since this Unet has {argument}={setting} ({hint})")
    return True


def _check(name: str, tensor: Any, shape: tuple[Any, ...], meaning: str, device: torch.device) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, {meaning}; got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on the Unet's device {device}, got {tensor.device}")


def _check_floating(name: str, tensor: Any) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def class_rows(given: GivenConditions, num_classes: int) -> torch.Tensor:
    """Rows of a table with num_classes + 2 rows: one per class, one for no class, one of NaN for what is no class.

    −1 is the last row, as anywhere in Python; no value is outside the table.
    """
    assert given.classes is not None
    rows = given.classes.clamp(-1, num_classes + 1)
    return rows if given.keep_mask is None else torch.where(given.keep_mask, rows, num_classes)


def embed_classes(embedding: nn.Module, null: torch.Tensor, given: GivenConditions, num_classes: int) -> torch.Tensor:
    """(B,) → (B, dim): the embedding of each class, `null` for no class, NaN for what is no class."""
    rows = class_rows(given, num_classes)
    embedded = embedding(rows.clamp(0, num_classes - 1))
    embedded = torch.where((rows == num_classes)[:, None], null, embedded)
    return embedded.masked_fill((rows != rows.clamp(0, num_classes))[:, None], float("nan"))


def embed_vectors(null: torch.Tensor, given: GivenConditions) -> torch.Tensor:
    """(B, cond_dim): the vectors, in the dtype of `null`, which replaces those that are not kept."""
    assert given.cond is not None
    vectors = given.cond.to(null.dtype)
    return vectors if given.keep_mask is None else torch.where(given.keep_mask[:, None], vectors, null)
