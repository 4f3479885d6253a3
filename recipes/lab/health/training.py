"""``train_case``: one run of the gallery with ``ConvergenceHealth``, and what was said of it."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_conv.callbacks import ConvergenceHealth, Probe
from lightning_conv.health.finding import LEVELS, Finding
from lightning_conv.recipes.lab.health.case import GalleryCase

MEASUREMENTS = 8
"""Measurements in a run, about."""

SERIOUS = LEVELS.index("warning")


@dataclass(frozen=True)
class CaseResult:
    """What was said of one run.

    Attributes:
        case: Name of the case.
        seed: Seed of the data's choice, the weights and the order.
        steps: Optimizer steps of the run.
        hit: Whether what had to be said stands among the findings of the end.
        when: Step at which it was said first; None: never.
        sentence: What was said of the illness at the end, or of a healthy run above ``notice``; empty: nothing.
        above: Names of all findings that were above ``notice`` at some time.
    """

    case: str
    seed: int
    steps: int
    hit: bool
    when: int | None
    sentence: str
    above: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields in the types of JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CaseResult:
        """Return what ``to_json`` wrote."""
        return cls(**{**content, "above": tuple(content["above"])})


class _Listener(pl.Callback):
    """Notes at which step what has to be said, and anything above ``notice``, was said first."""

    def __init__(self, health: ConvergenceHealth, case: GalleryCase) -> None:
        self.health, self.case = health, case
        self.when: int | None = None
        self.above: dict[str, Finding] = {}

    def listen(self, step: int) -> None:
        """Look at what is said now."""
        for each in self.health.findings:
            if self.when is None and is_said(self.case, each):
                self.when = step
            if each.severity >= SERIOUS:
                self.above.setdefault(each.name, each)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.listen(trainer.global_step)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.listen(trainer.global_step)


def is_said(case: GalleryCase, finding: Finding) -> bool:
    """Return whether a finding is what has to be said of a case.

    Args:
        case: The case.
        finding: The finding.
    """
    return any(
        finding.name == each.name and finding.severity >= LEVELS.index(each.level) and each.words in finding.sentence
        for each in case.said
    )


def train_case(case: GalleryCase, seed: int) -> CaseResult:
    """Train one run with ``ConvergenceHealth`` and return what was said of it.

    Args:
        case: The case.
        seed: Seed of the data's choice, the weights and the order.

    Cost: one to ten seconds.
    """
    pl.seed_everything(seed, verbose=False)
    setup = case.make(seed)
    batch = setup.batch or len(setup.inputs)
    steps = setup.epochs * -(-len(setup.inputs) // batch)
    health = ConvergenceHealth(Probe(setup.probe), every_n_steps=max(1, steps // MEASUREMENTS), on_error="warn")
    listener = _Listener(health, case)
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=setup.epochs,
            callbacks=[*setup.callbacks, health, listener],
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        data = TensorDataset(setup.inputs, setup.targets)
        order = torch.Generator().manual_seed(seed)
        trainer.fit(setup.module, DataLoader(data, batch_size=batch, shuffle=True, generator=order))
    said = [each for each in health.findings if is_said(case, each)]
    shown = list(listener.above.values()) if case.healthy else said
    return CaseResult(
        case.name,
        seed,
        trainer.global_step,
        bool(said),
        listener.when,
        shown[0].sentence if shown else "",
        tuple(sorted(listener.above)),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the trainer, and the warnings that the runs are there to provoke."""
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
