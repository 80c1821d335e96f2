"""The safetensors reader against the `safetensors` library: whatever the file, a WeightsError or the same data."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagelens.errors import WeightsError
from pagelens.loading.safetensors import DTYPE_BITS, TORCH_DTYPES, SafetensorsFile, header_length, parse_header

from ..helpers.checkpoint_files import entry, raw_file

Contents = dict[str, tuple[str, tuple[int, ...], bytes]]
SMALL = {
    "norm": torch.arange(3, dtype=torch.bfloat16),
    "w": torch.arange(6, dtype=torch.float32).view(2, 3),
    "no": torch.zeros(0, 3, dtype=torch.float16),
    "n": torch.tensor(7, dtype=torch.int64),
}


def small_file() -> bytes:
    return bytes(safetensors.torch.save(SMALL, metadata={"a": "é\n"}))


def ours(data: bytes) -> Contents:
    """Every tensor as our rules read it from bytes. Raises WeightsError."""
    length = header_length(len(data), data[:8], "f")
    start = 8 + length
    header = parse_header(len(data) - start, data[8:start], "f")
    return {
        name: (info.dtype, info.shape, data[start + info.start : start + info.end])
        for name, info in header.tensors.items()
    }


def oracle(data: bytes) -> Contents | None:
    """The same from the library; None if it refuses."""
    try:
        return {n: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for n, t in safetensors.deserialize(data)}
    except safetensors.SafetensorError:
        return None


def judge(data: bytes) -> str:
    """How one file was treated. Fails on data that differs, and on acceptance of what the oracle refuses."""
    expected = oracle(data)
    try:
        found = ours(data)
    except WeightsError:
        return "both refuse" if expected is None else "only we refuse"
    assert expected is not None, f"accepted, but the oracle refuses: {data!r}"
    assert found == expected
    return "equal data"


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    return path


def test_every_header_byte_and_every_truncation(capsys: pytest.CaptureFixture[str]) -> None:
    """All 255 other values of every header byte, and every length from 0 to the whole, in memory."""
    data = small_file()
    end = 8 + int.from_bytes(data[:8], "little")
    assert end <= 800
    counts: dict[str, int] = {}
    for position in range(end):
        damaged = bytearray(data)
        for value in range(256):
            if value != data[position]:
                damaged[position] = value
                verdict = judge(bytes(damaged))
                counts[verdict] = counts.get(verdict, 0) + 1
    assert sum(counts.values()) == 255 * end
    # Some changes only rename a tensor or relabel a dtype of the same size: both verdicts must occur.
    assert counts["both refuse"] > 100 * end
    assert counts["equal data"] > 100
    # Refusing what the oracle accepts is allowed (see the module), but it must stay the rare exception.
    assert counts.get("only we refuse", 0) <= end
    for length in range(len(data)):
        assert judge(data[:length]) == "both refuse"
    with capsys.disabled():
        listed = ", ".join(f"{verdict} {count}" for verdict, count in sorted(counts.items()))
        print(f"\n{255 * end} changed header bytes: {listed}; {len(data)} truncations: all refused")


def test_truncations_and_changed_bytes_through_files(tmp_path: Path) -> None:
    """Every truncation, and three values of every header byte, through a real file, a mapping and torch."""
    data = small_file()
    end = 8 + int.from_bytes(data[:8], "little")
    for length in range(len(data)):
        with pytest.raises(WeightsError, match=r"x\.safetensors"):
            SafetensorsFile(write(tmp_path, data[:length]))
    for position in range(end):
        for value in {data[position] ^ 1, data[position] ^ 0x80, (data[position] + 7) % 256}:
            damaged = data[:position] + bytes([value]) + data[position + 1 :]
            path = write(tmp_path, damaged)
            expected = oracle(damaged)
            try:
                with SafetensorsFile(path) as file:
                    found = {
                        name: bytes(file.tensor(name).reshape(-1).view(torch.uint8).numpy()) for name in file.names()
                    }
            except WeightsError:
                continue
            assert expected is not None
            assert found == {name: contents[2] for name, contents in expected.items()}


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    path = write(tmp_path, small_file())
    with SafetensorsFile(path) as file:
        assert sorted(file.names()) == sorted(SMALL)
        assert file.metadata == {"a": "é\n"}
        for name, tensor in SMALL.items():
            assert file.tensor(name).dtype == tensor.dtype
            assert file.info(name).shape == tuple(tensor.shape)
            assert torch.equal(file.tensor(name), tensor)


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_every_readable_dtype_equals_the_library(name: str, tmp_path: Path) -> None:
    size = DTYPE_BITS[name] // 8
    # 0 and 1 are the only bytes that are a bool.
    content = bytes(i % 2 if name == "BOOL" else i * 37 % 256 for i in range(6 * size))
    path = write(tmp_path, raw_file({"t": entry(name, [2, 3], 0, 6 * size)}, content))
    expected = safetensors.torch.load_file(path)["t"]
    with SafetensorsFile(path) as file:
        found = file.tensor("t")
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_the_dtype_table_is_the_library_s() -> None:
    """The library accepts exactly our names, at our sizes: eight elements of n bits are n bytes."""
    for name, bits in DTYPE_BITS.items():
        assert oracle(raw_file({"t": entry(name, [8], 0, bits)}, bytes(bits))) is not None, name
        assert oracle(raw_file({"t": entry(name, [8], 0, bits + 1)}, bytes(bits + 1))) is None, name


def test_a_dtype_that_torch_lacks_is_refused_on_use_only(tmp_path: Path) -> None:
    path = write(tmp_path, raw_file({"q": entry("F4", [4], 0, 2), "w": entry("U8", [1], 2, 3)}, b"abc"))
    with SafetensorsFile(path) as file:
        assert file.tensor("w").tolist() == [ord("c")]
        with pytest.raises(WeightsError, match="'q' has dtype F4"):
            file.tensor("q")


ATTACKS = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "length alone": struct.pack("<Q", 2),
    "header longer than the file": raw_file({}, length=100),
    "huge length": raw_file({}, length=2**64 - 1),
    "length above the limit": raw_file({}, length=100_000_001),
    "empty header": raw_file(""),
    "not an object": raw_file("[]"),
    "byte order mark": raw_file("\ufeff{}"),
    "not UTF-8": raw_file(b'{"\xff":1}'),
    "cut UTF-8": raw_file(b'{"\xe2\x82'),
    "not JSON": raw_file("{"),
    "text after the object": raw_file("{} {}"),
    "NUL padding": raw_file(b"{}\0\0"),
    "trailing bytes": raw_file({}, b"x"),
    "trailing bytes after a tensor": raw_file({"a": entry("U8", [1], 0, 1)}, b"xy"),
    "missing data": raw_file({"a": entry("U8", [2], 0, 2)}, b"x"),
    "overlap": raw_file({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"abc"),
    "same place twice": raw_file({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 0, 2)}, b"ab"),
    "hole": raw_file({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"abc"),
    "hole at the start": raw_file({"a": entry("U8", [1], 1, 2)}, b"ab"),
    "end before start": raw_file({"a": entry("U8", [0], 1, 0)}, b""),
    "size too small": raw_file({"a": entry("F32", [2], 0, 4)}, b"abcd"),
    "size too large": raw_file({"a": entry("F32", [1], 0, 8)}, b"abcdefgh"),
    "shape overflows 64 bits": raw_file({"a": entry("U8", [2**32, 2**32], 0, 0)}),
    "bits overflow 64 bits": raw_file({"a": entry("F32", [2**61], 0, 0)}),
    "overflow behind a later zero": raw_file({"a": entry("U8", [2**63, 4, 0], 0, 0)}),
    "offsets near the end of 64 bits": raw_file({"a": entry("U8", [1], 2**64 - 2, 2**64 - 1)}, b"x"),
    "number of 21 digits": raw_file('{"a":{"dtype":"U8","shape":[100000000000000000000],"data_offsets":[0,0]}}'),
    "number of 10,000 digits": raw_file('{"a":{"dtype":"U8","shape":[' + "9" * 10_000 + '],"data_offsets":[0,0]}}'),
    "negative size": raw_file({"a": entry("U8", [-1, -1], 0, 1)}, b"x"),
    "minus zero": raw_file('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
    "negative offset": raw_file({"a": entry("U8", [1], -1, 0)}, b"x"),
    "real number": raw_file({"a": entry("U8", [1.0], 0, 1)}, b"x"),
    "exponent": raw_file('{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}', b"x"),
    "boolean size": raw_file({"a": entry("U8", [True], 0, 1)}, b"x"),
    "text as size": raw_file({"a": entry("U8", ["1"], 0, 1)}, b"x"),
    "null shape": raw_file('{"a":{"dtype":"U8","shape":null,"data_offsets":[0,1]}}', b"x"),
    "NaN": raw_file('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"x"),
    "Infinity": raw_file('{"a":{"dtype":"U8","shape":[-Infinity],"data_offsets":[0,1]}}', b"x"),
    "one offset": raw_file('{"a":{"dtype":"U8","shape":[],"data_offsets":[1]}}', b"x"),
    "three offsets": raw_file('{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1,2]}}', b"x"),
    "no dtype": raw_file('{"a":{"shape":[],"data_offsets":[0,1]}}', b"x"),
    "unknown dtype": raw_file({"a": entry("F7", [], 0, 1)}, b"x"),
    "dtype in lower case": raw_file({"a": entry("u8", [], 0, 1)}, b"x"),
    "dtype not text": raw_file('{"a":{"dtype":8,"shape":[],"data_offsets":[0,1]}}', b"x"),
    "dtype is a list": raw_file('{"a":{"dtype":["U8"],"shape":[],"data_offsets":[0,1]}}', b"x"),
    "half a byte": raw_file({"a": entry("F4", [1], 0, 1)}, b"x"),
    "duplicate field": raw_file('{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"x"),
    "duplicate metadata": raw_file('{"__metadata__":{},"__metadata__":{}}'),
    "metadata not an object": raw_file({"__metadata__": "x"}),
    "metadata value not text": raw_file({"__metadata__": {"a": 1}}),
    "metadata value nested": raw_file({"__metadata__": {"a": {"b": "c"}}}),
    "lone surrogate in a name": raw_file('{"\\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"x"),
    "lone surrogate in metadata": raw_file('{"__metadata__":{"a":"\\udfff"}}'),
    "control character in a name": raw_file(b'{"\x01":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"x"),
    "tensor is a number": raw_file('{"a":1}'),
    "tensor is null": raw_file('{"a":null}'),
    "deep nesting": raw_file('{"a":' + "[" * 200_000 + "]" * 200_000 + "}"),
    "deep nesting, unclosed": raw_file('{"a":' * 200_000),
    "pickle": b"\x80\x04\x95" + b"\0" * 60,
    "zip": b"PK\x03\x04" + b"\0" * 60,
}
# Legal to the library; refused here, for the reasons in the reader's module docstring.
STRICTER = {
    "leading space": raw_file(" {}"),
    "duplicate tensor": raw_file(
        '{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[],"data_offsets":[0,1]}}', b"x"
    ),
    "duplicate tensor, escaped": raw_file(
        '{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"\\u0061":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}',
        b"x",
    ),
    "unknown field": raw_file('{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1],"more":1}}', b"x"),
    "tensor as a list": raw_file('{"a":["U8",[],[0,1]]}', b"x"),
    "null metadata": raw_file('{"__metadata__":null}'),
    "overflow behind an earlier zero": raw_file({"a": entry("U8", [0, 2**40, 2**40], 0, 0)}),
    "rank 33": raw_file({"a": entry("U8", [1] * 33, 0, 1)}, b"x"),
}
LEGAL = {
    "no tensors": raw_file({}),
    "metadata alone": raw_file({"__metadata__": {"k": "v"}}),
    "padded header": raw_file("{}   \n\t "),
    "rank 0": raw_file({"a": entry("U8", [], 0, 1)}, b"x"),
    "empty": raw_file({"a": entry("F32", [0], 0, 0)}),
    "empties sharing an offset": raw_file(
        {"a": entry("F32", [0], 0, 0), "b": entry("F32", [2, 0], 0, 0), "c": entry("U8", [1], 0, 1)}, b"x"
    ),
    "empty after the last": raw_file({"a": entry("U8", [1], 0, 1), "b": entry("F32", [0, 5], 1, 1)}, b"x"),
    "order of the header is free": raw_file({"b": entry("U8", [1], 1, 2), "a": entry("U8", [1], 0, 1)}, b"ab"),
    "odd names": raw_file({"": entry("U8", [], 0, 1), "../é\n\0": entry("U8", [], 1, 2)}, b"ab"),
    "two bytes hold four F4": raw_file({"a": entry("F4", [4], 0, 2)}, b"ab"),
    "zero dimension beside a large one": raw_file({"a": entry("U8", [2**40, 0], 0, 0)}),
    "rank 32": raw_file({"a": entry("U8", [1] * 32, 0, 1)}, b"x"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str, tmp_path: Path) -> None:
    assert judge(ATTACKS[name]) == "both refuse"
    with pytest.raises(WeightsError) as caught:
        SafetensorsFile(write(tmp_path, ATTACKS[name]))
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", STRICTER)
def test_stricter_than_the_library(name: str) -> None:
    assert judge(STRICTER[name]) == "only we refuse"


@pytest.mark.parametrize("name", LEGAL)
def test_legal_oddities(name: str, tmp_path: Path) -> None:
    assert judge(LEGAL[name]) == "equal data"
    with SafetensorsFile(write(tmp_path, LEGAL[name])) as file:
        for tensor in file.names():
            if file.info(tensor).dtype in TORCH_DTYPES:
                assert tuple(file.tensor(tensor).shape) == file.info(tensor).shape


def test_a_tensor_off_its_boundary_is_readable(tmp_path: Path) -> None:
    """The format does not demand alignment; the value must be right whatever the offset."""
    for shift in range(1, 9):
        header = {"pad": entry("U8", [shift], 0, shift), "w": entry("F32", [2], shift, shift + 8)}
        path = write(tmp_path, raw_file(header, bytes(shift) + struct.pack("<2f", 1.5, -2.0)))
        with SafetensorsFile(path) as file:
            assert file.tensor("w").tolist() == [1.5, -2.0]
            assert file.tensor("w").data_ptr() % 4 == 0


def test_views_outlive_the_file_and_never_write_to_it(tmp_path: Path) -> None:
    path = write(tmp_path, small_file())
    file = SafetensorsFile(path)
    view = file.tensor("w")
    assert view.data_ptr() == file.tensor("w").data_ptr(), "nothing is copied"
    file.close()
    file.close()
    assert torch.equal(view, SMALL["w"])
    view.fill_(9.0)
    assert path.read_bytes() == small_file()
    with pytest.raises(WeightsError, match="closed"):
        file.tensor("w")


def test_release_drops_pages_and_later_reads_are_right(tmp_path: Path) -> None:
    weight = torch.arange(2**20, dtype=torch.float32)
    path = tmp_path / "big.safetensors"
    safetensors.torch.save_file({"w": weight}, path)
    with SafetensorsFile(path) as file:
        view = file.tensor("w")
        assert view.sum() == weight.sum()
        before = resident_bytes(path)
        file.release("w")
        assert before >= 4 * 2**20
        assert resident_bytes(path) <= 2 * 4096 * 2
        assert torch.equal(view, weight)
        file.release("w")


def resident_bytes(path: Path) -> int:
    """Bytes of a mapped file that are in this process, from /proc."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.endswith(str(path))]
    return sum(int(next(x for x in lines[i:] if x.startswith("Rss:")).split()[1]) * 1024 for i in starts)


