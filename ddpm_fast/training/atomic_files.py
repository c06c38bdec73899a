"""Files that are either the whole old version or the whole new one, whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

_names_being_written: set[str] = set()

# What fsync says on file systems that cannot do it, such as network shares and FUSE.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
# A folder may also be writable and not readable: then it cannot be opened to be synced.
_NO_FOLDER_SYNC = _NO_SYNC | {errno.EACCES, errno.EPERM}


class _Sink:
    """Binary file that keeps its first `OSError` and swallows the rest.

    `torch.save` writes from C++, which aborts the process when a write raises half-way through an archive.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write bytes; returns how many the caller may regard as written."""
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing to do: `write_atomically` flushes and syncs once, at the end."""


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """`open_atomically` for writers in C++: the file takes writes only, and the first error is raised at the end."""
    with open_atomically(path) as file:
        sink = _Sink(file)
        yield cast(BinaryIO, sink)  # as far as the writers here are concerned: write and flush
        if sink.error is not None:
            raise sink.error


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open `path` for binary writing; the file appears (or replaces the earlier one) only when the block ends well.

    Writes to a temporary file in the same folder, flushes, syncs, renames, and syncs the folder; a file system that
    cannot sync is written without. Until the renaming, a failure removes the temporary file and leaves an earlier file
    at `path` as it was.

    Raises:
        OSError: with the file and the reason.
    """
    path = Path(path)
    _remove_stale(path)
    temporary = path.with_name(f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}.tmp")
    _names_being_written.add(temporary.name)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            _sync(file.fileno(), _NO_SYNC)
        os.replace(temporary, path)
    except OSError as error:
        kept = "; the earlier file there is untouched" if os.path.isfile(path) else ""
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}{kept}") from error
    finally:
        with contextlib.suppress(NotADirectoryError):  # the folder is a file, and nothing was written
            temporary.unlink(missing_ok=True)
        _names_being_written.discard(temporary.name)
    try:
        _sync_folder(path.parent)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} is written, but a power failure may undo that: its folder could not be synced "
            f"({error.strerror or error})",
        ) from error


def make_folder(path: str | os.PathLike, name: str = "folder") -> None:
    """Make a folder and those that it is in; NotADirectoryError, with the argument's name, where one is a file."""
    path = Path(path)
    for place in (path, *path.parents):
        if place.is_file():
            raise NotADirectoryError(f"{name} {path} cannot be made: {place} is a file; it must be a folder")
    path.mkdir(parents=True, exist_ok=True)


def _prefix(path: Path) -> str:
    return f".{path.name}.{socket.gethostname()}-"


def _remove_stale(path: Path) -> None:
    """Remove the temporary files of saves to `path` that a kill or a crash on this machine has ended."""
    prefix = _prefix(path)
    for leftover in path.parent.glob(".*.tmp"):
        if not leftover.name.startswith(prefix):
            continue
        process = leftover.name[len(prefix) :].split("-")[0]
        if process.isdigit() and not _is_being_written(int(process), leftover.name):
            with contextlib.suppress(PermissionError):  # another user's; it is in nobody's way
                leftover.unlink(missing_ok=True)


def _is_being_written(process: int, name: str) -> bool:
    if process == os.getpid():
        return name in _names_being_written
    if os.name != "posix":  # there os.kill ends the process, whatever the signal
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(descriptor: int, unsupported: set[int]) -> None:
    """`os.fsync`; nothing where the file system says with one of these numbers that it cannot."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in unsupported:
            raise


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where folders can be opened and synced."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
        return
    try:
        _sync(descriptor, _NO_FOLDER_SYNC)
    finally:
        os.close(descriptor)
