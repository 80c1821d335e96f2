"""How far answers are from float32: the figures that stand beside the speeds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def mean_kl(reference: Array, logits: Array) -> float:
    """Mean over rows [N, V] of KL(softmax(reference) || softmax(logits)), in nats, computed in float64."""
    if reference.shape != logits.shape or reference.ndim != 2:
        raise ValueError(f"logits must both be [N, V], got {reference.shape} and {logits.shape}")
    p, q = (log_softmax(rows.astype(np.float64)) for rows in (reference, logits))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def log_softmax(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = rows - rows.max(axis=1, keepdims=True)
    logs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logs


def cosine(reference: Array, features: Array) -> float:
    """Cosine of the angle between two sets of features, taken as one vector each, in float64."""
    if reference.shape != features.shape:
        raise ValueError(f"features must have one shape, got {reference.shape} and {features.shape}")
    a, b = reference.astype(np.float64).ravel(), features.astype(np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
