"""Norm, scale and shift, SiLU, dropout and residual in plain torch: the specification and the oracle."""

from ddpm_fast.ops.common.norm import group_norm_silu, keep_mask, rms_norm_silu

__all__ = ["group_norm_silu", "keep_mask", "rms_norm_silu"]
