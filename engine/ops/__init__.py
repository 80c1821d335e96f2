"""The ops contract: every hot computation of every model is one of the functions of `Ops`.

A backend is an object with these methods (`reference` in torch is always complete and is the test oracle; `native` is
C++). `registry.resolve_ops` chooses a backend for each op once, when a model is built, and returns one `Ops` table.
Common rules:
- Activations are float32 or bfloat16 (triton: or float16), last axis contiguous, on the backend's device. Sums, softmax
  and norms are computed in float32; a result is rounded to the activation dtype once, at the end of the op.
- `out` is written and returned when given (it may be `x` or `residual` itself where the docstring says so), otherwise a
  new tensor is made. Packed weights come from the same backend's `pack_*`.
- A weight of a linear layer may be quantised (QuantizedWeight): it then counts as the exact matrix W of its definition,
  and where its format quantises activations, x is first rounded by `quantize_input`, row by row or in groups of a row.
  Products are summed in float32; native sums those of int8 activations and int8 or int4 weights as whole numbers within
  a group, which is exact, and the groups in float32.
- Batch invariance (native): a row's result has the same bits whatever other rows are in the call. For the vision ops a
  row is a view.
- Errors: ShapeError if shapes or dtypes break the contract. triton cannot see ids, slots and positions that are
  outside their tables: it leaves such rows out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..loading.packed import PackedEntry
from ..quantization import QuantizedWeight, Weight

Activation = Literal["gelu", "quick_gelu", "silu"]
OP_NAMES = (
    "embedding",
    "linear",
    "rms_norm",
    "layer_norm",
    "qk_norm_rope_store",
    "paged_attention",
    "swiglu_ffn",
    "moe_routing",
    "grouped_gemm",
    "moe_ffn",
    "patch_embed",
    "window_attention",
    "attention",
    "conv_downsample",
    "sample",
)


@dataclass(frozen=True, slots=True)
class OpCase:
    """What a backend is asked to support: one op for one model shape on one dtype.

    `sizes` holds the op's relevant sizes by name (head_dim, top_k, num_experts, ...), for checks such as
    "head_dim must be a multiple of 16".
    """

    op: str
    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos, sin: [P, D/2] float32, row p = scale * cos/sin(p * frequency_i), angles computed in float64."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(cls, num_positions: int, head_dim: int, theta: float) -> RopeTable:
        """The table for positions 0 .. num_positions-1 and frequencies theta^(-2i/D). head_dim is even."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        return cls.from_frequencies(num_positions, theta**-exponents)

    @classmethod
    def from_frequencies(cls, num_positions: int, frequencies: Tensor, scale: float = 1.0) -> RopeTable:
        """The table of any frequencies [D/2] float64, cos and sin multiplied by `scale`."""
        cos, sin = (torch.empty(num_positions, frequencies.shape[0]) for _ in range(2))
        # In pieces: the float64 angles of 256k positions would take several times the table's own memory.
        for first in range(0, num_positions, 8192):
            last = min(first + 8192, num_positions)
            angles = torch.outer(torch.arange(first, last, dtype=torch.float64), frequencies)
            cos[first:last] = angles.cos() * scale
            sin[first:last] = angles.sin() * scale
        return cls(cos, sin)


@dataclass(frozen=True, slots=True)
class Routing:
    """Result of moe_routing for N tokens, k experts a token, E experts.

    expert_ids   [N, k] int32    chosen experts by falling score, lowest id first among equals
    weights      [N, k] float32  their scores (renormalised and scaled if asked)
    offsets      [E+1] int32     rows of expert e in `permutation` are offsets[e] : offsets[e+1]
    permutation  [N*k] int32     flat indices n*k+j sorted by expert, stable (falling n within an expert never happens)
    """

    expert_ids: Tensor
    weights: Tensor
    offsets: Tensor
    permutation: Tensor


