"""The universal sampler update."""
