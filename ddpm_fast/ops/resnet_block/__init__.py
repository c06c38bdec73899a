"""A whole residual block as one op, for the CPU."""
