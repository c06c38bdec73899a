"""The host's time of a step and of single ops, measured on CPU tensors with kernels that are never launched.

Python, torch's dispatcher and autograd, and Triton's launch code run as on a GPU machine; the driver's call, about as
long for every kernel, does not, and neither do convolutions. Tensors are so small that torch's own operators cost what
calling them costs.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import denoising_diffusion_pytorch
import torch
from network_cases import SEED
from triton.backends.compiler import GPUTarget

import ddpm_fast
from cuda_model import driver, steps
from ddpm_fast import GaussianDiffusion, Unet
from ddpm_fast.diffusion import schedules
from ddpm_fast.ops.attention.op import attention
from ddpm_fast.ops.forward_diffusion.op import diffusion_loss, q_sample
from ddpm_fast.ops.linear_attention.op import linear_attention
from ddpm_fast.ops.norm_linear.op import norm_linear
from ddpm_fast.ops.norm_silu.op import rms_norm_silu

TINY = {"dim": 8, "dim_mults": SEED["dim_mults"]}
TINY_SIZE = 16

EMPTY = "empty operator"
PASSES = ("forward", "forward+backward")
PACKAGE = str(Path(ddpm_fast.__file__).parent)

_library = torch.library.Library("cuda_model", "FRAGMENT")
_library.define("empty(Tensor x) -> Tensor")
_library.define("empty_backward(Tensor grad) -> Tensor")
for _name in ("empty", "empty_backward"):
    _library.impl(_name, torch.empty_like, "CPU")
torch.library.register_autograd(
    "cuda_model::empty",
    lambda ctx, grad: torch.ops.cuda_model.empty_backward(grad),
    setup_context=lambda ctx, inputs, output: None,
    lib=_library,
)


@contextlib.contextmanager
def launching_nothing(target: GPUTarget) -> Iterator[None]:
    """Inside, CPU tensors take the code path of CUDA tensors up to the launch."""
    with (
        mock.patch("ddpm_fast.runtime.triton_launch.why_not_triton", lambda device: None),
        mock.patch(
            "ddpm_fast.runtime.extension.why_not", lambda device: "the host's time with CUDA's kernels is measured"
        ),
        driver.recording(target, lambda variant, grid, arguments: None),
    ):
        yield


@contextlib.contextmanager
def _no_convolutions() -> Iterator[None]:
    """Inside, convolutions on the CPU give uninitialised tensors."""
    library = torch.library.Library("aten", "IMPL")

    def convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Autograd)):
            channels = weight.shape[1] if transposed else weight.shape[0]
            sides = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
            sides = ((n - 1) * s - 2 * p + k if transposed else (n + 2 * p - k) // s + 1 for n, k, s, p in sides)
            return x.new_empty((x.shape[0], channels, *sides))

    def backward(grad, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, wanted):
        made = (torch.empty_like(x), torch.empty_like(weight), weight.new_empty(bias_sizes or 0))
        return tuple(tensor if want else None for tensor, want in zip(made, wanted, strict=True))

    library.impl("convolution", convolution, "CPU")
    library.impl("convolution_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def seconds_of_step(run: Callable[[], None], least: float) -> float:
    """The processor's time of a call: the median of five calls, or of as many as take `least` together; after two."""
    run(), run()
    found: list[float] = []
    while sum(found) < least or len(found) < 5:
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return statistics.median(found)


def measure_steps(target: GPUTarget, dtype: str = "bf16", least: float = 1.0) -> dict[str, float]:
    """Seconds of the host's per step, "training" and "sampling"; the network has the production network's operators.

    Args:
        least: seconds of measuring, each.
    """
    diffusion = GaussianDiffusion(Unet(**TINY, flash_attn=True), image_size=TINY_SIZE)
    with launching_nothing(target), _no_convolutions():
        train, _ = steps.make_training_step(diffusion, 1, dtype)
        found = {"training": seconds_of_step(train, least)}
        sample = steps.make_sampling_step(diffusion, 1, dtype)
        with steps.sampling_mode(diffusion, dtype):
            found["sampling"] = seconds_of_step(sample, least)
    return found


