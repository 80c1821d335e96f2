"""Checkpoint folders: one file, shards, and everything that can be wrong with them; and the random checkpoint tool."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagelens.errors import ConfigError, WeightsError
from pagelens.loading.checkpoint import open_checkpoint
from pagelens.loading.model_config import read_model_config
from pagelens.models.deepseek_ocr import DeepseekOcr

from ..helpers.checkpoint_files import random_checkpoint_tool, read_data, write_folder

A = {"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
B = {"c": torch.full((1,), 7, dtype=torch.int32)}
INDEX = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
SHARDS = {"one.safetensors": A, "two.safetensors": B}


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-000001.safetensors", "weights.safetensors"])
def test_one_file(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {name: A})
    (folder / "config.json").write_text('{"x": [1, null]}')
    with open_checkpoint(folder) as checkpoint:
        assert sorted(checkpoint.names()) == ["a", "b"]
        assert checkpoint.shape("b") == (2, 3)
        assert checkpoint.dtype("b") == "BF16"
        assert torch.equal(checkpoint.tensor("a"), A["a"])
        assert checkpoint.total_bytes == 4 * 4 + 6 * 2
        assert checkpoint.config == {"x": [1, None]}
        for method in (checkpoint.tensor, checkpoint.shape, checkpoint.dtype, checkpoint.release):
            with pytest.raises(WeightsError, match="no tensor 'c'"):
                method("c")
    with pytest.raises(WeightsError, match="closed"):
        checkpoint.tensor("a")


def test_shards(tmp_path: Path) -> None:
    with open_checkpoint(str(write_folder(tmp_path, SHARDS, INDEX))) as checkpoint:
        assert sorted(checkpoint.names()) == ["a", "b", "c"]
        assert checkpoint.total_bytes == 16 + 12 + 4
        assert checkpoint.tensor("c").tolist() == [7]
        assert torch.equal(checkpoint.tensor("b"), A["b"])


def test_shards_may_lie_in_a_folder_inside(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {}, {"a": "sub/one.safetensors", "b": "sub/one.safetensors"})
    (folder / "sub").mkdir()
    save_file(A, folder / "sub" / "one.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert sorted(checkpoint.names()) == ["a", "b"]


def test_the_single_file_wins_over_an_index(tmp_path: Path) -> None:
    with open_checkpoint(write_folder(tmp_path, {"model.safetensors": B, **SHARDS}, INDEX)) as checkpoint:
        assert checkpoint.names() == ["c"]


def refused(folder: Path, message: str, error: type[Exception] = WeightsError) -> None:
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(folder)
    assert str(caught.value).isprintable(), "one line"
    assert len(str(caught.value)) < 400


ESCAPES = [
    "../one.safetensors",
    "sub/../../one.safetensors",
    "/etc/one.safetensors",
    "..\\one.safetensors",
    "C:\\one.safetensors",
    "C:one.safetensors",
    "\\\\server\\share\\one.safetensors",
    "sub/..",
    "..",
    ".",
    "",
    "/",
    "one.safetensors\0",
    "one.bin",
    "one.safetensors\n",
    "\ud800.safetensors",
    "a" * 5000 + ".safetensors",
]


@pytest.mark.parametrize("name", ESCAPES, ids=ascii)
def test_shard_names_stay_inside(name: str, tmp_path: Path) -> None:
    save_file(A, tmp_path / "one.safetensors")
    folder = write_folder(tmp_path / "model", {"two.safetensors": B}, {"a": name, "b": name, "c": "two.safetensors"})
    refused(folder, "leaves the folder|not the name of a safetensors file|is missing")


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    save_file(A, tmp_path / "outside.safetensors")
    folder = write_folder(tmp_path / "model", {"two.safetensors": B}, INDEX)
    (folder / "one.safetensors").symlink_to(tmp_path / "outside.safetensors")
    refused(folder, "'one.safetensors' is a link to a place outside")
    (folder / "one.safetensors").unlink()
    (folder / "inside.safetensors").write_bytes((tmp_path / "outside.safetensors").read_bytes())
    (folder / "one.safetensors").symlink_to("inside.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert len(checkpoint.names()) == 3
    single = write_folder(tmp_path / "single", {})
    (single / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    refused(single, "is a link to a place outside")
    loop = write_folder(tmp_path / "loop", {})
    (loop / "x.safetensors").symlink_to("x.safetensors")
    refused(loop, "is missing")


def test_a_linked_folder_is_its_target(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", SHARDS, INDEX)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with open_checkpoint(tmp_path / "link") as checkpoint:
        assert len(checkpoint.names()) == 3


@pytest.mark.parametrize("shared", [False, True])
def test_snapshots_of_the_hub_cache_are_links_to_blobs(shared: bool, tmp_path: Path) -> None:
    """CACHE/models--x--y/snapshots/REV/f -> ../../blobs/HASH, which newer versions link on to CACHE/blobs."""
    repository = tmp_path / "models--x--y"
    folder = repository / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (tmp_path / "blobs").mkdir()
    blobs = tmp_path / "blobs" if shared else repository / "blobs"
    save_file(A, blobs / "hash")
    if shared:
        (repository / "blobs" / "hash").symlink_to("../../blobs/hash")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").symlink_to("../../blobs/hash")
    with open_checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.tensor("a"), A["a"])
    (folder / "model.safetensors").unlink()
    save_file(A, tmp_path / "stranger.safetensors")
    (folder / "model.safetensors").symlink_to("../../../stranger.safetensors")
    refused(folder, "is a link to a place outside")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    refused(write_folder(tmp_path, {"one.safetensors": A}, INDEX), "file 'two.safetensors' is missing")


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, SHARDS, INDEX)
    with (folder / "two.safetensors").open("ab") as file:
        file.write(b"x")
    refused(folder, "two.safetensors: trailing bytes")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({**INDEX, "d": "two.safetensors"}, "tensor 'd' is in 'two.safetensors', which does not have it"),
        ({**INDEX, "a": "two.safetensors"}, "has tensor 'a', which the index places in 'two.safetensors'"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "has tensor 'b', which the index does not list"),
        ({**INDEX, "b": "./one.safetensors"}, "which the index places in|does not have it"),
        ({}, "weight_map must be an object"),
        ([], "weight_map must be an object"),
        ({"a": 1}, r"weight_map\['a'\] must be a file name"),
        ({"a": None}, r"weight_map\['a'\] must be a file name"),
    ],
)
def test_index_and_shards_must_agree(index: Any, message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, SHARDS)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    refused(folder, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "duplicate key 'a'"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"x": NaN}', "NaN is not JSON"),
        (b'{"x": %s}' % (b"9" * 5000), "out of range"),
        (b"{}", "weight_map must be an object"),
    ],
)
def test_a_damaged_index(text: bytes, message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, SHARDS)
    (folder / "model.safetensors.index.json").write_bytes(text)
    refused(folder, message)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b'{"a": 1, "a": 2}', b"1"])
def test_a_damaged_config(text: bytes, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"model.safetensors": A})
    (folder / "config.json").write_bytes(text)
    refused(folder, "config.json", ConfigError)


def test_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "is not a folder", ConfigError)
    refused(tmp_path, "config.json: missing", ConfigError)
    folder = write_folder(tmp_path / "m", {})
    refused(folder, "no safetensors file")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "'pytorch_model.bin' but no safetensors file; pickle")
    save_file(A, folder / "x.safetensors")
    save_file(B, folder / "y.safetensors")
    refused(folder, "2 safetensors files .* and no model.safetensors.index.json")
    lone = write_folder(tmp_path / "lone", {"model-00002-of-000003.safetensors": A})
    refused(lone, "one shard of 3; model.safetensors.index.json is missing")


def test_no_file_stays_open_after_a_failure(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"one.safetensors": A}, INDEX)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(WeightsError):
            open_checkpoint(folder)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


# ---- the tool that writes random checkpoints


def test_the_real_checkpoint_has_2710_tensors() -> None:
    """deepseek-ocr.md section 2: names, counts by part, and exactly the size that the published index states."""
    tool = random_checkpoint_tool()
    shapes = tool.deepseek_ocr_tensors(read_model_config(tool.DEEPSEEK_OCR))
    assert len(shapes) == 2710
    assert tool.total_bytes(shapes, 2) == 6_672_212_480
    counts = {"model.sam_model.": 179, "model.vision_model.": 293}
    for prefix, count in counts.items():
        assert sum(name.startswith(prefix) for name in shapes) == count
    assert sum(".experts." in name for name in shapes) == 2112
    assert shapes["model.sam_model.blocks.2.attn.rel_pos_h"] == (127, 64)
    assert shapes["model.sam_model.blocks.3.attn.rel_pos_w"] == (27, 64)
    assert shapes["model.vision_model.embeddings.position_embedding.weight"] == (257, 1024)
    assert shapes["model.layers.11.mlp.shared_experts.down_proj.weight"] == (1280, 1792)
    assert shapes["model.view_seperator"] == (1280,)


@pytest.mark.parametrize("name", ["checkpoint_deepseek_ocr_config.json", "checkpoint_demo_config.json"])
def test_the_tool_and_the_model_declare_the_same_tensors(name: str) -> None:
    """Two independent lists: the tool's from the published table, the model's weight map."""
    config = read_model_config(read_data(name))
    written = random_checkpoint_tool().deepseek_ocr_tensors(config)
    read = {n: s for spec in DeepseekOcr.weight_specs(config) for n, s in zip(spec.sources, spec.shapes, strict=True)}
    unused = "model.vision_model.embeddings.patch_embedding.weight"
    assert written == {**read, unused: written[unused]}


def tiny_config() -> dict[str, Any]:
    raw = read_data("checkpoint_demo_config.json")
    raw["language_config"] |= {"hidden_size": 48, "vocab_size": 64, "num_hidden_layers": 2}
    raw["language_config"] |= {"intermediate_size": 64, "moe_intermediate_size": 16}
    raw["projector_config"]["n_embed"] = 48
    return raw


def test_a_tiny_random_checkpoint_opens(tmp_path: Path) -> None:
    tool = random_checkpoint_tool()
    config = tiny_config()
    size = tool.write_checkpoint(tmp_path / "m", config, seed=3)
    shapes = tool.deepseek_ocr_tensors(read_model_config(config))
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert {name: checkpoint.shape(name) for name in checkpoint.names()} == shapes
        assert checkpoint.total_bytes == size == tool.total_bytes(shapes, 2)
        assert read_model_config(checkpoint.config) == read_model_config(config)
        weight = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight").float()
        # 48*48 values: the sample deviation is within a few per cent of 1/sqrt(48).
        assert weight.std().item() == pytest.approx(48**-0.5, rel=0.1)
        assert checkpoint.tensor("model.norm.weight").eq(1).all()
        assert all(checkpoint.tensor(name).isfinite().all() for name in checkpoint.names())
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model-00001-of-000001.safetensors",
        "model.safetensors.index.json",
    ]
    # The library, not only our reader, agrees that this is a safetensors file.
    assert load_file(tmp_path / "m" / tool.WEIGHTS_FILE).keys() == shapes.keys()


def test_random_checkpoints_repeat_and_differ_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = random_checkpoint_tool()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tool.write_checkpoint(tmp_path / name, tiny_config(), seed, "float32")
    first, again, other = ((tmp_path / name / tool.WEIGHTS_FILE).read_bytes() for name in "abc")
    assert first == again != other
    monkeypatch.setattr(tool, "CHUNK_ELEMENTS", 4096)
    tool.write_checkpoint(tmp_path / "d", tiny_config(), 0, "float32")
    assert (tmp_path / "d" / tool.WEIGHTS_FILE).stat().st_size == len(first)
    with open_checkpoint(tmp_path / "d") as checkpoint:
        assert checkpoint.dtype("lm_head.weight") == "F32"


def test_the_tool_as_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(tiny_config()))
    (source / "tokenizer.json").write_text("{}")
    arguments = [str(tmp_path / "out"), "--config", str(source), "--dtype", "float16"]
    monkeypatch.setattr("sys.argv", ["make_random_checkpoint", *arguments])
    tool = random_checkpoint_tool()
    assert tool.main() == 0
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.dtype("model.norm.weight") == "F16"
        assert f"{checkpoint.total_bytes:,} bytes of weights" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert tool.main() == 2, "the folder is not empty now"
    assert "is not empty" in capsys.readouterr().err
