"""rectified-flow-pytorch's `Unet`, accelerated: outputs, every gradient, and what keeps its own forward."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

import ddpm_fast
from ddpm_fast.integrations.accelerate import table
from ddpm_fast.testing.accelerated import check_accelerated

package = pytest.importorskip("rectified_flow_pytorch.rectified_flow")
RUNS = {
    "resnet_block or attention_block", "rms_norm_silu", "upsample_conv", "downsample_conv", "conv3x3", "stem_conv",
}  # fmt: skip


def unet(**options):
    torch.manual_seed(0)
    return package.Unet(**{"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2, **options})


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8), torch.rand(2)


@pytest.mark.parametrize("options", [{}, {"accept_time": False}, {"full_attn": (True, True)}])
def test_networks(options):
    x, t = inputs()
    check_accelerated(unet(**options), (x,) if "accept_time" in options else (x, t), runs=RUNS)


def _replace_norm(residual):
    residual.branch.block1.norm = nn.Identity()


def _replace_convolution(residual):
    residual.branch.block2.proj = nn.Conv2d(16, 16, 3, padding=1, bias=False)


def _active_dropout(residual):
    residual.branch.block2.dropout.p = 0.5


def _other_shortcut(residual):
    residual.residual_transform = nn.Conv2d(16, 16, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_replace_norm, "branch.block1.norm: it is a Identity"),
        (_replace_convolution, "branch.block2.proj: it has other settings than the op"),
        (_active_dropout, "branch.block2.dropout is active"),
        (_other_shortcut, "residual_transform: it has other settings than the op"),
    ],
)
def test_blocks_that_keep_their_own_forward(change, reason):
    model = ddpm_fast.accelerate(unet())
    change(model.mid_block1)
    found = {line.path: line.reason for line in table(model) if line.reason and line.path.startswith("mid_block")}
    assert found["mid_block1"] == reason


def test_attention_of_another_scale_keeps_its_own_forward():
    model, eager = ddpm_fast.accelerate(unet()), unet()
    for network in (model, eager):
        network.mid_attn.branch.scale = 0.7
    assert {line.path: line.reason for line in table(model)}["mid_attn"] == "its scale is 0.7"
    x, t = inputs()
    assert torch.allclose(model(x, t), eager(x, t), atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (2, 16, 9), (2, 16, 3, 4, 5)])
def test_norms_over_maps_before(shape):
    norm = importlib.import_module("x_unet.x_unet").RMSNorm(16)
    x = torch.randn(shape)
    if len(shape) == 4:
        check_accelerated(norm, (x,), runs={"rms_norm_silu"})
    else:
        assert torch.equal(ddpm_fast.accelerate(copy.deepcopy(norm))(x), norm(x))


def test_a_norm_of_another_scale_keeps_its_own_forward():
    model = ddpm_fast.accelerate(unet())
    model.mid_xattnres.norm.scale = 0.7
    found = {line.path: line.reason for line in table(model)}
    assert found["mid_xattnres.norm"] == "its scale is 0.7"
