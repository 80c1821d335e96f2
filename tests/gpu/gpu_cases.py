"""The shared cases as the GPU kernels run them: small ones in every dtype, and what their arithmetic allows."""

from __future__ import annotations

from dataclasses import fields, replace

from ops.cases import F16, F32, SMALL, UNIT, AttentionCase, Case, Int8AttentionCase, Int8RopeCase
from ops.quantized_cases import SMALL_QUANTIZED
from ops.vision_cases import SMALL_VISION


class RoundedAttentionCase(AttentionCase):
    """The weights of the softmax are rounded before they meet v, as in SequenceAttentionCase of vision_cases.py."""

    max_flips = 0.75

    def absolute(self) -> float:
        return super().absolute() + UNIT[self.dtype] / 2


def as_gpu_case(case: Case) -> Case:
    """The same case with the tolerance of the GPU kernels."""
    if isinstance(case, AttentionCase) and case.dtype != F32:
        return RoundedAttentionCase(**{field.name: getattr(case, field.name) for field in fields(case)})
    return case


def _in_float16(cases: list[Case]) -> list[Case]:
    """Every third of the float32 cases."""
    return [replace(case, dtype=F16) for case in [c for c in cases if c.dtype == F32][::3]]


NO_INT8_CACHE = (Int8AttentionCase, Int8RopeCase)  # which the kernels do not have
_ALL = [c for c in (*SMALL, *SMALL_QUANTIZED, *SMALL_VISION) if not isinstance(c, NO_INT8_CACHE)]
GPU_SMALL = [as_gpu_case(case) for case in [*_ALL, *_in_float16(_ALL)]]
