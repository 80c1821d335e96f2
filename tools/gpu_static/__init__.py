"""What can be said of the Triton kernels without a GPU: compiled for each target, and read.

`recorded.py` runs the workloads on tensors without data and keeps their launches, `compiled.py` compiles a launch for a
target, `assembly.py` reads registers, spills and instructions from the result, `occupancy.py` and `cost.py` say what
follows on a device, `table.py` writes docs/gpu-resources.md, `search.py` chooses configurations.
"""
