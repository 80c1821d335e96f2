"""The `pagelens` command: read, generate, chat, quantize, doctor, tune, modes, bench. Only parses; others do the work.

stdout carries results only (Markdown, or JSON with --json); notes, progress and errors go to stderr. Exit status 0: all
done; 1: the output could not be written (a broken pipe, a full disk); 2: an input or option was refused (other inputs
of the call are still done); 130: interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .config import BACKENDS
from .errors import ConfigError, PagelensError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
EXIT_OK, EXIT_PIPE, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = build_parser().parse_args(argv)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except PagelensError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        discard_stdout()
        return EXIT_PIPE
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        discard_stdout()
        complain(f"the output cannot be written: {error.strerror}")
        return EXIT_PIPE


def discard_stdout() -> None:
    """The reader of our output is gone: what is still buffered, and what follows, must not raise again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(message: str) -> int:
    """Print one line on stderr and return the status of a refused input."""
    print(f"pagelens: {as_typed(' '.join(message.split()))}", file=sys.stderr)
    return EXIT_REFUSED


# Parameters of the library by the options that set them.
OPTION_OF = {
    "backend": "--backend",
    "dtype": "--dtype",
    "low_memory": "--low-memory",
    "max_crops": "--max-crops",
    "max_tokens": "--max-tokens",
    "num_threads": "--threads",
    "random_weights": "--random-weights",
    "seed": "--seed",
    "temperature": "--temperature",
    "thinking_budget": "--thinking-budget",
    "use_mmap": "--mmap",
    "weights": "--weights",
}
_NAMES = "|".join(OPTION_OF)
# NAME=VALUE, or SamplingParams.NAME; not within a path or a longer word.
_PARAMETER = re.compile(
    rf"(?<![\w./-])(?:({_NAMES})=(True|False|'[\w.-]*'|-?\d+(?:\.\d+)?)(?![\w./-]\w|\w)|SamplingParams\.({_NAMES})\b)"
)


