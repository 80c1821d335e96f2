"""Quantised checkpoints as whole models: against transformers on the weights that they mean, and native on reference.

Bounds. All is float32 here and nothing is rounded but at the end of an op, so two sides differ by the order of their
sums: 1e-5 of the largest logit, as for plain weights (about 1e-6 is what is measured).
Where a format rounds its inputs, such a difference puts a value that lies between two steps on the other step now and
then, in one row. So the median row keeps that bound; no row may differ by more than rounding all inputs changes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantized_checkpoints import ARCHITECTURES, FORMATS, input_of, load_oracle, make_quantized_checkpoint
from helpers.rounded_inputs import inputs_rounded, round_fp8, round_int8, round_int8_groups
from helpers.text_models import all_logits, edit_json, make_oracle, save
from helpers.tiny_models import Session
from safetensors.torch import load_file, save_file
from torch import Tensor

from pagelens import LLM
from pagelens.config import EngineConfig
from pagelens.core import build_engine
from pagelens.errors import ConfigError, UnsupportedError
from pagelens.loading.checkpoint import open_checkpoint
from pagelens.models.qwen3 import TextModel
from pagelens.models.registry import class_of
from pagelens.quantization import quantize
from pagelens.reader import builtin_model

IDS = random.Random(4).choices(range(96), k=40)
STEPS = 24
SAME = 1e-5
ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {"ct_w8a8": round_int8, "ct_fp8_dynamic": round_fp8}
ACT_ORDER = [fmt for fmt in FORMATS if fmt.endswith("act_order")]


@contextmanager
def loaded(folder: Path, backend: str = "native", **options: Any) -> Iterator[Any]:
    """The model of a folder as the engine builds it."""
    engine = build_engine(EngineConfig(str(folder), backend=backend, num_threads=1, kv_cache_bytes=2**20, **options))  # type: ignore[arg-type]
    try:
        yield engine.runner.model
    finally:
        engine.close()


def run(folder: Path, backend: str, **options: Any) -> tuple[Tensor, list[int], Tensor]:
    """Logits of IDS; STEPS greedy tokens after the first nine, and the logits they were chosen from."""
    with loaded(folder, backend, **options) as model:
        tokens, logits = Session(model).greedy(IDS[:9], None, STEPS)
        return Session(model).feed(IDS), tokens, torch.stack(logits)


def row_errors(result: Tensor, expected: Tensor) -> Tensor:
    """The largest difference of each row, relative to the largest logit of all."""
    assert result.shape == expected.shape
    assert bool(result.isfinite().all())
    return (result - expected).abs().amax(-1) / expected.abs().max()


def assert_near(result: Tensor, expected: Tensor, most: float = SAME) -> None:
    errors = row_errors(result, expected)
    print(f"worst row {float(errors.max()):.1e}, median {float(errors.median()):.1e}")
    assert float(errors.median()) <= SAME
    assert float(errors.max()) <= most


def assert_tokens_agree(a: tuple[Tensor, list[int], Tensor], b: tuple[Tensor, list[int], Tensor], most: float) -> None:
    """Equal, or up to a step whose two best logits are closer than the error that is allowed."""
    step = next((i for i, (x, y) in enumerate(zip(a[1], b[1])) if x != y), STEPS)
    if step < STEPS:
        best, second = a[2][step].topk(2).values.tolist()
        assert best - second <= 2 * most * float(a[0].abs().max()), f"step {step} is no near-tie"


def check(folder: Path, fmt: str, meant: dict[str, Tensor], backends: tuple[str, ...]) -> None:
    """Each backend gives transformers' logits, and the same tokens as the first of them."""
    oracle = load_oracle(folder, meant, folder.parent / "meant")
    expected, most = all_logits(oracle, IDS), SAME
    if fmt in ROUNDINGS:
        exact = expected
        with inputs_rounded(oracle, ROUNDINGS[fmt]):
            expected = all_logits(oracle, IDS)
        most = float(row_errors(exact, expected).max())
        assert most > 1000 * SAME, "rounding the inputs must show"
    results = [run(folder, backend) for backend in backends]
    for result in results:
        assert_near(result[0], expected, most)
        assert_near(result[0], results[0][0], most)
        assert_tokens_agree(results[0], result, most)


# ---- formats ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format(fmt: str, kind: str, tmp_path: Path) -> None:
    meant = make_quantized_checkpoint(tmp_path / "a", fmt, kind, order_key=input_of)
    check(tmp_path / "a", fmt, meant, ("reference", "native"))


