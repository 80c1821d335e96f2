"""The host runtime of csrc/simt: what it computes, and that it finds what docs/simt.md says it finds.

Mutants are the example kernel with one line changed; a test that no longer finds the line to change fails.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers.simt_build import build

HERE = Path(__file__).parent
KERNELS = [HERE / "gemm.cu", HERE / "primitives.cu"]
ORDERS = ("forward", "reverse", "random")
ROUNDING = 8 * 2.0**-24  # of a sum of up to 160 terms, relative to the sum of their magnitudes

x = [7 * i + 1 for i in range(1024)]


@dataclass
class Found:
    code: int = 0
    stderr: str = ""
    stopped: str = ""
    out: list[int] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    races: list[str] = field(default_factory=list)
    banks: dict[str, tuple[int, int]] = field(default_factory=dict)  # place -> phases, extra
    accesses: int = 0


def run(program: Path, name: str, order: str = "forward", *, before: tuple[str, ...] = ()) -> Found:
    races = "1" if program.name == "race" else "0"
    result = subprocess.run([*before, program, name, order, races], capture_output=True, text=True, timeout=120)
    found = Found(result.returncode, result.stderr)
    for line in result.stdout.splitlines():
        kind, _, rest = line.partition(" ")
        words = rest.split()
        if kind == "out":
            found.out = [int(w) for w in words]
        elif kind == "error":
            found.errors[words[0]] = float(words[1])
        elif kind == "race":
            found.races.append(rest)
        elif kind in ("ldmatrix", "shared"):
            found.banks[words[0]] = (int(words[1]), int(words[2]))
        elif kind == "accesses":
            found.accesses = int(words[0])
        elif kind == "stopped":
            found.stopped = rest
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simt")


@pytest.fixture(scope="module")
def programs(folder: Path) -> dict[str, Path]:
    return {variant: build(variant, KERNELS, [HERE / "program.cpp"], folder) for variant in ("plain", "race", "asan")}


def mutant(folder: Path, variant: str, name: str, old: str, new: str) -> Path:
    """The program with `old` replaced in gemm.cu, where it must stand exactly once."""
    source = (HERE / "gemm.cu").read_text()
    assert source.count(old) == 1, f"gemm.cu holds {old!r} {source.count(old)} times"
    (folder / name).mkdir(exist_ok=True)
    changed = folder / name / "gemm.cu"
    changed.write_text(source.replace(old, new))
    for obj in folder.glob("*.o"):  # the runtime's objects serve all programs
        if not (folder / name / obj.name).exists() and ".cu" not in obj.name and "program" not in obj.name:
            shutil.copy2(obj, folder / name)
    return build(variant, [changed, HERE / "primitives.cu"], [HERE / "program.cpp"], folder / name)


@pytest.mark.parametrize("variant", ["plain", "race", "asan"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_example_is_right_and_clean(programs: dict[str, Path], variant: str, order: str) -> None:
    found = run(programs[variant], "gemm", order)
    assert (found.code, found.stopped, found.stderr, found.races) == (0, "", "", [])
    assert len(found.errors) == 4
    assert max(found.errors.values()) < ROUNDING
    assert found.banks
    assert all(extra == 0 for _, extra in found.banks.values())
    assert (found.accesses > 0) == (variant == "race")


@pytest.mark.parametrize("order", ORDERS)
def test_collectives_barriers_and_atomics(programs: dict[str, Path], order: str) -> None:
    for variant in ("plain", "race", "asan"):
        program = programs[variant]
        assert run(program, "block_sum", order).out[:128] == [sum(x[:128])] * 128
        assert run(program, "add_up", order).out[0] == sum(x[:192])
        ballot = sum(1 << lane for lane in range(0, 32, 3))
        shuffled = run(program, "shuffles", order).out
        for t in range(64):
            lane = t % 32
            up, down = max(lane - 3, 0) if lane >= 3 else lane, lane + 3 if lane + 3 < 32 else lane
            half = lane ^ 1 if lane < 16 else -1
            assert shuffled[t * 7 : t * 7 + 7] == [up, down, 8, ballot, 3, half, 2**11 - 1]
        assert run(program, "partial_barrier", order).out[:128] == [*reversed(x[:64]), *[x[0]] * 64]
        for name in ("block_sum", "add_up", "shuffles", "partial_barrier", "warp_sync_is_enough"):
            found = run(program, name, order)
            assert (found.code, found.races, found.stopped) == (0, [], "")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("no_barrier", "read after write at shared"),
        ("shuffle_is_no_barrier", "read after write at shared"),
        ("warp_sync_is_too_little", "read after write at shared"),
        ("blocks_write_one_place", "write after write in global"),
        ("blocks_read_what_one_writes", "read after write in global"),
        ("atomic_and_plain", "write after write in global"),
        ("early_read", "read of a cp.async target in flight"),
    ],
)
def test_races_are_found(programs: dict[str, Path], name: str, kind: str) -> None:
    assert any(race.startswith(kind) for race in run(programs["race"], name).races)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("half_a_barrier", "deadlock: 40 threads wait at the barrier of "),
        ("two_barriers", "threads of a block wait at different __syncthreads, at "),
        ("diverged_shuffle", "deadlock: 16 threads wait for their warp at "),
        ("shuffle_from_outside", "lane 0 shuffles from lane 20, which is not in the mask, at "),
        ("misaligned_ldmatrix", "ldmatrix row of lane 0 is not aligned to 16 bytes at "),
        ("never_waits", "ended without waiting for its cp.async of "),
    ],
)
def test_what_no_card_survives_stops_with_its_place(programs: dict[str, Path], name: str, sentence: str) -> None:
    stopped = run(programs["plain"], name).stopped
    assert sentence in stopped
    assert "primitives.cu:" in stopped


def test_a_grid_that_no_card_takes_is_refused(programs: dict[str, Path]) -> None:
    assert "a grid of (1,65536,1) blocks" in run(programs["plain"], "grid_too_tall").stopped


def test_shared_memory_ends_where_it_was_asked_to_end(programs: dict[str, Path]) -> None:
    found = run(programs["asan"], "shared_overflow")
    assert found.code != 0
    assert "heap-buffer-overflow" in found.stderr
    assert "primitives.cu" in found.stderr


def test_bank_conflicts_of_plain_accesses_are_counted(programs: dict[str, Path]) -> None:
    assert list(run(programs["race"], "column_store").banks.values()) == [(1, 31), (1, 31)]


def test_a_masked_store_is_matched_by_the_rounds_of_its_loop(programs: dict[str, Path]) -> None:
    banks = list(run(programs["race"], "masked_rows").banks.values())
    assert sorted(banks) == [(1, 0), (1, 0), (8, 0), (8, 0)]


def test_masked_stores_are_matched_by_the_barriers_of_their_warp(programs: dict[str, Path]) -> None:
    assert (32, sum(range(32))) in run(programs["race"], "pivots").banks.values()


def test_mutant_without_the_second_barrier(folder: Path) -> None:
    line = "__syncthreads();  // before the next load overwrites the stage"
    program = mutant(folder, "race", "no_barrier", line, "")
    assert any("write after read at shared" in race for race in run(program, "gemm").races)


def test_mutant_with_a_wait_for_too_few_groups(folder: Path) -> None:
    program = mutant(folder, "race", "wait", "cp_async_wait<1>()", "cp_async_wait<2>()")
    found = run(program, "gemm")
    assert any("cp.async target in flight" in race for race in found.races)
    assert max(found.errors.values()) == float("inf")  # poison was read


def test_mutant_without_the_row_predicate(folder: Path) -> None:
    program = mutant(folder, "asan", "rows", "row0 + row < rows && k0", "k0")
    found = run(program, "gemm")
    assert found.code != 0
    assert "heap-buffer-overflow" in found.stderr


def test_mutant_without_the_swizzle(folder: Path) -> None:
    program = mutant(folder, "plain", "swizzle", "(chunk ^ ((row >> 1) & 3)) * 16", "chunk * 16")
    found = run(program, "gemm")
    assert max(found.errors.values()) < ROUNDING
    assert all(extra == 3 * phases for phases, extra in found.banks.values())


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++-12") and shutil.which("qemu-aarch64-static")),
    reason="needs Debian's g++-12-aarch64-linux-gnu and qemu-user-static",
)
def test_it_runs_on_aarch64(folder: Path) -> None:
    cxx = ["aarch64-linux-gnu-g++-12", "-static"]
    program = build("plain", KERNELS, [HERE / "program.cpp"], folder / "aarch64", cxx)
    found = run(program, "gemm", before=("qemu-aarch64-static",))
    assert (found.code, found.stopped) == (0, "")
    assert max(found.errors.values()) < ROUNDING
