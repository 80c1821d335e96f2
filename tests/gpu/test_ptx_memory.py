"""Bounds, alignment, asynchronous copies, barriers and atomics."""

from __future__ import annotations

import numpy as np
import pytest
from gpu.ptx.errors import Hazard, MemoryFault, UnknownPtx
from gpu.ptx_text import run

WORDS = np.arange(100, 132, dtype=np.uint32)
OUT = np.zeros(32, np.uint32)
STORE = "\nadd.s64 %rd38, %rd39, %rd1;\nst.global.b32 [%rd38], %r9;\n"
ADDRESS = "add.s64 %rd20, %rd0, %rd39;\nshl.b32 %r1, %r0, 2;\n"


def result(body: str, threads: int = 32, strict: bool = True) -> list[int]:
    out = np.zeros(threads, np.uint32)
    return run(body + STORE, [np.resize(WORDS, threads), out], threads=threads, shared=1024, strict=strict)[0][
        1
    ].tolist()


@pytest.mark.parametrize(
    "body",
    [
        "ld.global.b32 %r9, [%rd20+4];",  # the last lane reads behind the buffer
        "ld.global.b32 %r9, [%rd20+-4];",
        "mov.u32 %r9, 1; st.global.b32 [%rd20+4], %r9;",
        "ld.global.v4.b32 {%r9, %r10, %r11, %r12}, [%rd0+120];",
        "ld.shared.b32 %r9, [%r1+1024];",
        "mov.u32 %r9, 1; st.shared.b32 [%r1+1000], %r9;",
        "cp.async.ca.shared.global [%r1], [%rd20+4], 4; mov.u32 %r9, 1;",
        "cp.async.ca.shared.global [%r1+1024], [%rd20], 4; mov.u32 %r9, 1;",
        "mov.u64 %rd20, 0; ld.global.b32 %r9, [%rd20];",
        "ld.global.b32 %r9, [%rd0+2];",  # not aligned
        "ld.global.v2.b32 {%r9, %r10}, [%rd0+4];",
        "ld.shared.b32 %r9, [%r1+2];",
        "cp.async.cg.shared.global [%r1], [%rd0], 16; mov.u32 %r9, 1;",
        "atom.global.add.u32 %r9, [%rd20+4], 1;",
    ],
)
def test_faults(body: str) -> None:
    with pytest.raises(MemoryFault):
        result(ADDRESS + body)


def test_a_guard_keeps_lanes_inside() -> None:
    body = ADDRESS + "mov.u32 %r9, 0;\nsetp.lt.u32 %p1, %r0, 31;\n@%p1 ld.global.b32 %r9, [%rd20+4];"
    assert result(body) == [*WORDS[1:].tolist(), 0]


def test_vectors_and_small_types() -> None:
    body = """
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+16];
    ld.global.u8 %r5, [%rd0+8];
    ld.global.s8 %r6, [%rd0+11];
    ld.global.nc.L1::no_allocate.b16 %h1, [%rd0+4];
    cvt.u32.u16 %r7, %h1;
    add.s32 %r9, %r1, %r4;
    mad.lo.s32 %r9, %r5, 1000, %r9;
    mad.lo.s32 %r9, %r6, 7, %r9;
    mad.lo.s32 %r9, %r7, 100000, %r9;
    """
    assert result(body) == [104 + 107 + 102 * 1000 + 0 + 101 * 100000] * 32


COPY = (
    ADDRESS
    + """
    cp.async.ca.shared.global [%r1], [%rd20], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r1+128], [%rd20], 4;
    cp.async.commit_group;
"""
)


def test_copies_arrive_at_their_wait() -> None:
    assert result(COPY + "cp.async.wait_group 1;\nld.shared.b32 %r9, [%r1];") == WORDS.tolist()
    assert result(COPY + "cp.async.wait_group 0;\nld.shared.b32 %r9, [%r1+128];") == WORDS.tolist()
    assert result(COPY + "cp.async.wait_all;\nld.shared.b32 %r9, [%r1+128];") == WORDS.tolist()


def test_a_copy_that_was_not_waited_for_is_reported_and_gives_poison() -> None:
    early = COPY + "cp.async.wait_group 1;\nld.shared.b32 %r9, [%r1+128];"
    with pytest.raises(Hazard, match="not waited for"):
        result(early)
    assert result(early, strict=False) == [0xFFFFFFFF] * 32
    with pytest.raises(Hazard, match="not waited for"):
        result(COPY + "mov.u32 %r9, 3;\nst.shared.b32 [%r1], %r9;")


def test_a_copy_that_was_not_committed_is_not_waited_for() -> None:
    body = ADDRESS + "cp.async.ca.shared.global [%r1], [%rd20], 4;\ncp.async.wait_group 0;\nld.shared.b32 %r9, [%r1];"
    with pytest.raises(Hazard, match="not waited for"):
        result(body)


def test_short_copies_are_filled_with_zeros() -> None:
    body = (
        ADDRESS
        + """
    shl.b32 %r2, %r0, 4;
    mul.wide.u32 %rd21, %r0, 16;
    add.s64 %rd21, %rd0, %rd21;
    setp.lt.u32 %p1, %r0, 7;
    selp.b32 %r3, 16, 0, %p1;
    setp.eq.u32 %p2, %r0, 7;
    selp.b32 %r3, 8, %r3, %p2;
    cp.async.cg.shared.global [%r2], [%rd21], 16, %r3;   // lanes 8 and up point behind the buffer and read nothing
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    ld.shared.b32 %r9, [%r1];
    """
    )
    assert result(body) == [*WORDS[:30].tolist(), 0, 0]
    behind = body.replace("selp.b32 %r3, 16, 0, %p1;", "mov.u32 %r3, 16;")
    with pytest.raises(MemoryFault):
        result(behind)


