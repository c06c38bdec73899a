"""Images in: folders and handwritten digits. Images out: grids and trajectory strips as PNG."""

from __future__ import annotations

import errno
import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.utils.data

from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.training.atomic_files import write_atomically

with needed_for("reading and writing images"):
    import numpy  # noqa: F401 (pixels go between Pillow and torch as arrays)
    from PIL import Image

# What Pillow's decoders raise on files that are damaged, foreign or too big to be honest.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Dataset(torch.utils.data.Dataset):
    """Images of a folder and its subfolders as float32 tensors (C, h, w) in [0, 1].

    An image is resized until it just covers `image_size` (an int or (h, w)), keeping its aspect ratio, and cropped at
    the centre. A broken file is named in one warning and the next readable file replaces it; `broken_files`
    lists those met so far, by the workers of a DataLoader as well.

    Raises FileNotFoundError, NotADirectoryError, PermissionError or ValueError for a folder without usable images.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        image_size: int | tuple[int, int],
        exts: Sequence[str] = ["jpg", "jpeg", "png", "tiff"],  # noqa: B006 (upstream's signature; never changed)
        augment_horizontal_flip: bool = False,
        convert_image_to: str | None = None,
    ):
        super().__init__()
        self.folder = folder
        self.image_size = image_size
        self.augment_horizontal_flip = augment_horizontal_flip
        self.convert_image_to = convert_image_to
        self.target_size = _height_and_width(image_size)
        self.paths = _find_images(folder, exts)
        # Shared memory, so that what a worker process finds is known to all.
        self._is_broken = torch.zeros(len(self.paths), dtype=torch.bool).share_memory_()

    @property
    def broken_files(self) -> list[Path]:
        """Paths that could not be read so far, in the order of `paths`."""
        return [self.paths[index] for index in self._is_broken.nonzero().flatten().tolist()]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        index = range(len(self))[index]
        for candidate in (*range(index, len(self)), *range(index)):
            if self._is_broken[candidate]:
                continue
            image = self._read(candidate)
            if image is not None:
                return self.transform(image)
        raise ValueError(f"folder {self.folder} holds {len(self)} image files, and none of them could be read")

    def transform(self, image: Image.Image) -> torch.Tensor:
        """Pillow image to float32 (C, h, w) in [0, 1]."""
        if self.convert_image_to is not None and image.mode != self.convert_image_to:
            image = image.convert(self.convert_image_to)
        image = _resize_to_cover(image, self.target_size)
        if self.augment_horizontal_flip and torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _to_tensor(_crop_centre(image, self.target_size))

    def _read(self, index: int) -> Image.Image | None:
        """The decoded image, or None after marking the file as broken."""
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                image.load()
                return _as_8_bit(image)
        except _DECODE_ERRORS as error:
            if isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES:
                raise
            self._is_broken[index] = True
            warnings.warn(f"skipped a broken image file: {path} ({error})", stacklevel=3)
            return None


class DigitsDataset(torch.utils.data.Dataset):
    """scikit-learn's 1,797 real handwritten digits as float32 (1, h, w) in [0, 1]; `labels` is int64 (1797,)."""

    def __init__(self, image_size: int | tuple[int, int] = 8):
        super().__init__()
        with needed_for("DigitsDataset"):
            from sklearn.datasets import load_digits

        digits = load_digits()
        self.image_size = image_size
        images = torch.from_numpy(digits.images).float() / 16  # (N, 8, 8)
        height, width = _height_and_width(image_size)
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


