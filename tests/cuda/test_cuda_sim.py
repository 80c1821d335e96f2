"""The CUDA kernels on a CPU (csrc/simt), against the reference: in three thread orders, under the race detector, under
AddressSanitizer and UBSan, and with one line of a kernel changed, which must be found.

PAGELENS_TEST_CUDA_SIM names an extension to test instead of the plain one: this file starts itself that way.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.kernel_cases import (
    BUILT,
    CASES,
    REFERENCE,
    compare,
    conflicts,
    cuda_ops,
    load,
    run_tests_with,
    shared_cases,
    table,
)
from helpers.simt_build import COMMON, ROOT, build_extension, run
from ops.cache_cases import AttentionCase, Paged, rope_table
from ops.case import noise
from ops.vision_cases import WindowAttentionCase

from pagelens.config import CUDA_OPS
from pagelens.errors import ShapeError, UnsupportedError
from pagelens.ops import OpCase
from pagelens.ops.cuda import CudaOps
from pagelens.ops.cuda_packing import pack_rows
from pagelens.quantization import QuantizedWeight, quantize

ORDERS = ("forward", "reverse", "random")
AARCH64 = "aarch64-linux-gnu-g++-12"
inner = pytest.mark.skipif(BUILT in os.environ, reason="only once, by the run that starts the others")


@pytest.fixture(scope="module")
def extension() -> Path:
    given = os.environ.get(BUILT)
    return Path(given) if given else build_extension("plain")


@pytest.fixture(scope="module")
def kernels(extension: Path) -> ModuleType:
    return load(extension)


@pytest.fixture(scope="module")
def ops(kernels: ModuleType) -> CudaOps:
    return cuda_ops(kernels)


def set_order(kernels: ModuleType, order: str) -> str:
    kernels.set_options(order, 7, "race" in os.environ.get(BUILT, ""))
    return order


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, kernels: ModuleType) -> str:
    return set_order(kernels, request.param)


@pytest.fixture(params=["random"] if BUILT in os.environ else ORDERS)
def order_of_few(request: pytest.FixtureRequest, kernels: ModuleType) -> str:
    """Of cases that the slower builds need not run in every order: the shared ones do."""
    return set_order(kernels, request.param)


# Bank conflicts that are known, all of them reads: what stands on the line, and why it has them. Any other fails.
KNOWN_CONFLICTS = {
    # where the keys of a warp pass from one row of the window to the next
    "window_attention.cu": ("? s[n][e] * a.scale + term[",),
}


def clean(kernels: ModuleType, extension: Path) -> None:
    """Nothing found since the last look; with the race detector, something was looked at."""
    found = kernels.take_findings()
    assert found["races"] == []
    assert (found["accesses"] > 0) == ("race" in os.environ.get(BUILT, ""))
    for place in conflicts(extension, found["banks"]):
        name, _, line = place.partition(":")
        text = (ROOT / "csrc/cuda" / name).read_text().splitlines()[int(line) - 1]
        assert any(known in text for known in KNOWN_CONFLICTS.get(name, ())), f"bank conflicts: {place}: {text}"


def quantized(weight: torch.Tensor, kind: str) -> QuantizedWeight:
    """Rounded by this project's rule, but for activations that stay bfloat16."""
    q = quantize(weight, kind)  # type: ignore[arg-type]
    return QuantizedWeight(q.kind, q.values, q.scales, q.group_size, q.zeros, dtype=torch.bfloat16)


def test_shared_cases(ops: CudaOps, extension: Path, kernels: ModuleType, order: str) -> None:
    everything = table(kernels)
    found = [why for case in shared_cases(ops) if (why := compare(case, everything))]
    assert found == []
    clean(kernels, extension)


def test_refusals_name_the_size() -> None:
    ops = cuda_ops(ModuleType("no kernels"))
    refused = {ops.supports(case.op_case()) for case in CASES if case.op in ops.IMPLEMENTED}
    assert refused == {
        None,
        "the CUDA kernels take bfloat16, not float32",
        "head_dim 22 is not one of 16, 32, 64, 96, 128",
        "head_dim 22 is not a multiple of 4 up to 256",
        "width 77 is not a multiple of 8",
        "width 13 is not a multiple of 8",
        *(f"head_dim {d} is not one of 16, 32, 64, 80" for d in (4, 6, 8)),
    }
    many = OpCase("moe_routing", torch.float32, (("num_experts", 512), ("top_k", 8)))
    assert ops.supports(many) == "it takes up to 256 experts and top_k up to 32"


