"""A whole residual block: two 3×3 convolutions with norms, dropout and the residual."""
