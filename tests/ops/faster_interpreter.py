"""Triton's interpreter without the work that changes no result: a quarter of its calls of functions.

It has its own copy of what types, shapes and patched modules are made of, for each operation of each program. Here each
is made once. Overflows of integers are computed by Triton, too, and then dropped, since its `debug` is off.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from types import ModuleType

import numpy as np


def install(interpreter: ModuleType) -> None:
    """Change the interpreter, `triton.runtime.interpreter`, of this process."""
    leave_overflows_out(interpreter)
    look_for_builtins_once(interpreter)
    patch_language_once(interpreter)
    name_numpys_types_once(interpreter)
    describe_shapes_once(interpreter)
    compare_whole_shapes(interpreter)


def leave_overflows_out(interpreter: ModuleType) -> None:
    """Sums and products of integers are computed in int64 and compared, but `device_assert` looks only if debugging."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def look_for_builtins_once(interpreter: ModuleType) -> None:
    """Every launch patches Triton's builtins, and looks for them among all members of modules."""
    names = {}
    is_builtin, patch_attribute = interpreter.tl.core.is_builtin, interpreter._patch_attr

    def patch_builtins(module, *rest):
        if not names.get(module):
            names[module] = [name for name, member in inspect.getmembers(module) if is_builtin(member)]
        for name in names[module]:
            member = getattr(module, name)
            if is_builtin(member):
                patch_attribute(module, name, member, *rest)

    interpreter._patch_builtin = patch_builtins


def patch_language_once(interpreter: ModuleType) -> None:
    """Every call of a device function patches the language, which its kernel's launch has done."""
    tl, patch, languages = interpreter.tl, interpreter._patch_lang, {}
    nothing_to_restore = getattr(interpreter, "_LangPatchScope", lambda: None)

    def patch_language(function):
        names = id(function.__globals__)
        if names not in languages:
            values = [value for value in function.__globals__.values() if inspect.ismodule(value)]
            languages[names] = [value for value in values if value in (tl, tl.core)]
        if any(tl.core.is_builtin(language.load) for language in languages[names]):
            return patch(function)
        return nothing_to_restore()

    interpreter._patch_lang = patch_language


def name_numpys_types_once(interpreter: ModuleType) -> None:
    """The types of numpy by those of Triton are a table that is made for every look into it."""
    look_up, pointer = functools.cache(interpreter._get_np_dtype), np.dtype(np.uint64)

    def numpys_type(kind):
        scalar = kind.scalar
        return pointer if scalar.is_ptr() else look_up(scalar)

    interpreter._get_np_dtype = numpys_type


def describe_shapes_once(interpreter: ModuleType) -> None:
    """Every tensor has its shape as a tuple of `constexpr`, and every type of a block is checked and named."""
    core, types = interpreter.tl.core, {}

    @functools.cache
    def size_and_shape(*sizes):
        return core.constexpr(math.prod(sizes)), core.tuple([core.constexpr(size) for size in sizes])

    def init(tensor, handle, kind):
        tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar
        tensor.numel, tensor.shape = size_and_shape(*kind.shape) if kind.is_block() else size_and_shape()

    def block_of(element, shape):
        if element.is_ptr():
            return core.block_type(element, shape)
        key = (element.name, *shape)
        if key not in types:
            types[key] = core.block_type(element, shape)
        return types[key]

    core.tensor.__init__ = init
    core.block_type.with_element_ty = lambda kind, element: block_of(element, kind.shape)
    interpreter.InterpreterBuilder.get_block_ty = lambda builder, element, shape: block_of(element, shape)


def compare_whole_shapes(interpreter: ModuleType) -> None:
    """Operands of one shape are compared size by size, as if they had to be broadcast."""
    semantic = type(interpreter.interpreter_semantic)
    broadcast = semantic.broadcast_impl_value

    def broadcast_if_needed(self, one, other):
        kinds = one.type, other.type
        if kinds[0].is_block() and kinds[1].is_block() and kinds[0].shape.values == kinds[1].shape.values:
            return one, other
        return broadcast(self, one, other)

    semantic.broadcast_impl_value = broadcast_if_needed
