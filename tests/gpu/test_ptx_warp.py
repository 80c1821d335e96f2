"""Divergence, shuffles, votes, barriers and special registers."""

from __future__ import annotations

import numpy as np
import pytest
from gpu.ptx.errors import Deadlock, PtxError, UndefinedRegister
from gpu.ptx_text import run
from numpy.typing import NDArray

LANES = np.arange(32)
STORE = "\nadd.s64 %rd38, %rd39, %rd0;\nst.global.b32 [%rd38], %r9;\n"


def per_thread(body: str, threads: int = 32) -> list[int]:
    """What each thread leaves in %r9."""
    return run(body + STORE, [np.zeros(threads, np.uint32)], threads=threads)[0][0].tolist()


def test_lanes_of_different_branches_meet_again() -> None:
    """Loops of different length in each lane; the vote after them sees all lanes."""
    body = """
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
LOOP:
    add.s32 %r2, %r2, %r1;
    add.s32 %r1, %r1, 1;
    setp.le.u32 %p1, %r1, %r0;
    @%p1 bra LOOP;
    setp.gt.u32 %p2, %r2, 100;
    vote.sync.ballot.b32 %r3, %p2, -1;
    popc.b32 %r4, %r3;
    mad.lo.s32 %r9, %r4, 1000, %r2;
    """
    sums = LANES * (LANES + 1) // 2
    assert per_thread(body) == (1000 * int((sums > 100).sum()) + sums).tolist()


def test_if_and_else() -> None:
    body = """
    and.b32 %r1, %r0, 1;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra EVEN;
    mul.lo.s32 %r9, %r0, 10;
    bra.uni DONE;
EVEN:
    add.s32 %r9, %r0, 500;
DONE:
    """
    assert per_thread(body, 64) == [t * 10 if t % 2 else t + 500 for t in range(64)]


def test_threads_that_leave_are_not_waited_for() -> None:
    body = """
    mov.u32 %r9, 1;
    setp.ge.u32 %p1, %r0, 40;
    @%p1 ret;
    bar.sync 0;
    mov.u32 %r9, 7;
    """
    assert per_thread(body, 64) == [7] * 40 + [0] * 24


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "source"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("down", 3, 31, lambda lane: lane + 3 if lane + 3 < 32 else lane),
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("idx", 9, 31, lambda lane: 9),
        # segments of 8 lanes: the mask in bits 8..12 holds the bits that must not change
        ("idx", 1, 0x181F, lambda lane: (lane & 24) | 1),
        ("down", 3, 0x181F, lambda lane: lane + 3 if lane % 8 + 3 < 8 else lane),
        ("up", 3, 0x1800, lambda lane: lane - 3 if lane % 8 >= 3 else lane),
    ],
)
def test_shuffle(mode: str, by: int, clamp: int, source) -> None:
    body = f"""
    mul.lo.s32 %r1, %r0, 100;
    shfl.sync.{mode}.b32 %r2|%p1, %r1, {by}, {clamp}, -1;
    selp.b32 %r3, 1, 0, %p1;
    add.s32 %r9, %r2, %r3;
    """
    from_lane = [source(lane) for lane in range(32)]
    in_range = [int(mode in ("bfly", "idx") or s != lane) for lane, s in enumerate(from_lane)]
    assert per_thread(body) == [100 * s + r for s, r in zip(from_lane, in_range)]


def test_shuffle_waits_for_its_mask_only() -> None:
    """Half of the warp shuffles in one branch, half in the other, each with its own mask."""
    body = """
    setp.lt.u32 %p1, %r0, 16;
    @%p1 bra LOW;
    shfl.sync.bfly.b32 %r9, %r0, 1, 31, 0xffff0000;
    bra.uni DONE;
LOW:
    shfl.sync.bfly.b32 %r9, %r0, 2, 31, 0x0000ffff;
DONE:
    """
    assert per_thread(body) == [lane ^ 2 if lane < 16 else lane ^ 1 for lane in range(32)]


def test_a_lane_outside_its_own_mask_is_an_error() -> None:
    body = "setp.ne.u32 %p1, %r0, 1;\n@%p1 bra SKIP;\nshfl.sync.bfly.b32 %r9, %r0, 1, 31, 1;\nSKIP:\nmov.u32 %r9, 1;"
    with pytest.raises(PtxError, match="member mask"):
        per_thread(body)


