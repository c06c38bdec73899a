"""Calls of a network without gradients, replayed from tapes on the CPU.

Small networks spend most of a call in Python, and a network of 36 million parameters with eight images still 4%.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import nn

from ddpm_fast.models.derived_weights import kept_by_block
from ddpm_fast.ops.registration import may_read
from ddpm_fast.runtime import recording
from ddpm_fast.runtime.dispatch import in_forward_mode
from ddpm_fast.runtime.snapshot import Snapshot

_LIMIT = 4  # kinds of calls that are kept, each with one set of inputs and an output
_MOST_BYTES = 8 * 2**20  # of these, of a network; Python is no part to speak of of a call with more
_MOST_NETWORKS = 8  # of a thread
_LONGEST_PAUSE = 64  # calls; a snapshot and its questions take milliseconds

Run = Callable[[Sequence[torch.Tensor | None]], torch.Tensor]


def why_not_replayed(
    network: nn.Module, untrusted: Callable[[nn.Module], str | None] = recording.untrusted_module
) -> str | None:
    """Why calls of a network on the CPU are not replayed, in one clause; None where they are.

    Args:
        untrusted: says which module's forward may do anything, in one clause; None where it knows all.
    """
    return (
        recording.TapeRecorder.why_not(torch.device("cpu")) or recording.why_not_recorded(network) or untrusted(network)
    )


class RecordedCalls:
    """The recordings of one network in one thread, which do not keep the network alive.

    The second call of a kind (shapes, dtypes, layouts, autocast) is recorded, and later ones replay it, with the same
    bits. Before each, a snapshot of the network says whether anything in it was replaced, hooked or set otherwise, or a
    buffer written. A tape has inputs and an output of its own; a network keeps `_MOST_BYTES` of them, those of its last
    calls, and a call with more is not recorded.

    Args:
        untrusted: see `why_not_replayed`.
    """

    def __init__(self, network: nn.Module, untrusted: Callable[[nn.Module], str | None] = recording.untrusted_module):
        self._network = weakref.ref(network)
        self._untrusted = untrusted
        self._snapshot: Snapshot | None = None
        self._buffers: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._next_pause = self._pause = 0
        self._recorded: OrderedDict[Hashable, _RecordedCall] = OrderedDict()
        self.reason: str | None = None  # why calls are not recorded

    def call(self, run: Run, given: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """run(given), or a replay of it; `run` acts on the network's weights and on these tensors alone."""
        if not all(tensor is None or may_read(tensor) for tensor in given) or in_forward_mode():
            return run(given)
        if self._snapshot is not None and not (
            self._snapshot.holds() and self._versions == recording.versions_of(self._buffers)
        ):
            self._forget()
        if self._pause > 0:
            self._pause -= 1
            return run(given)
        if self._snapshot is None:
            self._take_snapshot()
        if self.reason is not None:
            return run(given)
        layouts = [None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype) for tensor in given]
        kind = (*layouts, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
        if kind in self._recorded:
            self._recorded.move_to_end(kind)
            self._next_pause = 0
            try:
                return self._recorded[kind].call(run, given)
            except recording.CaptureError as error:  # of the call that is recorded
                self._recorded.clear()
                self.reason = str(error)
                return run(given)
        made = run(given)
        if not isinstance(made, torch.Tensor):
            return made
        size = _bytes_of((made, *given))
        if size <= _MOST_BYTES:
            while len(self._recorded) >= _LIMIT or self.kept_bytes() + size > _MOST_BYTES:
                self._recorded.popitem(last=False)
            self._recorded[kind] = _RecordedCall(made, given)
        return made

    def kept_bytes(self) -> int:
        """Bytes of the inputs and outputs of all tapes."""
        return sum(call.size for call in self._recorded.values())

    def _forget(self) -> None:
        """Drop what a changed network had; one that changes between all calls is asked less and less often."""
        self._recorded.clear()
        self._snapshot, self._buffers = None, []
        self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause + 1, _LONGEST_PAUSE)

    def _take_snapshot(self) -> None:
        network = self._network()
        assert network is not None, "its call is running"
        self._snapshot, self.reason = Snapshot(network), why_not_replayed(network, self._untrusted)
        self._buffers = list(network.buffers())
        self._versions = recording.versions_of(self._buffers)


def calls_of(
    network: nn.Module, untrusted: Callable[[nn.Module], str | None] = recording.untrusted_module
) -> RecordedCalls | None:
    """What this thread has recorded of a network, with `RecordedCalls`' arguments; None where nothing is recorded.

    That is in a block of `inference_weights` that says so. What is recorded outside all blocks is kept for a few
    networks, whose weights and modules it keeps until the network is gone.
    """
    kept = kept_by_block()
    if kept is not None and network not in kept:
        if len(kept) >= _MOST_NETWORKS:
            kept.clear()
        kept[network] = RecordedCalls(network, untrusted)
    return None if kept is None else kept[network]


def _bytes_of(tensors: Sequence[torch.Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@contextlib.contextmanager
def _casting_anew() -> Iterator[None]:
    """Inside, autocast casts every weight, and takes no cast that it keeps: a tape would hold that one fast."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class _RecordedCall:
    """A tape, the tensors that it reads, and its output, which is laid out as what a first call made."""

    def __init__(self, made: torch.Tensor, given: Sequence[torch.Tensor | None]):
        with torch.inference_mode(False):
            self._given = [None if tensor is None else torch.empty_like(tensor) for tensor in given]
            self._output = torch.empty_like(made)
        self.size = _bytes_of((made, *given))
        self._replay: Callable[[], None] | None = None

    def call(self, run: Run, given: Sequence[torch.Tensor | None]) -> torch.Tensor:
        for own, tensor in zip(self._given, given, strict=True):
            if own is not None and tensor is not None:
                own.copy_(tensor)
        if self._replay is None:

            def body() -> None:
                with _casting_anew(), recording.outside_inference_mode():
                    self._output.copy_(run(self._given))

            self._replay = recording.TapeRecorder(self._output.device).record(body, lambda: None)
        self._replay()
        return self._output.clone()
