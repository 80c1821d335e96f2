"""`pagelens quantize`: its folder gives what the source gives, to the bit, and is mapped; failures leave none."""

from __future__ import annotations

import errno
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pooling_models import pooling_oracle, save_model
from helpers.quantized_checkpoints import input_of, make_quantized_checkpoint
from helpers.text_models import edit_json, make_oracle, save, write_tokenizer
from helpers.tiny_models import Session
from safetensors.torch import load_file, save_file
from torch import Tensor

from pagelens import LLM, Reader, SamplingParams, quantize
from pagelens.bench.memory import PeakMemory
from pagelens.cli import main
from pagelens.config import EngineConfig
from pagelens.core import Engine, build_engine
from pagelens.errors import ConfigError, UnsupportedError, WeightsError
from pagelens.loading import safetensors_writer
from pagelens.quantize import quantize_checkpoint
from pagelens.reader import builtin_model

DENSE, MOE = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
IDS = list(range(2, 40))
SAMPLE = Path(__file__).resolve().parents[2] / "engine" / "assets" / "samples" / "notice.png"


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Engine]:
    options = {"backend": "native", "num_threads": 1, "kv_cache_bytes": 2**20, **options}
    engine = build_engine(EngineConfig(str(folder), **options))
    try:
        yield engine
    finally:
        engine.close()


def logits_of(folder: Path, **options: Any) -> Tensor:
    with opened(folder, **options) as engine:
        session = Session(engine.runner.model)  # type: ignore[arg-type]
        return torch.cat([session.feed(IDS), session.feed([5])])  # many rows, and one


def is_model(folder: Path) -> bool:
    """Whether anything at all was left in a folder."""
    return folder.exists() and any(folder.iterdir())


# ---- the same bits ---------------------------------------------------------------------------------------------------
def make_plain(folder: Path, architecture: str, stacked: bool = False, **changes: Any) -> Path:
    return save(make_oracle(architecture, **changes), folder, stacked)


def make_quantised(folder: Path, fmt: str, kind: str = "qwen3") -> Path:
    make_quantized_checkpoint(folder, fmt, kind, order_key=input_of)
    return folder


def make_pieces(folder: Path) -> Path:
    """q, k and v have orders of their own: three packed tensors."""
    make_quantized_checkpoint(folder, "gptq_int4_act_order", order_key=lambda name: name.replace("up_p", "gate_p"))
    return folder


SOURCES: dict[str, Callable[[Path], Path]] = {
    "untied": lambda folder: make_plain(folder, DENSE),
    "tied": lambda folder: make_plain(folder, DENSE, tie_word_embeddings=True),
    "experts and a dense layer": lambda folder: make_plain(folder, MOE, mlp_only_layers=[1], tie_word_embeddings=True),
    "stacked experts": lambda folder: make_plain(folder, MOE, stacked=True),
    "sizes that are no multiples": lambda folder: make_plain(folder, DENSE, hidden_size=52, intermediate_size=75),
    "reader": lambda folder: builtin_model(),
    "gptq, act-order": lambda folder: make_quantised(folder, "gptq_int8_act_order"),
    "gptq, act-order, experts": lambda folder: make_quantised(folder, "gptq_int4_act_order", "qwen3_moe"),
    "gptq in pieces": make_pieces,
    "awq": lambda folder: make_quantised(folder, "awq"),
    "rounded inputs": lambda folder: make_quantised(folder, "ct_w8a8", "qwen3_moe"),
    "fp8": lambda folder: make_quantised(folder, "fp8", "qwen3_moe"),
}
CASES = [
    (source, weights)
    for source in SOURCES
    for weights in ("auto", "int8", "int4")
    if weights == "auto" or list(SOURCES).index(source) < list(SOURCES).index("gptq, act-order")
]


