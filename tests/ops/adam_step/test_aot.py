"""The kernels of adam_step as the compiler sees them, without a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

import triton.language as tl
from aot import ON_SM_90, compile_kernel

from ddpm_fast.ops.adam_step import triton as kernel

pytestmark = pytest.mark.slow

COMMON = {"CHUNK": kernel.CHUNK, "BLOCK": kernel.BLOCK, "ALIGNED": True}
POINTERS = {"grads_ptr": "*i64", "addresses_ptr": "*i64", "chunks_ptr": "*i64", "partial_ptr": "*fp32"}
POINTERS |= {name: "*fp32" for name in ("result_ptr", "lr_ptr", "numbers_ptr", "average_weight_ptr", "grad_scale_ptr")}
NUMBERS = {"max_grad_norm": "fp32", "weight_decay": "fp32", "chunks": "i32", "tensors": "i32", "first_chunk": "i32"}


def compiled(name, constants, capability, tmp_path):
    function = getattr(kernel, name)
    kinds = POINTERS | NUMBERS
    signature = {n: kinds[n] for n in function.arg_names if n not in constants}
    unaligned = tuple(n for n in ("numbers_ptr", "chunks", "tensors", "first_chunk") if n in signature)
    return compile_kernel(function, signature, constants, capability, tmp_path, num_warps=4, unaligned=unaligned)


@pytest.mark.parametrize("grad_type", [None, tl.bfloat16])
@pytest.mark.parametrize("capability", ON_SM_90)
def test_machine_code(capability, grad_type, tmp_path):
    """At least 16 warps per multiprocessor, and accesses to the tensors as wide as memory allows."""
    common = COMMON | {"GRAD_TYPE": grad_type}
    update = common | {"AVERAGES": True, "COPY_TYPE": tl.bfloat16, "DECAY": False, "DECOUPLED": False}
    machine = compiled("adam_update_kernel", update, capability, tmp_path)
    # Under Triton 3.6 two registers of a thread spill on sm_90.
    assert machine.stack <= 8 and machine.registers <= 128
    # Parameter, gradient, moments and average, in a whole block of eight elements per thread.
    assert machine.widths("LDG")[128] >= 10 and machine.widths("STG")[128] >= 9
    norm = compiled("adam_norm_kernel", common, capability, tmp_path)
    assert not norm.spills and norm.registers <= 64 and norm.widths("LDG")[128] >= 2
    finish = {"CLIPS": True, "BLOCK": 1024, "CHUNK_BLOCKS": 8, "TENSOR_BLOCKS": 1}
    assert not compiled("adam_finish_kernel", finish, capability, tmp_path).spills


def test_without_alignment_it_compiles(tmp_path):
    constants = COMMON | {
        "GRAD_TYPE": tl.float16,
        "AVERAGES": False,
        "COPY_TYPE": None,
        "DECAY": True,
        "DECOUPLED": True,
        "ALIGNED": False,
    }
    constants |= {"average_weight_ptr": None}
    assert not compiled("adam_update_kernel", constants, 90, tmp_path).spills