def test_votes_matches_and_reductions() -> None:
    body = """
    and.b32 %r1, %r0, 3;
    setp.eq.u32 %p1, %r1, 2;
    vote.sync.any.pred %p2, %p1, -1;
    vote.sync.all.pred %p3, %p1, -1;
    match.any.sync.b32 %r2, %r1, -1;
    redux.sync.add.s32 %r3, %r0, -1;
    redux.sync.max.u32 %r4, %r0, -1;
    selp.b32 %r5, 1, 0, %p2;
    selp.b32 %r6, 1, 0, %p3;
    shl.b32 %r6, %r6, 1;
    or.b32 %r5, %r5, %r6;
    add.s32 %r3, %r3, %r4;
    xor.b32 %r9, %r2, %r3;
    xor.b32 %r9, %r9, %r5;
    """
    same = [sum(1 << j for j in range(32) if j % 4 == lane % 4) for lane in range(32)]
    assert per_thread(body) == [s ^ (496 + 31) ^ 1 for s in same]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("%laneid", lambda t: t % 32),
        ("%warpid", lambda t: t // 32),
        ("%lanemask_lt", lambda t: (1 << t % 32) - 1),
        ("%lanemask_le", lambda t: (2 << t % 32) - 1),
        ("%lanemask_eq", lambda t: 1 << t % 32),
        ("%lanemask_gt", lambda t: 0xFFFFFFFF ^ ((2 << t % 32) - 1)),
        ("%lanemask_ge", lambda t: 0xFFFFFFFF ^ ((1 << t % 32) - 1)),
        ("%ntid.x", lambda t: 64),
        ("%ntid.y", lambda t: 1),
        ("%tid.y", lambda t: 0),
        ("%ctaid.x", lambda t: 0),
        ("%nctaid.x", lambda t: 1),
    ],
)
def test_special_registers(name: str, expected) -> None:
    assert per_thread(f"mov.u32 %r9, {name};", 64) == [expected(t) for t in range(64)]


def test_ctas_have_their_own_shared_memory() -> None:
    body = """
    mov.u32 %r1, %ctaid.x;
    shl.b32 %r2, %r0, 2;
    st.shared.b32 [%r2], %r1;
    bar.sync 0;
    xor.b32 %r2, %r2, 4;
    ld.shared.b32 %r3, [%r2];
    mad.lo.s32 %r4, %r1, 32, %r0;
    mul.wide.u32 %rd30, %r4, 4;
    add.s64 %rd30, %rd30, %rd0;
    st.global.b32 [%rd30], %r3;
    """
    out: NDArray = np.zeros(3 * 32, np.uint32)
    assert run(body, [out], ctas=3, shared=128)[0][0].tolist() == [t // 32 for t in range(96)]


def test_a_barrier_that_part_of_a_cta_never_reaches() -> None:
    body = """
    setp.lt.u32 %p1, %r0, 32;
    @%p1 bra FIRST;
    bar.sync 0;
    bra.uni DONE;
FIRST:
    bar.sync 0;
DONE:
    mov.u32 %r9, 1;
    """
    with pytest.raises(Deadlock, match=r"32 at bar\.sync 0; 32 at bar\.sync 0|64 at bar"):
        per_thread(body, 64)


def test_threads_that_come_to_a_barrier_from_behind() -> None:
    """The second warp passes the first, which waits, and goes back to where it waits."""
    body = """
    setp.lt.u32 %p1, %r0, 32;
    @%p1 bra MEET;
    bra.uni LATER;
BEFORE:
    mov.u32 %r8, 2;
MEET:
    bar.sync 0;
    mov.u32 %r9, 1;
    bra.uni DONE;
LATER:
    bra.uni BEFORE;
DONE:
    """
    assert per_thread(body, 64) == [1] * 64


def test_an_endless_loop_is_stopped() -> None:
    with pytest.raises(Deadlock, match="steps"):
        per_thread("LOOP:\nbra.uni LOOP;")


def test_a_register_that_nothing_wrote() -> None:
    with pytest.raises(UndefinedRegister, match="%r5"):
        per_thread("add.s32 %r9, %r5, 1;")


def test_trap() -> None:
    with pytest.raises(PtxError, match="trap"):
        per_thread("trap;")
