"""Recorders that count, layers that no capture accepts, and a stand-in for torch's CUDA state in captures."""

from __future__ import annotations

import gc
import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast.runtime.recording import CudaRecorder, EagerRecorder, TapeRecorder


class FrozenRecorder(EagerRecorder):
    """Warm-ups and frozen decisions of the host as in a capture, and a count of recordings."""

    freezes_decisions = needs_capturable = True
    recorded = 0

    def record(self, body, reset):
        FrozenRecorder.recorded += 1
        with torch.random.fork_rng([]):
            for _ in range(2):
                reset()
                body()
            reset()
        return body


class CountedTape(TapeRecorder):
    recorded = 0

    def record(self, body, reset):
        CountedTape.recorded += 1
        return super().record(body, reset)


class PretendedCudaRecorder(CudaRecorder):
    """CudaRecorder on the CPU, inside of `PretendedCuda`; a replay is a call of the body."""

    @staticmethod
    def why_not(device):
        return None

    def record(self, body, reset):
        def call():
            body()

        call.graph = super().record(body, reset).__self__  # type: ignore[attr-defined]  # lives as long as what replays it
        return call


class Waits(torch.nn.Conv2d):
    """Reads a value in forward, which no capture accepts."""

    def forward(self, x):
        assert x.sum().item() != 12345
        return super().forward(x)


class WaitsInBackward(torch.nn.Conv2d):
    """Reads a value in backward, which no capture accepts."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 if grad.sum().item() < 12345 else 2)

    def forward(self, x):
        return super().forward(self.Function.apply(x))


class PretendedCuda:
    """The state of captures that torch's C++ keeps outside a graph: stream, generator, memory pools.

    After CUDAGraph.cpp, CUDAGeneratorImpl.cpp and CUDACachingAllocator.cpp. The state that `capture_end` leaves if
    cudaStreamEndCapture fails depends on the release, (2, 11), (2, 13) or (2, 14). Nothing runs inside of a capture:
    operators see fake tensors, and one that reads a value fails and spoils the capture.
    """

    def __init__(self, release: tuple[int, int]):
        self.release = release
        self.stream = self.default_stream = Stream(None)
        self.capture: Graph | None = None
        # The generator: one flag for all captures before torch 2.13, a state for each from then on.
        self.generator_captures, self.offset = False, 0
        self.recording_pools: list[tuple[int, int]] = []
        self.pool_users: dict[tuple[int, int], int] = {}
        self._pools = itertools.count(1)

    def install(self, patch) -> None:
        """Put it in the place of torch's functions, by pytest's monkeypatch."""
        cuda = self

        class BoundGraph(Graph):
            def __init__(self):
                super().__init__(cuda)

        replaced = {
            "CUDAGraph": BoundGraph,
            "Stream": Stream,
            "stream": lambda of: ReturningStream(self, of),
            "current_stream": lambda device=None: self.stream,
            "current_device": lambda: 0,
            "device": lambda device: nullcontext(),
            "graph_pool_handle": self.new_pool,
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "get_rng_state": lambda device: self.offset,
            "set_rng_state": lambda offset, device: setattr(self, "offset", offset),
        }
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate_to_pool, raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", self.release_pool, raising=False)
        patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        patch.setattr(torch, "__version__", torch.torch_version.TorchVersion(".".join(map(str, (*self.release, 0)))))

    def new_pool(self) -> tuple[int, int]:
        return (0, next(self._pools))

    def begin_allocate_to_pool(self, pool: tuple[int, int]) -> None:
        if pool in self.recording_pools:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        if self.pool_users.get(pool) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.pool_users[pool] = self.pool_users.get(pool, 0) + 1
        self.recording_pools.append(pool)

    def end_allocate_to_pool(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.recording_pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording_pools.remove(pool)

    def release_pool(self, device: int, pool: tuple[int, int]) -> None:
        self.pool_users[pool] -= 1
        assert self.pool_users[pool] >= 0, "uc >= 0 INTERNAL ASSERT FAILED"

    def draw(self) -> None:
        """A random number's use of the default generator: CUDAGeneratorState::increase."""
        if self.capture is None and self.generator_captures:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.offset += self.capture is None

    def left_behind(self) -> dict:
        """The parts of the state that differ from before any capture; empty if none does."""
        gc.collect()  # of replays, which hold their bodies here
        found = {
            "stream": self.stream is not self.default_stream,
            "capture": self.capture is not None,
            "generator": self.generator_captures,
            "recording": bool(self.recording_pools),
            "memory": any(self.pool_users.values()),
        }
        return {name: is_left for name, is_left in found.items() if is_left}


class Stream:
    def __init__(self, device):
        self.device_index = 0

    def wait_stream(self, other) -> None:
        pass


class ReturningStream:
    """torch.cuda.stream: the block's stream, and the one before after its end."""

    def __init__(self, cuda: PretendedCuda, stream: Stream):
        self.cuda, self.inside = cuda, stream

    def __enter__(self):
        self.before, self.cuda.stream = self.cuda.stream, self.inside

    def __exit__(self, *error):
        self.cuda.stream = self.before


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, cuda: PretendedCuda):
        self.cuda, self.is_spoilt, self.has_ended = cuda, False, False
        self.pool: Any = None

    def capture_begin(self, pool=None, capture_error_mode="global", **options) -> None:
        cuda = self.cuda
        assert cuda.stream is not cuda.default_stream, "CUDA graphs must be captured on a non-default stream."
        cuda.generator_captures = cuda.release < (2, 13)
        self.pool = pool or cuda.new_pool()
        cuda.begin_allocate_to_pool(self.pool)
        cuda.capture = self
        self._modes = [FakeTensorMode(allow_non_fake_inputs=True), Operators(cuda)]
        for mode in self._modes:
            mode.__enter__()

    def capture_end(self) -> None:
        cuda = self.cuda
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)
        cuda.capture = None
        if cuda.release >= (2, 13):
            cuda.end_allocate_to_pool(0, self.pool)
        if self.is_spoilt:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        if cuda.release < (2, 13):
            cuda.end_allocate_to_pool(0, self.pool)
        cuda.generator_captures = False
        self.has_ended = True

    def reset(self) -> None:
        if self.has_ended or (self.pool is not None and self.cuda.release >= (2, 14)):
            self.cuda.release_pool(0, self.pool)
        self.pool, self.has_ended = None, False

    __del__ = reset

    def replay(self) -> None:
        raise AssertionError("PretendedCudaRecorder calls the body instead")


def as_torchs_own(function):
    """Let a function's frame count as one of torch's files, where an error of an operator has no frame of Python's."""
    function.__code__ = function.__code__.replace(co_filename=f"{Path(torch.__file__).parent}/{Path(__file__).name}")
    return function


class Operators(TorchDispatchMode):
    """Sees operators: those that draw numbers, and in a capture those that a capture does not take."""

    def __init__(self, cuda: PretendedCuda):
        super().__init__()
        self.cuda = cuda

    @as_torchs_own
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        capture = self.cuda.capture
        if capture is not None and capture.is_spoilt:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        if capture is not None and func is torch.ops.aten._local_scalar_dense.default:
            capture.is_spoilt = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with DSA.")
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.cuda.draw()
        return func(*args, **(kwargs or {}))


def bytes_in_pools() -> int:
    """Device memory in the pools of graphs."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    return sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0))
