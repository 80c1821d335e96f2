"""The reference backend against the contract's formulas, written out a second time as plain loops in float64.

Tolerance: float32 results may differ from float64 by 1e-5 of the largest value (sums of at most 300 terms); a bfloat16
result is the float64 one rounded once, so it may differ by one unit in the last place (2^-8) where float32 sums lie
next to a rounding boundary, and only in few places.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pagelens.errors import ShapeError
from pagelens.ops import RopeTable
from pagelens.ops.reference import ReferenceOps

OPS = ReferenceOps()
DTYPES = [torch.float32, torch.bfloat16]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def check(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """expected is float64."""
    assert result.shape == expected.shape
    assert result.dtype == dtype
    if dtype == torch.float32:
        assert float((result.double() - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        return
    once = expected.float().to(dtype)
    wrong = result != once
    assert float(wrong.float().mean()) <= 0.01, "a bfloat16 result is rounded more than once"
    assert bool(((result.float() - once.float()).abs() <= 2.0**-7 * once.float().abs())[wrong].all())


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "gelu": gelu,
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "silu": silu,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear(dtype: torch.dtype, activation: str | None) -> None:
    x = noise(7, 2 * 33, dtype=dtype)[:, :33]  # strided rows
    # Sums of about 1: far out, 1 + erf(x) has no digits left in float32 and gelu's tail is not comparable.
    weight, bias, residual = noise(20, 33, dtype=dtype) / 8, noise(20, dtype=dtype) / 2, noise(7, 20, dtype=dtype)
    packed = OPS.pack_linear(weight, bias)
    assert (packed.out_features, packed.in_features, packed.dtype) == (20, 33, dtype)
    sums = ACTIVATIONS[activation](x.double() @ weight.double().T + bias.double())
    check(OPS.linear(x, packed, activation), sums, dtype)  # type: ignore[arg-type]
    buffer = residual.clone()
    assert OPS.linear(x, packed, activation, residual=buffer, out=buffer) is buffer  # type: ignore[arg-type]
    check(buffer, sums + residual.double(), dtype)
    check(OPS.linear(x, packed, activation, out_dtype=torch.float32), sums, torch.float32)  # type: ignore[arg-type]


def test_no_rows() -> None:
    """Every decoder op takes an empty batch."""
    x, none = noise(0, 24), torch.empty(0, dtype=torch.int32)
    parts = expert(0, torch.float32)
    ffn, keys = OPS.pack_swiglu(*parts), torch.zeros(2, 4, 1, 8)
    moe = OPS.pack_moe(noise(1, 24), [tuple(parts)], ffn)
    assert OPS.linear(x, OPS.pack_linear(noise(5, 24))).shape == (0, 5)
    assert OPS.embedding(none, noise(9, 24)).shape == (0, 24)
    assert OPS.rms_norm(x, noise(24), 1e-6).shape == (0, 24)
    assert OPS.swiglu_ffn(x, ffn).shape == (0, 24)
    assert OPS.moe_ffn(x, moe, 1, False, 1.0).shape == (0, 24)
    q = OPS.qk_norm_rope_store(x, none, none, RopeTable.build(4, 8, 1e4), keys, keys.clone(), 1)
    assert q.shape == (0, 1, 8)
    tables = torch.empty(0, 1, dtype=torch.int32)
    assert OPS.paged_attention(q, keys, keys, tables, ints(0), none, 1.0).shape == (0, 1, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype: torch.dtype) -> None:
    x, weight, bias = 3 + noise(6, 40, dtype=dtype), noise(40, dtype=dtype), noise(40, dtype=dtype, seed=1)
    raised = x.double()
    rms = raised / torch.sqrt((raised**2).mean(-1, keepdim=True) + 1e-6) * weight.double()
    centred = raised - raised.mean(-1, keepdim=True)
    layer = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) * weight.double() + bias.double()
    check(OPS.rms_norm(x, weight, 1e-6), rms, dtype)
    check(OPS.layer_norm(x.view(2, 3, 40), weight, bias, 1e-6), layer.view(2, 3, 40), dtype)
    for op, expected in ((OPS.rms_norm, rms), (lambda x, w, e, out: OPS.layer_norm(x, w, bias, e, out=out), layer)):
        buffer = x.clone()
        assert op(buffer, weight, 1e-6, out=buffer) is buffer
        check(buffer, expected, dtype)


def test_embedding() -> None:
    table, ids = noise(10, 4), ints(3, 9, 3, 0)
    assert torch.equal(OPS.embedding(ids, table), torch.stack([table[3], table[9], table[3], table[0]]))
    for bad in (10, -1):
        with pytest.raises(ShapeError, match="vocabulary"):
            OPS.embedding(ints(0, bad), table)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
def test_qk_norm_rope_store(dtype: torch.dtype, norm: bool) -> None:
    heads, kv_heads, dim, theta = 4, 2, 8, 100.0
    qkv = noise(3, (heads + 2 * kv_heads) * dim, dtype=dtype)
    positions, slots = [5, 0, 11], [6, 13, 1]
    weights = (noise(dim, dtype=dtype, seed=2), noise(dim, dtype=dtype, seed=3)) if norm else (None, None)
    keys = torch.full((4, 4, kv_heads, dim), 7.0, dtype=dtype)
    values = keys.clone()
    rope = RopeTable.build(12, dim, theta)
    q = OPS.qk_norm_rope_store(qkv, ints(*positions), ints(*slots), rope, keys, values, heads, *weights, eps=1e-6)

    def turned(x: Tensor, weight: Tensor | None, position: int) -> Tensor:
        x = x.double()
        if weight is not None:
            x = x / math.sqrt(float((x**2).mean()) + 1e-6) * weight.double()
        out = torch.empty(dim, dtype=torch.float64)
        for i in range(dim // 2):
            angle = position * theta ** (-2 * i / dim)
            out[i] = x[i] * math.cos(angle) - x[i + dim // 2] * math.sin(angle)
            out[i + dim // 2] = x[i + dim // 2] * math.cos(angle) + x[i] * math.sin(angle)
        return out

    rows = qkv.view(3, -1, dim)
    expected_q = torch.stack(
        [torch.stack([turned(rows[n, h], weights[0], positions[n]) for h in range(heads)]) for n in range(3)]
    )
    check(q, expected_q, dtype)
    for n, slot in enumerate(slots):
        expected_k = torch.stack([turned(rows[n, heads + h], weights[1], positions[n]) for h in range(kv_heads)])
        check(keys.view(16, kv_heads, dim)[slot], expected_k, dtype)
        assert torch.equal(values.view(16, kv_heads, dim)[slot], rows[n, heads + kv_heads :])
    untouched = [s for s in range(16) if s not in slots]
    assert bool((keys.view(16, -1)[untouched] == 7).all())
    assert bool((values.view(16, -1)[untouched] == 7).all())


@pytest.mark.parametrize(("positions", "slots"), [([12], [0]), ([-1], [0]), ([0], [16]), ([0], [-1])])
def test_positions_and_slots_are_checked(positions: list[int], slots: list[int]) -> None:
    keys = torch.zeros(4, 4, 1, 8)
    with pytest.raises(ShapeError, match="outside"):
        OPS.qk_norm_rope_store(
            noise(1, 24), ints(*positions), ints(*slots), RopeTable.build(12, 8, 1e4), keys, keys.clone(), 1
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step_bytes", [64 << 20, 1])
def test_paged_attention(dtype: torch.dtype, step_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill, a chunk that continues one, a decode; grouped heads, scattered blocks, NaN elsewhere."""
    monkeypatch.setattr("pagelens.ops.reference.SCORE_BYTES", step_bytes)
    heads, kv_heads, dim, size = 6, 2, 8, 4
    new, contexts = [5, 3, 1], [5, 10, 9]
    tables = [[3, 9, 0], [7, 1, 4], [2, 8, 5]]
    keys = torch.full((10, size, kv_heads, dim), torch.nan, dtype=dtype)
    values = keys.clone()
    dense = []
    for context, table in zip(contexts, tables):
        k, v = noise(context, kv_heads, dim, dtype=dtype), noise(context, kv_heads, dim, dtype=dtype, seed=4)
        for p in range(context):
            keys[table[p // size], p % size], values[table[p // size], p % size] = k[p], v[p]
        dense.append((k.double(), v.double()))
    q = noise(sum(new), heads, dim, dtype=dtype)
    starts = ints(0, 5, 8, 9)
    out = torch.empty_like(q)
    result = OPS.paged_attention(q, keys, values, torch.tensor(tables).int(), starts, ints(*contexts), 0.3, out)
    assert result is out
    expected = torch.empty(q.shape, dtype=torch.float64)
    row = 0
    for (k, v), n, context in zip(dense, new, contexts):
        for t in range(n):
            seen = context - n + t + 1
            for h in range(heads):
                group = h // (heads // kv_heads)
                weights = (k[:seen, group] @ q[row, h].double() * 0.3).softmax(0)
                expected[row, h] = weights @ v[:seen, group]
            row += 1
    check(result, expected, dtype)


def test_paged_attention_refuses_what_has_no_blocks() -> None:
    keys = torch.zeros(4, 4, 1, 8)
    with pytest.raises(ShapeError, match="blocks for 4"):
        OPS.paged_attention(noise(1, 1, 8), keys, keys, ints(2).view(1, 1), ints(0, 1), ints(5), 1.0)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The contract's formula in float64, the product rounded to x's dtype."""
    product = silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    return product.float().to(x.dtype).double() @ down.double().T


def expert(seed: int, dtype: torch.dtype, width: int = 24, hidden: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    parts = noise(hidden, width, seed=seed), noise(hidden, width, seed=seed + 1), noise(width, hidden, seed=seed + 2)
    return parts[0].to(dtype) / 5, parts[1].to(dtype) / 5, parts[2].to(dtype) / 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_ffn(dtype: torch.dtype) -> None:
    x, parts = noise(5, 24, dtype=dtype), expert(0, dtype)
    packed, expected = OPS.pack_swiglu(*parts), swiglu(x, *parts)
    check(OPS.swiglu_ffn(x, packed), expected, dtype)
    buffer = x.clone()
    assert OPS.swiglu_ffn(x, packed, residual=buffer, out=buffer) is buffer
    check(buffer, expected + x.double(), dtype)


@pytest.mark.parametrize(("renormalize", "scale"), [(False, 1.0), (True, 2.5)])
def test_moe_routing(renormalize: bool, scale: float) -> None:
    logits = noise(9, 8)
    routing = OPS.moe_routing(logits, 3, renormalize, scale)
    scores = logits.double().softmax(-1)
    for n in range(9):
        best = sorted(range(8), key=lambda e: (-float(scores[n, e]), e))[:3]
        assert routing.expert_ids[n].tolist() == best
        chosen = scores[n, best]
        expected = chosen / (chosen.sum() if renormalize else 1) * scale
        torch.testing.assert_close(routing.weights[n].double(), expected, rtol=1e-6, atol=0)
    flat = routing.expert_ids.flatten().tolist()
    offsets, permutation = routing.offsets.tolist(), routing.permutation.tolist()
    assert offsets[0] == 0
    assert offsets[-1] == 27
    for e in range(8):
        assert permutation[offsets[e] : offsets[e + 1]] == [i for i, found in enumerate(flat) if found == e]
    fields = (routing.expert_ids, routing.offsets, routing.permutation)
    assert {t.dtype for t in fields} == {torch.int32}


def test_moe_routing_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert OPS.moe_routing(logits, 4, False, 1.0).expert_ids.tolist() == [[1, 2, 3, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_shared", [False, True])
def test_moe_ffn(dtype: torch.dtype, with_shared: bool) -> None:
    x, router = noise(6, 24, dtype=dtype), noise(5, 24, dtype=dtype)
    experts = [expert(10 * e, dtype) for e in range(5)]
    shared = expert(99, dtype, hidden=32) if with_shared else None
    moe = OPS.pack_moe(router, experts, OPS.pack_swiglu(*shared) if shared else None)
    scores = (x.double() @ router.double().T).softmax(-1)
    expected = torch.zeros(6, 24, dtype=torch.float64)
    for n in range(6):
        for e in scores[n].topk(2).indices.tolist():
            expected[n] += 1.5 * scores[n, e] * swiglu(x[n : n + 1], *experts[e])[0]
    routing = OPS.moe_routing(x.float() @ router.float().T, 2, False, 1.5)
    check(OPS.grouped_gemm(x, moe, routing), expected, torch.float32)
    if shared:
        expected += swiglu(x, *shared)
    check(OPS.moe_ffn(x, moe, 2, False, 1.5), expected, dtype)
    buffer = x.clone()
    assert OPS.moe_ffn(x, moe, 2, False, 1.5, residual=buffer, out=buffer) is buffer
    check(buffer, expected + x.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_patch_embed(dtype: torch.dtype) -> None:
    pixels, weight, bias = noise(2, 3, 12, 12, dtype=dtype), noise(5, 3, 4, 4, dtype=dtype), noise(5, dtype=dtype)
    expected = torch.empty(2, 3, 3, 5, dtype=torch.float64)
    for b in range(2):
        for y in range(3):
            for x in range(3):
                patch = pixels[b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].double()
                expected[b, y, x] = (weight.double() * patch).sum((1, 2, 3)) + bias.double()
    check(OPS.patch_embed(pixels, OPS.pack_patch_embed(weight, bias), 4), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "window"), [(5, 0), (5, 3), (6, 3), (2, 4)])
@pytest.mark.parametrize("step_bytes", [64 << 20, 1])
def test_window_attention(
    dtype: torch.dtype, grid: int, window: int, step_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagelens.ops.reference_vision.SCORE_BYTES", step_bytes)
    heads, dim, batch = 2, 4, 2
    width, size = heads * dim, window or grid
    qkv, pad = noise(batch, grid, grid, 3 * width, dtype=dtype), noise(3 * width, dtype=dtype, seed=1)
    rel_h, rel_w = noise(2 * size - 1, dim, seed=2), noise(2 * size - 1, dim, seed=3)
    result = OPS.window_attention(qkv, pad, rel_h, rel_w, heads, window)

    def token(b: int, y: int, x: int) -> Tensor:
        inside = y < grid and x < grid
        return (qkv[b, y, x] if inside else pad).double().view(3, heads, dim)

    expected = torch.empty(batch, grid, grid, width, dtype=torch.float64)
    for b, y, x, h in [
        (b, y, x, h) for b in range(batch) for y in range(grid) for x in range(grid) for h in range(heads)
    ]:
        top, left = y // size * size, x // size * size
        q = token(b, y, x)[0, h]
        logits, seen = [], []
        for ky in range(top, top + size):
            for kx in range(left, left + size):
                other = token(b, ky, kx)
                bias = q @ rel_h[y - ky + size - 1].double() + q @ rel_w[x - kx + size - 1].double()
                logits.append(q @ other[1, h] / math.sqrt(dim) + bias)
                seen.append(other[2, h])
        expected[b, y, x, h * dim : (h + 1) * dim] = torch.stack(logits).softmax(0) @ torch.stack(seen)
    check(result, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype: torch.dtype) -> None:
    qkv = noise(2, 7, 3 * 12, dtype=dtype)
    q, k, v = qkv.double().view(2, 7, 3, 3, 4).permute(2, 0, 3, 1, 4)
    expected = ((q @ k.transpose(-1, -2)) / 2).softmax(-1) @ v
    check(OPS.attention(qkv, 3), expected.transpose(1, 2).reshape(2, 7, 12), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_downsample(dtype: torch.dtype) -> None:
    shapes = {"conv1": (5, 6, 1, 1), "conv2": (5, 5, 3, 3), "down1": (7, 5, 3, 3), "down2": (8, 7, 3, 3)}
    weights = {name: noise(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    for i in (1, 2):
        weights[f"norm{i}_weight"], weights[f"norm{i}_bias"] = noise(5, dtype=dtype, seed=i), noise(5, dtype=dtype)
    x = noise(2, 8, 8, 6, dtype=dtype)

    def conv(image: Tensor, name: str, stride: int, pad: int) -> Tensor:
        """image [G, G, C] float64, one output at a time."""
        weight = weights[name].double()
        size = weight.shape[2]
        padded = torch.zeros(image.shape[0] + 2 * pad, image.shape[1] + 2 * pad, image.shape[2], dtype=torch.float64)
        padded[pad : pad + image.shape[0], pad : pad + image.shape[1]] = image
        count = (padded.shape[0] - size) // stride + 1
        out = torch.empty(count, count, weight.shape[0], dtype=torch.float64)
        for y in range(count):
            for z in range(count):
                patch = padded[y * stride : y * stride + size, z * stride : z * stride + size]
                out[y, z] = torch.einsum("hwc,ochw->o", patch, weight)
        return out

    def norm(image: Tensor, i: int) -> Tensor:
        centred = image - image.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
        return scaled * weights[f"norm{i}_weight"].double() + weights[f"norm{i}_bias"].double()

    expected = []
    for image in x.double():
        image = norm(conv(image, "conv1", 1, 0), 1)
        image = norm(conv(image, "conv2", 1, 1), 2)
        expected.append(conv(conv(image, "down1", 2, 1), "down2", 2, 1))
    check(OPS.conv_downsample(x, OPS.pack_conv_downsample(weights), 1e-6), torch.stack(expected), dtype)


def test_rope_table_is_exact_far_out() -> None:
    """Angles in float64: at position 8000 a float32 angle would be off by 5e-4."""
    table = RopeTable.build(8192, 128, 10000.0)
    for position, i in ((8191, 0), (8000, 1), (4097, 63)):
        angle = position * 10000.0 ** (-2 * i / 128)
        assert abs(float(table.cos[position, i]) - math.cos(angle)) < 1e-7
        assert abs(float(table.sin[position, i]) - math.sin(angle)) < 1e-7


SHAPE_ERRORS: dict[str, Callable[[], object]] = {
    "linear width": lambda: OPS.linear(noise(2, 5), OPS.pack_linear(noise(3, 4))),
    "linear dtype": lambda: OPS.linear(noise(2, 4, dtype=torch.bfloat16), OPS.pack_linear(noise(3, 4))),
    "linear residual": lambda: OPS.linear(noise(2, 4), OPS.pack_linear(noise(3, 4)), residual=noise(2, 4)),
    "linear out": lambda: OPS.linear(noise(2, 4), OPS.pack_linear(noise(3, 4)), out=noise(3, 3)),
    "linear activation": lambda: OPS.linear(noise(2, 4), OPS.pack_linear(noise(3, 4)), "relu"),  # type: ignore[arg-type]
    "bias": lambda: OPS.pack_linear(noise(3, 4), noise(4)),
    "double precision": lambda: OPS.pack_linear(noise(3, 4).double()),
    "rms_norm weight": lambda: OPS.rms_norm(noise(2, 5), noise(4), 1e-6),
    "layer_norm bias": lambda: OPS.layer_norm(noise(2, 5), noise(5), noise(4), 1e-6),
    "swiglu": lambda: OPS.pack_swiglu(noise(3, 4), noise(3, 4), noise(3, 4)),
    "experts": lambda: OPS.pack_moe(noise(2, 4), [(noise(3, 4), noise(3, 4), noise(4, 3))], None),
    "top_k": lambda: OPS.moe_routing(noise(2, 4), 5, False, 1.0),
    "window tables": lambda: OPS.window_attention(noise(1, 4, 4, 24), noise(24), noise(7, 4), noise(7, 4), 2, 3),
    "attention heads": lambda: OPS.attention(noise(1, 4, 24), 3),
    "pixels": lambda: OPS.patch_embed(noise(1, 3, 10, 10), OPS.pack_patch_embed(noise(5, 3, 4, 4), noise(5)), 4),
}


@pytest.mark.parametrize("case", SHAPE_ERRORS)
def test_broken_contracts_are_refused(case: str) -> None:
    with pytest.raises(ShapeError):
        SHAPE_ERRORS[case]()
