"""The CUDA kernels, run thread by thread on the CPU: a test of their indexing without a GPU.

Most kernels share no memory between threads and never synchronise, so running the threads one after another in any
order is a run that a GPU may do. In those with sums over a block, a thread runs up to the next barrier, then the next
thread does. A few macros stand in for CUDA's keywords; the sources are otherwise compiled as they are.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from ddpm_fast import noise
from ddpm_fast.ops.sampler_step import reference
from ddpm_fast.testing.guided_step_cases import MASKS, NAN, ROWS, GuidedStep, guided_table, make_guided
from ddpm_fast.testing.truth import assert_close_to_truth

CSRC = Path(__file__).parents[2] / "csrc"

SHIM = r"""
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <ucontext.h>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __syncthreads() swapcontext(&fibers[threadIdx.x], &scheduler)
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
using cudaStream_t = void*;
inline cudaError_t cudaGetLastError() { return 0; }
struct dim3 { unsigned x, y; dim3(unsigned x_, unsigned y_ = 1) : x(x_), y(y_) {} };
struct uint4 { unsigned x, y, z, w; };
inline dim3 gridDim(1), blockIdx(0, 0), threadIdx(0, 0);
inline std::vector<ucontext_t> fibers;
inline ucontext_t scheduler;
inline std::vector<bool> done;
inline std::function<void()> thread_body;
inline void run_fiber() {
  thread_body();
  done[threadIdx.x] = true;
  swapcontext(&fibers[threadIdx.x], &scheduler);
}
// The threads of a block, each up to its next barrier.
inline void run_block(unsigned threads, std::function<void()> kernel) {
  constexpr size_t kStack = 1 << 16;
  std::vector<char> stacks(threads * kStack);
  fibers.resize(threads);
  done.assign(threads, false);
  thread_body = std::move(kernel);
  for (unsigned i = 0; i < threads; ++i) {
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks.data() + i * kStack;
    fibers[i].uc_stack.ss_size = kStack;
    makecontext(&fibers[i], run_fiber, 0);
  }
  for (bool all = false; !all;) {
    all = true;
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
      if (done[threadIdx.x]) continue;
      swapcontext(&scheduler, &fibers[threadIdx.x]);
      all = all && done[threadIdx.x];
    }
  }
}
using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
inline float __half2float(__half v) { return v; }
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __half __float2half_rn(float v) { return v; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return v; }
// Few blocks, so that the loops that stride over the grid are run.
template <typename Kernel>
void on_host(dim3 grid, unsigned threads, Kernel kernel, bool together = false) {
  gridDim = dim3(grid.x < 3 ? grid.x : 3, grid.y < 2 ? grid.y : 2);
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
      if (!together) {
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel();
        continue;
      }
      run_block(threads, kernel);
    }
}
"""

ENTRY = r"""
extern "C" int sampler_step(const float* x, const void* output, const float* table, const int64_t* step,
                            const int64_t* seed, const float* previous, const float* noise, float* x_next,
                            float* x_start, const float* previous2, const float* previous3, float* x_start2,
                            float* x_start3, const int64_t* sizes, int element, int clip) {
  using namespace ddpm_fast;
  const OutputLayout layout{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4] != 0};
  return launch_sampler_step({x, output, table, step, seed, previous, noise, x_next, x_start, layout, sizes[5],
                              sizes[6], sizes[7], sizes[8], static_cast<uint32_t>(sizes[9]), clip != 0,
                              static_cast<int>(sizes[10]), previous2, previous3, x_start2, x_start3, sizes[11]},
                             static_cast<Element>(element), nullptr);
}
// Pointers and sizes in the order of the structures' fields.
extern "C" int guided_step(void** at, const int64_t* n, int element) {
  using namespace ddpm_fast;
  GuidedStepParams p{};
  p.step = {.x = (float*)at[0], .output = at[1], .table = (float*)at[2], .step = (int64_t*)at[3],
            .seed = (int64_t*)at[4], .previous = (float*)at[5], .noise = (float*)at[6], .x_next = (float*)at[7],
            .x_start = (float*)at[8], .layout = {n[0], n[1], n[2], n[3], n[4] != 0}, .batch = n[5], .elements = n[6],
            .table_rows = n[7], .start_index = n[8], .stream = static_cast<uint32_t>(n[9]), .clip_x_start = n[10] != 0,
            .table_columns = kGuidedTableColumns, .previous2 = (float*)at[9], .previous3 = (float*)at[10],
            .x_start2 = (float*)at[11], .x_start3 = (float*)at[12], .variance_offset = n[11]};
  p.guidance = {.second = at[13], .gradient = (float*)at[14], .known = (float*)at[15], .mask = (float*)at[16],
                .update = (float*)at[17], .second_layout = {n[0], n[12], n[2], n[3], n[4] != 0},
                .mask_layout = {n[0], n[13], n[14], 1, n[15] != 0}, .reduces = n[16] != 0};
  std::vector<GuidanceSums> sums(n[5] * guidance_pieces(n[6]), {NAN, NAN, NAN, NAN, NAN});
  p.sums = p.guidance.reduces ? sums.data() : nullptr;
  return launch_guided_step(p, static_cast<Element>(element), nullptr);
}
extern "C" int fill_normal(void* out, const int64_t* seed, const int64_t* step, int64_t batch, int64_t elements,
                           int64_t start_index, int64_t stream, int element) {
  using namespace ddpm_fast;
  return launch_fill_normal({out, seed, step, batch, elements, start_index, static_cast<uint32_t>(stream)},
                            static_cast<Element>(element), nullptr);
}
"""

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of Element
SHAPES = [(1, 1, 1, 1), (5, 3, 7, 9), (2, 3, 8, 8), (1, 3, 6, 6), (3, 4, 40, 32), (2, 2, 3, 2), (3, 3, 64, 48)]


def as_host_code(source: str) -> str:
    launch = r"(\w+_kernel<[^>]*>)<<<(.*?), (\w+), 0, stream>>>\((\w+)\);"
    if "__syncthreads" in source:
        source = re.sub(launch, r"on_host(\2, \3, [&] { \1(\4); }, \4.sums != nullptr);", source)
    store = re.compile(r"asm volatile\(\"st\.global.*?\"memory\"\);", re.DOTALL)
    source = re.sub(launch, r"on_host(\2, \3, [&] { \1(\4); });", source)
    source = store.sub("memcpy(to + i, &bits, sizeof(bits));", source)
    assert "<<<" not in source and "asm" not in source
    return source


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_host")
    for name in ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h"):
        (folder / name).write_text('#pragma once\n#include "shim.h"\n')
    (folder / "shim.h").write_text(SHIM)
    shutil.copytree(CSRC / "core", folder / "core")
    (folder / "cuda").mkdir()
    for file in (CSRC / "cuda").iterdir():
        if file.suffix not in (".h", ".cuh", ".cu"):
            continue
        (folder / "cuda" / file.name).write_text(as_host_code(file.read_text()))
    (folder / "all.cpp").write_text(
        '#include "cuda/noise.cu"\n#include "cuda/sampler_step.cu"\n#include "cuda/guided_step.cu"\n' + ENTRY
    )
    library = folder / "libkernels.so"
    includes = [f"-I{path}" for path in [folder, *cpp_extension.include_paths()]]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    command = ["c++", *flags, *includes, str(folder / "all.cpp"), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def run_step(host, x, output, table, step, seed, previous=None, eps=None, *, clip=True, in_place=False, start_index=0,
             older=(None, None)):  # fmt: skip
    """(x_next, x_start) of the kernel; both are NaN before it runs. `older`: the second and third earlier state."""
    x_next = x if in_place else torch.full_like(x, float("nan"))
    x_start = previous if in_place else torch.full_like(x, float("nan"))
    b, c, h, w = x.shape
    strides = output.stride()
    layout = [h * w, strides[0], strides[1], strides[3], output.is_contiguous()]
    offset = c * strides[1] if output.shape[1] == 2 * c else 0
    sizes = [*layout, b, c * h * w, table.shape[0], start_index, noise.STREAM_STEP, table.shape[1], offset]
    shifted = older if in_place else (None, None)
    error = host.sampler_step(
        *map(pointer, (x, output, table, step, seed, previous, eps, x_next, x_start, *older, *shifted)),
        (ctypes.c_int64 * len(sizes))(*sizes),
        DTYPES.index(output.dtype),
        int(clip),
    )
    assert error == 0
    return x_next, x_start


def make_inputs(shape, dtype, u=-0.2, sigma=0.3):
    table = torch.tensor([[float("nan")] * 6, [0.9, 0.4, 0.7, 0.5, u, sigma]])
    output = torch.randn(shape).to(dtype)
    return torch.randn(shape), output, table, torch.tensor([1]), torch.tensor([-77])


def layouts(output):
    yield output
    yield output.contiguous(memory_format=torch.channels_last)
    yield torch.empty(output.numel() + 1, dtype=output.dtype)[1:].view(output.shape).copy_(output)  # misaligned


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sampler_step(host, shape, dtype):
    x, output, *rest = make_inputs(shape, dtype)
    previous, eps = torch.randn(shape), torch.randn(shape)
    for given in (eps, None):
        expected = reference.sampler_step(x, output, *rest, x_start_previous=previous, noise=given, start_index=3)
        for view in layouts(output):
            actual = run_step(host, x, view, *rest, previous, given, start_index=3)
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
            x_again, previous_again = x.clone(), previous.clone()
            run_step(host, x_again, view, *rest, previous_again, given, in_place=True, start_index=3)
            assert torch.equal(x_again, actual[0]) and torch.equal(previous_again, actual[1])


# u, σ, u2, u3, lo, hi, and e, f.
EXTENDED = {
    "third": [-0.2, 0.3, 0.15, -0.1, 0.0, 0.0],
    "learned": [0.0, 0.3, 0.0, 0.0, -0.4, 0.7],
    "all": [-0.2, 0.3, 0.15, -0.1, -0.4, 0.7, 1.1, -0.6],
}


@pytest.mark.parametrize("row", EXTENDED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_extended_row(host, shape, dtype, row):
    values = [0.9, 0.4, 0.7, 0.5, *EXTENDED[row]]
    table = torch.tensor([[float("nan")] * len(values), values])
    x, (step, seed) = torch.randn(shape), (torch.tensor([1]), torch.tensor([-77]))
    channels = shape[1] * (1 if row == "third" else 2)
    output = torch.randn(shape[0], channels, *shape[2:]).to(dtype)
    history, eps = [torch.randn(shape) for _ in range(3)], torch.randn(shape)
    names = ("x_start_previous", "x_start_previous2", "x_start_previous3")
    for given in (eps, None):
        options = dict(zip(names, history, strict=True))
        expected = reference.sampler_step(x, output, table, step, seed, noise=given, start_index=3, **options)
        in_place = [x.clone(), *(tensor.clone() for tensor in history)]
        states = dict(zip(("x_start", "x_start2", "x_start3"), in_place[1:], strict=True))
        reference.sampler_step_(in_place[0], output, table, step, seed, noise=given, start_index=3, **states)
        for view in layouts(output):
            call = (view, table, step, seed)
            actual = run_step(host, x, *call, history[0], given, start_index=3, older=tuple(history[1:]))
            torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)
            mine = [x.clone(), *(tensor.clone() for tensor in history)]
            run_step(host, mine[0], *call, mine[1], given, in_place=True, start_index=3, older=tuple(mine[2:]))
            torch.testing.assert_close(mine, in_place, rtol=2e-6, atol=2e-6)


def test_the_extended_row_leaves_what_is_zero_unread(host):
    poison = [torch.full((2, 3, 8, 8), float("nan")) for _ in range(3)]
    table = torch.tensor([[0.9, 0.4, 0.7, 0.5] + [0.0] * 6])
    output = torch.cat([torch.randn(2, 3, 8, 8), poison[0]], dim=1)
    x = torch.randn(2, 3, 8, 8)
    call = (output, table, torch.tensor([0]), torch.tensor([0]), poison[0])
    assert not run_step(host, x, *call, older=tuple(poison[1:]))[0].isnan().any()
    table[0, 6] = 0.1  # an earlier state that is missing shows
    assert run_step(host, x, *call, older=(None, None))[0].isnan().all()


def test_zero_coefficients_leave_memory_unread(host):
    for shape in SHAPES:
        x, output, *rest = make_inputs(shape, torch.float16, u=0.0, sigma=0.0)
        poison = torch.full(shape, float("nan"))
        expected = reference.sampler_step(x, output, *rest, clip_x_start=False)
        actual = run_step(host, x, output, *rest, poison, poison, clip=False)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("step", [-1, 2, 2**40])
def test_a_step_outside_the_table_is_nan(host, step):
    x, output, table, _, seed = make_inputs((2, 3, 8, 8), torch.float32)
    x_next, x_start = run_step(host, x, output, table, torch.tensor([step]), seed, torch.randn(2, 3, 8, 8))
    assert x_next.isnan().all() and x_start.isnan().all()


def test_a_missing_previous_x_start_is_nan(host):
    x, output, *rest = make_inputs((2, 3, 8, 8), torch.float32)
    assert run_step(host, x, output, *rest)[0].isnan().all()


def run_guided(host, case: GuidedStep, *, in_place: bool) -> dict[str, torch.Tensor]:
    """As `GuidedStep.run`, or `run_in_place`."""
    x, output, table, step, seed = case.arguments
    options, history = case.options, [tensor.clone() for tensor in case.history]
    x = x.clone()
    x_next = x if in_place else torch.full_like(x, NAN)
    x_start = history[0] if in_place else torch.full_like(x, NAN)
    update = None if options["update"] is None else options["update"].clone()
    second, mask = options["second_output"], options["mask"]
    b, c, h, w = x.shape
    strides, second_strides = output.stride(), (0,) if second is None else second.stride()
    masks = (0, 0, False)
    if mask is not None:
        full = mask.expand(x.shape)
        masks = (full.stride(0), full.stride(1), full.stride(1) == h * w)
    learned = output.shape[1] == 2 * c
    is_dense = strides[3] == 1 and (strides[1] == h * w or c == 1)
    sizes = [h * w, strides[0], strides[1], strides[3], is_dense, b, c * h * w, table.shape[0]]
    sizes += [options["start_index"], options["stream"], options["clip_x_start"], c * strides[1] if learned else 0]
    sizes += [second_strides[0], *masks, options["reduces"]]
    shifted = history[1:] if in_place else (None, None)
    tensors = [x, output, table, step, seed, history[0], options["noise"], x_next, x_start, *history[1:], *shifted]
    tensors += [second, options["gradient"], options["known"], mask, update]
    pointers = (ctypes.c_void_p * len(tensors))(*map(pointer, tensors))
    numbers = (ctypes.c_int64 * len(sizes))(*map(int, sizes))
    assert host.guided_step(pointers, numbers, DTYPES.index(output.dtype)) == 0
    states = {"x_next": x_next, "x_start": x_start}
    if in_place:
        states |= {"x_start2": history[1], "x_start3": history[2]}
    return states if update is None else {**states, "update": update}


def assert_guided_agrees(host, case: GuidedStep) -> None:
    for run, in_place, step in (
        (GuidedStep.run, False, reference.sampler_step),
        (GuidedStep.run_in_place, True, reference.sampler_step_),
    ):
        actual, expected, truth = run_guided(host, case, in_place=in_place), run(case, step), run(case.doubled(), step)
        assert actual.keys() == expected.keys()
        for name, tensor in actual.items():
            assert_close_to_truth(tensor, expected[name], truth[name], name=name)


@pytest.mark.parametrize("row", ROWS)
def test_the_guided_row(host, row):
    for i, shape in enumerate(SHAPES):
        for j, layout in enumerate(("halves", "misaligned")):
            case = make_guided(row, shape, DTYPES[(i + j) % 3], layout=layout, mask=MASKS[i % 4], only_read=bool(i % 2))
            case.options["noise"] = torch.randn(shape) if j else None
            assert_guided_agrees(host, case)


def test_sums_over_many_pieces(host):
    """More pieces than blocks of the grid, and the last one not full; a sample's scales depend on it alone."""
    case = make_guided("everything with sums", (3, 3, 61, 53), torch.bfloat16, layout="halves")
    assert_guided_agrees(host, case)
    whole = run_guided(host, case, in_place=False)
    options = {k: v[1:2] if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
    options["start_index"] += 1
    x, output, *rest = case.arguments
    one = GuidedStep((x[1:2], output[1:2], *rest), tuple(t[1:2] for t in case.history), options)
    for name, tensor in run_guided(host, one, in_place=False).items():
        assert torch.equal(tensor, whole[name][1:2]), name


def test_a_neutral_row_leaves_guidance_unread(host):
    poison = torch.full((2, 3, 8, 8), NAN)
    case = make_guided("w", (2, 3, 8, 8))
    case.options |= {"second_output": poison, "gradient": poison, "known": poison, "update": poison}
    case.options |= {"mask": torch.zeros(2, 3, 8, 8)}
    x, output, _, step, seed = case.arguments
    case.arguments = (x, output, guided_table(), step, seed)
    result = run_guided(host, case, in_place=False)
    expected = reference.sampler_step(x, output, guided_table()[:, :12], step, seed, start_index=3, stream=7)
    torch.testing.assert_close((result["x_next"], result["x_start"]), expected, rtol=1e-6, atol=1e-6)
    assert result["update"].isnan().all()


@pytest.mark.parametrize("row, name", [("w", "second_output"), ("kn", "second_output"), ("h", "gradient"),
                                       ("mu", "update"), ("known", "known")])  # fmt: skip
def test_a_missing_tensor_of_guidance_is_nan(host, row, name):
    case = make_guided(row, (2, 3, 8, 8), only_read=True)
    case.options[name] = None
    if row == "known":
        case.options["mask"] = torch.full((2, 3, 8, 8), 0.5)
    assert run_guided(host, case, in_place=False)["x_next"].isnan().all()


def test_sums_that_were_not_asked_for_are_nan(host):
    case = make_guided("phi", (2, 3, 8, 8), only_read=True)
    case.options["reduces"] = False
    assert run_guided(host, case, in_place=False)["x_next"].isnan().all()


@pytest.mark.parametrize("step", [-1, 3, 2**40])
def test_a_guided_step_outside_the_table_is_nan(host, step):
    case = make_guided("w", (2, 3, 8, 8), only_read=True)
    case.arguments = (*case.arguments[:3], torch.tensor([step]), case.arguments[4])
    result = run_guided(host, case, in_place=False)
    assert result["x_next"].isnan().all() and result["x_start"].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [1, 3, 8, 1000, 1023, 4096, 12288])
def test_fill_normal(host, elements, dtype):
    memory = torch.full((3 * elements + 16,), float("nan"), dtype=dtype)
    out = memory[8:-8].view(3, elements)  # 16-byte aligned in every dtype
    seed, step = torch.tensor([2**40 + 9]), torch.tensor([4])
    error = host.fill_normal(
        *map(pointer, (out, seed, step)), *map(ctypes.c_int64, (3, elements, 6, 2)), DTYPES.index(dtype)
    )
    assert error == 0
    expected = noise.normal(out.shape, seed=seed, step=4, stream=2, start_index=6, dtype=dtype)
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps * 2, atol=1e-6)
    assert memory[:8].isnan().all() and memory[-8:].isnan().all()
