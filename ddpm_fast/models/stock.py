"""Stock modules: those of the network that nobody changed, so that their weights may be used without calling them.

Whatever a user does to a module (hooks, patched forward, wrapper, subclass, LoRA, other settings) makes its block call
its modules, as upstream does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeGuard, TypeVar

from torch import nn
from torch.nn.modules import module as torch_module

from ddpm_fast.runtime.dispatch import forced_backend

Stock = TypeVar("Stock", bound=nn.Module)

_CLASSES = (
    nn.Conv2d, nn.Linear, nn.Embedding, nn.Identity, nn.SiLU, nn.GELU, nn.Dropout, nn.GroupNorm, nn.Sequential,
    nn.Upsample, nn.PixelUnshuffle,
)  # fmt: skip
# Class → its forward when this module was imported: a class that is patched later is no longer stock.
_FORWARD: dict[type, Callable] = {cls: cls.forward for cls in _CLASSES}
# Class made by `accelerate` → the class that its modules stand for, the class it is made from, and that one's forward.
_STANDS_FOR: dict[type, tuple[type, type, Callable]] = {}


def stock(cls: type[Stock]) -> type[Stock]:
    """A decorator: modules of this class, and of no subclass, are stock."""
    _FORWARD[cls] = cls.forward
    return cls


def stands_for(made: type, cls: type, own: type) -> None:
    """Modules of the class `made`, a subclass of `own` by `accelerate`, are stock and count as those of `cls`."""
    _FORWARD[made] = made.forward  # type: ignore[attr-defined]  # a subclass of Module
    _STANDS_FOR[made] = (cls, own, own.forward)  # type: ignore[attr-defined]


def own_class(module: nn.Module) -> type:
    """The class of a module, which is that before `accelerate`."""
    cls = type(module)
    return _STANDS_FOR[cls][1] if cls in _STANDS_FOR else cls


def has_own_forward(cls: type) -> bool:
    """False if the forward of a stock class, or of the class that `accelerate` made it from, was replaced."""
    if _FORWARD[cls] is not cls.forward:  # type: ignore[attr-defined]
        return False
    if cls not in _STANDS_FOR:
        return True
    _, own, forward = _STANDS_FOR[cls]
    return own.forward is forward  # type: ignore[attr-defined]


def has_global_hooks() -> bool:
    """True while torch calls hooks on every module, so that every module has to be called."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def calls_every_module() -> bool:
    """True where no module's weights may be used without calling it: hooks on all of them, or the reference."""
    return forced_backend() == "reference" or has_global_hooks()


def is_unmodified(*modules: nn.Module | None) -> bool:
    """True if every module is stock and has no hooks, so its weights may be used without calling it.

    False under `use_backend("reference")`: the network then is upstream's modules in plain torch, which torch.func,
    torch.jit.trace and second derivatives take.
    """
    if calls_every_module():
        return False
    for module in modules:  # dicts, not attributes: a small network asks two hundred times in a forward pass
        if module is None:
            return False
        own, cls = module.__dict__, type(module)
        if cls not in _FORWARD or _FORWARD[cls] is not cls.forward or "forward" in own:
            return False
        if cls in _STANDS_FOR and not has_own_forward(cls):
            return False
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
    return True


def is_instance(module: object, cls: type[Stock]) -> TypeGuard[Stock]:
    """True for an unmodified module of this class; a stock module of another class may compute something else.

    The caller asks `calls_every_module`, once for all modules of a block.
    """
    made = type(module)
    if made is not cls:
        stands = _STANDS_FOR.get(made)
        if stands is None or stands[0] is not cls or not has_own_forward(made):
            return False
    elif _FORWARD[cls] is not cls.forward:
        return False
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def keeps_size(conv: nn.Conv2d, side: int) -> bool:
    """True for the settings of a convolution of odd side that keeps height and width: stride 1, zeros around."""
    own = conv.__dict__
    return (
        own["kernel_size"] == (side, side)
        and own["padding"] == (side // 2, side // 2)
        and own["stride"] == (1, 1)
        and own["dilation"] == (1, 1)
        and own["groups"] == 1
        and own["padding_mode"] == "zeros"
        and "_conv_forward" not in own
    )


def is_convolution(module: object, side: int, bias: bool = True) -> TypeGuard[nn.Conv2d]:
    """True for an unmodified `nn.Conv2d` of this side that keeps height and width, with or without a bias."""
    return (
        is_instance(module, nn.Conv2d) and keeps_size(module, side) and (parameter(module, "bias") is not None) is bias
    )


# Packages whose modules renew no weight while they run, hooks aside.
_KNOWN_PACKAGES = {"torch", "ddpm_fast"}


def knows_package(*names: str) -> None:
    """Modules of these packages renew no weight while they run, as those of torch and of this package."""
    _KNOWN_PACKAGES.update(names)
    _is_known.cache_clear()


@cache
def _is_known(package: str) -> bool:
    return package.split(".")[0] in _KNOWN_PACKAGES


def renews_no_weight(module: nn.Module) -> bool:
    """True if a call of the module runs code of known packages alone, without hooks.

    A hook such as `torch.nn.utils.weight_norm`'s makes a weight again at every call, and so does an embedding with a
    `max_norm`.
    """
    own = module.__dict__
    return _is_known(type(module).__module__) and not (
        "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"] or own.get("max_norm") is not None
    )


def show_nobody(modules: Iterable[nn.Module]) -> bool:
    """True if calls of the modules, and of those inside, show their maps to no code but that of known packages."""
    found = list(modules)
    for module in found:  # dicts, as in `is_unmodified`
        own, cls = module.__dict__, type(module)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
        if "forward" in own or _FORWARD.get(cls, cls.forward) is not cls.forward or not _is_known(cls.__module__):
            return False
        if own["_modules"]:
            found += [child for child in own["_modules"].values() if child is not None]
    return not has_global_hooks()


def why_modified(module: nn.Module) -> str | None:
    """Why a module is not stock, in one clause; None where it is."""
    cls = type(module)
    if forced_backend() == "reference":
        return "use_backend('reference') calls every module"
    if has_global_hooks():
        return "torch has hooks on every module"
    if cls not in _FORWARD:
        return f"it is a {cls.__name__}"
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return "it has a forward of its own"
    if not has_own_forward(cls):
        return f"the forward of {cls.__name__} was replaced"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "it has hooks" if any(hooks) else None


def why_by_modules(block: nn.Module) -> str:
    """Which module inside a block makes it call its modules one after another, in one clause."""
    for name, module in block.named_modules():
        reason = why_modified(module)
        if reason is not None:
            return f"{name}: {reason}" if name else reason
    return "a module inside has other settings than upstream's"


def parameter(module: Any, name: str) -> Any:
    """module.name, found in a fraction of the time where it is a parameter, as it nearly always is."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found
