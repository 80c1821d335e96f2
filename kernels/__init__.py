"""Triton kernels, one file an op, with the names of the ops contract; raw tensors in and out.

Nothing here knows the engine. `launch.py` is the one place that starts a kernel, `tuning.py` reads tile sizes from
configs/<target>.json, `matrix.py` is a weight in the layout of the kernels, `tiles.py` what several kernels share.
`interpreter/` runs them on a CPU, for tests. Importing a kernel imports triton; importing this package does not.
"""
