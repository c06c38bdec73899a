"""The kernels of the variational bound as the compiler sees them, at their production configurations, without a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

from aot import CAPABILITIES, Machine, compile_kernel

from ddpm_fast.ops.common.triton import tile_constants
from ddpm_fast.ops.variational_bound import triton as kernel
from ddpm_fast.runtime import triton_launch

pytestmark = pytest.mark.slow
on_sm_90 = pytest.mark.release(but=lambda capability, **_: capability == 90)  # the others: `make release-tests`

CHANNELS, PIXELS = 3, 128 * 128
FORMATS = {False: "contiguous", True: "channels-last"}

# (dtype of the output, of x_start, given noise, channels-last, x_start channels-last, flip and offset, learned
# variance, clip, detached mean): loads and stores of each thread by width in bits, of 4 numbers of each tensor (3 in a
# channels-last tile, made for 4 channels, where the halves of a pixel alternate).
CASES = {
    ("fp32", "fp32", False, False, False, False, True, False, True): ({128: 3}, {128: 2}),
    ("bf16", "fp32", False, False, False, False, True, False, True): ({64: 2, 128: 1}, {64: 2}),
    ("fp16", "u8", False, False, False, False, True, True, False): ({32: 1, 64: 2}, {64: 2}),
    ("fp32", "fp32", True, False, False, False, True, True, True): ({128: 4}, {128: 2}),
    ("bf16", "fp32", True, False, False, False, False, False, False): ({64: 1, 128: 2}, {64: 1}),
    ("bf16", "fp32", False, True, False, False, True, False, True): ({16: 6, 32: 3}, {16: 6}),
    ("bf16", "u8", False, True, False, True, True, True, False): ({8: 3, 16: 6}, {16: 6}),
    ("fp32", "fp32", False, True, True, False, True, False, False): ({32: 6, 128: 1}, {32: 6}),
    ("fp32", "fp32", False, True, True, False, False, True, True): ({128: 2}, {128: 1}),
}


def compile_forward(case, capability, tmp_path, gradient: bool = True) -> Machine:
    """Compile variational_bound_fwd_kernel as triton.py launches it for a case."""
    dtype, x_dtype, given, channels_last, x_channels_last, options, learned, clip, detach = case
    launch, shape = tile_constants(CHANNELS, PIXELS, channels_last)
    signature = {
        "partial_ptr": "*fp32",
        "output_ptr": f"*{dtype}",
        "x_ptr": f"*{x_dtype}",
        "t_ptr": "*i64",
        "table_ptr": "*fp32",
        **{name: "i32" for name in ("T", "HW", "W", "tiles")},
        **{name: "fp32" for name in ("offset_strength", "min_log_probability")},
    }
    constants = {
        "X_CHANNELS_LAST": x_channels_last,
        "NOISE_CHANNELS_LAST": False,
        "NORMALIZE": x_dtype == "u8",
        "OFFSET": options,
        "LEARNED": learned,
        "CLIP": clip,
        "DETACH_MEAN": detach,
        **shape,
    }
    optional = {"gradient_ptr": f"*{dtype}" if gradient else None, "noise_ptr": "*fp32" if given else None}
    optional |= {"seed_ptr": None if given else "*i64", "flip_ptr": "*i1" if options else None}
    signature |= {name: kind for name, kind in optional.items() if kind}
    constants |= {name: None for name, kind in optional.items() if not kind}
    return compile_kernel(
        kernel.variational_bound_fwd_kernel, signature, constants, capability, tmp_path,
        unaligned=("T", "tiles"), **kernel.options_of(launch),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _not_interpreted():
    assert not triton_launch.interpreted()


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("channels_last", FORMATS)
def test_forward(channels_last, capability, tmp_path, gate):
    cases = [case for case in CASES if case[3] == channels_last]
    machines = [compile_forward(case, capability, tmp_path) for case in cases]
    for case, machine in zip(cases, machines, strict=True):
        loads, stores = CASES[case]
        assert not machine.spills and machine.stack == machine.local == 0, (case, machine.accesses)
        found = machine.widths("LDG")  # and t, the seed, 14 numbers of the table, some of them twice
        assert all(found.get(width, 0) >= n for width, n in loads.items()), (case, found)
        assert sum(found.values()) <= sum(loads.values()) + 18 + case[5], (case, found)
        stores = stores | {32: stores.get(32, 0) + 2}  # the partial sums
        assert machine.widths("STG") == stores, (case, machine.widths("STG"))
    registers = max(machine.registers for machine in machines)
    gate("registers", f"variational_bound_fwd_kernel, {FORMATS[channels_last]}, sm_{capability}", registers)


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("channels_last", FORMATS)
def test_backward(channels_last, capability, tmp_path, gate):
    launch = triton_launch.elementwise(2 * CHANNELS * PIXELS, interpreted=False)
    machines = []
    for dtype in ("fp32", "fp16", "bf16"):
        signature = {
            "doutput_ptr": f"*{dtype}",
            "gradient_ptr": f"*{dtype}",
            "factor_ptr": "*fp32",
            "dloss_ptr": "*fp32",
            **{name: "i32" for name in ("elements", "half", "tiles")},
        }
        constants = {"CHANNELS": 2 * CHANNELS if channels_last else 0, "BLOCK": launch.block}
        machines.append(compile_kernel(
            kernel.variational_bound_bwd_kernel, signature, constants, capability, tmp_path,
            unaligned=("tiles", "half"), **launch.options,
        ))  # fmt: skip
    for accesses, machine in zip((4, 2, 2), machines, strict=True):
        assert not machine.spills
        assert machine.widths("STG") == {128: accesses}, machine.widths("STG")
        assert machine.widths("LDG")[128] == accesses, machine.widths("LDG")
    registers = max(machine.registers for machine in machines)
    gate("registers", f"variational_bound_bwd_kernel, {FORMATS[channels_last]}, sm_{capability}", registers)


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_reduce(capability, tmp_path, gate):
    launch = triton_launch.row_sum(32)
    pointers = ("loss_ptr", "terms_ptr", "factor_ptr", "partial_ptr", "table_ptr")
    signature = {**{name: "*fp32" for name in pointers}, "t_ptr": "*i64"}
    signature |= {name: "i32" for name in ("T", "tiles", "elements")}
    registers = []
    for learned in (False, True):
        for detach in (False, True):
            constants = {"LEARNED": learned, "DETACH_MEAN": detach, "BLOCK": launch.block, "BLOCKS": 1}
            machine = compile_kernel(
                kernel.variational_bound_reduce_kernel, signature, constants, capability, tmp_path, **launch.options
            )
            assert not machine.spills
            registers.append(machine.registers)
    gate("registers", f"variational_bound_reduce_kernel, sm_{capability}", max(registers))


@pytest.mark.parametrize(
    "channels, height, width",
    [(1, 1, 1), (64, 5, 5), *(pytest.param(*size, marks=pytest.mark.release) for size in ((3, 7, 1), (3, 31, 33)))],
)
def test_odd_sizes_compile(channels, height, width, tmp_path):
    """A launch passes an integer of 1 as a constant, and sizes that are no multiple of 16 as such."""
    for channels_last in (False, True):
        launch, shape = tile_constants(channels, height * width, channels_last)
        sizes = {"T": 1, "HW": height * width, "W": width, "tiles": 1}
        pointers = {"gradient_ptr": "*bf16", "output_ptr": "*bf16", "partial_ptr": "*fp32", "x_ptr": "*u8"}
        signature = {**pointers, "seed_ptr": "*i64", "flip_ptr": "*u8", "t_ptr": "*i64", "table_ptr": "*fp32"}
        signature |= {name: "i32" for name, size in sizes.items() if size != 1}
        signature |= {"offset_strength": "fp32", "min_log_probability": "fp32"}
        constants = {"noise_ptr": None, "X_CHANNELS_LAST": False, "NOISE_CHANNELS_LAST": False, "NORMALIZE": True}
        constants |= {"OFFSET": True, "LEARNED": True, "CLIP": True, "DETACH_MEAN": False, **shape}
        constants |= {name: size for name, size in sizes.items() if size == 1}
        machine = compile_kernel(
            kernel.variational_bound_fwd_kernel, signature, constants, 90, tmp_path,
            unaligned=tuple(signature), **kernel.options_of(launch),
        )  # fmt: skip
        assert not machine.spills
