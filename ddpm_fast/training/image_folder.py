"""The image files of a folder: found in one fixed order, kept as one block of bytes instead of a million objects."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from ddpm_fast.runtime.extras import needed_for

with needed_for("reading and writing images"):
    import numpy as np


class PathSequence(Sequence[Path]):
    """Paths below `root` as an immutable sequence of `Path`, in about 45 bytes each.

    names: their names relative to `root`, each ended by a NUL byte, which no name holds.
    beside: names of other files that were asked for.
    """

    def __init__(self, root: Path, names: bytes | bytearray, beside: Sequence[str] = ()):
        self.root = root
        self.beside = list(beside)
        self._names = names
        self._ends = np.flatnonzero(np.frombuffer(names, np.uint8) == 0)  # (N,) int64

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        start = self._ends[index - 1] + 1 if index else 0
        return self.root / os.fsdecode(bytes(self._names[start : self._ends[index]]))

    def names(self) -> Iterator[str]:
        """The paths relative to `root`."""
        return map(os.fsdecode, bytes(self._names).split(b"\0")[:-1])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list

    def __repr__(self) -> str:
        return f"<{len(self)} paths below {self.root}>"


def find_images(folder: str | os.PathLike, exts: Sequence[str], beside: Sequence[str] = ()) -> PathSequence:
    """Sorted paths under `folder` whose names end in one of `exts`, upper or lower case.

    Linked folders are followed, each real folder once. What has another ending is counted in one warning. Files whose
    names without folders are among `beside` are no images, and are the result's `beside`.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: the folder cannot be read.
        ValueError: it holds no images.
        TypeError, ValueError: `exts` are no endings.
    """
    endings = _endings(exts)
    root = _check_folder(folder)
    names, left_out, found = bytearray(), Counter[str](), []
    for name in _files_below(root):
        if os.path.basename(name) in beside:
            found.append(name)
        elif name.lower().endswith(endings):
            names += os.fsencode(name) + b"\0"
        else:
            left_out[os.path.splitext(name)[1].lower() or "no ending"] += 1
    if not names:
        others = f"; it holds {_counted(left_out)}" if left_out else ""
        raise ValueError(f"folder {folder} holds no images; file names must end in one of {', '.join(endings)}{others}")
    if left_out:
        warnings.warn(
            f"folder {folder}: left out {_counted(left_out)}; images are files that end in {', '.join(endings)} (exts)",
            stacklevel=3,
        )
    return PathSequence(root, names, found)


def _endings(exts: Sequence[str]) -> tuple[str, ...]:
    """('.jpg', ...) from names with or without a dot."""
    if isinstance(exts, str) or not all(isinstance(ext, str) for ext in exts):
        raise TypeError(f"exts must be a sequence of file name endings such as ['png']; got {exts!r}")
    endings = tuple(f".{ext.lower().lstrip('.')}" for ext in exts)
    if not endings or "." in endings:
        raise ValueError(f"exts must hold one file name ending or more, none of them empty; got {exts!r}")
    return endings


def _check_folder(folder: str | os.PathLike) -> Path:
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"folder {folder} does not exist; it must be a folder of images")
    if not root.is_dir():
        raise NotADirectoryError(f"folder {folder} is a file; it must be a folder of images")
    if not os.access(root, os.R_OK | os.X_OK):
        raise PermissionError(f"folder {folder} may not be read by this user")
    return root


def _files_below(root: Path) -> Iterator[str]:
    """Names of the files below `root` relative to it, in the order of sorted `Path` objects.

    A link to a folder inside `root` or to a folder around itself adds nothing, so it is not followed.
    """
    real_root = os.path.realpath(root)
    seen = {_identity(root)}
    stack = [(*_listing(str(root)), "", real_root)]
    while stack:
        names, folders, prefix, real_folder = stack[-1]
        name = next(names, None)
        if name is None:
            stack.pop()
            continue
        if name not in folders:
            yield prefix + name
            continue
        path = os.path.join(root, prefix, name)
        real_path = os.path.join(real_folder, name)
        if os.path.islink(path):
            real_path = os.path.realpath(path)
            if _is_inside(real_path, real_root) or _is_inside(real_folder, real_path):
                continue
        if (identity := _identity(path)) not in seen:
            seen.add(identity)
            stack.append((*_listing(path), os.path.join(prefix, name, ""), real_path))


def _listing(folder: str) -> tuple[Iterator[str], set[str]]:
    """Sorted names of files and folders in a folder, and which are folders; pipes, sockets and devices are neither."""
    files, folders = [], set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_folder(entry):
                    folders.add(entry.name)
                elif _is_file(entry):
                    files.append(entry.name)
    except OSError as error:
        warnings.warn(f"skipped a folder that cannot be read: {folder} ({error.strerror})", stacklevel=2)
    return iter(sorted([*files, *folders])), folders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _is_file(entry: os.DirEntry[str]) -> bool:
    """True for files, and for links to files or to nothing: these are named as broken when they are read."""
    if not entry.is_symlink():
        return entry.is_file(follow_symlinks=False)
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)


def _identity(folder: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_inside(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


def _counted(endings: Counter[str]) -> str:
    """'12 other files (10 .txt, 2 .gif)'."""
    common = [f"{count} {ending}" for ending, count in endings.most_common(5)]
    more = len(endings) - len(common)
    return f"{endings.total()} other files ({', '.join(common)}{f', {more} more endings' if more else ''})"