@pytest.mark.parametrize(("source", "weights"), CASES, ids=lambda value: value.replace(" ", "_"))
def test_the_same_bits_as_the_source(source: str, weights: Any, tmp_path: Path) -> None:
    folder, packed = SOURCES[source](tmp_path / "a"), tmp_path / "b"
    report = quantize_checkpoint(folder, packed, weights, num_threads=1)
    assert report.num_packed_parts >= 10
    assert report.num_bytes == sum(t.nbytes for t in load_file(packed / "model.safetensors").values())
    expected = logits_of(folder, weights=weights)
    assert torch.equal(logits_of(packed), expected)
    assert torch.equal(logits_of(packed, weights=weights), expected)
    assert torch.equal(logits_of(packed, use_mmap=False), expected)
    if weights != "auto":
        assert not torch.equal(expected, logits_of(folder))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_page_reads_the_same(weights: Any, tmp_path: Path) -> None:
    """DeepSeek-OCR with its towers, its projector (with a bias) and its shared experts."""
    quantize_checkpoint(builtin_model(), tmp_path / "b", weights, num_threads=1)
    limit = SamplingParams(max_tokens=60)
    with Reader(weights=weights, num_threads=1) as reader:
        expected = reader.read(SAMPLE, sampling=limit).raw_text
    with Reader(tmp_path / "b", num_threads=1) as reader:
        assert reader.read(SAMPLE, sampling=limit).raw_text == expected
    assert len(expected) > 30


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_packed_for_another_dtype(dtype: Any, tmp_path: Path) -> None:
    folder = make_plain(tmp_path / "a", MOE)
    if dtype == "float32":
        edit_json(folder / "config.json", dtype="bfloat16", torch_dtype="bfloat16")
    quantize_checkpoint(folder, tmp_path / "b", "int4", dtype, num_threads=1)
    assert torch.equal(logits_of(tmp_path / "b"), logits_of(folder, weights="int4", dtype=dtype))


def test_an_embedding_model_without_a_head(tmp_path: Path) -> None:
    folder = save_model(pooling_oracle(), tmp_path / "a", prefix=False, head=False)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}', encoding="utf-8")
    quantize_checkpoint(folder, tmp_path / "b", "int8", num_threads=1)
    assert (tmp_path / "b" / "1_Pooling" / "config.json").is_file()
    vectors = []
    for model, options in ((folder, {"weights": "int8"}), (tmp_path / "b", {})):
        with LLM(model, num_threads=1, **options) as llm:  # type: ignore[arg-type]
            vectors.append(torch.from_numpy(llm.embed(["Hi", "there"])))
    assert torch.equal(*vectors)


def test_a_reranker_with_a_tied_head(tmp_path: Path) -> None:
    folder = save_model(pooling_oracle(tie_word_embeddings=True), tmp_path / "a")
    quantize_checkpoint(folder, tmp_path / "b", "int8", num_threads=1)
    scores = []
    for model, options in ((folder, {"weights": "int8"}), (tmp_path / "b", {})):
        with LLM(model, num_threads=1, **options) as llm:  # type: ignore[arg-type]
            scores.append([result.score for result in llm.rerank("q", ["a", "b"]).results])
    assert scores[0] == scores[1]
    quantize_checkpoint(save_model(pooling_oracle(), tmp_path / "c"), tmp_path / "d", num_threads=1)
    with (
        LLM(tmp_path / "d", num_threads=1) as llm,
        pytest.raises(ConfigError, match=r"rerank needs lm_head\.weight, or tied"),
    ):
        llm.rerank("q", ["a"])


# ---- mapped ----------------------------------------------------------------------------------------------------------
def mappings(file: Path) -> list[tuple[int, int, int]]:
    """Start, end and resident bytes of every mapping of a file in this process."""
    found: list[tuple[int, int, int]] = []
    mine = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        head = line.split()
        if "-" in head[0] and not head[0].endswith(":"):
            mine = line.endswith(str(file))
            start, end = (int(part, 16) for part in head[0].split("-"))
            if mine:
                found.append((start, end, 0))
        elif mine and head[0] == "Rss:":
            found[-1] = (*found[-1][:2], int(head[1]) * 1024)
    return found


def handles(model: Any) -> list[Any]:
    """All packed memory of a decoder's linear layers."""
    found = [model.decoder._lm_head.handle]
    for layer in model.decoder._layers:
        found += [piece.handle for piece in layer._qkv.packed] + [layer._o.handle, layer._ffn.handle]
        shared = getattr(layer._ffn, "shared", None)
        found += [] if shared is None else [shared.handle]
    return found


@pytest.mark.parametrize("source", ["tied", "reader", "gptq, act-order, experts", "gptq in pieces"])
def test_weights_lie_in_the_mapped_file(source: str, tmp_path: Path) -> None:
    quantize_checkpoint(SOURCES[source](tmp_path / "a"), tmp_path / "b", "auto", num_threads=1)
    with opened(tmp_path / "b") as engine:
        places = mappings(tmp_path / "b" / "model.safetensors")
        for handle in handles(engine.runner.model):
            assert handle.num_bytes > 0
            assert any(start <= handle.address and handle.address + handle.num_bytes <= end for start, end, _ in places)


