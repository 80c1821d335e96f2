"""What the native backend refuses: a wrong call is a clear error, never the end of the process nor a write outside."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.cache_cases import rope_table
from ops.case import BF16, F32
from torch import Tensor

from pagelens import _native
from pagelens.errors import ShapeError, UnsupportedError
from pagelens.ops import OpCase, RopeTable, SamplingCut
from pagelens.ops.native import NativeOps
from pagelens.ops.reference import ReferenceOps
from pagelens.quantization import QuantizedWeight

META = torch.device("meta")  # tensors without memory: their address is 0


def zeros(*shape: int, dtype: torch.dtype = F32, device: Any = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def store(ops: NativeOps, **changes: Any) -> Tensor:
    arguments = {
        "qkv": zeros(2, 24),
        "positions": ints(0, 0),
        "slots": ints(0, 1),
        "rope": rope_table(4, 8),
        "keys": zeros(2, 4, 1, 8),
        "values": zeros(2, 4, 1, 8),
        "num_heads": 1,
    }
    return ops.qk_norm_rope_store(**{**arguments, **changes})


def attend(ops: NativeOps, **changes: Any) -> Tensor:
    arguments = {
        "q": zeros(2, 1, 8),
        "keys": zeros(2, 4, 1, 8),
        "values": zeros(2, 4, 1, 8),
        "block_tables": ints(0, 1)[None],
        "query_starts": ints(0, 2),
        "context_lens": ints(2),
        "scale": 1.0,
    }
    return ops.paged_attention(**{**arguments, **changes})


def quantized(**changes: Any) -> QuantizedWeight:
    parts = {"values": zeros(4, 8, dtype=torch.int8), "scales": torch.ones(4, 1), "group_size": 8, "dtype": F32}
    return QuantizedWeight("int8", **{**parts, **changes})


INT8_CACHE = {name: zeros(2, 4, 1, 8, dtype=torch.uint8) for name in ("keys", "values")}
ELSEWHERE: dict[str, Callable[[NativeOps], Any]] = {
    "quantize": lambda ops: ops.quantize(zeros(3, 8, device=META), "int8"),
    "pack values": lambda ops: ops.pack_linear(quantized(values=zeros(4, 8, dtype=torch.int8, device=META))),
    "pack scales": lambda ops: ops.pack_linear(quantized(scales=zeros(4, 1, device=META))),
    "pack zeros": lambda ops: ops.pack_linear(quantized(zeros=zeros(4, 1, dtype=torch.int16, device=META))),
    "pack weight": lambda ops: ops.pack_linear(zeros(4, 8, device=META)),
    "pack bias": lambda ops: ops.pack_linear(zeros(4, 8), zeros(4, device=META)),
    "store keys": lambda ops: store(ops, keys=zeros(2, 4, 1, 8, device=META)),
    "store values": lambda ops: store(ops, values=zeros(2, 4, 1, 8, device=META)),
    "store cos": lambda ops: store(ops, rope=RopeTable(zeros(4, 4, device=META), zeros(4, 4))),
    "store sin": lambda ops: store(ops, rope=RopeTable(zeros(4, 4), zeros(4, 4, device=META))),
    "store qkv": lambda ops: store(ops, qkv=zeros(2, 24, device=META)),
    "store slots": lambda ops: store(ops, slots=zeros(2, dtype=torch.int32, device=META)),
    "store scales": lambda ops: store(
        ops, **INT8_CACHE, key_scales=zeros(2, 1, 4, device=META), value_scales=zeros(2, 1, 4)
    ),
    "attention keys": lambda ops: attend(ops, keys=zeros(2, 4, 1, 8, device=META)),
    "attention tables": lambda ops: attend(ops, block_tables=zeros(1, 2, dtype=torch.int32, device=META)),
    "embedding table": lambda ops: ops.embedding(ints(0), zeros(3, 8, device=META)),
    "embedding ids": lambda ops: ops.embedding(zeros(2, dtype=torch.int32, device=META), zeros(3, 8)),
    "norm weight": lambda ops: ops.rms_norm(zeros(2, 8), zeros(8, device=META), 1e-6),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_tensor_on_another_device_is_refused(name: str, native: NativeOps) -> None:
    with pytest.raises(ShapeError, match="CPU"):
        ELSEWHERE[name](native)


@pytest.mark.parametrize("name", ["key_scales", "value_scales"])
def test_scales_of_an_int8_cache_come_together(name: str, native: NativeOps) -> None:
    with pytest.raises(ShapeError, match="needs key_scales and value_scales"):
        store(native, **INT8_CACHE, **{name: zeros(2, 1, 4)})


@pytest.mark.parametrize("backend", [NativeOps, ReferenceOps])
@pytest.mark.parametrize("vocabulary", [1, 100, 5000])
@pytest.mark.parametrize(
    "cut",
    [
        SamplingCut(-1.0),
        SamplingCut(math.nan),
        SamplingCut(math.inf),
        SamplingCut(1.0, top_k=-1),
        SamplingCut(1.0, top_k=0.5),  # type: ignore[arg-type]
        SamplingCut(1.0, top_k=math.nan),  # type: ignore[arg-type]
        SamplingCut(1.0, top_p=0.0),
        SamplingCut(1.0, top_p=1.01),
        SamplingCut(1.0, top_p=math.nan),
        SamplingCut(1.0, min_p=-0.1),
        SamplingCut(1.0, min_p=2.0),
        SamplingCut(1.0, top_k=5, min_p=2.0),
        SamplingCut(1.0, uniform=1.0),
        SamplingCut(1.0, uniform=math.nan),
    ],
    ids=str,
)
def test_a_cut_outside_its_ranges_is_refused(cut: SamplingCut, vocabulary: int, backend: Any) -> None:
    ops = backend()
    with pytest.raises(ShapeError, match=r"sample: .*0 < top_p <= 1.*; row 1 has SamplingCut\("):
        ops.sample(zeros(2, vocabulary), [SamplingCut(1.0), cut])
    assert ops.sample(zeros(2, vocabulary), [SamplingCut(0.0), cut._replace(temperature=0.0)]) == [0, 0]
    ops.close()


def test_cuts_without_their_five_numbers_are_refused(native: NativeOps) -> None:
    for cuts in ([(1.0,), (1.0,)], [1.0, 2.0], [(1.0, 0, 1.0, 0.0)] * 2):
        with pytest.raises(ShapeError, match="a cut has temperature, top_k, top_p, min_p, uniform"):
            native.sample(zeros(2, 50), cuts)  # type: ignore[arg-type]


def test_patches_without_pixels_are_refused(native: NativeOps) -> None:
    with pytest.raises(ShapeError, match="p at least 1"):
        native.pack_patch_embed(zeros(5, 3, 0, 0), zeros(5))


def test_a_number_of_heads_below_1_is_refused(native: NativeOps) -> None:
    for heads in (0, -1):
        with pytest.raises(ShapeError, match="qkv must be"):
            store(native, qkv=zeros(2, 8 * (heads + 2)), num_heads=heads)


def test_starts_whose_difference_overflows_are_refused(native: NativeOps) -> None:
    """2^31 - 2 new tokens they would be, in 32 bits, of a context that has room for them."""
    keys = zeros(1, 2**17, 1, 2)
    tables, contexts = zeros(3, 2**14, dtype=torch.int32), ints(2, 2**31 - 1, 2)
    with pytest.raises(ShapeError, match="sequence 1 has"):
        native.paged_attention(zeros(2, 1, 2), keys, keys, tables, ints(0, 2, -(2**31), 2), contexts, 1.0)


# ---- sizes of 0 ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(3, 0), (0, 8), (0, 0)])
def test_a_weight_without_elements_is_quantised(shape: tuple[int, int], kind: Any, native: NativeOps) -> None:
    weights = [ops.quantize(zeros(*shape), kind) for ops in (native, ReferenceOps())]
    assert weights[0].shape == weights[1].shape == shape
    assert weights[0].scales.shape == weights[1].scales.shape
    result = native.linear(torch.ones(2, shape[1]), native.pack_linear(weights[0]))
    assert torch.equal(result, zeros(2, shape[0]))


@pytest.mark.parametrize(("width", "inner"), [(0, 4), (8, 0), (0, 0)])
def test_experts_without_elements(width: int, inner: int, native: NativeOps) -> None:
    experts = [(zeros(inner, width), zeros(inner, width), zeros(width, inner))] * 2
    moe = native.pack_moe(zeros(2, width), experts, None)
    assert torch.equal(native.moe_ffn(torch.ones(3, width), moe, 1, True, 1.0), zeros(3, width))
    routing = native.moe_routing(zeros(3, 2), 1, True, 1.0)
    assert torch.equal(native.grouped_gemm(torch.ones(3, width), moe, routing), zeros(3, width))


# ---- programs ------------------------------------------------------------------------------------------------------
def test_a_program_may_go_while_it_records(native: NativeOps) -> None:
    program = native.new_program()
    program.begin()
    del program
    gc.collect()
    table = torch.ones(2, 8)
    assert torch.equal(native.embedding(ints(1), table), table[1:])


def test_the_end_of_another_program_ends_no_recording(native: NativeOps) -> None:
    """Nor does an end on another thread than the one that records."""
    mine, other, table = native.new_program(), native.new_program(), torch.ones(2, 8)
    mine.begin()
    other.end()
    thread = threading.Thread(target=mine.end)
    thread.start()
    thread.join()
    native.embedding(ints(1), table)
    mine.end()
    native.embedding(ints(1), table)
    assert (mine.num_calls, other.num_calls) == (1, 0)


# ---- what the system does not give ---------------------------------------------------------------------------------
def test_memory_that_is_not_there_is_a_clear_error(native: NativeOps) -> None:
    with pytest.raises(MemoryError, match=r"no 4294967296 MiB to the native kernels; use a smaller batch"):
        _native.copy_weights(_native.ThreadPool(1), 0, 2**52)


@pytest.mark.skipif(sys.platform != "linux", reason="limits its address space by the size that /proc tells")
def test_threads_that_are_not_there_are_a_clear_error() -> None:
    """And once the system gives them, the same pool has them."""
    code = """
