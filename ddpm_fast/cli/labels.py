"""The options that say what the conditions of the images of a folder are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import tyro

from ddpm_fast.cli.options import Folder, Text, UserError, Words


@dataclasses.dataclass
class LabelOptions:
    """Where the classes, vectors and condition images of a folder are."""

    labels: Annotated[
        Text,
        tyro.conf.arg(
            help="Where the classes are: folders (the first level of subfolders), metadata (metadata.csv or "
            "metadata.jsonl as of Hugging Face's imagefolder), or a .csv or .jsonl file with the column "
            "file_name; for the digits the word digits."
        ),
    ] = None
    label_column: Text = None
    """The column of the labels (label)."""
    cond_columns: Words = None
    """Columns of numbers that are an image's vector, as they are."""
    cond_folder: Folder = None
    """A folder with an image of the same relative name for each, a condition that is resized and mirrored with it."""

    def given(self) -> dict[str, Any]:
        """Arguments of `Dataset`, those that were given."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


class Sizes(NamedTuple):
    """Arguments of Unet that a dataset's conditions ask for, with the names of the classes where there are some."""

    num_classes: int | None = None
    cond_dim: int | None = None
    cond_channels: int = 0
    class_names: tuple[str, ...] | None = None


def check_labels(data: str, arguments: dict[str, Any]) -> None:
    """Raise UserError for options that are for other data."""
    from ddpm_fast.training.prepared import is_prepared

    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        if data == "digits" and (name, value) != ("labels", "digits"):
            raise UserError(f"{option} {_shown(value)} is for a folder of images; the digits take --labels digits")
        if data != "digits" and (name, value) == ("labels", "digits"):
            raise UserError("--labels digits is for the digits; a folder takes folders, metadata or a file")
        if data != "digits" and is_prepared(data):
            raise UserError(
                f"{option} is for a folder of images; a prepared file keeps what `ddpm-fast prepare --labels` read"
            )


def sizes_of(data: str, exts: Sequence[str] | None, arguments: dict[str, Any], cond_channels: int) -> Sizes:
    """What a network is told of the data; the trainer, which looks again, says its warnings.

    arguments: of `Dataset`, for a folder.
    """
    import warnings

    from ddpm_fast.training.data import IMAGE_ENDINGS
    from ddpm_fast.training.image_folder import find_images
    from ddpm_fast.training.labels import Labels, read_labels, tables_of
    from ddpm_fast.training.prepared import PreparedDataset, is_prepared

    if data == "digits":
        return Sizes(10, class_names=tuple("0123456789")) if arguments else Sizes()
    if is_prepared(data):
        found: Any = PreparedDataset(data)
    elif not arguments:
        return Sizes()
    else:
        labels = {name: value for name, value in arguments.items() if name != "cond_folder"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            paths = find_images(data, IMAGE_ENDINGS if exts is None else exts, tables_of(arguments.get("labels")))
        found = read_labels(paths, **{"labels": None, **labels}) if labels else Labels()
    return Sizes(
        None if found.class_names is None else len(found.class_names),
        None if found.cond is None else found.cond.shape[1],
        cond_channels if "cond_folder" in arguments else 0,
        found.class_names,
    )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
