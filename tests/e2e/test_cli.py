"""The command line as a user meets it: results on stdout, everything else on stderr, one clear line for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from helpers.text_models import make_oracle, save

from pagelens.cli import as_typed, main
from pagelens.read_files import page_header
from pagelens.reader import builtin_model

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "engine" / "assets" / "samples"
SAMPLE = SAMPLES / "notice.png"


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and then ends."""
    ihdr = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + ihdr + zlib.crc32(ihdr).to_bytes(4, "big")


def bad_files(folder: Path) -> dict[str, Path]:
    sample = SAMPLE.read_bytes()
    contents = {
        "zero.png": b"",
        "text.png": b"hello, I am no image\n" * 20,
        "cut.png": sample[: len(sample) // 2],
        "huge.png": png_header(60_000, 60_000),
        "absurd.png": png_header(2**31 - 1, 2**31 - 1),
    }
    paths = {}
    for name, data in contents.items():
        paths[name] = folder / name
        paths[name].write_bytes(data)
    paths["missing.png"] = folder / "missing.png"
    paths["folder.png"] = folder / "folder.png"
    paths["folder.png"].mkdir()
    return paths


def error_lines(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.strip()]
    return [line for line in lines if "built-in reader" not in line]


def test_read_prints_markdown_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", str(SAMPLE), "--max-tokens", "200"]) == 0
    out, err = capsys.readouterr()
    assert len(out.strip()) > 20
    assert "pagelens" not in out
    assert "small built-in reader" in err
    assert "--model" in err


def test_json_is_one_object_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", str(SAMPLE), str(SAMPLE), "--json", "--max-tokens", "60"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 2
    assert records[0]["markdown"] == records[1]["markdown"]
    assert records[0]["file"] == str(SAMPLE)
    assert records[0]["finish_reason"] in ("stop", "length")


def test_out_writes_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", str(SAMPLE), "--out", str(tmp_path / "deep" / "out"), "--max-tokens", "60"]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "deep" / "out"
    assert (folder / "result.md").read_text(encoding="utf-8").strip() == out.strip()
    assert json.loads((folder / "page.json").read_text(encoding="utf-8"))["markdown"].strip() == out.strip()
    assert (folder / "overlay.png").stat().st_size > 0


def test_bad_files_get_one_line_each_and_the_others_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = bad_files(tmp_path)
    files = [str(SAMPLE), *map(str, paths.values()), str(SAMPLE)]
    assert main(["read", *files, "--max-tokens", "30", "--json"]) == 2
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert sum("markdown" in record for record in records) == 2
    assert sum("error" in record for record in records) == len(paths)
    lines = [line for line in error_lines(err) if "ended by" not in line]
    assert len(lines) == len(paths)
    for name, path in paths.items():
        assert sum(str(path) in line for line in lines) == 1, name


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        (["--mode", "gigantic"], "gigantic"),
        (["--mode", "large"], "large"),
        (["--prompt", "word " * 3000], "max_model_len"),
        (["--prompt", "<image><image>"], "<image>"),
        (["--max-tokens", "0"], "--max-tokens must be"),
        (["--model", "no/such/folder/anywhere"], "no/such/folder/anywhere"),
        (["--threads", "0"], "--threads 0 must be a positive integer"),
        (["--threads", "1000"], "--threads 1000 must be between 1 and 256"),
    ],
)
def test_bad_options_are_one_clear_line(options: list[str], needle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", str(SAMPLE), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = error_lines(err)
    assert len(lines) == 1
    assert needle in lines[0]
    assert "Traceback" not in err


def test_missing_shard_and_pickles_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builtin = builtin_model()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((builtin / name).read_bytes())
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["read", str(SAMPLE), "--model", str(tmp_path)]) == 2
    assert "model-00001-of-00002.safetensors" in capsys.readouterr().err
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert main(["read", str(SAMPLE), "--model", str(tmp_path)]) == 2
    assert "safetensors" in capsys.readouterr().err


