"""autocast_dtype: the dtype of autocast on every type of device and under torch.compile."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.runtime.autocast import autocast_dtype, no_autocast


def test_the_dtype_is_that_of_the_innermost_autocast():
    assert autocast_dtype("cpu") is None
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype("cpu") == torch.bfloat16
        assert autocast_dtype("cuda") is None
        with torch.autocast("cpu", torch.float16):
            assert autocast_dtype("cpu") == torch.float16
        with no_autocast("cpu"):
            assert autocast_dtype("cpu") is None


def test_a_device_that_knows_no_autocast_has_none():
    assert not torch.amp.is_autocast_available("meta")
    assert autocast_dtype("meta") is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_question_compiles(device):
    def product(x):
        with no_autocast(x.device.type):
            return x @ x

    x = torch.ones(2, 2, device=device)
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    assert compiled(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.float32
