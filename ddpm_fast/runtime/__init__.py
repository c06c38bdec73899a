"""Dispatch, the compiled extension, Triton launches, autocast, and recordings."""
