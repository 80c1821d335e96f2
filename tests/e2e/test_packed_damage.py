"""Hostile packed folders: what config.json says of the packed tensors, and the tensors, changed in every way.

Whatever is changed, loading raises a PagelensError or gives a model that runs: nothing else is raised, and nothing is
read outside the file (which a crash of this very process would show). Numbers that leave all sizes as they are (the
type of a scale, how inputs are rounded) cannot be told from true ones and only make a model that computes something
else; a change of what the model itself fixes is always refused.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantized_checkpoints import input_of, make_quantized_checkpoint
from helpers.text_models import make_oracle, save
from helpers.tiny_models import Session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pagelens import LLM
from pagelens.core import DTYPES
from pagelens.errors import ConfigError, PagelensError, WeightsError
from pagelens.loading.checkpoint import Checkpoint, open_checkpoint
from pagelens.loading.packed import KEY, LAYOUT_TYPES
from pagelens.loading.quantized import open_weights
from pagelens.loading.safetensors_writer import write_safetensors
from pagelens.models.registry import class_of
from pagelens.ops.registry import as_ops, resolve_ops
from pagelens.quantize import quantize_checkpoint
from pagelens.reader import builtin_model

FIELDS = ("n", "k", "dtype", "has_bias", "format", "activation", "scale_dtype", "group_size", "has_zeros", "has_order")
FIXED = ("n", "k", "dtype", "has_bias")  # by the model
NUMBERS: tuple[Any, ...] = (0, 1, 2, 3, 4, 7, 8, 40, 2**31 - 1, 2**31, 2**40, 2**63, 2**70, -1, -64, 0.5, "8", None, [])


class Folder:
    """A packed folder that is loaded again and again with another config.json, over files that stay open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checkpoint = open_checkpoint(path)
        self.network = class_of(self._checkpoint.config)
        self._model_config = self.network.read_config(self._checkpoint.config)
        self._table = resolve_ops("native", num_threads=1)

    @property
    def told(self) -> dict[str, Any]:
        """A copy of what config.json says under "pagelens"."""
        return copy.deepcopy(self._checkpoint.config[KEY])

    def load(self, told: Any) -> Any:
        config = {**self._checkpoint.config, KEY: told}
        checkpoint = Checkpoint(self.path, config, self._checkpoint._files)
        dtype = DTYPES[self._model_config.torch_dtype]
        return self.network.load(open_weights(checkpoint), self._model_config, dtype, as_ops(self._table))

    def try_it(self, told: Any) -> bool:
        """Whether it was refused. A model that is not must run, with many rows and with one."""
        try:
            model = self.load(told)
        except PagelensError:
            return True
        session = Session(model)
        session.feed([3, 1, 4, 1, 5])
        session.feed([9])
        return False


def gptq(folder: Path) -> Path:
    make_quantized_checkpoint(folder, "gptq_int8_act_order", "qwen3_moe", order_key=input_of)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    """Zeros and orders; all of a page reader (biases, shared experts); a dense layer beside experts, int4."""
    base = tmp_path_factory.mktemp("packed")
    quantize_checkpoint(gptq(base / "gptq"), base / "a", "auto", num_threads=1)
    quantize_checkpoint(builtin_model(), base / "b", "int4", num_threads=1)
    mixed = save(make_oracle("Qwen3MoeForCausalLM", mlp_only_layers=[1]), base / "mixed")
    quantize_checkpoint(mixed, base / "c", "int4", num_threads=1)
    return {"gptq": Folder(base / "a"), "reader": Folder(base / "b"), "mixed": Folder(base / "c")}