import resource, torch
from pagelens.ops.native import NativeOps
def call(ops): return ops.rms_norm(torch.ones(20000, 64), torch.ones(64), 0.0)
call(NativeOps(1))
ops = NativeOps(200)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), before[1]))
try:
    call(ops)
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, before)
assert bool((call(ops) == 1).all())
ops.close()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "of num_threads=200 threads (" in result.stdout
    assert "ask for fewer" in result.stdout


# ---- the rest ------------------------------------------------------------------------------------------------------
def test_wrong_shapes_and_dtypes_are_refused(native: NativeOps) -> None:
    x, half = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.float16)
    packed = native.pack_linear(torch.zeros(4, 8))
    cache = torch.zeros(2, 4, 1, 8)
    rope, i32 = rope_table(4, 8), torch.zeros(2, dtype=torch.int32)
    qkv = torch.zeros(2, 24)
    tables, starts = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    q, two = torch.zeros(2, 1, 8), torch.tensor([2], dtype=torch.int32)
    calls = {
        "width": lambda: native.linear(torch.zeros(2, 7), packed),
        "dtype": lambda: native.linear(half, packed),
        "mixed": lambda: native.linear(x.bfloat16(), packed),
        "transposed": lambda: native.linear(torch.zeros(8, 2).T, packed),
        "activation": lambda: native.linear(x, packed, "tanh"),  # type: ignore[arg-type]
        "residual": lambda: native.linear(x, packed, residual=torch.zeros(2, 5)),
        "out": lambda: native.linear(x, packed, out=torch.zeros(2, 4, dtype=BF16)),
        "out is x": lambda: native.linear(
            square := torch.zeros(2, 8), native.pack_linear(torch.zeros(8, 8)), out=square
        ),
        "weight": lambda: native.pack_linear(torch.zeros(8)),
        "bias": lambda: native.pack_linear(torch.zeros(4, 8), torch.zeros(5)),
        "norm": lambda: native.rms_norm(x, torch.zeros(7), 1e-6),
        "id": lambda: native.embedding(torch.tensor([1, 2], dtype=torch.int32), x),
        "negative id": lambda: native.embedding(torch.tensor([-1], dtype=torch.int32), x),
        "int64 ids": lambda: native.embedding(torch.tensor([1]), x),
        "swiglu": lambda: native.pack_swiglu(torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(8, 3)),
        "moe": lambda: native.pack_moe(
            torch.zeros(2, 8), [(torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(8, 3))], None
        ),
        "top_k": lambda: native.moe_routing(x, 9, False, 1.0),
        "slot": lambda: native.qk_norm_rope_store(qkv, i32, i32 + 8, rope, cache, cache.clone(), 1),
        "position": lambda: native.qk_norm_rope_store(qkv, i32 + 4, i32, rope, cache, cache.clone(), 1),
        "heads": lambda: native.qk_norm_rope_store(qkv, i32, i32, rope, cache, cache.clone(), 2),
        "block": lambda: native.paged_attention(q, cache, cache, tables + 2, starts, two, 1.0),
        "context": lambda: native.paged_attention(q, cache, cache, tables, starts, two + 3, 1.0),
        "too short": lambda: native.paged_attention(q, cache, cache, tables, starts, two - 1, 1.0),
        "starts": lambda: native.paged_attention(q, cache, cache, tables, starts + 1, two, 1.0),
    }
    accepted = []
    for name, call in calls.items():
        try:
            call()
        except ShapeError:
            continue
        accepted.append(name)
    assert not accepted


def test_a_refused_store_writes_nothing(native: NativeOps) -> None:
    cache = torch.zeros(2, 2, 4, 1, 8)
    slots = torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises(ShapeError, match="slot 8 of 8"):
        native.qk_norm_rope_store(torch.ones(2, 24), slots * 0, slots, rope_table(4, 8), cache[0], cache[1], 1)
    assert not cache.any()


def test_supports_says_why_not(native: NativeOps) -> None:
    assert native.supports(OpCase("linear", BF16, (("in_features", 7),))) is None
    assert "float16" in str(native.supports(OpCase("linear", torch.float16)))
    assert "head_dim" in str(native.supports(OpCase("paged_attention", F32, (("head_dim", 7),))))
    assert native.supports(OpCase("window_attention", BF16, (("head_dim", 64),))) is None


def test_an_unknown_instruction_set_makes_native_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise ValueError("PAGELENS_CPU_ISA=sse9 is not an instruction set; known: portable")

    monkeypatch.setattr(_native, "isa", refuse)
    with pytest.raises(UnsupportedError, match="sse9"):
        NativeOps(1)
