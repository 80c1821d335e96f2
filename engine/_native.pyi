"""Types of the extension built from csrc/bindings*.cpp. Addresses are Tensor.data_ptr(); 0 stands for none."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# (address, rows, columns, row stride in elements, 0 float32 | 1 bfloat16)
Matrix = tuple[int, int, int, int, int]
# (keys, values, key scales, value scales, num_blocks, block_size, num_kv_heads, head_dim): a layer of the KV-cache; the
# scales are 0 unless it is an int8 cache
Cache = tuple[int, int, int, int, int, int, int, int]

class ThreadPool:
    def __init__(self, num_threads: int) -> None: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def scratch_bytes(self) -> int: ...
    def close(self) -> None: ...

class Program:
    """Calls of ops on one pool, made again by `replay`: -1, or the index of the call that found a bad row."""

    def __init__(self, pool: ThreadPool) -> None: ...
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def replay(self) -> int: ...
    def timed_replay(self) -> list[float]:
        """What `replay` does; seconds of each call that was made."""

    @property
    def num_calls(self) -> int: ...

# (n, k, dtype, has_bias, format, activation, scale_dtype, group_size, has_zeros, has_order, activation_group):
# LinearShape in pack.h
Shape = tuple[int, int, int, bool, int, int, int, int, bool, bool, int]
# (weight, scales, zeros) of a matrix or of gate and up, their rows, order of the inputs, bias and its dtype
Parts = tuple[int, int, int]
Content = tuple[Parts, Parts, int, int, int, int]

class Linear:
    @property
    def num_bytes(self) -> int: ...
    @property
    def address(self) -> int: ...

class Swiglu:
    @property
    def num_bytes(self) -> int: ...
    @property
    def address(self) -> int: ...

class Moe:
    @property
    def num_bytes(self) -> int: ...
    @property
    def address(self) -> int: ...

class CopiedWeights:
    """Bytes of packed weights in memory of their own, which goes with this object: what map_* takes."""

    @property
    def num_bytes(self) -> int: ...
    @property
    def address(self) -> int: ...

def isa() -> str: ...
def compiled_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def set_closed_error(type: type[BaseException]) -> None: ...
def resize_rgb_u8(src: npt.NDArray[np.uint8], dst_h: int, dst_w: int) -> npt.NDArray[np.uint8]: ...
def pack_linear(pool: ThreadPool, shape: Shape, content: Content, /) -> Linear: ...
def pack_swiglu(pool: ThreadPool, gate_up: Shape, up_content: Content, down: Shape, content: Content, /) -> Swiglu: ...
def new_moe(
    pool: ThreadPool, router: int, count: int, gate_up: Shape, down: Shape, shared: Swiglu | None, /
) -> Moe: ...
def fill_expert(pool: ThreadPool, layer: Moe, expert: int, gate_up: Content, down: Content, /) -> None: ...
def quantize(pool: ThreadPool, weight: Matrix, format: int, values: int, scales: int, /) -> int: ...
def map_linear(shape: Shape, address: int, num_bytes: int, /) -> Linear: ...
def map_swiglu(gate_up: Shape, down: Shape, address: int, num_bytes: int, /) -> Swiglu: ...
def map_moe(count: int, gate_up: Shape, down: Shape, shared: Swiglu | None, address: int, num_bytes: int, /) -> Moe: ...
def copy_weights(pool: ThreadPool, address: int, num_bytes: int, /) -> CopiedWeights:
    """Copy a packed tensor into huge pages, with all threads. Raises MemoryError."""

def embedding(pool: ThreadPool, ids: int, table: Matrix, out: Matrix, /) -> int: ...
def rms_norm(pool: ThreadPool, x: Matrix, weight: int, eps: float, out: Matrix, /) -> None: ...
def layer_norm(pool: ThreadPool, x: Matrix, weight: int, bias: int, eps: float, out: Matrix, /) -> None: ...
def qk_norm_rope_store(
    pool: ThreadPool,
    qkv: Matrix,
    positions: int,
    slots: int,
    cos: int,
    sin: int,
    num_positions: int,
    cache: Cache,
    num_heads: int,
    q_norm: int,
    k_norm: int,
    eps: float,
    out: Matrix,
    /,
) -> int: ...
def paged_attention(
    pool: ThreadPool,
    q: Matrix,
    cache: Cache,
    num_heads: int,
    block_tables: int,
    max_blocks: int,
    query_starts: int,
    context_lens: int,
    num_sequences: int,
    scale: float,
    out: Matrix,
    /,
) -> int: ...
def window_attention(
    pool: ThreadPool,
    qkv: Matrix,
    batch: int,
    grid_rows: int,
    grid_cols: int,
    window_rows: int,
    window_cols: int,
    num_heads: int,
    head_dim: int,
    pad: int,
    rel_h: int,
    rel_w: int,
    out: Matrix,
    /,
) -> None: ...
def patch_embed(
    pool: ThreadPool,
    pixels: int,
    batch: int,
    channels: int,
    height: int,
    width: int,
    patch: int,
    weight: Linear,
    out: Matrix,
    /,
) -> None: ...
def conv_downsample(
    pool: ThreadPool,
    x: Matrix,
    batch: int,
    grid: int,
    conv1: Linear,
    conv2: Linear,
    down1: Linear,
    down2: Linear,
    norms: tuple[int, int, int, int],
    eps: float,
    out: Matrix,
    /,
) -> None: ...
def linear(pool: ThreadPool, x: Matrix, weight: Linear, activation: int, residual: Matrix, out: Matrix, /) -> None: ...
def swiglu_ffn(pool: ThreadPool, x: Matrix, ffn: Swiglu, residual: Matrix, out: Matrix, /) -> None: ...
def moe_routing(
    pool: ThreadPool,
    logits: Matrix,
    top_k: int,
    renormalize: bool,
    scale: float,
    expert_ids: int,
    weights: int,
    offsets: int,
    permutation: int,
    /,
) -> None: ...
def grouped_gemm(
    pool: ThreadPool,
    x: Matrix,
    moe: Moe,
    top_k: int,
    expert_ids: int,
    offsets: int,
    permutation: int,
    weights: int,
    out: Matrix,
    /,
) -> int: ...
def moe_ffn(
    pool: ThreadPool,
    x: Matrix,
    moe: Moe,
    top_k: int,
    renormalize: bool,
    scale: float,
    residual: Matrix,
    out: Matrix,
    /,
) -> None: ...

# ---- probes: what the machine gives at this moment, on all threads of the pool
def probe_bandwidth(pool: ThreadPool, num_bytes: int = 2**30, repeats: int = 3) -> list[float]:
    """Bytes a second of reading `num_bytes` (rounded up to MiB; far more than the caches hold) once, `repeats` times.

    Each thread reads one linear stream in huge pages, as decoding reads weights. The memory is freed afterwards.
    Raises ValueError outside 2^20..2^40 bytes and 1..10000 repeats, MemoryError if there is no such memory.
    """

def read_weights(pool: ThreadPool, weights: Linear | Swiglu, /) -> None:
    """Read packed weights as `probe_bandwidth` reads its memory, and do nothing with them; a Program records it."""

def probe_flops(pool: ThreadPool, kind: str, seconds: float = 0.1, repeats: int = 3) -> list[float]:
    """Operations a second (a multiplication and an addition are two) of about `seconds` in registers, `repeats` times.

    kind  "float32": FMA; "bfloat16": VDPBF16PS, and FMA on sets without it; "int8": VPDPBUSD, without VNNI 16-bit
          products and additions. That is, the instruction that the kernels of the instruction set in use multiply with.
    Raises ValueError for another kind, and outside 0..60 seconds and 1..10000 repeats.
    """

def sample(pool: ThreadPool, logits: Matrix, cuts: int, tokens: int, /) -> int: ...
