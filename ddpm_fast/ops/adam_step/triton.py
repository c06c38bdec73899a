"""Clipping, Adam, the average and the half copy in Triton: gradients are read twice, all else once.

The tensors stay where they are. Each is cut into chunks, a program works on one chunk, and tables say where it is: a
row of addresses for each tensor, a row (tensor, first element, elements) for each chunk. Everything is elementwise,
so that elements are walked in the order of memory, which is the same in all tensors of a parameter.

A gradient in a half type, such as a weight's under autocast, is read as it is: its address is negated in the table.

The norm is summed by chunk and then over chunks, always in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.adam_step.settings import AdamSettings, have_same_layout
from ddpm_fast.runtime import triton_launch

CHUNK, BLOCK = 8192, 1024  # elements of a program, and of a pass of its loop
_FINISH = 1024  # chunks and tensors that the finishing program takes at once
_WIDEST = 16  # bytes of the widest access

# Columns of a tensor's row of addresses. Gradients have a table of their own, since they move.
COLUMNS = tl.constexpr(6)
PARAM, EXP_AVG, EXP_AVG_SQ, STEP, AVERAGE, COPY = map(tl.constexpr, range(6))
# Columns of a group's row of numbers, beside its learning rate.
NUMBERS = tl.constexpr(7)
BETA1, REST1, LOG1, BETA2, REST2, LOG2, EPS = map(tl.constexpr, range(7))
# What the finishing program leaves for the last.
NORM, SKIPPED, FACTOR = map(tl.constexpr, range(3))


@triton.jit
def address(row_ptr, COLUMN: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer out of a table of addresses."""
    pointer = tl.load(row_ptr + COLUMN).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def one_minus_exp(y):
    """1 − exp(y) for y ≤ 0, to float32's accuracy near 0, too."""
    near = -y * (1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6 * (1 + y / 7))))))
    return tl.where(y > -0.25, near, 1 - tl.exp(y))


