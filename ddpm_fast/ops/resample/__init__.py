"""Upsampling and downsampling by 2, each joined with its convolution."""
