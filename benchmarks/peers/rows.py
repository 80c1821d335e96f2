"""What is compared: workloads, who runs them, what they need of the machine, and the goals. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .models import OCR, QWEN3, QWEN3_30B, DecoderSizes, encoder_flops, global_flops, window_flops
from .table import Goal

WIDTHS = ("bf16", "int8", "int4")
# A sample of about half a second each; a slow peer decodes fewer tokens.
STEPS = {"bf16": 12, "int8": 20, "int4": 28}
SLOW_STEPS = 4
GGUF = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
OPENVINO = {"bf16": "fp16", "int8": "int8", "int4": "int4"}
OURS = {"bf16": "auto", "int8": "int8", "int4": "int4"}
MAX_DEPTH = 4096
GIB = 2**30


@dataclass(frozen=True)
class WorkerSpec:
    """A process: module of this package, environment ("ours", "peers" or "torch"), what it is told, memory it takes.

    artifact  name of what must be made before (artifacts.py); its path becomes the spec's "model"
    """

    module: str
    environment: str
    spec: tuple[tuple[str, Any], ...]
    memory: float
    artifact: str | None = None


@dataclass(frozen=True)
class Variant:
    """One way to do a row's work: a worker, and what it is asked. own: it is ours, in another setting."""

    name: str
    worker: WorkerSpec
    request: dict[str, Any]
    own: bool = False


@dataclass(frozen=True)
class Row:
    """needs: G of work of a unit by limit. scale: see table.judge. alternate: the two do not fit in memory together."""

    id: str
    title: str
    unit: str
    ours: Variant
    rivals: tuple[Variant, ...]
    needs: dict[str, float]
    goal: Goal
    rounds: int
    quality: str | None = None
    scale: float = 1.0
    alternate: bool = False
    slow: bool = field(default=False)


def worker(module: str, environment: str, gib: float, artifact: str | None = None, **spec: Any) -> WorkerSpec:
    return WorkerSpec(module, environment, tuple(sorted(spec.items())), gib * GIB, artifact)


def variant(name: str, process: WorkerSpec, /, own: bool = False, **request: Any) -> Variant:
    return Variant(name, process, request, own)


def llama_variants(process: WorkerSpec, **request: Any) -> list[Variant]:
    return [
        variant(f"llama.cpp fa {name}", process, flash_attention=on, **request)
        for name, on in (("off", False), ("on", True))
    ]


# ---- Qwen3-0.6B ------------------------------------------------------------------------------------------------------
def qwen3_workers(width: str) -> dict[str, WorkerSpec]:
    depth = {"max_depth": MAX_DEPTH}
    found = {
        "ours": worker("ours", "ours", 3, "qwen3-0.6b", weights=OURS[width], **depth),
        "llama": worker("llama_cpp", "peers", 3, f"qwen3-0.6b-{GGUF[width]}.gguf", **depth),
        "openvino": worker("openvino", "peers", 4, f"openvino-qwen3-0.6b-{OPENVINO[width]}"),
    }
    if width == "bf16":
        found["transformers"] = worker("transformers", "torch", 2.5, "qwen3-0.6b", kind="qwen3", dtype="bf16")
    return found


def qwen3_decode(width: str, depth: int, goal: Goal) -> Row:
    found, steps = qwen3_workers(width), STEPS[width]
    rivals = llama_variants(found["llama"], op="decode", depth=depth, steps=steps)
    rivals.append(variant("OpenVINO", found["openvino"], op="decode", depth=depth, steps=steps))
    if "transformers" in found:
        rivals.append(variant("transformers", found["transformers"], op="decode", depth=depth, steps=SLOW_STEPS))
    if depth:
        rivals.insert(0, variant("depth 0", found["ours"], own=True, op="decode", depth=0, steps=steps))
    return Row(
        id=f"qwen3-decode-{depth}-{width}",
        title=f"Qwen3-0.6B decode at depth {depth}, {width}",
        unit="token",
        ours=variant("ours", found["ours"], op="decode", depth=depth, steps=steps),
        rivals=tuple(rivals),
        needs={"read": QWEN3.decode_bytes(width, depth) / 1e9},
        goal=goal,
        rounds=5 if depth < MAX_DEPTH else 3,
        quality="qwen3-0.6b",
    )


