"""`Operator`: one declaration of a torch operator gives its schemas, fakes and autograd for every backend."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch

from ddpm_fast.ops.registration import (
    autograd_of,
    below_autograd,
    by_extension,
    define,
    implement,
    launcher,
    library,
    unless_watched,
)


class Operator:
    """`ddpm_fast::<name>` by Triton and `ddpm_fast::native_<name>` by C++, with their `_backward` operators.

    A whole declaration, of out = x·weight + bias + residual with one weight and one bias per channel of x:

        def _fake(x, **_):
            return torch.empty_like(x)

        _scale = Operator(
            "scale",
            "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps",
            returns="out",
            fake=_fake,
            backward="grad, x, weight, eps, want_bias",
            gradients="x, weight, bias",
            passes="residual",
            rows={"bias": "weight"},
            wanted={"want_bias": "bias"},
            triton=f"{__package__}.triton",
            native=True,
        )

    `_scale.triton(x, weight, None, None, 1e-5)` calls `scale` of the folder's triton.py, its gradient `scale_backward`:
    (grad, x, weight, eps, want_bias) -> (dx, dweight, dbias). `_scale.native` calls what csrc registers with
    `TORCH_LIBRARY_IMPL` as `native_scale` and `native_scale_backward`. All arguments are positional, in the declared
    order. Names in a string are separated by commas.

    Args:
        name: the operator's name in torch.ops.ddpm_fast and in errors.
        arguments: types and names, as in a schema of torch.
        returns: names of the returned tensors. Only the first is differentiable; the others are for backward.
        fake: takes the arguments by name; returns empty outputs of the right shape, dtype and memory format.
        backward: the backward operator's arguments: "grad" among the kept tensors, then options, then the flags of
            `wanted`. Kept tensors are arguments or returns, options are arguments that are no tensors.
        gradients: the arguments whose gradients the backward operator returns. Without any there is no such operator.
        passes: arguments that are added to the output, so that their gradient is grad.
        by_torch: names of further gradients, and a function (needs, grad, *kept tensors, *options) that returns them,
            made of torch's operators; `needs` has a bool for each. With these alone, gradients can be differentiated
            again.
        maps: gradients in the memory format of their argument, or, if that is not kept, of the first kept tensor. The
            other gradients are contiguous.
        rows: gradients of arguments that are not kept, such as biases: the backward operator returns float32, as many
            numbers as the first dimension of this kept argument.
        wanted: flags of the backward operator. A flag is true if a gradient in its string is used; a tuple of n strings
            makes a flag of type bool[n]. The operator returns an empty tensor for an unwanted gradient.
        none_like: dtypes of empty gradients: the empty gradient of an argument that is None has the dtype of this kept
            tensor. By default it is the first one.
        gradient_list: the backward operator returns Tensor[] instead of a tuple.
        contiguous_grad: grad is made contiguous for the backward operator.
        autograd: setup_context and backward of an operator that takes lists of tensors, made of torch's operators, for
            graphs that call it; whoever calls `native` has gradients of its own.
        triton: the module of the functions `<name>` and `<name>_backward`, imported by the first call. A gradient from
            there may have another dtype or shape than its argument, and be None if that is.
        native: csrc implements the operator.
        shapes: of the tensors of calls that need no check by Python, for `fitting`: a letter for each dimension, such
            as "BCHW", the same size wherever the letter stands, or "#C", C elements in any shape. The first tensor is
            contiguous or channels-last. An argument without a shape is None in such calls.

    Attributes:
        triton, native: functions that call the kernel, each only where it is declared.
        fitting: returns a function that takes the arguments and returns the first output by C++, or None if the call is
            not one of `shapes`, its tensors are empty, not on the CPU or float64, or something watches operators.
    """

    triton: Callable[..., Any]
    native: Callable[..., Any]
    fitting: Callable[[], Callable[..., torch.Tensor | None]]

    def __init__(
        self,
        name: str,
        arguments: str,
        *,
        returns: str,
        fake: Callable[..., Any],
        backward: str = "",
        gradients: str = "",
        passes: str = "",
        by_torch: tuple[str, Callable[..., Iterable[torch.Tensor | None]]] = ("", tuple),
        maps: str = "x",
        rows: Mapping[str, str] | None = None,
        wanted: Mapping[str, str | tuple[str, ...]] | None = None,
        none_like: Mapping[str, str] | None = None,
        gradient_list: bool = False,
        contiguous_grad: bool = False,
        autograd: tuple[Callable[..., None], Callable[..., Any]] | None = None,
        triton: str | None = None,
        native: bool = False,
        shapes: Mapping[str, str] | None = None,
    ):
        self.name, self._returns, self._backward = name, _names(returns), _names(backward)
        self._gradients, self._passes, self._maps = _names(gradients), _names(passes), _names(maps)
        self._by_torch, self._formula = _names(by_torch[0]), by_torch[1]
        self._rows, self._none_like, self._wanted = dict(rows or {}), dict(none_like or {}), dict(wanted or {})
        self._contiguous_grad, self._single = contiguous_grad, len(self._gradients) == 1 and not gradient_list
        types = {argument.split()[1]: argument.split()[0] for argument in arguments.split(", ")}
        self._arguments = tuple(types)
        types |= dict.fromkeys(("grad", *self._returns), "Tensor")
        types |= {flag: "bool" if isinstance(of, str) else f"bool[{len(of)}]" for flag, of in self._wanted.items()}
        self._tensors = [name for name in self._backward if types[name].startswith("Tensor")]
        self._options = [name for name in self._backward if name not in self._tensors and name not in self._wanted]
        if self._backward != (*self._tensors, *self._options, *self._wanted):
            raise ValueError(f"{name}: backward must name tensors, then options, then flags, got {backward}")

        signature = f"({arguments}) -> {_type_of(self._returns)}"
        takes = ", ".join(f"{types[name]} {name}" for name in self._backward)
        made = "Tensor[]" if gradient_list else _type_of([f"d{name}" for name in self._gradients])
        declared: list[tuple[str, str, str | None]] = [] if triton is None else [("Triton", "", triton)]
        declared += [("native", "native_", None)] if native else []
        for kernel, prefix, module in declared:
            operator = define(prefix + name, signature, _by_name(fake, self._arguments))
            direct: Callable = operator
            gradient: Callable | None = None
            differentiable: Callable[[], Callable] | None = None
            if module is not None:
                direct = launcher(module, name)
                implement(name, direct)
            if self._gradients:
                fake_gradients = _by_name(self._empty_gradients, self._backward)
                gradient = define(f"{prefix}{name}_backward", f"({takes}) -> {made}", fake_gradients)
                if module is not None:
                    launch = self._restored(launcher(module, f"{name}_backward"))
                    implement(f"{name}_backward", self._without_none(launch))
                    gradient = unless_watched(gradient, launch, _places(self._backward, types))
            if self._gradients or self._passes or self._by_torch:
                direct = below_autograd(operator) if module is None else direct
                # The first call compiles the functions: a process uses a few of the operators.
                functions = cache(partial(self._autograd, kernel, direct, gradient))
                _register_autograd(operator, functions)
                differentiable = cache(partial(_apply, name, functions))
            elif autograd is not None:
                torch.library.register_autograd(operator, autograd[1], setup_context=autograd[0], lib=library)
                direct = below_autograd(operator) if module is None else direct
            places = _places(self._arguments, types)
            call = unless_watched(operator, direct, places, differentiable)
            if module is None and differentiable is not None and not self._by_torch:
                call, self.fitting = by_extension(operator, call, self._description(shapes or {}))
            setattr(self, kernel.lower(), call)

    def _description(self, shapes: Mapping[str, str]) -> tuple[Any, ...]:
        """What csrc/python/native_operator.cpp takes: names are places among the arguments and, after them, returns."""
        place = {name: i for i, name in enumerate((*self._arguments, *self._returns))} | {"grad": -1}

        def places(names: Iterable[str]) -> list[int]:
            return [place[name] for name in names]

        flags = [
            [places(_names(of)) for of in ((used,) if isinstance(used, str) else used)]
            for used in self._wanted.values()
        ]
        made = [places(names) for names in (self._tensors, self._options)]
        taken = [places(names) for names in (self._gradients, self._passes)]
        shape_of = [shapes.get(name, "") for name in self._arguments]
        return self.name, shape_of, bool(self._gradients), *made, flags, *taken, self._contiguous_grad

    def _autograd(self, kernel: str, direct: Callable, gradients_of: Callable | None) -> tuple[Callable, ...]:
        """setup_context, forward (both in one) and backward of a kernel, compiled from source as one would write it.

        Loops over names instead cost 5 to 15 µs per call, 3 to 6% of a small operator forward and backward.
        """
        restored = (*self._rows, *self._passes, *self._by_torch)
        kept = ", ".join(name for name in self._tensors if name != "grad")
        made, by_torch = (", ".join(f"d{name}" for name in names) for names in (self._gradients, self._by_torch))
        passed = [f"ctx.option_{name}" for name in self._options]
        flags = [_flag(used) for used in self._wanted.values()]
        given = {"grad": "grad.contiguous()"} if self._contiguous_grad else {}
        call = ", ".join([*(given.get(name, name) for name in self._tensors), *passed, *flags])
        further = ", ".join(["grad", kept, *passed])
        results = [
            f"{'grad' if name in self._passes else f'd{name}'}{f'.to(ctx.dtype_{name})' if name in restored else ''}"
            f" if needs_{name} else None"
            if name in (*self._gradients, *restored)
            else "None"
            for name in self._arguments
        ]
        several = len(self._returns) > 1
        arguments = ", ".join(self._arguments)
        keep = [
            f"    {', '.join(self._returns)} = output",
            f"    ctx.save_for_backward({kept})",
            f"    ctx.mark_non_differentiable({', '.join(self._returns[1:])})" if several else "",
            "    ctx.set_materialize_grads(False)  # no zeros as gradients of the other returns",
            *(f"    ctx.option_{name} = {name}" for name in self._options),
            *(f"    ctx.dtype_{name} = None if {name} is None else {name}.dtype" for name in restored),
        ]
        lines = [
            "def setup_context(ctx, inputs, output):",
            f"    {arguments}, = inputs",
            *keep,
            f"def forward(ctx, {arguments}):",
            f"    output = direct({arguments})",
            *keep,
            "    return output",
            "def backward(ctx, grad, *_):",
            "    if is_grad_enabled(): refuse()" if gradients_of else "",
            f"    if grad is None: return {'None, ' * len(self._arguments)}",
            f"    {', '.join(f'needs_{name}' for name in self._arguments)}, = ctx.needs_input_grad",
            f"    {kept}, = ctx.saved_tensors  # read once: under torch's checkpoint a second read is an error",
            f"    if {_any(self._gradients)}: {made}{'' if self._single else ','} = gradients_of({call})"
            if made
            else "",
            f"    if {_any(self._by_torch)}: {by_torch}, = by_torch(({_needs(self._by_torch)}), {further})"
            if by_torch
            else "",
            f"    return {', '.join(results)},",
        ]

        def refuse() -> None:
            raise RuntimeError(
                f"{self.name}: the {kernel} kernel's gradient cannot be differentiated again (create_graph=True); "
                'use ddpm_fast.use_backend("reference") for second derivatives'
            )

        source, file = "\n".join(line for line in lines if line), f"<{kernel} {self.name}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
        names: dict[str, Any] = {"is_grad_enabled": torch.is_grad_enabled, "refuse": refuse}
        names |= {"direct": direct, "gradients_of": gradients_of, "by_torch": self._formula}
        exec(compile(source, file, "exec"), names)
        return names["setup_context"], names["forward"], names["backward"]

    def _empty_gradients(self, **given: Any) -> torch.Tensor | list[torch.Tensor]:
        """The results of the backward operator, uninitialised."""
        first = next(given[name] for name in self._tensors if name != "grad")
        unwanted = set()
        for flag, of in self._wanted.items():
            for names, used in [(of, given[flag])] if isinstance(of, str) else zip(of, given[flag], strict=True):
                unwanted |= set() if used else set(_names(names))

        def empty(name: str) -> torch.Tensor:
            argument = given[self._rows[name]] if name in self._rows else given.get(name, first)
            made = argument is not None and name not in unwanted
            if argument is None:
                argument = given[self._none_like[name]] if name in self._none_like else first
            if name in self._maps and made:
                return torch.empty_like(argument)
            shape = argument.shape[:1] if name in self._rows else argument.shape
            return argument.new_empty(
                shape if made else 0, dtype=torch.float32 if name in self._rows else argument.dtype
            )

        made = [empty(name) for name in self._gradients]
        return made[0] if self._single else made

    def _restored(self, launch: Callable) -> Callable:
        """A Triton kernel's gradients in the dtypes and shapes of their arguments; None where the argument is."""
        places = [self._backward.index(name) if name in self._backward else None for name in self._gradients]
        single = self._single

        def restored(*values: Any) -> Any:
            made = launch(*values)
            if single:
                return made
            gradients = list(made)
            for i, place in enumerate(places):
                gradient, argument = gradients[i], None if place is None else values[place]
                if gradient is None or argument is None:
                    continue
                if gradient.dtype != argument.dtype:
                    gradients[i] = gradient = gradient.to(argument.dtype)
                if gradient.shape != argument.shape:
                    gradients[i] = gradient.reshape(argument.shape)
            return gradients

        return restored

    def _without_none(self, launch: Callable) -> Callable:
        """Gradients as a registered operator returns them: empty where the argument is None."""
        if self._single:
            return launch

        def filled(*values: Any) -> list[torch.Tensor]:
            return [values[0].new_empty(0) if gradient is None else gradient for gradient in launch(*values)]

        return filled


