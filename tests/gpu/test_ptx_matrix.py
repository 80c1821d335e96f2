"""Fragment layouts of ldmatrix and mma, each against a plain formula written lane by lane."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu.ptx.errors import PtxError
from gpu.ptx_text import run
from numpy.typing import NDArray

RNG = np.random.default_rng(1)


def store_lanes(registers: list[str], buffer: str) -> str:
    """Lane l writes its register i to word l * count + i of the buffer."""
    lines = [f"mul.wide.u32 %rd30, %r0, {4 * len(registers)};", f"add.s64 %rd30, %rd30, {buffer};"]
    return "\n".join([*lines, *(f"st.global.b32 [%rd30+{4 * i}], {r};" for i, r in enumerate(registers))])


def load_lanes(registers: list[str], buffer: str) -> str:
    lines = [f"mul.wide.u32 %rd30, %r0, {4 * len(registers)};", f"add.s64 %rd30, %rd30, {buffer};"]
    return "\n".join([*lines, *(f"ld.global.b32 {r}, [%rd30+{4 * i}];" for i, r in enumerate(registers))])


FILL_SHARED = """
    // every lane copies 16 bytes of buffer 0 to shared memory, 512 bytes in all
    shl.b32 %r1, %r0, 4;
    cvt.u64.u32 %rd20, %r1;
    add.s64 %rd21, %rd0, %rd20;
    ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd21];
    st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5};
    bar.sync 0;
