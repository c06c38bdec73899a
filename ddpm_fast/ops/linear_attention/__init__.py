"""Linear attention after the qkv product: softmaxes, context, output projection, RMSNorm and residual."""
