"""The vision half of the adapter of the CUDA kernels, and the checks that both halves share; see cuda.py."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .cuda_packing import aligned, taps_first, two_parts
from .reference import refuse
from .reference_vision import PackedConvDownsample

VISION_HEAD_DIMS = (16, 32, 64, 80)
MAX_WINDOW = 128
CONV_ORDER = (  # of the weights in kernels.h
    "conv1",
    "norm1_weight",
    "norm1_bias",
    "conv2",
    "norm2_weight",
    "norm2_bias",
    "down1",
    "down2",
)


class CudaVision:
    """The vision ops of the contract that have a CUDA kernel."""

    kernels: ModuleType
    device: torch.device

    def _stream(self) -> int:
        """The current stream. A launch goes to the thread's current device, so that must be the kernels' own."""
        if self.device.type != "cuda":
            return 0
        current = torch.cuda.current_device()
        if self.device.index not in (None, current):
            raise UnsupportedError(
                f"the CUDA kernels run on {self.device}, and this thread's current device is cuda:{current}; call them "
                f"within torch.cuda.device({self.device.index})"
            )
        return torch.cuda.current_stream(self.device).cuda_stream

    def _is_here(self, x: Tensor) -> bool:
        return x.device.type == self.device.type and (self.device.index is None or x.device == self.device)

    def _dense(self, op: str, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """The kernels get an address: what lies there must be what they think it is."""
        if tuple(x.shape) != shape or x.dtype != dtype or not x.is_contiguous() or not self._is_here(x):
            kind = str(dtype).removeprefix("torch.")
            refuse(op, f"{name} must be contiguous {list(shape)} {kind} on {self.device}, not on {x.device}", x)

    def _pairs(self, op: str, **tensors: Tensor) -> None:
        """The kernels read and write two bfloat16 at once; off that step a card stops with a misaligned address."""
        for name, x in tensors.items():
            if x.data_ptr() % 4:
                refuse(op, f"{name} must start at a multiple of 4 bytes", x)

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
        op = "window_attention"
        views, grid, _, width = qkv.shape
        size, head_dim = window or grid, width // (3 * num_heads)
        if head_dim not in VISION_HEAD_DIMS or not 1 <= size <= MAX_WINDOW:
            refuse(op, f"head_dim must be one of {VISION_HEAD_DIMS}, windows up to {MAX_WINDOW}", qkv)
        self._dense(op, "qkv", qkv, (views, grid, grid, 3 * num_heads * head_dim), torch.bfloat16)
        qkv, pad_qkv = aligned(qkv), aligned(pad_qkv.to(qkv.dtype))
        self._dense(op, "pad_qkv", pad_qkv, (width,), torch.bfloat16)
        tables = [aligned(part) for table in (rel_h, rel_w) for part in two_parts(table)]
        for table in tables:
            self._dense(op, "a table", table, (2 * size - 1, head_dim), torch.bfloat16)
        shape = (views, grid, grid, width // 3)
        if out is None:
            out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
        self._dense(op, "out", out, shape, torch.bfloat16)
        self._pairs(op, out=out)
        if not views:
            return out
        self.kernels.window_attention(
            qkv.data_ptr(),
            pad_qkv.data_ptr(),
            *(table.data_ptr() for table in tables),
            views=views,
            grid=grid,
            size=size,
            across=-(-grid // size),
            heads=num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            out=out.data_ptr(),
            stream=self._stream(),
        )
        return out

    def pack_conv_downsample(self, weights: dict[str, Tensor]) -> PackedConvDownsample:
        """The 3x3 kernels [F, C, 3, 3] become [F, 9 * C], the channels of a tap together; the rest stays."""
        flat = {name: taps_first(w) if w.ndim == 4 else w.contiguous() for name, w in weights.items()}
        return PackedConvDownsample(**{name: aligned(w.to(self.device)) for name, w in flat.items()})

    def conv_downsample(self, x: Tensor, neck: PackedConvDownsample, eps: float) -> Tensor:
        op = "conv_downsample"
        parts = [getattr(neck, name) for name in CONV_ORDER]
        views, side, _, width = x.shape
        channels, down1, down2 = (w.shape[0] for w in (neck.conv1, neck.down1, neck.down2))
        if any(size % 8 for size in (width, channels, down1)):
            refuse(op, "channels must be multiples of 8", x, neck.conv2)
        self._dense(op, "x", x, (views, side, side, neck.conv1.shape[1]), torch.bfloat16)
        for part in parts:
            self._dense(op, "a weight", part, tuple(part.shape), torch.bfloat16)
        x = aligned(x)
        half, quarter = (side + 1) // 2, ((side + 1) // 2 + 1) // 2
        sums = torch.empty(views, side, side, channels, device=x.device)
        made = [(side, channels), (half, down1), (quarter, down2)]
        maps = [torch.empty(views, s, s, c, dtype=x.dtype, device=x.device) for s, c in made]
        self.kernels.conv_downsample(
            x.data_ptr(),
            views,
            side,
            width,
            channels,
            down1,
            down2,
            [w.data_ptr() for w in parts],
            eps,
            sums.data_ptr(),
            *(m.data_ptr() for m in maps),
            self._stream(),
        )
        return maps[-1]