def as_typed(message: str) -> str:
    """A message of the library with its parameters called as the command line calls them."""

    def option(match: re.Match[str]) -> str:
        name, value, field = match.groups()
        typed = OPTION_OF[name or field]
        return typed if value in (None, "True") else f"{typed} {value.strip(chr(39))}"

    return _PARAMETER.sub(option, message).replace("must be None or a", "must be a")


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that complains in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_REFUSED, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="pagelens", description="Read page images as Markdown, and run text models.")
    parser.add_argument("--version", action="version", version=f"pagelens {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    read = commands.add_parser("read", help="read page images and print Markdown")
    read.add_argument(
        "files", nargs="+", metavar="FILE", help="page image (PNG, JPEG, WEBP, TIFF, BMP, GIF); - is standard input"
    )
    add_engine_options(read)
    read.add_argument("--mode", help="tiny, small, base, large, gundam, gundam-master; default: the checkpoint's")
    read.add_argument("--prompt", help="prompt text, or the name of one of the checkpoint's prompts")
    read.add_argument("--max-tokens", type=int, help="most tokens to write for a page")
    read.add_argument("--max-crops", type=int, help="most tiles of a page in a tiled mode")
    read.add_argument(
        "--out",
        metavar="DIR",
        help="write result.md, images/, overlay.png and page.json there; several files: DIR/NAME",
    )
    read.add_argument("--json", action="store_true", help="print one JSON object a page instead of Markdown")
    read.add_argument("--progress", action=argparse.BooleanOptionalAction, help="progress bar on stderr")
    read.set_defaults(run=run_read)

    generate = commands.add_parser("generate", help="continue a text with a language model")
    add_engine_options(generate, needs_model=True)
    generate.add_argument("--prompt", required=True, help="text to continue, as it is: no chat format is put around it")
    add_sampling_options(generate, "greedy")
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    generate.set_defaults(run=run_generate)

    chat = commands.add_parser(
        "chat",
        help="talk with a language model",
        description="Reads one message a line. /think and /no_think alone on a line switch thinking; Ctrl-D ends.",
    )
    add_engine_options(chat, needs_model=True)
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument("--no-think", action="store_true", help="begin with thinking off")
    chat.add_argument("--thinking-budget", type=int, metavar="N", help="most tokens of thinking in an answer")
    add_sampling_options(chat, "as generation_config.json says")
    chat.add_argument("--json", action="store_true", help="print one JSON object an answer")
    chat.set_defaults(run=run_chat)

    quantize = commands.add_parser(
        "quantize",
        help="write a checkpoint again, quantised and packed",
        description="Writes DST in the layout of the native kernels: it is mapped and starts without conversion.",
    )
    quantize.add_argument("source", metavar="SRC", help="checkpoint folder or hub id")
    quantize.add_argument("target", metavar="DST", help="new or empty folder")
    quantize.add_argument(
        "--weights",
        default="int8",
        choices=("int8", "int4", "int4-pure", "auto"),
        help="default: int8; int4 keeps the output head in int8, int4-pure does not; auto: as the checkpoint has them",
    )
    quantize.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    quantize.add_argument("--threads", type=int, help="threads that pack; default: one a physical core")
    quantize.add_argument("--json", action="store_true", help="print the report as JSON")
    quantize.set_defaults(run=run_quantize)

    doctor = commands.add_parser("doctor", help="show the machine and which kernels would be used")
    doctor.add_argument("--backend", default="auto", choices=BACKENDS)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=run_doctor)

    tune = commands.add_parser("tune", help="measure tile sizes of the GPU kernels on this card and keep the best")
    tune.add_argument(
        "--dry-run", action="store_true", help="run through it without a GPU; times are made up, and the file says so"
    )
    tune.add_argument("--repeats", type=int, default=20, help="timed calls of a candidate; the median counts")
    tune.add_argument("--output", metavar="DIR", help="folder of the file; default: the package's own kernels/configs")
    tune.set_defaults(run=run_tune)

    modes = commands.add_parser("modes", help="list page modes and what a page costs in each")
    modes.add_argument("--model", help="checkpoint folder or hub id; default: the published DeepSeek-OCR")
    modes.add_argument("--size", default="1240x1754", help="width x height of the page in pixels; default: 1240x1754")
    modes.set_defaults(run=run_modes)

    bench = commands.add_parser(
        "bench",
        help="time a page by stage, or a text model, with memory",
        description="Prints the time to load, of pages by stage or of prefill and decoding, memory, and the machine's "
        "limits probed beside it; JSON as the last line.",
    )
    add_engine_options(bench)
    bench.add_argument("--tokens", type=int, default=32, help="tokens to decode (the end mark is ignored); default: 32")
    bench.add_argument("--repeats", type=int, default=3, help="pages, or prefills, that are timed; default: 3")
    bench.add_argument("--batch", default="1", metavar="N,N", help="pages or sequences decoded together; default: 1")
    bench.add_argument("--plot", metavar="FILE", help="write latency and roofline charts (.png, .svg, .pdf)")
    page = bench.add_argument_group("page models")
    page.add_argument("--image", metavar="FILE", help="page to read; default: a generated one of --size")
    page.add_argument("--size", help="width x height of the generated page; default: 1240x1754")
    page.add_argument("--mode", help="as for read")
    page.add_argument("--max-crops", type=int, help="as for read")
    text = bench.add_argument_group("text models")
    text.add_argument("--prompt-tokens", type=int, help="prompt of the prefill that is timed; default: 512")
    text.add_argument(
        "--depth",
        metavar="N,N",
        help="tokens in the cache before decoding is timed; default: 0,512,4096, as far as the model goes",
    )
    bench.set_defaults(run=run_bench)
    return parser


def add_sampling_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--max-tokens", type=int, help="most tokens of an answer; default: all there is room for")
    parser.add_argument("--temperature", type=float, help=f"0 is greedy; default: {default}")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")


