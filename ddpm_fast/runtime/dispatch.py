"""Which implementation of an op runs, and why.

An op lists its implementations in order of preference. Each can refuse a call with a reason, or yield it to a later one
that is expected to be faster; the first that does neither runs, and the last (the torch reference) never refuses.
Nothing here catches an exception to choose, and nothing reads the environment: the same call is answered the same way
every time, and `explain` prints the answer.

A block op's last implementation is "composite": the block made of the ops of its steps, each of which chooses again. A
forced backend that the block does not have is forced on these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from ddpm_fast.runtime import extension, measured

COMPOSITE = "composite"
BACKENDS = ("triton", "native", "sdpa", "reference")

# A plain module global, not a ContextVar: dynamo guards on the one and cannot trace the other.
_forced: str | None = None
_ops: dict[str, Op] = {}
_watched: dict[tuple[str, str, str], int] | None = None
# What else `explain` says of a model, one function for each kind of model.
accounts: list[Callable[[Any], Iterable[str]]] = []


class BackendRefused(RuntimeError):
    """`use_backend` forces an implementation that refuses the call; the text gives its reason."""


def never_refuses(*args: Any, **kwargs: Any) -> str | None:
    """The `refuses` of a reference implementation, and the `yields` of most."""
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Args:
        name: one of `BACKENDS`, or `COMPOSITE`.
        function: computes the op.
        refuses: takes the op's arguments; returns None to accept them or one clause that says why not.
        yields: asked with the same arguments where it does not refuse; returns None or one clause that says why a
            later implementation is the better choice. Forced, it runs all the same.
        or_steps: forced and refusing, it leaves a block to the ops of its steps, which are forced, instead of raising.
    """

    name: str
    function: Callable[..., Any]
    refuses: Callable[..., str | None] = never_refuses
    yields: Callable[..., str | None] = never_refuses
    or_steps: bool = False

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        """Why it is not chosen for a call where nothing is forced; None where it is, if no earlier one is."""
        reason = self.refuses(*args, **kwargs)
        return self.yields(*args, **kwargs) if reason is None else reason


class Op:
    """A public operation with several implementations; calling it chooses one and runs it.

    Args:
        name: the op's name, unique in the package.
        implementations: in order of preference; the last must accept everything.
        example: makes small (args, kwargs) on a device; `explain` shows what would run for them.
        more_examples: the same for other calls, by the name that `explain` gives them, where the choice depends on the
            call.
    """

    def __init__(
        self,
        name: str,
        implementations: list[Implementation],
        example: Callable[[torch.device], tuple[tuple, dict]],
        more_examples: dict[str, Callable[[torch.device], tuple[tuple, dict]]] | None = None,
    ):
        last = implementations[-1]
        if last.refuses is not never_refuses or last.yields is not never_refuses:
            raise ValueError(f"{name}: the last implementation must accept every call")
        if name in _ops:
            raise ValueError(f"{name}: an op of this name is registered already")
        self.name = name
        self.implementations = implementations
        self.examples = {name: example} | (more_examples or {})
        _ops[name] = self

    def choose(self, *args: Any, **kwargs: Any) -> Implementation:
        """The implementation that runs for these arguments.

        Raises:
            BackendRefused: `use_backend` forces one that this op has and that refuses the call.
        """
        return self._choose(args, kwargs)

    def _choose(self, args: tuple, kwargs: dict) -> Implementation:
        last = self.implementations[-1]
        if _forced is not None:
            for implementation in self.implementations:
                if implementation.name == _forced:
                    reason = implementation.refuses(*args, **kwargs)
                    if reason is None and implementation is not last and in_forward_mode():
                        reason = _NO_TANGENTS
                    if reason is not None and implementation.or_steps and last.name == COMPOSITE:
                        return last
                    if reason is not None:
                        raise BackendRefused(f"{self.name}: backend {_forced!r} was forced and refuses: {reason}")
                    return implementation
            if last.name == COMPOSITE:
                return last
        if in_forward_mode():
            self.count(last.name, _NO_TANGENTS)
            return last
        refusals: list[str] = []
        for implementation in self.implementations:
            # `why_not` without its calls, which cost microseconds: small networks choose a hundred times in one.
            reason = implementation.refuses(*args, **kwargs)
            if reason is None and implementation.yields is not never_refuses:
                reason = implementation.yields(*args, **kwargs)
            if reason is None:
                if _watched is not None:
                    self.count(implementation.name, "; ".join(refusals) or "accepts")
                return implementation
            if _watched is not None:
                refusals.append(f"{implementation.name}: {reason}")
        raise AssertionError(f"{self.name}: no implementation accepted, not even the last")

    def count(self, implementation: str, reasons: str = "accepts") -> None:
        """Count a choice for `watch_choices`; callers that choose by themselves call it, too."""
        if _watched is not None:
            key = (self.name, implementation, reasons)
            _watched[key] = _watched.get(key, 0) + 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._choose(args, kwargs).function(*args, **kwargs)


class use_backend:
    """Force every op that has an implementation `name` to run it, and to raise with its reason where it refuses.

    A block op without one runs the ops of its steps, and so does one whose kernels are for some of its calls; other ops
    without one choose as always. Works at once, as a plain call or as a context manager that restores what was forced
    before:

        ddpm_fast.use_backend("reference")
        with ddpm_fast.use_backend("native"): ...

    Args:
        name: "triton", "native", "sdpa" (torch's attention), "reference", or None to choose freely again.

    Raises:
        ValueError: `name` is none of these.
    """

    def __init__(self, name: str | None):
        if name is not None and name not in BACKENDS:
            raise ValueError(f"name must be one of {', '.join(BACKENDS)} or None, got {name!r}")
        global _forced
        self._previous = _forced
        _forced = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _forced
        _forced = self._previous


