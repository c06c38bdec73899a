"""Calls of a network inside `inference_weights`, replayed from tapes: small networks spend most of a call in Python."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import nn

from ddpm_fast.ops.registration import may_read
from ddpm_fast.runtime import recording
from ddpm_fast.runtime.dispatch import in_forward_mode
from ddpm_fast.runtime.snapshot import Snapshot

_LIMIT = 4  # kinds of calls that are kept, each with one set of inputs and an output

Run = Callable[[Sequence[torch.Tensor | None]], torch.Tensor]


class RecordedCalls:
    """The recordings of one network in one thread.

    The second call of a kind (shapes, dtypes, layouts, autocast) is recorded, and later ones replay it, with the same
    bits. Before each, a snapshot of the network says whether anything in it was replaced, hooked or set otherwise.
    """

    def __init__(self, network: nn.Module):
        self._network = network
        self._snapshot: Snapshot | None = None
        self._reason: str | None = None
        self._recorded: OrderedDict[Hashable, _RecordedCall] = OrderedDict()

    def call(self, run: Run, given: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """run(given), or a replay of it; `run` acts on the network's weights and on these tensors alone."""
        if not all(tensor is None or may_read(tensor) for tensor in given) or in_forward_mode():
            return run(given)
        if self._snapshot is None or not self._snapshot.holds():
            self._recorded.clear()
            self._snapshot, self._reason = Snapshot(self._network), _why_not(self._network, given)
        if self._reason is not None:
            return run(given)
        layouts = [None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype) for tensor in given]
        kind = (*layouts, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
        if kind in self._recorded:
            self._recorded.move_to_end(kind)
            return self._recorded[kind].call(run, given)
        made = run(given)
        while len(self._recorded) >= _LIMIT:
            self._recorded.popitem(last=False)
        self._recorded[kind] = _RecordedCall(made, given)
        return made


def _why_not(network: nn.Module, given: Sequence[torch.Tensor | None]) -> str | None:
    """Why calls of a network cannot be replayed, in one clause; None where they can."""
    device = next(tensor.device for tensor in given if tensor is not None)
    return (
        recording.TapeRecorder.why_not(device)
        or recording.why_not_recorded(network)
        or recording.untrusted_module(network)
    )


class _RecordedCall:
    """A tape, the tensors that it reads, and its output, which is laid out as what a first call made."""

    def __init__(self, made: torch.Tensor, given: Sequence[torch.Tensor | None]):
        with torch.inference_mode(False):
            self._given = [None if tensor is None else torch.empty_like(tensor) for tensor in given]
            self._output = torch.empty_like(made)
        self._replay: Callable[[], None] | None = None

    def call(self, run: Run, given: Sequence[torch.Tensor | None]) -> torch.Tensor:
        for own, tensor in zip(self._given, given, strict=True):
            if own is not None and tensor is not None:
                own.copy_(tensor)
        if self._replay is None:

            def body() -> None:
                self._output.copy_(run(self._given))

            self._replay = recording.TapeRecorder(self._output.device).record(body, lambda: None)
        self._replay()
        return self._output.clone()
