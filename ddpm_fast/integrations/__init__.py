"""Fused kernels under networks of other packages: `accelerate`, and one file per family of networks."""
