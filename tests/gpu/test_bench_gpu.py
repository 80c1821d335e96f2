"""`make bench-gpu DRY=1`: all of its code without a card, alone and with peers that are not really there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: there are wheels for Linux only")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_gpu.py"
# The interfaces that benchmarks/gpu_peers.py calls; they check what they are given and compute nothing.
FAKES = {
    "flash_attn/__init__.py": """
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    assert q.ndim == 4 and q.shape == k.shape == v.shape

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
    assert q.ndim == k.ndim == 3 and q.shape[1] % k.shape[1] == 0 and causal
    assert cu_seqlens_q.shape == cu_seqlens_k.shape == (2,) and (max_seqlen_q, max_seqlen_k) == (len(q), len(k))

def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=None, block_table=None, causal=False):
    assert q.shape[:2] == (1, 1) and k_cache.shape[1] % 256 == 0 and cache_seqlens.shape == (1,)
    assert block_table.shape == (1, len(k_cache))
""",
    "flash_attn-2.8.3.dist-info/METADATA": "Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n",
    "vllm/__init__.py": "",
    "vllm/_custom_ops.py": """
def rms_norm(out, input, weight, epsilon):
    raise RuntimeError("no kernel image\\nfor this card")
""",
    "vllm/vllm_flash_attn.py": """
def flash_attn_varlen_func(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, causal=False, block_table=None
):
    assert q.ndim == 3 and k.ndim == 4 and seqused_k.shape == (1,) and block_table.shape == (1, len(k)) and causal
""",
    "vllm/model_executor/__init__.py": "",
    "vllm/model_executor/layers/__init__.py": "",
    "vllm/model_executor/layers/fused_moe.py": """
def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids):
    assert w1.shape[1] == 2 * w2.shape[2] and w1.shape[2] == hidden_states.shape[1] == w2.shape[1]
    assert topk_ids.shape == topk_weights.shape == (len(hidden_states), topk_ids.shape[1])
""",
    "sgl_kernel/__init__.py": """
def rmsnorm(input, weight, eps=1e-6, out=None):
    assert input.shape[1:] == weight.shape
""",
    "sgl_kernel/flash_attn.py": "import a_library_that_is_not_there",
}


def bench(extra: Path | None = None) -> dict[str, Any]:
    environment = dict(os.environ)
    if extra is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(extra), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPT), "--dry-run", "--repeats", "2"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert found["measured"] is False
    assert "made up" in found["card"]
    assert len(found["rows"]) > 20
    for row in found["rows"]:
        assert row["us"] > 0
        assert row["percent_of_copy"] > 0
        assert row["percent_of_product"] >= 0
    return found


def by_peer(found: dict[str, Any], name: str) -> dict[str, float | str]:
    """What a peer came to, by the kernel's key."""
    return {row["workload"].split()[0]: row["peers_us"][name] for row in found["rows"] if name in row["peers_us"]}


def test_a_dry_run_says_that_it_measured_nothing() -> None:
    found = bench()
    theirs = by_peer(found, "torch")
    assert found["peers"]["torch"]
    assert {"linear", "attention", "window_attention", "conv_norm", "paged_attention_decode", "rms_norm"} <= set(theirs)
    assert all(isinstance(us, float) for us in theirs.values()), theirs


def test_peers_where_they_are_installed(tmp_path: Path) -> None:
    """Each is called, with its version in the report; one that fails says why, and the others are measured."""
    for name, text in FAKES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    found = bench(tmp_path)
    assert found["peers"]["flash-attn"] == "2.8.3"
    assert found["peers"]["vllm"] == found["peers"]["sgl-kernel"] == "of unknown version"
    flash = by_peer(found, "flash-attn")
    assert set(flash) == {"attention", "paged_attention", "paged_attention_decode"}
    vllm = by_peer(found, "vllm")
    assert set(vllm) == {"paged_attention", "paged_attention_decode", "rms_norm", "grouped_gemm"}
    assert vllm.pop("rms_norm") == "failed: RuntimeError: no kernel image"
    assert all(isinstance(us, float) for us in [*flash.values(), *vllm.values()]), (flash, vllm)
    sglang = by_peer(found, "sgl-kernel")
    assert isinstance(sglang.pop("rms_norm"), float)
    assert set(sglang) == {"paged_attention", "paged_attention_decode"}
    assert all(str(us).startswith("failed: ModuleNotFoundError: No module named") for us in sglang.values())
