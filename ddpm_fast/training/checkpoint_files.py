"""Files of checkpoints: written whole or not at all, read without running code, found by name."""

from __future__ import annotations

import errno
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.runtime.mapped_files import read_pages
from ddpm_fast.runtime.plain import as_int
from ddpm_fast.runtime.tensor_sums import byte_sum, tensors_in
from ddpm_fast.training.atomic_files import write_atomically
from ddpm_fast.training.numpy_pickles import STAND_INS, without_arrays

_Path = str | os.PathLike

# The entry of a file with the sums of its weights and moments.
_SUMS, _SUMMED = "sums", ("model", "ema", "opt")

# What torch raises on the contents of a file; what is missing on the machine (a module, memory) is none of these.
_LOADING_ERRORS = (
    RuntimeError,
    EOFError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    TypeError,
    ValueError,
    struct.error,
)


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or belongs to another architecture."""


def save_atomically(obj: object, path: _Path) -> None:
    """`torch.save` that never leaves a partial file and never loses the earlier one; OSError says what went wrong."""
    with write_atomically(path) as file:
        torch.save(obj, file)


def save_with_sums(contents: Mapping[str, Any], path: _Path) -> None:
    """`save_atomically` of a checkpoint, with the sums of its tensors, which `load_checked` compares."""
    save_atomically({**contents, _SUMS: {name: byte_sum(contents[name]) for name in _SUMMED}}, path)


def load_file(path: _Path, map_location: torch.device | str = "cpu", mmap: bool = False) -> Any:
    """`torch.load(weights_only=True)` with one sentence for each way it can fail; numpy's scalars become Python's.

    Raises:
        FileNotFoundError, OSError: there is no such file, or it cannot be read.
        CheckpointError: it is truncated or damaged, no checkpoint, or holds code.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} is a folder; it must be a file such as model-1.pt")
    is_archive = _check_container(path)
    try:
        return _load(path, map_location, mmap and is_archive)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:Unsupported|GLOBAL) (?:global: GLOBAL )?(\S+)", str(error))
        if refused is None and _is_damaged(path):
            raise CheckpointError(f"checkpoint {path} is damaged: its checksums do not agree") from error
        what = f"it refers to {refused.group(1)}" if refused else "it is not a pickle of tensors"
        raise CheckpointError(
            f"checkpoint {path} was not loaded: {what}, and only plain data and tensors are"
        ) from error
    except OSError as error:
        raise OSError(error.errno, f"could not read checkpoint {path}: {error.strerror or error}") from error
    except _LOADING_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = "is damaged" if _is_damaged(path) else "could not be loaded"
        raise CheckpointError(f"checkpoint {path} {what}: {reason}") from error


def load_checked(path: _Path, *, with_moments: bool = False) -> Any:
    """`load_file` of a checkpoint whose tensors the caller copies: mapped where that can be, its tensors as written.

    Mapped, moments that nobody wants are not read and not compared, which saves more time than the rest takes. It
    raises what `load_file` does, and OSError where the disk cannot read a page of what is wanted.

    Args:
        with_moments: the caller copies the optimizer's state, too.
    """
    contents = load_file(path, mmap=True)
    is_whole = with_moments or not isinstance(contents, Mapping)
    wanted = contents if is_whole else {name: contents[name] for name in contents if name != "opt"}
    read_pages(tensors_in(wanted), f"checkpoint {path}")
    # Other sums alone are no damage: a program may have written other tensors into the dictionary that it read.
    if _is_damaged(Path(path), "data.pkl") or (not _has_its_sums(wanted) and _is_damaged(Path(path))):
        raise CheckpointError(f"checkpoint {path} is damaged: its checksums do not agree")
    return contents


def _has_its_sums(wanted: Any) -> bool:
    """False if a file records other sums than its tensors have; files of other programs record none."""
    recorded = wanted.get(_SUMS) if isinstance(wanted, Mapping) else None
    if not isinstance(recorded, Mapping):
        return True
    return all(byte_sum(wanted[name]) == recorded[name] for name in _SUMMED if name in wanted and name in recorded)


