"""Compare the cost of a kernel probe and of training: seconds per epoch and per probe; write docs/results/probe_in_training.md.

Takes some minutes. `--quick --out FOLDER` is a tiny version that tests the benchmark.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from networks import resnet
from ntk_bench.calibration import gemm_rate, processor
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_conv import kernel_spectrum, ntk_gram
from lightning_conv.reporting.markdown import markdown_table

BUDGET = 0.03
"""Share of the wall time that probes may take, the monitors' default."""
PROJECTIONS = 2
"""Number of sign vectors of a projected probe. The default, 16, exceeds the 10 outputs, so the trace kernel itself is used."""
OUT = Path(__file__).parent.parent / "docs" / "results"


@dataclass(frozen=True)
class Setting:
    """A network that is trained and probed."""

    width: int = 16
    depths: tuple[int, ...] = (8, 14)
    images: int = 5000
    batch: int = 128
    probes: tuple[int, ...] = (32, 64, 128, 256)
    rounds: int = 3


TINY = Setting(width=4, images=96, batch=32, probes=(4, 8), rounds=2)


@dataclass
class Probe:
    """One probe: the kernel of n samples and its spectrum."""

    samples: int
    outputs: str
    seconds: list[float]
    projections: int | None = None

    @property
    def kind(self) -> str:
        """Name in the table."""
        return self.outputs if self.projections is None else f"{self.outputs}, k = {self.projections}"


@dataclass
class Network:
    """One network: its epochs and its probes, measured in turn."""

    depth: int
    epochs: list[float]
    gemm: list[float]  # flops per second beside each epoch
    probes: list[Probe]


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Return the digits of scikit-learn as ``count`` colour images of 32 x 32, repeated with noise if they do not suffice."""
    data = load_digits()
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(count) % len(data.target)
    images = torch.as_tensor(data.images, dtype=torch.float32)[index].unsqueeze(1) / 16
    images = F.interpolate(images, (32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    return images + 0.1 * noise, torch.as_tensor(data.target)[index]


def epoch(model: nn.Module, images: Tensor, labels: Tensor, batch: int, generator: torch.Generator) -> float:
    """Measure the seconds of one epoch of plain SGD with everything in memory."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    start = time.perf_counter()
    for rows in torch.randperm(len(images), generator=generator).split(batch):
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    return time.perf_counter() - start


def take(model: nn.Module, inputs: Tensor, probe: Probe) -> None:
    """Measure one probe as the monitors do first: the kernel in ``"fast"`` precision and its spectrum with bounds."""
    options: dict[str, Any] = {} if probe.projections is None else {"projections": probe.projections}
    start = time.perf_counter()
    kernel_spectrum(ntk_gram(model, inputs, outputs=probe.outputs, precision="fast", batch_norm="frozen", **options))
    probe.seconds.append(time.perf_counter() - start)


def measure(setting: Setting, depth: int, say: Callable[[str], None]) -> Network:
    """Run rounds of one epoch and every probe once; the first round warms up."""
    images, labels = digits(setting.images)
    torch.manual_seed(0)
    model = resnet(setting.width, depth)
    generator = torch.Generator().manual_seed(0)
    kinds = (("trace", None), ("sum", None), ("projected", PROJECTIONS))
    probes = [Probe(n, outputs, [], projections) for outputs, projections in kinds for n in setting.probes]
    found = Network(depth, [], [], probes)
    for number in range(setting.rounds + 1):
        gemm = gemm_rate()
        seconds = epoch(model, images, labels, setting.batch, generator)
        for probe in probes:
            take(model, images[: probe.samples], probe)
        if number == 0:
            for probe in probes:
                probe.seconds.clear()
        else:
            found.epochs.append(seconds)
            found.gemm.append(gemm)
        say(f"ResNet-{depth}, round {number}: epoch {seconds:.2f} s")
    return found


def interval(probe: float, epoch: float) -> int:
    """Return the smallest k for which one probe every k epochs takes at most ``BUDGET`` of the wall time.

    p / (k e + p) <= b is equivalent to k >= p (1 - b) / (b e).
    """
    return max(1, math.ceil(probe * (1 - BUDGET) / (BUDGET * epoch)))


def render(setting: Setting, networks: list[Network], command: str) -> str:
    """Format the page as Markdown."""
    columns = (
        "network",
        "outputs",
        "n",
        "probe, s",
        "share of an epoch",
        "every .. epochs for 3 %",
        "probes an epoch for 3 %",
    )
    rows = []
    for network in networks:
        base = median(network.epochs)
        for probe in network.probes:
            taken = median(probe.seconds)
            rows.append(
                [
                    f"ResNet-{network.depth}",
                    probe.kind,
                    f"{probe.samples}",
                    f"{taken:.3f}",
                    f"{100 * taken / base:.1f} %",
                    f"{interval(taken, base)}",
                    f"{BUDGET / (1 - BUDGET) * base / taken:.2f}",
                ]
            )
    epochs = "; ".join(
        f"ResNet-{n.depth} {median(n.epochs):.2f} s (smallest {min(n.epochs):.2f}, largest {max(n.epochs):.2f}; "
        f"`torch.mm` of 1024 x 1024 beside it {min(n.gemm) / 1e9:.0f} to {max(n.gemm) / 1e9:.0f} GF/s)"
        for n in networks
    )
    return "\n".join(
        [
            "# What a probe costs beside training\n",
            f"ResNets of width {setting.width} on {setting.images} images of 32 x 32 x 3 (scikit-learn's digits enlarged, with "
            f"noise), batch {setting.batch}, plain SGD, no data loader, no logging. Made by `{command}` on {date.today()}, "
            f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of {setting.rounds} rounds "
            "in which epoch and probes take turns.\n",
            f"Epoch: {epochs}.\n",
            'A probe is the kernel (`precision="fast"`, `batch_norm="frozen"`) of n training images and its spectrum with bounds. '
            "Where lambda_min does not stand clear of its error the monitors compute it again in higher precision, which "
            "costs more than this. An epoch of real training, with augmentation and validation, is longer, and the share smaller.\n",
            markdown_table(columns, rows),
            "",
        ]
    )


def main() -> None:
    """Measure all networks and write the page and the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny, to test the benchmark")
    parser.add_argument("--out", type=Path, help="folder for the results (default docs/results; needed with --quick)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    if asked.quick and asked.out is None:
        parser.error("--quick: its times mean nothing and do not belong into docs/results; pass --out FOLDER")
    torch.set_num_threads(asked.threads)
    setting, out = TINY if asked.quick else Setting(), asked.out or OUT
    networks = [measure(setting, depth, lambda text: print(text, flush=True)) for depth in setting.depths]
    out.mkdir(parents=True, exist_ok=True)
    page = out / "probe_in_training.md"
    command = "python benchmarks/probe_in_training.py" + (" --quick" if asked.quick else "")
    page.write_text(render(setting, networks, command))
    record: dict[str, Any] = {"setting": asdict(setting), "networks": [asdict(network) for network in networks]}
    record |= {"date": str(date.today()), "cpu": processor(), "threads": asked.threads, "torch": torch.__version__}
    (out / "probe_in_training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(page.read_text())


if __name__ == "__main__":
    main()
