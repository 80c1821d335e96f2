"""Workloads run on tensors without data: what they would launch on a target."""

from __future__ import annotations

import torch

from pagelens.kernels.launch import Launch, replaced_runner
from pagelens.kernels.tuning import forced_target
from pagelens.kernels.workloads import Workload


def record(workload: Workload, target: str) -> list[Launch]:
    launches: list[Launch] = []
    with replaced_runner(launches.append), forced_target(target):
        workload.make(torch.device("meta"))()
    return launches
