"""tools/perplexity.py against transformers' logits on a tiny model: windows, chunks, a begin token, its command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.checkpoint_files import ROOT, load_tool
from helpers.text_models import BEGIN, all_logits, make_oracle, one_torch_thread, save, write_tokenizer

from pagelens.config import EngineConfig
from pagelens.core import build_engine

TEXT = "The tide clock told the tide, not the time.\n" * 2


def expected_logprobs(oracle: torch.nn.Module, ids: list[int], prefix: list[int], context: int) -> list[float]:
    """Each token after the longest run of tokens that the definition gives it, one forward pass a token."""
    size, found = context - len(prefix), []
    for place in range(len(ids)):
        # The first window that holds the token; windows begin at multiples of half their size.
        number = next(n for n in range(len(ids)) if place < n * (size // 2) + size)
        before = prefix + ids[number * (size // 2) : place]
        if before:
            logits = all_logits(oracle, before)[-1]
            found.append(float(logits.log_softmax(0)[ids[place]]))
    return found


@pytest.mark.parametrize(("begins", "context"), [(False, 20), (True, 21), (False, 300)])
def test_it_follows_its_definition(begins: bool, context: int, tmp_path: Path) -> None:
    tool = load_tool("perplexity")
    oracle = make_oracle("LlamaForCausalLM", seed=1, vocab_size=258, max_position_embeddings=400)
    save(oracle, tmp_path)
    write_tokenizer(tmp_path, begins=begins)
    engine = build_engine(EngineConfig(str(tmp_path), max_model_len=context, max_num_seqs=1, num_threads=1))
    try:
        assert engine.tokenizer is not None
        ids = engine.tokenizer.encode(TEXT, parse_special=False)
        found = tool.token_logprobs(engine, ids, context)
        whole = torch.cat(list(tool.logits_of(engine, ids[:19], chunk=7)))
    finally:
        engine.close()
    with one_torch_thread():
        expected = expected_logprobs(oracle, ids, [BEGIN] if begins else [], context)
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(found) == len(ids) - (not begins)
    torch.testing.assert_close(whole, all_logits(oracle, ids[:19]), atol=1e-4, rtol=0)
    measured = tool.measure(str(tmp_path), TEXT, context, weights="auto", dtype="float32", num_threads=1)
    assert measured["perplexity"] == pytest.approx(math.exp(-sum(found) / len(found)), rel=1e-6)


def test_its_command(tmp_path: Path) -> None:
    save(make_oracle("LlamaForCausalLM", vocab_size=258), tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "text").write_text(TEXT)

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / "perplexity.py"), "--model", str(tmp_path), *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = run("--text", str(tmp_path / "text"), "--context", "64", "--threads", "1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["num_tokens"], result["context"], result["weights"]) == (len(TEXT) - 1, 64, "auto")
    assert f"perplexity {result['perplexity']:.3f}" in done.stdout
    refused = run("--text", str(tmp_path / "text"), "--context", "64", "--weights", "int3")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "weights='int3'" in refused.stderr
    missing = run("--text", str(tmp_path / "none"))
    assert (missing.returncode, "No such file" in missing.stderr) == (2, True)