@pytest.mark.parametrize("experts", [5, 32, 33, 64, 128, 256])
def test_routing_is_the_reference_with_ties_and_nan(
    ops: CudaOps, extension: Path, kernels: ModuleType, order_of_few: str, experts: int
) -> None:
    g = torch.Generator().manual_seed(experts)
    for tokens in (0, 1, 31, 70):
        logits = torch.randn(tokens, experts, generator=g).round(decimals=0)  # whole numbers: many ties
        for top_k in {1, min(8, experts), min(32, experts)}:
            for renormalize in (False, True):
                expected = REFERENCE.moe_routing(logits, top_k, renormalize, 2.5)
                result = ops.moe_routing(logits, top_k, renormalize, 2.5)
                assert torch.equal(result.expert_ids, expected.expert_ids)
                assert torch.equal(result.offsets, expected.offsets)
                assert torch.equal(result.permutation, expected.permutation)
                torch.testing.assert_close(result.weights, expected.weights, rtol=1e-6, atol=1e-7)
    logits = torch.full((3, experts), torch.nan)
    assert torch.equal(ops.moe_routing(logits, 4, False, 1.0).expert_ids, torch.arange(4).int().expand(3, 4))
    clean(kernels, extension)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("rows", "width", "inner"), [(1, 64, 24), (3, 136, 72), (150, 200, 64)])
def test_grouped_gemm(
    ops: CudaOps, extension: Path, kernels: ModuleType, order_of_few: str, kind: str, rows: int, width: int, inner: int
) -> None:
    """Inputs whose exact products and sums fit into float32: the reference's dequantised weights, the same numbers."""
    g = torch.Generator().manual_seed(rows)
    experts, top_k = 6, 2
    shapes = ((inner, width), (inner, width), (width, inner))
    weights = [[noise(g, shape, torch.bfloat16, shape[1] ** -0.5) for shape in shapes] for _ in range(experts)]
    parts = [tuple(quantized(w, kind) if kind != "bfloat16" else w for w in expert) for expert in weights]
    x, logits = noise(g, (rows, width), torch.bfloat16), torch.randn(rows, experts, generator=g)
    logits[:, 3] = -50.0  # an expert without rows
    routing = REFERENCE.moe_routing(logits, top_k, True, 1.0)
    router = torch.zeros(experts, width)
    expected = REFERENCE.grouped_gemm(x, REFERENCE.pack_moe(router, parts, None), routing)
    result = ops.grouped_gemm(x, ops.pack_moe(router, parts, None), routing)
    # The hidden values are rounded to bfloat16 on both sides; a value at the edge may fall either way.
    tolerance = 2.0**-8 / inner**0.5 + 8 * 2.0**-24 * (width + inner) ** 0.5
    assert float((result - expected).abs().max()) <= tolerance * float(expected.abs().max())
    clean(kernels, extension)


def test_a_row_has_the_same_bits_in_any_batch(ops: CudaOps, extension: Path, kernels: ModuleType) -> None:
    """Tiles of 16 and of 64 rows, and splits of other sequences, change nothing."""
    g = torch.Generator().manual_seed(3)
    experts, width, inner = 4, 128, 64
    parts = [
        tuple(noise(g, shape, torch.bfloat16, 0.1) for shape in ((inner, width), (inner, width), (width, inner)))
        for _ in range(experts)
    ]
    moe = ops.pack_moe(torch.zeros(experts, width), parts, None)
    x, logits = noise(g, (90, width), torch.bfloat16), torch.randn(90, experts, generator=g)
    together = ops.grouped_gemm(x, moe, ops.moe_routing(logits, 2, True, 1.0))
    for row in (0, 41, 89):
        alone = ops.grouped_gemm(x[row : row + 1], moe, ops.moe_routing(logits[row : row + 1], 2, True, 1.0))
        assert torch.equal(alone[0], together[row])
    case = AttentionCase(
        batch=Paged(((1, 300), (20, 500), (1, 7))), heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16
    )
    q, keys, values, tables, starts, contexts = case.tensors()
    together = ops.paged_attention(q, keys, values, tables, starts, contexts, 0.125)
    for s in range(3):
        rows = slice(int(starts[s]), int(starts[s + 1]))
        one = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        alone = ops.paged_attention(q[rows], keys, values, tables[s : s + 1], one, contexts[s : s + 1], 0.125)
        assert torch.equal(alone, together[rows])
    clean(kernels, extension)


