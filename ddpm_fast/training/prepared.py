"""A folder of images decoded once into one file of bytes, which training maps into memory.

The file is numpy's: uint8 (N, C, h, w). A batch then is a copy of N rows, and one core feeds a GPU. Where images have
labels or vectors, a zip archive of arrays follows, which numpy does not look at.
"""

from __future__ import annotations

import io
import json
import os
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.utils.data
from torch.utils.data import DataLoader

from ddpm_fast.runtime.compile_ahead import count_processors
from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.runtime.mapped_files import read_memory
from ddpm_fast.training.atomic_files import open_atomically
from ddpm_fast.training.batches import ignore_interrupts
from ddpm_fast.training.data import IMAGE_ENDINGS, Dataset, DigitsDataset
from ddpm_fast.training.items import Unbound, conditions_at
from ddpm_fast.training.pixels import Color

with needed_for("prepared files of images"):
    import numpy as np
    from numpy.lib.format import open_memmap, read_array, write_array, write_array_header_1_0
    from tqdm.auto import tqdm

_IMAGES_AT_ONCE = 64
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_MEMBERS = ("class_names.json", "classes.npy", "cond.npy")


class PreparedDataset(torch.utils.data.Dataset):
    """The images of a prepared file as uint8 tensors (C, h, w); `images` is the array (N, C, h, w) in the file.

    Where the file has labels or vectors, an item is a dictionary of "image", "classes" and "cond", as of `Dataset`;
    `class_names`, `classes` and `cond` hold them for all images, or are None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no such array.
        OSError: when images are read that the disk cannot read, as of a file that has been cut off since.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__()
        self.path = Path(path)
        self.images = _map(self.path)
        self.class_names, self.classes, self.cond = _read_conditions(self.path, len(self.images))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor | dict[str, Any]:
        mapped = self.images[index]
        self._read([mapped.ctypes.data], mapped.nbytes)
        image = torch.from_numpy(mapped.copy())
        item: dict[str, Any] = {} if self.classes is None else {"classes": int(self.classes[index])}
        if self.cond is not None:
            item["cond"] = self.cond[index]
        return {"image": image, **item} if item else image

    def __getitems__(self, indices: Sequence[int]) -> Unbound:
        """A whole batch at once: the DataLoader prefers this to one call per image."""
        chosen = np.asarray(indices)
        size = self.images[0].nbytes
        self._read((self.images.ctypes.data + chosen % len(self.images) * size).tolist(), size)
        return Unbound(torch.from_numpy(self.images[chosen]), self.conditions_at(indices))

    def _read(self, starts: Sequence[int], size: int) -> None:
        """Read images at these addresses, since copying what the disk cannot read would end the process by a signal."""
        read_memory([(start, start + size) for start in starts], f"prepared file {self.path}")

    def conditions_at(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Classes (n,) and vectors (n, D) of images, which are not read."""
        return conditions_at(indices, self.classes, self.cond)

    def __getstate__(self) -> dict[str, Any]:
        """Without the array: a worker process maps the file itself."""
        return {**self.__dict__, "images": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.images = _map(self.path)


class Prepared(NamedTuple):
    """What `prepare` wrote: the array's shape (N, C, h, w), and the files that it could not read."""

    shape: tuple[int, int, int, int]
    broken_files: list[Path]


def is_a_function_of_the_index(dataset: object) -> bool:
    """True if reading an item of a dataset is known to draw no random numbers."""
    is_ours = type(dataset) in (Dataset, DigitsDataset, PreparedDataset)
    return is_ours and not getattr(dataset, "augment_horizontal_flip", False)


def is_prepared(path: object) -> bool:
    """True for the path of a prepared file, by its ending; folders may have any name."""
    return isinstance(path, (str, os.PathLike)) and Path(path).suffix.lower() == ".npy" and not Path(path).is_dir()


def prepare(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    image_size: int | tuple[int, int],
    *,
    channels: int = 3,
    exts: Sequence[str] = IMAGE_ENDINGS,
    background: Color = "white",
    num_workers: int | None = None,
    progress: bool = True,
    labels: str | os.PathLike | None = None,
    label_column: str | None = None,
    cond_columns: Sequence[str] = (),
) -> Prepared:
    """Write the images of a folder, as `Dataset` reads them and in its order, to the `.npy` file `out`.

    labels, label_column, cond_columns: as of `Dataset`; the file keeps classes, their names, and vectors.

    The file appears when it is whole. A broken image is named in a warning and left out. Images become grey for 1
    channel, RGB for 3 and RGBA for 4; other numbers take images that have as many. `num_workers` processes read, None
    is one for each processor.

    Raises:
        OSError: the folder cannot be read, or the file not written.
        ValueError: images of more than 8 bits, of floats or of other channels, or other unusable arguments.
    """
    out = Path(out)
    if not is_prepared(out):
        raise ValueError(f"the prepared file must be a file that ends in .npy; got {out}")
    if out.resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError(f"the prepared file must not be inside the folder, where it would be an image; got {out}")
    mode = _MODES.get(channels)
    dataset = Dataset(
        folder,
        image_size,
        exts,
        convert_image_to=mode,
        background=background,
        dtype=torch.uint8,
        labels=labels,
        label_column=label_column,
        cond_columns=cond_columns,
    )
    shape = (channels, *dataset.target_size)
    num_workers = count_processors() if num_workers is None else num_workers
    loader = DataLoader(
        _Reader(dataset), _IMAGES_AT_ONCE, num_workers=num_workers, collate_fn=list, worker_init_fn=ignore_interrupts
    )
    kept: list[int] = []
    with open_atomically(out) as file, tqdm(total=len(dataset), unit="image", disable=not progress) as bar:
        file.write(_header((len(dataset), *shape)))
        for index, item in enumerate(item for items in loader for item in items):
            bar.update(1)
            if isinstance(item, ValueError):
                raise item
            if item is None:
                continue
            if item.shape != shape:
                raise ValueError(f"{dataset.paths[index]} has {item.shape[0]} channels, and channels is {channels}")
            file.write(item.data)
            kept.append(index)
        if not kept:
            raise ValueError(f"folder {folder} holds {len(dataset)} image files, and none of them could be read")
        _write_conditions(file, dataset, kept)
        # Numpy pads every header of this kind to 128 bytes, so that one with fewer images fits into the place.
        file.seek(0)
        file.write(_header((len(kept), *shape)))
    return Prepared((len(kept), *shape), dataset.broken_files)


class _Reader(torch.utils.data.Dataset):
    """What to write of each file: bytes (C, h, w), None of a broken one, or the error that ends it all.

    An error is an item, since a DataLoader would hide its sentence in a worker's traceback.
    """

    def __init__(self, dataset: Dataset):
        super().__init__()
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> np.ndarray | ValueError | None:
        try:
            image = self.dataset.read(index)
        except ValueError as error:
            return error
        return None if image is None else image.numpy()


def _write_conditions(file: BinaryIO, dataset: Dataset, kept: Sequence[int]) -> None:
    """Append the conditions of the images that were kept, if there are any, as an archive."""
    arrays = dataset.conditions_at(kept)
    if not arrays:
        return
    names = None if dataset.class_names is None else list(dataset.class_names)
    contents = {_MEMBERS[0]: json.dumps(names).encode()}
    for name, values in arrays.items():
        array = io.BytesIO()
        write_array(array, values.numpy())
        contents[f"{name}.npy"] = array.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in contents.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # of a fixed date, so that equal folders give equal files
    file.write(packed.getvalue())


def _read_conditions(path: Path, count: int) -> tuple[tuple[str, ...] | None, torch.Tensor | None, torch.Tensor | None]:
    """Class names, classes (N,) and vectors (N, D) after the N images, or None of what is not there."""
    images = open_memmap(path, mode="r")
    with open(path, "rb") as file:
        file.seek(images.offset + images.nbytes)
        packed = file.read()
    if not packed:
        return None, None, None
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            contents = {name: archive.read(name) for name in _MEMBERS if name in archive.namelist()}
        names = json.loads(contents[_MEMBERS[0]])
        classes, cond = (
            torch.from_numpy(read_array(io.BytesIO(contents[name]), allow_pickle=False)) if name in contents else None
            for name in _MEMBERS[1:]
        )
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError) as error:
        raise ValueError(f"{path} has something after its images that are no labels: {error}") from error
    for values in (classes, cond):
        if values is not None and len(values) != count:
            raise ValueError(f"{path} has {count} images and labels of {len(values)}")
    return None if names is None else tuple(names), classes, cond


def _header(shape: tuple[int, ...]) -> bytes:
    """The first bytes of a `.npy` file of uint8, up to the array."""
    file = io.BytesIO()
    write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _map(path: Path) -> np.ndarray:
    """The array (N, C, h, w) of a prepared file, whose pages are read when they are needed."""
    if not path.exists():
        raise FileNotFoundError(f"prepared file {path} does not exist")
    try:
        images = open_memmap(path, mode="r")
    except (ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"{path} is no whole .npy file: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape or not images.flags.c_contiguous:
        order = "" if images.flags.c_contiguous else " in Fortran's order"
        raise ValueError(
            f"{path} must hold uint8 images of shape (N, C, h, w), as ddpm-fast prepare writes them; it holds "
            f"{images.dtype} of shape {images.shape}{order}"
        )
    return images.view(np.ndarray)
