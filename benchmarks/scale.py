"""Measure how a kernel is divided among processes: seconds of the processor of the slowest one; write docs/results/scale.md.

``python benchmarks/scale.py`` measures what is missing in docs/results/scale.json, case by case, and writes the page whenever one is done:
it can be stopped and goes on where it was.

    --cases NAME ...   these of the cases
    --worlds W ...     numbers of processes
    --rounds N         repetitions, of which the median counts
    --fresh            measure the chosen cases anew
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ntk_bench.calibration import processor
from torch import Tensor, nn

from lightning_conv import ntk_gram, plan_ntk
from lightning_conv.machine.processes import Processes
from lightning_conv.reporting.markdown import markdown_table

RESULTS = Path(__file__).parents[1] / "docs" / "results"
COLUMNS = (
    "kernel",
    "processes",
    "seconds of the processor, slowest",
    "of one process",
    "divided by",
    "MiB sent by each",
    "planned MiB",
)


def mlp(width: int, samples: int) -> tuple[nn.Module, Tensor]:
    """Return a perceptron of two hidden layers and its samples."""
    net = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return net, torch.randn(samples, 784)


def resnet(samples: int) -> tuple[nn.Module, Tensor]:
    """Return ResNet-18 and images of 32 x 32."""
    from torchvision.models import resnet18

    return resnet18(num_classes=10).eval(), torch.randn(samples, 3, 32, 32)


CASES: Mapping[str, tuple[Callable[[], tuple[nn.Module, Tensor]], dict[str, Any]]] = {
    "perceptron of width 1,024, trace, n = 1,000": (lambda: mlp(1024, 1000), {"outputs": "trace", "precision": "fast"}),
    "perceptron of width 1,024, sum, n = 4,000": (lambda: mlp(1024, 4000), {"outputs": "sum", "precision": "fast"}),
    "perceptron of width 512, trace in float64, n = 500": (
        lambda: mlp(512, 500),
        {"outputs": "trace", "precision": "certified"},
    ),
    "ResNet-18, trace, n = 64": (lambda: resnet(64), {"outputs": "trace", "precision": "fast"}),
    "ResNet-18, sum, n = 256": (lambda: resnet(256), {"outputs": "sum", "precision": "fast"}),
}


def on_rank(rank: int, world: int, folder: str, name: str, rounds: int) -> None:
    """Compute a kernel in one of the processes, which is read once before, and write down what it took."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=600)
    )
    processes = Processes(600) if world > 1 else None
    make, options = CASES[name]
    torch.manual_seed(0)
    model, inputs = make()
    plan = plan_ntk(model, inputs, **options)
    ntk_gram(model, inputs[: 4 * world], processes=processes, **options)  # loads what is loaded once
    found = []
    for _ in range(rounds):
        before, begun = 0 if processes is None else processes.sent, time.process_time()
        gram = ntk_gram(model, inputs, plan=plan, remeasure=True, processes=processes, **options)
        taken = time.process_time() - begun
        division = None if gram.plan is None else gram.plan.division
        found.append(
            {
                "seconds": taken,
                "sent": 0 if processes is None else processes.sent - before,
                "planned": 0 if division is None else division.sent,
                "by": "" if division is None else division.by,
                "trace": float(gram.matrix.trace()),
            }
        )
    Path(folder, f"{rank}.part").write_text(json.dumps(found))
    os.replace(f"{folder}/{rank}.part", f"{folder}/{rank}.json")
    dist.barrier()


def measured(name: str, world: int, rounds: int) -> list[list[dict[str, Any]]]:
    """Return what each process has written down."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_rank, (world, folder, name, rounds), nprocs=world)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


def slowest(ranks: Sequence[Sequence[Mapping[str, Any]]]) -> float:
    """Return the median over the repetitions of the seconds of the slowest process."""
    return statistics.median(max(each["seconds"] for each in turn) for turn in zip(*ranks, strict=True))


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page."""
    rows = []
    for name, of in results.items():
        alone = slowest(of["1"]) if "1" in of else None
        for world, ranks in sorted(of.items(), key=lambda each: int(each[0])):
            last = ranks[0][-1]
            sent = max(each[-1]["sent"] for each in ranks) / 2**20
            share = "" if alone is None else f"{slowest(ranks) / alone:.2f}"
            rows.append(
                (
                    name,
                    world,
                    f"{slowest(ranks):.2f}",
                    share,
                    last["by"],
                    f"{sent:.1f}",
                    f"{last['planned'] / 2**20:.1f}",
                )
            )
    return f"""# Kernels divided among processes

Seconds of the processor that the slowest of W processes takes for one kernel, `ntk_gram(..., plan=, remeasure=True, processes=)`, as a
monitor computes it after its first measurement; each process has one thread and computes on the same machine. A process waits for the
others without using the processor, so that these are the seconds of a machine with a core for each.
Made by `python benchmarks/scale.py` on {date.today()}, {processor()}, {os.cpu_count()} cores, torch {torch.__version__}.

{markdown_table(COLUMNS, rows)}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, print it, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--worlds", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "scale.json")
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(arguments)
    results: dict[str, dict[str, Any]] = json.loads(options.json.read_text()) if options.json.exists() else {}
    for number, name in enumerate(options.cases, 1):
        found = results.setdefault(name, {})
        if options.fresh:
            found.clear()
        for world in options.worlds:
            print(f"{number} of {len(options.cases)}, {name}, {world} processes", flush=True)
            if str(world) not in found:
                found[str(world)] = measured(name, world, options.rounds)
                options.json.write_text(json.dumps(results, indent=1))
            if options.json.parent == RESULTS:
                (RESULTS / "scale.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