def _load(path: Path, map_location: torch.device | str, mmap: bool) -> Any:
    """`torch.load` of plain data and tensors, again with stand-ins for numpy's scalars if there are any."""
    options: dict[str, Any] = {"map_location": map_location, "weights_only": True}
    try:
        return torch.load(path, mmap=mmap, **options)
    except RuntimeError as error:
        if not mmap or "mmap" not in str(error):
            raise
        return _load(path, map_location, mmap=False)  # the file system maps no files
    except pickle.UnpicklingError as error:
        if "numpy." not in str(error):
            raise
    with torch.serialization.safe_globals(STAND_INS):
        return without_arrays(torch.load(path, **options))


def _check_container(path: Path) -> bool:
    """True for an archive, False for an old pickle; a truncated archive and a foreign file are told apart here."""
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        raise CheckpointError(f"checkpoint {path} is empty")
    if start[:2] == b"PK":
        try:
            has_end = zipfile.is_zipfile(path)
        except zipfile.BadZipFile as error:
            raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error
        if not has_end:
            raise CheckpointError(f"checkpoint {path} is truncated: the end of the archive is missing")
        return True
    if start[:1] != b"\x80":
        raise CheckpointError(f"checkpoint {path} is not a PyTorch file")
    return False


def _is_damaged(path: Path, member: str = "") -> bool:
    """True if the checksums of an archive do not agree, or its table of contents is senseless; an old pickle has none.

    Args:
        member: only what ends in this name is read.

    Raises:
        OSError: the file cannot be read.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            archive.filelist = [info for info in archive.filelist if info.filename.endswith(member)]
            return archive.testzip() is not None
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the file's beginning
            raise
        return True
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OverflowError, struct.error):
        return True


def find_file(name: int | str | os.PathLike, folder: _Path) -> Path:
    """The file of a milestone (1, "last"), a file name in a results folder (model-1.pt), or a path.

    A path that is absolute or begins with a dot is that file; anything else is looked for in the folder and here.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: two files fit.
    """
    folder = Path(folder)
    if not isinstance(name, (str, os.PathLike)):
        candidates = [folder / f"model-{as_int('milestone', name)}.pt"]
    elif os.path.isabs(name) or str(name).startswith("."):
        candidates = [Path(name)]
    else:
        is_milestone = Path(name).name == str(name) and Path(name).suffix != ".pt"
        milestone = [folder / f"model-{name}.pt", folder / f"{name}.pt"] if is_milestone else []
        candidates = [*milestone, folder / name, Path(name)]
        if not is_milestone:
            candidates.reverse()
    return one_file(name, candidates)


def one_file(name: object, candidates: Sequence[Path]) -> Path:
    """The candidate that is a file; FileNotFoundError names the first one, CheckpointError two that both are."""
    found: list[Path] = []
    for path in candidates:
        if path.is_file() and not any(path.samefile(other) for other in found):
            found.append(path)
    if len(found) > 1:
        raise CheckpointError(f"checkpoint {str(name)!r} may be {found[0]} or {found[1]}; give the whole path of one")
    if not found:
        folder = next((path for path in candidates if path.is_dir()), None)
        return candidates[0] if folder is None else folder  # load_file says what is wrong with it
    return found[0]


def find_latest(folder: _Path) -> tuple[Path, int] | None:
    """(path, step) of the checkpoint with the largest step in a results folder, or None.

    A damaged file or one without a step is skipped with a warning.

    Raises:
        OSError: a file cannot be read.
    """
    found = []
    for path in sorted(Path(folder).glob("model-*.pt")):
        try:
            contents = load_file(path, mmap=True)
            has_step = isinstance(contents, dict) and contents.get("step") is not None
            if not has_step or (isinstance(contents["step"], torch.Tensor) and "model" not in contents):
                raise CheckpointError("it has no step, so it is no trainer's file")
            found.append((step_of(contents, path), path))
        except CheckpointError as error:
            warnings.warn(f"skipped {path}: {error}", stacklevel=2)
    if not found:
        return None
    step, path = max(found)
    return path, step


def step_of(contents: Mapping, path: _Path) -> int:
    """The step of a trainer's file, `global_step` of Lightning's, or 0."""
    has_step = not isinstance(contents.get("step"), (torch.Tensor, type(None))) or "model" in contents
    step = contents.get("step" if has_step else "global_step")
    try:
        return 0 if step is None else as_int("step", step, 0)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} has no usable step: {error}") from error
