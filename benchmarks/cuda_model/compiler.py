"""Compiles kernel variants into Triton's cache in worker processes; a later launch loads them from there.

`triton.compile` gets the same arguments as at a launch, so the cache key is the same. If a worker dies, its variant
fails and a new worker replaces it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import re
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from cuda_model.driver import Variant

_OPS = (
    "norm_silu", "norm_linear", "linear_attention", "linear_attention_block", "attention", "forward_diffusion",
    "variational_bound",
)  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """The result of compiling a variant.

    Args:
        seconds: the time of the compilation, or of the look-up in the cache.
        registers: per thread.
        spills: bytes of local memory per thread.
        cached: True if the variant was in the cache before.
        error: one line; None if the variant compiled.
    """

    kernel: str
    seconds: float
    registers: int | None = None
    spills: int | None = None
    cached: bool = False
    error: str | None = None


def compile_variant(variant: Variant, target: GPUTarget) -> Compiled:
    """Compile a variant in this process, or find it in the cache."""
    hits: list[bool] = []
    began = time.perf_counter()
    try:
        kernel = getattr(importlib.import_module(variant.module), variant.kernel)
        source = ASTSource(kernel, variant.signature, variant.constants, variant.attrs)
        with mock.patch.object(knobs.compilation, "listener", lambda *, cache_hit, **_: hits.append(cache_hit)):
            compiled = triton.compile(source, target=target, options=variant.options)
        seconds = time.perf_counter() - began
        registers, spills = resources(compiled)
    except Exception as error:  # any error of the compiler fails this variant only, and is reported
        return Compiled(variant.kernel, time.perf_counter() - began, error=in_one_line(error))
    return Compiled(variant.kernel, seconds, registers, spills, cached=hits[0])


def in_one_line(error: BaseException) -> str:
    """An error and its causes. A long text keeps its two ends: between them Triton prints the kernel's source."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    sentences = (" ".join(f"{type(cause).__name__}: {cause}".split()) for cause in causes)
    return "; ".join(s if len(s) <= 400 else f"{s[:100]} ... {s[-300:]}" for s in sentences)


def resources(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers, and bytes of local memory, per thread."""
    cubin = next(Path(file) for name, file in compiled.metadata_group.items() if name.endswith(".cubin"))
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = printed.stdout + printed.stderr
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


class Pool:
    """Worker processes that compile variants in the order of `submit`; `finished` yields results in any order.

    Use it as a context manager: leaving it kills the workers, busy or not.
    """

    def __init__(self, processes: int, target: GPUTarget):
        # A server forks the workers: it imports the kernels once, and has no threads that a fork would break.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["triton.compiler", *(f"ddpm_fast.ops.{op}.triton" for op in _OPS)])
        self.target = target
        self._waiting: deque[Variant] = deque()
        self._workers = [_Worker(self._context, target) for _ in range(processes)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error) -> None:
        for worker in self._workers:
            worker.end()

    @property
    def unfinished(self) -> list[Variant]:
        """The variants in the workers, then those in the queue."""
        return [worker.variant for worker in self._workers if worker.variant] + list(self._waiting)

    def submit(self, variant: Variant) -> None:
        """Queue a variant."""
        self._waiting.append(variant)
        self._hand_out()

    def finished(self, seconds: float) -> Iterator[Compiled]:
        """Results, after at most `seconds` of waiting."""
        busy = [worker for worker in self._workers if worker.variant]
        # The connection of a dead worker is ready too.
        ready = wait([worker.connection for worker in busy], seconds) if busy else []
        for worker in busy:
            if worker.connection in ready:
                yield worker.receive()
                if not worker.process.is_alive():
                    worker.end()
                    self._workers[self._workers.index(worker)] = _Worker(self._context, self.target)
        self._hand_out()

    def _hand_out(self) -> None:
        for worker in self._workers:
            if self._waiting and worker.variant is None:
                worker.send(self._waiting.popleft())


class _Worker:
    """A worker process and the variant that it compiles; None if it is idle."""

    def __init__(self, context: multiprocessing.context.BaseContext, target: GPUTarget):
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, target, knobs.cache.dir), daemon=True)
        self.process.start()
        other.close()
        self.variant: Variant | None = None

    def send(self, variant: Variant) -> None:
        self.variant, self._since = variant, time.perf_counter()
        try:
            self.connection.send(variant)
        except BrokenPipeError:
            return  # the process has died; `receive` reports this

    def receive(self) -> Compiled:
        variant, self.variant = self.variant, None
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            error = f"the compiling process ended with exit code {self.process.exitcode}"
            return Compiled(variant.kernel, time.perf_counter() - self._since, error=error)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _work(connection: Connection, target: GPUTarget, cache: str) -> None:
    knobs.cache.dir = cache  # the fork server's environment dates from its start
    while True:
        try:
            variant = connection.recv()
        except EOFError:  # the pool has ended
            return
        connection.send(compile_variant(variant, target))
