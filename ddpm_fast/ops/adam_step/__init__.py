"""Gradient clipping, Adam, the average of weights and their copies in a half type, over all tensors at once."""