def chooses_freely() -> bool:
    """Whether a call's arguments alone decide what runs: no backend is forced, no choice counted, no tangent taken."""
    return _forced is None and _watched is None and not in_forward_mode()


def ops() -> dict[str, Op]:
    """Every registered op by name; an op is registered when its package is imported."""
    return dict(_ops)


class watch_choices:
    """Count which implementation every op takes, and why those before it refused, while the block runs.

        with ddpm_fast.runtime.dispatch.watch_choices() as choices: ...

    `choices` is a dict {(op, implementation, reasons): calls}. Forced choices are not counted.
    """

    def __enter__(self) -> dict[tuple[str, str, str], int]:
        global _watched
        self._previous, _watched = _watched, {}
        return _watched

    def __exit__(self, *exc_info: object) -> None:
        global _watched
        _watched = self._previous


_NO_TANGENTS = "forward-mode differentiation is on, and only the reference has tangents"


def in_forward_mode() -> bool:
    """Whether derivatives are taken in forward mode (torch.func.jvp, dual tensors).

    torch does not ask operators of libraries for tangents then, but takes what they give for constants.
    """
    return forward_ad._current_level >= 0


class _SecondDerivative(torch.autograd.Function):
    """Gradients without a graph behind them, made of other gradients: a second derivative through them raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple([gradient.detach() for gradient in tensors[:count]])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> NoReturn:
        raise RuntimeError(
            "this gradient cannot be differentiated again (create_graph=True); use "
            'ddpm_fast.use_backend("reference") for second derivatives'
        )


def once_differentiable(backward: Callable) -> Callable:
    """A decorator of an autograd function's backward that has no graph: a second derivative says what to do instead."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: torch.Tensor) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return gradients
        all_of_them = gradients if isinstance(gradients, tuple) else (gradients,)
        given = [gradient.detach().requires_grad_() for gradient in all_of_them if gradient is not None]
        # Of the output's gradients, since torch skips what leads to none of the tensors that were asked for.
        sources = [grad for grad in grads if grad is not None and grad.requires_grad]
        marked = iter(_SecondDerivative.apply(len(given), *given, *sources)) if given else iter(())
        return tuple([None if gradient is None else next(marked) for gradient in all_of_them])

    return wrapped


def forced_backend() -> str | None:
    """The backend that `use_backend` forces, or None."""
    return _forced


def present_devices() -> list[torch.device]:
    """The devices that `explain` speaks of: the CPU, and the current CUDA device if there is one."""
    return [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])


def explain(model: Any = None, *, devices: list[torch.device] | None = None) -> str:
    """A table of op × device × implementation: which runs, which would refuse, and why.

    Args:
        model: a network, or a pipeline around one. Each of its blocks that calls its modules one after another instead
            of running as one op, because a module was changed, has a line with the reason. Of a network that
            `accelerate` was given, every block has a line: the op that computes it, or why its own forward does.
        devices: those of the table; None: the CPU, and the current CUDA device if there is one.

    Returns:
        Text, one line each; the implementation that runs is marked with `*`. At the end, the forced backend and
        the instruction set of native code.

    Raises:
        TypeError: `model` is no object with a network in it.
    """
    if isinstance(model, list | tuple | str | int | torch.device | torch.Tensor):
        raise TypeError(f"model must be a network or a pipeline, got {type(model).__name__}; devices= takes devices")
    rows = []
    for op in sorted(_ops.values(), key=lambda op: op.name):
        for device, (label, example) in product(devices or present_devices(), op.examples.items()):
            args, kwargs = example(device)
            refused = [i.name for i in op.implementations if i.refuses(*args, **kwargs) is not None]
            chosen = None if _forced in refused else op.choose(*args, **kwargs).name
            for i in op.implementations:
                mark = "* " if i.name == chosen else "  "
                rows.append((label, device.type, mark + i.name, i.why_not(*args, **kwargs) or "accepts"))
    header = ("op", "device", "  implementation", "why")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(3)]
    lines = [
        "  ".join([cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)] + [row[3]])
        for row in [header, *rows]
    ]
    lines.append(f"* runs; forced by use_backend: {_forced or 'nothing'}")
    if extension.load() is not None:
        lines.append(f"native code on the CPU uses the instruction set {extension.instruction_set()}")
    lines += measured.account()
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        reason = module.why_by_modules() if hasattr(module, "why_by_modules") else None
        if reason is not None:
            lines.append(f"{name} calls its modules one after another: {reason}")
    if model is not None:
        for account in accounts:
            lines += account(model)
    return "\n".join((*lines, *lines_about_replays(model)))


def lines_about_replays(network: Any) -> Iterator[str]:
    """For `explain`: whether calls of a network are replayed, where it says so by a method `why_not_replayed`."""
    if hasattr(network, "why_not_replayed"):
        reason = network.why_not_replayed()
        how = "from the third of equal shapes on" if reason is None else f"not: {reason}"
        yield f"calls without gradients on the CPU are replayed from a tape, {how}"
