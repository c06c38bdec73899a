"""The arithmetic of NVIDIA GPUs in Triton's interpreter, to judge tolerances without a GPU.

`emulated` makes the interpreter compute as compiled kernels do, with their tiles: docs/arithmetic.md lists every
operation, the instruction it becomes and the instruction's error. `pytest tests/ops/<op>/test_triton.py --arithmetic
sm_90` runs a file of kernel tests with it; tests/ops/test_gpu_arithmetic.py does so.

An instruction whose documentation gives only an error bound returns one of the float32 numbers within that bound; a
hash of the operands chooses which. The error of a whole kernel is then that of a GPU whose units use up their bounds.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import numpy as np


@dataclass(frozen=True)
class MatrixUnit:
    """How a tensor core adds products to an accumulator: a few at once, aligned to the largest of all terms.

    Fasi et al. 2021 ("Numerical behavior of NVIDIA tensor cores") found the scheme; the numbers are those of the
    bit-exact models of Khattak & Mikaitis 2025 ("Accurate Models of NVIDIA Tensor Cores").

    Args:
        tf32, half: products that are added at once, by type of the factors.
        extra_bits: bits that aligned terms keep below the last of float32; what is further below is cut off.
    """

    tf32: int
    half: int
    extra_bits: int


UNITS = {"sm_80": MatrixUnit(4, 8, 1), "sm_90": MatrixUnit(8, 16, 2), "sm_100": MatrixUnit(8, 16, 2)}


def toward_zero(x: np.ndarray) -> np.ndarray:
    """float64 → float32, rounded toward zero."""
    y = x.astype(np.float32)
    return np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, at_once: int, extra_bits: int) -> np.ndarray:
    """c + a·b on a matrix unit: (m, k), (k, n), (m, n) float32, factors with at most 11 significant bits."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[1], at_once):
        terms = a[:, k : k + at_once, None] * b[None, k : k + at_once, :]  # (m, at_once, n), exact
        largest = np.maximum(np.abs(terms).max(axis=1), np.abs(c))
        last = np.ldexp(1.0, np.frexp(largest)[1] - 24 - extra_bits)  # of the aligned terms' bits
        units = np.trunc(terms / last[:, None]).sum(axis=1) + np.trunc(c / last)
        c = toward_zero(units * last)
    return c


