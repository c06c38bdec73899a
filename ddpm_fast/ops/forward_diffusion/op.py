"""Forward diffusion and its loss: the ops."""

from __future__ import annotations

import torch

from ddpm_fast.dispatch import Implementation, Op
from ddpm_fast.ops.forward_diffusion import reference


def _example(columns: int):
    def example(device: torch.device) -> tuple[tuple, dict]:
        image = torch.zeros(2, 3, 8, 8, device=device)
        t = torch.zeros(2, dtype=torch.int64, device=device)
        table = torch.zeros(10, columns, device=device)
        return ((image, t, table, image) if columns == 2 else (image, image, t, table, image)), {}

    return example


q_sample = Op("q_sample", [Implementation("reference", reference.q_sample)], _example(2))
diffusion_loss = Op("diffusion_loss", [Implementation("reference", reference.diffusion_loss)], _example(3))
