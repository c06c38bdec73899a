"""The kernels of forward diffusion as the compiler sees them, at their production configurations, without a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

from aot import CAPABILITIES, ON_SM_90, Machine, compile_kernel

from ddpm_fast.ops.forward_diffusion import triton as kernel
from ddpm_fast.runtime import triton_launch

pytestmark = pytest.mark.slow
on_sm_90 = pytest.mark.release(but=lambda capability, **_: capability == 90)  # the others: `make release-tests`

CHANNELS, PIXELS = 3, 128 * 128
FORMATS = {False: "contiguous", True: "channels-last"}

# (dtype of the result or output, of x_start, given noise, channels-last, x_start channels-last, flip and offset):
# 16-byte loads, stores of each thread, which handles 16 numbers (12 in a channels-last tile, made for 4 channels).
Q_SAMPLE = {
    ("fp32", "fp32", False, False, False, False): (4, 4),
    ("bf16", "fp32", False, False, False, False): (4, 2),
    ("bf16", "u8", False, False, False, False): (1, 2),
    ("fp32", "fp32", True, False, False, False): (8, 4),
    ("fp32", "fp32", False, True, False, False): (0, 3),
    ("bf16", "fp32", False, True, True, False): (3, 2),
    ("bf16", "u8", False, True, False, True): (0, 2),
}
LOSS = {
    ("fp32", "fp32", False, False, False, False): (8, 4),
    ("fp16", "u8", False, False, False, False): (3, 2),
    ("fp32", "fp32", True, False, False, False): (12, 4),
    ("bf16", "fp32", False, True, False, False): (2, 2),
    ("bf16", "u8", False, True, False, True): (2, 2),
    ("fp32", "fp32", False, True, True, False): (6, 3),
}


def compile_images(function, pointers: dict[str, str], case, capability, tmp_path) -> Machine:
    """Compile q_sample_fwd_kernel or diffusion_loss_fwd_kernel as triton.py launches it for a case."""
    _, x_dtype, given, channels_last, x_channels_last, options = case
    launch, shape = kernel.tile_constants(CHANNELS, PIXELS, channels_last)
    signature = {
        **pointers,
        "x_ptr": f"*{x_dtype}",
        "t_ptr": "*i64",
        "table_ptr": "*fp32",
        **{name: "i32" for name in ("T", "HW", "W", "tiles")},
        "offset_strength": "fp32",
    }
    constants = {
        "X_CHANNELS_LAST": x_channels_last,
        "NOISE_CHANNELS_LAST": False,
        "NORMALIZE": x_dtype == "u8",
        "OFFSET": options,
        **shape,
    }
    optional = {"noise_ptr": "*fp32" if given else None, "seed_ptr": None if given else "*i64"}
    optional["flip_ptr"] = "*i1" if options else None
    signature |= {name: kind for name, kind in optional.items() if kind}
    constants |= {name: None for name, kind in optional.items() if not kind}
    return compile_kernel(
        function, signature, constants, capability, tmp_path, unaligned=("T", "tiles"), **launch.options
    )


def check(machine: Machine, loads: int, stores: int) -> None:
    assert not machine.spills and machine.stack == machine.local == 0, machine.accesses
    assert machine.widths("LDG").get(128, 0) >= loads, machine.widths("LDG")
    assert machine.widths("STG").get(128, 0) == stores, machine.widths("STG")


def narrow_loads(machine: Machine) -> int:
    return sum(n for width, n in machine.widths("LDG").items() if width < 128)


@pytest.fixture(autouse=True)
def _not_interpreted():
    assert not triton_launch.interpreted()


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("channels_last", FORMATS)
def test_q_sample(channels_last, capability, tmp_path, gate):
    cases, function = [case for case in Q_SAMPLE if case[3] == channels_last], kernel.q_sample_fwd_kernel
    machines = [compile_images(function, {"out_ptr": f"*{case[0]}"}, case, capability, tmp_path) for case in cases]
    for case, machine in zip(cases, machines, strict=True):
        check(machine, *Q_SAMPLE[case])
        assert set(machine.widths("STG")) == {128}, case
        if case[3] == case[4] and not case[5]:
            assert narrow_loads(machine) <= 4, case  # t, a, b, the seed
    registers = max(machine.registers for machine in machines)
    gate("registers", f"q_sample_fwd_kernel, {FORMATS[channels_last]}, sm_{capability}", registers)


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("channels_last", FORMATS)
def test_diffusion_loss(channels_last, capability, tmp_path, gate):
    cases, machines = [case for case in LOSS if case[3] == channels_last], []
    for case in cases:
        pointers = {"error_ptr": f"*{case[0]}", "output_ptr": f"*{case[0]}", "partial_ptr": "*fp32"}
        machines.append(compile_images(kernel.diffusion_loss_fwd_kernel, pointers, case, capability, tmp_path))
    for case, machine in zip(cases, machines, strict=True):
        check(machine, *LOSS[case])
        assert machine.widths("STG") == {32: 1, 128: LOSS[case][1]}, case  # the partial sum, the error
        if case[3] == case[4] and not case[5]:
            assert narrow_loads(machine) <= 4, case  # t, c, d, the seed
    registers = max(machine.registers for machine in machines)
    gate("registers", f"diffusion_loss_fwd_kernel, {FORMATS[channels_last]}, sm_{capability}", registers)


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_diffusion_loss_backward(capability, tmp_path, gate):
    launch = triton_launch.elementwise(CHANNELS * PIXELS, interpreted=False)
    machines = []
    for dtype in ("fp32", "fp16", "bf16"):
        signature = {
            "doutput_ptr": f"*{dtype}",
            "error_ptr": f"*{dtype}",
            "factor_ptr": "*fp32",
            "dloss_ptr": "*fp32",
            "elements": "i32",
            "tiles": "i32",
        }
        machines.append(compile_kernel(
            kernel.diffusion_loss_bwd_kernel, signature, {"BLOCK": launch.block}, capability, tmp_path,
            unaligned=("tiles",), **launch.options,
        ))  # fmt: skip
    for accesses, machine in zip((4, 2, 2), machines, strict=True):
        check(machine, accesses, accesses)
        assert narrow_loads(machine) == 2  # factor, dloss
    gate("registers", f"diffusion_loss_bwd_kernel, sm_{capability}", max(machine.registers for machine in machines))


@pytest.mark.parametrize("capability", ON_SM_90)
def test_diffusion_loss_reduce(capability, tmp_path, gate):
    launch = triton_launch.row_sum(32)
    signature = {
        **{name: "*fp32" for name in ("loss_ptr", "factor_ptr", "partial_ptr", "table_ptr")},
        "t_ptr": "*i64",
        **{name: "i32" for name in ("T", "tiles", "elements")},
    }
    constants = {"BLOCK": launch.block, "BLOCKS": 1}
    machine = compile_kernel(
        kernel.diffusion_loss_reduce_kernel, signature, constants, capability, tmp_path, **launch.options
    )
    assert not machine.spills
    gate("registers", f"diffusion_loss_reduce_kernel, sm_{capability}", machine.registers)


@pytest.mark.release(but=lambda channels, height, width: height == width < 31)
@pytest.mark.parametrize("channels, height, width", [(1, 1, 1), (3, 7, 1), (3, 31, 33), (64, 5, 5)])
def test_odd_sizes_compile(channels, height, width, tmp_path):
    """A launch passes an integer of 1 as a constant, and sizes that are no multiple of 16 as such."""
    for channels_last in (False, True):
        launch, shape = kernel.tile_constants(channels, height * width, channels_last)
        sizes = {"T": 1, "HW": height * width, "W": width, "tiles": 1}
        pointers = {"error_ptr": "*bf16", "output_ptr": "*bf16", "partial_ptr": "*fp32", "x_ptr": "*u8"}
        signature = {**pointers, "seed_ptr": "*i64", "flip_ptr": "*u8", "t_ptr": "*i64", "table_ptr": "*fp32"}
        signature |= {name: "i32" for name, size in sizes.items() if size != 1} | {"offset_strength": "fp32"}
        constants = {"noise_ptr": None, "X_CHANNELS_LAST": False, "NOISE_CHANNELS_LAST": False, "NORMALIZE": True}
        constants |= {"OFFSET": True, **shape} | {name: size for name, size in sizes.items() if size == 1}
        machine = compile_kernel(
            kernel.diffusion_loss_fwd_kernel, signature, constants, 90, tmp_path,
            unaligned=tuple(signature), **launch.options,
        )  # fmt: skip
        assert not machine.spills