"""


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, transposed: bool) -> None:
    """Matrix j has the rows that lanes 8j .. 8j+7 point to; lane l gets row l / 4, columns 2 (l % 4) and the next."""
    data = np.arange(256, dtype=np.uint16)
    registers = [f"%r{20 + i}" for i in range(count)]
    target = "{" + ", ".join(registers) + "}"
    body = f"""{FILL_SHARED}
    xor.b32 %r6, %r0, 5;      // an order of rows that is not the plain one
    shl.b32 %r6, %r6, 4;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {target}, [%r6];
    {store_lanes(registers, "%rd1")}
    """
    out = np.zeros((32, count), np.uint32)
    found = run(body, [data, out], shared=512)[0][1]
    rows = data.reshape(32, 8)[np.arange(32) ^ 5].reshape(4, 8, 8)
    for lane in range(32):
        for j in range(count):
            matrix = rows[j].T if transposed else rows[j]
            low, high = (int(v) for v in matrix[lane // 4, 2 * (lane % 4) :][:2])
            assert found[lane, j] == low | high << 16


def raw16(values: torch.Tensor) -> NDArray:
    return values.view(torch.int16).numpy().view(np.uint16)


def fragments(matrix: NDArray, rows_of, columns_of, registers: int, per: int) -> NDArray:
    """[32, registers] uint32 from a matrix of raw elements; element i of register r stands at rows_of, columns_of."""
    bits = 32 // per
    out = np.zeros((32, registers), np.uint32)
    for lane in range(32):
        for r in range(registers):
            for i in range(per):
                g, t = lane // 4, lane % 4
                value = int(matrix[rows_of(g, t, r, i), columns_of(g, t, r, i)])
                out[lane, r] |= np.uint32(value << bits * i)
    return out


def run_mma(name: str, a: NDArray, b: NDArray, c: NDArray) -> NDArray:
    """a, b, c: [32, registers] uint32 -> the registers of D."""
    groups = [[f"%r{start + i}" for i in range(part.shape[1])] for start, part in ((20, a), (40, b), (60, c))]
    result = [f"%r{80 + i}" for i in range(c.shape[1])]
    braces = ["{" + ", ".join(names) + "}" for names in (result, *groups)]
    body = "\n".join(load_lanes(names, f"%rd{at}") for at, names in enumerate(groups))
    body += f"\n{name} {', '.join(braces)};\n" + store_lanes(result, "%rd3")
    return run(body, [a, b, c, np.zeros_like(c)])[0][3]


def c_fragments(matrix: NDArray) -> NDArray:
    return fragments(matrix, lambda g, t, r, i: g + 8 * (r // 2), lambda g, t, r, i: 2 * t + r % 2, 4, 1)


@pytest.mark.parametrize("k", [8, 16])
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma_16_bit(kind: str, k: int) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    a, b = torch.randint(-8, 9, (16, k)).to(dtype), torch.randint(-8, 9, (k, 8)).to(dtype)
    c = torch.randint(-50, 50, (16, 8)).float()
    regs = k // 4
    a_in = fragments(raw16(a), lambda g, t, r, i: g + 8 * (r % 2), lambda g, t, r, i: 2 * t + i + 8 * (r // 2), regs, 2)
    b_in = fragments(raw16(b), lambda g, t, r, i: 2 * t + i + 8 * r, lambda g, t, r, i: g, regs // 2, 2)
    c_in = c_fragments(c.numpy().view(np.uint32))
    found = run_mma(f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32", a_in, b_in, c_in)
    expected = c_fragments((a.float() @ b.float() + c).numpy().view(np.uint32))
    assert found.tolist() == expected.tolist()


def test_mma_f16_sums() -> None:
    a, b = torch.randint(-4, 5, (16, 16)).half(), torch.randint(-4, 5, (16, 8)).half()
    c = torch.randint(-50, 50, (16, 8)).half()

    def pairs(matrix: torch.Tensor) -> NDArray:
        return fragments(raw16(matrix), lambda g, t, r, i: g + 8 * r, lambda g, t, r, i: 2 * t + i, 2, 2)

    a_in = fragments(raw16(a), lambda g, t, r, i: g + 8 * (r % 2), lambda g, t, r, i: 2 * t + i + 8 * (r // 2), 4, 2)
    b_in = fragments(raw16(b), lambda g, t, r, i: 2 * t + i + 8 * r, lambda g, t, r, i: g, 2, 2)
    found = run_mma("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16", a_in, b_in, pairs(c))
    assert found.tolist() == pairs((a.float() @ b.float() + c.float()).half()).tolist()


@pytest.mark.parametrize("k", [4, 8])
def test_mma_tf32(k: int) -> None:
    """Only the upper 19 bits of a factor count."""
    a, b = (RNG.integers(-20, 20, shape).astype(np.float32) for shape in ((16, k), (k, 8)))
    c = np.zeros((16, 8), np.float32)
    noisy = [np.ascontiguousarray(m).view(np.uint32) | np.uint32(0x1FFF) for m in (a, b)]
    a_in = fragments(noisy[0], lambda g, t, r, i: g + 8 * (r % 2), lambda g, t, r, i: t + 4 * (r // 2), k // 2, 1)
    b_in = fragments(noisy[1], lambda g, t, r, i: t + 4 * r, lambda g, t, r, i: g, k // 4, 1)
    found = run_mma(f"mma.sync.aligned.m16n8k{k}.row.col.f32.tf32.tf32.f32", a_in, b_in, c_fragments(c.view(np.uint32)))
    assert found.tolist() == c_fragments((a @ b).astype(np.float32).view(np.uint32)).tolist()


@pytest.mark.parametrize("k", [16, 32])
@pytest.mark.parametrize(("a_kind", "b_kind"), [("s8", "s8"), ("u8", "s8"), ("u8", "u8")])
def test_mma_8_bit(k: int, a_kind: str, b_kind: str) -> None:
    a, b = (RNG.integers(0, 256, shape).astype(np.uint8) for shape in ((16, k), (k, 8)))
    c = RNG.integers(-1000, 1000, (16, 8)).astype(np.int32)
    a_in = fragments(a, lambda g, t, r, i: g + 8 * (r % 2), lambda g, t, r, i: 4 * t + i + 16 * (r // 2), k // 8, 4)
    b_in = fragments(b, lambda g, t, r, i: 4 * t + i + 16 * r, lambda g, t, r, i: g, k // 16, 4)
    found = run_mma(
        f"mma.sync.aligned.m16n8k{k}.row.col.s32.{a_kind}.{b_kind}.s32", a_in, b_in, c_fragments(c.view(np.uint32))
    )
    left, right = ((m.view(np.int8) if kind == "s8" else m).astype(np.int64) for m, kind in ((a, a_kind), (b, b_kind)))
    assert found.tolist() == c_fragments((left @ right + c).astype(np.int32).view(np.uint32)).tolist()


def test_movmatrix_transposes() -> None:
    data = np.arange(64, dtype=np.uint16).reshape(8, 8)

    def words(matrix: NDArray) -> NDArray:
        return fragments(matrix, lambda g, t, r, i: g, lambda g, t, r, i: 2 * t + i, 1, 2)

    body = load_lanes(["%r1"], "%rd0") + "\nmovmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;\n"
    found = run(body + store_lanes(["%r2"], "%rd1"), [words(data), np.zeros((32, 1), np.uint32)])[0][1]
    assert found.tolist() == words(data.T).tolist()


def test_mma_of_a_warp_that_has_lost_lanes_is_an_error() -> None:
    body = """
    setp.eq.s32 %p1, %r0, 3;
    @%p1 ret;
    mov.b32 %r1, 0;
    mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r2, %r3, %r4, %r5}, {%r1, %r1}, {%r1}, {%r1, %r1, %r1, %r1};
    """
    with pytest.raises(PtxError, match="have left"):
        run(body, [np.zeros(1, np.uint32)])
