"""A backend for cases whose tensors lie on the host: arguments go to the device, what was written comes back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


class OnDevice:
    """Every op of `ops`, with host tensors. Views of one storage stay views of one storage on the device."""

    def __init__(self, ops: Any, device: torch.device) -> None:
        self.ops, self.device = ops, device

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.ops, name)
        if name.startswith("pack_"):  # these copy to the device themselves
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            copies: dict[int, tuple[Tensor, Tensor]] = {}  # storage on the host -> all of it, and its copy
            moved = [self.to_device(a, copies) for a in args], {k: self.to_device(v, copies) for k, v in kwargs.items()}
            result = function(*moved[0], **moved[1])
            for host, device in copies.values():
                host.copy_(device)
            return self.to_host(result)

        return call

    def to_device(self, value: Any, copies: dict[int, tuple[Tensor, Tensor]]) -> Any:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            key = storage.data_ptr()
            if key not in copies:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                copies[key] = whole, whole.clone().to(self.device)
            place = torch.empty(0, dtype=value.dtype, device=self.device)
            return place.set_(copies[key][1].untyped_storage(), value.storage_offset(), value.size(), value.stride())
        if dataclasses.is_dataclass(value) and any(isinstance(v, Tensor) for v in vars_of(value).values()):
            changed = {k: self.to_device(v, copies) for k, v in vars_of(value).items() if isinstance(v, Tensor)}
            if all(v.device.type == "cpu" for v in vars_of(value).values() if isinstance(v, Tensor)):
                return dataclasses.replace(value, **changed)  # a rope table, a routing
        return value

    def to_host(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.cpu()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            tensors = {k: v.cpu() for k, v in vars_of(value).items() if isinstance(v, Tensor)}
            return dataclasses.replace(value, **tensors)
        return value


def vars_of(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
