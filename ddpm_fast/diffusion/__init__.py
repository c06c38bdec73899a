"""Diffusion processes, their tables, and the sampling loop."""
