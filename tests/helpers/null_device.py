"""A device that does nothing: what a decode step costs the host, without a GPU.

Tensors have shapes and no memory (torch's meta device), launches are counted and not started, graphs are replayed by
counting, and the token that is "read back" is always the same. Everything else is the engine's own code: scheduler,
batch and its copy to the device, models, adapters, kernel functions, sampler.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from pagelens.config import DecoderConfig, EngineConfig, MoeConfig, TextModelConfig
from pagelens.core import Engine
from pagelens.inputs import Request
from pagelens.kernels.launch import LaunchCounter, replaced_runner
from pagelens.kernels.tuning import forced_target
from pagelens.loading.random_weights import RandomWeights
from pagelens.models.qwen3 import TextModel
from pagelens.ops.triton import TritonOps
from pagelens.types import SamplingParams

NULL = torch.device("meta")
TOKEN = 7


class NullSampling:
    """Launches what the real one does, and reads nothing back."""

    def __init__(self) -> None:
        from pagelens.ops.triton_sampling import DeviceSampling

        class Moving(DeviceSampling):
            def _move(self, x: torch.Tensor) -> torch.Tensor:
                return x.to(NULL)

        self._real = Moving(NULL)

    def choose(self, logits: torch.Tensor, rows: Sequence[Any], num_tokens: int | None) -> list[int]:
        launch = self._real.launch(logits, rows, num_tokens)
        return [TOKEN] * launch.shape[0]


class NullGraph:
    """A Program whose replay is one launch."""

    runs_while_recording = False

    def __init__(self, counter: LaunchCounter) -> None:
        self._counter = counter

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def replay(self) -> int:
        self._counter.names.append("graph")
        return -1


class NullOps(TritonOps):
    """The Triton adapter on the null device; with a counter, decode steps are graphs."""

    def __init__(self, graphs: LaunchCounter | None) -> None:
        self.device = NULL
        self.sampling: Any = NullSampling()
        self._graphs = graphs

    def sample(self, logits: torch.Tensor, cuts: Sequence[Any]) -> list[int]:
        raise AssertionError("rows of the null device are never read back")

    def new_program(self) -> Any:
        return None if self._graphs is None else NullGraph(self._graphs)


def decoder(layers: int, moe: MoeConfig | None = None, qk_norm: bool = True) -> DecoderConfig:
    """A decoder with the depth of a real one; widths cost the host nothing."""
    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64}
    heads: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    return DecoderConfig(
        **sizes, **heads, num_layers=layers, moe=moe, qk_norm=qk_norm, max_position_embeddings=4096, eos_token_ids=(1,)
    )


QWEN3_06B = decoder(28)
DEEPSEEK_OCR = decoder(12, MoeConfig(64, 6, 32, shared_intermediate_size=64, dense_layers=(0,)), qk_norm=False)


@dataclass(frozen=True)
class HostCost:
    """Of decode steps: launches of each, and microseconds of the host (the least, and the median)."""

    launches: Counter[str]
    least_us: float
    median_us: float


@contextmanager
def null_engine(config: DecoderConfig, use_graphs: bool, sequences: int) -> Iterator[tuple[Engine, LaunchCounter]]:
    counter = LaunchCounter()
    ops: Any = NullOps(counter if use_graphs else None)
    model_config = TextModelConfig(config)
    with replaced_runner(counter), forced_target("sm_90"):
        weights = RandomWeights(TextModel.weight_specs(model_config), torch.bfloat16, 1)
        model = TextModel.load(weights, model_config, torch.bfloat16, ops)
        options = EngineConfig("null", max_num_seqs=max(sequences, 1), max_model_len=2048, prefix_cache=False)
        yield Engine(options, model, torch.bfloat16), counter


def measure(config: DecoderConfig, use_graphs: bool, sequences: int = 1, steps: int = 200) -> HostCost:
    """The cost of a decode step of `sequences` sequences."""
    with null_engine(config, use_graphs, sequences) as (engine, counter):
        for i in range(sequences):
            request = Request(
                f"{i}", None, [5, 6, 3 + i], (), SamplingParams(max_tokens=steps + 50, detect_repetition=False)
            )
            engine.add_request(request)
        for _ in range(20):  # prompts, and the first steps, which record
            engine.step()
        counter.names.clear()
        engine.step()
        launches = Counter(counter.names)
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - began)
    return HostCost(launches, min(seconds) * 1e6, median(seconds) * 1e6)
