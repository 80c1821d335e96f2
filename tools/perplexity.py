"""Perplexity of a text model on a text: how well it foresees each token, and what a form of its weights costs.

    python tools/perplexity.py --model DIR --text FILE [--weights auto] [--dtype float32]

It is exp(-mean of ln p(token | the tokens before it)). The text is one run of tokens, without a chat format. A text
longer than --context is cut into windows that overlap by half, and a token is scored in the first window that has it,
so that all but those of the first half-window have at least half a window before them. Compare figures only at the
same text and context. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagelens.config import EngineConfig
from pagelens.core import Engine, build_engine
from pagelens.errors import PagelensError
from pagelens.types import ForwardBatch

CHUNK = 256  # tokens of one pass; their logits take CHUNK * V * 4 bytes


def cut_windows(num_tokens: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first token not scored before) of each window over a text."""
    start = scored = 0
    while scored < num_tokens:
        end = min(start + context, num_tokens)
        yield start, end, scored
        start, scored = start + max(context // 2, 1), end


def logits_of(engine: Engine, ids: list[int], chunk: int = CHUNK) -> Iterator[Tensor]:
    """Logits [n, V] float32 of every position, chunk after chunk.

    Uses the engine's cache from its first block on, so the engine must have no requests.
    """
    kv = engine.runner.kv
    num_blocks = -(-len(ids) // kv.block_size)
    for start in range(0, len(ids), chunk):
        end = min(start + chunk, len(ids))
        positions = torch.arange(start, end, dtype=torch.int32)
        batch = ForwardBatch(
            token_ids=torch.tensor(ids[start:end], dtype=torch.int32),
            positions=positions,
            slots=positions,
            query_starts=torch.tensor([0, end - start], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            block_tables=torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0),
            logit_rows=torch.arange(end - start, dtype=torch.int32),
        )
        with torch.inference_mode():
            logits = engine.runner.model.forward(batch, kv)
        yield logits


def token_logprobs(engine: Engine, ids: list[int], context: int) -> list[float]:
    """ln p of each token but the first; what tokenizer.json puts before a text stands before each window."""
    prefix = engine.tokenizer.prefix_ids if engine.tokenizer is not None else []
    logprobs: list[float] = []
    for start, end, scored in cut_windows(len(ids), context - len(prefix)):
        window = prefix + ids[start:end]
        found: list[float] = []
        for logits in logits_of(engine, window):
            # The logits at a place foresee the token after it; the last of a window foresee nothing that is known.
            following = torch.tensor(window[len(found) + 1 : len(found) + 1 + len(logits)])
            rows = logits[: len(following)]
            chosen = rows.gather(1, following.unsqueeze(1)).squeeze(1) - rows.logsumexp(1)
            found += chosen.tolist()
        logprobs += found[max(len(prefix) + scored - start - 1, 0) :]
    return logprobs


def measure(model: str, text: str, context: int, **options: Any) -> dict[str, Any]:
    """Perplexity of a model on a text, and how it was measured. Raises PagelensError.

    options  of EngineConfig: weights, dtype, backend, num_threads
    """
    config = EngineConfig(model, max_model_len=context, max_num_seqs=1, max_batch_tokens=CHUNK, **options)
    started = time.perf_counter()
    engine = build_engine(config)
    try:
        loaded = time.perf_counter()
        if engine.tokenizer is None:
            raise PagelensError(f"{model} has no tokenizer.json")
        ids = engine.tokenizer.encode(text, parse_special=False)
        logprobs = token_logprobs(engine, ids, context)
        seconds = time.perf_counter() - loaded
    finally:
        engine.close()
    if not logprobs:
        raise PagelensError("the text has fewer than two tokens")
    return {
        "perplexity": math.exp(-sum(logprobs) / len(logprobs)),
        "num_tokens": len(logprobs),
        "context": context,
        **options,
        "load_s": round(loaded - started, 2),
        "score_s": round(seconds, 2),
        "tokens_per_s": round(len(logprobs) / seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--context", type=int, default=1024, help="tokens in a window (default 1024)")
    parser.add_argument("--weights", default="auto", help="form of the weights, as in LLM(weights=...)")
    parser.add_argument("--kv-cache-dtype", default="auto", help="auto or int8, as in LLM(kv_cache_dtype=...)")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    options = parser.parse_args()
    try:
        if options.context < 2:
            raise PagelensError(f"--context {options.context} must be at least 2")
        text = options.text.read_text(encoding="utf-8")
        result = measure(
            options.model,
            text,
            options.context,
            weights=options.weights,
            kv_cache_dtype=options.kv_cache_dtype,
            dtype=options.dtype,
            num_threads=options.threads,
        )
    except (PagelensError, OSError, UnicodeDecodeError) as error:
        print(f"perplexity: {error}", file=sys.stderr)
        return 2
    print(
        f"perplexity {result['perplexity']:.3f} over {result['num_tokens']} tokens "
        f"(weights {options.weights}, dtype {options.dtype}, context {options.context}): "
        f"{result['score_s']:.1f} s, {result['tokens_per_s']:.0f} tokens/s"
    )
    print(json.dumps({"model": options.model, "text": str(options.text), **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
