"""Small PTX kernels for the tests of the interpreter: a body with registers declared, inputs and outputs bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gpu.ptx.launch import Report, compile_ptx, launch
from gpu.ptx.memory import GlobalMemory
from numpy.typing import NDArray

HEADER = """
.version 8.8
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k({parameters})
{{
    .reg .pred %p<20>;
    .reg .b16 %h<40>;
    .reg .b32 %r<200>;
    .reg .f32 %f<40>;
    .reg .b64 %rd<40>;
    .reg .f64 %d<20>;
{body}
    ret;
}}
"""


def kernel(body: str, arguments: int = 1) -> str:
    parameters = ", ".join(f".param .u64 k_{at}" for at in range(arguments))
    return HEADER.format(parameters=parameters, body=body)


def run(
    body: str,
    buffers: Sequence[NDArray],
    threads: int = 32,
    ctas: int = 1,
    shared: int = 0,
    strict: bool = True,
    loads: bool = True,
) -> tuple[list[NDArray], Report]:
    """Runs `body` over copies of `buffers`, whose addresses stand in %rd0, %rd1, ...; %r0 is tid.x, %rd39 is 4 * tid.x.

    Returns the buffers afterwards, and the report.
    """
    start = [f"    ld.param.u64 %rd{at}, [k_{at}];" for at in range(len(buffers))] if loads else []
    start += ["    mov.u32 %r0, %tid.x;", "    mul.wide.u32 %rd39, %r0, 4;"]
    program = compile_ptx(kernel("\n".join([*start, body]), len(buffers)))
    memory = GlobalMemory()
    addresses = [memory.add(buffer) for buffer in buffers]
    report = launch(program, memory, (ctas,), (threads,), addresses, shared, strict=strict, max_steps=10_000)
    return [memory.get(a).view(b.dtype).reshape(b.shape) for a, b in zip(addresses, buffers)], report


REGISTER = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}


def elementwise(text: str, inputs: Sequence[NDArray], out: type | str = np.uint32) -> NDArray:
    """Runs `text` once per element. Input i stands in register {i}, the result is expected in {o}."""
    out_type = np.dtype(out)
    count = inputs[0].size
    threads = -(-count // 32) * 32
    padded = [np.resize(values, threads) for values in inputs]
    lines, names = [], {}
    for at, values in enumerate(padded):
        size = values.dtype.itemsize
        names[str(at)] = f"{REGISTER[size]}{10 + at}"
        lines += [
            f"    mul.wide.u32 %rd{20 + at}, %r0, {size};",
            f"    add.s64 %rd{20 + at}, %rd{20 + at}, %rd{at};",
            f"    ld.global.b{8 * size} {names[str(at)]}, [%rd{20 + at}];",
        ]
    size = out_type.itemsize
    names["o"] = f"{REGISTER[size]}{10 + len(inputs)}"
    for name, register in sorted(names.items()):
        text = text.replace("{" + name + "}", register)
    lines.append(text)
    lines += [
        f"    mul.wide.u32 %rd30, %r0, {size};",
        f"    add.s64 %rd30, %rd30, %rd{len(inputs)};",
        f"    st.global.b{8 * size} [%rd30], {names['o']};",
    ]
    buffers, _ = run("\n".join(lines), [*padded, np.zeros(threads, out_type)], threads=threads)
    return buffers[-1][:count]
