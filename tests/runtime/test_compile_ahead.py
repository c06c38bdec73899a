"""Kernels of a block compile in threads, for the launches that follow; the driver is a stand-in for a GPU's."""

from __future__ import annotations

import importlib.util
import os
import threading

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

import torch
import triton
from cuda_model import driver
from cuda_model.cards import H100

from ddpm_fast import GaussianDiffusion, Unet
from ddpm_fast.ops.norm_silu.op import rms_norm_silu
from ddpm_fast.runtime import compile_ahead
from ddpm_fast.runtime.compile_ahead import compiling_ahead
from ddpm_fast.runtime.recording import EagerRecorder
from ddpm_fast.training.captured_step import TrainingStep


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The names of kernels in the order in which they were compiled, and the threads that did it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("ddpm_fast.runtime.triton_launch.why_not_triton", lambda device: None)
    monkeypatch.setattr("ddpm_fast.runtime.extension.why_not", lambda device: "the kernels of CUDA are compiled")
    found = []
    with driver.loading(H100.target, lambda name, cached: found.append((name, threading.get_ident()))):
        yield found


def forward_and_backward(size=4, channels=8):
    x = torch.randn(2, channels, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
    gain, scale, shift = torch.ones(channels), torch.ones(2, channels), torch.ones(2, channels)
    rms_norm_silu(x, gain.requires_grad_(), scale=scale, shift=shift).sum().backward()


@pytest.mark.slow
def test_what_is_launched_is_compiled_once_and_in_other_threads(compiled):
    run = triton.JITFunction.run
    with compiling_ahead(threads=2):
        for _ in range(3):
            forward_and_backward()
        forward_and_backward(channels=64)
    assert triton.JITFunction.run is run
    names = {name for name, _ in compiled}
    assert {"rms_norm_silu_fwd_kernel", "rms_norm_silu_bwd_kernel", "norm_silu_bwd_rows_kernel"} <= names
    assert threading.get_ident() not in {thread for _, thread in compiled}
    assert len({thread for _, thread in compiled}) == 2
    count = len(compiled)
    forward_and_backward()
    forward_and_backward(channels=64)
    assert len(compiled) == count, "the launches that follow find their kernels"
    with compiling_ahead(threads=2):
        forward_and_backward()
    assert len(compiled) == count


def test_a_training_step_finds_all_its_kernels(monkeypatch):
    """Variants are the same where nothing is launched: those of loss, backward and optimizer."""
    found = []
    monkeypatch.setattr("ddpm_fast.runtime.triton_launch.why_not_triton", lambda device: None)
    monkeypatch.setattr("ddpm_fast.runtime.extension.why_not", lambda device: "the kernels of CUDA are compiled")
    diffusion = GaussianDiffusion(Unet(8, dim_mults=(1, 2)), image_size=8, timesteps=10)
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-3, fused=True, capturable=True)
    step = TrainingStep(diffusion, optimizer, (2, 3, 8, 8), recorder=EagerRecorder, autocast=torch.bfloat16)
    images = torch.rand(2, 3, 8, 8)
    with driver.recording(H100.target, lambda *launch: None, found.append):
        with compiling_ahead(threads=4):
            step(images)
        count = len(found)
        assert count > 20 and len({variant.key for variant in found}) == count, "each once"
        for _ in range(2):
            step(images)
        assert len(found) == count


def test_an_error_of_the_compiler_is_raised_and_launches_are_as_before(compiled, monkeypatch):
    run = triton.JITFunction.run

    def fails(kernel, *args, warmup, **options):
        raise RuntimeError(f"{kernel.fn.__name__} does not compile")

    monkeypatch.setattr(triton.JITFunction, "run", fails)
    with pytest.raises(RuntimeError, match="norm_silu_.* does not compile"), compiling_ahead(threads=1):
        forward_and_backward()
    assert triton.JITFunction.run is fails
    monkeypatch.setattr(triton.JITFunction, "run", run)
    with pytest.raises(ZeroDivisionError), compiling_ahead(threads=1):
        raise ZeroDivisionError
    assert triton.JITFunction.run is run


def test_where_it_is_possible(monkeypatch):
    assert not compile_ahead.is_possible(torch.device("cpu")) and compile_ahead.is_possible(torch.device("cuda"))
    assert compile_ahead.count_processors() >= 1


def test_kernels_of_others_are_launched(compiled, monkeypatch):
    launched = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda kernel, *args, **options: launched.append(kernel))
    other = triton.JITFunction(test_where_it_is_possible)
    with compiling_ahead(threads=1):
        other[(1,)]()
    assert launched == [other]
