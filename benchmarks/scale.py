"""Measure what kernels and certificates take when they are divided among processes; write docs/results/scale.md.

``python benchmarks/scale.py`` measures what is missing in docs/results/scale.json, case by case, and writes the page whenever one is done:
it can be stopped and goes on where it was.

    --cases NAME ...   these of the cases
    --worlds W ...     numbers of processes
    --rounds N         repetitions, of which the fastest counts
    --fresh            measure the chosen cases anew
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from ntk_bench.calibration import processor
from torch import Tensor, nn

from lightning_conv import ntk_gram, plan_ntk
from lightning_conv.expressivity.stream import HeldRows
from lightning_conv.expressivity.streamed import certify_streamed
from lightning_conv.machine.processes import Processes
from lightning_conv.reporting.markdown import markdown_table

RESULTS = Path(__file__).parents[1] / "docs" / "results"
COLUMNS = (
    "what",
    "processes",
    "seconds of the processor, slowest",
    "of one process",
    "divided by",
    "MiB sent by each",
    "planned MiB",
)


Computation: TypeAlias = Callable[[], dict[str, Any]]
"""Computes once; returns how it was divided, the bytes that were planned to be sent, and a number that all agree on."""


def kernel(model: nn.Module, inputs: Tensor, processes: Processes | None, **options: Any) -> Computation:
    """Return the computation of a kernel, whose network is read once before."""
    plan = plan_ntk(model, inputs, **options)
    few = inputs[: 4 * (1 if processes is None else processes.world)]
    ntk_gram(model, few, processes=processes, **options)  # loads what is loaded once

    def compute() -> dict[str, Any]:
        gram = ntk_gram(model, inputs, plan=plan, remeasure=True, processes=processes, **options)
        assert gram.plan is not None
        division = gram.plan.division
        by = "" if processes is None else ("rows of J" if division is None else division.by)
        return {
            "planned": None if division is None else division.sent,
            "by": by,
            "number": float(gram.matrix.trace()),
        }

    return compute


def mlp(width: int, samples: int, processes: Processes | None, **options: Any) -> Computation:
    """Return the kernel of a perceptron of two hidden layers."""
    net = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return kernel(net, torch.randn(samples, 784), processes, **options)


def resnet(samples: int, processes: Processes | None, **options: Any) -> Computation:
    """Return the kernel of ResNet-18 on images of 32 x 32."""
    from torchvision.models import resnet18

    return kernel(resnet18(num_classes=10).eval(), torch.randn(samples, 3, 32, 32), processes, **options)


def coupled(samples: int, processes: Processes | None, **options: Any) -> Computation:
    """Return the kernel of a small convolutional network with the statistics of the whole batch."""
    blocks = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32)]
    net = nn.Sequential(*blocks, nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))
    return kernel(net, torch.randn(samples, 3, 16, 16), processes, batch_norm="batch", **options)


def certificate(samples: int, width: int, processes: Processes | None) -> Computation:
    """Return the certificate of a rank: a Gram matrix in tiles, and two factors of it."""
    features = torch.randn(samples, width, dtype=torch.float64)
    certify_streamed(HeldRows(features[:100]), processes=processes)

    def compute() -> dict[str, Any]:
        found = certify_streamed(HeldRows(features), processes=processes, progress=False)
        assert found.verdict == "certified"
        return {"planned": None, "by": "" if processes is None else "tiles", "number": found.sigma_min.value}

    return compute


CASES: Mapping[str, Callable[[Processes | None], Computation]] = {
    "perceptron of width 1,024, trace, n = 1,000": partial(mlp, 1024, 1000, outputs="trace", precision="fast"),
    "perceptron of width 1,024, trace, n = 2,000": partial(mlp, 1024, 2000, outputs="trace", precision="fast"),
    "perceptron of width 1,024, sum, n = 4,000": partial(mlp, 1024, 4000, outputs="sum", precision="fast"),
    "perceptron of width 512, trace in float64, n = 500": partial(
        mlp, 512, 500, outputs="trace", precision="certified"
    ),
    "ResNet-18, trace, n = 64": partial(resnet, 64, outputs="trace", precision="fast"),
    "ResNet-18, trace, n = 256": partial(resnet, 256, outputs="trace", precision="fast"),
    "ResNet-18, sum, n = 256": partial(resnet, 256, outputs="sum", precision="fast"),
    "convolutional, statistics of the batch, full, n = 64": partial(coupled, 64, outputs="full", precision="fast"),
    "certificate of rank n = 6,000, 6,200 features": partial(certificate, 6000, 6200),
}


def on_rank(rank: int, world: int, folder: str, name: str, rounds: int) -> None:
    """Compute one of the cases in one of the processes, and write down what it took."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=600)
    )
    processes = Processes(600) if world > 1 else None
    torch.manual_seed(0)
    compute = CASES[name](processes)
    found = []
    for _ in range(rounds):
        before, begun = 0 if processes is None else processes.sent, time.process_time()
        made = compute()
        taken = time.process_time() - begun
        found.append({**made, "seconds": taken, "sent": 0 if processes is None else processes.sent - before})
    Path(folder, f"{rank}.part").write_text(json.dumps(found))
    os.replace(f"{folder}/{rank}.part", f"{folder}/{rank}.json")
    dist.barrier()


def measured(name: str, world: int, rounds: int) -> list[list[dict[str, Any]]]:
    """Return what each process has written down."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_rank, (world, folder, name, rounds), nprocs=world)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


def slowest(ranks: Sequence[Sequence[Mapping[str, Any]]]) -> float:
    """Return the seconds of the slowest process, in the fastest repetition: other work of the machine only adds."""
    return min(max(each["seconds"] for each in turn) for turn in zip(*ranks, strict=True))


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
                    "" if last["planned"] is None else f"{last['planned'] / 2**20:.1f}",
                )
            )
    return f"""# Kernels and certificates divided among processes

Seconds of the processor that the slowest of W processes takes for one kernel, `ntk_gram(..., plan=, remeasure=True, processes=)`, as a
monitor computes it after its first measurement, or for one certificate, `certify_expressivity(..., processes=)`; each process has one
thread and computes on the same machine. A process waits for the others without using the processor, so that these are the seconds of a
machine with a core for each, as far as cores do not share caches and memory. What does not become less with W: the rounding of the
Jacobian is looked at on one sample or more by each process, numbers that are sent are copied twice, and smaller products reach a smaller
share of the processor's rate; all three count for less, the larger the kernel.
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