def against_upstream(target: GPUTarget, rounds: int = 15) -> dict[str, float]:
    """The processor's seconds of an eager training step of "upstream" and of "ours": medians of interleaved rounds.

    Both compute the loss under bf16 autocast, backward, the clipped norm and torch's foreach Adam, on one image.
    """
    runs = {"upstream": _eager_step(denoising_diffusion_pytorch), "ours": _eager_step(ddpm_fast)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with _no_convolutions():
        for _ in range(rounds):
            for name, run in runs.items():
                with launching_nothing(target) if name == "ours" else contextlib.nullcontext():
                    run()
                    gc.collect()
                    with _no_collections():
                        began = time.process_time()
                        run()
                        seconds[name].append(time.process_time() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _eager_step(package: ModuleType) -> Callable[[], None]:
    diffusion = package.GaussianDiffusion(package.Unet(**TINY, flash_attn=True), image_size=TINY_SIZE)
    parameters = list(diffusion.parameters())
    optimizer = torch.optim.Adam(parameters, 1e-4, foreach=True)
    images = torch.rand(1, 3, TINY_SIZE, TINY_SIZE)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = diffusion(images)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _cases() -> dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor]]]:
    """Name → a call on tiny tensors, and the tensors that take a gradient."""

    def leaf(*shape: int) -> torch.Tensor:
        x = torch.randn(shape)
        return (x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x).requires_grad_()

    x, residual, qkv = leaf(2, 8, 4, 4), leaf(2, 8, 4, 4), leaf(2, 24, 4, 4)
    g, bias, scale, shift = leaf(1, 8, 1, 1), leaf(8), leaf(2, 8), leaf(2, 8)
    weight, square = leaf(24, 8, 1, 1), leaf(8, 8, 1, 1)
    rows, columns = leaf(2, 1, 4, 8), leaf(2, 1, 8, 4)
    t = torch.arange(2)
    schedule = schedules.Schedule(schedules.make_betas("cosine", 10))
    forward = schedules.forward_table(schedule).float()
    losses = schedules.loss_table(schedule, "pred_v", torch.ones(10)).float()
    start, epsilon = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    output = leaf(2, 3, 4, 4)
    options = {"heads": 1, "residual": residual}
    projected = [qkv, columns, square, bias, g]
    return {
        EMPTY: (lambda: torch.ops.cuda_model.empty(x), [x]),
        "rms_norm_silu": (
            lambda: rms_norm_silu(x, g, bias=bias, scale=scale, shift=shift), [x, g, bias, scale, shift],
        ),
        "norm_linear": (lambda: norm_linear(x, g, weight), [x, g, weight]),
        "linear_attention": (
            lambda: linear_attention(*projected, **options), [*projected, residual],
        ),
        "attention": (lambda: attention(qkv, rows, heads=1), [qkv, rows]),
        "q_sample": (lambda: q_sample(start, t, forward, epsilon), []),
        "diffusion_loss": (lambda: diffusion_loss(output, start, t, losses, epsilon), [output]),
    }  # fmt: skip


def count_calls(target: GPUTarget) -> dict[tuple[str, str], int]:
    """(Op, pass) → calls of and in the package's Python functions, the same in every run as no time is; and an eager
    training step's."""
    step = _eager_step(ddpm_fast)
    with launching_nothing(target), _no_convolutions():
        runs = _runs() | {("eager training step", PASSES[1]): step}
        for run in runs.values():
            run(), run()
        return {key: _calls_of(run) for key, run in runs.items() if key[0] != EMPTY}


def _calls_of(run: Callable[[], object]) -> int:
    calls = 0

    def count(frame, event, argument) -> None:
        nonlocal calls
        calls += event in ("call", "c_call") and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def _runs() -> dict[tuple[str, str], Callable[[], object]]:
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, (call, leaves) in _cases().items():
        runs[name, "forward"] = call
        if leaves:
            runs[name, "forward+backward"] = _with_backward(call, leaves)
    return runs


def measure_ops(target: GPUTarget, rounds: int = 15, calls: int = 20) -> dict[tuple[str, str], float]:
    """(Op, pass) → the processor's seconds per call, as a multiple of the empty operator's in the same pass.

    Ops are timed in interleaved rounds; a ratio is the median of the rounds' ratios. The empty operator's are seconds.
    """
    with launching_nothing(target):
        runs = _runs()
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for run in runs.values():
            run(), run()
        with _no_collections():
            for _ in range(rounds):
                for key, run in runs.items():
                    began = time.process_time()
                    for _ in range(calls):
                        run()
                    seconds[key].append((time.process_time() - began) / calls)
    found = {}
    for (name, direction), times in seconds.items():
        base = seconds[EMPTY, direction]
        ratios = [time / empty for time, empty in zip(times, base, strict=True)]
        found[name, direction] = statistics.median(times if name == EMPTY else ratios)
    return found


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """No garbage collection inside: its time depends on all other objects of the process."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _with_backward(call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], object]:
    grad = torch.ones_like(call())
    return lambda: torch.autograd.grad(call(), leaves, grad)