@inner
def test_launches_of_few_tiles_give_the_same_bits(ops: CudaOps, kernels: ModuleType) -> None:
    """With room for one tile's splits, a pair of launches a tile."""
    kernels.set_options("forward")
    little = {"paged_attention.cu": ("kMostScratch = int64_t{32} << 20;", "kMostScratch = 1;")}
    in_pieces = cuda_ops(load(build_extension("plain", little)))
    case = AttentionCase(
        batch=Paged(((1, 300), (20, 500), (1, 7))), heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16
    )
    assert torch.equal(case.bind(in_pieces)(), case.bind(ops)())


def test_scratch_of_attention_is_bounded(kernels: ModuleType) -> None:
    """A prompt and a decode in tables of 40,960 keys; all tiles at once would take 6 GB and 0.5 GB."""
    places = dict.fromkeys(("q", "keys", "values", "block_tables", "query_starts", "context_lens", "out"), 0)
    sizes = {"heads": 32, "kv_heads": 4, "head_dim": 128, "block_size": 16, "table_width": 2560, "scale": 1.0}
    for sequences, tokens, longest in ((1, 2048, 40960), (64, 64, 40960), (4, 4096, 1 << 30)):
        args = kernels.PagedAttentionArgs(
            **places, **sizes, sequences=sequences, tokens=tokens, longest_context=longest
        )
        one_tile = 4 * -(-longest // 256) * (32 + 16 * 136)
        assert one_tile <= kernels.paged_attention_scratch(args) <= max(one_tile, 32 << 20)


def test_packed_rows_hold_every_value() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 5)[:, :72]
    for kind, per_byte in (("int8", 1), ("int4", 2)):
        weight = QuantizedWeight(kind, values, torch.ones(2, 1), 72)  # type: ignore[arg-type]
        packed, scales = pack_rows(weight)
        assert packed.shape == (2, 128 // per_byte)
        assert scales.shape == (2, 128 // (64 if kind == "int8" else 32))


def test_a_token_without_a_place_is_left_out(ops: CudaOps, kernels: ModuleType) -> None:
    """As on a device with rows that fill up a batch: no slot, or a position outside the table."""
    kernels.set_options("forward")
    g = torch.Generator().manual_seed(5)
    qkv = noise(g, (4, 8 * 16), torch.bfloat16)
    cache = torch.zeros(2, 2, 4, 2, 16, dtype=torch.bfloat16)
    rope = rope_table(9, 16)
    positions, slots = torch.tensor([3, 9, 2, -1]).int(), torch.tensor([-1, 1, 2, 3]).int()
    out = torch.full((4, 4, 16), 7.0, dtype=torch.bfloat16)
    ops.qk_norm_rope_store(qkv, positions, slots, rope, cache[0], cache[1], 4, out=out)
    assert [bool((row == 7).all()) for row in out] == [True, True, False, True]
    assert cache.view(2, 8, 32).abs().amax((0, 2)).bool().tolist() == [False, False, True, *[False] * 5]


def small_call(ops: CudaOps, op: str) -> Any:
    """One call of a kernel with sizes that are of no matter."""
    case = next(case for case in shared_cases(ops) if case.op == op and case.flops())  # one that is not empty
    return case.bind(table(ops.kernels))


@pytest.mark.parametrize("op", [*CUDA_OPS, "moe_routing"])
def test_a_refused_launch_is_an_exception(op: str, ops: CudaOps, kernels: ModuleType) -> None:
    call = (lambda: ops.moe_routing(torch.zeros(3, 8), 2, True, 1.0)) if op == "moe_routing" else small_call(ops, op)
    kernels.set_options("forward", refusal="cudaErrorLaunchOutOfResources")
    try:
        with pytest.raises(RuntimeError, match="cudaErrorLaunchOutOfResources"):
            call()
    finally:
        kernels.set_options("forward")
    call()


def test_sizes_that_a_kernel_cannot_take(kernels: ModuleType) -> None:
    """Below the adapter's own checks."""
    with pytest.raises(ValueError, match="1 to 256 experts"):
        kernels.moe_routing(0, 1, 257, 8, False, 1.0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="0 to 2147483616 tokens with this top_k, not 2147483647; split the batch"):
        kernels.moe_routing(0, 2**31 - 1, 1, 1, False, 1.0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="bfloat16, int8 or int4, not int2"):
        kernels.grouped_gemm(0, 1, 8, 8, 1, 1, "int2", *[0] * 11)


def test_inputs_that_are_not_what_a_kernel_reads_are_refused(ops: CudaOps) -> None:
    q = torch.zeros(1, 4, 16, dtype=torch.bfloat16)
    cache = torch.zeros(2, 8, 2, 16, dtype=torch.bfloat16)
    tables, starts, contexts = torch.zeros(1, 2).int(), torch.tensor([0, 1]).int(), torch.ones(1).int()
    good = (q, cache, cache, tables, starts, contexts, 1.0)
    assert ops.paged_attention(*good).shape == q.shape
    wide = torch.zeros(2, 8, 2, 24, dtype=torch.bfloat16)[..., :16]
    unaligned = torch.zeros(cache.numel() + 1, dtype=torch.bfloat16)[1:].view(cache.shape)
    for place, bad in ((0, q.float()), (1, wide), (1, unaligned), (3, tables.long()), (5, torch.ones(2).int())):
        with pytest.raises(ShapeError, match="paged_attention: "):
            ops.paged_attention(*(bad if i == place else x for i, x in enumerate(good)))
    with pytest.raises(ShapeError, match="int8 KV-cache"):
        ops.paged_attention(*good, key_scales=torch.zeros(1))
    experts = [tuple(torch.zeros(8, 8, dtype=torch.bfloat16) for _ in range(3)) for _ in range(3)]
    with pytest.raises(ShapeError, match="2 experts for a router"):
        ops.pack_moe(torch.zeros(3, 8), experts[:2], None)
    experts[2] = tuple(quantized(torch.ones(8, 8, dtype=torch.bfloat16), "int8") for _ in range(3))  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="expert 2 is quantised in another way"):
        ops.pack_moe(torch.zeros(3, 8), experts, None)


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same values, 2 bytes further on than where a piece of memory starts."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def test_bfloat16_that_starts_between_two_pairs_is_refused(ops: CudaOps) -> None:
    """Contiguous, and no card could read it 4 bytes at a time."""
    shapes = {"qkv": (2, 64), "keys": (1, 2, 1, 16), "values": (1, 2, 1, 16), "out": (2, 2, 16)}
    good = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    places = torch.tensor([0, 1]).int()

    def call(**tensors: torch.Tensor) -> None:
        ops.qk_norm_rope_store(positions=places, slots=places, rope=rope_table(2, 16), num_heads=2, **tensors)

    call(**good)
    for name, x in good.items():
        with pytest.raises(ShapeError, match=f"qk_norm_rope_store: {name} must start at a multiple of 4 bytes"):
            call(**{**good, name: shifted(x)})
    odd = torch.zeros(2, 65, dtype=torch.bfloat16)[:, :-1]
    with pytest.raises(ShapeError, match="an even number of values apart, not 65"):
        call(**{**good, "qkv": odd})
    q = torch.zeros(1, 4, 16, dtype=torch.bfloat16)
    cache, starts = torch.zeros(2, 8, 2, 16, dtype=torch.bfloat16), torch.tensor([0, 1]).int()
    with pytest.raises(ShapeError, match="paged_attention: q must start"):
        ops.paged_attention(shifted(q), cache, cache, torch.zeros(1, 2).int(), starts, torch.ones(1).int(), 1.0)
    windows = WindowAttentionCase(grid=4, window=2, heads=1, head_dim=16, dtype=torch.bfloat16)
    arguments = windows.tensors()
    out = shifted(torch.zeros(*arguments[0].shape[:3], 16, dtype=torch.bfloat16))
    with pytest.raises(ShapeError, match="window_attention: out must start"):
        ops.window_attention(*arguments, 1, 2, out=out)


def test_another_device_than_the_current_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch goes to the thread's current device, whatever the tensors say."""
    ops = CudaOps(ModuleType("no kernels"), "cuda", REFERENCE, torch.device("cuda", 1))
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert ops._stream() == 77
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(UnsupportedError, match=r"run on cuda:1, and this thread's current device is cuda:0"):
        ops._stream()


@inner
@pytest.mark.skipif(not shutil.which(AARCH64), reason="needs Debian's g++-12-aarch64-linux-gnu")
def test_the_kernels_compile_for_aarch64() -> None:
    for kernel in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        run([AARCH64, *COMMON, "-fsyntax-only", "-x", "c++", kernel])


AGAIN = ("race", "asan")


@pytest.fixture(scope="module")
def again() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """The whole file on other builds of the kernels, all at the same time: they take a core each."""
    with ThreadPoolExecutor(len(AGAIN)) as pool:
        yield {name: pool.submit(lambda v: run_tests_with(build_extension(v), __file__), name) for name in AGAIN}


@inner
@pytest.mark.parametrize("variant", AGAIN)
def test_again_with(again: dict[str, Future[subprocess.CompletedProcess[str]]], variant: str) -> None:
    """The race detector finds nothing, nor do AddressSanitizer and UBSan."""
    result = again[variant].result()
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
