"""Softmax attention as a whole block: a norm, the qkv product, attention, 1×1 convolution and residual."""