EXCHANGE = (
    ADDRESS
    + """
    ld.global.b32 %r2, [%rd20];
    st.shared.b32 [%r1], %r2;
    BARRIER
    xor.b32 %r3, %r1, 4;
    ld.shared.b32 %r9, [%r3];
"""
)


@pytest.mark.parametrize(("barrier", "threads"), [("bar.sync 0;", 64), ("bar.warp.sync -1;", 64), ("bar.sync 0;", 32)])
def test_exchange_with_a_barrier(barrier: str, threads: int) -> None:
    expected = np.resize(WORDS, threads)[np.arange(threads) ^ 1].tolist()
    assert result(EXCHANGE.replace("BARRIER", barrier), threads) == expected


def test_a_missing_barrier_is_reported_though_the_result_is_right() -> None:
    body = EXCHANGE.replace("BARRIER", "")
    with pytest.raises(Hazard, match="no barrier after another thread's store"):
        result(body)
    assert result(body, strict=False) == WORDS[np.arange(32) ^ 1].tolist()


def test_a_warp_barrier_does_not_order_other_warps() -> None:
    body = EXCHANGE.replace("BARRIER", "bar.warp.sync -1;").replace("%r1, 4;", "%r1, 128;")
    with pytest.raises(Hazard, match="no barrier"):
        result(body, 64)
    assert result(body.replace("bar.warp.sync -1;", "bar.sync 0;"), 64) == np.resize(WORDS, 64).tolist()


@pytest.mark.parametrize("reader", ["xor.b32 %r3, %r1, 4;", "mov.u32 %r3, 8;"])
def test_overwriting_what_others_still_read(reader: str) -> None:
    """A write after another thread's read, and after the reads of many."""
    body = EXCHANGE.replace("BARRIER", "bar.sync 0;").replace("xor.b32 %r3, %r1, 4;", reader)
    with pytest.raises(Hazard, match="no barrier after another thread's load"):
        result(body + "\nst.shared.b32 [%r1], %r0;\n")
    assert result(body + "\nbar.sync 0;\nst.shared.b32 [%r1], %r0;\n")


def test_a_copy_is_seen_by_others_after_a_barrier_only() -> None:
    body = COPY + "cp.async.wait_group 0;\nBARRIER\nxor.b32 %r3, %r1, 4;\nld.shared.b32 %r9, [%r3];"
    with pytest.raises(Hazard, match="no barrier"):
        result(body.replace("BARRIER", ""))
    assert result(body.replace("BARRIER", "bar.sync 0;")) == WORDS[np.arange(32) ^ 1].tolist()


def test_atomics_of_lanes_that_meet() -> None:
    body = "and.b32 %r1, %r0, 3;\nmul.wide.u32 %rd20, %r1, 4;\nadd.s64 %rd20, %rd20, %rd0;\n"
    counts = np.zeros(4, np.uint32)
    (found, old), _ = run(body + "atom.global.gpu.relaxed.add.u32 %r9, [%rd20], 2;" + STORE, [counts, OUT])
    assert found.tolist() == [16] * 4
    assert old.tolist() == [2 * (lane // 4) for lane in range(32)]
    (found, _), _ = run(body + "red.global.max.s32 [%rd20], %r0;\nmov.u32 %r9, 0;" + STORE, [counts, OUT])
    assert found.tolist() == [28, 29, 30, 31]
    (found, old), _ = run(body + "atom.global.cas.b32 %r9, [%rd20], 0, %r0;" + STORE, [counts, OUT])
    assert found.tolist() == [4, 1, 2, 3]  # lane 0 puts a 0, so lane 4 still finds one; the later ones do not
    sums = np.zeros(4, np.float32)
    (found, _), _ = run(
        body + "mov.f32 %f1, 0f3FC00000;\nred.global.add.f32 [%rd20], %f1;\nmov.u32 %r9, 0;" + STORE, [sums, OUT]
    )
    assert found.tolist() == [12.0] * 4


def test_shared_atomics_need_a_barrier_before_plain_reads() -> None:
    body = """
    mov.u32 %r2, 0;
    st.shared.b32 [%r1], %r2;
    bar.sync 0;
    and.b32 %r3, %r1, 4;
    atom.shared.add.u32 %r4, [%r3], 1;
    BARRIER
    ld.shared.b32 %r9, [%r3];
    """
    with pytest.raises(Hazard):
        result(ADDRESS + body.replace("BARRIER", ""))
    assert result(ADDRESS + body.replace("BARRIER", "bar.sync 0;")) == [16] * 32


def test_generic_addresses() -> None:
    body = (
        ADDRESS
        + """
    cvt.u64.u32 %rd21, %r1;
    cvta.shared.u64 %rd22, %rd21;
    ld.b32 %r2, [%rd20];
    st.b32 [%rd22], %r2;
    bar.sync 0;
    cvta.to.shared.u64 %rd23, %rd22;
    cvt.u32.u64 %r3, %rd23;
    ld.shared.b32 %r9, [%r3];
    """
    )
    assert result(body) == WORDS.tolist()


def test_bytes_are_counted() -> None:
    _, report = run(ADDRESS + "ld.global.b32 %r9, [%rd20];" + STORE, [WORDS, OUT])
    assert (report.bytes_read, report.bytes_written) == (128, 128)


def test_a_parameter_that_is_not_there() -> None:
    with pytest.raises(UnknownPtx):
        result("ld.param.u64 %rd5, [k_9];\nmov.u32 %r9, 0;")
