"""Measure the memory of each process for the kernel of a sharded module; write docs/results/sharded.md and .json.

`python benchmarks/sharded.py` measures the module in one process, and sharded by `fully_shard` among 2 and 4 processes (gloo, one thread
each), and beside the kernel a forward and a backward pass as in training. `--quick` takes a tiny module, and `--out FOLDER` another folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from ntk_bench.calibration import processor
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from lightning_conv import ntk_gram
from lightning_conv.reporting.markdown import markdown_table

FOLDER = Path(__file__).parent.parent / "docs" / "results"
RUNS = (1, True), (2, True), (4, True), (1, False), (2, False)
"""Processes, and whether the allocator returns freed memory to the system at once."""
SAMPLES, OUTPUTS = 16, 4
SIZES = {"width": 2048, "depth": 18}
QUICK = {"width": 64, "depth": 3}
RETURNS = {"MALLOC_TRIM_THRESHOLD_": "0"}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one process of several took."""

    world: int
    rank: int
    returned: bool  # whether freed memory is returned to the system at once
    parameter_bytes: int  # of the whole module
    held_bytes: int  # resident memory with the module, above that before it was made
    training_bytes: int  # most of it during a forward and a backward pass
    peak_bytes: int  # most of it while the kernel was computed, in another process
    processor_seconds: float
    difference: float  # largest entry of the difference to the kernel of one process, relative to its largest entry


class Residual(nn.Module):
    """A hidden layer with a skip connection, which keeps signals and gradients of their size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """Add half of the layer's output."""
        return x + 0.5 * torch.tanh(self.linear(x))


def make_module(width: int, depth: int, world: int) -> nn.Module:
    """Return the module, of which a process of several never has more than one whole layer while it is made."""
    module = nn.Sequential(*[Residual(width) for _ in range(depth)], nn.Linear(width, OUTPUTS, device="meta"))
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for each in module:
            fully_shard(each, mesh=mesh)
        fully_shard(module, mesh=mesh)
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator).mul_(width**-0.5)
            parameter.copy_(
                distribute_tensor(drawn, parameter.device_mesh, parameter.placements) if world > 1 else drawn
            )
    return module


def measure(rank: int, world: int, folder: Path, sizes: dict[str, int], *, trains: bool) -> None:
    """Write what this process takes for its part, and the kernel, to a file of its rank."""
    torch.set_num_threads(1)
    if world > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    ntk_gram(nn.Linear(8, 2), torch.randn(3, 8))  # loads what is loaded once
    before = _resident("VmRSS")
    module = make_module(**sizes, world=world)
    inputs = torch.randn(SAMPLES, sizes["width"], generator=torch.Generator().manual_seed(1))
    held = _resident("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")
    begun, matrix = time.process_time(), torch.empty(0)
    if trains:
        module(inputs).square().sum().backward()
    else:
        matrix = ntk_gram(module, inputs, outputs="trace", precision="exact", max_memory=2**31).matrix
    seconds, peak = time.process_time() - begun, _resident("VmHWM") - before
    size = sum(each.numel() * each.element_size() for each in module.parameters())
    torch.save({"size": size, "held": held, "peak": peak, "seconds": seconds, "matrix": matrix}, folder / f"{rank}.pt")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def run(world: int, *, returned: bool, trains: bool, quick: bool) -> list[dict[str, Any]]:
    """Measure so many processes, each started anew."""
    with TemporaryDirectory() as folder:
        asked = [str(world), folder, *(["--trains"] if trains else []), *(["--quick"] if quick else [])]
        made = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", str(rank), *asked],
                env={**os.environ, **(RETURNS if returned else {}), "OMP_NUM_THREADS": "1"},
            )
            for rank in range(world)
        ]
        try:
            for each in made:
                if each.wait(timeout=550):
                    raise RuntimeError(f"a process of {world} has failed")
        finally:
            for each in made:
                each.kill()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(world)]


def measured(*, quick: bool) -> list[Measured]:
    """Measure all runs."""
    found, alone = [], torch.empty(0)
    for world, returned in RUNS:
        training = run(world, returned=returned, trains=True, quick=quick)
        for rank, kernel in enumerate(run(world, returned=returned, trains=False, quick=quick)):
            matrix = kernel["matrix"]
            alone = alone if alone.numel() else matrix
            found.append(
                Measured(
                    world=world,
                    rank=rank,
                    returned=returned,
                    parameter_bytes=kernel["size"],
                    held_bytes=kernel["held"],
                    training_bytes=training[rank]["peak"],
                    peak_bytes=kernel["peak"],
                    processor_seconds=kernel["seconds"],
                    difference=float((matrix - alone).abs().max() / alone.abs().max()),
                )
            )
    return found


def page(found: list[Measured]) -> str:
    """Return the page of the results."""

    def mebi(count: float) -> str:
        return f"{count / 2**20:.0f} MiB"

    rows = []
    for world, returned in RUNS:
        of = [each for each in found if (each.world, each.returned) == (world, returned)]
        rows.append(
            [
                "1, not sharded" if world == 1 else str(world),
                "at once" if returned else "as glibc does",
                mebi(max(each.held_bytes for each in of)),
                mebi(max(each.training_bytes for each in of)),
                mebi(max(each.peak_bytes for each in of)),
                f"{max(each.processor_seconds for each in of):.1f} s",
                f"{max(each.difference for each in of):.1e}",
            ]
        )
    head = [
        "processes",
        "memory is returned",
        "held before",
        "peak, training",
        "peak, kernel",
        "CPU time, kernel",
        "difference",
    ]
    return f"""# Memory of each process for a sharded module

The trace kernel of {SAMPLES} samples and {OUTPUTS} outputs of a module of {SIZES["depth"]} hidden layers of {SIZES["width"]} units, whose
parameters, {mebi(found[0].parameter_bytes)}, are most of what it takes: in one process, and divided by `fully_shard` (FSDP2) among
several on one machine (gloo, one thread each). How to: [sharded models](../how_to/sharded.md).

Made by `python benchmarks/sharded.py` on {date.today().isoformat()}, {processor()}, torch {torch.__version__}.

{markdown_table(head, rows)}

*Held before* is what the resident memory of a process rises by when the module is made, and *peak* the most that it rises
above the same point: during a forward and a backward pass as in training, and in other processes while
`ntk_gram(module, inputs, precision="exact", max_memory=2**31)` runs; of several processes the largest is shown. *Difference* is that of the
kernels, relative to the largest entry.

*At once* is `MALLOC_TRIM_THRESHOLD_=0`. Without that setting the allocator of glibc keeps blocks that FSDP has freed after a layer, in
training as for a kernel, so that a process of two takes more memory than one process alone. Set it where FSDP runs on processors.

One process compares its network with a copy in float64, which a sharded module does not have; the rounding is then estimated by noise of
its size. Each process of several makes all passes; only the parameters are divided, and gathered layer by layer. Other work on the machine
falls on the CPU times.
"""


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--rank", nargs=3, metavar=("RANK", "WORLD", "FOLDER"), help="(one process)")
    parser.add_argument("--trains", action="store_true", help="(one process)")
    arguments = parser.parse_args()
    if arguments.rank:
        rank, world, folder = int(arguments.rank[0]), int(arguments.rank[1]), Path(arguments.rank[2])
        measure(rank, world, folder, QUICK if arguments.quick else SIZES, trains=arguments.trains)
        os._exit(0)  # a process that others have left is not waited for
    found = measured(quick=arguments.quick)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "sharded.json").write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")
    (arguments.out / "sharded.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