class SamplingCut(NamedTuple):
    """How `sample` chooses from one row.

    temperature 0: the largest logit, and the rest counts for nothing. Else top_k 0 and top_p 1 and min_p 0 cut nothing;
    0 < top_p <= 1, 0 <= min_p <= 1, 0 <= uniform < 1.
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.0


class Program(Protocol):
    """Records the ops that this thread calls between `begin` and `end`, and makes the same calls again in one.

    `replay` reads and writes the memory that the recorded calls did; whoever replays knows that it is still there, in
    the same shapes. It returns -1, or the index of the call that found something bad (an id outside its table), after
    which it stopped; calling the ops again raises the error.

    runs_while_recording  False: the calls are recorded and not made, so that they must have been made once before, and
                          a replay must follow
    """

    runs_while_recording: bool

    def begin(self) -> None: ...
    def end(self) -> None: ...
    def replay(self) -> int: ...


class Ops(Protocol):
    """One chosen implementation per op; see the module docstring for the common rules."""

    name: str
    device: torch.device  # where all tensors of the ops are

    def new_program(self) -> Program | None:
        """A recorder of this backend's calls; None if it cannot record, or runs not all ops of a decoder."""

    # ---- packing, once at load -------------------------------------------------------------------------------------
    def quantize(self, weight: Tensor, kind: Literal["int8", "int4"]) -> QuantizedWeight:
        """weight [O, C] rounded to 8 or 4 bits by the rule of quantization.quantize, the same bits in every backend."""

    def pack_linear(self, weight: Weight, bias: Tensor | None = None) -> Any:
        """weight [O, C] row-major, bias [O]; the result has the attributes out_features, in_features, dtype."""

    def pack_swiglu(self, gate: Weight, up: Weight, down: Weight) -> Any:
        """gate, up [I, C], down [C, I]; returns a packed SwiGLU feed-forward."""

    def pack_moe(self, router: Tensor, experts: Iterable[tuple[Weight, Weight, Weight]], shared: Any | None) -> Any:
        """router [E, C]; experts: E of (gate [I, C], up [I, C], down [C, I]), taken one by one, so that they may be
        read from a file as they are packed; shared: a pack_swiglu result or None.
        """

    def pack_patch_embed(self, weight: Tensor, bias: Tensor) -> Any:
        """weight [C, 3, p, p], bias [C], for patch_embed."""

    def pack_conv_downsample(self, weights: dict[str, Tensor]) -> Any:
        """weights: conv1 [F, C, 1, 1], norm1_weight, norm1_bias [F], conv2 [F, F, 3, 3], norm2_weight, norm2_bias [F],
        down1 [F2, F, 3, 3], down2 [F3, F2, 3, 3].
        """

    def packed_memory(self, packed: Any) -> tuple[PackedEntry, list[Tensor]] | None:
        """The bytes (uint8) of a packed linear, SwiGLU or mixture of experts, and what they are; None for other kinds.

        The tensors are views that live as long as `packed`.
        """

    def map_packed(self, entry: PackedEntry, tensors: list[Tensor], copied: bool = False) -> Any:
        """The packed object whose bytes lie in `tensors`, which are used in place and kept alive.

        copied  the bytes are copied into huge pages instead, and the tensors are not kept
        """

    # ---- decoder ---------------------------------------------------------------------------------------------------
    def embedding(self, token_ids: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
        """out[n] = table[token_ids[n]].  token_ids [N] int32, table [V, C] -> [N, C].

        An id outside 0..V-1 is a ShapeError.
        """

    def linear(
        self,
        x: Tensor,
        weight: Any,
        activation: Activation | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """out = activation(x @ weight.T + bias) + residual.  x [N, C] (rows may be strided) -> [N, O].

        Accumulated in float32, rounded once. gelu is the exact erf form, quick_gelu x*sigmoid(1.702x).
        residual [N, O] in x's dtype; `out` may be `residual`. out_dtype float32 gives unrounded sums (logits).
        """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """out = x / sqrt(mean(x^2, last axis) + eps) * weight.  x [N, C], weight [C]; `out` may be `x`."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """out = (x - mean) / sqrt(var + eps) * weight + bias, biased variance.  x [..., C]; `out` may be `x`."""

    def qk_norm_rope_store(
        self,
        qkv: Tensor,
        positions: Tensor,
        slots: Tensor,
        rope: RopeTable,
        keys: Tensor,
        values: Tensor,
        num_heads: int,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
        out: Tensor | None = None,
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
    ) -> Tensor:
        """Optional RMSNorm of each q and k head, rotate-half RoPE on both, then k and v go to the paged cache.

        qkv [N, (H+2K)*D] laid out q | k | v; positions, slots [N] int32; keys, values [num_blocks, block_size, K, D]
        in qkv's dtype are written in place at slot = block*block_size + offset. Rotation: pairs (i, i+D/2),
        out_i = x_i cos_i - x_{i+D/2} sin_i; out_{i+D/2} = x_{i+D/2} cos_i + x_i sin_i, in float32.
        Returns the rotated queries [N, H, D]. A slot or position outside its table is a ShapeError.

        How the elements of a block are arranged in keys[block] and values[block] is the backend's own matter: only its
        paged_attention reads them. Blocks may be copied whole.

        With key_scales and value_scales [num_blocks, K, block_size] float32 the cache is int8: keys and values are
        uint8, as many bytes as elements, in the backend's own form. Each rotated key and each value row x [D] is
        stored as round(x * (127 / m)), m its largest magnitude, ties to even, with the scale m / 127; as zeros with
        the scale 0 if m < 1e-30, and with the scale NaN if it has a NaN or an infinity. A block's scales belong to it.
        """

    def paged_attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        block_tables: Tensor,
        query_starts: Tensor,
        context_lens: Tensor,
        scale: float,
        out: Tensor | None = None,
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
    ) -> Tensor:
        """Causal attention over the paged cache, prefill chunks and decodes in one call, GQA (H a multiple of K).

        q [N, H, D]; query row t of sequence s (of n_s rows) stands at position context_lens[s] - n_s + t and sees the
        keys at positions <= its own, found through block_tables[s]. softmax(q.k * scale) v -> [N, H, D].
        keys, values and scales are those that qk_norm_rope_store of the same backend filled. With an int8 cache the
        native backend rounds queries and softmax weights to 15 and 16 bits of their largest. triton rounds the weights
        of the softmax to q's dtype, as in window_attention.
        """

    def swiglu_ffn(self, x: Tensor, ffn: Any, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """out = down(silu(gate(x)) * up(x)) + residual.

        The product is rounded to x's dtype once. `out` may be `residual`.
        """

    def moe_routing(self, logits: Tensor, top_k: int, renormalize: bool, scale: float) -> Routing:
        """scores = softmax(logits [N, E] float32); the top_k largest, lowest id first among equals; see Routing."""

    def grouped_gemm(self, x: Tensor, moe: Any, routing: Routing) -> Tensor:
        """Routed experts only: y[n] = sum_j weights[n,j] * expert_{ids[n,j]}(x[n]), float32 [N, C].

        Experts are SwiGLU; terms are added in the order j = 0..k-1 (so a row does not depend on its neighbours).
        """

    def moe_ffn(
        self,
        x: Tensor,
        moe: Any,
        top_k: int,
        renormalize: bool,
        scale: float,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """out = routed experts(x) + shared(x) + residual, summed in float32, rounded once; `out` may be `residual`.

        Router logits are float32.
        """

    # ---- vision ----------------------------------------------------------------------------------------------------
    def patch_embed(self, pixels: Tensor, weight: Any, patch_size: int) -> Tensor:
        """Non-overlapping patches times weight.  pixels [B, 3, S, S]; weight from pack_patch_embed -> [B, g, g, C]."""

    def window_attention(
        self,
        qkv: Tensor,
        pad_qkv: Tensor,
        rel_h: Tensor,
        rel_w: Tensor,
        num_heads: int,
        window: int,
        out: Tensor | None = None,
    ) -> Tensor:
        """SAM attention with decomposed relative positions (ViTDet), in windows or over the whole grid (window 0).

        qkv [B, G, G, 3*C] laid out q | k | v, each C = num_heads*D. The grid is padded at bottom and right to a
        multiple of the window; a padded position has q|k|v = pad_qkv [3*C] (the qkv bias) and takes part unmasked.
        rel_h, rel_w [2*w-1, D] float32 tables (w = window, or G). logits = q.k/sqrt(D) + q.rel_h[i_q-i_k+w-1]
        + q.rel_w[j_q-j_k+w-1], q unscaled in both terms. In bfloat16 the weights of the softmax may be rounded to
        bfloat16 before they meet v (their sum is not). Returns [B, G, G, C].
        """

    def attention(self, qkv: Tensor, num_heads: int, out: Tensor | None = None) -> Tensor:
        """Bidirectional attention.  qkv [B, T, 3*C] laid out q | k | v, scale 1/sqrt(D) -> [B, T, C].

        In bfloat16 the weights of the softmax may be rounded, as in window_attention.
        """

    def conv_downsample(self, x: Tensor, neck: Any, eps: float) -> Tensor:
        """SAM neck and two stride-2 convolutions: conv1x1, LayerNorm over channels, conv3x3 pad 1, LayerNorm,
        conv3x3 stride 2 pad 1, conv3x3 stride 2 pad 1; no activation.  x [B, G, G, C] -> [B, G/4, G/4, F3]. In bfloat16
        the results of the norms and of the third convolution may be rounded on the way.
        """

    # ---- the next token --------------------------------------------------------------------------------------------
    def sample(self, logits: Tensor, cuts: Sequence[SamplingCut]) -> list[int]:
        """The next token of each row.  logits [N, V] float32, V >= 1, a cut a row; a row depends on its own cut alone.

        -1 where the row's largest logit is not finite (a NaN counts as largest). With temperature 0 the largest logit,
        the lowest id among equals. Else `uniform` inverts the cumulative distribution of softmax(row / temperature) cut
        to the top_k largest logits (the lowest ids among equals), then to the tokens of at least min_p times the
        largest probability, then to the fewest whose probabilities, renormalised after the cuts before, reach top_p.
        Candidates stand in falling order of probability, lowest id first among equals. Weights are
        exp((logit - largest) / temperature), the difference in float32, all else in float64.

        Backends add the weights in different orders: where uniform falls within some 1e-12 of a border between two
        candidates they may choose differently.
        """