@pytest.mark.parametrize("fmt", ["gptq_int4_asym", "ct_w8a8", "fp8"])
def test_in_bfloat16(fmt: str, tmp_path: Path) -> None:
    """As test_qwen3's bound for plain weights: about ten roundings of 2^-9 a layer, of the median row."""
    meant = make_quantized_checkpoint(tmp_path / "a", fmt, order_key=input_of)
    oracle = load_oracle(tmp_path / "a", meant, tmp_path / "b")
    with inputs_rounded(oracle, ROUNDINGS.get(fmt, lambda x: x)):
        expected = all_logits(oracle, IDS)
    for backend in ("reference", "native"):
        difference = run(tmp_path / "a", backend, dtype="bfloat16")[0] - expected
        found = float((difference.square().mean(-1) / expected.square().mean(-1)).sqrt().median())
        print(f"{backend}: {found:.1e}")
        assert found <= 2.0**-5


# ---- matrices of one layer that differ -------------------------------------------------------------------------------
def make_plain(folder: Path, meant: dict[str, Tensor], ending: str) -> None:
    """Store the matrices of these names unquantised, in bfloat16."""
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in meant if name.endswith(f"{ending}.weight")]:
        for part in [part for part in stored if part.startswith(name.removesuffix("weight"))]:
            del stored[part]
        stored[name] = meant[name].to(torch.bfloat16)
        meant[name] = stored[name].float()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("fmt", ["gptq_int4", "ct_w4a16"])
