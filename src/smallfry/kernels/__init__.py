"""Kernels that PyTorch has but does not offer, each behind a check that it serves."""
