"""The kernels that the model of docs/scale.md is fitted on, and the others that it is scored on; one process of several measures them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_conv import NTKPlan, ntk_gram, plan_ntk
from lightning_conv.machine.processes import Processes

OUTPUTS = 10


@dataclass(frozen=True)
class Case:
    """A kernel: what it is of, and its sizes.

    Attributes:
        network: ``"perceptron"`` or ``"convolutional"``.
        outputs: As in ``ntk_gram``.
        width: Of the network.
        samples: Number of samples.
        fitted: Whether the model is fitted on it; otherwise it is scored on it.
    """

    network: str
    outputs: str
    width: int
    samples: int
    fitted: bool

    @property
    def name(self) -> str:
        """Its network, outputs and sizes."""
        return f"{self.network} of width {self.width:,}, {self.outputs}, n = {self.samples:,}"

    @property
    def options(self) -> dict[str, Any]:
        """Options of the kernel."""
        return {"outputs": self.outputs, "precision": "fast"}

    def make(self) -> tuple[nn.Module, Tensor]:
        """Return the network with its samples, the same in all processes."""
        torch.manual_seed(0)
        return NETWORKS[self.network](self.width), torch.randn(self.samples, *SHAPES[self.network])

    def plan(self) -> NTKPlan:
        """Return the plan of the kernel in one process."""
        model, inputs = self.make()
        return plan_ntk(model, inputs, **self.options)


def perceptron(width: int) -> nn.Module:
    """Return a perceptron of two hidden layers."""
    layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, OUTPUTS))


def convolutional(width: int) -> nn.Module:
    """Return a network of three convolutions."""
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, OUTPUTS))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"perceptron": perceptron, "convolutional": convolutional}
SHAPES = {"perceptron": (784,), "convolutional": (3, 32, 32)}

FITTED = {
    ("perceptron", "trace"): ((256, 500), (256, 2000), (384, 1500), (512, 1000), (768, 750), (1024, 500), (1024, 2000)),
    ("perceptron", "sum"): ((512, 2000), (512, 4000), (1024, 2500), (1536, 2000)),
    ("convolutional", "trace"): ((16, 64), (16, 256), (24, 192), (32, 128)),
}
SCORED = {
    ("perceptron", "trace"): ((320, 900), (448, 1300), (640, 640), (896, 1600), (1280, 800)),
    ("perceptron", "sum"): ((640, 3500), (896, 2200), (1280, 3000)),
    ("convolutional", "trace"): ((20, 80), (20, 160), (28, 112), (28, 224)),
}
CASES = [
    Case(*kind, *size, fitted)
    for sizes, fitted in ((FITTED, True), (SCORED, False))
    for kind, of in sizes.items()
    for size in of
]


def on_rank(rank: int, world: int, folder: str, cases: Sequence[Case], rounds: int) -> None:
    """Compute all cases in one of the processes, and write down what each repetition took."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=600)
    )
    processes = Processes(600) if world > 1 else None
    found = {}
    for case in cases:
        model, inputs = case.make()
        plan = plan_ntk(model, inputs, **case.options)
        # Loads what is loaded once.
        ntk_gram(model, inputs[: max(8, 4 * world)], processes=processes, **case.options)
        rows = []
        for _ in range(rounds):
            sent = 0 if processes is None else processes.sent
            wall, begun = time.perf_counter(), time.process_time()
            ntk_gram(model, inputs, plan=plan, remeasure=True, processes=processes, **case.options)
            taken = {"seconds": time.process_time() - begun, "wall": time.perf_counter() - wall}
            rows.append({**taken, "sent": (0 if processes is None else processes.sent) - sent})
        found[case.name] = rows
    Path(folder, f"{rank}.part").write_text(json.dumps(found))
    os.replace(f"{folder}/{rank}.part", f"{folder}/{rank}.json")
    dist.barrier()
