"""Output of the command after a run: closing tables, and the place of the logs."""

import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor

from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.callbacks.run.callbacks import find_callback
from lightning_conv.recipes.usage import PAGE
from lightning_conv.reporting.terminal import console, print_paths, print_table


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """The outcome of one run of a comparison."""

    trainer: Trainer
    steps: int  # optimizer steps
    seconds: float  # wall time of the training
    train_loss: float | None  # mean loss over the whole training set after the run, in eval mode; None: not computable
    test_metrics: dict[str, float]


def print_run(trainer: Trainer) -> None:
    """Print the closing table of a training run and where to look at its logs.

    Args:
        trainer: the trainer after `fit`.
    """
    to = console()
    print_table(
        to, ("", ""), [*_training_rows(trainer), *_guard_rows(trainer), *_kernel_rows(trainer)], title="Training run"
    )
    _print_where(to, trainer)


def print_comparison(guarded: RunOutcome, plain: RunOutcome) -> None:
    """Print two runs side by side, and the difference of their test accuracies in percentage points.

    Args:
        guarded: outcome of the run with the guard.
        plain: outcome of the same run without the guard.
    """
    to = console()
    runs = (guarded, plain)
    rows = [
        ("test accuracy", *(_percent(run.test_metrics.get("test_acc")) for run in runs)),
        ("test loss", *(_number(run.test_metrics.get("test_loss")) for run in runs)),
        ("training-set loss", *(_number(run.train_loss) for run in runs)),
        ("optimizer steps", *(f"{run.steps:,}" for run in runs)),
        ("training time", *(f"{run.seconds:.1f} s" for run in runs)),
        *((label, text, "") for label, text in _guard_rows(guarded.trainer)),
    ]
    print_table(to, ("", "with the guard", "without"), rows, title="The same run with and without the guard")
    accuracies = [run.test_metrics.get("test_acc") for run in runs]
    if accuracies[0] is not None and accuracies[1] is not None:
        points = 100.0 * (accuracies[0] - accuracies[1])
        to.print(f"test accuracy with the guard minus without: {points:+.2f} points")
    _print_where(to, guarded.trainer, plain.trainer)


def mean_train_loss(module: LightningModule, data: LightningDataModule) -> float | None:
    """Return the mean of `module.loss_fn` over the whole training set, in eval mode.

    Args:
        module: a module with a mean-reduced `loss_fn(outputs, targets)`, called on the inputs alone.
        data: gives batches (inputs, targets).

    Returns:
        The loss, in the units of `loss_fn`; None if the module has no `loss_fn`.
    """
    loss_fn: Any = getattr(module, "loss_fn", None)
    if loss_fn is None:
        return None
    total, count = 0.0, 0
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for inputs, targets in data.train_dataloader():
            loss: Tensor = loss_fn(module(inputs.to(module.device)), targets.to(module.device))
            total += float(loss) * len(targets)
            count += len(targets)
    module.train(was_training)
    return total / count


def _training_rows(trainer: Trainer) -> list[tuple[str, str]]:
    metrics = trainer.callback_metrics
    return [
        ("epochs / optimizer steps", f"{trainer.current_epoch} / {trainer.global_step:,}"),
        ("training loss, last epoch", _number(metrics.get("train_loss"))),
        ("validation accuracy", _percent(metrics.get("val_acc"))),
    ]


def _guard_rows(trainer: Trainer) -> list[tuple[str, str]]:
    """Return the rows of the guard; none if the run had no guard."""
    guard = find_callback(trainer, ExpressivityGuard)
    if guard is None:
        return []
    rows = [("phase reached", f"{guard.phase} of 2")]
    certificate = guard.certificate
    if certificate is not None:
        known = f"{certificate.verdict}"
        if (certificate.method, certificate.verdict) == ("distinct", "certified"):
            known += ", for almost every weight of the wide layer"
        rows += [
            ("expressivity condition", known),
            ("rank of [h, 1] / samples", f"{certificate.rank_lower:,} / {certificate.n:,}"),
        ]
        for name in ("sigma_min", "sigma_max"):
            sigma = getattr(certificate, name)
            if sigma is not None:
                rows.append((f"{name} of [h, 1]", _bounded(sigma.value, sigma.lower, sigma.upper)))
        if certificate.verdict != "certified":
            rows.append(("why", str(certificate.reason)))
    if guard.history:
        losses = [float(entry["loss"]) for entry in guard.history]
        rows += [
            ("training-set loss, phase 2", f"{_number(losses[0])} at the switch, then {_number(losses[-1])}"),
            ("gap to the infimum", _number(guard.history[-1].get("gap"))),
            ("fell in every phase-2 epoch", _fell(losses)),
        ]
    return rows


def _fell(losses: list[float]) -> str:
    """Describe whether the loss fell from each entry to the next."""
    epochs = len(losses) - 1
    if epochs == 0:
        return "no phase-2 epoch was completed"
    rises = [after for before, after in pairwise(losses) if not after < before]
    return f"no: not in {len(rises)} of {epochs}" if rises else f"yes, in all {epochs}"


def _kernel_rows(trainer: Trainer) -> list[tuple[str, str]]:
    metrics = trainer.callback_metrics
    rows = []
    if "kernel/lambda_min" in metrics:
        bounds = [metrics.get(f"kernel/lambda_min{suffix}") for suffix in ("", "_lower", "_upper")]
        rows.append(("lambda_min, probe samples", _bounded(*bounds)))
    if "kernel/relative_frobenius_change" in metrics:
        drift = _number(metrics["kernel/relative_frobenius_change"])
        rows.append(("kernel change since start", drift))
    if "kernel/alignment" in metrics:
        rows.append(("kernel alignment with start", _number(metrics["kernel/alignment"])))
    return rows


def _print_where(to: Console, *trainers: Trainer) -> None:
    """Print the log folders and the command that shows them."""
    folders = [
        (trainer.log_dir, trainer.logger.save_dir)
        for trainer in trainers
        if isinstance(trainer.logger, TensorBoardLogger)
    ]
    if not folders:
        return
    lines = [f"logs: {log_dir}" for log_dir, _ in folders]
    pages = [Path(log_dir) / PAGE for log_dir, _ in folders if log_dir]
    lines += [f"page: {page}" for page in pages if page.is_file()]
    lines.append(f"look: tensorboard --logdir {shlex.quote(str(folders[0][1]))}")
    print_paths(to, lines)


def _number(value: Tensor | float | None) -> str:
    return "not measured" if value is None else f"{float(value):.4g}"


def _percent(value: Tensor | float | None) -> str:
    return "not measured" if value is None else f"{100.0 * float(value):.2f} %"


def _bounded(value: Tensor | float | None, lower: Tensor | float | None, upper: Tensor | float | None) -> str:
    if lower is None or upper is None:
        return _number(value)
    return f"{_number(value)} in [{_number(lower)}, {_number(upper)}]"