def test_a_start_reads_little_and_packing_needs_little(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4}
    folder = make_plain(tmp_path / "a", DENSE, **sizes)
    peak, before = PeakMemory(), 0
    peak.restart()
    before = peak.read() or 0
    original = quantize.FolderWriter
    quantize.FolderWriter = functools.partial(original, shard_bytes=2**22)  # type: ignore[assignment, misc]
    try:
        report = quantize_checkpoint(folder, tmp_path / "b", "int8", num_threads=1)
    finally:
        quantize.FolderWriter = original  # type: ignore[misc]
    used = (peak.read() or 0) - before
    print(
        f"{report.source_bytes:,} bytes became {report.num_bytes:,} in {report.seconds:.2f} s, {used:,} bytes of memory"
    )
    assert report.num_bytes < 0.27 * report.source_bytes  # float32 to 8 bits and a scale a row, and the table
    # The matrices packed together (the feed-forward's three), their packed form, and a shard; not the checkpoint.
    assert used < 0.7 * report.source_bytes
    with opened(tmp_path / "b") as engine:
        shards = sorted((tmp_path / "b").glob("model-*.safetensors"))
        found = [place for shard in shards for place in mappings(shard)]
        mapped, resident = sum(end - start for start, end, _ in found), sum(rss for *_, rss in found)
        print(f"{resident:,} of {mapped:,} mapped bytes are resident after the start")
        assert mapped > report.num_bytes
        assert resident < 0.25 * mapped  # norms, the table, and what the system maps around a page that is touched
        assert handles(engine.runner.model)


def test_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_plain(tmp_path / "a", MOE)
    monkeypatch.setattr(quantize, "FolderWriter", functools.partial(quantize.FolderWriter, shard_bytes=20_000))
    quantize_checkpoint(folder, tmp_path / "b", "int8", num_threads=1)
    names = {path.name for path in (tmp_path / "b").iterdir() if "safetensors" in path.name}
    count = len(names) - 1
    assert count > 3
    assert names == {"model.safetensors.index.json"} | {
        f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
    }
    assert torch.equal(logits_of(tmp_path / "b"), logits_of(folder, weights="int8"))


