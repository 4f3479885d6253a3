"""Measure a `SketchStore`: samples per second, bytes and errors, beside other libraries; write docs/results/sketch.md and sketch.json.

`traker` and `dattri` are measured where the running Python has them, in turn with this library; the page says which were there.
Takes some minutes. `--quick --out FOLDER` is a tiny version that tests the benchmark.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import sketch_peers as peers
import torch
import torch.nn.functional as F
from networks import mlp
from ntk_bench.calibration import gemm_rate, processor
from sketch_page import page
from torch import Tensor, nn

from lightning_conv import SketchStore, ntk_gram
from lightning_conv.losses.sample_gradients import sample_gradients

OUT = Path(__file__).parent.parent / "docs" / "results"
TRACED = 2048
"""Numbers of a projection by traker, its default."""
COMPARED = 64
"""Samples on which the estimated kernels are compared with the exact one."""


@dataclass(frozen=True)
class Setting:
    """Sizes of the networks and of their training sets; ``traced``: samples that traker gets, since it is slow on a CPU."""

    widths: tuple[int, ...] = (784, 512, 512, 10)
    images: int = 8192
    batch: int = 128
    layers: int = 4
    width: int = 128
    length: int = 64
    words: int = 256
    texts: int = 256
    texts_at_once: int = 16
    rounds: int = 5
    traced: tuple[int, int] = (32, 16)


TINY = Setting(
    widths=(20, 16, 4), images=80, batch=40, layers=1, width=8, length=4, words=11, texts=80, texts_at_once=40, rounds=1
)


class Block(nn.Module):
    """Causal attention and a two-layer network, each after a LayerNorm and added to what enters; all weights are in linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, T, width) to the same shape."""
        n, length, width = x.shape
        q, k, v = self.mixed(self.first(x)).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """A small language model: tables of words and positions, blocks, and a linear layer over all words."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.words = nn.Embedding(setting.words, setting.width)
        self.places = nn.Parameter(0.02 * torch.randn(1, setting.length, setting.width))
        self.trunk = nn.Sequential(*(Block(setting.width, 4) for _ in range(setting.layers)))
        self.head = nn.Linear(setting.width, setting.words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of the next word at each position, (n, T, V)."""
        return self.head(self.trunk(self.words(tokens) + self.places))


def next_words(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over all positions."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Case:
    """A network with its training set and loss."""

    name: str
    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    traced: int

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(len(inputs) for inputs, _ in self.batches)

    @property
    def first(self) -> tuple[Tensor, Tensor]:
        """The samples of which kernels are compared."""
        return tuple(torch.cat(each)[:COMPARED] for each in zip(*self.batches, strict=True))

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(each.numel() for each in self.model.parameters())


def cases(setting: Setting) -> list[Case]:
    """Return both networks as they are initialised with seed 0, on random samples."""
    torch.manual_seed(0)
    images = torch.randn(setting.images, setting.widths[0])
    labels = torch.randint(0, setting.widths[-1], (setting.images,))
    tokens = torch.randint(0, setting.words, (setting.texts, setting.length + 1))
    network, language = mlp(setting.widths, "relu"), Transformer(setting)
    by_image = list(zip(images.split(setting.batch), labels.split(setting.batch), strict=True))
    at_once = setting.texts_at_once
    by_text = list(zip(tokens[:, :-1].split(at_once), tokens[:, 1:].split(at_once), strict=True))
    return [
        Case("MLP " + "-".join(map(str, setting.widths)), network, by_image, nn.CrossEntropyLoss(), setting.traced[0]),
        Case(
            f"Transformer, {setting.layers} layers of {setting.width}, T = {setting.length}",
            language,
            by_text,
            next_words,
            setting.traced[1],
        ),
    ]


@dataclass
class Row:
    """One way to sketch, measured in every round.

    Attributes:
        way: what it is, for the table.
        samples: how many it was given.
        seconds: of each round.
        gemm: flops per second of the machine just before.
        bytes: of one sample.
        error: root mean square of the errors of the entries of the kernel, relative to the root of the two diagonal entries.
        stated: the same of the standard errors that come with it; None: there are none.
    """

    way: str
    samples: int
    seconds: list[float] = field(default_factory=list)
    gemm: list[float] = field(default_factory=list)
    bytes: int | None = None
    error: float | None = None
    stated: float | None = None

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / median(self.seconds)


def relative(found: Tensor, truth: Tensor) -> float:
    """Return the root mean square of ``found`` relative to sqrt(K_ii K_jj) of the kernel K = ``truth``."""
    sizes = truth.diagonal().sqrt()
    return float((found / (sizes[:, None] * sizes)).square().mean().sqrt())


def exact(case: Case, parameters: list[str] | None = None) -> Tensor:
    """Return the exact kernel of the gradients of the losses of the first samples."""
    inputs, targets = case.first
    slopes = sample_gradients(case.loss_fn, case.model(inputs).detach(), targets)
    return ntk_gram(case.model, inputs, cotangents=slopes, parameters=parameters).matrix


def plain(case: Case) -> float:
    """Measure the seconds of one forward and one backward pass over all batches, which is what training needs."""
    start = time.perf_counter()
    for inputs, targets in case.batches:
        case.model.zero_grad()
        case.loss_fn(case.model(inputs), targets).backward()
    case.model.zero_grad()
    return time.perf_counter() - start


def own(case: Case, row: Row, truth: Tensor, options: dict[str, Any], folder: Path) -> None:
    """Measure this library: the store on disk, from creation to the last byte."""
    row.gemm.append(gemm_rate())
    start = time.perf_counter()
    store = SketchStore.create(folder, case.model, like=case.batches[0], loss_fn=case.loss_fn, **options)
    store.add(case.model, case.batches, name="a")
    row.seconds.append(time.perf_counter() - start)
    row.bytes = store.bytes_per_sample
    kernel = store.kernel(slice(0, COMPARED), name="a")
    row.error, row.stated = relative(kernel.matrix - truth, truth), relative(kernel.standard_error, truth)


def measure(case: Case, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure all ways in turn, in rounds of which the first one warms up."""
    truth, linear = exact(case), exact(case, peers.covered(case.model))
    choices = [{}, {"groups": 4}, {"size": 4096}]
    rows = [Row("one forward and backward pass", case.samples)]
    rows += [Row("SketchStore" + "".join(f", {k}={v}" for k, v in each.items()), case.samples) for each in choices]
    there = peers.available()
    traced = [tuple(each[: case.traced] for each in case.batches[0])]
    if "traker" in there:
        rows.append(Row(f"traker, proj_dim={TRACED}", case.traced))
    if "dattri" in there:
        rows.append(Row("dattri LoGra, proj_dim=1024", case.samples))
    for number in range(rounds + 1):
        for row in rows:
            folder = Path(tempfile.mkdtemp())
            if row.way.startswith("SketchStore"):
                own(case, row, truth, choices[rows.index(row) - 1], folder)
            elif row.way.startswith("traker"):
                row.gemm.append(gemm_rate())
                seconds, kernel, row.bytes = peers.by_traker(
                    case.model, traced, case.loss_fn, TRACED, folder, case.traced
                )
                row.seconds.append(seconds)
                part = truth[: len(kernel), : len(kernel)]
                row.error = relative(kernel - part, part)
            elif row.way.startswith("dattri"):
                row.gemm.append(gemm_rate())
                seconds, kernel, row.bytes = peers.by_dattri(
                    case.model, case.batches, case.loss_fn, 1024, folder, COMPARED
                )
                row.seconds.append(seconds)
                row.error = relative(kernel - linear, linear)
            else:
                row.gemm.append(gemm_rate())
                row.seconds.append(plain(case))
            shutil.rmtree(folder)
        say(f"{case.name}: round {number} of {rounds}")
        if number == 0 and rounds:
            for row in rows:
                row.seconds.clear()
                row.gemm.clear()
    return {"network": case.name, "parameters": case.parameters, "rows": [{**asdict(r), "rate": r.rate} for r in rows]}


def installed(name: str) -> str:
    """Return the version of a library, or that it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def main() -> None:
    """Measure, and write the page and its data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny networks and one round")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setting = TINY if arguments.quick else Setting()
    data = {
        "date": date.today().isoformat(),
        "machine": processor(),
        "rounds": setting.rounds,
        "versions": {name: installed(name) for name in ("torch", "traker", "dattri")},
        "cases": [measure(case, setting.rounds, print) for case in cases(setting)],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "sketch.json").write_text(json.dumps(data, indent=1) + "\n")
    (arguments.out / "sketch.md").write_text(page(data))


if __name__ == "__main__":
    main()
