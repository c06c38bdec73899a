"""What `likelihood` and `progressive` read: a process from a checkpoint, and images as bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ddpm_fast.cli.labels import check_labels
from ddpm_fast.cli.options import UserError, checkpoint_file, device_of, image_size_of

if TYPE_CHECKING:
    import torch

    from ddpm_fast.diffusion.diffusion_process import DiffusionProcess


# What images of so many channels are converted to.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Conditions, and the attributes of a network that say that it takes them.
_SIZES = {"cond": "cond_dim", "cond_image": "cond_channels"}


class Loaded(NamedTuple):
    """A process with the weights that were asked for, its step, and the file that it came from."""

    diffusion: DiffusionProcess
    step: int
    path: Path


def load_process(
    checkpoint: Path,
    weights: Literal["ema", "model"],
    image_size: tuple[int, ...] | None,
    device: str | None,
    **overrides: Any,
) -> Loaded:
    """The process of a checkpoint, ready for inference; UserError where its image size is not known."""
    from ddpm_fast.training.checkpoint import load_checkpoint

    path = checkpoint_file(checkpoint)
    given = {"image_size": image_size_of(image_size), **overrides}
    given = {name: value for name, value in given.items() if value is not None}
    loaded = load_checkpoint(path, map_location=device_of(device), **given)
    diffusion = (loaded.ema.ema_model if weights == "ema" else loaded.diffusion).eval()
    if diffusion.image_size is None:
        raise UserError(f"{path} does not record image_size; give --image-size")
    return Loaded(diffusion, loaded.step, path)


class Images:
    """Images of a folder, of a prepared file, or the digits, evenly spaced: `count` of them, or all.

    labels: arguments of `Dataset` that say their conditions. A network that takes classes gets those of the same names
        as the ones that it was trained with; the digits and prepared files have their own.
    option: the one that says `count`.

    Raises:
        UserError: images have other channels or another size than the process, or lack conditions that the network
            takes.
        OSError, TypeError, ValueError: what the datasets raise.
    """

    def __init__(
        self,
        data: str,
        diffusion: DiffusionProcess,
        count: int | None,
        labels: dict[str, Any] | None = None,
        *,
        option: str = "--num-images",
    ):
        import torch

        from ddpm_fast.training.data import Dataset, DigitsDataset
        from ddpm_fast.training.items import names_of_classes, split_item
        from ddpm_fast.training.prepared import PreparedDataset, is_prepared

        (height, width), channels = diffusion.image_size, diffusion.channels
        size = (height, width)
        labels = dict(labels or {})
        check_labels(data, labels)
        network = diffusion.network
        takes_classes = bool(getattr(network, "num_classes", None))
        if data == "digits":
            self._dataset: Any = DigitsDataset(size, has_classes=takes_classes)
        elif is_prepared(data):
            self._dataset = PreparedDataset(data)
        else:
            cond_mode = _MODES.get(getattr(network, "cond_channels", 0))
            modes: dict[str, Any] = {"convert_image_to": _MODES.get(channels), "convert_cond_image_to": cond_mode}
            self._dataset = Dataset(data, size, dtype=None, **modes, **labels)
        total = len(self._dataset)
        if count is not None and count > total:
            raise UserError(f"{option} {count}: {data} has {total} images")
        chosen = total if count is None else count
        self._indices = [index * total // chosen for index in range(chosen)]
        image, conditions = split_item(self._dataset[self._indices[0]])
        self._taken = {"classes": takes_classes}
        self._taken |= {name: bool(getattr(network, size, None)) for name, size in _SIZES.items()}
        for name, option in (("classes", "--labels"), ("cond", "--cond-columns"), ("cond_image", "--cond-folder")):
            if self._taken[name] and name not in conditions:
                raise UserError(f"the checkpoint's network takes {name}, and {data} has none; give {option}")
        own, names = names_of_classes(self._dataset), diffusion.class_names
        self._classes: torch.Tensor | None = None  # of the dataset's classes those of the network
        if takes_classes and own is not None and names is not None:
            self._classes = torch.tensor(classes_among(own, names))
        shape = tuple(image.shape)
        if shape != (channels, *size):
            raise UserError(f"images of {data} have shape {shape}, and the checkpoint's {(channels, *size)}")

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, chosen: slice) -> torch.Tensor:
        """(n, C, h, w) uint8."""
        import torch

        from ddpm_fast.training.items import split_item

        images = [split_item(self._dataset[index])[0] for index in self._indices[chosen]]
        return torch.stack([i if i.dtype == torch.uint8 else (i * 255).round().to(torch.uint8) for i in images])

    def conditions(self, chosen: slice, device: torch.device) -> dict[str, Any]:
        """What the network takes with these images: (n, ...) by name."""
        from ddpm_fast.training.items import collate_items

        if not any(self._taken.values()):
            return {}
        found = collate_items([self._dataset[index] for index in self._indices[chosen]]).conditions
        if self._classes is not None:
            found["classes"] = self._classes[found["classes"]]
        return {name: values.to(device) for name, values in found.items() if self._taken[name]}


def classes_among(own: Sequence[str], names: Sequence[str]) -> list[int]:
    """The numbers that the classes of some data have among those of a checkpoint; UserError for an unknown name."""
    unknown = [name for name in own if name not in names]
    if unknown:
        raise UserError(f"the data's class {unknown[0]!r} is none of the checkpoint's: {', '.join(names[:50])}")
    return [list(names).index(name) for name in own]


def read_pictures(option: str, path: Path, channels: int, size: tuple[int, int]) -> torch.Tensor:
    """The picture in a file, or those of a folder, as (N, C, h, w) uint8, resized to cover `size` and cropped.

    Raises:
        UserError: a file holds no picture, or one of other channels that cannot be converted.
    """
    import torch

    from ddpm_fast.training.data import Dataset
    from ddpm_fast.training.images_in import DamagedImageError, read_image
    from ddpm_fast.training.pixels import convert, crop_centre, resize_to_cover, to_tensor

    mode = _MODES.get(channels)
    if not path.exists():
        raise UserError(f"{option}: {path} does not exist")
    if path.is_dir():
        dataset = Dataset(path, size, convert_image_to=mode, dtype=torch.uint8)
        images = [image for index in range(len(dataset)) if (image := dataset.read(index)) is not None]
    else:
        try:
            pixels = resize_to_cover(convert(read_image(path, size), mode, (255, 255, 255)), size)
        except DamagedImageError as error:
            raise UserError(f"{option}: {path} holds no picture ({error})") from error
        images = [to_tensor(crop_centre(pixels, size))]
    for image in images:
        if image.dtype != torch.uint8 or image.shape[0] != channels:
            raise UserError(f"{option}: {path} must hold images of {channels} channels and 8 bits")
    if not images:
        raise UserError(f"{option}: none of the images in {path} could be read")
    return torch.stack(images)


class _JustTrying(Exception):
    """Ends a trial of `write_atomically`, which then leaves no file."""


def prepare_places(paths: Sequence[Path]) -> None:
    """Make the folders of files to be written, and try to write there; OSError or UserError if that fails."""
    from ddpm_fast.training.atomic_files import make_folder, write_atomically

    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder, and a file would be written there")
        make_folder(path.parent)
        with contextlib.suppress(_JustTrying), write_atomically(path):
            raise _JustTrying
