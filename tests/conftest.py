"""What every test shares: two threads, a fixed seed and no display."""

import os

# Set before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give each test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
