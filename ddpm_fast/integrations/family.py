"""How a family of networks says which of its classes run fused ops, and when.

A family is a file in this folder. It imports nothing of its package: a class is named by its path, and declared with
the forward that replaces the class's own.

    from ddpm_fast.integrations.family import channels_last, fast, own_forward, why_not
    from ddpm_fast.models.stock import is_convolution, is_instance
    from ddpm_fast.runtime.autocast import to_autocast_dtype

    def _why_not_block(block: Any) -> str | None:
        # Asked by `accelerate` and before every call; one clause, or None where the op computes the block.
        if not is_convolution(block._modules.get("conv1"), 3):
            return why_not(block, "conv1")
        return None

    @fast("package.blocks.Block", runs="preactivation_block", refuses=_why_not_block)
    def block(module: Any, x: torch.Tensor, emb: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if kwargs:  # a call, other than a module, that the op does not compute
            return own_forward(module, x, emb, **kwargs)
        (x,) = to_autocast_dtype(channels_last(x))
        return preactivation_block(x, ...)

The frame runs the class's own forward, without asking the family, under `use_backend("reference")`, in forward mode and
inside torch.func's transforms, with hooks on every module, where the class's forward was replaced, where a rule of
`rules.py` says that it is faster, and where a module's class was changed after `accelerate` (torch's parametrizations).
Hooks on the module itself are called around either forward, and `module.forward = ...` replaces both.

A family's file is listed in `FAMILIES` with the package that has to be loaded for it. For classes of which
`is_instance` knows nothing there is `is_unchanged(module, "package.blocks.Norm")`. A network's mixin whose forward
computes a module by an op says so to `explain` in `computed_modules(self)`, which gives modules and their ops. An
object around a network, such as a pipeline, is declared with `around`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ddpm_fast.integrations import rules
from ddpm_fast.integrations.weights import lay_out_weights
from ddpm_fast.models.stock import calls_every_module, has_own_forward, own_class, stands_for, why_modified
from ddpm_fast.runtime.dispatch import forced_backend, in_forward_mode, never_refuses


@dataclass(frozen=True)
class Fast:
    """What replaces the forward of a class.

    Args:
        path: the class: its module, a dot, its name.
        runs: the op or ops, for `explain` and for the rules.
        refuses: takes a module; None where the fast forward computes it, else one clause.
        forward: called as the class's forward; None where `mixin` has one.
        mixin: a class whose methods the accelerated class has before those of its own.
        stands_for: the class for which `stock.is_instance` takes accelerated modules; their own if None.
        order: of several for one class, those with smaller numbers are asked first.
        inside: more modules to replace, those inside a module of this class that are known by their place alone.
        is_network: `explain` has lines for the modules inside, too.
        casts_weights: the class's own forward casts its weights to the dtype of its input.
    """

    path: str
    runs: str
    refuses: Callable[[Any], str | None] = never_refuses
    forward: Callable[..., Any] | None = None
    mixin: type | None = None
    stands_for: type | None = None
    order: int = 0
    inside: Callable[[Any], Iterable[tuple[nn.Module, Fast]]] | None = None
    is_network: bool = False
    casts_weights: bool = False


# File of a family → the package that has to be loaded for it.
FAMILIES = {
    "torch_modules": "torch",
    "upstream": "denoising_diffusion_pytorch",
    "rectified_flow": "rectified_flow_pytorch",
    "diffusers": "diffusers",
    "diffusers_pipelines": "diffusers",
    "openai": "torchcfm",
    "edm": "physicsnemo",
}

# Path of a class → what may replace its forward; the first that does not refuse a module does.
_FAST: dict[str, list[Fast]] = {}
# The same, with those that are known by their place in a network.
_ALL: dict[str, list[Fast]] = {}
# Paths of classes that are not replaced and do nothing besides computing.
_PLAIN: set[str] = set()
# Path of a class of objects around networks → (accelerate it, restore it).
_AROUND: dict[str, tuple[Callable[[Any], None], Callable[[Any], None]]] = {}
# Class → its path and its forward; see `known`.
_KNOWN: dict[type, tuple[str, Any]] = {}
# (Class, replacement) → the accelerated class.
_MADE: dict[tuple[type, Fast], type] = {}


def load_families() -> None:
    """Import the families of the packages that are loaded."""
    for name, package in FAMILIES.items():
        if package in sys.modules:
            import_module(f"ddpm_fast.integrations.{name}")


def declare(declared: Fast, anywhere: bool = True) -> Fast:
    """Add a replacement; see `fast`. One that is not for modules anywhere is named by the `inside` of another."""
    _ALL.setdefault(declared.path, []).append(declared)
    if anywhere:
        options = _FAST.setdefault(declared.path, [])
        options.append(declared)
        options.sort(key=lambda option: option.order)
    return declared


def fast(
    *paths: str,
    runs: str,
    refuses: Callable[[Any], str | None] = never_refuses,
    order: int = 0,
    casts_weights: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the function is called as the forward of modules of these classes; see the module's docstring."""

    def declared(forward: Callable[..., Any]) -> Callable[..., Any]:
        for path in paths:
            declare(Fast(path, runs, refuses, forward, order=order, casts_weights=casts_weights))
        return forward

    return declared


