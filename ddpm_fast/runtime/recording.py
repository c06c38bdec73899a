"""Work that is recorded once and replayed: how, when a recording may replace a model's calls, and how many are kept.

A body is a function without arguments that acts on tensors made before it: they are all that it reads and writes, so
that a replay does what a call would. `CudaRecorder` captures a body as a CUDA graph; `TapeRecorder` writes down the
operators that it calls on the CPU, which a replay calls without Python; `EagerRecorder` calls the body again.
"""

from __future__ import annotations

import inspect
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast.runtime import dispatch, extension, measured

_WARM_UPS = 2  # calls before a capture: libraries choose their algorithms and kernels compile in the first

Body = Callable[[], None]


class CaptureError(RuntimeError):
    """A body that CUDA cannot capture, such as one that waits for the device."""


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device on which everything is captured: cuBLAS keeps tens of MB for each that it has seen."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Captures bodies on one device. They share one memory pool: nothing made inside a body outlives its replay."""

    what = "a CUDA graph"
    # Whether a recording is kept for the next run, since it takes long to make.
    is_kept = True
    # The host's decisions while a body runs are made once, for every replay.
    freezes_decisions = True
    # Whether the first call of a recording runs the body itself and records it.
    records_calls = False
    # Whether an optimizer has to count its steps on the device.
    needs_capturable = True

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = _capture_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        """Why nothing can be captured on a device now, in one clause; None where it can."""
        if device.type != "cuda":
            return f"tensors are on {device.type}, and CUDA graphs need CUDA"
        if torch.cuda.is_current_stream_capturing():
            return "a capture is running already"
        return None

    def record(self, body: Body, reset: Body) -> Body:
        """The body as a CUDA graph; calling the result replays it on the current stream, without waiting.

        Args:
            body: what to capture. It runs a few times first, on a stream of its own, and before those once without
                its Triton kernels, which compile in parallel meanwhile.
            reset: undoes what the body did; called before every one of those runs and before the capture.

        Raises:
            CaptureError: the body cannot be captured: it waits for the device, for example; the message says where.
                Stream, device, generator and memory are as they were, and the next body may be recorded.
        """
        from ddpm_fast.runtime import compile_ahead  # not part of importing the package

        # The stream is set again at the end: torch's capture leaves its own one on when it fails.
        here = torch.cuda.stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), here, torch.random.fork_rng([self.device], device_type="cuda"):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                if compile_ahead.is_possible(self.device):
                    with compile_ahead.compiling_ahead(), measured.stage(measured.COMPILE):
                        reset()
                        body()
                with measured.stage(measured.MEASURE):
                    for _ in range(_WARM_UPS):
                        reset()
                        body()
                reset()
            torch.cuda.current_stream().wait_stream(self._stream)
            with measured.stage(measured.LOOK_UP):
                return self._capture(body).replay

    def _capture(self, body: Body) -> torch.cuda.CUDAGraph:
        """One call of the body, captured and not run."""
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls count: a loader that pins memory in another must not spoil the capture.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        has_begun, failure = False, None
        try:
            with capture:
                has_begun = True
                try:
                    body()
                except BaseException as error:
                    failure = error
                    raise
        except BaseException as error:
            if has_begun:
                # A body that raises ends its capture in order, unless CUDA had already given the capture up.
                self._forget(graph, is_ended=error is failure)
                error = failure or error
            if not has_begun or not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
                raise error
            reason = str(error).partition("\n")[0]
            raise CaptureError(
                f"{_place_of(error)} cannot be captured into a CUDA graph: {reason}; graph=False runs without one"
            ) from error
        finally:
            failure = None  # its traceback holds this frame, and the body's tensors with it
        return graph

    def _forget(self, graph: torch.cuda.CUDAGraph, *, is_ended: bool) -> None:
        """Undo a capture that failed; nothing is captured into its pool again.

        Where cudaStreamEndCapture fails, `CUDAGraph::capture_end` throws: before torch 2.13 the allocator goes on
        recording into the pool and the generator stays in capture mode, before 2.14 the pool is never released.
        """
        graph.reset()
        pool, self._pool = self._pool, torch.cuda.graph_pool_handle()
        if is_ended:
            return
        device = torch.cuda.current_device()
        if torch.__version__ < (2, 13):  # type: ignore[operator]  # a TorchVersion compares with tuples
            torch._C._cuda_endAllocateToPool(device, pool)
        if torch.__version__ < (2, 14):  # type: ignore[operator]
            torch._C._cuda_releasePool(device, pool)
        # A capture that succeeds, of one small kernel, takes the generator out of capture mode.
        number, whole = torch.zeros((), device=self.device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(whole, stream=self._stream, capture_error_mode="thread_local"):
            number.zero_()


def _place_of(error: BaseException) -> str:
    """The line that raised an error, the innermost outside of torch's own files."""
    torch_files = str(Path(torch.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    frame = [f for f in frames if not f.filename.startswith(torch_files)][-1]
    return f"`{frame.line}` in {frame.name} ({Path(frame.filename).name}, line {frame.lineno})"


class TapeRecorder:
    """Records bodies on the CPU, where the calls of operators from Python are most of a small network's time."""

    what = "a tape of operator calls"
    is_kept = False
    freezes_decisions = True
    records_calls = True
    needs_capturable = False

    def __init__(self, device: torch.device):
        self.device = device

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        """See `CudaRecorder.why_not`."""
        if device.type != "cpu":
            return f"tensors are on {device.type}, and tapes are for the CPU"
        return extension.why_not(device)

    def record(self, body: Body, reset: Body) -> Body:
        """See `CudaRecorder.record`; the first call runs the body and records it, so no run is wasted.

        Raises (that call):
            CaptureError: the body reads a value of a tensor, which a replay would not read again, or makes a tensor
                without an operator. The body has stopped there.
        """
        tape: Any = None
        unrecorded: Body | None = body  # not kept once it is recorded, nor what it refers to

        def run() -> None:
            nonlocal tape, unrecorded
            if tape is not None:
                tape.replay()
                return
            module = extension.load()
            assert module is not None and unrecorded is not None, "why_not has refused"
            written = module.Tape()
            with _RecordingMode(written):
                unrecorded()
            written.finish()
            tape, unrecorded = written, None

        return run


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """For bodies whose tensors were made outside of inference mode: inside, torch.no_grad is in its place.

    In inference mode a tape sees operators before they are taken apart. Autocast is past then, and does not reach what
    they are made of: einsum multiplies float32 by bfloat16, and raises.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


class _RecordingMode(TorchDispatchMode):
    """Every operator that is called in the block, below autograd and autocast, goes to the tape as well."""

    def __init__(self, tape: Any):
        super().__init__()
        self._tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch imports torch.compile, 1.2 s, to skip a mode, and a model that is compiled is not recorded."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        try:
            self._tape.append(func._schema.name, func._schema.overload_name, args, kwargs, returned)
        except RuntimeError as error:  # the tape's own refusal: the operator has returned
            raise CaptureError(str(error).partition("\n")[0]) from error
        return returned


class EagerRecorder:
    """The same interface without a capture: the recording is the body itself."""

    what = "the step itself"
    is_kept = True
    freezes_decisions = False
    records_calls = False
    needs_capturable = False

    def __init__(self, device: torch.device):
        self.device = device

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        """See `CudaRecorder.why_not`; there is always a way to call a function."""
        return None

    def record(self, body: Body, reset: Body) -> Body:
        """See `CudaRecorder.record`."""
        return body


def recorder_on(device: torch.device) -> Any:
    """The class of the recorder for a device."""
    return TapeRecorder if device.type == "cpu" else CudaRecorder


class GraphCache:
    """The few most recently used recordings of one model; all are dropped when its weights are other tensors.

    Copies and pickles of a cache are empty: addresses mean nothing elsewhere.

    Args:
        limit: recordings kept.
        recorder: makes them, by device; None: tapes on the CPU and CUDA graphs elsewhere.
    """

    def __init__(self, limit: int = 4, recorder: Any = None):
        self.limit = limit
        self.recorder = recorder
        self._busy = threading.Lock()
        self._last: torch.cuda.Event | None = None
        self.clear()

    def __reduce__(self) -> tuple:
        return GraphCache, (self.limit, self.recorder)

    def __len__(self) -> int:
        return len(self._entries)

    def recorder_on(self, device: torch.device) -> Any:
        """The recorder's class for a device."""
        return self.recorder or recorder_on(device)

    @contextmanager
    def try_lock(self, device: torch.device) -> Iterator[bool]:
        """True if this thread may use the recordings inside; they share buffers, so one thread may at a time.

        Work on another stream waits, on the device, for that of the block before.
        """
        if not self._busy.acquire(blocking=False):
            yield False
            return
        try:
            if self._last is not None:
                torch.cuda.current_stream(device).wait_event(self._last)
            yield True
        finally:
            self._last = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            self._busy.release()

    def clear(self) -> None:
        """Drop every recording and the memory that it holds."""
        self._entries: OrderedDict[Hashable, object] = OrderedDict()
        self._recorders: dict[torch.device, object] = {}
        self._weights: object = None

    def find(self, device: torch.device, key: Hashable, model: Any, make: Callable[[Any], Any]) -> Any:
        """The entry of a key, made where there is none, or where none is kept.

        Args:
            key: all that a recording depends on besides the weights.
            model: a module; where its `weights_of` are others than at the last call, or somebody has written one of its
                buffers since, everything is dropped.
            make: the new entry, from the device's recorder; where it raises, everything is dropped.
        """
        recorder = self.recorder_on(device)
        if not recorder.is_kept:
            return make(recorder(device))
        buffers = list(model.buffers())
        weights = weights_of(model), versions_of(buffers)
        if weights != self._weights:
            self.clear()
            self._weights = weights
        if key not in self._entries:
            while len(self._entries) >= self.limit:
                self._entries.popitem(last=False)
            if not self._entries:
                self._recorders.clear()  # a pool whose graphs are all gone cannot be captured into again
            if device not in self._recorders:
                self._recorders[device] = recorder(device)
            try:
                self._entries[key] = make(self._recorders[device])
            except BaseException:
                self.clear()
                raise
            self._weights = weights[0], versions_of(buffers)  # warm-ups may write them
        self._entries.move_to_end(key)
        return self._entries[key]


_PLAIN = (bool, int, float, str, type(None))


def storage_key(tensors: Iterable[torch.Tensor]) -> tuple:
    """Addresses and layouts of tensors: part of a recording's cache key."""
    return tuple((t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in tensors)


def versions_of(buffers: Sequence[torch.Tensor]) -> list[int]:
    """How often buffers were written by torch's operators.

    A module may decide by their numbers, as EDM's blocks by their filters, and a recording holds what it decided.
    """
    return [0 if buffer.is_inference() else buffer._version for buffer in buffers]


def weights_of(model: nn.Module) -> tuple:
    """The cache key of a recording in inference: addresses of the weights and the settings of the modules.

    A replay reads the weights again, so changes in place stay valid, and with them what `inference_weights`
    derives from them in place.
    """
    storages = storage_key((*model.parameters(), *model.buffers()))
    modules = tuple((id(module), type(module), _settings_of(module)) for module in model.modules())
    return storages, modules


def _settings_of(module: nn.Module) -> tuple:
    """Plain attributes of a module: training or not, and settings such as padding_mode, which a user may change."""
    own = module.__dict__.items()
    return tuple([(name, value) for name, value in own if name[0] != "_" and _is_plain(value)])


def _is_plain(value: object) -> bool:
    """True for what compares without running a user's code: a tuple may hold tensors, which do not."""
    return type(value) in _PLAIN or (type(value) is tuple and all(type(entry) in _PLAIN for entry in value))


def settings() -> tuple:
    """Global settings that select kernels; part of a recording's cache key."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        (dispatch.forced_backend(), measured.setting()),
        # Not allow_tf32, which raises where precisions were set by name.
        (torch.backends.fp32_precision, cuda.matmul.fp32_precision, cudnn.conv.fp32_precision),  # type: ignore[attr-defined]
        (cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction),
        torch.are_deterministic_algorithms_enabled(),
        (torch.get_default_dtype(), torch.is_anomaly_enabled()),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
    )


def why_not_recorded(model: object) -> str | None:
    """Why a recording may not replace calls of a model, in one clause; None where it may.

    Code that runs only in Python, such as hooks, would run while recording and never again.
    """
    if not isinstance(model, nn.Module):
        return f"the model is a {type(model).__name__}, not a module"
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return "there are hooks on every module's forward, which a replay does not call"
    replaced: dict[tuple, str | None] = {}  # by class and names of attributes: a network has few of them
    for name, module in model.named_modules():
        own, cls = module.__dict__, type(module)
        where = f"the model's {name}" if name else "the model"
        if module._compiled_call_impl is not None or cls.__module__.startswith("torch._dynamo"):
            return f"{where} is compiled, and torch.compile has its own graphs"
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return f"{where} has forward hooks, which a replay does not call"
        kind = (cls, *own)
        if kind not in replaced:
            replaced[kind] = next((name for name in own if inspect.isfunction(getattr(cls, name, None))), None)
        if replaced[kind] is not None:
            return f"{where} has a {replaced[kind]} of its own instead of its class's"
    return None


def untrusted_module(model: nn.Module) -> str | None:
    """Which module is neither torch's nor this package's, so that its forward may do anything; in one clause.

    An accelerated network that a recording may hold says so itself, of all modules inside, by `untrusted_part`.
    """
    known: tuple[str, ...] = ()  # paths of which every module is known
    for name, module in model.named_modules():
        if name.startswith(known):
            continue
        where = f"the model's {name}" if name else "the model"
        if hasattr(type(module), "untrusted_part"):  # of the class: a module looks long for what it has not
            part: str | None = module.untrusted_part()
            if part is not None:
                return f"of {where}, {part}"
            known += (f"{name}." if name else "",)
        elif not is_of_torch(type(module)) and type(module).__module__.split(".")[0] != "ddpm_fast":
            return f"{where} is a {type(module).__name__}, and what its forward does besides is not known"
    return None


def is_of_torch(thing: Any) -> bool:
    """True for a class or function of torch.nn, whose modules call operators alone.

    Those of torch.fx and torch.jit call whatever they were made from.
    """
    return (getattr(thing, "__module__", None) or "").startswith("torch.nn.")
