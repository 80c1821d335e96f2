"""moe_ffn: out = routed experts(x) + shared expert(x) + residual; composes moe_routing, grouped_gemm and linear.

    x [N, C] -> [N, C]; router logits, terms and their sum in float32, rounded once

The shared expert writes its result into the last slot of the terms, so that one `combine` adds everything. Launches:
logits 1 (plus one for each split over K), routing 1 for a decode and 2 for a prompt, experts 2, shared 2, combine 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grouped_gemm import Experts, combine, expert_terms
from .linear import linear
from .matrix import Matrix
from .moe_routing import moe_routing


def moe_ffn(
    x: Tensor,
    router: Matrix,
    experts: Experts,
    shared: tuple[Matrix, Matrix] | None,
    top_k: int,
    renormalize: bool,
    scale: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See the module. router in x's dtype or float32; shared: gate_up in turns, and down. `out` may be `residual`."""
    logits = linear(x.to(router.dtype), router, out_dtype=torch.float32)
    _, weights, offsets, permutation = moe_routing(logits, top_k, renormalize, scale)
    terms = expert_terms(x, experts, weights, offsets, permutation, extra=0 if shared is None else 1)
    if shared is not None:
        linear(linear(x, shared[0], "swiglu"), shared[1], out=terms[:, -1])
    return combine(terms, residual, torch.empty_like(x) if out is None else out)