def computes_plainly(*paths: str) -> None:
    """Say of classes that are not replaced that their forward acts on tensors, weights and settings alone."""
    _PLAIN.update(paths)


def plain_classes() -> Set[str]:
    """The paths of classes of which a family has said `computes_plainly`."""
    return _PLAIN


def around(path: str, restore: Callable[[Any], None]) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """A decorator: the function accelerates, in place, objects of a class that is no module, and of its subclasses."""

    def declared(accelerate: Callable[[Any], None]) -> Callable[[Any], None]:
        _AROUND[path] = (accelerate, restore)
        return accelerate

    return declared


def path_of(cls: type) -> str:
    """The path by which a family names a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def options_for(module: nn.Module) -> list[Fast]:
    """What may replace the forward of a module's class."""
    return _FAST.get(path_of(own_class(module)), [])


def handlers_around(thing: object) -> tuple[Callable[[Any], None], Callable[[Any], None]] | None:
    """How an object that is no module is accelerated and restored; None where no family knows its class."""
    for cls in type(thing).__mro__:
        if path_of(cls) in _AROUND:
            return _AROUND[path_of(cls)]
    return None


def own_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module's own class, by which it computes where it is not accelerated."""
    return _own(type(module)).forward(module, *args, **kwargs)  # type: ignore[attr-defined]


def _own(cls: type) -> type:
    return getattr(cls, "_ddpm_fast_own", cls)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """The map in the layout of all fast forwards; itself where it has it."""
    return x.contiguous(memory_format=torch.channels_last)


def is_unchanged(module: Any, *paths: str) -> bool:
    """True if a module is of one of these classes, with the forward that the class has in its file, and has no hooks.

    The weights and settings of such a module may be used without calling it.
    """
    return why_changed(module, *paths) is None


def why_changed(module: Any, *paths: str) -> str | None:
    """Why not `is_unchanged`, in one clause."""
    if not isinstance(module, nn.Module):
        return f"it is a {type(module).__name__}"
    made = type(module)
    cls: Any = own_class(module)
    path, forward = known(cls)
    if path not in paths:
        return f"it is a {cls.__name__}"
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    if forward is not cls.forward or (made is not cls and not has_own_forward(made)):
        return f"the forward of {cls.__name__} was replaced"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "it has hooks" if any(hooks) else None


def known(cls: type) -> tuple[str, Any]:
    """The path of a class and the forward that it has in its file, None where it has another one when first asked.

    `accelerate` asks for all classes of a network, since dynamo could not trace the first question.
    """
    if cls not in _KNOWN:
        _KNOWN[cls] = (path_of(cls), _forward_as_written(cls))
    return _KNOWN[cls]


def _forward_as_written(cls: Any) -> Any:
    """A class's forward if it is a function of the file of its class, or of a class that it inherits from."""
    for base in cls.__mro__:
        forward = base.__dict__.get("forward")
        if forward is not None:
            name, module = getattr(forward, "__qualname__", ""), getattr(forward, "__module__", None)
            return forward if module == base.__module__ and name.endswith(f"{base.__name__}.forward") else None
    return None


