"""Optimizers: torch's Adam and AdamW, whose step is one pass over memory on the CPU and on CUDA."""

from ddpm_fast.training.optimizer_step import Adam, AdamW

__all__ = ["Adam", "AdamW"]
