"""Images of a process: their ranges, bytes and mirrored ones, and checks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ddpm_fast.ops.registration import may_read


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


def check_size_known(image_size: object) -> None:
    """Raise ValueError for a process whose checkpoint does not say the size of its images."""
    if image_size is None:
        raise ValueError(
            "image_size is not known, since the loaded checkpoint does not record it: set "
            "diffusion.image_size = (height, width), or pass image_size= to load_checkpoint"
        )


def check_images(
    name: str,
    img: torch.Tensor,
    *,
    channels: int,
    size: Sequence[int] | None,
    device: torch.device,
    bytes_too: bool = False,
) -> None:
    """Raise unless these are images of a process.

    Args:
        size: (height, width); None is any.
        bytes_too: uint8 images are some, too.
    """
    if not isinstance(img, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(img).__name__}")
    is_bytes = bytes_too and img.dtype == torch.uint8
    if bytes_too and not is_bytes and not img.is_floating_point():
        raise TypeError(f"{name} must be floating point in [0, 1] or uint8 in 0..255, got {img.dtype}")
    if not is_bytes and not img.is_floating_point():
        raise TypeError(f"{name} must be floating point in [0, 1] (divide 8-bit images by 255), got {img.dtype}")
    expected = (channels, *(img.shape[2:] if size is None else size))
    if img.ndim != 4 or tuple(img.shape[1:]) != expected:
        shown = ", ".join(map(str, (channels, *(("H", "W") if size is None else size))))
        raise ValueError(f"{name} must have shape (B, {shown}), got {tuple(img.shape)}")
    if img.device != device:
        raise ValueError(f"{name} must be on the diffusion's device {device}, got {img.device}")
    if is_bytes:
        return
    # One pass that stores nothing: a sum is finite only of finite numbers, though it may overflow.
    if may_read(img) and not math.isfinite(img.detach().sum()):
        bad = (~torch.isfinite(img)).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{name} must be finite, got NaN or infinity in images {bad[:10]} of the batch")


def check_mean(images: torch.Tensor, loss_reduction: str) -> None:
    """Raise ValueError for a mean over no images, which would be NaN."""
    if loss_reduction == "mean" and images.shape[0] == 0:
        raise ValueError(f"images must hold at least one image for a mean loss, got {tuple(images.shape)}")


def check_flip(flip: torch.Tensor, img: torch.Tensor) -> None:
    """Raise unless `flip` says of each image whether it is to be mirrored."""
    if not isinstance(flip, torch.Tensor):
        raise TypeError(f"flip must be a tensor, got {type(flip).__name__}")
    if flip.dtype not in (torch.bool, torch.uint8) or flip.shape != img.shape[:1]:
        raise ValueError(
            f"flip must be bool or uint8 of shape ({img.shape[0]},), one per image, "
            f"got {flip.dtype} {tuple(flip.shape)}"
        )
    if flip.device != img.device:
        raise ValueError(f"flip must be on the device of img, {img.device}, got {flip.device}")
