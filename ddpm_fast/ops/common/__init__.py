"""Device functions shared by the Triton kernels of all ops."""
