"""Kernels of a step compiled several at a time: a step is run once in which launches only say what they would launch.

A first step otherwise compiles its kernels one after another, each when it is first launched: half a minute. Most of a
compilation runs without Python's lock, in LLVM and in ptxas.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ddpm_fast.runtime import triton_launch

_MOST_THREADS = 16


class _Argument:
    """Stands for a tensor as far as a kernel is compiled for it, and keeps no memory."""

    def __init__(self, tensor: torch.Tensor):
        self.dtype, self._offset = tensor.dtype, tensor.data_ptr() % 16

    def data_ptr(self) -> int:
        return self._offset

    @staticmethod
    def ptr_range() -> int:
        return 2**31 - 1  # of AMD's: whether 32 bits reach all of it; a larger tensor is compiled for when it comes


@contextlib.contextmanager
def compiling_ahead(threads: int | None = None) -> Iterator[None]:
    """Inside, launches of this package's Triton kernels compile them in threads; they do not run.

    What the block computes is undefined: undo it. Kernels that are compiled already cost nothing. Options of a launch
    are constants of the kernel and of the compiler.

    Raises (at the end of the block):
        what compiling a kernel raised.
    """
    jitted: Any = importlib.import_module("triton").JITFunction
    driver: Any = importlib.import_module("triton.runtime").driver
    run = jitted.run
    begun: dict[tuple, Future] = {}

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if warmup or not kernel.fn.__module__.startswith("ddpm_fast."):
            return run(kernel, *args, grid=grid, warmup=warmup, **options)
        key = (kernel.fn, *map(_kind, args, kernel.params), *options.items())
        if key not in begun:
            device = driver.active.get_current_device()
            _ = kernel.device_caches[device]  # made by one thread
            given = [_Argument(value) if isinstance(value, torch.Tensor) else value for value in args]
            begun[key] = pool.submit(_compile, run, device, kernel, given, options)
        return None

    workers = ThreadPoolExecutor(threads or min(_MOST_THREADS, count_processors()))
    with _parsing_one_at_a_time(jitted), workers as pool:
        jitted.run = compile_only
        try:
            yield
        finally:
            jitted.run = run
        for future in begun.values():
            future.result()


@contextlib.contextmanager
def _parsing_one_at_a_time(jitted: Any) -> Iterator[None]:
    """Python 3.11's parser may raise a SystemError where two threads parse: it loses count of its recursion."""
    owner = next(cls for cls in jitted.__mro__ if "parse" in vars(cls))
    parse, lock = owner.parse, threading.Lock()

    def locked(function: Any) -> Any:
        with lock:
            return parse(function)

    owner.parse = locked
    try:
        yield
    finally:
        owner.parse = parse


def count_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_possible(device: torch.device) -> bool:
    """Whether a step on a device launches kernels that can be compiled ahead."""
    return triton_launch.why_not_triton(device) is None and not triton_launch.interpreted()


def _compile(run: Any, device: Any, kernel: Any, args: list, options: dict[str, Any]) -> None:
    # A thread begins on device 0.
    with torch.cuda.device(device) if isinstance(device, int) else contextlib.nullcontext():
        run(kernel, *args, grid=(1,), warmup=True, **options)


def _kind(value: Any, parameter: Any) -> object:
    """What Triton compiles a kernel for, of an argument; arguments of several kinds may give one variant."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16
    if parameter.is_constexpr or value is None or type(value) is bool:
        return type(value), value
    if type(value) is float:
        return float
    width = value.bit_length() > 31, value.bit_length() > 63
    return width if parameter.do_not_specialize else (*width, value == 1, value % 16 == 0)
