"""The runs whose pictures are taken: the recipe, runs of the health gallery, networks of 10 and 50 layers, and one run at seven rates.

All of them are small, seeded, and made from what the package itself offers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceDiagnostics, ExpressivityGuard, Probe
from lightning_conv.recipes.cli import main as command
from lightning_conv.recipes.lab.health.case import Setup
from lightning_conv.recipes.lab.health.healthy_runs import HEALTHY
from lightning_conv.recipes.lab.health.networks import GalleryModule, digits, mlp, one_hot
from lightning_conv.recipes.lab.health.sick_runs import SICK

GALLERY = {each.name: each for each in (*SICK, *HEALTHY)}

MEASUREMENTS = 20
"""Measurements in a run of the gallery, about; its curves are then smooth enough to be read."""

SHORT = {"rate_far_too_large": 3}
"""Epochs of runs of the gallery that are over before; measured at each step, their charts show the way there."""

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class Perceptron(GalleryModule):
    """A module of the gallery whose learning rate is a hyper-parameter, as users log it."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__(net, F.mse_loss, SGD, lr=lr)
        self.save_hyperparameters({"lr": lr})


def descent(lr: float = 0.3) -> Setup:
    """Build gradient descent on the squared loss, of which every chart has something to show; phase 2 is its second half."""
    x, labels = digits(64, 0)
    module = Perceptron(mlp(64, 128, activation=nn.Tanh), lr)
    guard = ExpressivityGuard(switch_at=0.5)
    return Setup(module=module, inputs=x, targets=one_hot(labels), epochs=80, callbacks=(guard,))


def at_rate(lr: float) -> Setup:
    """Build the same descent without a guard."""
    x, labels = digits(64, 0)
    return Setup(module=Perceptron(mlp(64, 64), lr), inputs=x, targets=one_hot(labels), epochs=60)


def deep(layers: int) -> Setup:
    """Build a perceptron of many layers, initialised for ReLU so that the signal reaches the end."""
    x, labels = digits(64, 0)
    net = mlp(*[32] * (layers - 1))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return Setup(
        module=GalleryModule(net, F.cross_entropy, SGD, lr=0.01), inputs=x, targets=labels, batch=32, epochs=30
    )


def train(
    make: Callable[[], Setup],
    folder: Path,
    name: str,
    *,
    measurements: int = MEASUREMENTS,
    seed: int = 0,
    full: bool = False,
) -> Path:
    """Train a run with all diagnostics, unless its page is there already, and return the folder of its logger.

    Args:
        make: Builds the run, once the seed is set.
        folder: Of all runs.
        name: Of the run.
        measurements: In the run, about.
        seed: Of the weights and of the order of the samples.
        full: Whether the kernel has a row for each output of each sample, which some charts need.
    """
    place = folder / name
    if (place / "convergence.html").is_file():
        return place
    pl.seed_everything(seed, verbose=False)
    setup = make()
    batch = setup.batch or len(setup.inputs)
    steps = setup.epochs * -(-len(setup.inputs) // batch)
    probe = Probe(setup.probe, outputs="full" if full else None)
    watch = ConvergenceDiagnostics(probe, max(1, steps // measurements), on_error="warn")
    with _quiet():
        trainer = pl.Trainer(
            max_epochs=setup.epochs,
            callbacks=[*setup.callbacks, watch],
            logger=TensorBoardLogger(folder, name=name, version="", default_hp_metric=False),
            accelerator="cpu",
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = TensorDataset(setup.inputs, setup.targets)
        trainer.fit(setup.module, DataLoader(data, batch_size=batch, shuffle=True))
    return place


def gallery_run(name: str, folder: Path) -> Path:
    """Train a run of the health gallery with all diagnostics, and return the folder of its logger."""

    def make() -> Setup:
        setup = GALLERY[name].make(0)
        return replace(setup, epochs=SHORT.get(name, setup.epochs))

    return train(make, folder, name)


def recipe(folder: Path) -> Path:
    """Train the recipe, measured in every epoch, as the README says, and return the folder of its logger."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "wide_fc"
    if found := sorted(place.glob("*/convergence.html")):
        return found[0].parent
    words = ["fit", "--config", "wide_fc", "--model.measure_every", "23"]
    with _quiet(), (folder / "recipe.log").open("w") as log, redirect_stdout(log):
        code = command(
            [*words, "--trainer.logger.init_args.save_dir", str(folder), "--trainer.enable_progress_bar", "false"]
        )
    if code:
        raise RuntimeError(f"lightning-conv {' '.join(words)} ended with exit code {code}; see {log.name}")
    return sorted(place.glob("*/convergence.html"))[0].parent


@contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
