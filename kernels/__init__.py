"""Triton kernels of fastvdiff, imported as `fastvdiff.kernels` and only when an op chooses one."""
