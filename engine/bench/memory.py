"""Resident memory of this process: now, and at its peak."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes of this process in memory. `files` of them are pages of mapped files, which other processes may share."""

    total: int
    files: int

    def to_json(self) -> dict[str, int]:
        return {"total": self.total, "files": self.files}


class PeakMemory:
    """Peak resident memory of this process since the last `restart`, in bytes, where /proc tells; else None.

    Linux resets its high-water mark when 5 is written to clear_refs; where that is refused the peak is since the start.
    """

    def restart(self) -> None:
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")
        except OSError:
            return

    def read(self) -> int | None:
        return _status().get("VmHWM")


def read_resident() -> Resident | None:
    """What is in memory now; None where /proc does not tell."""
    status = _status()
    if "VmRSS" not in status:
        return None
    return Resident(status["VmRSS"], status.get("RssFile", 0))


def _status() -> dict[str, int]:
    """The sizes of /proc/self/status in bytes, by name."""
    sizes = {}
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if value.rstrip().endswith(" kB"):
                    sizes[name] = int(value.split()[0]) * 1024
    except OSError:
        pass
    return sizes


def shown(num_bytes: int | None) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes else ""


def shown_resident(resident: Resident | None) -> str:
    if resident is None:
        return ""
    return f"{shown(resident.total)} ({shown(resident.files) or '0'} of mapped files)"