PARTS = {
    "gptq": ("decoder.lm_head", "decoder.0.qkv", "decoder.0.o", "decoder.0.ffn"),
    "reader": ("projector", "decoder.0.ffn", "decoder.1.ffn"),
    "mixed": ("decoder.0.ffn", "decoder.1.ffn"),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_not_changed_loads(name: str, folders: dict[str, Folder]) -> None:
    folder = folders[name]
    assert not folder.try_it(folder.told)
    assert {entry["form"] for part in PARTS[name] for entry in folder.told["parts"][part]} >= {"moe"}


@pytest.mark.parametrize("name", PARTS)
def test_every_number_of_every_layout(name: str, folders: dict[str, Folder]) -> None:
    folder = folders[name]
    refused = tried = 0
    for part in PARTS[name]:
        layouts = [
            (key, i)
            for entry in folder.told["parts"][part]
            for key in ("layouts", "shared")
            for i in range(len(entry[key]))
        ]
        for key, i in layouts:
            for place, field in enumerate(FIELDS):
                true = folder.told["parts"][part][0][key][i][place]
                others = (not true, 1, None) if LAYOUT_TYPES[place] is bool else (*NUMBERS, true + 1, true * 2, -true)
                for value in others:
                    if value == true and type(value) is type(true):
                        continue
                    told = folder.told
                    layout = list(told["parts"][part][0][key][i])
                    layout[place] = value
                    told["parts"][part][0][key][i] = layout
                    result = folder.try_it(told)
                    tried += 1
                    refused += result
                    assert result or field not in FIXED, f"{part} {key} {i}: {field}={value!r} instead of {true!r}"
    print(f"{refused} of {tried} refused")
    assert refused > 0.8 * tried


@pytest.mark.parametrize("name", PARTS)
def test_forms_counts_and_parts(name: str, folders: dict[str, Folder]) -> None:
    folder = folders[name]
    parts = folder.told["parts"]
    changes: list[Any] = []
    for part in PARTS[name]:
        entry = parts[part][0]
        for form in ("linear", "swiglu", "moe", "conv", "", None, 7, ["linear"], {"moe": 1}):
            if form != entry["form"]:
                changes.append((part, [{**entry, "form": form}]))
        for count in (0, 1, 7, 9, 65536, 65537, -1, 2**70, True, 8.0, "8", None):
            if count != entry["count"] or type(count) is not int:
                changes.append((part, [{**entry, "count": count}]))
        changes += [
            (part, [entry, entry]),
            (part, [entry] * 17),
            (part, []),
            (part, entry),
            (part, None),
            (part, ["x"]),
        ]
        for key in ("layouts", "shared"):
            for layouts in ([], [[]], [entry["layouts"][0]], entry["layouts"] * 3, None, "x", [None, None], 5):
                if layouts not in (entry[key], ([] if key == "shared" else None)):
                    changes.append((part, [{**entry, key: layouts}]))
    # A part as another one, and parts that are no packed ones at all.
    for there in parts:
        changes += [(there, parts[part]) for part in PARTS[name] if parts[part] != parts[there]]
    for there in ("decoder.norm", "decoder.embed", "decoder.0.input_norm", "nothing", "", "decoder.0"):
        changes += [(there, parts[part]) for part in PARTS[name]]
    for part, entries in changes:
        told = folder.told
        told["parts"][part] = entries
        assert folder.try_it(told), f"{part}: {entries}"


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0}, {"version": 2}, {"version": "1"}, {"version": None}, {"version": [1]}, {"dtype": "float16"},
        {"dtype": None}, {"dtype": ["float32"]}, {"dtype": {}}, {"weights": "int5"}, {"weights": {}}, {"parts": None},
        {"parts": []}, {"parts": {}}, {"parts": {"decoder.norm": 1}}, {"parts": "x"},
    ],
)  # fmt: skip
def test_the_rest_of_the_object(change: dict[str, Any], folders: dict[str, Folder]) -> None:
    assert folders["mixed"].try_it({**folders["mixed"].told, **change})
    for told in ([], "x", 5, True, {}):
        assert folders["mixed"].try_it(told)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [found for key, item in items for found in ((*path, key), *places(item, (*path, key)))]


def look_up(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


ATOMS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.integers(-2, 300) | st.sampled_from(["moe", "x"])


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), atoms=st.lists(ATOMS | st.lists(ATOMS, max_size=10), min_size=3, max_size=3))
@pytest.mark.parametrize("name", ["gptq", "mixed"])
def test_any_change(name: str, folders: dict[str, Folder], seed: int, atoms: list[Any]) -> None:
    """Some places get a random value, the value of another place, or go."""
    rng = random.Random(seed)
    told = json.loads(json.dumps(folders[name].told))
    for atom in atoms[: rng.randint(1, 3)]:
        found = places(told)
        if not found:
            break
        path, other = rng.choice(found), rng.choice(found)
        holder = look_up(told, path[:-1])
        action = rng.randrange(4)
        if action == 0:
            holder[path[-1]] = atom
        elif action == 1 and isinstance(holder, dict):
            del holder[path[-1]]
        elif action == 2 and len(path) > 3:
            at = look_up(told, path[:-1])
            if isinstance(at, list) and at:
                at.insert(rng.randrange(len(at)), atom)
        else:
            holder[path[-1]] = copy.deepcopy(look_up(told, other))
    folders[name].try_it(told)


# ---- the tensors -----------------------------------------------------------------------------------------------------
def rewritten(folder: Folder, target: Path, tensors: dict[str, Any], **parts: Any) -> Path:
    """A copy of a packed folder with these tensors (None: gone) and entries changed."""
    kept = {**load_file(folder.path / "model.safetensors"), **tensors}
    told = folder.told
    told["parts"].update(parts)
    target.mkdir(exist_ok=True)
    with open(target / "model.safetensors", "wb") as file:
        write_safetensors(file, {name: tensor for name, tensor in kept.items() if tensor is not None})
    config = json.loads((folder.path / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps({**config, KEY: told}), encoding="utf-8")
    return target


TENSORS = {
    "cut": lambda t: t[:-64],
    "longer": lambda t: torch.cat([t, t[:64]]),
    "empty": lambda t: t[:0],
    "signed": lambda t: t.view(torch.int8),
    "of two axes": lambda t: t.view(-1, 64),
    "floats": lambda t: t.view(torch.float32),
    "gone": lambda t: None,
}


@pytest.mark.parametrize("change", TENSORS, ids=lambda name: name.replace(" ", "_"))
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("gptq", "packed.decoder.0.qkv.0"),
        ("gptq", "packed.decoder.2.ffn.0"),
        ("reader", "packed.decoder.1.ffn.0.shared"),
        ("mixed", "packed.decoder.1.ffn.0"),
    ],
)
def test_a_packed_tensor_that_is_damaged(
    name: str, tensor: str, change: str, folders: dict[str, Folder], tmp_path: Path
) -> None:
    whole = load_file(folders[name].path / "model.safetensors")[tensor]
    folder = rewritten(folders[name], tmp_path / "x", {tensor: TENSORS[change](whole)})
    with pytest.raises(WeightsError, match=r"packed"):
        LLM(folder, num_threads=1)


