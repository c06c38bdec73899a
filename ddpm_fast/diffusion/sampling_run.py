"""What a walk along a sampler's table is asked for, and what it shows: seed, conditions, who guides, a progress bar."""

from __future__ import annotations

import importlib.util
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ddpm_fast.diffusion.samplers import SamplerTable
from ddpm_fast.runtime.plain import as_flag

Model = Any  # (x, t, x_self_cond, **conditions) -> the objective's output, shape of x; most are modules
# (x, t, classes) -> ∇ log p(classes | x), shape of x.
CondFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

_STEPS_AHEAD = 32  # how far the host may run before the device while a progress bar is shown


class Progress:
    """Upstream's progress bar, counting the steps that the device has finished.

    The host never waits for the latest step, only, where it is far ahead, for one of long before; at the end it waits
    for the rest.

    Args:
        total: steps.
        desc: the text before the bar.
        enabled: without it nothing is shown and nothing waited for.
        mark: gives an event, with `query` and `synchronize`, of what the device has been given so far; None: the host's
            calls end when the work is done, as on the CPU.
    """

    def __init__(self, total: int, *, desc: str, enabled: bool, mark: Callable[[], Any] | None = None):
        self._bar: Any = _make_bar(desc, total) if enabled else None
        self._mark = mark
        self._pending: deque[Any] = deque()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        if self._bar is None:
            return
        if kind is None:
            self._finish(all_but=0)
        self._bar.close()

    def step_done(self) -> None:
        """One more step is finished, or enqueued on the device."""
        if self._bar is None:
            return
        if self._mark is None:
            self._bar.update(1)
            return
        self._pending.append(self._mark())
        self._finish(all_but=_STEPS_AHEAD)

    def _finish(self, all_but: int) -> None:
        """Count finished steps; wait until at most `all_but` are not."""
        while self._pending and (len(self._pending) > all_but or self._pending[0].query()):
            self._pending.popleft().synchronize()
            self._bar.update(1)


def _make_bar(desc: str, total: int) -> Any:
    """tqdm's bar, or None with a warning where tqdm is not installed: a bar is no reason to refuse samples."""
    if importlib.util.find_spec("tqdm") is None:
        hint = "pip install tqdm, or progress=False"
        warnings.warn(f"no progress bar is shown, since tqdm is not installed ({hint})", stacklevel=2)
        return None
    from tqdm.auto import tqdm

    return tqdm(desc=desc, total=total)


def progress_on(device: torch.device, total: int, *, desc: str, enabled: bool) -> Progress:
    """A progress bar over steps that run on a device."""
    mark = (lambda: torch.cuda.current_stream(device).record_event()) if device.type == "cuda" else None
    return Progress(total, desc=desc, enabled=enabled, mark=mark)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a step reads besides its table and the noise: conditions, and who guides.

    Args:
        arguments: of the network by keyword, (B, ...) each, or (2B, ...) if `is_doubled`.
        is_doubled: guided rows call the network with the batch twice, the second time with the null condition.
        guide: another network, whose output guided rows read beside that of the network.
        guide_arguments: its own, by keyword, (B, ...) each.
        cond_fn: gives the gradient of log p(classes | x). It gets a fresh copy of x outside inference mode.
        classes: (B,) for cond_fn.
        known: (B, C, H, W), what is inserted where `mask` is 1, (B or 1, 1 or C, H, W).
    """

    arguments: dict[str, torch.Tensor] = field(default_factory=dict)
    is_doubled: bool = False
    guide: Model | None = None
    guide_arguments: dict[str, torch.Tensor] = field(default_factory=dict)
    cond_fn: CondFn | None = None
    classes: torch.Tensor | None = None
    known: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """All tensors in it with their names, in one order."""
        own = (("classes for cond_fn", self.classes), ("known", self.known), ("mask", self.mask))
        of_guide = [(f"guide's {name}", tensor) for name, tensor in self.guide_arguments.items()]
        return [*self.arguments.items(), *of_guide, *((name, tensor) for name, tensor in own if tensor is not None)]

    @property
    def key(self) -> tuple:
        """What a recording depends on, besides weights of the guide."""
        layout = tuple((name, tuple(t.shape), t.dtype) for name, t in self.tensors())
        return layout, self.is_doubled, id(self.guide), id(self.cond_fn)

    def check_unguided(self, where: str, *, inserts: bool = False) -> None:
        """Raise where steps of the user's own methods, as `where` says, would leave something out.

        Args:
            inserts: they do insert what is known.
        """
        guides = {"guidance": self.is_doubled or self.guide is not None, "cond_fn": self.cond_fn is not None}
        guides["mask"] = self.mask is not None and not inserts
        for name, is_given in guides.items():
            if is_given:
                raise ValueError(f"{name} must be None where {where}, which would leave it out")

    def empty_like(self) -> Conditioning:
        """The same with memory of its own, which `fill` writes."""

        def empty(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else torch.zeros_like(tensor, memory_format=torch.contiguous_format)

        return replace(
            self,
            arguments={name: torch.zeros_like(tensor) for name, tensor in self.arguments.items()},
            guide_arguments={name: torch.zeros_like(tensor) for name, tensor in self.guide_arguments.items()},
            classes=empty(self.classes),
            known=empty(self.known),
            mask=empty(self.mask),
        )

    def fill(self, given: Conditioning) -> None:
        """Take the numbers of conditions of the same key."""
        for (_, own), (_, tensor) in zip(self.tensors(), given.tensors(), strict=True):
            own.copy_(tensor)


@dataclass
class SamplingRun:
    """One walk along a sampler's table, and how it is shown and recorded.

    Args:
        plan: the sampler's table.
        seed: one-element int64 tensor on the device of the state.
        start_index: index of the first sample, for the noise.
        first_step: row of the table to start with.
        on_step: called with the state after every step, which the next step overwrites.
        on_x_start: called with the estimate of x0 in every step, which the next step overwrites.
        progress, desc: show a progress bar, and the text before it.
        graph: record a step and replay it; None where it can be, True raises where it cannot, False never.
        clip_x_start: clip estimates of x0 to [−1, 1].
        conditioning: conditions, and who guides.
    """

    plan: SamplerTable
    seed: torch.Tensor
    start_index: int = 0
    first_step: int = 0
    on_step: Callable[[torch.Tensor], object] | None = None
    on_x_start: Callable[[torch.Tensor], object] | None = None
    progress: bool = False
    desc: str = "sampling loop time step"
    graph: bool | None = None
    clip_x_start: bool = True
    conditioning: Conditioning = field(default_factory=Conditioning)

    def __post_init__(self) -> None:
        self.progress = as_flag("progress", self.progress)
        self.graph = None if self.graph is None else as_flag("graph", self.graph)
        self.clip_x_start = as_flag("clip_x_start", self.clip_x_start)

    @property
    def rows(self) -> range:
        """Rows of the table that the walk takes."""
        return range(self.first_step, len(self.plan.times))

    def progress_bar(self, device: torch.device) -> Progress:
        """A progress bar over the steps, which run on `device`."""
        return progress_on(device, len(self.rows), desc=self.desc, enabled=self.progress)

    def step_done(self, x: torch.Tensor, bar: Progress, x_start: torch.Tensor | None) -> None:
        """One more step has made x, by this estimate of x0, which is kept where `on_x_start` wants it."""
        if self.on_step is not None:
            self.on_step(x)
        if self.on_x_start is not None:
            assert x_start is not None
            self.on_x_start(x_start)
        bar.step_done()
