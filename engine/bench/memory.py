"""Peak resident memory of this process."""

from __future__ import annotations


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
        try:
            with open("/proc/self/status", encoding="ascii", errors="replace") as file:
                for line in file:
                    if line.startswith("VmHWM:"):
                        return int(line.split()[1]) * 1024
        except OSError:
            return None
        return None


def shown(num_bytes: int | None) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes else ""
