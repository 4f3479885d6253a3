"""``check_run``: find out what can be measured in a run, and what it costs, without training anything that stays."""

from __future__ import annotations

import copy
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from lightning_conv.arguments import require_whole
from lightning_conv.callbacks.check.dry_fit import SHAPING, copied_run, dry_trainer, quiet
from lightning_conv.callbacks.check.dry_run import CheckedError, DryRun
from lightning_conv.callbacks.check.run_check import RunCheck
from lightning_conv.callbacks.check.scale_checked import Target
from lightning_conv.callbacks.monitors.base import KernelMonitor
from lightning_conv.callbacks.run.data.data_generators import unread
from lightning_conv.callbacks.run.ranks import require_whole_copies
from lightning_conv.machine.devices import device_named
from lightning_conv.reporting.progress import LONG, Report, progress_bar


def check_run(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: Any = None,
    *,
    ckpt_path: str | None = None,
    ranks: int | None = None,
    device: str | None = None,
    progress: bool | Report | None = None,
) -> RunCheck:
    """Say what would be measured in ``trainer.fit(module, data)``: which network, samples, loss and head, at which cost, and what for.

    A fit is begun on a copy of the module, with a trainer of the same settings that has neither loggers nor checkpoints, and the callbacks
    of this library make their first measurement; without any in the trainer's list, or from ``configure_callbacks``, those of
    ``ConvergenceDiagnostics()`` do. Then the fit is given up, before its first step. So what is said is what a run then says, apart from
    choices of the budget that hang on how busy the machine is. Only where parameters have no shape yet, one step is made, on the copy.

    Neither the trainer nor the module, no generator of random numbers and no file changes. The data set is read, and ``prepare_data`` and
    ``setup`` of a data module run, as in every fit; of data that can only be iterated, one batch is taken. Callbacks of others are not
    called, apart from those of Lightning that decide what is trained (``SHAPING``).

    Args:
        trainer: Of the run; it is only read.
        module: What it would train.
        data: What ``Trainer.fit`` takes: a DataLoader, several, or a data module; None: the module has its own.
        ckpt_path: A checkpoint from which the run would go on; it is only read.
        ranks: Number of ranks for which a measurement is predicted (``NetworkCheck.scale``); None: 1 if ``device`` is given, else
            nothing is predicted.
        device: What they run on, ``"a100"``, ``"h100"``, ``"h200"`` or ``"cpu"``, a core of this processor each; None: ``"cpu"`` if
            ``ranks`` is given.
        progress: Whether a bar is shown; None: on a terminal. A function is called with the share that is done.

    Raises:
        MisconfigurationException: The module cannot be copied, the fit would end before its first step, Lightning refuses it, or the
            strategy is ``ModelParallelStrategy``.
        TypeError: ``ranks`` is no whole number.
        ValueError: ``ranks`` is less than 1, or there is no such device.
        Exception: The user's module or data raise in the hooks before the first step, as they would in the run.

    Cost: a copy of the module, the first measurement of a run (1 s where an epoch is short, else the share of an epoch that
    ``max_overhead`` allows), and finding the head. Theorems and head are looked for again where no callback of the run does.

    Example::

        found = check_run(Trainer(max_epochs=10), MyModule(), MyData())
        print(found.networks[0].loss, found.ok)
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise MisconfigurationException(
            "check_run: ModelParallelStrategy divides the module among processes, and a dry run has one; the run itself says in its first "
            "lines what is measured (max_steps=1)"
        )
    target = _target(ranks, device)
    refused = _refused_by_strategy(trainer)
    with progress_bar(f"checking {type(module).__name__}", LONG, progress) as report, quiet() as said:
        copied, around, monitors = copied_run(trainer, module)
        dry = DryRun(monitors, said, report, target)
        loaded = (
            copy.copy(data) if isinstance(data, pl.LightningDataModule) else data
        )  # ``setup`` leaves the user's alone
        given = {"datamodule": loaded} if isinstance(loaded, pl.LightningDataModule) else {"train_dataloaders": loaded}
        with TemporaryDirectory() as folder, unread(*_readers(data)):
            shaping = [each for each in around if isinstance(each, SHAPING)]
            begun = dry_trainer(trainer, [*shaping, dry], folder)
            # Seen from now on; Lightning refuses a ModelCheckpoint that it is given without checkpoints.
            begun.callbacks[:0] = [each for each in around if each not in shaping]  # type: ignore[attr-defined]
            report(0.05)
            try:
                begun.fit(copied, ckpt_path=ckpt_path, **given)
            except CheckedError:
                _tear_down(copied, loaded)
            else:
                raise MisconfigurationException(
                    f"check_run: the fit would end before its first step (max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}"
                    f"{'' if ckpt_path is None else f', from {ckpt_path}'}); allow for a longer one, or see whether the data are empty"
                )
    return RunCheck(
        module=type(module).__name__,
        networks=dry.networks,
        head=dry.head,
        refused=tuple(dict.fromkeys([*refused, *dry.refused])),
        notes=_notes(trainer, around),
    )


def _target(ranks: int | None, device: str | None) -> Target | None:
    """Return where a measurement is to be predicted; None: nowhere.

    Raises:
        TypeError: ``ranks`` is no whole number.
        ValueError: ``ranks`` is less than 1, or there is no such device.
    """
    if ranks is None and device is None:
        return None
    count = 1 if ranks is None else ranks
    require_whole("ranks", count, least=1)
    return Target(count, device_named(device or "cpu"))


def _refused_by_strategy(trainer: pl.Trainer) -> list[str]:
    """Return why a kernel cannot be measured under the user's strategy, which the dry run does not use."""
    try:
        require_whole_copies(trainer, KernelMonitor.__name__)
    except MisconfigurationException as error:
        return [str(error)]
    return []


def _readers(data: Any) -> list[Any]:
    """Return what may hold generators that reading the data moves."""
    if isinstance(data, DataLoader):
        return [data, data.dataset, data.collate_fn, data.sampler]
    return [] if data is None else [data]


def _tear_down(module: pl.LightningModule, data: Any) -> None:
    """Call the hooks with which a fit ends."""
    module.teardown("fit")
    if isinstance(data, pl.LightningDataModule):
        data.teardown("fit")


def _notes(trainer: pl.Trainer, around: list[pl.Callback]) -> tuple[str, ...]:
    """Return what the check does not say."""
    notes = []
    if trainer.world_size > 1:
        notes.append(
            f"one process was checked; the run has {trainer.world_size}, and each of its steps takes a batch of every one"
        )
    others = [
        type(each).__name__
        for each in around
        if not isinstance(each, SHAPING) and not type(each).__module__.startswith(("lightning", "pytorch_lightning"))
    ]
    if others:
        notes.append(
            f"not called: {', '.join(dict.fromkeys(others))}; what they change before the first step is not seen here"
        )
    return tuple(notes)
