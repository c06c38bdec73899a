"""Datasets of images: a folder's, and handwritten digits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.utils.data

from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.runtime.plain import as_size
from ddpm_fast.training.image_folder import find_images
from ddpm_fast.training.images_in import DamagedImageError, read_image
from ddpm_fast.training.images_out import save_image_grid, save_trajectory_strip
from ddpm_fast.training.pixels import (
    Color,
    Pixels,
    check_color,
    check_mode,
    convert,
    crop_centre,
    mirror,
    resize_to_cover,
    to_tensor,
)
from ddpm_fast.training.value_range import check_value_range, default_range, find_value_range, has_deep_images, to_unit

with needed_for("reading and writing images"):
    import numpy as np
    from PIL import Image

__all__ = ["IMAGE_ENDINGS", "Dataset", "DigitsDataset", "save_image_grid", "save_trajectory_strip"]

# Upstream's four first.
IMAGE_ENDINGS = ["jpg", "jpeg", "png", "tiff", "tif", "bmp", "webp", "jfif", "avif", "npy"]


class Dataset(torch.utils.data.Dataset):
    """Images of a folder, its subfolders and linked folders as tensors (C, h, w), float32 in [0, 1] or uint8.

    image_size: an int or (h, w). An image is resized until it just covers that, keeping its aspect ratio, and cropped
        at the centre.
    exts: endings of the files that are images, upper or lower case; one warning counts the others.
    convert_image_to: a mode of Pillow, such as "L", "RGB" or "RGBA"; None leaves each image its channels.
    value_range: (low, high) that becomes [0, 1] in images of more than 8 bits and of floats. None finds it in a sample
        of the files (`find_value_range`) and says it in one warning. Images of 8 bits are 0..255 always.
    background: a colour's name or (red, green, blue) in 0..255, which shows through where `convert_image_to` has no
        transparency and an image has.
    dtype: torch.float32, or torch.uint8 for the bytes themselves, of which float32 is 1/255. None gives bytes, and
        float32 of what has none: images of more than 8 bits, and arrays that are resized as floats; where a sample of
        the files finds some, all are float32.

    `.npy` files are arrays (h, w), (h, w, C) or (C, h, w) of integers, floats or booleans. EXIF orientation is applied.
    A JPEG far larger than `image_size` is decoded at a reduced scale, three times as large or more. A broken file
    is named in one warning and the next readable file replaces it; `broken_files` lists those met so far, by the
    workers of a DataLoader as well.

    Raises FileNotFoundError, NotADirectoryError, PermissionError or ValueError for a folder without usable images, or
    without bytes where dtype asks for them, and ValueError or TypeError for other unusable arguments.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        image_size: int | tuple[int, int],
        exts: Sequence[str] = IMAGE_ENDINGS,
        augment_horizontal_flip: bool = False,
        convert_image_to: str | None = None,
        *,
        value_range: Sequence[float] | None = None,
        background: Color = "white",
        dtype: torch.dtype | None = torch.float32,
    ):
        super().__init__()
        if dtype not in (torch.float32, torch.uint8, None):
            raise ValueError(f"dtype must be torch.float32, torch.uint8 or None; got {dtype!r}")
        self.folder = folder
        self.dtype = dtype
        self.image_size = image_size
        self.augment_horizontal_flip = augment_horizontal_flip
        self.convert_image_to = check_mode(convert_image_to)
        self.background = check_color(background)
        self.target_size = as_size("image_size", image_size)
        self.is_value_range_given = value_range is not None
        self.value_range = None if value_range is None else check_value_range(value_range)
        self.paths = find_images(folder, exts)
        if not self.is_value_range_given:
            self.value_range = find_value_range(self.paths)
            if dtype == torch.uint8 and self.value_range is not None:
                raise ValueError(f"folder {folder} holds images of more than 8 bits or of floats, which are no uint8")
            self._say_value_range()
        elif not has_deep_images(self.paths):
            warnings.warn(
                f"value_range is for images of more than 8 bits and of floats; folder {folder} seems to hold none",
                stacklevel=2,
            )

    @property
    def paths(self) -> Sequence[Path]:
        """The files' paths, sorted; another sequence of paths may be assigned."""
        return self._paths

    @paths.setter
    def paths(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        # Shared memory, so that what a worker process finds is known to all.
        self._is_broken = torch.zeros(len(paths), dtype=torch.bool).share_memory_()
        self._is_clipping_said = torch.zeros(1, dtype=torch.bool).share_memory_()

    @property
    def broken_files(self) -> list[Path]:
        """Paths that could not be read so far, in the order of `paths`."""
        return [self.paths[index] for index in self._is_broken.nonzero().flatten().tolist()]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Image `index`, or the next readable one, as a tensor (C, h, w) of `dtype`; ValueError if there is none."""
        index = range(len(self))[index]
        while (candidate := self._next_unbroken(index)) is not None:
            image = self.read(candidate)
            if image is not None:
                return image
        raise ValueError(f"folder {self.folder} holds {len(self)} image files, and none of them could be read")

    def read(self, index: int) -> torch.Tensor | None:
        """Image `index`, or None where its file is broken; ValueError for one without bytes if dtype is uint8."""
        pixels = self._read(index)
        if pixels is None:
            return None
        image = self.transform(pixels)
        if self.dtype == torch.uint8 and image.dtype != torch.uint8:
            raise ValueError(
                f"{self.paths[index]} has more than 8 bits per channel, floats, or as an array other than 1 or 3 "
                "channels, and dtype is torch.uint8"
            )
        return image

    def transform(self, image: Pixels) -> torch.Tensor:
        """Pillow image of 8 bits per channel, or float array (h, w, C) in [0, 1], as a tensor (C, h, w)."""
        image = convert(image, self.convert_image_to, self.background)
        image = resize_to_cover(image, self.target_size)
        if self.augment_horizontal_flip and torch.rand(()) < 0.5:
            image = mirror(image)
        pixels = to_tensor(crop_centre(image, self.target_size))
        gives_bytes = self.dtype == torch.uint8 or (self.dtype is None and self.value_range is None)
        return pixels if gives_bytes or pixels.is_floating_point() else pixels.to(torch.float32).div(255)

    def keep_value_range(self, value_range: Sequence[float] | None) -> None:
        """Take the range that the checkpoint of a run recorded in place of a found one; a given one stays."""
        if value_range is None or self.value_range == tuple(value_range):
            return
        recorded = check_value_range(value_range)
        if self.is_value_range_given:
            warnings.warn(
                f"the run began with value_range={recorded}, and goes on with {self.value_range}", stacklevel=3
            )
        else:
            warnings.warn(f"value_range is {recorded}, as where the run began, not {self.value_range}", stacklevel=3)
            self.value_range = recorded

    def _next_unbroken(self, index: int) -> int | None:
        """The first index from `index` on, around the end, whose file is not known to be broken."""
        is_broken = self._is_broken.numpy()
        if not is_broken[index]:
            return index
        for start, end in ((index, len(is_broken)), (0, index)):
            offset = int(is_broken[start:end].argmin()) if end > start else 0
            if end > start and not is_broken[start + offset]:
                return start + offset
        return None

    def _read(self, index: int) -> Pixels | None:
        """The decoded image, or None after marking the file as broken."""
        path = self.paths[index]
        try:
            image = read_image(path, self.target_size)
        except DamagedImageError as error:
            self._is_broken[index] = True
            warnings.warn(f"skipped a broken image file: {path} ({error})", stacklevel=4)
            return None
        if isinstance(image, Image.Image):
            return image
        self._warn_if_clipped(image, path)
        return to_unit(image, self.value_range)

    def _say_value_range(self) -> None:
        if self.value_range is not None:
            low, high = self.value_range
            warnings.warn(
                f"folder {self.folder} holds images of more than 8 bits or of floats: values from {low} to {high} "
                "become [0, 1]; value_range=(low, high) chooses others",
                stacklevel=3,
            )

    def _warn_if_clipped(self, image: np.ndarray, path: Path) -> None:
        """Say once that a found range does not hold an image outside of the sample."""
        if self.is_value_range_given or image.dtype == np.uint8 or self._is_clipping_said:
            return
        low, high = self.value_range or default_range(image)
        least, largest = image.min().item(), image.max().item()
        if self.value_range is None or least < low or largest > high:
            self._is_clipping_said[0] = True
            warnings.warn(
                f"{path} has values from {least} to {largest}, and files looked at before had none beyond "
                f"[{low}, {high}], which becomes [0, 1]; give value_range=(low, high)",
                stacklevel=5,
            )


class DigitsDataset(torch.utils.data.Dataset):
    """scikit-learn's 1,797 real handwritten digits as float32 (1, h, w) in [0, 1]; `labels` is int64 (1797,)."""

    def __init__(self, image_size: int | tuple[int, int] = 8):
        super().__init__()
        with needed_for("DigitsDataset"):
            from sklearn.datasets import load_digits

        digits = load_digits()
        self.image_size = image_size
        images = torch.from_numpy(digits.images).float() / 16  # (N, 8, 8)
        height, width = as_size("image_size", image_size)
        if (height, width) != (8, 8):
            images = torch.stack([_resize_float(image, (height, width)) for image in images])
        self.images = images.unsqueeze(1)  # (N, 1, h, w)
        self.labels = torch.from_numpy(digits.target).long()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[torch.Tensor]:
        """A whole batch at once: the DataLoader prefers this to one call per image."""
        return self.images[torch.as_tensor(indices)].unbind()


def _resize_float(image: torch.Tensor, target_size: tuple[int, int]) -> torch.Tensor:
    """Float image (h, w) in [0, 1] resized with Pillow's bicubic filter."""
    height, width = target_size
    resized = Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.float32).view(height, width)
    return pixels.clamp(0, 1)
