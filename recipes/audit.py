"""The command `lightning-conv audit`: audit the labels of a recipe's training samples, by its network as it is or from a checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_conv.callbacks import Probe
from lightning_conv.callbacks.run.beginning import cannot_measure, measurement_of
from lightning_conv.callbacks.run.data.batch import to_device
from lightning_conv.callbacks.run.schedule import Schedule
from lightning_conv.health.findings.of_labels import finding_of_labels
from lightning_conv.health.labels.label_audit import label_audit
from lightning_conv.health.labels.suspicious_labels import LabelAudit
from lightning_conv.networks.inputs import Inputs
from lightning_conv.recipes.audit_files import write_audit
from lightning_conv.recipes.commands import add_audit_options
from lightning_conv.recipes.runs import RecipeCLI
from lightning_conv.reporting.progress import LONG, progress_bar


class LabelAuditor(Callback):
    """Audits training samples when a fit begins, and ends the fit before its first step.

    Network, inputs, labels and loss are those that the training step is seen to use, as in the monitors.

    Args:
        samples: number of training samples, at most.
        checkpoint: a checkpoint whose weights are taken; None: those of the module.

    Attributes:
        audit: the audit; None before it is made.
        numbers: numbers of the samples in the training set; None: not known.
        inputs: the samples.
    """

    def __init__(self, samples: int, checkpoint: str | None = None) -> None:
        self.probe = Probe(samples, batch_norm="frozen" if checkpoint is None else "eval")
        self.checkpoint = checkpoint
        self.audit: LabelAudit | None = None
        self.numbers: list[int] | None = None
        self.inputs: Inputs | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the weights of the checkpoint."""
        if self.checkpoint is not None:
            load_weights(pl_module, self.checkpoint)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit the labels.

        Raises:
            MisconfigurationException: the samples cannot be read one by one, or have no labels of classes.
        """
        trainer.should_stop = True
        try:
            found = measurement_of(trainer, self.probe, Schedule(1, 1.0))
            if found.targets is None:
                raise MisconfigurationException("targets: the training step's batch has none that are recognised")
            network, loss = found.network(), found.loss()
            self.audit = label_audit(
                network,
                to_device(found.inputs, pl_module.device),
                found.targets,
                loss_fn=None if loss.own is not None else loss.fn,
                batch_norm=self.probe.batch_norm,
            )
        except Exception as error:  # anything that a user's module raises
            if isinstance(error, ValueError) and str(error).startswith("targets: "):
                raise MisconfigurationException(str(error)) from error
            raise MisconfigurationException(cannot_measure(trainer, self, error, self.probe, None)) from error
        self.numbers, self.inputs = found.numbers, found.inputs


def load_weights(module: LightningModule, path: str) -> None:
    """Load the weights of a Lightning checkpoint into a module.

    Args:
        module: the module.
        path: of the checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        MisconfigurationException: it is no checkpoint, or one of another module.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--checkpoint: there is no file {Path(path).resolve()}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # a file of another kind fails by anything
        raise MisconfigurationException(
            f"--checkpoint: {path} is no Lightning checkpoint that can be read without running code from it "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise MisconfigurationException(
            f"--checkpoint: the weights of {path} are not those of {type(module).__name__} with these settings; pass the configuration "
            f"of its run ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class AuditCLI(RecipeCLI):
    """Builds the model and the data of a recipe, and a trainer that does nothing but audit."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(args, run=False)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the audit."""
        super().add_arguments_to_parser(parser)
        add_audit_options(parser.add_argument)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return a trainer with the accelerator and precision of the configuration, without its loggers and callbacks.

        Raises:
            MisconfigurationException: there are fewer samples than an audit needs.
        """
        settings = self.config["trainer"]
        self.auditor = LabelAuditor(self.config["samples"], self.config["checkpoint"])
        return Trainer(
            accelerator=settings["accelerator"],
            precision=settings["precision"],
            devices=1,
            max_epochs=1,
            callbacks=[self.auditor],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )


def audit(args: list[str]) -> None:
    """Audit the labels of a recipe's training samples, print the table and write the files.

    Args:
        args: options of the command.

    Raises:
        MisconfigurationException: the labels cannot be audited.
    """
    made = AuditCLI(args)
    auditor, model = made.auditor, made.model
    model.configure_callbacks = list  # the recipe's own would measure and train
    # A rough duration; it only decides whether a bar is shown (``progress.LONG``).
    with progress_bar("auditing the labels", LONG, None):
        made.trainer.fit(model, datamodule=made.datamodule)
    assert auditor.audit is not None
    finding = finding_of_labels(auditor.audit, numbers=auditor.numbers, of="the audit")
    weights = "as initialised" if auditor.checkpoint is None else f"of {auditor.checkpoint}"
    command = shlex.join(["lightning-conv", "audit", *args])
    lines = [
        f"Made by `{command}`: {auditor.audit.samples} training samples, weights {weights}.",
        f"{finding.sentence} {finding.advice}".rstrip(),
    ]
    print("\n\n".join([*lines, auditor.audit.markdown(numbers=auditor.numbers)]))
    folder = Path(made.config["out"])
    paths = write_audit(folder, auditor.audit, lines=lines, inputs=auditor.inputs, numbers=auditor.numbers)
    print(f"\nwritten: {', '.join(map(str, paths))}")
