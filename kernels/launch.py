"""The one place that starts a kernel, so that launches can be counted, recorded, compiled ahead or left out.

A kernel function of this package makes a `Launch` and hands it to `launch`. By default it runs on the device of its
tensors. Inside `replaced_runner(run)` every launch goes to `run` instead: a counter, a recorder that compiles it for
another target, an interpreter of its PTX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """One launch.

    kernel     what @triton.jit made
    grid       programs along up to three axes, all at least 1
    args       the kernel's arguments that are no constants, in its order: tensors, None, integers, floats
    constants  its tl.constexpr arguments by name
    options    num_warps, num_stages
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


Runner = Callable[[Launch], None]


def run(launch: Launch) -> None:
    """Run on the device of the tensors."""
    launch.kernel[launch.grid](*launch.args, **launch.constants, **launch.options)


_runner: Runner = run


def start(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], config: Config) -> None:
    """Start a kernel; nothing at all for an empty grid. Tile sizes and options of `config` are added to `constants`."""
    if 0 in grid:
        return
    _runner(Launch(kernel, grid, args, {**constants, **config.sizes}, config.options))


@contextmanager
def replaced_runner(runner: Runner) -> Iterator[None]:
    """Every launch of this process goes to `runner` meanwhile. Not for several threads at once."""
    global _runner
    before = _runner
    _runner = runner
    try:
        yield
    finally:
        _runner = before


@dataclass(slots=True)
class LaunchCounter:
    """A runner that starts nothing: a null device. Results are whatever lies in the output tensors."""

    names: list[str] = field(default_factory=list)

    def __call__(self, launch: Launch) -> None:
        self.names.append(launch.name)


class Config(NamedTuple):
    """sizes: tile sizes, which are constants of a kernel; options: num_warps and num_stages."""

    sizes: dict[str, int]
    options: dict[str, int]

    @classmethod
    def make(cls, num_warps: int = 4, num_stages: int = 3, **sizes: int) -> Config:
        return cls(sizes, {"num_warps": num_warps, "num_stages": num_stages})