# ---- what is in the folder -------------------------------------------------------------------------------------------
def test_what_is_copied(tmp_path: Path) -> None:
    folder = make_quantised(tmp_path / "a", "awq")
    wanted = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE")
    unwanted = ("quant_config.json", "pytorch_model.bin", "weights.safetensors.index.json", "photo.png")
    write_tokenizer(folder)
    for name in (*wanted[1:], *unwanted):
        (folder / name).write_text('{"top_k": 7}' if name.endswith("json") else "text", encoding="utf-8")
    quantize_checkpoint(folder, tmp_path / "b", "auto", num_threads=1)
    written = {path.name for path in (tmp_path / "b").iterdir()}
    assert written == {*wanted, "config.json", "model.safetensors"}
    for name in wanted:
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes()
    settings = json.loads((tmp_path / "b" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in settings
    assert settings["pagelens"]["weights"] == "auto"
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    texts = []
    for model in (folder, tmp_path / "b"):
        edit_json(model / "config.json", vocab_size=96)
        with LLM(model, num_threads=1) as llm:
            texts.append(llm.generate(["!#"], sampling)[0].outputs[0])
    assert texts[0].text == texts[1].text
    assert texts[0].token_ids == texts[1].token_ids


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_plain(tmp_path / "a", DENSE)
    assert main(["quantize", str(folder), str(tmp_path / "b"), "--weights", "int4", "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"num_bytes", "source_bytes", "seconds", "num_packed_parts"}
    assert report["num_bytes"] < report["source_bytes"]
    assert main(["quantize", str(folder), str(tmp_path / "c")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"wrote {tmp_path / 'c'}: 0.00 GB (")
    assert out.count("\n") == 1
    assert "Traceback" not in err
    assert json.loads((tmp_path / "c" / "config.json").read_text(encoding="utf-8"))["pagelens"]["weights"] == "int8"


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain(tmp_path_factory.mktemp("plain"), DENSE)


@pytest.fixture(scope="module")
def packed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    quantize_checkpoint(plain, folder, "int8", num_threads=1)
    return folder


def damaged(folder: Path) -> Path:
    make_plain(folder, DENSE)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    return folder


def packed_already(folder: Path) -> Path:
    quantize_checkpoint(make_plain(folder / "a", DENSE), folder / "b", num_threads=1)
    return folder / "b"


REFUSED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], type[Exception], str]] = {
    "a preset": (lambda _: "qwen3-0.6b", {}, ConfigError, r"'qwen3-0\.6b' is a preset, which has no weights"),
    "nothing there": (lambda folder: folder / "gone", {}, ConfigError, r"gone"),
    "packed already": (packed_already, {}, ConfigError, r"is already in the native layout; start from the original"),
    "quantised already": (
        lambda folder: make_quantised(folder, "awq"),
        {"weights": "int8"},
        ConfigError,
        r"weights='int8', but the checkpoint is quantised already; use weights='auto'",
    ),
    "damaged in its last layer": (damaged, {}, WeightsError, r"mlp\.up_proj.*row 3.*NaN or infinity.*damaged"),
    "weights": (
        lambda _: builtin_model(),
        {"weights": "int5"},
        ConfigError,
        r"weights='int5' is not one of auto, int8",
    ),
    "threads": (lambda _: builtin_model(), {"num_threads": 0}, ConfigError, r"num_threads=0 must be"),
    "orders": (
        lambda folder: make_quantized_checkpoint(folder, "gptq_int4_act_order") and folder,
        {"weights": "auto"},
        UnsupportedError,
        r"gate and up are quantised in different ways",
    ),
}


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("case", REFUSED, ids=lambda name: name.replace(" ", "_"))
def test_refused_and_nothing_left(case: str, existed: bool, tmp_path: Path) -> None:
    make, options, error, message = REFUSED[case]
    target = tmp_path / "target"
    if existed:
        target.mkdir()
    with pytest.raises(error, match=message):
        quantize_checkpoint(make(tmp_path / "source"), target, **{"num_threads": 1, **options})
    assert target.exists() == existed
    assert not is_model(target)


def test_a_target_that_is_taken(plain: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    for target, message in (
        (tmp_path, "is not empty; name a new folder"),
        (tmp_path / "notes.txt", "cannot be written"),
    ):
        assert main(["quantize", str(plain), str(target)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    with pytest.raises(ConfigError, match="is not empty"):
        quantize_checkpoint(plain, plain)
    assert logits_of(plain).isfinite().all()


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_then_full(path: Path, text: str, **_: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text[: len(text) // 2])
    full()


def on_call(number: int, function: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but `otherwise` from its `number`th call on."""
    calls = iter(range(1, 1000))
    return lambda *args, **options: (function if next(calls) < number else otherwise)(*args, **options)


WRITES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the first shard": lambda patch: patch.setattr(safetensors_writer, "write_safetensors", full),
    "the third shard": lambda patch: patch.setattr(
        safetensors_writer, "write_safetensors", on_call(3, safetensors_writer.write_safetensors, full)
    ),
    "the second name": lambda patch: patch.setattr(
        safetensors_writer.os, "replace", on_call(2, safetensors_writer.os.replace, full)
    ),
    "the index": lambda patch: patch.setattr(Path, "write_text", half_then_full),
    "the copies": lambda patch: patch.setattr(shutil, "copyfile", full),
    "config.json": lambda patch: patch.setattr(Path, "write_text", on_call(2, Path.write_text, half_then_full)),
}


@pytest.mark.parametrize("case", WRITES, ids=lambda name: name.replace(" ", "_"))
def test_a_full_disk(
    case: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantize, "FolderWriter", functools.partial(quantize.FolderWriter, shard_bytes=20_000))
    WRITES[case](monkeypatch)
    assert main(["quantize", str(plain), str(tmp_path / "b")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "No space left on device; free space on its disk or choose another folder" in err
    assert not (tmp_path / "b").exists()


def test_interrupted(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupt)
    assert main(["quantize", str(plain), str(tmp_path / "b")]) == 130
    assert not (tmp_path / "b").exists()


def test_options_that_do_not_fit_the_folder(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ({"weights": "int4"}, {"dtype": "bfloat16"}):
        with pytest.raises(
            ConfigError, match=r"packed with weights='int8' for dtype='float32', not with .*leave both at 'auto'"
        ):
            LLM(packed, num_threads=1, **options)
    with pytest.raises(
        UnsupportedError, match=r"backend reference cannot read; use backend='native', or the checkpoint"
    ):
        LLM(packed, backend="reference")
    assert main(["generate", "--model", str(packed), "--prompt", "Hi", "--backend", "reference"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--backend native" in err