def test_missing_folder_and_pipe(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path, tmp_path / "nul\0.safetensors"):
        with pytest.raises(WeightsError, match="cannot be opened"):
            SafetensorsFile(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="not a regular file"):
        SafetensorsFile(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="no tensor 'x'"):
        SafetensorsFile(write(tmp_path, small_file())).tensor("x")


def test_a_hostile_name_stays_on_one_short_line(tmp_path: Path) -> None:
    name = "x\n\x1b[31m" + "y" * 5000
    with pytest.raises(WeightsError) as caught:
        SafetensorsFile(write(tmp_path, raw_file({name: entry("U8", [2], 0, 1)}, b"x")))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


shapes = st.lists(st.integers(0, 4), max_size=4)
names = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda name: name != "__metadata__")


@settings(max_examples=100, deadline=None)
@given(
    tensors=st.dictionaries(names, st.tuples(shapes, st.sampled_from(sorted(TORCH_DTYPES))), max_size=5),
    # Not empty: for no tensors and empty metadata the library writes a file that it cannot read itself.
    metadata=st.none()
    | st.dictionaries(names, st.text(st.characters(exclude_categories=("Cs",)), max_size=9), min_size=1),
    seed=st.integers(0, 99),
)
def test_round_trip(tensors: dict[str, tuple[list[int], str]], metadata: dict[str, str] | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    written, content = {}, Contents()
    for name, (shape, dtype) in tensors.items():
        size = DTYPE_BITS[dtype] // 8 * math.prod(shape)
        data = torch.randint(0, 2 if dtype == "BOOL" else 256, (size,), generator=generator, dtype=torch.uint8)
        written[name] = data.view(TORCH_DTYPES[dtype]).view(shape)
        content[name] = (dtype, tuple(shape), bytes(data.numpy()))
    data = bytes(safetensors.torch.save(written, metadata))
    assert ours(data) == content
    length = int.from_bytes(data[:8], "little")
    assert parse_header(len(data) - 8 - length, data[8 : 8 + length]).metadata == (metadata or {})


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_edits_of_a_header(data: st.DataObject) -> None:
    """Several edits at once, structure-aware: values of the header replaced by hostile ones."""
    header = json.loads(header_text())
    hostile = st.sampled_from([0, 1, 2, 3, 6, 8, 24, -1, 2**31, 2**63, 2**64, 1.0, True, None, "F32", "BF16", "x", []])
    for _ in range(data.draw(st.integers(1, 3))):
        tensor = data.draw(st.sampled_from(sorted(SMALL)))
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        value = header[tensor].get(field)
        if isinstance(value, list) and value and data.draw(st.booleans()):
            value[data.draw(st.integers(0, len(value) - 1))] = data.draw(hostile)
        else:
            header[tensor][field] = data.draw(hostile | st.lists(st.integers(0, 9), max_size=3))
    body = small_file()[8 + int.from_bytes(small_file()[:8], "little") :]
    judge(raw_file(header, body))


def header_text() -> bytes:
    data = small_file()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]