def test_one_of_q_k_v_is_not_quantised(fmt: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    meant = make_quantized_checkpoint(folder, fmt)
    make_plain(folder, meant, "v_proj")
    config = FORMATS[fmt][1]
    change = {"dynamic": {r"-:.*\.v_proj$": {}}} if fmt.startswith("gptq") else {"ignore": ["lm_head", "re:.*v_proj$"]}
    edit_json(folder / "config.json", quantization_config={**config, **change})
    check(folder, fmt, meant, ("reference", "native"))
    with loaded(folder) as model:
        assert len(model.decoder._layers[0]._qkv.packed) == 3


@pytest.mark.parametrize("fmt", ACT_ORDER)
def test_orders_of_q_k_v_that_differ(fmt: str, tmp_path: Path) -> None:
    meant = make_quantized_checkpoint(tmp_path / "a", fmt, order_key=lambda name: name.replace("up_proj", "gate_proj"))
    check(tmp_path / "a", fmt, meant, ("reference", "native"))
    with loaded(tmp_path / "a") as model:
        assert len(model.decoder._layers[0]._qkv.packed) == 3


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("fmt", ACT_ORDER)
def test_orders_of_gate_and_up_that_differ(fmt: str, kind: str, tmp_path: Path) -> None:
    """The native kernels cannot; the error says what can, and that does."""
    meant = make_quantized_checkpoint(tmp_path / "a", fmt, kind)
    for backend in ("native", "auto"):
        with pytest.raises(UnsupportedError, match=r"gate and up are quantised in different ways.*backend='reference'"):
            LLM(tmp_path / "a", backend=backend, num_threads=1)
    check(tmp_path / "a", fmt, meant, ("reference",))


def test_experts_that_differ(tmp_path: Path) -> None:
    """One expert is not quantised: again for reference alone."""
    folder = tmp_path / "a"
    meant = make_quantized_checkpoint(folder, "gptq_int8", "qwen3_moe")
    for name in ("gate_proj", "up_proj", "down_proj"):
        make_plain(folder, meant, f"layers.1.mlp.experts.2.{name}")
    edit_json(folder / "config.json", quantization_config={**FORMATS["gptq_int8"][1], "dynamic": {r"-:.*1.*\.2\.": {}}})
    with pytest.raises(UnsupportedError, match=r"expert 2 is quantised in another way than expert 0.*'reference'"):
        LLM(folder, backend="native", num_threads=1)
    check(folder, "gptq_int8", meant, ("reference",))


# ---- quantised as they are read --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("weights", ["int8", "int4", "int4-pure"])
def test_quantised_on_load(weights: Any, kind: str, tmp_path: Path) -> None:
    """The layers, and the head (in 8 bits but for int4-pure), by our own quantiser; not the table, the norms and the
    routers. Inputs are rounded in groups of 64 (int8) and 32 (int4).
    """
    layers, head = {"int8": ("int8", "int8"), "int4": ("int4", "int8"), "int4-pure": ("int4", "int4")}[weights]
    folder = save(make_oracle(ARCHITECTURES[kind]), tmp_path / "a")
    meant = load_file(folder / "model.safetensors")
    for name, tensor in meant.items():
        if name.endswith("_proj.weight") or name == "lm_head.weight":
            meant[name] = quantize(tensor, head if name == "lm_head.weight" else layers).float()  # type: ignore[arg-type]
    edit_json(folder / "config.json", quantization_config={})  # which load_oracle removes
    oracle = load_oracle(folder, meant, tmp_path / "b")
    edit_json(folder / "config.json", quantization_config=...)
    exact, plain = all_logits(oracle, IDS), all_logits(make_oracle(ARCHITECTURES[kind]), IDS)
    with inputs_rounded(oracle, *(round_int8_groups({"int8": 64, "int4": 32}[kind]) for kind in (layers, head))):
        expected = all_logits(oracle, IDS)
    assert float(row_errors(plain, expected).max()) > 100 * SAME
    most = float(row_errors(exact, expected).max())  # what rounding all inputs changes, as in `check`
    reference, native = (run(folder, backend, weights=weights) for backend in ("reference", "native"))
    assert_near(reference[0], expected, most)
    # Where native's sums put one input on the other side of a step, every later row sees another key and value.
    errors = row_errors(native[0], expected)
    assert float(errors[0]) <= SAME
    assert float(errors.max()) <= most
    assert_tokens_agree(reference, native, most)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_stacked_experts_are_quantised_alike(weights: str, tmp_path: Path) -> None:
    oracle = make_oracle(ARCHITECTURES["qwen3_moe"], mlp_only_layers=[1])
    one_by_one, stacked = (save(oracle, tmp_path / str(is_stacked), is_stacked) for is_stacked in (False, True))
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(stacked / "model.safetensors")
    for backend in ("reference", "native"):
        results = [run(folder, backend, weights=weights)[0] for folder in (one_by_one, stacked)]
        assert torch.equal(*results)
        assert not torch.equal(results[0], run(stacked, backend)[0])
    with loaded(stacked, weights=weights) as model:
        built = TextModel.from_tensors(
            model.config,
            load_file(stacked / "model.safetensors"),
            torch.float32,
            model.ops,
            weights,  # type: ignore[arg-type]
        )
        assert torch.equal(Session(built).feed(IDS), results[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_nothing_is_quantised_twice(weights: str, tmp_path: Path) -> None:
    make_quantized_checkpoint(tmp_path, "awq")
    with pytest.raises(ConfigError, match=rf"weights='{weights}', but the checkpoint is quantised already.*'auto'"):
        LLM(tmp_path, weights=weights, num_threads=1)


# ---- what quantising costs -------------------------------------------------------------------------------------------
def quantisable(folder: Path) -> dict[str, Tensor]:
    """The matrices that weights="int8" and "int4" mean."""
    with open_checkpoint(folder) as checkpoint:
        network = class_of(checkpoint.config)
        opened = network.open_parts(checkpoint, network.read_config(checkpoint.config))
        specs = [part.spec for part in opened.parts if part.spec.target.startswith("decoder.")]
        names = [name for spec in specs for name in spec.sources if spec.is_quantized_on_load(name)]
        return {name: checkpoint.tensor(name).float().clone() for name in names}


def relative_error(weight: Tensor, kind: Any) -> float:
    return float((quantize(weight, kind).float() - weight).norm() / weight.norm())


@pytest.mark.parametrize("model", ["reader", "noise"])
def test_error_of_every_matrix(model: str, tmp_path: Path) -> None:
    """A step is c/127 (int8) of a row's root mean square if its largest value is c of it, and the error of rounding
    1/sqrt(12) of a step: below 1.5 % up to c = 6.6. int4: of 32 normal numbers the largest is 2.1 on average, at most
    about 3.6, and goes on 8: 2.1/8/sqrt(12) = 7.6 % to 13 %.
    """
    folder = builtin_model() if model == "reader" else save(make_oracle("Qwen3ForCausalLM"), tmp_path)
    weights = quantisable(folder)
    assert {name.rsplit(".", 2)[-2] for name in weights} >= {"q_proj", "o_proj", "up_proj", "down_proj", "lm_head"}
    for name, weight in weights.items():
        int8, int4 = relative_error(weight, "int8"), relative_error(weight, "int4")
        print(f"{name:55} {weight.shape[0]:5} x {weight.shape[1]:4}  int8 {int8:.2%}  int4 {int4:.2%}")
        assert 1e-4 < int8 < 0.015, name
        assert 0.02 < int4 < 0.13, name
