"""The kernel of the upsampling convolution's taps as the compiler sees it, without a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

from aot import ON_SM_90, compile_kernel

from ddpm_fast.ops.resample import triton as kernel

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("capability", ON_SM_90)
def test_registers_and_accesses(capability, tmp_path, gate):
    function = kernel.window_sums_kernel
    machines = []
    for dtype in ("bf16", "fp32"):
        signature = {n: f"*{dtype}" if n.endswith("_ptr") else "i32" for n in function.arg_names if n != "BLOCK"}
        machines.append(compile_kernel(
            function, signature, {"BLOCK": 64}, capability, tmp_path,
            num_warps=4, unaligned=("SIDE", "OUT_SIDE", "tiles_b"),
        ))  # fmt: skip
    for machine in machines:
        assert not machine.spills
        assert machine.widths("LDG").get(128, 0) > 0 and machine.widths("STG").get(128, 0) > 0, machine.accesses
    gate("registers", f"window_sums_kernel, sm_{capability}", max(machine.registers for machine in machines))


def test_sizes_of_one_compile(tmp_path):
    function = kernel.window_sums_kernel
    signature = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in ("x_ptr", "out_ptr", "SIDE", "OUT_SIDE")}
    constants = {"A": 1, "B": 1, "tiles_b": 1, "BLOCK": 64}
    assert not compile_kernel(function, signature, constants, 90, tmp_path, num_warps=4).spills
