"""Where the time of a decode step goes, op by op: `python benchmarks/bench_step.py [--model M] [--weights W]`.

An engine with random weights decodes one sequence; its recorded step is replayed with a clock between the calls, which
adds some 30 ns to each, and what is called outside of it (the head and the norm before it) is timed around the call.
"host" is the rest of `Engine.step`: scheduling, the batch, replaying, choosing the token. A read of memory on the same
threads (`probe_bandwidth`) stands before and after every few steps; the tables are medians over the steps of the fast
and of the slow phase of memory. GB/s counts packed weights with their scales, of experts those that are chosen.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pagelens import _native
from pagelens.config import EngineConfig
from pagelens.core import Engine, build_engine
from pagelens.loading.presets import PRESETS
from pagelens.ops.packing import PackedLinear, PackedMoe, PackedSwiglu
from pagelens.types import SamplingParams

OPS = ("embedding", "rms_norm", "qk_norm_rope_store", "paged_attention", "linear", "swiglu_ffn", "moe_ffn")
HOST, STEP = "host", "step"
STEPS_A_ROUND, PROBE_BYTES = 5, 128 << 20
FAST, SLOW = 45.0, 40.0  # GB/s of two cores: above, a step counts as of the fast phase, below, of the slow one
LEAST_STEPS = 10


@dataclass(frozen=True)
class Call:
    name: str
    num_bytes: int  # of weights


def describe(op: str, args: tuple[Any, ...]) -> Call:
    weight: Any = args[1] if len(args) > 1 else None
    if isinstance(weight, PackedLinear):
        return Call(f"linear {weight.in_features} -> {weight.out_features}", weight.handle.num_bytes)
    if isinstance(weight, PackedSwiglu):
        return Call(f"{op} {weight.width}, {weight.inner}", weight.handle.num_bytes)
    if isinstance(weight, PackedMoe):
        router = 4 * weight.num_experts * weight.width
        chosen = (weight.handle.num_bytes - router) // weight.num_experts * args[2]
        shared = weight.shared.handle.num_bytes if weight.shared else 0
        return Call(f"{op} {weight.width}, {args[2]} of {weight.num_experts}", router + chosen + shared)
    return Call(op, 0)


class Watch:
    """Seconds of every call that an engine's ops make, recorded ones too. Put in place before the first step."""

    def __init__(self, ops: Any) -> None:
        self.spent: list[tuple[Call, float]] = []
        self._recording: list[Call] | None = None
        for op in OPS:
            setattr(ops, op, self._watched(op, getattr(ops, op)))
        make = ops.new_program
        ops.new_program = lambda: _WatchedProgram(make(), self)

    def _watched(self, op: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = run(*args, **options)
            took = time.perf_counter() - begin
            if self._recording is None:
                self.spent.append((describe(op, args), took))
            else:
                self._recording.append(describe(op, args))
            return result

        return call

    def begin(self) -> list[Call]:
        self._recording = []
        return self._recording

    def end(self) -> None:
        self._recording = None


class _WatchedProgram:
    def __init__(self, program: _native.Program, watch: Watch) -> None:
        self._program, self._watch = program, watch
        self._calls: list[Call] = []

    def begin(self) -> None:
        self._calls = self._watch.begin()
        self._program.begin()

    def end(self) -> None:
        self._program.end()
        self._watch.end()

    def replay(self) -> int:
        seconds = self._program.timed_replay()
        if len(seconds) != len(self._calls):
            return len(seconds) - 1
        self._watch.spent += zip(self._calls, seconds, strict=True)
        return -1


@dataclass(frozen=True)
class Step:
    seconds: dict[str, float]  # by the name of a call, HOST and STEP
    read: float  # GB/s


def read_rate(pool: _native.ThreadPool) -> float:
    return _native.probe_bandwidth(pool, PROBE_BYTES, 1)[0] / 1e9


def time_step(engine: Engine, watch: Watch) -> dict[str, float]:
    watch.spent.clear()
    begin = time.perf_counter()
    engine.step()
    whole = time.perf_counter() - begin
    seconds: dict[str, float] = defaultdict(float)
    for call, took in watch.spent:
        seconds[call.name] += took
    return {**seconds, HOST: whole - sum(seconds.values()), STEP: whole}


def run_steps(engine: Engine, watch: Watch, depth: int, seconds: float) -> list[Step]:
    """Steps behind a prompt of `depth` tokens, a new request for each round."""
    pool = _native.ThreadPool(engine_threads(engine))
    sampling = SamplingParams(max_tokens=STEPS_A_ROUND + 8, ignore_eos=True, detect_repetition=False)
    steps: list[Step] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        state = engine.add_request(engine.inputs.build([17 + i % 1000 for i in range(max(depth, 1))], sampling, "x"))
        while state.answers[0].sequence.num_generated < 2:  # the first decode step may be recorded
            engine.step()
        before = read_rate(pool)
        engine.step()
        timed = [time_step(engine, watch) for _ in range(STEPS_A_ROUND)]
        read = (before + read_rate(pool)) / 2
        steps += [Step(one, read) for one in timed]
        engine.cancel(state)
    pool.close()
    return steps


def engine_threads(engine: Engine) -> int:
    return engine.config.num_threads or 1


def calls_of(watch: Watch) -> tuple[Counter[str], dict[str, int]]:
    """Of the last step: how often each call was made, and the bytes that its calls read."""
    num_bytes: dict[str, int] = defaultdict(int)
    for call, _ in watch.spent:
        num_bytes[call.name] += call.num_bytes
    return Counter(call.name for call, _ in watch.spent), num_bytes


def show(title: str, steps: list[Step], counts: Counter[str], num_bytes: dict[str, int]) -> None:
    read = statistics.median(step.read for step in steps)
    whole = statistics.median(step.seconds[STEP] for step in steps)
    total = sum(num_bytes.values())
    products = [name for name in counts if num_bytes[name]]
    print(f"\n{title}: {len(steps)} steps, a read gives {read:.1f} GB/s, {total / 1e6:.0f} MB of weights a step")
    print(f"{'':36}{'calls':>6}{'ms':>8}{'of step':>9}{'us each':>9}{'GB/s':>7}{'of read':>9}")

    def line(label: str, names: Iterable[str], calls: int) -> None:
        own = [sum(step.seconds[name] for name in names) for step in steps]
        took, size = statistics.median(own), sum(num_bytes.get(name, 0) for name in names)
        text = f"{label:36}{calls:6}{1e3 * took:8.3f}{took / whole:9.3f}{1e6 * took / max(calls, 1):9.1f}"
        if size:
            share = statistics.median(size / one / 1e9 / step.read for one, step in zip(own, steps, strict=True))
            text += f"{size / took / 1e9:7.1f}{share:9.2f}"
        print(text)

    for name in sorted(counts, key=lambda name: (not num_bytes[name], name)):
        line(name, [name], counts[name])
    line("products", products, sum(counts[name] for name in products))
    others = [name for name in counts if not num_bytes[name]]
    line("other ops", others, sum(counts[name] for name in others))
    line(HOST, [HOST], 1)
    # All bytes over the whole step's time.
    shares = [total / step.seconds[STEP] / 1e9 / step.read for step in steps]
    print(f"{STEP:36}{'':6}{1e3 * whole:8.3f}{'':18}{total / whole / 1e9:7.1f}{statistics.median(shares):9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b", help="a preset (%(default)s)")
    parser.add_argument("--weights", default="int8,int4-pure", help="auto, int8, int4, int4-pure (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=0, help="tokens in the cache (%(default)s)")
    parser.add_argument("--seconds", type=float, default=12.0, help="of measuring, for each kind of weights")
    args = parser.parse_args()
    if unknown := set(args.weights.split(",")) - {"auto", "int8", "int4", "int4-pure"}:
        parser.error(f"there are no weights {min(unknown)!r}")
    if args.model not in PRESETS:
        parser.error(f"{args.model!r} is no preset; they are {', '.join(PRESETS)}")
    if args.threads < 1 or args.depth < 0 or args.seconds <= 0:
        parser.error("--threads and --seconds must be above 0, --depth 0 or more")
    for weights in args.weights.split(","):
        engine = build_engine(
            EngineConfig(
                args.model,
                dtype="bfloat16",
                weights=weights,
                num_threads=args.threads,
                max_model_len=args.depth + 64,
                max_num_seqs=1,
                random_weights=True,
                prefix_cache=True,
            )
        )
        model: Any = engine.runner.model
        watch = Watch(model.ops)
        steps = run_steps(engine, watch, args.depth, args.seconds)
        counts, num_bytes = calls_of(watch)
        name = f"{args.model}, {weights}, depth {args.depth}, {args.threads} threads"
        phases = {
            "fast phase": [step for step in steps if step.read >= FAST],
            "slow phase": [step for step in steps if step.read < SLOW],
        }
        for phase, some in phases.items():
            if len(some) >= LEAST_STEPS:
                show(f"{name}, {phase}", some, counts, num_bytes)
        between = len(steps) - sum(map(len, phases.values()))
        if between:
            print(f"{between} steps between the phases are left out")
        engine.close()


if __name__ == "__main__":
    main()
