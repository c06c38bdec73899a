"""The kernels of norm_silu as the compiler sees them, at their production configurations, without a GPU."""

from __future__ import annotations

import importlib.util
import itertools
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

from aot import CAPABILITIES, ON_SM_90, Machine, compile_kernel

from ddpm_fast.ops.norm_silu import launch
from ddpm_fast.ops.norm_silu import triton as kernel

pytestmark = pytest.mark.slow
on_sm_90 = pytest.mark.release(but=lambda capability, **_: capability == 90)  # the others: `make release-tests`

# Of branches of the output, and the sum of all.
BRANCHES = ("grad2_ptr", "grad3_ptr", "total_ptr")
MAPS = ("x_ptr", "out_ptr", "residual_ptr", "grad_ptr", "dx_ptr", "added_ptr", *BRANCHES)
ROWS = ("scale_ptr", "shift_ptr")  # the time embedding's: of the maps' dtype under autocast
FLOATS = ("root_c", "kept_scale", "eps")
BITS = {"bf16": 16, "fp32": 32}

# The stages of Unet(64, (1, 2, 4, 8)) at 128×128: channels and pixels.
STAGES = {64: 128**2, 128: 64**2, 256: 32**2, 512: 16**2}
# Kernel: whole rows, sums, maps read, maps written.
KERNELS = {
    "rms_norm_silu_fwd_kernel": (True, False, 1, 1),
    "rms_norm_silu_bwd_kernel": (True, True, 2, 1),
    "group_moments_kernel": (False, True, 1, 0),
    "group_norm_silu_fwd_kernel": (False, False, 1, 1),
    "group_norm_silu_sums_kernel": (False, True, 2, 0),
    "group_norm_silu_bwd_kernel": (False, True, 2, 1),
}


# Their launches bound the registers; loops over tiles are pipelined.
BOUNDED = ("rms_norm_silu_bwd_kernel", "group_norm_silu_sums_kernel", "group_norm_silu_bwd_kernel")


def compile_stage(
    name: str,
    dtype: str,
    C: int,
    everything: bool,
    capability: int,
    tmp_path,
    bias_rows: bool = False,
    more: tuple[str, ...] = (),
):
    """A kernel as `forward` and `backward` launch it on channels-last maps; with `everything`, residual and dropout."""
    function = getattr(kernel, name)
    whole_rows, sums, *_ = KERNELS[name]
    tile = launch.choose_tile(STAGES[C], C, whole_rows=whole_rows, sums=sums, dropout=everything)
    constants = {"stride_c": 1, "ACTIVATION": True, "QUADS": tile.block_n % 4 == 0, "TILES": tile.tiles}
    constants |= {"BLOCK_N": tile.block_n, "BLOCK_C": tile.block_c, "CHUNK": tile.chunk, "seed_ptr": None}
    constants |= dict.fromkeys(("residual_ptr", "added_ptr", *BRANCHES)) | {"BIAS_ROWS": C * bias_rows}
    more += ("seed_ptr", "residual_ptr") if everything else ()
    constants = {n: value for n, value in constants.items() if n in function.arg_names and n not in more}
    signature = {n: type_of(n, dtype) for n in function.arg_names if n not in constants}
    unaligned = tuple(n for n in ("tiles", "chunks", "G", "threshold", "scaled") if n in signature)
    given = (everything, "sums" not in name, "added_ptr" in more, "total_ptr" in more)
    most = launch.most_registers(*given) if name in BOUNDED else None
    machine = compile_kernel(
        function, signature, constants, capability, tmp_path,
        num_warps=tile.num_warps, unaligned=unaligned, maxnreg=most,
    )  # fmt: skip
    return machine, tile


def type_of(name: str, dtype: str) -> str:
    if name in MAPS + ROWS:
        return f"*{dtype}"
    if name == "seed_ptr":
        return "*i64"
    if name.endswith("_ptr") or name in FLOATS:
        return "*fp32" if name.endswith("_ptr") else "fp32"
    return "i64" if name == "threshold" else "i32"


def assert_fit(machine: Machine, tile, name: str, dtype: str, everything: bool) -> None:
    _, _, reads, writes = KERNELS[name]
    assert not machine.spills, name
    reads += everything and name.endswith("fwd_kernel")
    per_map = tile.block_n * tile.block_c // (32 * tile.num_warps) * BITS[dtype] // 128
    if name in BOUNDED:  # asynchronous copies into shared memory: those before the loop, and those of the next tile
        assert machine.widths("LDGSTS").get(128, 0) >= 2 * reads * per_map, (name, machine.accesses)
    else:
        assert machine.widths("LDG").get(128, 0) >= reads * per_map, (name, machine.accesses)
    # What is stored besides are statistics and partial sums, at most one row or column of the tile each.
    assert machine.widths("STG").get(128, 0) >= writes * per_map, (name, machine.accesses)
    assert sum(n for width, n in machine.widths("STG").items() if width < 128) <= 3, (name, machine.accesses)


