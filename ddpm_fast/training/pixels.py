"""Pixels: converted, resized, cropped, and made a tensor of bytes or of float32.

They are a Pillow image with 8 bits per channel, or an array (h, w, C) whose channels are resized as floats: images of
more than 8 bits, float images, and arrays of any number of channels.
"""

from __future__ import annotations

from typing import Any

import torch

from ddpm_fast.runtime.extras import needed_for

with needed_for("reading and writing images"):
    import numpy as np
    from PIL import Image, ImageColor

Pixels = Image.Image | np.ndarray
Color = str | tuple[int, int, int]

_ALPHA_MODES = ("LA", "PA", "RGBA", "RGBa")
_ARRAY_MODES = {"L": (1, False), "LA": (1, True), "RGB": (3, False), "RGBA": (3, True)}  # colours, has alpha
_LUMA = np.array([299, 587, 114]) / 1000  # ITU-R 601, as Pillow's conversion to L


def convert(pixels: Pixels, mode: str | None, background: tuple[int, int, int]) -> Pixels:
    """Pixels as `mode`; where that has no transparency, they are composed on `background` (0..255).

    An array is float in [0, 1], with 1 grey or 3 RGB channels, or with 4 RGBA where the mode asks for other than 4;
    ValueError where it has no conversion to `mode`.
    """
    if mode is None:
        return pixels
    if isinstance(pixels, np.ndarray):
        return _convert_array(pixels, mode, background)
    if pixels.mode == "LAB" != mode:
        pixels = pixels.convert("RGB")  # Pillow converts it to nothing else
    if mode not in _ALPHA_MODES and (pixels.mode in _ALPHA_MODES or "transparency" in pixels.info):
        pixels = _on_background(pixels, background)
    return pixels if pixels.mode == mode else without_palette(pixels.convert(mode))


def covering_size(size: tuple[int, int], target_size: tuple[int, int]) -> tuple[int, int]:
    """The smallest (h, w) with the aspect ratio of `size` that covers `target_size`."""
    (height, width), (target_height, target_width) = size, target_size
    if width * target_height >= target_width * height:
        return target_height, width * target_height // height
    return height * target_width // width, target_width


def resize_to_cover(pixels: Pixels, target_size: tuple[int, int]) -> Pixels:
    """Smallest size with the image's aspect ratio that covers (h, w), bilinear with antialiasing."""
    return resize(pixels, covering_size(size_of(pixels), target_size))


def resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Pixels of size (h, w), bilinear with antialiasing."""
    if size == size_of(pixels):
        return pixels
    size = size[::-1]  # (width, height)
    if isinstance(pixels, Image.Image):
        return pixels.resize(size, Image.Resampling.BILINEAR)
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(pixels, 2, 0)]
    return np.stack([np.asarray(channel.resize(size, Image.Resampling.BILINEAR)) for channel in channels], axis=2)


def crop_centre(pixels: Pixels, target_size: tuple[int, int]) -> Pixels:
    """The middle (h, w) of pixels that cover it."""
    (height, width), (target_height, target_width) = size_of(pixels), target_size
    top, left = round((height - target_height) / 2), round((width - target_width) / 2)
    if isinstance(pixels, Image.Image):
        return pixels.crop((left, top, left + target_width, top + target_height))
    return pixels[top : top + target_height, left : left + target_width]


def mirror(pixels: Pixels) -> Pixels:
    """Left and right exchanged."""
    if isinstance(pixels, Image.Image):
        return pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return pixels[:, ::-1]


def to_tensor(pixels: Pixels) -> torch.Tensor:
    """Pixels as a contiguous tensor (C, h, w): uint8 of an image of 8 bits per channel, float32 of a float array."""
    if isinstance(pixels, np.ndarray):
        return torch.from_numpy(np.moveaxis(pixels, 2, 0).astype(np.float32, order="C"))
    values = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
    values = values.view(pixels.height, pixels.width, len(pixels.getbands()))
    return values.permute(2, 0, 1).contiguous()


def check_color(background: Color) -> tuple[int, int, int]:
    """(red, green, blue) in 0..255 from a tuple or from a name or code that Pillow knows, such as "#ff8000"."""
    color: Any = background
    if isinstance(background, str):
        try:
            color = ImageColor.getrgb(background)[:3]
        except ValueError:
            color = None
    is_triple = isinstance(color, (tuple, list)) and len(color) == 3
    if not is_triple or not all(isinstance(value, int) and 0 <= value <= 255 for value in color):
        raise ValueError(f"background must be the name of a colour or (red, green, blue) in 0..255; got {background!r}")
    return color[0], color[1], color[2]


def check_mode(mode: str | None) -> str | None:
    """A mode that pictures can be converted to, or None; one grey mode stands for those of more bits."""
    if mode is None:
        return None
    if mode in ("I", "F", "I;16"):  # grey at full precision, which L keeps too
        return "L"
    try:
        Image.new("RGB", (1, 1)).convert(mode)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"convert_image_to must be a mode of Pillow such as L, RGB or RGBA; got {mode!r}") from error
    return mode


def without_palette(image: Image.Image) -> Image.Image:
    """The image with 8 bits per channel and no palette."""
    if image.mode == "PA" or (image.mode == "P" and "transparency" in image.info):
        return image.convert("RGBA")
    if image.mode in ("1", "P"):
        return image.convert("L" if image.mode == "1" else "RGB")
    return image


def _on_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """An image with transparency as RGB: α·image + (1 − α)·background."""
    image = image.convert("RGBA")
    composed = Image.new("RGB", image.size, background)
    composed.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return composed


def _convert_array(values: np.ndarray, mode: str, background: tuple[int, int, int]) -> np.ndarray:
    channels = values.shape[2]
    colors, has_alpha = _ARRAY_MODES.get(mode, (0, False))
    if channels == colors + has_alpha:
        return values
    if not colors or channels not in (1, 3, 4):
        raise ValueError(
            f"convert_image_to is {mode!r}, and an image of more than 8 bits or an array has {channels} channels: "
            f"1, 3 or 4 channels convert to {', '.join(_ARRAY_MODES)}"
        )
    alpha = values[:, :, 3:] if channels == 4 else np.ones_like(values[:, :, :1])
    color = values[:, :, :3]
    if channels == 4 and not has_alpha:
        color = alpha * color + (1 - alpha) * np.array(background, values.dtype) / 255
    if color.shape[2] > colors:
        color = (color @ _LUMA)[:, :, None]
    color = np.broadcast_to(color, (*color.shape[:2], colors))
    return np.concatenate([color, alpha] if has_alpha else [color], axis=2).astype(values.dtype)


def size_of(pixels: Pixels) -> tuple[int, int]:
    """(height, width)."""
    return (pixels.height, pixels.width) if isinstance(pixels, Image.Image) else (pixels.shape[0], pixels.shape[1])
