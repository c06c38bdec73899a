"""The model of a CUDA step: what it counts, what it compiles ahead, and the bounds that it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import precompile  # noqa: E402
from cuda_model import driver, pretend, recorder, steps  # noqa: E402
from cuda_model.compiler import Pool, compile_variant  # noqa: E402

import ddpm_fast  # noqa: E402
from ddpm_fast.layers import rms_norm_silu  # noqa: E402

OPS = Path(ddpm_fast.__file__).parent / "ops"
TARGET = driver.target_of("sm_90")


@pytest.fixture(scope="module")
def tiny():
    """A network of one stage with linear and one with softmax attention."""
    return steps.make_diffusion(image_size=16, dim=16, dim_mults=(1, 2))


def a_norm(channels: int = 64, dtype: torch.dtype = torch.float32) -> None:
    """Launches one kernel; the variant depends on dtype and channels."""
    x = torch.empty(2, channels, 8, 8, device="meta", dtype=dtype).to(memory_format=torch.channels_last)
    rms_norm_silu(x, torch.empty(channels, device="meta"))


def variants_of(function) -> list[driver.Variant]:
    found = []
    with recorder.recording(TARGET, found.append) as block, block():
        function()
    return found


def test_a_variant_is_what_triton_specialises_on():
    (variant,) = variants_of(a_norm)
    assert variant.kernel == "rms_norm_silu_fwd_kernel" and variant.module == "ddpm_fast.ops.norm_silu.kernel"
    assert variant.signature["x_ptr"] == "*fp32" and variant.signature["C"] == "i32"
    assert variant.constexprs["BLOCK_C"] == 64 and variant.constexprs["bias_ptr"] is None
    assert {"x_ptr", "C", "HW"} <= variant.divisible
    assert variant.options["num_warps"] >= 1 and variant.options["arch"] == "sm90"
    (other,) = variants_of(lambda: a_norm(channels=63))
    assert "C" not in other.divisible and other.key != variant.key
    (half,) = variants_of(lambda: a_norm(dtype=torch.bfloat16))
    assert half.signature["x_ptr"] == "*bf16" and half.key != variant.key


def test_equal_launches_are_one_variant():
    assert len(variants_of(lambda: (a_norm(), a_norm()))) == 1


def test_kernels_remember_nothing_of_the_stand_in():
    from ddpm_fast.ops.norm_silu.kernel import rms_norm_silu_fwd_kernel as kernel

    variants_of(a_norm)
    assert not any(str(device).startswith("stand-in") for device in kernel.device_caches)
    assert kernel.compile is triton.compiler.compile
    assert triton.runtime.driver._active is None or not isinstance(triton.runtime.driver._active, driver.StandIn)


def load(function) -> list[tuple[str, bool]]:
    """Kernels that the function launches first, and whether Triton's cache had each."""
    loaded = []
    with pretend.cuda_on_meta(), driver.loading(TARGET, lambda *kernel: loaded.append(kernel)), recorder.Recorder():
        function()
    return loaded


def test_what_is_compiled_ahead_is_found_by_the_launch(tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    kernel = "rms_norm_silu_fwd_kernel"
    (variant,) = variants_of(a_norm)
    compiled = compile_variant(variant, TARGET)
    assert compiled.error is None and not compiled.cached and compiled.registers > 16 and compiled.spills == 0
    assert load(a_norm) == [(kernel, True)]
    assert compile_variant(variant, TARGET).cached
    assert load(lambda: a_norm(channels=63)) == [(kernel, False)]
    with pretend.cuda_on_meta(), driver.loading(driver.target_of("sm_80"), lambda *k: loaded.append(k)):
        loaded: list = []
        with recorder.Recorder():
            a_norm()
    assert loaded == [(kernel, False)]


def test_cache_keys_do_not_depend_on_what_was_launched_before():
    """See `hash_functions` of ddpm_fast/ops/common/kernel.py."""
    modules = [f"ddpm_fast.ops.{op}.kernel" for op in os.listdir(OPS) if (OPS / op / "kernel.py").exists()]
    program = f"""
import importlib, triton
for module in map(importlib.import_module, {modules}):
    for name, value in vars(module).items():
        if isinstance(value, triton.JITFunction) and value.hash is None:
            print(module.__name__, name)
"""
    command = [sys.executable, "-c", program]
    assert len(modules) >= 6
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


def test_a_variant_that_does_not_compile_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    (variant,) = variants_of(a_norm)
    place = (list(variant.signature).index("BLOCK_C"),)
    odd = replace(variant, constants=variant.constants | {place: 63})  # a block must be a power of two
    compiled = compile_variant(odd, TARGET)
    assert "power of 2" in compiled.error and "\n" not in compiled.error and compiled.registers is None


def test_a_process_that_dies_fails_its_variant_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    (variant,) = variants_of(a_norm)
    deadly = driver.Variant("_exit", "os", {}, {}, {}, {})
    with Pool(1, TARGET) as pool:
        pool._workers[0].process.kill()
        pool._workers[0].process.join()
        pool.submit(deadly)
        pool.submit(variant)
        done = []
        while pool.unfinished:
            done += pool.finished(60)
    assert "exit code -9" in done[0].error
    assert done[1].error is None and done[1].kernel == variant.kernel


def test_the_command_prints_a_line_per_variant_and_a_sum(tmp_path, monkeypatch, capsys):
    def record(target, found):
        with recorder.recording(target, found) as block, block() as step:
            a_norm()
            a_norm(dtype=torch.bfloat16)
        return step

    monkeypatch.setitem(steps.CASES, "norms", [record, record])
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    assert precompile.run(2, ["norms"], "sm_90", float("inf")) == 0
    *variants, total = map(json.loads, capsys.readouterr().out.splitlines())
    assert [variant["kernel"] for variant in variants] == ["rms_norm_silu_fwd_kernel"] * 2
    assert all(variant["seconds"] > 0 and variant["registers"] > 16 for variant in variants)
    assert all(variant["spills"] == 0 and variant["error"] is None for variant in variants)
    assert (total["variants"], total["cached"], total["failed"], total["target"]) == (2, 0, 0, "sm_90")
    assert total["triton"] == triton.__version__
    assert load(lambda: (a_norm(), a_norm(dtype=torch.bfloat16))) == [("rms_norm_silu_fwd_kernel", True)] * 2


def test_the_command_says_what_is_not_done_in_time(capsys):
    assert precompile.run(1, ["ops", "sampling"], "sm_90", 0) == 1
    *lines, total = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["error"] for line in lines] == ["not recorded within 0 s"] * 3
    assert total["failed"] == 3 and total["variants"] == 0
