"""A stand-in for Triton's driver. A launch passes through Triton's own binder, specialisation and cache, and then ends.

`recording` compiles nothing and reports every launch. `loading` compiles the kernel of every launch, or finds it in
Triton's cache, as on the GPU, and reports every compilation.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import triton
import triton.compiler
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource

WARP = 32

_numbers = itertools.count()


def target_of(name: str) -> GPUTarget:
    """The target of an architecture's name, such as "sm_90".

    Raises:
        ValueError: the name is not of that form.
    """
    prefix, _, number = name.partition("_")
    if prefix != "sm" or not number.isdigit():
        raise ValueError(f"target must be sm_ and a number, such as sm_90, got {name!r}")
    return GPUTarget("cuda", int(number), WARP)


@dataclass(frozen=True, eq=False)
class Variant:
    """A specialised kernel, the unit that Triton compiles. The fields are the arguments of `triton.compile`.

    Args:
        kernel, module: the kernel's name and module.
        signature: type of every argument, "constexpr" for the others.
        constants: by place, a tuple, the value of a constexpr.
        attrs: by place, what is assumed of an argument, such as [["tt.divisibility", 16]].
        options: of the compiler, such as num_warps.
    """

    kernel: str
    module: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], object]
    attrs: dict[tuple[int, ...], list]
    options: dict[str, object]

    @property
    def key(self) -> tuple:
        """Equal for two variants that have the same key in Triton's cache."""
        parts = (self.signature, self.constants, self.attrs, self.options)
        return (self.module, self.kernel, *(tuple(sorted((str(k), str(v)) for k, v in part.items())) for part in parts))

    @property
    def constexprs(self) -> dict[str, object]:
        """The constants by name; those that Triton made of an argument (None, 1) are among them."""
        names = list(self.signature)
        return {names[place[0]]: value for place, value in self.constants.items()}

    @property
    def divisible(self) -> frozenset[str]:
        """Arguments that are known to be multiples of 16."""
        names = list(self.signature)
        return frozenset(names[place[0]] for place, facts in self.attrs.items() if ["tt.divisibility", 16] in facts)


class StandIn(DriverBase):
    """Reports a target and loads nothing. Its device is a string, so it shares no cache with a real device."""

    def __init__(self, target: GPUTarget):
        super().__init__()
        self.target = target
        self.device = f"stand-in {next(_numbers)} for sm_{target.arch}"
        self.utils = _Utilities()
        self.launcher_cls = _no_launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self):
        raise NotImplementedError("a stand-in for a driver has no device")

    def get_benchmarker(self):
        raise NotImplementedError("a stand-in for a driver has no device")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("a stand-in for a driver builds no launcher")


class _Utilities:
    """The driver's functions that a compiled kernel calls before its first launch."""

    @staticmethod
    def get_device_properties(device: str) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": WARP}

    @staticmethod
    def load_binary(name: str, kernel: bytes, shared: int, device: str) -> tuple:
        """Module (none: nothing to unload), function, registers, spills, and threads per block at most."""
        return None, name, 0, 0, 1024


def _no_launcher(source, metadata) -> Callable[..., None]:
    return lambda *arguments: None


class _Unlaunched:
    """Stands where Triton keeps a compiled kernel; its launch is a call of `launched(variant, grid, arguments)`."""

    function = packed_metadata = None

    def __init__(self, variant: Variant, launched: Callable[[Variant, tuple, tuple], None]):
        self.variant, self.launched = variant, launched

    def launch_metadata(self, grid, stream, *arguments) -> None:
        return None

    def run(self, x, y, z, stream, function, packed_metadata, launch_metadata, enter, leave, *arguments) -> None:
        self.launched(self.variant, (x, y, z), arguments)


@contextlib.contextmanager
def recording(
    target: GPUTarget,
    launched: Callable[[Variant, tuple[int, int, int], tuple], None],
    found: Callable[[Variant], None] = lambda variant: None,
) -> Iterator[None]:
    """Inside, launches of Triton kernels are reported and not made.

    Args:
        launched: called with every launch's variant, grid and arguments, in the order of the kernel's parameters.
        found: called with a variant before its first launch.
    """

    def compile_nothing(source: ASTSource, target: GPUTarget, options: dict, **_) -> _Unlaunched:
        fn = source.fn
        parts = (source.signature, source.constants, source.attrs, options)
        variant = Variant(fn.fn.__name__, fn.fn.__module__, *(dict(part) for part in parts))
        found(variant)
        return _Unlaunched(variant, launched)

    with _stand_in(target, compile_nothing):
        yield


@contextlib.contextmanager
def loading(target: GPUTarget, compiled: Callable[[str, bool], None]) -> Iterator[None]:
    """Inside, kernels compile as a launch on the GPU has them compiled, and launches do nothing.

    Args:
        compiled: called with a kernel's name before its first launch, and whether it was in Triton's cache.
    """

    def listen(*, src: ASTSource, cache_hit: bool, **_) -> None:
        compiled(src.name, cache_hit)

    with _stand_in(target, triton.compiler.compile), mock.patch.object(knobs.compilation, "listener", listen):
        yield


@contextlib.contextmanager
def _stand_in(target: GPUTarget, compile: Callable) -> Iterator[None]:
    """Put the driver and a compiler in place; afterwards no kernel remembers either."""
    real, touched = triton.compiler.compile, set()
    stand_in = StandIn(target)

    def compile_and_note(source: ASTSource, **options):
        touched.add(source.fn)
        return compile(source, **options)

    # Where Triton keeps the driver without asking for a device: on a machine without one, `active` is an error.
    driver = mock.patch.object(triton.runtime.driver, "_active", stand_in)
    try:
        with driver, mock.patch.object(triton.compiler, "compile", compile_and_note):
            yield
    finally:
        for kernel in touched:
            kernel.device_caches.pop(stand_in.device, None)
            kernel.compile = real
