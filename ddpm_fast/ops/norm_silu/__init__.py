"""Normalisation with everything around it that is element-wise."""
