"""Every launch of a step on a CUDA device, counted on meta tensors.

Operators of torch are counted one launch each, but for those in `LAUNCHES` and for convolutions, whose parts are
launches of their own. Operators of this package run their CUDA implementation, so that the Triton launches and torch's
operators inside them are counted one by one. Bytes are those of measure/traffic.py: each input read once, each
output written once; of a Triton launch, the tensors that it is given, and of those in `PARTS` what it reads.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch._prims_common import suggest_memory_format
from triton.backends.compiler import GPUTarget

from cuda_model import driver
from cuda_model.pretend import cuda_on_meta
from ddpm_fast.measure.traffic import Call, Observer
from ddpm_fast.ops.adam_step import triton as adam

SMALL_BYTES = 4e6  # a launch that moves less takes as long as an empty one, or nearly so

# Operators of this package that are one launch of a CUDA kernel and not of Triton's.
NATIVE = {"ddpm_fast::fill_normal_", "ddpm_fast::sampler_step_", "ddpm_fast::sampler_step"}

# Kernels that read or write only a part of a tensor, such as q of a tensor of q, k and v: the part by argument; 2 where
# a kernel does both.
PARTS: dict[str, dict[str, float]] = {
    "attention_dq_kernel": {"dqkv_ptr": 1 / 3},
    "attention_dkv_kernel": {"dqkv_ptr": 2 / 3},
    # With a bias, as in every block.
    "group_norm_silu_sums_kernel": {"sums_ptr": 2 / 3},
    "group_means_kernel": {"sums_ptr": 2 / 3},
    "group_norm_silu_bwd_kernel": {"sums_ptr": 1 / 3},
    "linear_attention_context_kernel": {"qkv_ptr": 2 / 3},
    "linear_attention_rows_fwd_kernel": {"qkv_ptr": 1 / 3},
    "linear_attention_rows_bwd_kernel": {"qkv_ptr": 1 / 3, "dqkv_ptr": 1 / 3},
    "linear_attention_sums_bwd_kernel": {"qkv_ptr": 1 / 3},
    "linear_attention_kv_bwd_kernel": {"qkv_ptr": 2 / 3, "dqkv_ptr": 2 / 3},
    "linear_attention_block_keys_bwd_kernel": {"dx_ptr": 2},
    # dP alone; all but dP, and of that one of four heads.
    "linear_attention_block_small_bwd_kernel": {"partial_ptr": 1 / 2},
    "linear_attention_block_sums_bwd_kernel": {"queries_ptr": 5 / 8},
}


# Bytes per element of kernels that find their tensors by tables of addresses: a gradient; parameter and moments, read
# and written, with a gradient and a copy, each of its own dtype or absent, and what an average adds. Chunks count as
# full, which is 3% too much.
BY_ADDRESS: dict[str, Callable[[dict, float, float], float]] = {
    "adam_norm_kernel": lambda constants, gradient, copy: gradient,
    "adam_update_kernel": lambda constants, gradient, copy: 24 + gradient + 8 * constants["AVERAGES"] + copy,
}


def _bytes_per_element(tensors: Sequence[torch.Tensor | None] | None, params: Sequence[torch.Tensor]) -> float:
    """Of an optimizer step's tensors, one of each parameter or None, on average over the parameters' chunks."""
    chunks = [math.ceil(param.numel() / adam.CHUNK) for param in params]
    sizes = [0 if tensor is None else tensor.element_size() for tensor in tensors or [None] * len(params)]
    return sum(map(operator.mul, chunks, sizes)) / max(1, sum(chunks))


_CUDA = torch._C.DispatchKey.CUDA
_adam_step = adam.adam_step


@dataclass
class Launch:
    """A launch, or several alike.

    Args:
        name: the Triton kernel, the operator, or "convolution", "input gradient", "weight gradient", "bias gradient",
            "bias" (added in a pass of its own), "layout" (a copy into the convolution's layout).
        operator: the outermost operator in which it is made.
        count: how many launches.
        bytes_moved: by all of them.
        flops: of all of them; a Triton operator's are spread over its launches as their bytes are.
        width: of a convolution the fewer of its input and output channels, of a Triton operator with matrix products
            the channels of what it reads.
        tiles: of a convolution that makes a map, tiles of 128 × 128 pixels and channels in the map.
        grid, variant: of a Triton launch.
    """

    name: str
    operator: str
    bytes_moved: int
    flops: float = 0.0
    count: int = 1
    width: int | None = None
    tiles: int | None = None
    grid: tuple[int, int, int] | None = None
    variant: driver.Variant | None = None

    @property
    def is_small(self) -> bool:
        return self.bytes_moved / self.count < SMALL_BYTES


@dataclass
class Step:
    """The launches of a step, in order."""

    launches: list[Launch] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(launch.count for launch in self.launches)

    @property
    def small(self) -> int:
        return sum(launch.count for launch in self.launches if launch.is_small)

    @property
    def triton(self) -> list[Launch]:
        return [launch for launch in self.launches if launch.variant is not None]

    @property
    def bytes_moved(self) -> int:
        return sum(launch.bytes_moved for launch in self.launches)

    @property
    def flops(self) -> float:
        return sum(launch.flops for launch in self.launches)

    @property
    def variants(self) -> dict[tuple, driver.Variant]:
        """The variants that Triton compiles before the first such step, by key."""
        return {launch.variant.key: launch.variant for launch in self.triton}


def _lists(lists: int) -> Callable[[Call], int]:
    """Launches of torch's multi_tensor_apply over so many lists of tensors.

    A launch ends with its last tensor or its last chunk (of 65536 numbers) that fits into its arguments, which have
    32 KB since CUDA 13: ATen/native/cuda/MultiTensorApply.cuh.
    """
    most_tensors, most_chunks = {1: 770, 2: 448, 3: 336, 4: 252}[lists], 2240

    def launches(call: Call) -> int:
        made = tensors = chunks = 0
        for tensor in next(value for value in call.arguments.values() if isinstance(value, list | tuple)):
            tensors += 1
            of_tensor = math.ceil(tensor.numel() / 65536)
            for chunk in range(of_tensor):
                chunks += 1
                is_last = chunk == of_tensor - 1
                if chunks == most_chunks or (is_last and tensors == most_tensors):
                    made, chunks, tensors = made + 1, 0, 0 if is_last else 1
        return made + (chunks > 0)

    return launches


# Operators of torch that are not one launch, from its CUDA sources.
LAUNCHES: dict[str, Callable[[Call], int]] = {
    # Partial results are zeroed, made, and added up: ForeachReduceOp.cu.
    "aten::_foreach_norm": lambda call: 2 + _lists(1)(call),
    "aten::_foreach_mul_": _lists(1),
    "aten::_foreach_add_": _lists(1),
    "aten::_foreach_copy_": _lists(2),
    "aten::_fused_adam_": _lists(4),
    # Zeros, and a copy into a part of them.
    "aten::slice_backward": lambda call: 2,
    # Sums of rows of the gradient times the output, and the gradients.
    "aten::_scaled_dot_product_efficient_attention_backward": lambda call: 2,
    "aten::select_backward": lambda call: 2,
}
_ALLOCATE = ("aten::empty", "aten::new_empty")


class Recorder(Observer):
    """Writes down the launches of the block, on meta tensors."""

    def __init__(self):
        super().__init__()
        self.step = Step()
        self._operators: list[str] = []
        self._begun = 0
        self._found_by_address = (0.0, 0.0)  # bytes per element of gradients and copies of the step that runs

    def run(self, func, args: tuple, kwargs: dict):
        name = func._schema.name
        if name.startswith("ddpm_fast::") and name not in NATIVE:
            self._operators.append(name)
            begun = len(self.step.launches)
            with self:
                result = func._op_dk(_CUDA, *args, **kwargs)
            self._operators.pop()
            self._begun = begun
            return result
        return laid_out(name, args, func(*args, **kwargs))

    def see(self, call: Call) -> None:
        if call.name.startswith("ddpm_fast::") and call.name not in NATIVE:
            self._spread(call)
        elif call.name == "aten::convolution":
            self._convolution(call)
        elif call.name == "aten::convolution_backward":
            self._convolution_backward(call)
        elif call.name.startswith("aten::") and not call.name.startswith(_ALLOCATE):
            count = LAUNCHES[call.name](call) if call.name in LAUNCHES else 1
            self._add(Launch(call.name, "", call.bytes_moved, sum(call.flops.values()), count))

    def launched(self, variant: driver.Variant, grid: tuple[int, int, int], arguments: tuple) -> None:
        """A Triton launch; see `driver.recording`."""
        parts = PARTS.get(variant.kernel, {})
        moved = sum(
            _size(value) * parts.get(name, 1)
            for name, value in zip(variant.signature, arguments, strict=True)
            if isinstance(value, torch.Tensor)
        )
        if variant.kernel in BY_ADDRESS:
            constants = variant.constexprs
            moved += BY_ADDRESS[variant.kernel](constants, *self._found_by_address) * constants["CHUNK"] * grid[0]
        self._add(Launch(variant.kernel, "", round(moved), grid=grid, variant=variant))

    def adam_step(self, params: Sequence, grads: Sequence, *args: object, copies: Sequence | None, **options: object):
        """The Triton implementation, whose kernels are launched with addresses alone."""
        self._found_by_address = (_bytes_per_element(grads, params), _bytes_per_element(copies, params))
        return _adam_step(params, grads, *args, copies=copies, **options)

    def _add(self, launch: Launch) -> None:
        launch.operator = self._operators[0] if self._operators else launch.name
        self.step.launches.append(launch)

    def _spread(self, call: Call) -> None:
        """Give the operations of an operator to its Triton launches."""
        flops = sum(call.flops.values())
        launches = [launch for launch in self.step.launches[self._begun :] if launch.variant is not None]
        moved = sum(launch.bytes_moved for launch in launches)
        for launch in launches if flops else ():
            launch.flops += flops * launch.bytes_moved / moved
            launch.width = _width(call)

    def _convolution(self, call: Call) -> None:
        x, weight, bias = (call.arguments[name] for name in ("input", "weight", "bias"))
        self._layout(x, weight, x, weight)
        width, flops = min(weight.shape[:2]), sum(call.flops.values())
        self._add(Launch("convolution", "", call.bytes_moved, flops, width=width, tiles=_tiles(call.result)))
        if bias is not None:  # torch adds it to cuDNN's output
            self._add(Launch("bias", "", 2 * _size(call.result) + _size(bias)))

    def _convolution_backward(self, call: Call) -> None:
        grad, x, weight, wanted = (call.arguments[name] for name in ("grad_output", "input", "weight", "output_mask"))
        # torch lays out what is read: the input for the weight's gradient, the weight for the input's.
        self._layout(x, weight, grad, *(tensor for tensor, read in ((x, wanted[1]), (weight, wanted[0])) if read))
        width = min(weight.shape[:2])
        flops = sum(call.flops.values()) / max(1, wanted[0] + wanted[1])
        for i, name in enumerate(("input gradient", "weight gradient")):
            if wanted[i]:
                result = call.result[i]
                moved = _size(grad) + _size((weight, x)[i]) + _size(result)
                self._add(Launch(name, "", moved, flops, width=width, tiles=None if i else _tiles(result)))
        if wanted[2]:
            self._add(Launch("bias gradient", "", _size(grad) + _size(call.result[2])))

    def _layout(self, x: torch.Tensor, weight: torch.Tensor, *tensors: torch.Tensor) -> None:
        """The copies that cuDNN's callers make of tensors in another layout than cuDNN's."""
        for tensor in tensors:
            if not tensor.is_contiguous(memory_format=_cudnn_format(x, weight)):
                self._add(Launch("layout", "", 2 * _size(tensor)))


def _width(call: Call) -> int | None:
    """Of a Triton operator's products: the channels of what it reads, in patches the taps of all channels."""
    if call.name.startswith("ddpm_fast::stem_conv"):
        weight = call.arguments["weight"]
        return min(weight.shape[0], weight[0].numel())
    if call.name.startswith("ddpm_fast::conv_norm"):
        return min(call.arguments["weight"].shape[:2])
    for name, parts in (("x", 1), ("qkv", 3), ("grad", 1)):
        if name in call.arguments:
            return call.arguments[name].shape[1] // parts
    return None


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tiles(x: torch.Tensor) -> int:
    """Tiles of 128 pixels and 128 channels: one per program of a convolution."""
    B, C, *sides = x.shape
    return math.ceil(B * math.prod(sides) / 128) * math.ceil(C / 128)


def _cudnn_format(x: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """Channels-last where either is: torch's rule for cuDNN."""
    is_last = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
    return torch.channels_last if is_last else torch.contiguous_format


def laid_out(name: str, args: tuple, result):
    """An operator's results; those of a convolution as cuDNN lays them out, which meta tensors do not say."""
    if name not in ("aten::convolution", "aten::convolution_backward"):
        return result
    x, weight = args[:2] if name == "aten::convolution" else args[1:3]
    kind = _cudnn_format(x, weight)
    if isinstance(result, torch.Tensor):
        return torch.empty_like(result, memory_format=kind)
    return tuple(torch.empty_like(t, memory_format=kind) if t is not None and t.ndim == 4 else t for t in result)


@contextlib.contextmanager
def recording(
    target: GPUTarget, found: Callable[[driver.Variant], None] = lambda variant: None
) -> Iterator[Callable[[], contextlib.AbstractContextManager[Step]]]:
    """Inside, meta tensors are a CUDA device's. Yields a function that makes a block whose launches are written down.

    Args:
        found: called with every variant before its first launch, in such a block or outside.
    """
    recorders: list[Recorder] = []

    def launched(*launch) -> None:
        if recorders:
            recorders[-1].launched(*launch)

    @contextlib.contextmanager
    def block() -> Iterator[Step]:
        recorder = Recorder()
        recorders.append(recorder)
        try:
            with recorder, mock.patch.object(adam, "adam_step", recorder.adam_step):
                yield recorder.step
        finally:
            recorders.pop()

    with cuda_on_meta(), driver.recording(target, launched, found):
        yield block