def test_a_packed_tensor_off_its_line(folders: dict[str, Folder], tmp_path: Path) -> None:
    """As another program might write the file again: a header of another length stands before the packed ones."""
    tensors = load_file(folders["mixed"].path / "model.safetensors")
    header, at = {}, 0
    for name in sorted(tensors, key=lambda name: not name.startswith("model.norm")):
        size = tensors[name].nbytes
        kind = {torch.uint8: "U8", torch.float32: "F32"}[tensors[name].dtype]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)  # so that the data begin 8 bytes behind a line
    target = rewritten(folders["mixed"], tmp_path / "x", {})
    data = b"".join(tensors[name].numpy().tobytes() for name in header)
    (target / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    with pytest.raises(WeightsError, match=r"needed are \d+ bytes at a multiple of 64"):
        LLM(target, num_threads=1)


@pytest.mark.parametrize("value", [64, 2**31 - 1, -1, -(2**31)])
@pytest.mark.parametrize("part", ["decoder.0.qkv", "decoder.2.ffn"])
def test_an_order_that_names_no_input(part: str, value: int, folders: dict[str, Folder], tmp_path: Path) -> None:
    """An order lies in the tensor itself, on a line: all of 0 to 63, of the only matrix or of the last expert."""
    name, k = f"packed.{part}.0", 64
    whole = load_file(folders["gptq"].path / "model.safetensors")[name]
    places = range(0, len(whole) - 4 * k + 1, 64)
    orders = [p for p in places if sorted(whole[p : p + 4 * k].view(torch.int32).tolist()) == list(range(k))]
    assert len(orders) == (1 if part.endswith("qkv") else 8)
    start = orders[-1]
    changed = whole.clone()
    changed[start : start + 4 * k].view(torch.int32)[k // 2] = value
    folder = rewritten(folders["gptq"], tmp_path / "x", {name: changed})
    with pytest.raises(WeightsError, match=rf"order of the inputs names input {value} of {k}"):
        LLM(folder, num_threads=1)


def bytes_of(n: int, k: int) -> int:
    """Of a packed plain float32 matrix."""
    return -(-n // 32) * 32 * k * 4


def test_parts_of_another_form_with_bytes_that_fit_it(folders: dict[str, Folder], tmp_path: Path) -> None:
    """The sizes are right for the form that is told, but the form is not that of the part."""
    folder = folders["mixed"]

    def layout(n: int, k: int) -> list[Any]:
        return [n, k, 0, False, 0, 0, 0, 1, False, False, 0]

    linear = {"form": "linear", "layouts": [layout(96 + 96 + 64, 64)], "count": 0, "shared": []}
    blob = torch.zeros(bytes_of(256, 64), dtype=torch.uint8)
    as_linear = rewritten(folder, tmp_path / "a", {"packed.decoder.1.ffn.0": blob}, **{"decoder.1.ffn": [linear]})
    swiglu = {"form": "swiglu", "layouts": [layout(256, 64), layout(64, 64)], "count": 0, "shared": []}
    blob = torch.zeros(bytes_of(256, 64) + bytes_of(64, 64), dtype=torch.uint8)
    as_swiglu = rewritten(folder, tmp_path / "b", {"packed.decoder.1.qkv.0": blob}, **{"decoder.1.qkv": [swiglu]})
    for path in (as_linear, as_swiglu):
        with pytest.raises(
            WeightsError, match=r"packed part decoder\.1\.\w+ does not fit the model: 1 entries of form"
        ):
            LLM(path, num_threads=1)


def test_the_config_of_another_model(folders: dict[str, Folder], tmp_path: Path) -> None:
    target = rewritten(folders["mixed"], tmp_path / "x", {})
    text = (target / "config.json").read_text(encoding="utf-8")
    changes = (("hidden_size", 32), ("moe_intermediate_size", 48), ("intermediate_size", 64), ("vocab_size", 95))
    for key, value in changes:
        (target / "config.json").write_text(json.dumps({**json.loads(text), key: value}), encoding="utf-8")
        with pytest.raises((WeightsError, ConfigError), match=r"packed part|needs \["):
            LLM(target, num_threads=1)
