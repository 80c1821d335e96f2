"""What both halves of `pagelens bench` share: loading and its cost, shares of the machine's limits, the output."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..config import DecoderConfig, EngineConfig
from ..core import Engine, build_engine
from ..doctor import default_num_threads
from .counts import kv_bytes
from .memory import PeakMemory, Resident, read_resident, shown, shown_resident
from .probe import Limits, new_limits


@dataclass(slots=True)
class Run:
    """A loaded engine and what is known of it.

    weight_bytes  what one token's step reads; None if unknown
    encoder_kind, decoder_kind  the type of number that the linear layers multiply, of probe.KINDS
    """

    engine: Engine
    limits: Limits
    load_s: float
    load_peak: int | None
    loaded: Resident | None
    threads: int
    weight_bytes: int | None
    kv_value_bytes: int
    encoder_kind: str
    decoder_kind: str
    peak: PeakMemory

    @property
    def decoder(self) -> DecoderConfig:
        decoder: DecoderConfig = self.engine.model_config.decoder
        return decoder

    def step_bytes(self, depth: int, batch: int) -> int | None:
        """What a step must read for `batch` sequences at `depth`; None if unknown (several tokens choose experts)."""
        if self.weight_bytes is None or (batch > 1 and self.decoder.moe is not None):
            return None
        return self.weight_bytes + batch * kv_bytes(self.decoder, depth + 1, self.kv_value_bytes)

    def share_of_bandwidth(self, num_bytes: int | None, seconds: float) -> float | None:
        return None if num_bytes is None else num_bytes / seconds / self.limits.bandwidth

    def share_of_arithmetic(self, kind: str, operations: float, seconds: float) -> float:
        return operations / seconds / self.limits.arithmetic(kind)

    def describe_load(self) -> str:
        per_token = f"; a token reads {shown(self.weight_bytes)} of weights" if self.weight_bytes else ""
        return (
            f"load model {self.load_s:.2f} s, peak {shown(self.load_peak)}, then resident "
            f"{shown_resident(self.loaded)}; {self.threads} threads{per_token}"
        )

    def to_json(self, args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": args.model or "built-in",
            "options": options,
            "threads": self.threads,
            "load_s": self.load_s,
            "resident_bytes": None if self.loaded is None else self.loaded.to_json(),
            "weight_bytes_per_token": self.weight_bytes,
            "limits": self.limits.to_json(),
        }


@contextmanager
def loaded(config: EngineConfig) -> Iterator[Run]:
    """Load a model, and take the limits before and after what is done with it."""
    peak = PeakMemory()
    peak.restart()
    started = time.perf_counter()
    engine = build_engine(config)
    try:
        load_s, load_peak, resident = time.perf_counter() - started, peak.read(), read_resident()
        threads = config.num_threads or default_num_threads()
        decoder = getattr(engine.runner.model, "decoder", None)
        traffic = None if decoder is None else decoder.token_bytes()
        limits = new_limits(threads)
        limits.probe()
        peak.restart()
        keys = engine.runner.kv.keys[0]
        kind = str(keys.dtype).removeprefix("torch.")
        decoder_kind = "int8" if decoder is not None and decoder.rounds_inputs else kind
        yield Run(
            engine, limits, load_s, load_peak, resident, threads, traffic, keys.element_size(), kind, decoder_kind, peak
        )
    finally:
        engine.close()


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def finish(record: dict[str, Any], plot: str | None) -> None:
    """The chart if one is wanted, then the record as the last line."""
    if plot is not None:
        from .plot import draw

        draw(record, plot)
        print(f"wrote {plot}")
    print(json.dumps(record))
    sys.stdout.flush()
