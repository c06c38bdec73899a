"""RMSNorm before a 1×1 convolution."""
