"""Memory formats: between the first and the last convolution no map is copied into another layout.

Fake tensors show the strides that CUDA's convolutions give, without a GPU; in backward, fake CPU tensors do.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_fast import Unet
from ddpm_fast.measure.traffic import kernels_take_meta_tensors

BATCH, SIZE = 7, 32
COPIES = ("aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous")
# Operators that make or read a part of a channels-last map's channels where it is, or ask for its dtype.
OF_PARTS = ("aten::split_with_sizes", "aten::new_empty", "ddpm_fast::residual_conv_gradients")


def is_part_of_channels_last(tensor: torch.Tensor) -> bool:
    """True if the channels of a pixel lie side by side, and those of the next pixel a fixed distance behind."""
    (_, C, H, W), pixel = tensor.shape, tensor.stride(3)
    return pixel >= C and tensor.stride() == (H * W * pixel, 1, W * pixel, pixel)


class Maps(TorchDispatchMode):
    """Operators with a feature map that is not channels-last, and those that only copy one."""

    def __init__(self):
        super().__init__()
        self.found, self.operators = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith("prim"):
            return result
        self.operators += 1
        for tensor in tree_leaves((args, kwargs, result)):
            # Maps of the image itself have 3 channels; context, statistics and memory have other heights than maps.
            is_map = isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and tensor.shape[0] == BATCH
            # One element expanded stands for a map that an operator does not read.
            if (
                not is_map
                or not any(tensor.stride())
                or tensor.shape[1] == 3
                or tensor.shape[2] not in (32, 16, 8, 4)
                or tensor.shape[1] < 16
            ):
                continue
            if name in OF_PARTS and is_part_of_channels_last(tensor):
                continue
            if name in COPIES or not tensor.is_contiguous(memory_format=torch.channels_last):
                self.found.append((name, tuple(tensor.shape), tensor.stride()))
        return result


def run(model, device, training: bool):
    x = torch.empty(BATCH, 3, SIZE, SIZE, device=device)
    t = torch.empty(BATCH, dtype=torch.int64, device=device)
    maps = Maps()
    with torch.set_grad_enabled(training), maps:
        out = model(x, t)
        if training and device == "cpu":
            out.backward(torch.empty_like(out))
    assert maps.operators > 100
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not maps.found, maps.found[:5]


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("norm", ["rms", "group"])
def test_no_layout_copies_on_cuda(norm, memory):
    with kernels_take_meta_tensors(), FakeTensorMode():
        with torch.device("cuda"):
            model = Unet(16, dim_mults=(1, 2, 4, 8), norm=norm, memory=memory)
        for training in (False, True):
            run(model, "cuda", training)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_no_layout_copies_in_backward(memory):
    always = mock.Mock(return_value=torch.channels_last)
    users = ("layout", "resample.composite", "resnet_block.composite")
    with kernels_take_meta_tensors(), FakeTensorMode(), contextlib.ExitStack() as patches:
        for module in ("models.unet_base", *(f"ops.{user}" for user in users)):
            patches.enter_context(mock.patch(f"ddpm_fast.{module}.weights_format", always))
        run(Unet(16, dim_mults=(1, 2, 4, 8), memory=memory), "cpu", True)


def test_weights_lie_as_their_device_wants_and_state_dicts_do_not_care():
    model = Unet(8, dim_mults=(1, 2))
    weight = model.mid_block1.block1.proj.weight
    assert weight.is_contiguous()
    moved = Unet(8, dim_mults=(1, 2)).to("meta")
    assert moved.mid_block1.block1.proj.weight.is_contiguous(memory_format=torch.channels_last)
    assert moved.mid_attn.mem_kv.is_contiguous()
    with torch.device("meta"):
        made = Unet(8, dim_mults=(1, 2))
    assert made.mid_block1.block1.proj.weight.is_contiguous(memory_format=torch.channels_last)
    other = Unet(8, dim_mults=(1, 2))
    for module in other.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([4])
    torch.testing.assert_close(other(x, t), model(x, t), rtol=1e-4, atol=1e-5)
    assert torch.equal(other.mid_block1.block1.proj.weight, weight)


def test_images_of_either_layout():
    model = Unet(8, dim_mults=(1, 2))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([4, 5])
    assert torch.equal(model(x.contiguous(memory_format=torch.channels_last), t), model(x, t))