def check_stages(name: str, channels, everything: bool, capability: int, tmp_path, gate, what: str) -> None:
    cases = list(itertools.product(BITS, channels))
    compiled = [compile_stage(name, dtype, C, everything, capability, tmp_path) for dtype, C in cases]
    for (dtype, _), (machine, tile) in zip(cases, compiled, strict=True):
        assert_fit(machine, tile, name, dtype, everything)
    gate("registers", f"{what}, sm_{capability}", max(machine.registers for machine, _ in compiled))


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
def test_registers_and_accesses(name, capability, tmp_path, gate):
    check_stages(name, STAGES if name.startswith("rms") else (64, 512), False, capability, tmp_path, gate, name)


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", [name for name in KERNELS if "moments" not in name])
def test_registers_and_accesses_with_dropout_and_residual(name, capability, tmp_path, gate):
    check_stages(name, (64, 512), True, capability, tmp_path, gate, f"{name} with dropout and residual")


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", [name for name in KERNELS if name.startswith("group")])
def test_registers_and_accesses_with_a_bias_for_each_sample(name, capability, tmp_path, gate):
    machine, tile = compile_stage(name, "fp32", 512, False, capability, tmp_path, bias_rows=True)
    assert_fit(machine, tile, name, "fp32", False)
    gate("registers", f"{name} with a bias for each sample, sm_{capability}", machine.registers)


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_registers_and_accesses_with_a_gradient_beside(capability, tmp_path, gate):
    """The third map is read by 16 bytes a thread, too, in whichever way the compiler brings it."""
    name, cases = "group_norm_silu_bwd_kernel", list(itertools.product(BITS, (64, 512)))
    compiled = [compile_stage(name, *case, False, capability, tmp_path, more=("added_ptr",)) for case in cases]
    for (dtype, _), (machine, tile) in zip(cases, compiled, strict=True):
        assert_fit(machine, tile, name, dtype, False)
        per_map = tile.block_n * tile.block_c // (32 * tile.num_warps) * BITS[dtype] // 128
        wide = machine.widths("LDG").get(128, 0) + machine.widths("LDGSTS").get(128, 0)
        assert wide >= 5 * per_map, machine.accesses  # two maps before the loop and in it, and the third
    registers = max(machine.registers for machine, _ in compiled)
    gate("registers", f"group_norm_silu_bwd_kernel with a gradient beside, sm_{capability}", registers)


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["rms_norm_silu_bwd_kernel", "group_norm_silu_sums_kernel"])
def test_registers_and_accesses_with_gradients_of_branches(name, capability, tmp_path, gate):
    """Three gradients are read and their sum is written, by 16 bytes a thread."""
    cases = list(itertools.product(BITS, (64, 512)))
    compiled = [compile_stage(name, *case, False, capability, tmp_path, more=BRANCHES) for case in cases]
    for (dtype, _), (machine, tile) in zip(cases, compiled, strict=True):
        per_map = tile.block_n * tile.block_c // (32 * tile.num_warps) * BITS[dtype] // 128
        wide = machine.widths("LDG").get(128, 0) + machine.widths("LDGSTS").get(128, 0)
        assert not machine.spills and wide >= 4 * per_map, (machine.registers, machine.accesses)
        writes = KERNELS[name][3] + 1
        assert machine.widths("STG").get(128, 0) >= writes * per_map, machine.accesses
    registers = max(machine.registers for machine, _ in compiled)
    gate("registers", f"{name} with gradients of branches, sm_{capability}", registers)


# Kernels whose program has whole groups: maps read. Maps of CIFAR-10's networks: type, pixels, channels of 32 groups.
WHOLE = {"whole_group_norm_silu_fwd_kernel": 1, "whole_group_norm_silu_bwd_kernel": 2}
WHOLE_MAPS = [("fp32", 1024, 128), ("fp32", 1024, 256), ("fp32", 16, 256), ("bf16", 1024, 256), ("bf16", 256, 384)]
# What is there besides x, gain, offset and bias.
WHOLE_OPTIONS = {
    "bias rows": ("fwd", "bwd"),
    "added": ("bwd",),
    "branches": ("bwd",),
    "scaled": ("fwd", "bwd"),
    "everything": ("fwd", "bwd"),
}


