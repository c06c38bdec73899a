"""What a folder says of its images: classes by subfolder, classes and vectors in tables, pictures in another folder.

Tables are CSV files with a header, or files of a JSON object per line, as Hugging Face's imagefolder has them: the
column `file_name` holds a path relative to the table's folder.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.training.image_folder import PathSequence

with needed_for("reading labels"):
    import numpy as np

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
FILE_COLUMN = "file_name"
LABEL_COLUMN = "label"

_LabelsFrom = str | os.PathLike | None


class Labels(NamedTuple):
    """Conditions of N images, in the order of their paths.

    class_names: of the classes 0, 1, ...
    classes: (N,) int64.
    cond: (N, D) float32, the columns' numbers as they are.
    """

    class_names: tuple[str, ...] | None = None
    classes: np.ndarray | None = None
    cond: np.ndarray | None = None


class _Cells(NamedTuple):
    """What a table says of an image: where, the label, and the numbers."""

    where: str
    label: int | str | None
    numbers: tuple[float, ...]


def tables_of(labels: _LabelsFrom) -> tuple[str, ...]:
    """Names of files in the folder that are no images, but may hold labels.

    Raises:
        ValueError: `labels` are none of the kinds there are.
        FileNotFoundError: a missing file.
    """
    if labels in (None, "folders", "metadata"):
        return METADATA_NAMES
    is_path = isinstance(labels, (str, os.PathLike)) and Path(labels).suffix.lower() in (".csv", ".jsonl")
    if not is_path:
        raise ValueError(
            f"labels must be 'folders', 'metadata', the path of a .csv or .jsonl file, or None; got {labels!r}"
        )
    if not Path(labels).is_file():
        raise FileNotFoundError(f"labels: file {labels} does not exist")
    return (*METADATA_NAMES, Path(labels).name)


def read_labels(
    paths: PathSequence, labels: _LabelsFrom, label_column: str | None = None, cond_columns: Sequence[str] = ()
) -> Labels:
    """The conditions of the images of a folder.

    labels: "folders": the class is the first folder of an image's name; "metadata": the tables metadata.csv or
        metadata.jsonl in the folder and those below it; the path of one such table, whose names are relative to the
        images' folder; None: no classes.
    label_column: of a table; strings, or integers. By default "label", which may be absent where there are
        `cond_columns`.
    cond_columns: columns of numbers; with labels "folders" or None those of the metadata.

    Classes are sorted: names by their characters, as torchvision's ImageFolder has them, integers by value.

    Raises:
        ValueError: with file and line, images without a label, files and columns that are unknown, and cells that are
            empty or no number.
    """
    columns = _check_columns(cond_columns)
    if labels in (None, "folders") and label_column is not None:
        raise ValueError(f"label_column is for labels in a table, and labels is {labels!r}; got {label_column!r}")
    classes: tuple[tuple[str, ...], np.ndarray] | None = None
    if labels == "folders":
        classes = _classes_by_folder(paths)
    if labels in (None, "folders") and not columns:
        return Labels() if classes is None else Labels(*classes)
    tables = _tables(paths, labels)
    if labels not in (None, "folders"):
        label_column = _label_column(tables, label_column, bool(columns))
    cells = _cells_of_images(paths, tables, label_column, columns)
    if label_column is not None:
        classes = _classes_of(cells)
    cond = np.array([found.numbers for found in cells], np.float32) if columns else None
    names, numbers = classes or (None, None)
    return Labels(names, numbers, cond)


def find_partners(paths: PathSequence, others: PathSequence) -> PathSequence:
    """For each image the file of the other folder with the same relative name, or the same but for its ending.

    Raises:
        ValueError: an image has none, or two that differ in their endings.
    """
    names = set(others.names())
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
    found = bytearray()
    for name in paths.names():
        candidates = [name] if name in names else by_stem.get(os.path.splitext(name)[0], [])
        if not candidates:
            raise ValueError(f"cond_folder {others.root} has no image for {paths.root / name}")
        if len(candidates) > 1:
            raise ValueError(
                f"cond_folder {others.root} has {len(candidates)} images for {paths.root / name}: "
                f"{', '.join(sorted(candidates))}"
            )
        found += os.fsencode(candidates[0]) + b"\0"
    return PathSequence(others.root, found)


def _check_columns(columns: Sequence[str]) -> tuple[str, ...]:
    if isinstance(columns, str) or not all(isinstance(name, str) for name in columns):
        raise TypeError(f"cond_columns must be a sequence of column names; got {columns!r}")
    if len(set(columns)) != len(columns):
        raise ValueError(f"cond_columns must not name a column twice; got {list(columns)}")
    return tuple(columns)


def _classes_by_folder(paths: PathSequence) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and (N,) int64."""
    numbers: dict[str, int] = {}
    classes = np.empty(len(paths), np.int64)
    for index, name in enumerate(paths.names()):
        folder, separator, _ = name.partition(os.sep)
        if not separator:
            raise ValueError(
                f"labels='folders' takes the class from the first level of subfolders, and {paths.root / name} lies in "
                "none"
            )
        classes[index] = numbers.setdefault(folder, len(numbers))
    names = tuple(sorted(numbers))
    places = np.array([names.index(name) for name in numbers], np.int64)
    return names, places[classes]


