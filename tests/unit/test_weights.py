"""load_weights: strict both ways before any data is read, conversions, and its peak memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pagelens.errors import WeightsError
from pagelens.loading.checkpoint import Checkpoint, open_checkpoint
from pagelens.loading.weights import WeightSpec, load_weights

from ..helpers.checkpoint_files import write_folder

VALUES = torch.tensor([[1.0, -2.5, 3.140625], [65504.0, 1e-3, 0.0]])


def folder_of(tmp_path: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    return open_checkpoint(write_folder(tmp_path, {"model.safetensors": tensors}))


def spec(target: str, *sources: str, shape: tuple[int, ...] = (2, 3)) -> WeightSpec:
    return WeightSpec(target, sources, (shape,) * len(sources))


def load(
    checkpoint: Checkpoint,
    specs: list[WeightSpec],
    unused: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, list[Tensor]]:
    taken: dict[str, list[Tensor]] = {}
    load_weights(
        checkpoint, specs, unused, dtype, lambda one, tensors: taken.update({one.target: [t.clone() for t in tensors]})
    )
    return taken


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_conversions(source: torch.dtype, target: torch.dtype, tmp_path: Path) -> None:
    stored = VALUES.to(source)
    taken = load(folder_of(tmp_path, {"w": stored}), [spec("x", "w")], dtype=target)["x"][0]
    assert taken.dtype == target
    assert torch.equal(taken, stored.to(target))


def test_sources_come_in_order_and_fused(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, {"q": VALUES, "k": VALUES + 1, "g": VALUES + 2})
    taken = load(checkpoint, [spec("kq", "k", "q"), spec("g", "g")])
    assert list(taken) == ["kq", "g"]
    assert torch.equal(taken["kq"][0], VALUES + 1)
    assert torch.equal(taken["kq"][1], VALUES)


def test_one_tensor_may_serve_twice(tmp_path: Path) -> None:
    taken = load(folder_of(tmp_path, {"e": VALUES}), [spec("embed", "e"), spec("head", "e")])
    assert torch.equal(taken["embed"][0], taken["head"][0])


def test_no_conversion_means_no_copy(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, {"w": VALUES})
    addresses: list[int] = []
    load_weights(checkpoint, [spec("x", "w")], (), torch.float32, lambda _, t: addresses.append(t[0].data_ptr()))
    assert addresses == [checkpoint.tensor("w").data_ptr()]


def test_everything_wrong_is_listed_before_any_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = folder_of(
        tmp_path,
        {
            "good": VALUES,
            "flat": VALUES.flatten(),
            "ints": torch.zeros(2, 3, dtype=torch.int8),
            "extra": VALUES,
            "known": VALUES,
        },
    )
    monkeypatch.setattr(checkpoint, "tensor", lambda name: pytest.fail(f"{name} was read"))
    specs = [spec("a", "good", "gone"), spec("b", "flat"), spec("c", "ints"), spec("d", "also gone")]
    with pytest.raises(WeightsError) as caught:
        load(checkpoint, specs, unused=("known", "may be absent"))
    assert str(caught.value) == (
        "the checkpoint does not fit the model: 2 missing: 'gone', 'also gone'; 1 left over: 'extra'; "
        "1 wrong shape: 'flat' is [6], needs [2, 3]; 1 wrong dtype: 'ints' is I8, needs one of BF16, F16, F32"
    )


def test_unused_tensors_may_be_of_any_kind(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, {"w": VALUES, "ids": torch.zeros(3, dtype=torch.int64)})
    assert list(load(checkpoint, [spec("x", "w")], unused=("ids", "absent"))) == ["x"]


def test_long_lists_are_cut_with_a_count(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, {"w": VALUES, **{f"extra{i:03}": VALUES for i in range(30)}})
    with pytest.raises(WeightsError) as caught:
        load(checkpoint, [spec("x", "w"), *(spec(f"m{i}", f"missing{i}") for i in range(12))])
    text = str(caught.value)
    assert "12 missing: 'missing0'" in text
    assert "'missing9' and 2 more; 30 left over: 'extra000'" in text
    assert text.endswith("'extra009' and 20 more")


def test_a_transposed_weight_is_a_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"'w' is \[2, 3\], needs \[3, 2\]"):
        load(folder_of(tmp_path, {"w": VALUES}), [spec("x", "w", shape=(3, 2))])


def test_misuse_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 sources and 1 shapes"):
        WeightSpec("x", ("a", "b"), ((1,),))
    with pytest.raises(ValueError, match=r"bfloat16 or float16, not torch\.float64"):
        load(folder_of(tmp_path, {"w": VALUES}), [spec("x", "w")], dtype=torch.float64)


def rss(kind: str) -> int:
    """Resident bytes of this process of one kind, from /proc: anonymous memory, or mapped files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def test_memory_stays_at_one_spec_when_nothing_is_kept(tmp_path: Path) -> None:
    """16 tensors of 4 MiB: after each, neither its file pages nor its converted copy stay."""
    size = 2**21
    tensors = {f"w{i:02}": torch.full((size,), float(i), dtype=torch.bfloat16) for i in range(16)}
    checkpoint = folder_of(tmp_path, tensors)
    del tensors
    sums: list[float] = []
    mapped: list[int] = []
    start = rss("RssFile")

    def consume(one: WeightSpec, got: list[Tensor]) -> None:
        sums.append(got[0][0].item())
        assert got[0].sum() == size * got[0][0]
        mapped.append(rss("RssFile") - start)

    load_weights(
        checkpoint, [spec(f"w{i:02}", f"w{i:02}", shape=(size,)) for i in range(16)], (), torch.float32, consume
    )
    assert sums == [float(i) for i in range(16)]
    # One tensor of the file (4 MiB) and room for code pages of torch touched on the way; all would be 64 MiB.
    assert max(mapped) < 24 * 2**20
