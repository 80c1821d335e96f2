"""Worker: transformers on torch: a Qwen3, the text model of DeepSeek-OCR (`unlimited_ocr`), or its two encoders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as library
from safetensors import safe_open
from torch import Tensor, nn
from transformers.models.unlimited_ocr import configuration_unlimited_ocr as ocr_config
from transformers.models.unlimited_ocr import modeling_unlimited_ocr as ocr_model

from .protocol import serve
from .timing import time_once, time_steps

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
UNUSED = "model.vision_model.embeddings.patch_embedding.weight"  # this CLIP gets SAM's features instead of pixels
# DeepSeek-OCR's names to those of transformers' encoder.
RENAMES = (
    (r"^model\.sam_model\.blocks\.(\d+)\.norm([12])\.", r"sam_encoder.layers.\1.layer_norm\2."),
    (r"^model\.sam_model\.blocks\.", "sam_encoder.layers."),
    (r"^model\.sam_model\.neck\.0\.", "sam_encoder.neck.conv1."),
    (r"^model\.sam_model\.neck\.1\.", "sam_encoder.neck.layer_norm1."),
    (r"^model\.sam_model\.neck\.2\.", "sam_encoder.neck.conv2."),
    (r"^model\.sam_model\.neck\.3\.", "sam_encoder.neck.layer_norm2."),
    (r"^model\.sam_model\.net_2\.", "sam_encoder.proj.conv1."),
    (r"^model\.sam_model\.net_3\.", "sam_encoder.proj.conv2."),
    (r"^model\.sam_model\.patch_embed\.proj\.", "sam_encoder.patch_embed.projection."),
    (r"^model\.sam_model\.", "sam_encoder."),
    (r"^model\.vision_model\.transformer\.", "vision_encoder.encoder."),
    (r"^model\.vision_model\.", "vision_encoder."),
)


class TextModel:
    """A decoder with its head; the cache is cut back after each sample."""

    def __init__(self, body: nn.Module, head: nn.Module, vocab: int) -> None:
        self._body, self._head, self._vocab = body, head, vocab
        self._cache: Any = None

    def prepare(self, depth: int) -> None:
        """A cache of `depth` tokens: noise (its values cost no time), later cut back to it."""
        filled = 0 if self._cache is None else self._cache.get_seq_length()
        if depth and filled >= depth:
            if filled > depth:
                self._cache.crop(depth - filled)  # a negative number: so many tokens are removed
            return
        self._cache = library.DynamicCache()
        if depth:
            self.run(self._tokens(1))
            layers = [(layer.keys, layer.values) for layer in self._cache.layers]
            self._cache = library.DynamicCache()
            for i, (keys, _) in enumerate(layers):
                shape = (*keys.shape[:2], depth, keys.shape[3])
                self._cache.update(torch.randn(shape, dtype=keys.dtype), torch.randn(shape, dtype=keys.dtype), i)

    def run(self, ids: Tensor) -> Tensor:
        """Logits [V] of the last of new tokens."""
        output = self._body(ids, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        return self._head(output.last_hidden_state[:, -1])[0]

    def decode_random(self, count: int) -> None:
        self.run(self._tokens(count))

    def logits(self, ids: list[int]) -> np.ndarray:
        hidden = self._body(torch.tensor([ids])).last_hidden_state
        return self._head(hidden)[0].float().numpy()

    def _tokens(self, count: int) -> Tensor:
        return torch.randint(0, self._vocab, (1, count))


def load_qwen3(folder: str, dtype: torch.dtype) -> TextModel:
    model = library.Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    return TextModel(model.model, model.lm_head, model.config.vocab_size)


def make_ocr_text(dtype: torch.dtype) -> TextModel:
    """Its random weights are noise of its own: for speed only."""
    config = ocr_config.UnlimitedOcrTextConfig(sliding_window=100_000)
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        body = ocr_model.UnlimitedOcrTextModel(config)
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    # Rotary frequencies are no weights: that module is made as usual.
    body.to_empty(device="cpu")
    head.to_empty(device="cpu")
    body.rotary_emb = type(body.rotary_emb)(config)
    pool = torch.randn(1 << 22, dtype=torch.float32).to(dtype)
    for module in (body, head):
        for name, values in module.named_parameters():
            fill(name, values.data, pool)
    return TextModel(body.eval(), head.eval(), config.vocab_size)


def fill(name: str, values: Tensor, pool: Tensor) -> None:
    """Norms are 1, matrices noise of 1/sqrt(inputs) that repeats the pool."""
    flat = values.view(-1)
    if values.ndim == 1:
        flat.fill_(1.0 if "norm" in name else 0.0)
        return
    for start in range(0, flat.numel(), pool.numel()):
        piece = flat[start : start + pool.numel()]
        torch.mul(pool[: piece.numel()], values.shape[-1] ** -0.5, out=piece)


class Encoder:
    """SAM, CLIP and projector with a checkpoint's weights."""

    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        config = ocr_config.UnlimitedOcrVisionConfig()
        for part in (config, config.sam_config, config.encoder_config):
            part._attn_implementation = "sdpa"
        torch.set_default_dtype(dtype)
        self._tower = ocr_model.UnlimitedOcrVisionModel(config).eval()
        state, projector = read_encoder(Path(folder))
        missing = self._tower.load_state_dict({name: value.to(dtype) for name, value in state.items()}, strict=False)
        # Position indices are made by the model itself; every weight must come from the file.
        absent = [name for name in missing.missing_keys if name in dict(self._tower.named_parameters())]
        if absent or missing.unexpected_keys:
            raise RuntimeError(f"weights do not fit: missing {absent[:3]}, unexpected {missing.unexpected_keys[:3]}")
        self._weight, self._bias = (projector[name].to(dtype) for name in ("weight", "bias"))
        self._dtype = dtype

    def encode(self, pixels: np.ndarray) -> Tensor:
        """pixels [1, 3, S, S] -> features [rows, C]."""
        rows = self._tower(torch.from_numpy(pixels).to(self._dtype)).last_hidden_state
        return nn.functional.linear(rows, self._weight, self._bias)[0]