def tf32_nearest(x: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32.f32: 11 significant bits, ties away from zero."""
    return ((x.view(np.uint32).astype(np.uint64) + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)


def tf32_cut(x: np.ndarray) -> np.ndarray:
    """A float32 factor as a matrix unit reads it: the lower 13 bits are 0."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def multiply_tf32x3(a, b, c, unit: MatrixUnit, *, inside: bool = False) -> np.ndarray:
    """c + a·b of float32 factors as Triton's "tf32x3" makes it; three products, and c added outside the matrix unit.

    `inside` is the order that loses accuracy over long loops: the matrix unit's accumulator goes on from c.
    """
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    a_big, b_big = tf32_nearest(a), tf32_nearest(b)
    a_small, b_small = tf32_cut(a - a_big), tf32_cut(b - b_big)
    total = c if inside else np.zeros_like(c)
    for x, y in ((a_small, b_big), (a_big, b_small), (a_big, b_big)):
        total = multiply(x, y, total, unit.tf32, unit.extra_bits)
    return total if inside else total + c


def multiply_in_order(a, b, c) -> np.ndarray:
    """c + a·b by fused multiply-adds, one after another: products of "ieee" precision."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(a.shape[1]):
        c = (a[:, k, None] * b[None, k] + c).astype(np.float32)
    return c


def _bits(*operands: np.ndarray) -> np.ndarray:
    """A hash of float32 operands (the finalizer of MurmurHash3)."""
    h = np.uint32(0x9E3779B9)
    for operand in operands:
        h = (h ^ np.ascontiguousarray(operand, np.float32).view(np.uint32)) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        h = h ^ (h >> np.uint32(16))
    return h


def within(exact: np.ndarray, ulps: int, *operands: np.ndarray) -> np.ndarray:
    """A float32 less than `ulps` units in the last place from float64 numbers; what float32 holds stays as it is."""
    nearest = exact.astype(np.float32)
    below = np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    step = (_bits(*operands) >> np.uint32(7)) % np.uint32(2 * ulps)  # of 2·ulps candidates
    found = below
    for _ in range(ulps - 1):
        found = np.nextafter(found, np.float32(-np.inf))
    for n in range(2 * ulps - 1):
        found = np.where(step > n, np.nextafter(found, np.float32(np.inf)), found)
    return np.where((nearest == exact) | ~np.isfinite(nearest), nearest, found)


def div_full(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """div.full.f32: the numerator times a reciprocal that is within a unit in the last place; within 2 in all."""
    with np.errstate(all="ignore"):
        exact = x.astype(np.float64) / y
        nearest = exact.astype(np.float32)
        product = x * within(1.0 / y.astype(np.float64), 1, y)
        return np.where(np.abs(product - exact) <= 2 * np.spacing(np.abs(nearest)), product, nearest)


def sqrt_approx(x: np.ndarray) -> np.ndarray:
    """sqrt.approx.ftz.f32: within 2^-23 of the root, subnormal numbers are 0."""
    with np.errstate(all="ignore"):
        x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)
        return within(np.sqrt(x.astype(np.float64)), 1, x)


def exp2_approx(x: np.ndarray) -> np.ndarray:
    """ex2.approx.f32: within 2 units in the last place."""
    with np.errstate(all="ignore"):
        return within(np.exp2(x.astype(np.float64)), 2, x)


def exp_approx(x: np.ndarray) -> np.ndarray:
    """tl.exp: ex2.approx.f32 of x·log2 e, that product rounded to float32."""
    with np.errstate(all="ignore"):
        return exp2_approx(x * np.float32(1.4426950408889634))


def log2_approx(x: np.ndarray) -> np.ndarray:
    """lg2.approx.f32: within 2^-22 where x is in (½, 2), relatively elsewhere."""
    with np.errstate(all="ignore"):
        exact = np.log2(x.astype(np.float64))
        direction = (_bits(x) >> np.uint32(7)).astype(np.float64) / 2.0**24 - 1  # in [−1, 1)
        return (exact + direction * 2.0**-22 * np.maximum(1, np.abs(exact)) * (exact != 0)).astype(np.float32)


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 → the bits of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


@contextmanager
def emulated(name: str, *, inside: bool = False) -> Iterator[None]:
    """Triton's interpreter with the arithmetic and the tiles of a GPU.

    Args:
        name: one of UNITS.
        inside: see `multiply_tf32x3`.
    """
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    from ddpm_fast import ops
    from ddpm_fast.ops.common import triton as common
    from ddpm_fast.runtime import triton_launch

    unit, builder, handle = UNITS[name], interpreter.InterpreterBuilder, interpreter.TensorHandle
    exactly = {op: getattr(builder, op) for op in ("create_fmul", "create_fadd", "create_fsub", "cast_impl")}

    def values(x) -> np.ndarray:
        if x.dtype.scalar == tl.bfloat16:
            return (x.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return x.data.astype(np.float32)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        x, y, c = values(a), values(b), d.data.astype(np.float32)
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            return handle(np.matmul(x, y) + c, d.dtype.scalar)
        if a.dtype.scalar != tl.float32:
            result = multiply(x, y, c, unit.half, unit.extra_bits)
        elif input_precision == ir.INPUT_PRECISION.TF32x3:
            result = multiply_tf32x3(x, y, c, unit, inside=inside)
        elif input_precision == ir.INPUT_PRECISION.TF32:
            result = multiply(tf32_nearest(x.copy()), tf32_nearest(y.copy()), c, unit.tf32, unit.extra_bits)
        else:
            result = multiply_in_order(x, y, c)
        return handle(result, d.dtype.scalar)

    def unary(function):
        return lambda self, x: handle(function(x.data), x.dtype.scalar)

    fuses = [True]
    launch = interpreter.GridExecutor.__call__

    def launch_with_options(self, *args, **options):
        fuses.append(options.get("enable_fp_fusion", True))
        try:
            return launch(self, *args, **options)
        finally:
            fuses.pop()

    def product(self, x, y):
        result = exactly["create_fmul"](self, x, y)
        if x.data.dtype == np.float32 and fuses[-1]:
            result.product = x.data.astype(np.float64) * y.data  # exact: a sum may fuse with it
        return result

    def fused(name, sign):
        def add(self, x, y):
            for one, other, one_sign, other_sign in ((x, y, 1, sign), (y, x, sign, 1)):
                if hasattr(one, "product"):
                    with np.errstate(all="ignore"):
                        total = one_sign * one.product + other_sign * other.data.astype(np.float64)
                        return handle(total.astype(np.float32), x.dtype.scalar)
            return exactly[name](self, x, y)

        return add

    def divide(self, x, y):
        return handle(div_full(x.data, y.data), x.dtype.scalar)

    def cast(self, x, kind, *_):
        if x.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            return handle(_bfloat16(x.data), tl.bfloat16)
        return exactly["cast_impl"](self, x, kind)

    replaced = {
        "create_dot": dot,
        "create_fdiv": divide,
        "create_sqrt": unary(sqrt_approx),
        "create_exp": unary(exp_approx),
        "create_exp2": unary(exp2_approx),
        "create_log2": unary(log2_approx),
        "create_fmul": product,
        "create_fadd": fused("create_fadd", 1),
        "create_fsub": fused("create_fsub", -1),
        "cast_impl": cast,
        "create_fp_to_fp": cast,
    }
    compiled = SimpleNamespace(**{**vars(triton_launch), "interpreted": lambda: False})
    with ExitStack() as stack:
        for op, function in replaced.items():
            stack.enter_context(mock.patch.object(builder, op, function))
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", launch_with_options))
        for module in pkgutil.walk_packages(ops.__path__, "ddpm_fast.ops."):
            if module.name.endswith((".triton", ".launch")):  # those that choose launches
                place = importlib.import_module(module.name)
                stack.enter_context(mock.patch.object(place, "triton_launch", compiled))
        stack.enter_context(mock.patch.object(common, "_INTERPRETED", tl.constexpr(False)))
        yield
