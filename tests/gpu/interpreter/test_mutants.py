"""The tests of the tests: each kernel with one small fault is caught by its case, by a wrong result or a check.

A mutant is the source of a kernel with one text replaced. All kernels are imported anew around it, so that a mutant of
what they share reaches them too.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.gpu_cases import as_gpu_case
from ops.cache_cases import AttentionCase, Paged, RopeCase
from ops.case import BF16, F32, Case, difference, noise
from ops.cases import EmbeddingCase, LinearCase, MoeCase, NormCase
from ops.quantized_cases import OWN_INT8, QuantizedLinearCase, QuantizedMoeCase, Recipe
from ops.vision_cases import ConvDownsampleCase, PatchEmbedCase, SequenceAttentionCase, WindowAttentionCase

import pagelens.kernels as kernels
from pagelens.kernels.interpreter.checks import KernelCheckError, checked
from pagelens.kernels.launch import Config
from pagelens.kernels.tuning import forced_config
from pagelens.ops.reference import ReferenceOps
from pagelens.ops.triton import TritonOps
from pagelens.ops.triton_sampling import RowChoice

KEPT = {"launch", "tuning", "matrix"}  # no kernels, and their classes must stay the same


@contextmanager
def mutated(module: str, old: str, new: str, folder: Path) -> Iterator[None]:
    """Kernels imported anew, one of them from a source with `old`, which stands there exactly once, replaced."""
    source = Path(kernels.__path__[0], f"{module}.py").read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{module}.py has {source.count(old)} times {old!r}"
    path = folder / f"{module}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    prefix = f"{kernels.__name__}."
    saved = {
        name: loaded
        for name, loaded in sys.modules.items()
        if name.startswith(prefix) and name[len(prefix) :].split(".")[0] not in {*KEPT, "interpreter"}
    }
    for name in saved:
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location(prefix + module, path)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[prefix + module] = mutant
    try:
        spec.loader.exec_module(mutant)
        yield
    finally:
        for name in [n for n in sys.modules if n.startswith(prefix)]:
            if name[len(prefix) :].split(".")[0] not in {*KEPT, "interpreter"}:
                del sys.modules[name]
        sys.modules.update(saved)
        for name, loaded in saved.items():
            setattr(kernels, name[len(prefix) :], loaded)


@dataclass(frozen=True)
class Mutant:
    module: str
    old: str
    new: str
    case: Case

    @property
    def id(self) -> str:
        return f"{self.module}: {self.old.strip()[:60]}"


LINEAR = LinearCase(rows=5, width=193, out=77, bias=True, residual=True, strided=True)
FOUR_BITS = QuantizedLinearCase(rows=5, width=193, out=33, recipe=Recipe(order=True, zeros=True, group=16))
EIGHT_BITS = QuantizedLinearCase(rows=5, width=193, out=33, recipe=OWN_INT8)
GROUPS_OF_64 = QuantizedLinearCase(rows=5, width=193, out=33, recipe=Recipe(zeros=True, group=64, scales=BF16))
FP8 = QuantizedLinearCase(rows=5, width=193, out=33, recipe=Recipe("fp8", 64))
ROUNDED_FP8 = QuantizedLinearCase(rows=5, width=193, out=33, recipe=Recipe("fp8", 0, activation="fp8", scales=F32))
PREFILL = AttentionCase(batch=Paged(((33, 64), (1, 33), (2, 2), (5, 37)), 16), heads=4, kv_heads=2, head_dim=22)
DECODE = AttentionCase(batch=Paged(((1, 300), (1, 7)), 7), heads=4, kv_heads=2, head_dim=32)
WINDOW = WindowAttentionCase(batch=2, grid=9, window=4, heads=2, head_dim=6)
EXPERTS = MoeCase(rows=37, shared=64)
CONV = ConvDownsampleCase(batch=2, grid=5)
ROPE = RopeCase(batch=Paged(((7, 7), (1, 20))), heads=4, kv_heads=2, head_dim=22, norm=True)

MUTANTS = [
    # linear and what it shares with the experts
    Mutant(
        "tiles",
        "x = tl.load(x_rows + k[None, :], mask=k[None, :] < K, other=0.0)\n            w",
        "x = tl.load(x_rows + k[None, :])\n            w",
        LINEAR,
    ),
    Mutant("tiles", "(BLOCK_M, BLOCK_N // 2, 2)", "(BLOCK_M, 2, BLOCK_N // 2)).trans(0, 2, 1", EXPERTS),
    Mutant(
        "tiles",
        "load_inputs(x_rows, ORDER, group * GROUP, place + half, K, GROUP)",
        "load_inputs(x_rows, ORDER, group * GROUP, place, K, GROUP)",
        GROUPS_OF_64,
    ),
    Mutant("tiles", "low = ((packed << 4) >> 4).to(tl.int16)", "low = (packed & 15).to(tl.int16)", FOUR_BITS),
    Mutant("tiles", "high = high - zero[:, None]", "high = high", GROUPS_OF_64),
    Mutant("tiles", "k = tl.load(ORDER + k, mask=inside, other=0)", "k = k", FOUR_BITS),
    Mutant(
        "tiles",
        "inside = (place < GROUP) & (k < K)\n            raw",
        "inside = k < K + 1\n            raw",
        EIGHT_BITS,
    ),
    Mutant("tiles", "part = part * tl.load(x_scales + group)", "part = part * tl.load(x_scales)", EIGHT_BITS),
    Mutant("tiles", "SCALES + group * N + cols", "SCALES + cols", FP8),
    Mutant("tiles", "* 256.0", "* 128.0", FP8),
    Mutant("tiles", "exponent = tl.maximum(exponent, -6) - 3", "exponent = tl.maximum(exponent, -6) - 2", ROUNDED_FP8),
    Mutant("round_rows", "value = round_to_even(value)", "value = tl.floor(value)", EIGHT_BITS),
    Mutant(
        "linear",
        "tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_x\n",
        "tl.minimum(rows, M - 1).to(tl.int64)[:, None] * K\n",
        LINEAR,
    ),
    Mutant("linear", "RESIDUAL + wide * stride_residual", "RESIDUAL + wide * N + 1", LINEAR),
    Mutant(
        "linear",
        "block_n = (place % (ROW_GROUP * blocks_n)) // height",
        "block_n = (place % blocks_n) // height",
        replace(LINEAR, rows=300),
    ),
    # attention
    Mutant("paged_attention", "key[None, :] <= position[:, None]", "key[None, :] < position[:, None]", PREFILL),
    Mutant("paged_attention", "key_ok = key < end_key", "key_ok = key < end_key + 1", PREFILL),
    Mutant("paged_attention", "return low - 1", "return tl.minimum(low, S - 1)", PREFILL),
    Mutant("paged_attention", "head = kv_head * GROUP + place % GROUP", "head = kv_head + place % GROUP", PREFILL),
    Mutant(
        "paged_attention",
        "acc * fade[:, None], input_precision",
        "acc, input_precision",
        replace(PREFILL, sharp=5.0, batch=Paged(((90, 200),))),
    ),
    Mutant("paged_attention", "acc += factor * tl.load(PART_OUT", "acc += tl.load(PART_OUT", DECODE),
    Mutant(
        "paged_attention",
        "row_ok = (place < ROWS * GROUP) & (row < num_rows)",
        "row_ok = place < ROWS * GROUP",
        PREFILL,
    ),
    Mutant("window_attention", "+ (W - 1)", "+ W", WINDOW),
    Mutant("window_attention", "x = tl.where((ok & (inside == 0))[None, :], pad[:, None], x)", "x = x", WINDOW),
    Mutant(
        "window_attention",
        "key_ok = (key_y < W) & (key_x < W)",
        "key_ok = key_y < W",
        replace(WINDOW, grid=10, window=7),
    ),
    Mutant("window_attention", "+ bias_w[:, None, :]", "+ bias_w[:, None, :] * 0", WINDOW),
    Mutant("window_attention", "mask = (m_ok & (out_y < G) & (out_x < G))[:, None]", "mask = m_ok[:, None]", WINDOW),
    Mutant(
        "attention",
        'scores = tl.where(n[None, :] < T, scores, -float("inf"))',
        "scores = scores",
        SequenceAttentionCase(tokens=33),
    ),
    # experts
    Mutant("grouped_gemm", "place = tl.minimum(place, end - 1)", "place = place", EXPERTS),
    Mutant("grouped_gemm", "acc = acc * tl.load(ROUTING_WEIGHTS + flat)[:, None]", "acc = acc", EXPERTS),
    Mutant("grouped_gemm", "rows = flat // TOP_K", "rows = flat % TOP_K", EXPERTS),
    Mutant("grouped_gemm", "matrix = W + expert.to(tl.int64) * stride_w", "matrix = W", EXPERTS),
    Mutant("grouped_gemm", "if RESIDUAL is not None:", "if False:", EXPERTS),
    Mutant(
        "grouped_gemm",
        "order = ORDER + expert.to(tl.int64) * K",
        "order = ORDER",
        QuantizedMoeCase(rows=7, width=64, inner=24, recipe=Recipe(order=True, zeros=True, group=16)),
    ),
    Mutant("moe_routing", "rank = tl.cumsum(chosen, 0) - chosen", "rank = tl.cumsum(chosen, 0)", EXPERTS),
    Mutant(
        "moe_routing",
        "tl.where((other < tile)[:, None], count, 0)",
        "tl.where((other <= tile)[:, None], count, 0)",
        EXPERTS,
    ),
    Mutant("moe_routing", 'keys = tl.where(here, -float("inf"), keys)', "keys = keys", EXPERTS),
    Mutant("moe_ffn", "extra=0 if shared is None else 1", "extra=0", EXPERTS),
    # convolutions
    Mutant("conv_downsample", "& (y >= 0)", "", CONV),
    Mutant("conv_downsample", "left = m % G_OUT * STRIDE - SIZE // 2", "left = m % G_OUT * STRIDE", CONV),
    Mutant(
        "conv_downsample",
        "centred = tl.where(inner[None, :], acc - mean[:, None], 0.0)",
        "centred = acc - mean[:, None]",
        replace(CONV, neck=24),
    ),
    Mutant(
        "patch_embed",
        "place = (k // (PATCH * PATCH) * SIDE + k // PATCH % PATCH) * SIDE",
        "place = (k // (PATCH * PATCH) * PATCH + k // PATCH % PATCH) * SIDE",
        PatchEmbedCase(side=15, patch=5),
    ),
    # rows
    Mutant("rms_norm", "/ C + eps", "/ BLOCK + eps", NormCase(rows=3, width=77)),
    Mutant(
        "layer_norm",
        "centred = tl.where(cols < C, x - mean[:, None], 0.0)",
        "centred = x - mean[:, None]",
        NormCase(rows=3, width=77, layer=True),
    ),
    Mutant("embedding", "tl.load(IDS + row)", "tl.load(IDS)", EmbeddingCase(rows=33, width=193)),
    Mutant("qk_norm_rope_store", "high * cos + low * sin", "high * cos - low * sin", ROPE),
    Mutant("qk_norm_rope_store", "place = slot * (KV_HEADS * D) + at", "place = slot * D + at", ROPE),
    Mutant("qk_norm_rope_store", "source = row + (H + KV_HEADS) * D + at", "source = row + H * D + at", ROPE),
    Mutant("qk_norm_rope_store", "mask = (head < H)[:, None] & half_ok[None, :]", "mask = half_ok[None, :]", ROPE),
]


def problem_of(case: Case, ops: Any) -> str | None:
    """What the tests of this case would say."""
    case = as_gpu_case(case)
    try:
        with checked():
            result = case.bind(ops)().clone()
    except KernelCheckError as error:
        return str(error)
    return difference(result, case.bind(ReferenceOps())(), case)


def functions_of(module: str, text: str) -> set[str]:
    """Names of the functions of a module whose source holds `text`."""
    source = Path(kernels.__path__[0], f"{module}.py").read_text(encoding="utf-8")
    tree = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in tree if text.strip() in str(ast.get_source_segment(source, node))}


def test_every_kernel_has_a_mutant() -> None:
    paths = Path(kernels.__path__[0]).glob("*.py")
    all_kernels = {
        name for path in paths for name in re.findall(r"def (\w+_kernel)\(", path.read_text(encoding="utf-8"))
    }
    assert len(all_kernels) > 15
    edits = [(mutant.module, mutant.old) for mutant in MUTANTS]
    edits += [("sample", old) for old, _ in SAMPLE_MUTANTS] + [("linear", old) for old, _ in PARTS_MUTANTS]
    mutated_functions = {name for module, old in edits for name in functions_of(module, old)}
    # A helper that several kernels share stands for none of them; those of one kernel stand for it.
    own = {"round_to_even": "round_rows_kernel"}
    found = mutated_functions | {own[name] for name in mutated_functions if name in own}
    assert found >= all_kernels, all_kernels - found


PARTS_MUTANTS = [
    ("for part in range(SPLIT_K):", "for part in range(SPLIT_K - 1):"),
    ("PARTS + (part * M + rows)", "PARTS + (part + rows)"),
]


@pytest.mark.parametrize(("old", "new"), PARTS_MUTANTS)
def test_a_fault_in_sums_of_parts_is_caught(old: str, new: str, triton_ops: TritonOps, tmp_path: Path) -> None:
    parts = Config.make(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, SPLIT_K=3)
    with forced_config("linear", parts):
        assert problem_of(LINEAR, triton_ops) is None
        with mutated("linear", old, new, tmp_path):
            assert problem_of(LINEAR, triton_ops) is not None


@pytest.mark.parametrize("case", {mutant.case.id: mutant.case for mutant in MUTANTS}.values(), ids=lambda case: case.id)
def test_without_a_fault_the_cases_pass(case: Case, triton_ops: TritonOps) -> None:
    assert problem_of(case, triton_ops) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_a_fault_is_caught(mutant: Mutant, triton_ops: TritonOps, tmp_path: Path) -> None:
    with mutated(mutant.module, mutant.old, mutant.new, tmp_path):
        assert problem_of(mutant.case, triton_ops) is not None


def test_a_norm_that_forgets_its_residual_is_caught(tmp_path: Path) -> None:
    x, residual = (noise(torch.Generator().manual_seed(i), (3, 20), BF16) for i in range(2))
    wanted = (x.float() + residual.float()).to(BF16)
    with mutated("rms_norm", "tl.store(at, x.to(RESIDUAL.dtype.element_ty), mask=mask)", "pass", tmp_path):
        from pagelens.kernels.rms_norm import rms_norm

        rms_norm(x, torch.ones(20, dtype=BF16), 1e-6, residual=residual)
    assert not torch.equal(residual, wanted)


SAMPLE_MUTANTS = [
    ("tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)", "x.to(tl.int32, bitcast=True)"),
    ("wanted = tl.minimum(tl.maximum(tl.floor((target - above) / each), 0.0), at - 1.0)", "wanted = 0.0 * at"),
    ("extra = (at - (needed - above)) * weight_at(number_of(cut), top, inverse)", "extra = 0.0"),
    ("tl.min(tl.where(tops == top, bests, V), 0)", "tl.max(tl.where(tops == top, bests, 0), 0)"),
    ("match = match & (token != tl.load(ALLOWED + row * num_allowed + j))", "match = match"),
    ("match = match & (token == tl.load(history + length - size + 1 + j))", "match = match"),
]


@pytest.mark.parametrize(("old", "new"), SAMPLE_MUTANTS)
def test_a_fault_in_sampling_is_caught(old: str, new: str, triton_ops: TritonOps, tmp_path: Path) -> None:
    """By a few rows on which greedy, drawn and guarded choices are known: whole logits, many of them equal."""
    logits = torch.randn(9, 1500, generator=torch.Generator().manual_seed(3)).mul(2).round()
    logits[8] = 0.0
    logits[8, ::2] = -0.0
    history = [5, 6, 7, 1, 5, 6, 2, 9, 5, 6]
    rows = [RowChoice(temperature=0.8, top_k=30, top_p=0.9, uniform=0.1 * i) for i in range(1, 8)]
    rows += [RowChoice(0.0, ngram_size=3, ngram_window=9, history=history, allowed=frozenset({2}))]
    rows += [RowChoice(temperature=1.0, uniform=0.4)]

    def outcome() -> tuple[list[int], torch.Tensor]:
        changed = logits.clone()
        with checked():
            return triton_ops.sampling.choose(changed, rows, None), changed

    good = outcome()
    with mutated("sample", old, new, tmp_path):
        try:
            bad = outcome()
        except KernelCheckError:
            return
    assert good[0] != bad[0] or not torch.equal(good[1], bad[1])