def _tables(paths: PathSequence, labels: _LabelsFrom) -> list[tuple[Path, str]]:
    """The tables, and the folders relative to the images' that their names are relative to."""
    if labels not in (None, "folders", "metadata"):
        return [(Path(labels), "")]
    found = [name for name in paths.beside if os.path.basename(name) in METADATA_NAMES]
    folders = [os.path.dirname(name) for name in found]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"folder {paths.root / folder} holds {' and '.join(METADATA_NAMES)}; keep one of them")
    if not found:
        raise ValueError(f"folder {paths.root} holds no {' or '.join(METADATA_NAMES)}")
    return [(paths.root / name, folder) for name, folder in zip(found, folders, strict=True)]


def _label_column(tables: list[tuple[Path, str]], column: str | None, is_optional: bool) -> str | None:
    """The column of the labels; None where there is none and it need not be there."""
    if column is not None or not is_optional:
        return column or LABEL_COLUMN
    has_it = any(LABEL_COLUMN in row for path, _ in tables for _, row in rows_of(path))
    return LABEL_COLUMN if has_it else None


def _cells_of_images(
    paths: PathSequence, tables: list[tuple[Path, str]], label_column: str | None, columns: tuple[str, ...]
) -> list[_Cells]:
    """The cells of each image, in the order of the paths."""
    places = {name: index for index, name in enumerate(paths.names())}
    cells: list[_Cells | None] = [None] * len(places)
    for table, folder in tables:
        for where, row in rows_of(table):
            index = _index_of(paths, places, folder, row, where)
            if (earlier := cells[index]) is not None:
                raise ValueError(f"{where} names {row[FILE_COLUMN]!r}, which {earlier.where} names, too")
            label = None if label_column is None else _label(row, label_column, where)
            cells[index] = _Cells(where, label, tuple(_number(row, column, where) for column in columns))
    missing = [name for name, index in places.items() if cells[index] is None]
    if missing:
        more = f", nor {len(missing) - 1} other images" if len(missing) > 1 else ""
        raise ValueError(f"{paths.root / missing[0]} has no row in {tables[0][0]}{more}")
    return [found for found in cells if found is not None]


def rows_of(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where a row stands, and its cells by column.

    Raises:
        ValueError: with file and line, where the file is no table of its kind.
    """
    reader = _csv_rows if table.suffix.lower() == ".csv" else _json_rows
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            for line, row in reader(table, file):
                yield f"{table}, line {line},", row
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is no text in UTF-8: {error.reason} at byte {error.start}") from error


def _csv_rows(table: Path, file: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.reader(file)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise ValueError(f"{table} has a column twice in its header: {', '.join(header)}")
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{table}, line {reader.line_num}, has {len(row)} cells, and the header has {len(header)}"
                )
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{table}, line {reader.line_num}, is no CSV: {error}") from error


def _json_rows(table: Path, file: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{table}, line {line}, is no JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{table}, line {line}, must be a JSON object; it is a {type(row).__name__}")
        yield line, row


def _index_of(paths: PathSequence, places: dict[str, int], folder: str, row: Mapping[str, Any], where: str) -> int:
    """The index of the image that a row is of."""
    name = _cell(row, FILE_COLUMN, where)
    if not isinstance(name, str):
        raise ValueError(f"{where} has a {FILE_COLUMN} that is no text: {name!r}")
    relative = os.path.normpath(os.path.join(folder, name))
    if os.path.isabs(name):
        relative = os.path.relpath(name, paths.root)
    if relative not in places:
        reason = "is no image by its ending (exts)" if (paths.root / relative).is_file() else "does not exist"
        raise ValueError(f"{where} names {name!r}, and {paths.root / relative} {reason}")
    return places[relative]


def _label(row: Mapping[str, Any], column: str, where: str) -> int | str:
    label = _cell(row, column, where)
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise ValueError(f"{where} has a label that is neither text nor an integer: {label!r} (column {column!r})")
    return label


def _number(row: Mapping[str, Any], column: str, where: str) -> float:
    cell = _cell(row, column, where)
    try:
        number = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} has {cell!r} in column {column!r}, which is no finite number")
    return number


def _cell(row: Mapping[str, Any], column: str, where: str) -> Any:
    """The content of a cell, which must be there."""
    if column not in row:
        raise ValueError(f"{where} has no column {column!r}; it has {', '.join(map(str, row)) or 'none'}")
    if row[column] is None or row[column] == "":
        raise ValueError(f"{where} has nothing in column {column!r}")
    return row[column]


def _classes_of(cells: Sequence[_Cells]) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and (N,) int64."""
    first: dict[type, _Cells] = {}
    for found in cells:
        first.setdefault(type(found.label), found)
    if len(first) > 1:
        texts, integers = first[str], first[int]
        raise ValueError(
            f"labels must be all text or all integers: {texts.where} has {texts.label!r}, {integers.where} has "
            f"{integers.label!r}"
        )
    distinct = {found.label for found in cells}
    are_integers = int in first or all(_is_integer(str(label)) for label in distinct)  # a CSV file has text only
    ordered = sorted(distinct, key=int if are_integers else str)  # type: ignore[arg-type]
    numbers = {label: number for number, label in enumerate(ordered)}
    classes = np.fromiter((numbers[found.label] for found in cells), np.int64, len(cells))
    return tuple(map(str, ordered)), classes


def _is_integer(text: str) -> bool:
    """True if the text is how an integer is written, without leading zeros."""
    return re.fullmatch("0|-?[1-9][0-9]*", text) is not None
