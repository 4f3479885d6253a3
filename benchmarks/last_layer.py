"""Compare phase 2 by solving and by training: seconds and test accuracy on the digits; write docs/results/last_layer.md."""

from __future__ import annotations

import copy
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from ntk_bench.calibration import processor
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_conv import HeadProblem, HeadSolution, find_head, last_hidden_features, solve_head
from lightning_conv.networks.perturbation import perturb
from lightning_conv.recipes import DigitsDataModule, WideFC
from lightning_conv.reporting.markdown import markdown_table

EPOCHS, SHARE = 40, 0.6  # of the recipe wide_fc
SEEDS = (0, 1, 2)
REPEATS = 3
TOL = 1e-6
PATIENCE = 150  # iterations, if L-BFGS or conjugate gradients do not converge
PAGE = Path(__file__).parent.parent / "docs" / "results" / "last_layer.md"


class Watch(Callback):
    """A callback that records the times of the epochs, and the network at the switch."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.at_switch: nn.Module | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the time, and at the switch the network."""
        if len(self.times) == round(SHARE * EPOCHS):
            self.at_switch = copy.deepcopy(pl_module.net)
        self.times.append(time.perf_counter())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the time."""
        self.times.append(time.perf_counter())

    @property
    def rest(self) -> float:
        """Duration of the epochs after the switch in seconds."""
        return self.times[-1] - self.times[round(SHARE * EPOCHS)]


@dataclass
class Row:
    """One way through phase 2, over seeds."""

    name: str
    seconds: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        """Return the row of the table."""
        times = f"{statistics.median(self.seconds):.2f}" if self.seconds else "0"
        accuracies = ", ".join(f"{100 * value:.1f}" for value in self.accuracies)
        remark = statistics.mode(self.remarks) if self.remarks else ""
        accuracy = f"{100 * statistics.mean(self.accuracies):.2f} ({accuracies})"
        return [self.name, times, f"{max(self.gaps):.1e}", accuracy, f"{statistics.mean(self.losses):.3f}", remark]


def table(rows: Iterable[Row]) -> str:
    """Format the row as Markdown."""
    columns = ("way", "seconds, median", "largest gap", "test accuracy in %, mean (seeds)", "test loss", "remark")
    return markdown_table(columns, [row.cells() for row in rows])


def train(seed: int, guard: bool) -> tuple[WideFC, DigitsDataModule, Watch]:
    """Build the recipe without monitors, logger and checkpoints."""
    pl.seed_everything(seed, verbose=False)
    module, data, watch = WideFC(guard=guard, diagnostics=False), DigitsDataModule(), Watch()
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module, data, watch


def everything(loader: DataLoader) -> tuple[Tensor, Tensor]:
    """Return the inputs and labels of a data set, in its order."""
    inputs, labels = zip(*DataLoader(loader.dataset, batch_size=256), strict=True)
    return torch.cat(inputs), torch.cat(labels)


@torch.no_grad()
def tested(net: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Compute accuracy and mean cross-entropy of the network in float32."""
    outputs = net.eval()(inputs)
    return float((outputs.argmax(1) == labels).double().mean()), float(F.cross_entropy(outputs, labels))


