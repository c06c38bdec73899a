"""Datasets of images: a folder's, and handwritten digits."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils.data

from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.runtime.plain import as_size
from ddpm_fast.training.image_folder import find_images
from ddpm_fast.training.images_in import DamagedImageError, read_image
from ddpm_fast.training.images_out import save_image_grid, save_trajectory_strip
from ddpm_fast.training.items import Unbound, conditions_at
from ddpm_fast.training.labels import METADATA_NAMES, find_partners, read_labels, tables_of
from ddpm_fast.training.pixels import (
    Color,
    Pixels,
    check_color,
    check_mode,
    convert,
    covering_size,
    crop_centre,
    mirror,
    resize,
    size_of,
    to_tensor,
)
from ddpm_fast.training.value_range import check_value_range, default_range, find_value_range, has_deep_images, to_unit

with needed_for("reading and writing images"):
    import numpy as np
    from PIL import Image

__all__ = ["IMAGE_ENDINGS", "Dataset", "DigitsDataset", "save_image_grid", "save_trajectory_strip"]

# Upstream's four first.
IMAGE_ENDINGS = ["jpg", "jpeg", "png", "tiff", "tif", "bmp", "webp", "jfif", "avif", "npy"]

# How far the aspect ratios of a pair may differ: rounded sizes of small pictures do.
_MAX_ASPECT_DIFFERENCE = 0.02


class Dataset(torch.utils.data.Dataset):
    """Images of a folder, its subfolders and linked folders as tensors (C, h, w), float32 in [0, 1] or uint8.

    Args:
        folder: of the images.
        image_size: an int or (h, w). An image is resized until it just covers that, keeping its aspect ratio, and
            cropped at the centre.
        exts: endings of the files that are images, upper or lower case; one warning counts the others.
        augment_horizontal_flip: mirror half of the images left to right, at random.
        convert_image_to: a mode of Pillow, such as "L", "RGB" or "RGBA"; None leaves each image its channels.
        value_range: (low, high) that becomes [0, 1] in images of more than 8 bits and of floats. None finds it in a
            sample of the files (`find_value_range`) and says it in one warning. Images of 8 bits are 0..255 always.
        background: a colour's name or (red, green, blue) in 0..255, which shows through where `convert_image_to` has no
            transparency and an image has.
        dtype: torch.float32, or torch.uint8 for the bytes themselves, of which float32 is 1/255. None gives bytes, and
            float32 of what has none: images of more than 8 bits, and arrays that are resized as floats; where a sample
            of the files finds some, all are float32.
        labels: what says the class of an image. "folders": the first level of subfolders; "metadata": metadata.csv or
            metadata.jsonl, one or several, as Hugging Face's imagefolder has them: the column `file_name` is relative
            to the table's folder; the path of a .csv or .jsonl file of such rows, whose names are relative to `folder`.
        label_column: of a table ("label"), text or integers. Text is sorted, integers by value; equal ones are a class.
        cond_columns: columns of numbers that are an image's vector, as they are: nothing is standardised. Without a
            table in `labels` they are of the metadata.
        cond_folder: holds an image for each, of the same relative name (the ending may differ), which is resized,
            cropped and mirrored together with it.
        convert_cond_image_to: as `convert_image_to`, of these.

    With labels, columns or a second folder an item is a dictionary of "image", "classes" (an int), "cond" (D,) float32
    and "cond_image" (C', h, w), of those that there are; `class_names`, `classes` and `cond` hold them for all images.

    `.npy` files are arrays (h, w), (h, w, C) or (C, h, w) of integers, floats or booleans. EXIF orientation is applied.
    A JPEG far larger than `image_size` is decoded at a reduced scale, three times as large or more. A broken file
    is named in one warning and the next readable file replaces it; `broken_files` lists those met so far, by the
    workers of a DataLoader as well.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: the folder cannot be read.
        ValueError: the folder has no usable images, or none of bytes where dtype asks for them; a label is missing,
            twice there or of no image, with file and line.
        TypeError, ValueError: another argument does not fit, named in one sentence.
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
        labels: str | os.PathLike | None = None,
        label_column: str | None = None,
        cond_columns: Sequence[str] = (),
        cond_folder: str | os.PathLike | None = None,
        convert_cond_image_to: str | None = None,
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
        wants_labels = labels is not None or len(cond_columns) > 0
        paths = find_images(folder, exts, tables_of(labels) if wants_labels else ())
        self.paths = paths
        arguments: dict[str, Any] = {"labels": labels, "label_column": label_column, "cond_folder": cond_folder}
        arguments["cond_columns"] = cond_columns or None
        # What a checkpoint records, so that a run is continued with the same conditions.
        self.label_arguments = {name: value for name, value in arguments.items() if value is not None}
        self.class_names, classes, cond = read_labels(paths, labels, label_column, cond_columns)
        self.classes = None if classes is None else torch.from_numpy(classes)  # (N,) int64
        self.cond = None if cond is None else torch.from_numpy(cond)  # (N, D)
        self.cond_folder = cond_folder
        self.convert_cond_image_to = check_mode(convert_cond_image_to)
        self._partners = (
            None if cond_folder is None else find_partners(paths, find_images(cond_folder, exts, METADATA_NAMES))
        )
        self._partners_range = None if self._partners is None else find_value_range(self._partners)
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
        """The files' paths, sorted; another sequence of paths may be assigned where there are no conditions."""
        return self._paths

    @paths.setter
    def paths(self, paths: Sequence[Path]) -> None:
        if any(getattr(self, name, None) is not None for name in ("classes", "cond", "_partners")):
            raise ValueError("paths cannot be replaced in a dataset with labels, cond_columns or cond_folder")
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

    def __getitem__(self, index: int) -> torch.Tensor | dict[str, Any]:
        """Image `index`, or the next readable one, as a tensor (C, h, w) of `dtype`; ValueError if there is none.

        With conditions it is the "image" of a dictionary.
        """
        index = range(len(self))[operator.index(index)]
        while (candidate := self._next_unbroken(index)) is not None:
            item = self._read_item(candidate)
            if item is not None:
                return item
        raise ValueError(f"folder {self.folder} holds {len(self)} image files, and none of them could be read")

    def conditions_at(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Classes (n,) and vectors (n, D) of images, which are not read."""
        return conditions_at(indices, self.classes, self.cond)

    def read(self, index: int) -> torch.Tensor | None:
        """Image `index`, or None where its file is broken; ValueError for one without bytes if dtype is uint8."""
        pixels = self._read(index)
        return None if pixels is None else self._checked(self.transform(pixels), index)

    def transform(self, image: Pixels) -> torch.Tensor:
        """Pillow image of 8 bits per channel, or float array (h, w, C) in [0, 1], as a tensor (C, h, w)."""
        image = convert(image, self.convert_image_to, self.background)
        size = covering_size(size_of(image), self.target_size)
        return self._to_tensor(image, size, self._draw_mirror(), self.value_range is None)

    def _read_item(self, index: int) -> torch.Tensor | dict[str, Any] | None:
        """Image `index` with its conditions; None where a file is broken."""
        pixels = self._read(index)
        if pixels is None or (self._partners is None and self.classes is None and self.cond is None):
            return None if pixels is None else self._checked(self.transform(pixels), index)
        item: dict[str, Any] = {}
        if self._partners is None:
            item["image"] = self._checked(self.transform(pixels), index)
        else:
            partner = self._read_partner(index, pixels)
            if partner is None:
                return None
            pixels = convert(pixels, self.convert_image_to, self.background)
            partner = convert(partner, self.convert_cond_image_to, self.background)
            size, is_mirrored = covering_size(size_of(pixels), self.target_size), self._draw_mirror()
            item["image"] = self._checked(self._to_tensor(pixels, size, is_mirrored, self.value_range is None), index)
            item["cond_image"] = self._to_tensor(partner, size, is_mirrored, self._partners_range is None)
        if self.classes is not None:
            item["classes"] = int(self.classes[index])
        if self.cond is not None:
            item["cond"] = self.cond[index]
        return item

    def _draw_mirror(self) -> bool:
        return bool(self.augment_horizontal_flip and torch.rand(()) < 0.5)

    def _to_tensor(self, image: Pixels, size: tuple[int, int], is_mirrored: bool, has_bytes: bool) -> torch.Tensor:
        """Converted pixels resized to `size`, mirrored, and cropped; uint8 where they have bytes and dtype allows."""
        image = resize(image, size)
        if is_mirrored:
            image = mirror(image)
        pixels = to_tensor(crop_centre(image, self.target_size))
        gives_bytes = self.dtype == torch.uint8 or (self.dtype is None and has_bytes)
        return pixels if gives_bytes or pixels.is_floating_point() else pixels.to(torch.float32).div(255)

    def _checked(self, image: torch.Tensor, index: int) -> torch.Tensor:
        if self.dtype == torch.uint8 and image.dtype != torch.uint8:
            raise ValueError(
                f"{self.paths[index]} has more than 8 bits per channel, floats, or as an array other than 1 or 3 "
                "channels, and dtype is torch.uint8"
            )
        return image

    def _read_partner(self, index: int, pixels: Pixels) -> Pixels | None:
        """The decoded image of `cond_folder`, or None after marking the pair as broken."""
        assert self._partners is not None
        path = self._partners[index]
        try:
            partner = read_image(path, self.target_size)
            (height, width), (other_height, other_width) = size_of(pixels), size_of(partner)
            if abs(height * other_width / (width * other_height) - 1) > _MAX_ASPECT_DIFFERENCE:
                raise DamagedImageError(
                    f"it has {other_width} x {other_height} pixels, and {self.paths[index]} another aspect ratio, "
                    f"{width} x {height}"
                )
        except DamagedImageError as error:
            self._is_broken[index] = True
            warnings.warn(f"skipped a broken image file: {path} ({error})", stacklevel=5)
            return None
        return partner if isinstance(partner, Image.Image) else to_unit(partner, self._partners_range)

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
    """scikit-learn's 1,797 real handwritten digits as float32 (1, h, w) in [0, 1]; `labels` is int64 (1797,).

    has_classes: an item is a dictionary of "image" and "classes", the digit, and there are `class_names`.
    """

    def __init__(self, image_size: int | tuple[int, int] = 8, *, has_classes: bool = False):
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
        self.classes = self.labels if has_classes else None
        self.class_names = tuple(map(str, range(10))) if has_classes else None
        self.label_arguments = {"labels": "digits"} if has_classes else {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor | dict[str, Any]:
        image = self.images[index]
        return image if self.classes is None else {"image": image, "classes": int(self.classes[index])}

    def __getitems__(self, indices: Sequence[int]) -> Unbound:
        """A whole batch at once: the DataLoader prefers this to one call per image."""
        return Unbound(self.images[torch.as_tensor(indices)], self.conditions_at(indices))

    def conditions_at(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Classes (n,) of images, which are not read."""
        return conditions_at(indices, self.classes)


def _resize_float(image: torch.Tensor, target_size: tuple[int, int]) -> torch.Tensor:
    """Float image (h, w) in [0, 1] resized with Pillow's bicubic filter."""
    height, width = target_size
    resized = Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.float32).view(height, width)
    return pixels.clamp(0, 1)
