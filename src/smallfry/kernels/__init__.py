"""Kernels that PyTorch contains but does not select, each behind a check."""
