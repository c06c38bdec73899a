"""Softmax attention over all positions of a map, with learned memory keys and values."""
