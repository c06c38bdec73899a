"""The noise function in torch only, into a given tensor; ddpm_fast/noise.py is the specification."""

from __future__ import annotations

import torch

from ddpm_fast import noise


def fill_normal_(
    out: torch.Tensor, seed: torch.Tensor, *, stream: int, step: torch.Tensor, start_index: int = 0
) -> torch.Tensor:
    """out[i] ← noise(seed, stream, sample = start_index + i, step); see `ddpm_fast.ops.noise.op.fill_normal_`."""
    return out.copy_(
        noise.normal(
            out.shape,
            seed=seed,
            stream=stream,
            step=step,
            start_index=start_index,
            device=out.device,
            dtype=out.dtype,
        )
    )
