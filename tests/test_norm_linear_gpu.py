"""The kernels of norm_linear on a CUDA device: the cases that the interpreter runs elsewhere."""

from __future__ import annotations

import pytest
import torch
from helpers import run_kernel_tests


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_kernels_on_cuda():
    run_kernel_tests("norm_linear", interpreted=False)
