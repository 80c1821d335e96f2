"""Frozen, typed configuration: what the user asks of the engine, and what a checkpoint says of its model.

Reading config.json into these classes is the job of loading/checkpoint.py; nothing here opens a file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Literal

from .errors import ConfigError

DType = Literal["float32", "bfloat16"]
BACKEND_VARIABLE = "PAGELENS_BACKEND"
Backend = Literal["auto", "reference", "native", "triton", "cuda", "cuda-sim"]
BACKENDS = ("auto", "reference", "native", "triton", "cuda", "cuda-sim")
ON_A_DEVICE = ("auto", "triton", "cuda")
WITHOUT_INT8_CACHE = ("triton", "cuda", "cuda-sim")
CUDA_OPS = ("window_attention", "conv_downsample", "qk_norm_rope_store", "paged_attention", "moe_ffn")
MAX_SIDE = 20_000  # pixels of a page that is asked for by its size
MAX_TILES = 32  # most tiles of a page; no published model was trained on more

# Buffers of these sizes are made with the engine; far above what is useful, far below what no machine holds.
MAX_OPTIONS = {"max_num_seqs": 4096, "max_batch_tokens": 2**18, "block_size": 4096}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """User options of an engine. `resolve()` checks them once; nothing mutates them afterwards.

    dtype             "auto" is the checkpoint's; "float16" needs device "cuda" or backend "triton"
    device            "cuda" (NVIDIA, or AMD with a ROCm build of torch) keeps weights, cache and activations there
    backend           "auto" is "native" with what it lacks from "reference" on the CPU; on a GPU "triton", and the CUDA
                      C++ kernels, if they are built, for the ops in which docs/gpu-kernels.md prefers them; "cuda" has
                      them all. The variable PAGELENS_BACKEND stands in for "auto". "triton" on the CPU is interpreted,
                      "cuda-sim" runs the CUDA C++ kernels there: for tests
    cuda_ops          the ops that run on CUDA C++ kernels instead: names out of CUDA_OPS with commas, "all" or "none";
                      None is the variable PAGELENS_CUDA_OPS, and without it the backend's choice
    max_model_len     longest prompt + answer in tokens; None = the model's own limit
    max_num_seqs      most sequences decoded together
    max_batch_tokens  most tokens in one forward pass; longer prompts are cut into chunks of this size
    kv_cache_bytes    size of the paged KV-cache; None = room for max_num_seqs sequences, at most 1 GiB
    block_size        tokens a KV block
    kv_cache_dtype    "auto" keeps keys and values in the dtype of the activations; "int8" rounds each head's row to
                      int8 with a float32 scale, which takes about half of the memory and of the reading; not with
                      backend "triton"
    weights           "auto" takes them as the checkpoint has them; "int8" (a scale a row) and "int4" (a scale for 32
                      inputs; the output head and the vision towers int8) quantise linear layers as they are read, and
                      round their inputs to int8 (a scale for 64, with int4 for 32 of them); "int4-pure" is "int4"
                      with the output head in int4, too
    prefix_cache      find the blocks of earlier prompts and answers again instead of computing them
    use_mmap          use the weights of a packed folder where they are mapped (starts at once, holds what was read);
                      False copies them into huge pages first (decodes faster). Others are always converted
    low_memory        free the vision towers when the images of a pass are encoded, load them again when the next
                      page comes, and encode the tiles of a page one by one
    random_weights    build the model of a preset or of a folder's config.json with random weights instead of reading
                      them, to measure speed and memory; an integer is the seed, True the seed 1
    """

    model: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    backend: Backend = "auto"
    cuda_ops: str | None = None
    weights: Literal["auto", "int8", "int4", "int4-pure"] = "auto"
    num_threads: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_batch_tokens: int = 2048
    kv_cache_bytes: int | None = None
    block_size: int = 16
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    check_blocks: bool = False
    random_weights: bool | int = False
    prefix_cache: bool = True
    use_mmap: bool = True
    low_memory: bool = False

    def resolve(self) -> EngineConfig:
        """Return self after checking every value, with the backend that PAGELENS_BACKEND names if it is "auto".

        Raises ConfigError naming the option, its value and the choices.
        """
        choices = {
            "dtype": ("auto", "float32", "bfloat16", "float16"),
            "device": ("cpu", "cuda"),
            "backend": BACKENDS,
            "weights": ("auto", "int8", "int4", "int4-pure"),
            "kv_cache_dtype": ("auto", "int8"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in ("num_threads", "max_model_len", "kv_cache_bytes"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}={value!r} must be None or a positive integer")
        for name, most in MAX_OPTIONS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(f"{name}={value!r} must be a positive integer of at most {most}")
        if not isinstance(self.random_weights, int) or not 0 <= self.random_weights < 2**63:
            raise ConfigError(
                f"random_weights={self.random_weights!r} must be True, False or a seed from 0 to 2^63 - 1"
            )
        for name in ("prefix_cache", "use_mmap", "low_memory"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.cuda_ops is not None:
            parse_cuda_ops(self.cuda_ops, "cuda_ops")
        return self._with_backend()

    def _with_backend(self) -> EngineConfig:
        """The backend that will run, checked against the device, the dtype and the cache."""
        backend = self.backend
        if backend == "auto":
            named = os.environ.get(BACKEND_VARIABLE, "auto")
            if named not in BACKENDS:
                raise ConfigError(f"{BACKEND_VARIABLE}={named!r} is not one of {', '.join(BACKENDS)}")
            backend = named  # type: ignore[assignment]
        if self.device == "cuda" and backend not in ON_A_DEVICE:
            raise ConfigError(f"backend={backend!r} runs on the CPU; with device='cuda' use 'triton', 'cuda' or 'auto'")
        if self.device == "cpu" and backend == "cuda":
            raise ConfigError("backend='cuda' needs device='cuda'; 'cuda-sim' runs its kernels on a CPU, for tests")
        if self.dtype == "float16" and self.device == "cpu" and backend != "triton":
            raise ConfigError("dtype='float16' needs backend='triton', for device='cuda'; use 'bfloat16' or 'float32'")
        if self.kv_cache_dtype == "int8" and (self.device == "cuda" or backend in WITHOUT_INT8_CACHE):
            asked = "device='cuda'" if self.device == "cuda" else f"backend={backend!r}"
            raise ConfigError(
                f"kv_cache_dtype='int8' does not go with {asked}: the GPU kernels read a cache in the dtype of the "
                "activations only; use kv_cache_dtype='auto', or device='cpu' with backend='native'"
            )
        return replace(self, backend=backend)

    def with_options(self, **options: object) -> EngineConfig:
        return replace(self, **options)  # type: ignore[arg-type]


def parse_cuda_ops(value: str, name: str) -> tuple[str, ...]:
    """ "all", "none", or names out of CUDA_OPS with commas. Raises ConfigError naming the option or variable."""
    if value in ("all", "none"):
        return CUDA_OPS if value == "all" else ()
    names = tuple(part.strip() for part in value.split(","))
    unknown = next((part for part in names if part not in CUDA_OPS), None)
    if unknown is not None:
        raise ConfigError(f"{name}={value!r}: {unknown!r} is not one of {', '.join(CUDA_OPS)}; or say 'all' or 'none'")
    return names


@dataclass(frozen=True, slots=True)
class SamConfig:
    """SAM-style tower: windowed and global attention, neck, two stride-2 convolutions. Defaults: DeepSeek-OCR."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    window_size: int = 14
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    image_size: int = 1024
    patch_size: int = 16
    mlp_ratio: float = 4.0
    out_channels: int = 256
    downsample_channels: tuple[int, int] = (512, 1024)
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """CLIP-L tower that receives SAM features instead of pixels. Defaults: DeepSeek-OCR."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Mixture-of-experts feed-forward: top_k of num_experts by softmax score, plus an optional shared expert."""

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    renormalize: bool = False
    routed_scale: float = 1.0
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class YarnConfig:
    """Static YaRN: slow rotations are divided by `factor`, and cos and sin multiplied by `attention_factor`."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Decoder shared by all families: GQA, optional QK-norm, dense or MoE feed-forward, rotate-half RoPE.

    bos_token_id  put before every string prompt; None where tokenizer.json says what goes there
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    moe: MoeConfig | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 8192
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    yarn: YarnConfig | None = None


@dataclass(frozen=True, slots=True)
class ProcessorConfig:
    """How pages become views. `scaled` is True when the checkpoint carries its own sizes (a scaled model)."""

    base_size: int = 1024
    image_size: int = 640
    crop_mode: bool = True
    min_crops: int = 2
    max_crops: int = 9
    modes: tuple[str, ...] | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    scaled: bool = False


@dataclass(frozen=True, slots=True)
class DeepseekOcrConfig:
    """A whole DeepSeek-OCR checkpoint: two vision towers, a projector, a decoder, the page processor."""

    sam: SamConfig
    clip: ClipConfig
    decoder: DecoderConfig
    processor: ProcessorConfig
    image_token_id: int | None = None
    torch_dtype: DType = "bfloat16"
    model_type: str = "deepseek_vl_v2"


@dataclass(frozen=True, slots=True)
class TextModelConfig:
    """A checkpoint that reads and writes text only: Qwen3, Qwen3-MoE, Llama."""

    decoder: DecoderConfig
    torch_dtype: DType = "bfloat16"
    model_type: str = "qwen3"


def parse_size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT as integers. Raises ConfigError."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise ConfigError(f"--size must be WIDTHxHEIGHT in pixels, such as 1240x1754; got {text!r}") from None
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise ConfigError(f"--size {text}: both sides must be between 1 and {MAX_SIDE} pixels")
    return width, height
