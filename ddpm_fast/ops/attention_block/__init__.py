"""Softmax attention as a whole block: RMSNorm, qkv product, attention, 1×1 convolution and residual."""
