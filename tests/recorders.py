"""Recorders that count: one stands in for CUDA's, as far as that can be told apart on the CPU; one makes tapes."""

from __future__ import annotations

import torch

from ddpm_fast.graphs import EagerRecorder, TapeRecorder


class FrozenRecorder(EagerRecorder):
    """Warm-ups as in a capture, decisions of the host frozen as in a capture, and a count of what was recorded."""

    freezes_decisions = True
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
