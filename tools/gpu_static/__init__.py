"""What can be said of the GPU kernels without a GPU: compiled for each target, and read.

`recorded.py` runs the workloads on tensors without data and keeps their launches, `compiled.py` compiles a launch for a
target, `assembly.py` reads registers, spills and instructions from the result, `occupancy.py` and `cost.py` say what
follows on a device, `table.py` writes docs/gpu-resources.md, `search.py` chooses configurations.

Of the CUDA kernels: `nvcc.py` compiles them, `cuda_launch.py` has the launches of their host code (on
`cuda_runtime.cpp`, which stands in for the CUDA runtime), `cuda_kernels.py` brings both together for the table.
"""