def why_not(module: nn.Module, name: str) -> str:
    """Why the module `name` inside another is not computed from its weights, in one clause that names it."""
    inner = module._modules.get(name)
    if inner is None:
        return f"there is no {name}"
    return f"{name}: {why_modified(inner) or 'it has other settings than the op'}"


def why_refused(module: nn.Module, option: Fast) -> str | None:
    """Why `accelerate` leaves a module as it is, in one clause; None where it replaces its forward."""
    cls: Any = own_class(module)
    if known(cls)[1] is not cls.forward:
        return f"the forward of {cls.__name__} was replaced"
    return option.refuses(module)


def why_own_forward(module: nn.Module, args: Sequence[Any] = ()) -> str | None:
    """Why an accelerated module runs its own forward, in one clause; None where it runs the fast one.

    Args:
        args: of the call, for rules about shapes; () asks about the module alone.
    """
    cls = type(module)
    declared: Fast = cls._ddpm_fast  # type: ignore[attr-defined]
    if calls_every_module():
        reference = forced_backend() == "reference"
        return "use_backend('reference') calls every module" if reference else "torch has hooks on every module"
    if in_forward_mode() or _in_transform():
        return "torch.func and forward mode take what operators of libraries return for constants"
    if cls is not cls._ddpm_fast_made:  # type: ignore[attr-defined]
        return f"its class was changed to {cls.__name__}"
    if not has_own_forward(cls):
        return f"the forward of {cls.__name__} was replaced"
    reason = declared.refuses(module)
    return rules.why_slower(declared.runs, module, args) if reason is None else reason


def computes(module: Any, forward: Callable[..., Any], *args: Any) -> bool:
    """True if a call of a module with these tensors is a call of this fast forward and of nothing else.

    A network's forward may then compute the module itself.
    """
    declared: Fast | None = getattr(type(module), "_ddpm_fast", None)
    if declared is None or declared.forward is not forward:
        return False
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return not hooks and "forward" not in own and why_own_forward(module, args) is None


def _in_transform() -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def made_class(own: Any, declared: Fast) -> type:
    """The accelerated subclass of a class, of the same name."""
    made = _MADE.get((own, declared))
    if made is None:
        bases = (own,) if declared.mixin is None else (declared.mixin, own)
        body = {
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "__doc__": own.__doc__,
            "__init__": own.__init__,  # type(module)(...), as slices and LoRA call it
            "__reduce_ex__": _reduce_ex,
            "_ddpm_fast": declared,
            "_ddpm_fast_own": own,
            "_apply": _apply(own),
            "forward": _forward(own, declared),
        }
        metaclass: Any = type(own)
        made = metaclass(own.__name__, bases, body)
        made._ddpm_fast_made = made
        stands_for(made, declared.stands_for or own, own)
        _MADE[own, declared] = made
    return made


def _forward(own: Any, declared: Fast) -> Callable[..., Any]:
    computes: Any = declared.forward or declared.mixin.forward  # type: ignore[union-attr]

    @functools.wraps(own.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Of a restored module, whoever kept this method, such as a wrapper that was put around it before.
        if not hasattr(type(self), "_ddpm_fast") or why_own_forward(self, args or (*kwargs.values(),)) is not None:
            return own.forward(self, *args, **kwargs)
        return computes(self, *args, **kwargs)

    return forward


def _apply(own: Any) -> Callable[..., Any]:
    @functools.wraps(own._apply)
    def apply(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        own._apply(self, *args, **kwargs)  # moves the module to another device
        lay_out_weights(self)
        return self

    return apply


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """A pickle of the own class, accelerated when it is loaded; copy.deepcopy goes through this, too."""
    cls = type(self)
    reduced = super(cls._ddpm_fast_made, self).__reduce_ex__(protocol)
    _, args, *rest = reduced
    if args[:1] != (cls,) or cls is not cls._ddpm_fast_made:
        return reduced
    return (_rebuild, (_own(cls), cls._ddpm_fast.runs), *rest)


def _rebuild(own: type, runs: str) -> Any:
    load_families()
    options = [option for option in _ALL.get(path_of(own), []) if option.runs == runs]
    cls = made_class(own, options[0]) if options else own
    return cls.__new__(cls)  # type: ignore[call-overload]
