"""The work behind `pagelens read`: several files in flight, Markdown in order on stdout, one clear line for a bad file.

A bad file never stops the others; the exit status then is 2.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .cli import EXIT_OK, EXIT_PIPE, EXIT_REFUSED, complain, discard_stdout
from .errors import ConfigError, PagelensError
from .reader import BUILTIN_NOTE, PageStream, Reader
from .types import SamplingParams

PAGES_IN_FLIGHT = 8

STDIN = "-"
MAX_STDIN_BYTES = 1 << 30

Started = tuple[str, "str | bytes", "PageStream | Exception"]


def read_files(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Read every file of the command line; returns the exit status."""
    # Pillow warns about damaged metadata; a bad file gets our one line and nothing else.
    warnings.filterwarnings("ignore", module="PIL")
    # A character that stdout's encoding lacks, or a file name that is no Unicode, must not end the run.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sampling = SamplingParams(max_tokens=args.max_tokens)
    if args.model is None:
        print(f"pagelens: {BUILTIN_NOTE}", file=sys.stderr)
    status = EXIT_OK
    if args.files.count(STDIN) > 1:
        raise ConfigError("- is standard input, which can be read once; give it once")
    with Reader(args.model, **options) as reader:
        folders = output_folders(args.out, args.files)
        with progress_bar(args, len(args.files)) as bar:
            for file, image, stream in started_in_order(reader, args, sampling):
                try:
                    if isinstance(stream, Exception):
                        raise stream
                    finish_page(file, image, stream, args, folders)
                except BrokenPipeError:
                    if args.out is None:
                        raise
                    discard_stdout()  # nobody reads it any more, but the folders were asked for
                    status = EXIT_PIPE
                except (PagelensError, OSError) as error:
                    report_failure(file, error, args)
                    status = EXIT_REFUSED
                bar.update(1)
    return status


def started_in_order(reader: Reader, args: argparse.Namespace, sampling: SamplingParams) -> Iterator[Started]:
    """Yield (file, image, stream) in the order given, keeping up to PAGES_IN_FLIGHT started.

    The image is the file, or the bytes of standard input; a bad file has its error for a stream.
    """
    ahead: deque[Started] = deque()
    waiting = deque(args.files)
    while waiting or ahead:
        while waiting and len(ahead) < PAGES_IN_FLIGHT:
            file = waiting.popleft()
            image = file if file != STDIN else sys.stdin.buffer.read(MAX_STDIN_BYTES)
            ahead.append((file, image, start_page(reader, image, args, sampling)))
        yield ahead.popleft()


def start_page(
    reader: Reader, image: str | bytes, args: argparse.Namespace, sampling: SamplingParams
) -> PageStream | Exception:
    try:
        return reader.stream(image, args.mode, args.prompt, sampling, args.max_crops)
    except (PagelensError, OSError) as error:
        return error


def report_failure(file: str, error: Exception, args: argparse.Namespace) -> None:
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    name = "standard input" if file == STDIN else file
    message = reason if name in reason else f"{name}: {reason}"
    complain(message)
    if args.json:
        print(json.dumps({"file": file, "error": message}, ensure_ascii=False), flush=True)


def finish_page(
    file: str, image: str | bytes, stream: PageStream, args: argparse.Namespace, folders: dict[str, Path]
) -> None:
    """Print one page as it comes and write its folder if --out was given."""
    try:
        print_page(file, stream, args)
    finally:  # also when nobody reads stdout: the folder was asked for, and the model has done the work
        if args.out is not None:
            Reader.save(stream.result(), image, folders[file])
    finish_reason = stream.result().finish_reason
    if finish_reason != "stop":
        print(f"pagelens: {file}: ended by {finish_reason!r}, the text may be incomplete", file=sys.stderr)


def print_page(file: str, stream: PageStream, args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps({"file": file, **stream.result().to_dict()}, ensure_ascii=False), flush=True)
        return
    if len(args.files) > 1:
        sys.stdout.write(f"{page_header(file)}\n\n")
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n" if len(args.files) == 1 else "\n\n")
    sys.stdout.flush()


def page_header(file: str) -> str:
    """What stands before each of several pages: a comment, which Markdown shows nowhere, with the name of the file.

    Others put a form feed between pages (pdftotext) or a line such as "<--- Page Split --->" (DeepSeek's script); this
    also says which page it is, and is text that a reader of the Markdown never sees.
    """
    # A comment must not hold "--" or a line break.
    name = "".join(c if c.isprintable() else "?" for c in file)
    return f"<!-- {re.sub('-(?=-)', '- ', name)} -->"


def output_folders(out: str | None, files: list[str]) -> dict[str, Path]:
    """One folder a file: DIR itself for a single file, else DIR/STEM, numbered where stems collide."""
    if out is None:
        return {}
    if len(set(files)) == 1:
        return {files[0]: Path(out)}
    folders: dict[str, Path] = {}
    taken: set[Path] = set()
    for file in files:
        stem, number = "stdin" if file == STDIN else Path(file).stem or "page", 2
        folder = Path(out) / stem
        while folder in taken and file not in folders:
            folder, number = Path(out) / f"{stem}-{number}", number + 1
        folders.setdefault(file, folder)
        taken.add(folder)
    return folders


def progress_bar(args: argparse.Namespace, total: int) -> Any:
    """A tqdm bar on stderr. By default only where it cannot tear the Markdown: not when both go to one terminal."""
    from tqdm import tqdm

    shown = args.progress
    if shown is None:
        shown = sys.stderr.isatty() and (args.json or not sys.stdout.isatty())
    return tqdm(total=total, unit="page", file=sys.stderr, disable=not shown)
