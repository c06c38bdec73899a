"""The fused ops as functions of tensors: `from ddpm_fast.ops import rms_norm_silu, q_sample`.

One folder per op: reference.py is the specification, op.py the public function and its implementations. Where a folder
has the name of its function, `ddpm_fast.ops.NAME` is the function; `from ddpm_fast.ops.NAME import op` is the module.
"""

from ddpm_fast.ops.attention.op import attention
from ddpm_fast.ops.attention_block.op import attention_block, group_norm_attention_block
from ddpm_fast.ops.conv3x3.op import conv3x3
from ddpm_fast.ops.forward_diffusion.op import diffusion_loss, q_sample
from ddpm_fast.ops.linear_attention.op import linear_attention
from ddpm_fast.ops.linear_attention_block.op import linear_attention_block
from ddpm_fast.ops.noise.op import fill_normal_, normal
from ddpm_fast.ops.norm_linear.op import linear, linear_residual, linears, norm_linear
from ddpm_fast.ops.norm_silu.op import group_norm_silu, rms_norm_silu
from ddpm_fast.ops.preactivation_block.op import preactivation_block
from ddpm_fast.ops.resample.op import downsample_conv, upsample_conv
from ddpm_fast.ops.resnet_block.op import resnet_block
from ddpm_fast.ops.sampler_step.op import sampler_step, sampler_step_
from ddpm_fast.ops.stem_conv.op import stem_conv
from ddpm_fast.ops.strided_conv.op import strided_conv
from ddpm_fast.ops.variational_bound.op import variational_bound

__all__ = [
    "attention", "attention_block", "conv3x3", "diffusion_loss", "downsample_conv", "fill_normal_",
    "group_norm_attention_block", "group_norm_silu", "linear", "linear_attention", "linear_attention_block",
    "linear_residual", "linears", "norm_linear", "normal", "preactivation_block", "q_sample", "resnet_block",
    "rms_norm_silu", "sampler_step", "sampler_step_", "stem_conv", "strided_conv", "upsample_conv",
    "variational_bound",
]  # fmt: skip
