"""The machine on which results are measured."""

import platform
from pathlib import Path


def processor() -> str:
    """Return the name of the CPU, as far as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