@torch.no_grad()
def with_layer(net: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Copy the network with another head."""
    net = copy.deepcopy(net)
    net.head.weight.copy_(weight)
    net.head.bias.copy_(bias)
    return net


def gap_of(net: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Bound the training loss minus its infimum, which is 0, from above."""
    h = last_hidden_features(net, find_head(net, inputs), inputs, dtype=torch.float64)
    problem = HeadProblem(h, labels, nn.CrossEntropyLoss(), outputs=10)
    return problem.value(problem.stack(net.head.weight, net.head.bias)).upper


def timed(solve: Callable[[], HeadSolution]) -> tuple[HeadSolution, list[float]]:
    """Solve for the head; return the solution and the seconds of every repetition."""
    solutions = [solve() for _ in range(REPEATS)]
    return solutions[0], [solution.seconds for solution in solutions]


def main() -> None:
    """Run all seeds and write the page."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    loads = [os.getloadavg()[0]]
    rows: dict[str, Row] = {}
    other: dict[str, Row] = {}
    prepared: list[float] = []

    def note(
        table: dict[str, Row], name: str, seconds: list[float], gap: float, test: tuple[float, float], remark: str
    ) -> None:
        row = table.setdefault(name, Row(name))
        row.seconds += seconds
        row.gaps.append(gap)
        row.accuracies.append(test[0])
        row.losses.append(test[1])
        row.remarks.append(remark)
        print(*row.cells(), sep="  ", flush=True)

    for seed in SEEDS:
        module, data, watch = train(seed, guard=False)
        training, test = everything(data.train_dataloader()), everything(data.test_dataloader())
        net = watch.at_switch
        assert net is not None
        note(rows, "at the switch", [0.0], gap_of(net, *training), tested(net, *test), "after 60 % of the epochs")
        note(
            rows,
            "base run, the rest",
            [watch.rest],
            gap_of(module.net, *training),
            tested(module.net, *test),
            "all layers, SGD",
        )
        guarded, _, guard_watch = train(seed, guard=True)
        note(
            rows,
            "guarded run, the rest",
            [guard_watch.rest],
            gap_of(guarded.net, *training),
            tested(guarded.net, *test),
            "last layer, SGD",
        )
        perturb(dict(net.trunk.named_parameters()), 1e-3, 0)
        began = time.perf_counter()
        h = last_hidden_features(net, find_head(net, training[0]), training[0], dtype=torch.float64)
        problem = HeadProblem(h, training[1], nn.CrossEntropyLoss(), outputs=10)
        prepared.append(time.perf_counter() - began)
        start = (net.head.weight.detach(), net.head.bias.detach())
        for method in ("auto", "cholesky"):
            solution, seconds = timed(lambda m=method, p=problem, s=start: solve_head(p, start=s, tol=TOL, method=m))
            layer = with_layer(net, *solution.layer())
            name = f'solve_head(method="{method}")'
            remark = f"{solution.method}, {solution.iterations} iterations, change of norm {solution.distance:.0f}"
            note(rows, name, seconds, solution.rounded_gap.upper, tested(layer, *test), remark)
        loads.append(os.getloadavg()[0])
        scaled = with_layer(net, 4 * start[0], 4 * start[1])
        note(
            rows,
            "four times the layer",
            [0.0],
            gap_of(scaled, *training),
            tested(scaled, *test),
            "no solver, for comparison",
        )
        one_hot = F.one_hot(training[1], 10).double()
        for label, loss_fn, targets in (
            ("squared, one-hot targets", nn.MSELoss(), one_hot),
            ("cross-entropy, labels smoothed by 0.1", nn.CrossEntropyLoss(label_smoothing=0.1), training[1]),
        ):
            problem = HeadProblem(h, targets, loss_fn, outputs=10)
            for method in ("cholesky", "lbfgs", "cg") if label.startswith("squared") else ("cholesky", "lbfgs"):
                solution = solve_head(problem, start=start, tol=TOL, method=method, max_iterations=PATIENCE)
                layer = with_layer(net, *solution.layer())
                remark = f"{solution.iterations} iterations"
                note(
                    other,
                    f"{label}: {method}",
                    [solution.seconds],
                    solution.rounded_gap.upper,
                    tested(layer, *test),
                    remark,
                )
    PAGE.write_text(
        f"""# Solving the last layer instead of training it

The recipe `wide_fc` on the digits (n = {problem.samples}, last hidden layer {problem.width} wide, C = 10), {EPOCHS} epochs, switch after
{SHARE:.0%}, seeds {", ".join(map(str, SEEDS))}, without monitors, logger and checkpoints. Made by `python benchmarks/last_layer.py` on
{date.today()}, {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__};
load average during the runs {min(loads):.1f} to {max(loads):.1f} on {os.cpu_count()} processors, which all times share.

The gap is the mean loss on the training set minus its infimum, an upper bound with all rounding, for the weights in float32.
{REPEATS} repeats of each solution a seed. Computing the features in float64 and the problem's first pass come on top:
{statistics.median(prepared):.2f} s.

{table(rows.values())}

The same features and start under other losses, each method for at most {PATIENCE} iterations (test loss: cross-entropy of the outputs as
they are, whatever was minimised):

{table(other.values())}
"""
    )
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
