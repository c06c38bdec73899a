"""Images out: grids of samples and strips of trajectories, as files of the kind that the name's ending says."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import torch

from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.training.atomic_files import write_atomically

with needed_for("reading and writing images"):
    import numpy as np
    from PIL import Image


# Channels that are one picture, and the mode of Pillow that holds it; grey is written as RGB, as torchvision does.
_MODES = {1: "RGB", 3: "RGB", 4: "RGBA"}
_MOST_PIXELS = 2**31  # of a picture
_QUALITY = {"JPEG": {"quality": 95}, "WEBP": {"quality": 95}, "AVIF": {"quality": 95}}


def save_image_grid(
    images: torch.Tensor, path: str | os.PathLike, nrow: int = 8, padding: int = 2, scale: int = 1
) -> None:
    """Write images (N, C, h, w), floating point in [0, 1], as one picture; each pixel becomes `scale` × `scale`.

    1, 3 or 4 channels are grey, RGB or RGBA, and there are `nrow` images to a row. Of other channels each is a grey
    tile, a row of them per image, and float32 (N, C, h, w) goes to `array_beside(path)`, too.
    The ending of `path` says the kind of file. Values outside [0, 1] are clipped, as in torchvision.

    Raises:
        ValueError: another shape, values that are not finite, or an ending that cannot be written.
    """
    images = torch.as_tensor(images).detach().float().cpu()
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be (N, C, h, w) with no size 0; got shape {tuple(images.shape)}")
    if not images.isfinite().all():
        raise ValueError("images hold values that are not finite (NaN or infinity)")
    kind = check_grid(path, tuple(images.shape), nrow, padding, scale)
    channels = images.shape[1]
    if channels not in _MODES:
        with write_atomically(array_beside(path)) as file:
            file.write(_as_npy(images.numpy()))
        nrow, images = channels, images.flatten(0, 1)[:, None]
    images = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    grid = images[0] if len(images) == 1 else _arrange(images, nrow, padding)
    pixels = grid.mul(255).add(0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    with write_atomically(path) as file:
        file.write(_encode(Image.fromarray(pixels.numpy()), kind))


def array_beside(path: str | os.PathLike) -> Path:
    """Where `save_image_grid` puts the values of images whose channels are no picture: the same name with .npy."""
    return Path(path).with_suffix(".npy")


def check_ending(path: str | os.PathLike) -> str:
    """Pillow's name of the kind of file that a path's ending asks for; ValueError if Pillow cannot write it."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind is None or kind not in Image.SAVE:
        ending = Path(path).suffix
        wrong = f"ends in {ending!r}, which Pillow cannot write" if ending else "has no ending"
        raise ValueError(f"{path} {wrong}; a picture's name ends in such as .png, .jpg or .webp")
    return kind


def check_grid(path: str | os.PathLike, shape: tuple[int, ...], nrow: int = 8, padding: int = 2, scale: int = 1) -> str:
    """Pillow's name of the kind of file that `path` asks for, if it can hold a grid of images of `shape` (N, C, h, w).

    Raises:
        ValueError: it cannot. JPEG holds no transparency, and at most 65,500 pixels along a side; no picture may have
            more than 2,147,483,648 pixels.
    """
    kind = check_ending(path)
    count, channels, height, width = shape
    if channels not in _MODES:
        count, nrow = count * channels, channels
    rows, columns = -(-count // min(nrow, count)), min(nrow, count)
    gap = padding if count > 1 else 0
    size = columns * (width * scale + gap) + gap, rows * (height * scale + gap) + gap
    if size[0] * size[1] > _MOST_PIXELS:
        raise ValueError(f"{path} cannot hold a picture of {size[0]} x {size[1]} pixels; the most are {_MOST_PIXELS:,}")
    for sides in ((size[0], 1), (1, size[1])):  # a stripe meets the same limits and costs nothing
        try:
            _encode(Image.new(_MODES.get(channels, "RGB"), sides), kind)
        except (OSError, ValueError, struct.error) as error:
            raise ValueError(
                f"{path} cannot hold a picture of {size[0]} x {size[1]} pixels and {channels} channels: {error}"
            ) from error
    return kind


def save_trajectory_strip(
    trajectories: torch.Tensor, path: str | os.PathLike, num_frames: int = 10, padding: int = 2, scale: int = 1
) -> None:
    """Write the denoising of a few samples as one picture: a row per sample, noise on the left, result on the right.

    trajectories: (N, T, C, h, w), floating point in [0, 1], as `sample(return_all_timesteps=True)` returns it. Shows
    `num_frames` evenly spaced of the T frames, first and last included; of 2 or more than 4 channels each has a row.

    Raises:
        ValueError: as `save_image_grid`.
    """
    num_frames = min(num_frames, trajectories.shape[1])
    frames = torch.linspace(0, trajectories.shape[1] - 1, num_frames).round().long()
    shown = trajectories[:, frames.to(trajectories.device)]  # (N, num_frames, C, h, w)
    if shown.shape[2] not in _MODES:
        shown = shown.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (N·C, num_frames, 1, h, w)
    save_image_grid(shown.flatten(0, 1), path, nrow=num_frames, padding=padding, scale=scale)


def _arrange(images: torch.Tensor, nrow: int, padding: int) -> torch.Tensor:
    """(N, C, h, w) tiled to (C, H, W) on black, `padding` pixels around and between the images."""
    count, channels, height, width = images.shape
    columns = min(nrow, count)
    rows = -(-count // columns)
    step_y, step_x = height + padding, width + padding
    grid = images.new_zeros(channels, rows * step_y + padding, columns * step_x + padding)
    for index, image in enumerate(images):
        top, left = index // columns * step_y + padding, index % columns * step_x + padding
        grid[:, top : top + height, left : left + width] = image
    return grid


def _encode(image: Image.Image, kind: str) -> bytes:
    """The picture as a file of this kind, in memory: some of Pillow's writers go back and forth in their file."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **_QUALITY.get(kind, {}))
    return buffer.getvalue()


def _as_npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()