def read_encoder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's tensors under transformers' names (CLIP's q, k and v apart), and the projector's."""
    state: dict[str, Tensor] = {}
    projector: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                if name == UNUSED:
                    continue
                if name.startswith("model.projector.layers."):
                    projector[name.rpartition(".")[2]] = file.get_tensor(name)
                elif name.startswith(("model.sam_model.", "model.vision_model.")):
                    state.update(split_qkv(rename(name), file.get_tensor(name)))
    return state, projector


def rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def split_qkv(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if not name.startswith("vision_encoder.") or ".qkv_proj." not in name:
        return {name: tensor}
    return {name.replace("qkv_proj", f"{part}_proj"): piece for part, piece in zip("qkv", tensor.chunk(3))}


class Transformers:
    """spec: kind ("qwen3", "ocr-text" or "encoder"), model (a folder; not for "ocr-text"), dtype, threads."""

    def __init__(self, spec: dict[str, Any]) -> None:
        torch.set_num_threads(spec["threads"])
        torch.set_grad_enabled(False)
        self._dtype = spec["dtype"]
        dtype, kind = DTYPES[self._dtype], spec["kind"]
        self._text: TextModel | None = None
        self._encoder: Encoder | None = None
        if kind == "qwen3":
            self._text = load_qwen3(spec["model"], dtype)
        elif kind == "ocr-text":
            self._text = make_ocr_text(dtype)
        elif kind == "encoder":
            self._encoder = Encoder(spec["model"], dtype)
        else:
            raise ValueError(f"unknown kind {kind!r}")

    def describe(self) -> dict[str, Any]:
        return {
            "engine": f"transformers {library.__version__}",
            "settings": f"torch {torch.__version__}, {self._dtype}, sdpa",
        }

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """As ours.py."""
        op = request["op"]
        if self._encoder is not None:
            if op != "encode":
                raise ValueError(f"an encoder has no op {op!r}")
            return encode(self._encoder, request)
        text = self._text
        if text is None:
            raise ValueError("no model")
        if op == "prepare":
            text.prepare(request["depth"])
            return {}
        if op == "decode":
            text.prepare(request["depth"])
            return {"seconds": time_steps(lambda: text.decode_random(1), request["steps"])}
        if op == "prefill":
            text.prepare(0)
            return {"seconds": time_once(lambda: text.decode_random(request["tokens"]))}
        if op == "logits":
            np.save(request["file"], text.logits(request["ids"]))
            return {}
        raise ValueError(f"unknown op {op!r}")


def encode(encoder: Encoder, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one view; its features go to request["file"] if there is one."""
    pixels, results = np.load(request["pixels"]), []
    seconds = time_once(lambda: results.append(encoder.encode(pixels)))
    if request.get("file"):
        np.save(request["file"], results[0].float().numpy())
    return {"seconds": seconds}


if __name__ == "__main__":
    serve(Transformers)