def save_image_grid(
    images: torch.Tensor, path: str | os.PathLike, nrow: int = 8, padding: int = 2, scale: int = 1
) -> None:
    """Write (N, C, h, w) images in [0, 1] as one PNG, `nrow` to a row; each pixel becomes `scale` × `scale`.

    C is 1, 3 or 4; values outside [0, 1] are clipped, as in torchvision. Raises ValueError for other shapes and for
    values that are not finite.
    """
    images = torch.as_tensor(images).detach().float().cpu()
    if images.ndim != 4 or images.shape[1] not in (1, 3, 4) or len(images) == 0:
        raise ValueError(f"images must be (N, C, h, w) with N >= 1 and C in 1, 3, 4; got shape {tuple(images.shape)}")
    if not images.isfinite().all():
        raise ValueError("images hold values that are not finite (NaN or infinity)")
    images = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    grid = images[0] if len(images) == 1 else _arrange(images, nrow, padding)
    pixels = grid.mul(255).add(0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    with write_atomically(path) as file:
        Image.fromarray(pixels.numpy()).save(file, format="PNG")


def save_trajectory_strip(
    trajectories: torch.Tensor, path: str | os.PathLike, num_frames: int = 10, padding: int = 2, scale: int = 1
) -> None:
    """Write the denoising of a few samples as one PNG: a row per sample, noise on the left, the result on the right.

    trajectories: (N, T, C, h, w) in [0, 1], as `sample(return_all_timesteps=True)` returns it. Shows `num_frames`
    evenly spaced of the T frames, first and last included.
    """
    num_frames = min(num_frames, trajectories.shape[1])
    frames = torch.linspace(0, trajectories.shape[1] - 1, num_frames).round().long()
    shown = trajectories[:, frames.to(trajectories.device)]  # (N, num_frames, C, h, w)
    save_image_grid(shown.flatten(0, 1), path, nrow=num_frames, padding=padding, scale=scale)


def _find_images(folder: str | os.PathLike, exts: Iterable[str]) -> list[Path]:
    """Sorted paths under `folder` whose names end in one of `exts`, upper or lower case."""
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"folder {folder} does not exist; it must be a folder of images")
    if not root.is_dir():
        raise NotADirectoryError(f"folder {folder} is a file; it must be a folder of images")
    if not os.access(root, os.R_OK | os.X_OK):
        raise PermissionError(f"folder {folder} may not be read by this user")
    endings = tuple(f".{ext.lower()}" for ext in exts)
    paths = [
        Path(where, name)
        for where, _, names in os.walk(root, onerror=_warn_unreadable)
        for name in names
        if name.lower().endswith(endings)
    ]
    if not paths:
        raise ValueError(f"folder {folder} holds no images; file names must end in one of {', '.join(endings)}")
    return sorted(paths)


def _warn_unreadable(error: OSError) -> None:
    warnings.warn(f"skipped a folder that cannot be read: {error.filename} ({error.strerror})", stacklevel=2)


def _height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """image_size as (h, w), from an int or a pair of them."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    is_pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not is_pair or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"image_size must be a positive integer or two of them (height, width); got {image_size!r}")
    return size[0], size[1]


def _as_8_bit(image: Image.Image) -> Image.Image:
    """The image with 8 bits per channel and no palette; 16-bit grey keeps its upper byte."""
    if image.mode.startswith("I"):
        values = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32)
        upper = values.bitwise_right_shift(8).clamp(0, 255).to(torch.uint8)
        return Image.frombytes("L", image.size, upper.numpy().tobytes())
    if image.mode == "P":
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode == "1":
        return image.convert("L")
    return image


def _resize_to_cover(image: Image.Image, target_size: tuple[int, int]) -> Image.Image:
    """Smallest size with the image's aspect ratio that covers (h, w), bilinear with antialiasing."""
    height, width = target_size
    if image.width * height >= width * image.height:
        size = (image.width * height // image.height, height)
    else:
        size = (width, image.height * width // image.width)
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def _crop_centre(image: Image.Image, target_size: tuple[int, int]) -> Image.Image:
    height, width = target_size
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """Pillow image with 8 bits per channel to float32 (C, h, w) in [0, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(image.height, image.width, len(image.getbands()))
    return pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div(255)


def _resize_float(image: torch.Tensor, target_size: tuple[int, int]) -> torch.Tensor:
    """Float image (h, w) in [0, 1] resized with Pillow's bicubic filter."""
    height, width = target_size
    resized = Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.float32).view(height, width)
    return pixels.clamp(0, 1)


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
