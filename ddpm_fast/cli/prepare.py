"""`ddpm-fast prepare`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ddpm_fast.cli.options import Int, Integer, Integers, Text, UserError, Words, check_positive, image_size_of


@dataclasses.dataclass
class Prepare:
    """Decode a folder of images once, into one file of bytes that `ddpm-fast train` maps into memory.

    The file is numpy's: uint8 (N, C, height, width), in the order of the sorted paths. It appears when it is whole;
    after a kill the command begins anew. Broken images are named and left out. With --labels or --cond-columns the file
    keeps classes, their names, and vectors, and `train` uses them.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """A folder of images, subfolders included."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT.npy")]
    """The file to write."""
    image_size: Integers = None
    """Height and width, or one number for both (64)."""
    channels: Int = 3
    """1 grey, 3 RGB, 4 RGBA; other numbers take images that have as many."""
    exts: Words = None
    """Endings of the files that are images (jpg jpeg png tiff tif bmp webp jfif avif npy)."""
    background: Text = None
    """Colour behind transparent images where --channels has no transparency (white)."""
    labels: Annotated[
        Text,
        tyro.conf.arg(
            help="Where the classes are: folders (the first level of subfolders), metadata (metadata.csv or "
            "metadata.jsonl as of Hugging Face's imagefolder), or a .csv or .jsonl file with the column "
            "file_name."
        ),
    ] = None
    label_column: Text = None
    """The column of the labels (label)."""
    cond_columns: Words = None
    """Columns of numbers that are an image's vector, as they are."""
    workers: Integer = None
    """Processes that read images (as many as this process has processors)."""
    debug: bool = False
    """Show the traceback of an error."""


def run(options: Prepare) -> None:
    """`ddpm-fast prepare`."""
    from ddpm_fast.training.data import IMAGE_ENDINGS
    from ddpm_fast.training.prepared import PreparedDataset, prepare

    check_positive(channels=options.channels)
    if options.workers is not None and options.workers < 0:
        raise UserError(f"--workers must be at least 0; got {options.workers}")
    image_size = image_size_of(options.image_size)
    shape, broken = prepare(
        options.folder,
        options.out,
        64 if image_size is None else image_size,
        channels=options.channels,
        exts=IMAGE_ENDINGS if options.exts is None else options.exts,
        background="white" if options.background is None else options.background,
        num_workers=options.workers,
        labels=options.labels,
        label_column=options.label_column,
        cond_columns=options.cond_columns or (),
    )
    left_out = f", without {len(broken)} broken files" if broken else ""
    names = PreparedDataset(options.out).class_names
    of_classes = "" if names is None else f" of {len(names)} classes"
    size = " x ".join(map(str, shape[1:]))
    print(f"{options.out} holds {shape[0]} images{of_classes} of {size} bytes{left_out}")
