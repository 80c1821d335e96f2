"""An interpreter of PTX for tests: it runs what a compiler emitted for sm_80 on a CPU, with no GPU.

It proves the compiled code: fragment layouts, address arithmetic, masks, asynchronous copies, barriers. It says nothing
about speed, and it does not model the hardware's memory order beyond barriers, nor what ptxas makes of the text.
Whatever it does not implement is an error. Semantics are those of NVIDIA's "PTX ISA" document.
"""
