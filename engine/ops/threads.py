"""How many threads the native kernels use if the user does not say: one a physical core that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
MAX_THREADS = 256  # of the pool, csrc/common/thread_pool.h


def default_num_threads() -> int:
    """Physical cores among the CPUs this process may run on, at most its cgroup's quota. At least 1.

    Two hyperthreads share one core's vector units: a second kernel thread on it only takes turns.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_core_of(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota(), MAX_THREADS))


def _core_of(cpu: int) -> str:
    try:
        return (_TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> int:
    """Whole CPUs of the cgroup (v2) this process runs in; a large number if it has no limit or cannot be read."""
    try:
        quota, period = _QUOTA.read_text().split()
        return MAX_THREADS if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return MAX_THREADS
