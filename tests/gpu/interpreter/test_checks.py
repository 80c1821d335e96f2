"""The checks of interpreted kernels see what they are for, and nothing else."""

from __future__ import annotations

import pagelens.kernels.interpreter as interpreter

interpreter.import_triton()

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from pagelens.kernels.interpreter.checks import KernelCheckError, checked  # noqa: E402


@triton.jit
def shift_kernel(X, Y, N, shift, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < N
    tl.store(Y + place, tl.load(X + place + shift, mask=mask), mask=mask)


@triton.jit
def unmasked_kernel(X, Y, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + place, tl.load(X + place % 4))


@triton.jit
def same_place_kernel(Y, BLOCK: tl.constexpr):
    tl.store(Y + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32))


@triton.jit
def count_kernel(Y):
    tl.atomic_add(Y, 1)


def test_reads_and_writes_out_of_bounds() -> None:
    x, y = torch.zeros(100), torch.zeros(100)
    with checked() as checks:
        shift_kernel[(4,)](x, y, 100, 0, 32)
        with pytest.raises(KernelCheckError, match="load out of bounds by 1 lanes"):
            shift_kernel[(4,)](x, y, 100, 1, 32)
        with pytest.raises(KernelCheckError, match="load out of bounds"):
            shift_kernel[(4,)](x, y, 100, -1, 32)
        with pytest.raises(KernelCheckError, match="store out of bounds by 28 lanes"):
            unmasked_kernel[(4,)](x, y, 32)
    assert checks.launches == 4
    shift_kernel[(1,)](torch.zeros(64), torch.zeros(64), 32, 1, 32)  # not checked any more


def test_a_view_allows_what_lies_between_its_ends() -> None:
    whole = torch.zeros(200)
    with checked():
        shift_kernel[(2,)](whole[50:114], torch.zeros(64), 64, 0, 32)
        with pytest.raises(KernelCheckError, match="out of bounds"):
            shift_kernel[(2,)](whole[50:113], torch.zeros(64), 64, 0, 32)


def test_two_programs_that_write_one_place() -> None:
    with checked():
        same_place_kernel[(1,)](torch.zeros(32), 32)
        with pytest.raises(KernelCheckError, match="race: store"):
            same_place_kernel[(2,)](torch.zeros(32), 32)


def test_a_program_that_reads_what_another_writes() -> None:
    """In place: the second program reads what the first has written, or the first what the second writes later."""
    with checked():
        x = torch.zeros(64)
        shift_kernel[(2,)](x, x, 64, 0, 32)
        for shift in (-8, 8):
            x = torch.zeros(128)
            with pytest.raises(KernelCheckError, match="race"):
                shift_kernel[(2,)](x[32:96], x[32:96], 48, shift, 16) if shift > 0 else shift_kernel[(2,)](
                    x[32:96], x[40:104], 56, 0, 32
                )


def test_atomic_operations_may_meet() -> None:
    y = torch.zeros(1, dtype=torch.int32)
    with checked():
        count_kernel[(5,)](y)
    assert int(y) == 5
