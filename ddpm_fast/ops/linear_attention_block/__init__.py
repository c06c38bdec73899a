"""Linear attention as a whole block: RMSNorm, qkv product and linear attention."""