@triton.jit
def find_gradient(grads_ptr, tensor, first, GRAD_TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A chunk of a gradient: pointers to float32 and to the half type, of which one is valid, and which."""
    grad_ptr = address(grads_ptr + tensor, 0, tl.float32, ALIGNED) + first
    if GRAD_TYPE is None:
        return grad_ptr, grad_ptr, False
    else:
        place = tl.load(grads_ptr + tensor)
        half_ptr = (-place).to(tl.pointer_type(GRAD_TYPE))
        if ALIGNED:
            half_ptr = tl.multiple_of(half_ptr, 16)
        return grad_ptr, half_ptr + first, place < 0


@triton.jit
def load_gradient(grad_ptr, half_ptr, is_half, o, count, GRAD_TYPE: tl.constexpr, MASKED: tl.constexpr):
    if GRAD_TYPE is None:
        grad = tl.load(grad_ptr + o, mask=o < count, other=0.0) if MASKED else tl.load(grad_ptr + o)
    else:
        # Two loads of which one has no element cost less than a branch.
        if MASKED:
            grad = tl.load(grad_ptr + o, mask=(o < count) & ~is_half, other=0.0)
            half = tl.load(half_ptr + o, mask=(o < count) & is_half, other=0.0)
        else:
            grad = tl.load(grad_ptr + o, mask=~is_half, other=0.0)
            half = tl.load(half_ptr + o, mask=is_half, other=0.0)
        grad = tl.where(is_half, half.to(tl.float32), grad)
    return grad


@triton.jit
def adam_norm_kernel(
    grads_ptr,  # (tensors,) int64 addresses, negated of gradients in GRAD_TYPE
    chunks_ptr,  # (chunks, 3) int64
    partial_ptr,  # (chunks,) float32
    GRAD_TYPE: tl.constexpr,  # None: all are float32
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The sum of squares of a chunk of a gradient, grid (chunks,)."""
    i_chunk = tl.program_id(0)
    tensor, first = tl.load(chunks_ptr + 3 * i_chunk), tl.load(chunks_ptr + 3 * i_chunk + 1)
    count = tl.load(chunks_ptr + 3 * i_chunk + 2).to(tl.int32)
    first = tl.multiple_of(first, CHUNK)
    grad_ptr, half_ptr, is_half = find_gradient(grads_ptr, tensor, first, GRAD_TYPE, ALIGNED)
    sums = tl.zeros((BLOCK,), tl.float32)
    # Whole blocks need no mask, so that accesses are as wide as memory allows.
    for i_block in range(CHUNK // BLOCK):
        o = i_block * BLOCK + tl.arange(0, BLOCK)
        if (i_block + 1) * BLOCK <= count:
            grad = load_gradient(grad_ptr, half_ptr, is_half, o, count, GRAD_TYPE, False)
            sums += grad * grad
        elif i_block * BLOCK < count:
            grad = load_gradient(grad_ptr, half_ptr, is_half, o, count, GRAD_TYPE, True)
            sums += grad * grad
    tl.store(partial_ptr + i_chunk, tl.sum(sums, axis=0))


@triton.jit
def adam_finish_kernel(
    partial_ptr,  # (chunks,) float32
    addresses_ptr,  # (tensors, COLUMNS) int64
    grad_scale_ptr,  # one float32 or None
    result_ptr,  # (3,) float32: norm, skipped, factor
    max_grad_norm,
    chunks,
    tensors,
    CLIPS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr,  # constants, since Triton 3.6's interpreter cannot count up to an argument
    TENSOR_BLOCKS: tl.constexpr,
):
    """The norm, the factor of the gradients, and the steps counted up; grid (1,)."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for i_block in range(CHUNK_BLOCKS):
        o = i_block * BLOCK + tl.arange(0, BLOCK)
        sums += tl.load(partial_ptr + o, mask=o < chunks, other=0.0)
    norm = tl.sqrt_rn(tl.sum(sums, axis=0))
    factor = 1.0
    skipped = 0.0
    if grad_scale_ptr is not None:
        scale = tl.load(grad_scale_ptr)
        norm = tl.div_rn(norm, scale)
        factor = tl.div_rn(1.0, scale)
        # NaN and infinity minus themselves are NaN, which equals nothing.
        skipped = tl.where(norm - norm == 0.0, 0.0, 1.0)
    if CLIPS:
        clip = tl.div_rn(max_grad_norm, norm + 1e-6)
        factor *= tl.where(clip >= 1.0, 1.0, clip)  # NaN stays
    tl.store(result_ptr + NORM, norm)
    tl.store(result_ptr + SKIPPED, skipped)
    tl.store(result_ptr + FACTOR, factor)
    for i_block in range(TENSOR_BLOCKS):
        o = i_block * BLOCK + tl.arange(0, BLOCK)
        mask = o < tensors
        step_ptrs = tl.load(addresses_ptr + o * COLUMNS + STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        steps = tl.load(step_ptrs, mask=mask, other=0.0)
        tl.store(step_ptrs, steps + (1.0 - skipped), mask=mask)


@triton.jit
def update_block(
    param_ptr,
    grad_ptr,
    half_ptr,
    is_half,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    average_ptr,
    copy_ptr,
    first,
    count,
    lr,
    numbers_ptr,
    weight_decay,
    factor,
    step_size,
    root_correction2,
    skipped,
    average_weight,
    has_copy,
    GRAD_TYPE: tl.constexpr,
    AVERAGES: tl.constexpr,
    COPIES: tl.constexpr,
    DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    o = first + tl.arange(0, BLOCK)
    mask = (o < count) if MASKED else None
    param = tl.load(param_ptr + o, mask=mask)
    if skipped == 0.0:
        grad = load_gradient(grad_ptr, half_ptr, is_half, o, count, GRAD_TYPE, MASKED) * factor
        exp_avg = tl.load(exp_avg_ptr + o, mask=mask)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + o, mask=mask)
        if DECAY:
            if DECOUPLED:
                param -= lr * weight_decay * param
            else:
                grad += weight_decay * param
        exp_avg = tl.load(numbers_ptr + BETA1) * exp_avg + tl.load(numbers_ptr + REST1) * grad
        exp_avg_sq = tl.load(numbers_ptr + BETA2) * exp_avg_sq + tl.load(numbers_ptr + REST2) * grad * grad
        denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), root_correction2) + tl.load(numbers_ptr + EPS)
        param -= tl.div_rn(step_size * exp_avg, denominator)
        tl.store(exp_avg_ptr + o, exp_avg, mask=mask)
        tl.store(exp_avg_sq_ptr + o, exp_avg_sq, mask=mask)
        tl.store(param_ptr + o, param, mask=mask)
    if AVERAGES:
        if average_weight != 0.0:
            average = tl.load(average_ptr + o, mask=mask)
            # torch.lerp's two forms: exact at both ends.
            difference = param - average
            near = average + average_weight * difference
            far = param - difference * (1.0 - average_weight)
            tl.store(average_ptr + o, tl.where(average_weight < 0.5, near, far), mask=mask)
    if COPIES:
        if has_copy:
            tl.store(copy_ptr + o, param.to(copy_ptr.dtype.element_ty), mask=mask)


@triton.jit
def adam_update_kernel(
    grads_ptr,  # (tensors,) int64 addresses, negated of gradients in GRAD_TYPE
    addresses_ptr,  # (tensors, COLUMNS) int64
    chunks_ptr,  # (chunks, 3) int64
    result_ptr,  # (3,) float32
    lr_ptr,  # one element
    numbers_ptr,  # (NUMBERS,) float32
    average_weight_ptr,  # one float32 or None: 1
    weight_decay,
    first_chunk,
    GRAD_TYPE: tl.constexpr,  # None: all are float32
    AVERAGES: tl.constexpr,
    COPY_TYPE: tl.constexpr,  # None: no copies
    DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A chunk of a parameter, its moments, average and copy; grid (chunks of the group,)."""
    i_chunk = first_chunk + tl.program_id(0)
    tensor, first = tl.load(chunks_ptr + 3 * i_chunk), tl.load(chunks_ptr + 3 * i_chunk + 1)
    count = tl.load(chunks_ptr + 3 * i_chunk + 2).to(tl.int32)
    first = tl.multiple_of(first, CHUNK)
    row_ptr = addresses_ptr + tensor * COLUMNS
    grad_ptr, half_ptr, is_half = find_gradient(grads_ptr, tensor, first, GRAD_TYPE, ALIGNED)
    param_ptr = address(row_ptr, PARAM, tl.float32, ALIGNED) + first
    exp_avg_ptr = address(row_ptr, EXP_AVG, tl.float32, ALIGNED) + first
    exp_avg_sq_ptr = address(row_ptr, EXP_AVG_SQ, tl.float32, ALIGNED) + first
    average_ptr = param_ptr
    copy_ptr = param_ptr
    average_weight = 0.0
    has_copy = False
    # A parameter without an average or a copy has 0 for its address.
    if AVERAGES:
        average_ptr = address(row_ptr, AVERAGE, tl.float32, ALIGNED) + first
        average_weight = 1.0 if average_weight_ptr is None else tl.load(average_weight_ptr)
        average_weight = tl.where(tl.load(row_ptr + AVERAGE) == 0, 0.0, average_weight)
    if COPY_TYPE is not None:
        copy_ptr = address(row_ptr, COPY, COPY_TYPE, ALIGNED) + first
        has_copy = tl.load(row_ptr + COPY) != 0
    step = tl.load(tl.load(row_ptr + STEP).to(tl.pointer_type(tl.float32)))
    lr = tl.load(lr_ptr).to(tl.float32)
    step_size = tl.div_rn(lr, one_minus_exp(step * tl.load(numbers_ptr + LOG1)))
    root_correction2 = tl.sqrt_rn(one_minus_exp(step * tl.load(numbers_ptr + LOG2)))
    skipped, factor = tl.load(result_ptr + SKIPPED), tl.load(result_ptr + FACTOR)
    for i_block in range(CHUNK // BLOCK):
        if (i_block + 1) * BLOCK <= count:
            update_block(
                param_ptr, grad_ptr, half_ptr, is_half, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, copy_ptr,
                i_block * BLOCK, count, lr, numbers_ptr, weight_decay, factor, step_size, root_correction2, skipped,
                average_weight, has_copy, GRAD_TYPE, AVERAGES, COPY_TYPE is not None, DECAY, DECOUPLED, BLOCK, False,
            )  # fmt: skip
        elif i_block * BLOCK < count:
            update_block(
                param_ptr, grad_ptr, half_ptr, is_half, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, copy_ptr,
                i_block * BLOCK, count, lr, numbers_ptr, weight_decay, factor, step_size, root_correction2, skipped,
                average_weight, has_copy, GRAD_TYPE, AVERAGES, COPY_TYPE is not None, DECAY, DECOUPLED, BLOCK, True,
            )  # fmt: skip


triton_launch.hash_functions(globals())


@dataclass
class Layout:
    """The tables of one set of tensors, on their device."""

    addresses: torch.Tensor  # (tensors, COLUMNS) int64
    chunks: torch.Tensor  # (chunks, 3) int64
    ends: list[int]  # chunks up to the end of each group
    numbers: torch.Tensor  # (groups, NUMBERS) float32
    grads: torch.Tensor  # (tensors,) int64
    places: list[torch.Tensor]  # its elements
    strides: list[tuple[int, ...]]  # of the parameters
    partial: torch.Tensor  # (chunks,) float32
    aligned: bool


_HALF_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def make_layout(lists: Sequence[Sequence[torch.Tensor | None] | None], settings: Sequence[AdamSettings]) -> Layout:
    """Tables of the columns' tensors; a column may be None."""
    params = lists[0] or ()
    device = params[0].device
    rows = [[_address(None if tensors is None else tensors[i]) for tensors in lists] for i in range(len(params))]
    chunks, ends, tensor = [], [], 0
    for group in settings:
        for _ in range(group.count):
            elements = params[tensor].numel()
            chunks += [(tensor, first, min(CHUNK, elements - first)) for first in range(0, elements, CHUNK)]
            tensor += 1
        ends.append(len(chunks))
    grads = torch.zeros(len(params), dtype=torch.int64, device=device)
    aligned = all(row[i] % _WIDEST == 0 for row in rows for i in range(len(lists)) if i != STEP.value)
    return Layout(
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.tensor(chunks, dtype=torch.int64).to(device),
        ends,
        torch.tensor([_numbers(group) for group in settings]).to(device),
        grads,
        list(grads.unbind()),
        [param.stride() for param in params if param is not None],
        torch.empty(len(chunks), device=device),
        aligned,
    )


def _address(tensor: torch.Tensor | None) -> int:
    """Where a tensor is; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def _numbers(group: AdamSettings) -> tuple[float, ...]:
    log1, log2 = (math.log(beta) if beta > 0 else -math.inf for beta in (group.beta1, group.beta2))
    return group.beta1, 1 - group.beta1, log1, group.beta2, 1 - group.beta2, log2, group.eps


def _half_type(tensors: Sequence[torch.Tensor | None]) -> Any:
    """The half type of those that have one; None where none has."""
    found = (_HALF_TYPES[tensor.dtype] for tensor in tensors if tensor is not None and tensor.dtype in _HALF_TYPES)
    return next(found, None)


def _laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor in the memory order of another; itself where it is so already."""
    if have_same_layout(tensor, like):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


@torch.no_grad()
def adam_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    settings: Sequence[AdamSettings],
    *,
    max_grad_norm: float | None,
    grad_scale: torch.Tensor | None,
    averages: Sequence[torch.Tensor | None] | None,
    average_weight: torch.Tensor | None,
    copies: Sequence[torch.Tensor | None] | None,
    tables: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ddpm_fast.ops.adam_step.op.adam_step`."""
    layout = tables.held
    if not isinstance(layout, Layout):
        for tensors in (exp_avgs, exp_avg_sqs, averages or (), copies or ()):
            for tensor, param in zip(tensors, params, strict=False):
                if tensor is not None and _laid_out(tensor, param) is not tensor:
                    raise ValueError(
                        f"a tensor of strides {tensor.stride()} is of a parameter of strides {param.stride()}"
                    )
        layout = tables.held = make_layout((params, exp_avgs, exp_avg_sqs, steps, averages, copies), settings)
    if triton_launch.is_captured(params[0].device):
        tables.keep()
    strides = list(map(torch.Tensor.stride, grads))
    if strides != layout.strides:
        grads = [_laid_out(grad, param) for grad, param in zip(grads, params, strict=True)]
    # Numbers, and not memory of the host, carry the addresses: a recording keeps them, and nothing is waited for.
    addresses = list(map(torch.Tensor.data_ptr, grads))
    halves = [grad.dtype in _HALF_TYPES for grad in grads]
    layout.grads.zero_()
    places = [-place if half else place for place, half in zip(addresses, halves, strict=True)]
    torch._foreach_add_(layout.places, places)
    aligned = layout.aligned and all(place % _WIDEST == 0 for place in addresses)

    grad_type, copy_type = _half_type(grads), _half_type(copies or ())
    result = torch.empty(3, device=params[0].device)
    chunks, count = len(layout.partial), len(params)
    blocks = [triton_launch.next_power_of_2(triton.cdiv(n, _FINISH)) for n in (chunks, count)]
    shared = {"GRAD_TYPE": grad_type, "CHUNK": CHUNK, "BLOCK": BLOCK, "ALIGNED": aligned}
    with torch.cuda.device_of(params[0]):
        if chunks:
            adam_norm_kernel[(chunks,)](layout.grads, layout.chunks, layout.partial, **shared, num_warps=4)
        adam_finish_kernel[(1,)](
            layout.partial, layout.addresses, grad_scale, result, 0.0 if max_grad_norm is None else max_grad_norm,
            chunks, count, CLIPS=max_grad_norm is not None, BLOCK=_FINISH, CHUNK_BLOCKS=blocks[0],
            TENSOR_BLOCKS=blocks[1], num_warps=4,
        )  # fmt: skip
        first = 0
        for i, (group, end) in enumerate(zip(settings, layout.ends, strict=True)):
            lr = group.lr if isinstance(group.lr, torch.Tensor) else result.new_full((), group.lr)
            if end > first:
                adam_update_kernel[(end - first,)](
                    layout.grads, layout.addresses, layout.chunks, result, lr, layout.numbers[i], average_weight,
                    group.weight_decay, first, AVERAGES=averages is not None,
                    COPY_TYPE=copy_type, DECAY=group.weight_decay != 0,
                    DECOUPLED=group.decoupled, **shared, num_warps=4,
                )  # fmt: skip
            first = end
    return result[0], result[1]