def qwen3_prefill(width: str, goal: Goal) -> Row:
    found = qwen3_workers(width)
    request: dict[str, Any] = {"op": "prefill", "tokens": 512}
    rivals = llama_variants(found["llama"], **request)
    rivals += [variant(name, found[key], **request) for name, key in PEERS if key in found]
    return Row(
        id=f"qwen3-prefill-512-{width}",
        title=f"Qwen3-0.6B prefill of 512, {width}",
        unit="call",
        ours=variant("ours", found["ours"], **request),
        rivals=tuple(rivals),
        needs=prefill_needs(QWEN3, 512, width),
        goal=goal,
        rounds=3,
        quality="qwen3-0.6b",
    )


PEERS = (("OpenVINO", "openvino"), ("transformers", "transformers"))


def prefill_needs(sizes: DecoderSizes, tokens: int, width: str) -> dict[str, float]:
    """Products in the width's own arithmetic (int4 is multiplied as int8), attention in bfloat16."""
    products, attention = sizes.prefill_flops(tokens)
    if width == "bf16":
        return {"bf16": (products + attention) / 1e9}
    return {"int8": products / 1e9, "bf16": attention / 1e9}


def qwen3_batch(batch: int, keeps: float) -> Row:
    ours = worker("ours", "ours", 5, "qwen3-0.6b", weights="auto", batch=16)
    request: dict[str, Any] = {"op": "decode", "depth": 0, "steps": 12}
    return Row(
        id=f"qwen3-batch-{batch}-bf16",
        title=f"Qwen3-0.6B, tokens/s of {batch} rows over one row, bf16",
        unit="call",
        ours=variant("ours", ours, batch=batch, **request),
        rivals=(variant("one row", ours, own=True, batch=1, **request),),
        needs={"read": QWEN3.decode_bytes("bf16", 0) / 1e9},
        goal=Goal(keeps=keeps),
        rounds=7,
        quality="qwen3-0.6b",
        scale=batch,
    )


# ---- DeepSeek-OCR ----------------------------------------------------------------------------------------------------
OCR_GIB = {"bf16": (6.8, 6.0), "int8": (5.0, 3.3), "int4": (4.0, 2.0)}  # ours, llama.cpp's


def ocr_workers(width: str) -> tuple[WorkerSpec, WorkerSpec]:
    own, theirs = OCR_GIB[width]
    ours = worker("ours", "ours", own, "deepseek-ocr", weights=OURS[width])
    return ours, worker("llama_cpp", "peers", theirs, f"deepseek-ocr-{GGUF[width]}.gguf")


def ocr_transformers() -> WorkerSpec:
    return worker("transformers", "torch", 6.0, kind="ocr-text", dtype="bf16")


def ocr_decode(width: str, goal: Goal) -> Row:
    ours, llama = ocr_workers(width)
    request: dict[str, Any] = {"op": "decode", "depth": 0, "steps": STEPS[width]}
    rivals = llama_variants(llama, **request)
    if width == "bf16":
        rivals.append(variant("transformers", ocr_transformers(), op="decode", depth=0, steps=SLOW_STEPS))
    return Row(
        id=f"ocr-decode-0-{width}",
        title=f"DeepSeek-OCR decode, {width}",
        unit="token",
        ours=variant("ours", ours, **request),
        rivals=tuple(rivals),
        needs={"read": OCR.decode_bytes(width, 0) / 1e9},
        goal=goal,
        rounds=5,
        quality="deepseek-ocr",
    )


def ocr_prefill(goal: Goal) -> Row:
    ours, llama = ocr_workers("bf16")
    request: dict[str, Any] = {"op": "prefill", "tokens": 300}
    return Row(
        id="ocr-prefill-300-bf16",
        title="DeepSeek-OCR prefill of 300, bf16",
        unit="call",
        ours=variant("ours", ours, **request),
        rivals=(*llama_variants(llama, **request), variant("transformers", ocr_transformers(), **request)),
        needs=prefill_needs(OCR, 300, "bf16"),
        goal=goal,
        rounds=3,
        quality="deepseek-ocr",
    )


def encoder_row(width: str, goal: Goal) -> Row:
    plain = worker("ours", "ours", OCR_GIB["bf16"][0], "deepseek-ocr", weights="auto")
    request: dict[str, Any] = {"op": "encode"}
    if width == "bf16":
        ours = variant("ours", plain, **request)
        peer = worker("transformers", "torch", 3, "deepseek-ocr", kind="encoder", dtype="bf16")
        rivals = (variant("transformers", peer, **request),)
        needs = {"bf16": encoder_flops() / 1e9}
    else:
        ours = variant("ours", worker("ours", "ours", OCR_GIB["int8"][0], "deepseek-ocr", weights="int8"), **request)
        rivals = (variant("our bf16", plain, own=True, **request),)
        needs = {}
    return Row(
        id=f"encoder-1024-{width}",
        title=f"DeepEncoder 1024 x 1024, {width}",
        unit="call",
        ours=ours,
        rivals=rivals,
        needs=needs,
        goal=goal,
        rounds=3,
        quality="encoder",
    )


