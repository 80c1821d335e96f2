"""The repair of Triton's interpreter is in force: each test fails without its part of the repair."""

from __future__ import annotations

import time

import pagelens.kernels.interpreter as interpreter

interpreter.import_triton()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter as stock  # noqa: E402

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


@triton.jit
def copy_kernel(X, Y, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(Y + place, tl.load(X + place).to(Y.dtype.element_ty))


@triton.jit
def arithmetic_kernel(X, Y, OUT, N: tl.constexpr):
    place = tl.arange(0, N)
    x, y = tl.load(X + place), tl.load(Y + place)
    tl.store(OUT + place, x * y)
    tl.store(OUT + N + place, x + y)
    tl.store(OUT + 2 * N + place, tl.where(x > y, x, y))
    tl.store(OUT + 3 * N + place, tl.maximum(x, 0.5))
    tl.store(OUT + 4 * N + place, -x)


@triton.jit
def dot_kernel(X, Y, OUT, N: tl.constexpr):
    rows, cols = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x, y = tl.load(X + rows * N + cols), tl.load(Y + rows * N + cols)
    tl.store(OUT + rows * N + cols, tl.dot(x, y))


@triton.jit
def larger(value, index, other, other_index):
    first = (value > other) | ((value == other) & (index < other_index))
    return tl.where(first, value, other), tl.where(first, index, other_index)


@triton.jit
def best_kernel(X, VALUE, INDEX, M: tl.constexpr, N: tl.constexpr):
    rows, cols = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(X + rows[:, None] * N + cols[None, :])
    index = tl.broadcast_to(cols[None, :], (M, N))
    value, index = tl.reduce((x, index), 1, larger)
    tl.store(VALUE + rows, value)
    tl.store(INDEX + rows, index)


@triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=["N"])
@triton.jit
def tuned_kernel(X, N, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X + place, tl.load(X + place, mask=place < N) + 1, mask=place < N)


@triton.jit
def flag_kernel(N, OUT):
    flag = (N.to(tl.int64) > 3) & (tl.arange(0, 4) < 2)
    tl.store(OUT + tl.arange(0, 4), tl.arange(0, 4) + 1, mask=flag)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 100


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(kind), b.view(kind))


def test_it_is_applied() -> None:
    assert interpreter.is_interpreted()
    assert triton.__version__.startswith("3.9."), "read through the changes of triton's interpreter, then raise this"


def test_to_bfloat16_rounds_to_even() -> None:
    x = torch.cat([noise(4094), torch.tensor([float("nan"), float("inf")])])
    y = torch.empty(4096, dtype=BF16)
    copy_kernel[(1,)](x, y, 4096)
    assert same_bits(y[:4094], x[:4094].to(BF16))
    assert y[4094].isnan()
    assert y[4095].isinf()
    back = torch.empty(4096)
    copy_kernel[(1,)](y, back, 4096)
    assert torch.equal(back[:4094], y[:4094].float())


def test_to_float16_and_float8_round_to_even_and_float8_saturates() -> None:
    x = torch.linspace(-500, 500, 2048)
    half, eight = torch.empty(2048, dtype=torch.float16), torch.empty(2048, dtype=FP8)
    copy_kernel[(1,)](x, half, 2048)
    copy_kernel[(1,)](x, eight, 2048)
    assert same_bits(half, x.half())
    assert same_bits(eight, x.clamp(-448, 448).to(FP8))
    raised = torch.empty(2048)
    copy_kernel[(1,)](eight, raised, 2048)
    assert torch.equal(raised, eight.float())


def test_bfloat16_arithmetic() -> None:
    x, y = noise(256).to(BF16), noise(256).flip(0).to(BF16)
    out = torch.empty(5, 256, dtype=BF16)
    arithmetic_kernel[(1,)](x, y, out, 256)
    half = torch.tensor(0.5, dtype=BF16)
    for got, wanted in zip(out, (x * y, x + y, torch.maximum(x, y), torch.maximum(x, half), -x)):
        assert same_bits(got, wanted)


def test_dot_products_of_16_and_8_bits_are_exact_for_small_numbers() -> None:
    numbers = torch.randint(-8, 9, (2, 32, 32), generator=torch.Generator().manual_seed(2)).float()
    for dtype in (BF16, torch.float16, torch.float32, FP8):
        x, y = numbers.to(dtype)
        out = torch.empty(32, 32)
        dot_kernel[(1,)](x, y, out, 32)
        assert torch.equal(out, numbers[0] @ numbers[1]), dtype


def test_a_reduction_of_ones_own_is_right_and_fast() -> None:
    """Stock takes 13 s for a tile of this size."""
    x = noise(64, 128).round()
    value, index = torch.empty(64), torch.empty(64, dtype=torch.int32)
    began = time.perf_counter()
    best_kernel[(1,)](x, value, index, 64, 128)
    assert time.perf_counter() - began < 2.0
    assert torch.equal(value, x.amax(1))
    assert torch.equal(index.long(), torch.from_numpy(np.argmax(x.numpy(), 1)))


def test_autotune_runs_the_first_configuration_once() -> None:
    x = torch.zeros(40)
    tuned_kernel[(3,)](x, 40)
    assert torch.equal(x, torch.ones(40))


def test_a_comparison_of_wide_numbers_is_a_mask() -> None:
    out = torch.zeros(4, dtype=torch.int32)
    flag_kernel[(1,)](7, out)
    assert out.tolist() == [1, 2, 0, 0]


def test_dots_below_16_inputs_are_refused_as_a_gpu_does() -> None:
    smallest = stock.interpreter_builder.codegen_fns["min_dot_size"](None, None)
    assert smallest[2] == 16
