"""Images in: from a file to pixels, upright and at full precision."""

from __future__ import annotations

import errno
import struct
import sys
import tokenize
import warnings
import zlib
from pathlib import Path
from typing import Any

from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.runtime.mapped_files import read_memory
from ddpm_fast.training.pixels import Pixels, covering_size, without_palette

with needed_for("reading and writing images"):
    import numpy as np
    from numpy.lib.format import open_memmap
    from PIL import ExifTags, Image, ImageFile, JpegImagePlugin

# What decoders raise on files that are damaged, foreign or too big to be honest, found by scrambling files of each kind
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    RuntimeError,  # the AVIF decoder
    struct.error,
    tokenize.TokenError,  # numpy's reader of headers
    zlib.error,
    Image.DecompressionBombError,
)
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}

_UPRIGHT = {  # EXIF orientation (TIFF 6.0, tag 274) → what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow keeps the upper byte of a colour of 16 bits; told the other byte order, it unpacks the lower one.
_NOT_NATIVE = "B" if sys.byteorder == "little" else "L"
_LOWER_BYTES = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA")
    for order, other in (("B", "L"), ("L", "B"), ("N", _NOT_NATIVE))
}


class DamagedImageError(ValueError):
    """A file that holds no image that can be used."""


# A JPEG decoded at a half, a quarter or an eighth is still this many times as large as what it becomes. At 3 values
# of photographs move by at most 8 of 255, at 2 by 16 (docs/training.md).
_DRAFT_FACTOR = 3


def read_image(path: Path, target_size: tuple[int, int] | None = None) -> Pixels:
    """The first picture in a file, upright: 8 bits per channel without palette, or an array (h, w, C) of its own dtype.

    target_size: a JPEG far larger than this (h, w) is decoded at a reduced scale and resized until it just covers it.

    Raises:
        DamagedImageError: with the reason, where the file is at fault.
        OSError: this computer cannot read it.
    """
    try:
        return _read_array(path) if path.suffix.lower() == ".npy" else _read_picture(path, target_size)
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES:
            raise
        raise DamagedImageError(str(error) or type(error).__name__) from error


def is_deep(path: Path) -> bool:
    """True for a file of more than 8 bits or of floats, by its header. Raises as `read_image`."""
    try:
        if path.suffix.lower() == ".npy":
            return open_memmap(path, mode="r").dtype not in (np.uint8, np.bool_)
        with Image.open(path) as image:
            return _is_deep_mode(image.mode) or _raw_mode(image) in _LOWER_BYTES
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES:
            raise
        raise DamagedImageError(str(error) or type(error).__name__) from error


def _read_picture(path: Path, target_size: tuple[int, int] | None) -> Pixels:
    with Image.open(path) as opened:
        if target_size is not None and opened.mode in ("L", "RGB") and _is_jpeg(opened):
            return _load_covering(opened, path, target_size)
        raw_mode = _raw_mode(opened)
        image = _load_upright(opened, path)
        if raw_mode in _LOWER_BYTES:
            return 256 * np.asarray(image, np.uint16) + np.asarray(_load_lower_bytes(path, _LOWER_BYTES[raw_mode]))
        if not _is_deep_mode(image.mode):
            return without_palette(image)
        values = np.asarray(image)[:, :, None]
        is_unsigned = image.mode == "I" and _tiff_tag(opened, "SampleFormat", 1) == 1
        if is_unsigned and _tiff_tag(opened, "BitsPerSample", 0) == 32:
            values = values.view(np.uint32)
        return _check_finite(values)


def _load_upright(image: Image.Image, path: Path) -> Image.Image:
    """The picture as its EXIF orientation wants it seen."""
    image.load()
    return _turned(image, _orientation(image, path))


def _turned(image: Image.Image, orientation: object) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _is_jpeg(image: Image.Image) -> bool:
    return isinstance(image, JpegImagePlugin.JpegImageFile)  # telephones' MPO too


def _load_covering(image: Image.Image, path: Path, target_size: tuple[int, int]) -> Image.Image:
    """A JPEG upright: whole, or where a reduced scale is large enough, from that in the size that covers the target.

    libjpeg leaves out the high frequencies of each block, which averages 2 × 2, 4 × 4 or 8 × 8 pixels.
    """
    orientation = _orientation(image, path)
    lies = orientation in (5, 6, 7, 8)
    height, width = covering_size((image.height, image.width), target_size[::-1] if lies else target_size)
    whole = image.size
    draft: Any = image.draft(None, (_DRAFT_FACTOR * width, _DRAFT_FACTOR * height))
    image.load()
    if image.size != whole:
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=draft[1])
    return _turned(image, orientation)


def _load_lower_bytes(path: Path, raw_mode: str) -> Image.Image:
    """The picture unpacked by `raw_mode`."""
    with Image.open(path) as image:
        assert isinstance(image, ImageFile.ImageFile)
        image.tile = [_with_raw_mode(tile, raw_mode) for tile in image.tile]
        return _load_upright(image, path)


def _raw_mode(image: Image.Image) -> str:
    """How Pillow unpacks the pixels of an image that is not loaded yet; empty where it does not say."""
    tiles = getattr(image, "tile", [])
    arguments = tiles[0][3] if tiles else ""
    return str(arguments if isinstance(arguments, str) or not arguments else arguments[0])


def _with_raw_mode(tile: Any, raw_mode: str) -> Any:
    arguments = raw_mode if isinstance(tile[3], str) else (raw_mode, *tile[3][1:])
    is_named = hasattr(tile, "_replace")  # a plain tuple before Pillow 11
    return tile._replace(args=arguments) if is_named else (*tile[:3], arguments)


def _read_array(path: Path) -> Pixels:
    # A mapped file cannot claim more than it holds; reading would first allocate the claim.
    mapped = open_memmap(path, mode="r")
    read_memory([(mapped.ctypes.data, mapped.ctypes.data + mapped.nbytes)], str(path))
    values = np.array(mapped)
    if values.dtype.kind not in "buif":
        raise ValueError(f"an array of {values.dtype}; images are integers, floats or booleans")
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * np.uint8(255)
    values = _channels_last(values)
    if values.dtype == np.uint8 and values.shape[2] in (1, 3):
        return Image.fromarray(np.ascontiguousarray(values[:, :, 0] if values.shape[2] == 1 else values))
    return _check_finite(values)


def _channels_last(values: np.ndarray) -> np.ndarray:
    """(h, w), (h, w, C) or (C, h, w) as (h, w, C): C is the first or last of three axes, and less than both others."""
    if values.ndim == 2 and values.size:
        return values[:, :, None]
    if values.ndim == 3 and values.size:
        first, middle, last = values.shape
        if last < min(first, middle):
            return values
        if first < min(middle, last):
            return np.moveaxis(values, 0, 2)
    raise ValueError(
        f"an array of shape {values.shape}; images are (h, w), or (h, w, C) or (C, h, w) with C less than h and w"
    )


def _check_finite(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite (NaN or infinity)")
    return values


def _orientation(image: Image.Image, path: Path) -> object:
    """What EXIF says, or None; EXIF that is damaged spoils no picture."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGE as error:
        warnings.warn(f"the EXIF data of {path} is damaged ({error}), so its picture is not turned", stacklevel=5)
        return None


def _tiff_tag(image: Image.Image, name: str, default: int) -> int:
    """The first value of a TIFF tag; the default for other files."""
    tags = getattr(image, "tag_v2", {})
    value = tags.get(ExifTags.Base[name].value, default)
    return value[0] if isinstance(value, tuple) else value


def _is_deep_mode(mode: str) -> bool:
    return mode == "F" or mode.startswith("I")