# ---- Qwen3-30B-A3B ---------------------------------------------------------------------------------------------------
def large_row() -> Row:
    request: dict[str, Any] = {"op": "decode", "depth": 0, "steps": 24}
    ours = worker("ours", "ours", 18, model=QWEN3_30B.name, weights="int4", random_weights=True)
    llama = worker("llama_cpp", "peers", 18.5, f"{QWEN3_30B.name}-q4_0.gguf")
    return Row(
        id="30b-decode-0-int4",
        title="Qwen3-30B-A3B decode, int4",
        unit="token",
        ours=variant("ours", ours, **request),
        rivals=tuple(llama_variants(llama, **request)),
        needs={"read": QWEN3_30B.decode_bytes("int4", 0) / 1e9},
        goal=Goal(share=0.72, ratio=1.4),
        rounds=2,
        alternate=True,
        slow=True,
    )


# ---- single ops ------------------------------------------------------------------------------------------------------
def op_row(name: str, title: str, gflop: float, limit: str, goal: Goal, extra: tuple[str, ...] = ()) -> Row:
    ours, peer = worker("our_ops", "ours", 2), worker("torch_ops", "torch", 3)
    rivals = [variant("torch", peer, op="call", name=name)]
    rivals += [variant(f"torch{other.removeprefix(name)}", peer, op="call", name=other) for other in extra]
    return Row(
        id=f"op-{name}",
        title=title,
        unit="call",
        ours=variant("ours", ours, op="call", name=name),
        rivals=tuple(rivals),
        needs={limit: gflop},
        goal=goal,
        rounds=7,
        quality="op",
    )


LINEAR_GFLOP = 2 * 4096 * 768 * 3072 / 1e9
NECK_GFLOP = 2 * (4096 * 768 * 256 + 4096 * 2304 * 256 + 1024 * 2304 * 512 + 256 * 4608 * 1024) / 1e9


def all_rows() -> list[Row]:
    """In the order in which they run: rows that share workers follow each other."""
    return [
        op_row("linear-bf16", "linear 4096x768x3072, bf16", LINEAR_GFLOP, "bf16", Goal(ratio=1.05)),
        op_row("linear-fp32", "linear 4096x768x3072, fp32", LINEAR_GFLOP, "fp32", Goal(ratio=1.4)),
        op_row("window-attention", "window attention 25x12x196x64", window_flops() / 1e9, "bf16", Goal(ratio=2.8)),
        op_row("global-attention", "global attention 12x4096x64", global_flops() / 1e9, "bf16", Goal(ratio=2.8)),
        op_row(
            "neck", "neck, conv 3x3 s2 256->512->1024", NECK_GFLOP, "bf16", Goal(ratio=1.3), ("neck, channels last",)
        ),
        qwen3_batch(4, 3.2),
        qwen3_batch(16, 6.0),
        *qwen3_rows("bf16", (0.90, 1.4), (0.92, 1.5), Goal(share=0.80, ratio=1.5)),
        *qwen3_rows("int8", (0.85, 1.8), (0.87, 1.5), Goal(share=0.70, ratio=2.3)),
        *qwen3_rows("int4", (0.80, 1.8), (0.80, 1.5), None),
        ocr_decode("bf16", Goal(share=0.88, ratio=1.2)),
        ocr_prefill(Goal(share=0.65, ratio=1.6)),
        ocr_decode("int8", Goal(share=0.85, ratio=1.7)),
        ocr_decode("int4", Goal(share=0.72, ratio=1.5)),
        encoder_row("bf16", Goal(share=round(1 / 1.15, 2), ratio=2.1)),
        encoder_row("int8", Goal(keeps=round(1 / 0.70, 2), cosine=0.999)),
        large_row(),
    ]


def qwen3_rows(width: str, shallow: tuple[float, float], deep: tuple[float, float], prefill: Goal | None) -> list[Row]:
    """shallow: share and ratio at depth 0. deep: what depth 512 keeps of depth 0's rate, and the ratio at any depth."""
    rows = [qwen3_prefill(width, prefill)] if prefill else []
    rows.append(qwen3_decode(width, 0, Goal(share=shallow[0], ratio=shallow[1])))
    rows.append(qwen3_decode(width, 512, Goal(keeps=deep[0], ratio=deep[1])))
    rows.append(qwen3_decode(width, MAX_DEPTH, Goal(ratio=deep[1])))
    return rows
