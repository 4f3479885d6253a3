"""``run``: a function on several processes of one gloo group, which end whatever happens."""

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

SECONDS = 150
"""After which processes that still run are killed."""


def _on_rank(rank, world, store, body, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.save(body(rank, world), f"{folder}/{rank}.pt")
    os._exit(0)  # a process that others have left is not waited for


def run(world, body, folder):
    """Return what a function of a test file has returned in each process; None: it failed there, or did not end."""
    context = torch.multiprocessing.get_context("spawn")
    made = [context.Process(target=_on_rank, args=(r, world, folder / "store", body, folder)) for r in range(world)]
    for each in made:
        each.start()
    latest = time.monotonic() + SECONDS
    for each in made:
        each.join(max(0.1, latest - time.monotonic()))
        if each.is_alive():
            each.kill()
    paths = [folder / f"{rank}.pt" for rank in range(world)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]