def compile_whole(name: str, dtype: str, HW: int, C: int, option: str, capability: int, tmp_path):
    """A kernel as it is launched on channels-last maps."""
    function, chosen = getattr(kernel, name), launch.choose_groups(HW, C, 32)
    constants = {"stride_c": 1, "ACTIVATION": True, "QUADS": True, "D": C // 32, "BLOCK_N": chosen.block_n}
    constants |= {"BLOCK_C": chosen.block_c, "BLOCK_G": chosen.groups, "BIAS_ROWS": C * (option == "bias rows")}
    if option != "everything":
        constants |= {"seed_ptr": None, "residual_ptr": None}
    if option not in ("scaled", "everything"):
        constants |= dict.fromkeys(ROWS)
    if option != "added":
        constants |= {"added_ptr": None}
    if option != "branches":
        constants |= dict.fromkeys(BRANCHES)
    constants = {n: value for n, value in constants.items() if n in function.arg_names}
    signature = {n: type_of(n, dtype) for n in function.arg_names if n not in constants}
    unaligned = tuple(n for n in ("threshold",) if n in signature)
    options = {"num_warps": chosen.num_warps, "unaligned": unaligned}
    return compile_kernel(function, signature, constants, capability, tmp_path, **options), chosen


# Everything at once takes the most registers, on each of the maps; single options have two of them, one of either type.
@pytest.mark.release(but=lambda maps, capability, **_: maps == "two" and capability == 90)
@pytest.mark.parametrize("maps", ["two", "all"])
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", WHOLE)
def test_registers_and_accesses_of_whole_groups(name, capability, maps, tmp_path, gate):
    """No spills, and maps in pieces of 8 or 16 bytes."""
    options = [option for option, kernels in WHOLE_OPTIONS.items() if name[-10:-7] in kernels]
    cases = list(itertools.product(WHOLE_MAPS, options))
    if maps == "two":
        cases = [(sizes, option) for sizes, option in cases if option == "everything" or sizes in WHOLE_MAPS[::3]]
    compiled = [compile_whole(name, *sizes, option, capability, tmp_path) for sizes, option in cases]
    for ((dtype, HW, C), option), (machine, chosen) in zip(cases, compiled, strict=True):
        assert not machine.spills, (dtype, HW, C, option)
        reads = WHOLE[name] + (option == "added") + (option == "everything" and "fwd" in name)
        reads, writes = (reads + 2, 2) if option == "branches" else (reads, 1)
        bits = chosen.block_n * chosen.block_c // (32 * chosen.num_warps) * BITS[dtype]
        for kind, maps in (("LDG", reads), ("STG", writes)):
            wide = sum(width * n for width, n in machine.widths(kind).items() if width >= 64)
            assert wide >= maps * bits, (dtype, HW, C, option, machine.accesses)
    gate("registers", f"{name}, sm_{capability}", max(machine.registers for machine, _ in compiled))


@pytest.mark.parametrize("capability", ON_SM_90)
def test_merge_of_group_moments(capability, tmp_path, gate):
    signature = {n: type_of(n, "fp32") for n in kernel.group_merge_kernel.arg_names[:7]}
    constants = {"CHUNK": 256, "BLOCK_K": 64, "BLOCK_D": 8, "BLOCKS_K": 2, "BLOCKS_D": 1}
    machine = compile_kernel(
        kernel.group_merge_kernel, signature, constants, capability, tmp_path, num_warps=1, unaligned=("G", "chunks")
    )
    assert not machine.spills
    gate("registers", f"group_merge_kernel, sm_{capability}", machine.registers)


def type_of_row(name: str) -> str:
    """Rows of a half type, parameters in float32."""
    return "*bf16" if name.removeprefix("d") in ROWS else type_of(name, "fp32")


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_means_of_groups(capability, tmp_path, gate):
    function = kernel.group_means_kernel
    constants = {"BLOCK_K": 64, "BLOCK_D": 8, "BLOCKS_K": 2, "BLOCKS_D": 1}
    signature = {n: type_of_row(n) for n in function.arg_names if n not in constants}
    machine = compile_kernel(
        function, signature, constants, capability, tmp_path, num_warps=1, unaligned=("G", "chunks")
    )
    assert not machine.spills
    gate("registers", f"group_means_kernel, sm_{capability}", machine.registers)


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("norm", ["rms", "group", "two rms", "two group", "group, bias rows"])
def test_gradients_of_rows(norm, capability, tmp_path, gate):
    """Every thread has its 16-byte loads of three rows of sums on their way at once; of one norm and of two."""
    function, blocks = kernel.norm_silu_bwd_rows_kernel, launch.rows_blocks(64)
    constants = {name: value for name, value in blocks.items() if name.isupper()}
    absent = [n for n in function.arg_names if "offset" in n] if norm.endswith("rms") else []
    absent += [] if norm.startswith("two") else [n for n in function.arg_names if n.startswith("last_")][:-1]
    constants |= dict.fromkeys(absent) | {"BIAS_ROWS": norm.endswith("rows")}
    signature = {n: type_of_row(n) for n in function.arg_names if n not in constants}
    machine = compile_kernel(
        function, signature, constants, capability, tmp_path, num_warps=blocks["num_warps"],
        unaligned=("B", "chunks", "last_chunks", "scaled"), maxnreg=blocks["maxnreg"],
    )  # fmt: skip
    assert not machine.spills
    per_row = blocks["BLOCK_B"] * blocks["BLOCK_K"] * blocks["BLOCK_C"] // (4 * 32 * blocks["num_warps"])
    assert machine.widths("LDG").get(128, 0) >= 3 * per_row, machine.accesses
    gate("registers", f"norm_silu_bwd_rows_kernel, {norm}, sm_{capability}", machine.registers)


@pytest.mark.parametrize(
    "name", [*KERNELS, *WHOLE, "group_merge_kernel", "group_means_kernel", "norm_silu_bwd_rows_kernel"]
)
def test_sizes_of_one_compile(name, tmp_path):
    """A launch makes integers that are 1 constants of the kernel."""
    function = getattr(kernel, name)
    ones = ["HW", "B", "C", "G", "tiles", "chunks", "stride_b", "stride_c", "stride_n", "stride_scale", "stride_shift"]
    ones += ["last_chunks"]
    constants = {n: 1 for n in ones} | {"BIAS_ROWS": False, "ACTIVATION": False, "QUADS": False, "TILES": 1, "CHUNK": 1}
    constants |= {
        "D": 1,
        "BLOCK_G": 1,
        "BLOCK_N": 1,
        "BLOCK_B": 1,
        "BLOCK_C": 1,
        "BLOCK_K": 1,
        "BLOCK_D": 1,
        "BLOCKS_K": 1,
        "BLOCKS_D": 1,
    }
    constants = {n: value for n, value in constants.items() if n in function.arg_names}
    signature = {n: type_of(n, "bf16") for n in function.arg_names if n not in constants}
    assert not compile_kernel(function, signature, constants, 90, tmp_path, num_warps=1).spills


def compile_few_channels(capability: int, tmp_path) -> Machine:
    """RMSNorm's forward on maps of one channel."""
    function = kernel.rms_norm_silu_fwd_kernel
    constants = {"C": 1, "stride_c": 1, "stride_n": 1, "ACTIVATION": True, "QUADS": True, "BLOCK_N": 16, "BLOCK_C": 1}
    constants |= {"seed_ptr": None, "residual_ptr": None}
    signature = {n: type_of(n, "fp32") for n in function.arg_names if n not in constants}
    return compile_kernel(function, signature, constants, capability, tmp_path, num_warps=1, unaligned=("tiles",))


def arithmetic(machine: Machine) -> set[str]:
    """Its instructions without .ftz, which Triton 3.5 adds: that changes only numbers below 1.2e-38."""
    return {name.replace(".ftz", "") for name in machine.arithmetic()}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_gradients_that_cancel_have_correctly_rounded_factors(capability, tmp_path):
    """√C / ‖v‖ of few channels is made once per pixel, with correct rounding; see docs/arithmetic.md.

    SiLU's division remains approximate; nothing is subtracted from it.
    """
    forward = arithmetic(compile_few_channels(capability, tmp_path))
    assert {"sqrt.rn.f32", "div.rn.f32"} <= forward
    assert not [n for n in forward if n.startswith(("sqrt.approx", "rsqrt", "rcp"))]
    plain, _ = compile_stage("rms_norm_silu_bwd_kernel", "fp32", 64, False, capability, tmp_path)
    assert "div.rn.f32" in arithmetic(plain)
    assert not [n for n in arithmetic(plain) if n.startswith(("sqrt", "rsqrt", "rcp"))]


def test_the_statistics_of_groups_are_correctly_rounded(tmp_path):
    signature = {n: type_of(n, "fp32") for n in kernel.group_merge_kernel.arg_names[:7]}
    constants = {"CHUNK": 256, "BLOCK_K": 64, "BLOCK_D": 8, "BLOCKS_K": 2, "BLOCKS_D": 1}
    merge = compile_kernel(kernel.group_merge_kernel, signature, constants, 90, tmp_path, num_warps=1)
    whole, _ = compile_whole("whole_group_norm_silu_fwd_kernel", "fp32", 16, 256, "scaled", 90, tmp_path)
    for machine in (merge, whole):
        assert {"sqrt.rn.f32", "div.rn.f32"} <= arithmetic(machine) and "sqrt.approx.f32" not in arithmetic(machine)
