"""``settings_of_run`` and ``seconds_of_run``: what the page of a run says of its settings, versions and the time spent measuring."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import lightning
import lightning.pytorch as pl
import torch

from lightning_conv import __version__
from lightning_conv.callbacks.monitors.base import KernelMonitor
from lightning_conv.callbacks.monitors.by_optimizer import monitors_of
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.setting_texts import texts_of

OF_TRAINER = (
    "max_epochs",
    "max_steps",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "precision",
    "num_devices",
    "world_size",
)


def settings_of_run(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, dict[str, str]]:
    """Return the hyper-parameters of module and data, the settings of trainer, optimizers and monitors, and the versions, as short texts.

    A value of a name such as ``password`` or ``api_key`` is not shown, and one that cannot be printed is left out.

    Args:
        trainer: Trainer of the run.
        pl_module: The module.
    """
    data = getattr(trainer, "datamodule", None)
    groups: dict[str, Mapping[str, Any]] = {
        "Hyper-parameters of the module": _hyper_parameters(pl_module),
        "Hyper-parameters of the data": {} if data is None else _hyper_parameters(data),
        "Trainer": {name: getattr(trainer, name, None) for name in OF_TRAINER},
    }
    for number, optimizer in enumerate(trainer.optimizers):
        of = f" {number + 1}" if len(trainer.optimizers) > 1 else ""
        # What the first group of parameters has now: a scheduler may have changed the rate.
        first = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
        groups[f"Optimizer{of}, at the end"] = {"class": type(optimizer).__name__, **first}
    groups["Measuring"] = {
        type(each).__name__: f"every_n_steps={each.every_n_steps}, max_overhead={each.max_overhead}"
        for each in monitors_of(trainer, KernelMonitor)  # type: ignore[type-abstract]
    }
    groups["Versions"] = {
        "lightning_conv": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "Python": platform.python_version(),
        "device": str(pl_module.device),
        "processor": torch.cuda.get_device_name(pl_module.device)
        if pl_module.device.type == "cuda"
        else platform.machine(),
    }
    return {group: texts_of(values) for group, values in groups.items() if values}


def seconds_of_run(trainer: pl.Trainer) -> dict[str, float]:
    """Return the seconds of this fit's measurements and of all that was done since the first of them began.

    Args:
        trainer: Trainer of the run.
    """
    monitors = monitors_of(trainer, KernelMonitor)  # type: ignore[type-abstract]
    schedules = {id(each.schedule): each.schedule for each in monitors if each.last_step is not None}
    if not schedules:
        return {}
    first = sum(each.first_seconds for each in schedules.values())
    return {
        "first measurement, finding the network included": first,
        "later measurements": sum(each.seconds for each in schedules.values()) - first,
        "the fit since the first measurement, training included": max(each.elapsed for each in schedules.values()),
    }


def _hyper_parameters(owner: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with attempted(Exception):
        found = dict(owner.hparams)
    return found
