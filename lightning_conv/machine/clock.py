"""``now``: the time at which a device has done what it was given."""

from __future__ import annotations

import time

import torch


def now(device: torch.device) -> float:
    """Return a clock in seconds after all that was given to ``device`` is done; only differences mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
