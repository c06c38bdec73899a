"""The noise function: filling a tensor with it."""