def add_engine_options(parser: argparse.ArgumentParser, needs_model: bool = False) -> None:
    default = "" if needs_model else "; default: the small built-in reader"
    parser.add_argument("--model", required=needs_model, help="checkpoint folder or hub id" + default)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: an NVIDIA or AMD GPU")
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    parser.add_argument(
        "--weights",
        default="auto",
        choices=("auto", "int8", "int4", "int4-pure"),
        help="quantise linear layers as they are read; int4 keeps the head in int8, int4-pure does not; auto: not",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=("auto", "int8"),
        help="how keys and values are kept; auto: as the activations",
    )
    parser.add_argument("--threads", type=int, help="threads of the native kernels; default: one a physical core")
    parser.add_argument(
        "--mmap",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use a folder of `pagelens quantize` where it is mapped; --no-mmap copies it into huge pages: starts "
        "later, and decodes faster on machines where small pages cost more",
    )
    parser.add_argument("--low-memory", action="store_true", help="free the vision towers between pages")
    parser.add_argument(
        "--random-weights", action="store_true", help="noise for weights: --model is a preset or needs only config.json"
    )


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "dtype": args.dtype,
        "device": args.device,
        "backend": args.backend,
        "weights": args.weights,
        "kv_cache_dtype": args.kv_cache_dtype,
        "num_threads": args.threads,
        "random_weights": args.random_weights,
        "use_mmap": args.mmap,
        "low_memory": args.low_memory,
    }


def run_read(args: argparse.Namespace) -> int:
    from .read_files import read_files

    return read_files(args, engine_options(args))


def run_generate(args: argparse.Namespace) -> int:
    from .chat_command import generate

    return generate(args, engine_options(args))


def run_chat(args: argparse.Namespace) -> int:
    from .chat_command import chat

    return chat(args, engine_options(args))


def run_quantize(args: argparse.Namespace) -> int:
    from .quantize import describe, quantize_checkpoint

    report = quantize_checkpoint(args.source, args.target, args.weights, args.dtype, args.threads)
    print(json.dumps(dataclasses.asdict(report)) if args.json else describe(report, args.target))
    return EXIT_OK


def run_doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    report = examine(args.backend)
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
        return EXIT_OK
    for title, rows in (("versions", report.versions), ("machine", report.machine), ("extras", report.extras)):
        print(f"{title}:")
        for name, value in rows.items():
            print(f"  {name:18} {value}")
    print("ops:")
    for row in report.ops:
        mark = "chosen" if row["chosen"] else "-"
        print(f"  {row['op']:20} {row['backend']:10} {mark:7} {row['reason']}")
    return EXIT_OK


def run_tune(args: argparse.Namespace) -> int:
    from .tune import CudaTimer, DryTimer, prepare_folder, tune, write

    if args.repeats < 1:
        raise ConfigError(f"--repeats {args.repeats} must be at least 1")
    if args.dry_run and not args.output:
        raise ConfigError("--dry-run needs --output DIR: its times are made up and must not replace a real file")
    timer = DryTimer() if args.dry_run else CudaTimer()
    folder = prepare_folder(Path(args.output) if args.output else None)
    print(write(tune(timer, args.repeats), folder))
    return EXIT_OK


def run_modes(args: argparse.Namespace) -> int:
    from .config import parse_size
    from .doctor import examine_modes

    width, height = parse_size(args.size)
    modes = examine_modes(args.model, width, height)
    print(f"{'mode':14} {'tiles':>6} {'image tokens':>13}  views, for a page of {width} x {height} pixels")
    for mode in modes:
        tiles = "x".join(map(str, mode.grid)) if mode.grid != (1, 1) else "none"
        note = " (experimental)" if mode.experimental else ""
        print(f"{mode.name:14} {tiles:>6} {mode.image_tokens:13}  {mode.description}{note}")
    return EXIT_OK


def run_bench(args: argparse.Namespace) -> int:
    from .bench import page, text
    from .doctor import reads_pages

    if args.model is None or reads_pages(args.model, args.random_weights):
        refuse_options(
            args,
            ("depth", "prompt_tokens"),
            f"is for text models, and {args.model or 'the built-in reader'} reads pages",
        )
        return page.run(args, engine_options(args))
    refuse_options(
        args, ("image", "size", "mode", "max_crops"), f"is for page models, and {args.model} reads text only"
    )
    return text.run(args, engine_options(args))


def refuse_options(args: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """Raises ConfigError if one of the options, which have no default, was given."""
    for name in names:
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {reason}; leave it out")


if __name__ == "__main__":
    sys.exit(main())
