"""The step of Adam and AdamW by the op `adam_step`: with clipping and the average in the same pass."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ddpm_fast.ops.adam_step.op import AdamSettings, Tables, adam_step, why_not_fused
from ddpm_fast.training.average import Average

Gradients = Mapping[torch.Tensor, torch.Tensor]


class OptimizerStep:
    """What `clip_grad_norm_`, `optimizer.step()` and the move of an average do, by kernels or natively.

    State stays in the optimizer, where torch keeps it, so that checkpoints are the same. Gradients are read and not
    clipped in place. Keep the object as long as recordings of its calls, and call it once before one is recorded; the
    recordings of several sets of parameters with gradients may be replayed in any order.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._tables = Tables()
        # Of the last step.
        self.last_reason: str | None = "no step was made"
        self._written: list[str] = []

    def release(self) -> None:
        """The recordings of all calls are gone."""
        self._tables.release()

    def why_not(self, gradients: Gradients | None = None) -> str | None:
        """Why torch's own step has to run, in one clause; None where this one can. `gradients`: see `__call__`."""
        self.last_reason = self._why_not(gradients or {})
        return self.last_reason

    def _why_not(self, gradients: Gradients) -> str | None:
        optimizer: Any = self.optimizer
        if not is_adam(optimizer):
            return f"the optimizer is a {type(optimizer).__name__}"
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return "the optimizer has hooks on its step"
        for group in optimizer.param_groups:
            for option in ("amsgrad", "maximize", "differentiable"):
                if group[option]:
                    return f"the optimizer has {option}=True"
            if any(isinstance(beta, torch.Tensor) for beta in group["betas"]):
                return "the optimizer's betas are tensors"
            if isinstance(group["lr"], torch.Tensor) and group["lr"].dtype not in (torch.float32, torch.float64):
                return f"the optimizer's learning rate is a tensor of {group['lr'].dtype}"
            if any(p.grad is not None and p.grad.is_sparse for p in group["params"]):
                return "a gradient is sparse"
        params = [p for group in optimizer.param_groups for p in _with_gradients(group, gradients)]
        if not params:
            return "there is no gradient"
        for kind in {type(tensor) for p in params for tensor in (p, p.grad)} - {type(None)}:
            if hasattr(kind, "__tensor_flatten__"):
                return f"a parameter is a {kind.__name__}, which holds tensors of its own"
        if len({p.device for p in params}) > 1:
            return "the parameters are on several devices"
        steps = [optimizer.state[p]["step"] for p in params if optimizer.state.get(p)]
        return why_not_fused(params, steps)

    def __call__(
        self,
        *,
        max_grad_norm: float | None = None,
        grad_scale: torch.Tensor | None = None,
        averages: Mapping[torch.Tensor, torch.Tensor] | None = None,
        average_weight: torch.Tensor | None = None,
        copies: Mapping[torch.Tensor, torch.Tensor] | None = None,
        rates: Sequence[torch.Tensor] | None = None,
        gradients: Gradients | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of all parameters that have a gradient; see `adam_step`.

        Args:
            averages: parameter → its average; a parameter that is not there has none, and one without a gradient
                leaves its average alone.
            copies: parameter → its copy in a half type, in the same way.
            rates: the groups' learning rates, where a recording reads them; None takes the groups' own.
            gradients: parameter → its gradient, of parameters whose `.grad` is None; it may be in a half type.

        Returns:
            The gradients' norm before clipping, and 1.0 if the step was skipped, else 0.0; scalars on the device.
        """
        optimizer: Any = self.optimizer
        params: list[torch.Tensor] = []
        settings: list[AdamSettings] = []
        given = gradients or {}
        for number, group in enumerate(optimizer.param_groups):
            members = _with_gradients(group, given)
            for p in members:
                _begin(optimizer.state[p], p)
            params += members
            decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
            rest = (*group["betas"], group["eps"], group["weight_decay"], decoupled)
            rate = group["lr"] if rates is None else rates[number]
            settings.append(AdamSettings(len(members), rate, *rest))
        states = [optimizer.state[p] for p in params]
        names = ("exp_avg", "exp_avg_sq", "step")
        moments, squares, steps = ([state[name] for state in states] for name in names)
        result = adam_step(
            params,
            [given[p] if p.grad is None else p.grad for p in params],
            moments,
            squares,
            steps,
            settings,
            max_grad_norm=max_grad_norm,
            grad_scale=grad_scale,
            averages=[averages.get(p) for p in params] if averages else None,
            average_weight=average_weight,
            copies=[copies.get(p) for p in params] if copies else None,
            tables=self._tables,
        )
        # As if torch's operators had written them; who moves an average knows whether it has.
        written = [*params, *moments, *squares, *steps]
        torch.autograd.graph.increment_version(written)
        return result

    def apply(
        self,
        max_grad_norm: float | None,
        scaler: torch.amp.GradScaler | None,
        average: Average | None = None,
        copies: Mapping[torch.Tensor, torch.Tensor] | None = None,
        rates: Sequence[torch.Tensor] | None = None,
        gradients: Gradients | None = None,
    ) -> tuple[torch.Tensor, frozenset[torch.Tensor]]:
        """One step, and what `scaler.unscale_`, `step` and `update` do.

        Returns:
            The gradients' norm, a scalar on the device, and the parameters whose averages were moved, too.
        """
        norm, skipped = self(
            max_grad_norm=max_grad_norm,
            grad_scale=None if scaler is None else scaler._scale,
            averages=None if average is None else average.targets,
            average_weight=None if average is None else average.weight,
            copies=copies,
            rates=rates,
            gradients=gradients,
        )
        moved = frozenset[torch.Tensor]() if average is None else average.moved_with_gradients(gradients or {})
        self._written = ["their average"] * bool(moved) + ["their copies for autocast"] * bool(copies)
        if scaler is not None:
            assert scaler._scale is not None and scaler._growth_tracker is not None, "the loss was scaled"
            torch._amp_update_scale_(
                scaler._scale,
                scaler._growth_tracker,
                skipped,
                scaler.get_growth_factor(),
                scaler.get_backoff_factor(),
                scaler.get_growth_interval(),
            )
        return norm, moved

    def explain(self, reasons: Mapping[str, str | None]) -> str:
        """How the last step was made, in one sentence.

        Args:
            reasons: what one pass could have written besides weights, and why it has not; None where it has, or where
                there is no such thing.
        """
        if self.last_reason is not None:
            return f"torch clips gradients and moves weights: {self.last_reason}"
        parts = ["one pass clips gradients and moves weights", *self._written]
        done = ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else parts[0]
        return "; ".join([done, *(f"not {name}: {reason}" for name, reason in reasons.items() if reason is not None)])


def _with_gradients(group: Mapping[str, Any], gradients: Gradients) -> list[torch.Tensor]:
    """The parameters of an optimizer's group that have a gradient, in `.grad` or here."""
    return [p for p in group["params"] if p.grad is not None or p in gradients]


def _begin(state: dict[str, Any], parameter: torch.Tensor) -> None:
    """The state before the first step, as torch's optimizers make it."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _without_compiler(name: str) -> Callable[..., Any]:
    """A method of torch's optimizers that leaves torch.compile alone, as that leaves the method.

    torch's own imports torch.compile in its first call, 1.2 s, to mark the method as not to be compiled.
    """
    marked = getattr(torch.optim.Optimizer, name)
    plain = inspect.unwrap(marked)

    @functools.wraps(plain)
    def method(self: Any, *args: Any, **options: Any) -> Any:
        return (marked if "torch._dynamo" in sys.modules else plain)(self, *args, **options)

    return method


class _OnePass(torch.optim.Optimizer):
    """Steps by `OptimizerStep` where it can, and else as torch does."""

    add_param_group = _without_compiler("add_param_group")
    zero_grad = _without_compiler("zero_grad")
    state_dict = _without_compiler("state_dict")
    load_state_dict = _without_compiler("load_state_dict")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` computes the loss again and is what torch's optimizers take."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        one_pass = vars(self).get("_one_pass") or OptimizerStep(self)
        self._one_pass = one_pass  # which neither copies nor pickles have
        is_scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        if is_scaled or one_pass.why_not() is not None:
            self._step_of_torch()
        else:
            one_pass()
        return loss

    def _step_of_torch(self) -> None:
        step: Any = super().step
        # torch puts hooks around the step of each class; those around this class's have been called.
        unhooked = step.__func__.__wrapped__ if getattr(step, "hooked", False) else step.__func__
        unhooked(self)


class Adam(_OnePass, torch.optim.Adam):
    """torch.optim.Adam with its arguments, its state and its numbers, in one pass over memory.

    A process that makes no use of torch.compile does not import it for this optimizer.
    """


class AdamW(_OnePass, torch.optim.AdamW):
    """torch.optim.AdamW, as `Adam` is torch.optim.Adam."""


def is_adam(optimizer: Any) -> bool:
    """Whether an optimizer is torch's Adam or AdamW, or ours; any other subclass may do anything in Python."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW, Adam, AdamW)