def _register_autograd(operator: torch._ops.OpOverload, functions: Callable[[], tuple[Callable, ...]]) -> None:
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        functions()[0](ctx, inputs, output)

    def backward(ctx: Any, *grads: Any) -> Any:
        return functions()[2](ctx, *grads)

    torch.library.register_autograd(operator, backward, setup_context=setup_context, lib=library)


def _apply(name: str, functions: Callable[[], tuple[Callable, ...]]) -> Callable:
    _, forward, backward = functions()
    return autograd_of(name, forward, backward)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def _needs(names: Iterable[str]) -> str:
    return "".join(f"needs_{name}, " for name in names)


def _any(names: Iterable[str]) -> str:
    return " or ".join(f"needs_{name}" for name in names)


def _flag(used: str | tuple[str, ...]) -> str:
    """The source of a flag of `wanted`."""
    return f"[{', '.join(map(_flag, used))}]" if isinstance(used, tuple) else _any(_names(used))


def _type_of(returns: Sequence[str]) -> str:
    return "Tensor" if len(returns) == 1 else f"({', '.join(f'Tensor {name}' for name in returns)})"


def _by_name(function: Callable, names: Sequence[str]) -> Callable:
    return lambda *values: function(**dict(zip(names, values, strict=True)))


def _places(names: Iterable[str], types: Mapping[str, str]) -> tuple[int, ...]:
    """Where among an operator's arguments tensors are."""
    return tuple(i for i, name in enumerate(names) if types[name] in ("Tensor", "Tensor?"))
