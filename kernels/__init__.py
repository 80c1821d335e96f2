"""Triton kernels, one file an op, with the names of the ops contract. None yet: see docs/architecture.md."""