def run_command(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell line in which $PAGELENS is the command."""
    env = {**os.environ, "PAGELENS": f"{sys.executable} -m pagelens", **environment}
    return subprocess.run(
        ["bash", "-c", script], env=env, cwd=SAMPLES, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_reader_of_our_output_that_goes_away_is_no_error_of_a_file() -> None:
    result = run_command("$PAGELENS read notice.png notes.png --max-tokens 30 | true; echo ${PIPESTATUS[0]}")
    assert result.stdout == "1\n"
    assert error_lines(result.stderr) == []


def test_folders_are_written_even_if_nobody_reads_stdout(tmp_path: Path) -> None:
    script = f"$PAGELENS read notice.png notes.png --out {tmp_path} --max-tokens 30 | true; echo ${{PIPESTATUS[0]}}"
    assert run_command(script).stdout == "1\n"
    for name in ("notice", "notes"):
        assert (tmp_path / name / "result.md").read_text(encoding="utf-8").strip(), name


def test_a_wrong_instruction_set_is_one_line_everywhere() -> None:
    for command in ("doctor", "read notice.png", "read notice.png --backend reference"):
        result = run_command(f"$PAGELENS {command}", PAGELENS_CPU_ISA="sse9")
        assert result.returncode == 2, command
        (line,) = error_lines(result.stderr)
        assert "PAGELENS_CPU_ISA=sse9 is not an instruction set" in line


def test_file_names_that_are_no_unicode(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.png"
    with open(name, "wb") as file:
        file.write(SAMPLE.read_bytes())
    script = f"$PAGELENS read {tmp_path}/*.png --json --max-tokens 5"
    result = run_command(script, PYTHONIOENCODING="utf-8:strict", PYTHONUTF8="1")
    assert result.returncode == 0, result.stderr
    assert os.fsencode(json.loads(result.stdout)["file"]) == name


def test_several_pages_have_headers(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(SAMPLES / name) for name in ("notice.png", "notes.png")]
    alone = []
    for file in files:
        assert main(["read", file, "--max-tokens", "30"]) == 0
        alone.append(capsys.readouterr().out)
    assert not any("<!--" in text for text in alone)
    assert main(["read", *files, "--max-tokens", "30"]) == 0
    assert capsys.readouterr().out == "".join(f"<!-- {file} -->\n\n{text}\n" for file, text in zip(files, alone))


def test_a_header_is_one_comment() -> None:
    assert page_header("a--b -->\n.png") == "<!-- a- -b - ->?.png -->"
    assert page_header("---") == "<!-- - - - -->"


def test_a_page_from_standard_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", str(SAMPLE), "--max-tokens", "30"]) == 0
    expected = capsys.readouterr().out
    script = f"$PAGELENS read - --max-tokens 30 --out {tmp_path} < notice.png"
    assert run_command(script).stdout == expected
    assert (tmp_path / "overlay.png").stat().st_size > 0
    result = run_command("echo no image | $PAGELENS read -")
    assert result.returncode == 2
    (line,) = error_lines(result.stderr)
    assert line.startswith("pagelens: standard input: ")
    assert "- is standard input, which can be read once" in run_command("$PAGELENS read - -").stderr


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("num_threads=0 must be None or a positive integer", "--threads 0 must be a positive integer"),
        ("SamplingParams.max_tokens must be at least 1, got 0", "--max-tokens must be at least 1, got 0"),
        ("weights='int8', but use weights='auto'", "--weights int8, but use --weights auto"),
        ("pass random_weights=True, or", "pass --random-weights, or"),
        ("temperature=-0.5; seed=3.", "--temperature -0.5; --seed 3."),
        ("dir/seed=3.png: seed=3.png my_seed=3 seeds=3", "dir/seed=3.png: seed=3.png my_seed=3 seeds=3"),
    ],
)
def test_options_are_called_as_they_are_typed(message: str, typed: str) -> None:
    assert as_typed(message) == typed


def test_errors_stand_in_the_order_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing.png")
    assert main(["read", str(SAMPLE), missing, str(SAMPLE), "--json", "--max-tokens", "5"]) == 2
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["error" in record for record in records] == [False, True, False]


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("a file")
    assert main(["read", str(SAMPLE), "--out", str(tmp_path / "taken"), "--max-tokens", "5"]) == 2
    assert f"File exists: {tmp_path / 'taken'}" in capsys.readouterr().err


def test_doctor_lists_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    from pagelens.ops import OP_NAMES

    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "for native kernels" in out
    for op in OP_NAMES:
        assert op in out
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    chosen = {row["op"] for row in report["ops"] if row["chosen"]}
    assert chosen == set(OP_NAMES)


def test_modes_prints_the_token_counts_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["modes", "--size", "1240x1754"]) == 0
    rows = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["tiny"] == ["none", "73"]
    assert rows["large"] == ["none", "421"]
    assert rows["gundam"] == ["2x3", "903"]
    assert main(["modes", "--model", str(builtin_model()), "--size", "100x100"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["base", "gundam"]
    assert main(["modes", "--size", "0x5"]) == 2
    assert main(["modes", "--size", "wide"]) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_gets_one_line() -> None:
    result = run_command("$PAGELENS modes > /dev/full; echo $?")
    assert result.stdout.strip() == "1"
    assert result.stderr.startswith("pagelens: the output cannot be written: No space left")
    assert len(result.stderr.splitlines()) == 1


def test_bench_prints_stages_and_a_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--size", "200x150", "--tokens", "6"]) == 0
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert record["text_tokens"] == 6
    assert record["seconds"]["decode"] > 0
    for stage in ("load model", "encode", "prefill", "decode", "peak memory", "probed limits", "resident"):
        assert stage in out
    assert record["weight_bytes_per_token"] > 0
    assert record["limits"]["operations_per_s"]["bfloat16"]
    (row,) = record["batches"]
    assert set(row["stages"]) == {"preprocess", "encode", "prefill", "decode", "page"}
    assert all(0 < spread["p50"] <= spread["p95"] for spread in row["stages"].values())
    assert 0 < row["encode_share_of_arithmetic"] < 1
    assert row["share_of_bandwidth"] > 0


def test_bench_of_several_pages_together(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--size", "400x300", "--mode", "gundam", "--low-memory", "--no-mmap", "--batch", "1,3", "--repeats", "2"]
    assert main(["bench", "--tokens", "3", *options]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["batch"] for row in record["batches"]] == [1, 3]
    assert record["batches"][1]["prefill_share_of_arithmetic"] is None
    assert record["options"]["low_memory"]
    assert not record["options"]["use_mmap"]


def test_bench_of_a_page_model_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a preset has none: the prompt is token ids, and the output says so."""
    config = json.loads((builtin_model() / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_token_id": 9}), encoding="utf-8")
    options = ["--random-weights", "--size", "200x150", "--tokens", "3", "--repeats", "1"]
    assert main(["bench", "--model", str(tmp_path), *options]) == 0
    out = capsys.readouterr().out
    assert "the model has no tokenizer: the prompt is the page and 10 arbitrary tokens" in out
    assert json.loads(out.splitlines()[-1])["text_tokens"] == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--depth", "0"], "--depth is for text models, and the built-in reader reads pages; leave it out"),
        (["--prompt-tokens", "9"], "--prompt-tokens is for text models"),
        (["--model", "qwen3-0.6b", "--random-weights", "--size", "9x9"], "--size is for page models, and qwen3-0.6b"),
        (["--model", "qwen3-0.6b", "--random-weights", "--max-crops", "4"], "--max-crops is for page models"),
        (["--tokens", "1"], "--tokens 1: at least 2"),
        (["--repeats", "0"], "--repeats 0: at least 1"),
        (["--plot", "x.txt"], "--plot x.txt: the name must end in"),
        (["--model", "qwen3-0.6b"], "pass --random-weights, or"),
    ],
)
def test_bench_says_what_it_cannot_do(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("weights", ["auto", "int4"])
def test_bench_of_a_text_model(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(make_oracle("Qwen3MoeForCausalLM"), tmp_path)
    options = ["--depth", "0,9", "--batch", "1,3", "--prompt-tokens", "20", "--repeats", "2", "--tokens", "4"]
    assert main(["bench", "--model", str(folder), "--weights", weights, *options]) == 0
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert [(row["depth"], row["batch"]) for row in record["decode"]] == [(0, 1), (0, 3), (9, 1), (9, 3)]
    assert all(0 < row["step_p50_s"] <= row["step_p95_s"] and row["tokens_per_s"] > 0 for row in record["decode"])
    assert len(record["prefill"]["seconds"]) == 2
    assert "prefill of 20 tokens" in out
    for wrong in (["--depth", "x"], ["--batch", "0"], ["--tokens", "1"]):
        assert main(["bench", "--model", str(folder), *wrong]) == 2
        assert "--" in capsys.readouterr().err


def test_the_installed_command_works_without_asserts() -> None:
    """The whole path under `python -O`, in a process of its own."""
    command = [sys.executable, "-O", "-m", "pagelens", "read", str(SAMPLE), "--max-tokens", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
