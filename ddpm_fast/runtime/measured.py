"""Forms of a computation of which the faster one is measured, where a loop repeats it a thousand times.

Two forms give the same tensors up to rounding: "fused", one kernel, and "separate", a library's kernel and a pass.
Which is faster depends on the card and on the library. The package's own loops, training and sampling, time both at
first sight, once for each computation on each card, before a CUDA graph is captured or in a step without one, and take
the faster one from then on: a step has the same bits recorded or not. Checkpoints keep the choices, so that a run goes
on with the same; the Trainer's ranks agree on those of rank 0. Everything else runs "separate".
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

FUSED, SEPARATE, MEASURED = "fused", "separate", "measured"
# How a thread of a loop chooses: it runs both forms to compile them, times those not yet timed, or looks them up.
COMPILE, MEASURE, LOOK_UP = "compile", "measure", "look up"

_ROUNDS = 7  # odd
_GAIN = 0.95  # of the separate form's time: times of about the same length choose alike in every run
_SLEEP_CYCLES = 4_000_000  # about 2 ms: the device sleeps while the host enqueues what is timed

# A plain module global, as in dispatch.py.
_setting = MEASURED
_stages: dict[int, str] = {}  # by thread
_choices: dict[tuple[str, Hashable], Choice] = {}
_adopted: dict[str, str] = {}  # forms of a checkpoint or of rank 0, by `_label`
_measuring = threading.RLock()  # threads measure one after another, since kernels beside others take longer


@dataclass(frozen=True)
class Choice:
    """Median seconds by form."""

    seconds: Mapping[str, float]

    @property
    def form(self) -> str:
        """The fused form where it is faster by 5% or more."""
        return FUSED if self.seconds[FUSED] <= _GAIN * self.seconds[SEPARATE] else SEPARATE


class use_form:
    """Choose how computations with two forms run; at once, as a plain call or as a context manager.

        use_form("fused")
        with use_form("separate"): ...

    Args:
        name: "fused" or "separate" everywhere a form takes the call; "measured": the faster one in training and
            sampling on CUDA, and "separate" elsewhere and where torch.use_deterministic_algorithms is on.

    Raises:
        ValueError: `name` is none of these.
    """

    def __init__(self, name: str):
        names = (FUSED, SEPARATE, MEASURED)
        if name not in names:
            raise ValueError(f"name must be one of {', '.join(names)}, got {name!r}")
        global _setting
        self._previous = _setting
        _setting = name

    def __enter__(self) -> use_form:
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _setting
        _setting = self._previous


def setting() -> tuple:
    """What `use_form` and a checkpoint have chosen; part of a recording's cache key."""
    return _setting, *_adopted.items()


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Inside, this thread prepares or makes a recording: `COMPILE`, `MEASURE` or `LOOK_UP`."""
    thread = threading.get_ident()
    before = _stages.get(thread)
    _stages[thread] = name
    try:
        yield
    finally:
        if before is None:
            del _stages[thread]
        else:
            _stages[thread] = before


def steps_on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """For the steps of a loop of this package's: inside, forms are chosen as in its recordings."""
    return stage(MEASURE) if device.type == "cuda" else contextlib.nullcontext()


def way(x: torch.Tensor | None = None) -> str:
    """How a form is chosen in this thread now: a form, or a stage. Backward, in another thread, is given forward's.

    Args:
        x: of the computation's tensors; of fake ones nothing is timed.
    """
    if _setting != MEASURED:
        return _setting
    if torch.are_deterministic_algorithms_enabled() or is_fake(x):
        return SEPARATE
    return _stages.get(threading.get_ident(), SEPARATE)


def run(name: str, key: Hashable, forms: Mapping[str, Callable[[], Any]], how: str, x: torch.Tensor) -> Any:
    """The result of one of the forms of a computation.

    Args:
        name: of the computation.
        key: card, dtypes and shapes: all that the forms' times depend on.
        forms: by name, on tensors of one device, which they do not change.
        how: `way()` at the time of the forward pass.
        x: one of the tensors; its device's clock is read, whichever device is the current one.
    """
    if how in forms:
        return forms[how]()
    if how == COMPILE:
        forms[FUSED]()
        return forms[SEPARATE]()
    adopted = _adopted.get(_label(name, key))
    if adopted is not None:
        return forms[adopted]()
    if how == MEASURE and (name, key) not in _choices and not _is_capturing():
        with _measuring, torch.cuda.device_of(x):
            if (name, key) not in _choices:
                _choices[name, key] = Choice(_seconds(forms))
    choice = _choices.get((name, key))
    return forms[SEPARATE if choice is None else choice.form]()


def _label(name: str, key: Hashable) -> str:
    return f"{name} {key}"


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def chosen() -> dict[str, str]:
    """The forms that have been chosen, by what they are of: for a checkpoint."""
    return {**{_label(*what): choice.form for what, choice in _choices.items()}, **_adopted}


def adopt(forms: Mapping[str, str]) -> None:
    """Take the choices of a checkpoint: with those of the same card and shapes a run goes on with the same bits."""
    _adopted.clear()
    _adopted.update(forms)


def agree(found: Sequence[Mapping[str, str]]) -> None:
    """Take the choices of rank 0 where another rank has chosen otherwise; every rank calls this with all `chosen`."""
    first = found[0]
    if any(first.get(what, form) != form for others in found for what, form in others.items()):
        adopt({**chosen(), **first})


def check_forms(name: str, forms: Any) -> dict[str, str]:
    """A checkpoint's record of `chosen`.

    Raises:
        TypeError, ValueError: it is no such record.
    """
    if not isinstance(forms, dict):
        raise TypeError(f"{name} must be a dictionary, got {type(forms).__name__}")
    for what, form in forms.items():
        if not isinstance(what, str) or form not in (FUSED, SEPARATE):
            raise ValueError(f"{name} must give {FUSED!r} or {SEPARATE!r} for each name, got {form!r} for {what!r}")
    return dict(forms)


def _seconds(forms: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each form, in rounds in which every form runs once."""
    for call in forms.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(_ROUNDS):
        for name, call in forms.items():
            times[name].append(_timed(call))
    return {name: sorted(found)[_ROUNDS // 2] for name, found in times.items()}


def _timed(call: Callable[[], Any]) -> float:
    """Seconds of the device; the host's are past when it begins."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_SLEEP_CYCLES)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def account() -> Iterator[str]:
    """For `explain`: a line for the setting, and one for each choice."""
    what = (
        "in training and sampling on CUDA the faster one, as measured"
        if _setting == MEASURED
        else f"{_setting}, by use_form"
    )
    yield f"convolutions with norms, fused or separate: {what}"
    for (name, key), choice in _choices.items():
        times = ", ".join(f"{form} {1e6 * seconds:.1f} us" for form, seconds in choice.seconds.items())
        if _label(name, key) not in _adopted:
            yield f"{_label(name, key)}: {choice.form} ({times})"
    yield from (f"{what}: {form}, as a checkpoint or rank 0 has it" for what, form in _adopted.items())


def forget() -> None:
    """Drop what has been measured or adopted."""
    _choices.clear()
    _adopted.clear()
