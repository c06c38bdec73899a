"""Hugging Face accelerate as the trainer needs it: how it is made, and one precision for each trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

from ddpm_fast.diffusion.xm import process_of
from ddpm_fast.runtime.extras import needed_for

with needed_for("Trainer"):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import (
        DataLoaderConfiguration,
        DistributedDataParallelKwargs,
        DistributedType,
        InitProcessGroupKwargs,
    )

# For a process that never comes: its arguments or its data have a fault. torchrun ends the others of its machine.
_LONGEST_START = timedelta(minutes=30)
# Only rank 0 samples at a milestone; the others wait in their next all-reduce for as long as that takes.
_LONGEST_WAIT = timedelta(hours=12)


def make_accelerator(mixed_precision: str, split_batches: bool, has_unused: bool) -> Accelerator:
    """The accelerator of a trainer; has_unused: some parameters have no gradient in some step."""
    is_grouped = distributed.is_available() and distributed.is_initialized()  # then its timeout is the user's
    with own_precision(mixed_precision):
        accelerator = Accelerator(
            # Without this, torchrun on a machine without accelerators would start unrelated single runs.
            cpu=not torch.accelerator.is_available(),
            # accelerate 1.x ignores its old argument split_batches=, which upstream still passes.
            dataloader_config=DataLoaderConfiguration(split_batches=split_batches),
            mixed_precision=mixed_precision,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=has_unused),
                InitProcessGroupKwargs(timeout=_LONGEST_START),
            ],
        )
    if not is_grouped and distributed.is_available() and distributed.is_initialized():
        _set_timeout(_LONGEST_WAIT)
    return accelerator


def _set_timeout(timeout: timedelta) -> None:
    """Of the collectives of all processes; torch before 2.14 has it under another name."""
    set_timeout = getattr(distributed, "set_timeout", None) or distributed.distributed_c10d._set_pg_timeout
    set_timeout(timeout)


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: Any, mixed_precision: str) -> tuple[Any, Any]:
    """Model and optimizer as accelerate runs them."""
    own_forward = vars(model).get("forward")
    places = None
    if is_one_or_ddp(accelerator):
        # Asked to move a model, accelerate imports torch.distributed.tensor and sympy, 0.4 s, to look for shards.
        model.to(accelerator.device)
        places = [False, True]
    with own_precision(mixed_precision):
        prepared = accelerator.prepare(model, optimizer, device_placement=places)
    if mixed_precision != "no" and process_of(model) is not None:
        # accelerate's forward casts the loss to float32, which it is already, and would hide the class's own.
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)
        if own_forward is not None:
            vars(model)["forward"] = own_forward
    return prepared


def is_one_or_ddp(accelerator: Accelerator) -> bool:
    """Whether accelerate runs one process, or several that have all weights each."""
    return _is_one_or_ddp(accelerator.distributed_type)


def _is_one_or_ddp(kind: DistributedType) -> bool:
    return kind == DistributedType.NO or kind.value.startswith("MULTI_")


@contextmanager
def own_precision(mixed_precision: str) -> Iterator[None]:
    """accelerate keeps one precision for the whole process; in this block it is a trainer's own."""
    state = AcceleratorState._shared_state
    earlier = state.get("_mixed_precision", mixed_precision)
    if earlier == mixed_precision:
        yield
        return
    kind = state.get("distributed_type", DistributedType.NO)
    if not _is_one_or_ddp(kind):
        raise ValueError(
            f"mixed_precision_type must be {earlier!r}, which accelerate keeps for the process under "
            f"{kind.value}; got {mixed_precision!r}"
        )
    state["_mixed_precision"] = mixed_precision
    try:
        yield
    finally:
        state["_mixed_precision"] = earlier
