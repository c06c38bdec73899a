"""Timesteps of training drawn by the second moment of their losses (Nichol & Dhariwal 2021, section 3.3)."""

from __future__ import annotations

import torch
from torch import nn


class LossSecondMoment(nn.Module):
    """The last losses of each timestep, and draws in proportion to √E[L²]; all on the device, nothing waits for it.

    Until every timestep has a full history the draws are uniform. Each process of a distributed run has its own.

    Args:
        num_timesteps: T.
        length: losses kept per timestep.
        uniform: the share of draws that is uniform all the same.
    """

    losses: torch.Tensor  # (T + 1, length) float32; the last row takes what is not kept
    counts: torch.Tensor  # (T,) int64, the losses seen

    def __init__(self, num_timesteps: int, length: int = 10, uniform: float = 0.001):
        super().__init__()
        self.length, self.uniform = length, uniform
        self.register_buffer("losses", torch.zeros(num_timesteps + 1, length))
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.int64))

    def probabilities(self) -> torch.Tensor:
        """(T,) float32, of each timestep."""
        num_timesteps = self.counts.shape[0]
        moments = self.losses[:-1].square().mean(1).sqrt()
        by_loss = moments / moments.sum() * (1 - self.uniform) + self.uniform / num_timesteps
        is_full = (self.counts >= self.length).all() & (moments.sum() > 0)
        return torch.where(is_full, by_loss, torch.full_like(moments, 1 / num_timesteps))

    def draw(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps and what their losses are multiplied with, 1/(T·p), so that the mean loss stays the same.

        Returns:
            (B,) int64 and (B,) float32.
        """
        probabilities = self.probabilities()
        below = probabilities.double().cumsum(0)
        uniform = torch.rand((batch_size,), device=below.device, dtype=torch.float64) * below[-1]
        t = torch.searchsorted(below, uniform, right=True).clamp(max=len(below) - 1)
        return t, 1 / (len(below) * probabilities[t])

    @torch.no_grad()
    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Remember unweighted losses, (B,) each; of a timestep that a batch has more often, the last ones."""
        same = t[:, None] == t[None, :]  # (B, B)
        before = same.tril(-1).sum(1)
        after = same.triu(1).sum(1)
        slot = (self.counts[t] + before) % self.length
        row = torch.where(after < self.length, t, self.counts.shape[0])  # every slot is written by one loss at most
        self.losses[row, slot] = losses.to(self.losses.dtype)
        self.counts.index_add_(0, t, torch.ones_like(t))
