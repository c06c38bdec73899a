"""Memory of a mapped file: pages that cannot be read raise, where touching them would end the process by a signal."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterable

import torch

_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14 and later
_UNREADABLE = (errno.EFAULT, errno.EIO, getattr(errno, "EHWPOISON", 133))
_GAP = 1 << 16  # bytes between ranges that are read rather than asked for apart


def read_pages(tensors: Iterable[torch.Tensor], file: str) -> None:
    """`read_memory` of the tensors on the CPU, their whole storages."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    read_memory([(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages if s.nbytes()], file)


def read_memory(ranges: Iterable[tuple[int, int]], file: str) -> None:
    """Have the system read the pages of ranges (start, end), which takes less time than one by one at their first use.

    Older systems than Linux 5.14 do nothing here.

    Raises:
        OSError: names the `file`; the disk cannot read a page, or the file has been cut off since it was mapped.
    """
    if not sys.platform.startswith("linux"):
        return
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in _joined(ranges):
        start -= start % mmap.PAGESIZE
        while advise(start, end - start, _POPULATE_READ) != 0:
            code = ctypes.get_errno()
            if code in _UNREADABLE:
                raise OSError(errno.EIO, f"could not read {file}: {os.strerror(errno.EIO)}")
            if code not in (errno.EINTR, errno.EAGAIN):
                return


def _joined(ranges: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The ranges in order, joined where little lies between."""
    found: list[list[int]] = []
    for start, end in sorted(set(ranges)):
        if found and start - found[-1][1] <= _GAP:
            found[-1][1] = max(end, found[-1][1])
        else:
            found.append([start, end])
    return found
