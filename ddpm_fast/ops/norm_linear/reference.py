"""RMSNorm and a 1×1 convolution in plain torch; the formulas stand where blocks of other rooms find them, too."""

from ddpm_fast.ops.common.reference import linear_residual, norm_linear

__all__ = ["linear_residual", "norm_linear"]
