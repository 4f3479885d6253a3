"""The recipe `lora` as a LightningModule: a small GPT, pre-trained on one text and fine-tuned on another by low-rank adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_conv.callbacks import ConvergenceDiagnostics, Probe
from lightning_conv.callbacks.check.dry_run import DryRun
from lightning_conv.callbacks.run.callbacks import find_callback
from lightning_conv.recipes.data import InMemoryDataModule
from lightning_conv.recipes.language_data import LanguageDataModule, Part
from lightning_conv.recipes.language_model import GPT
from lightning_conv.recipes.low_rank import add_adapters
from lightning_conv.recipes.pretraining import pretrain, pretrained_path, read_weights, sizes_of
from lightning_conv.recipes.small import is_small
from lightning_conv.reporting.progress import LONG, progress_bar

Batch = tuple[Tensor, Tensor]

SMALL_STEPS = 2
"""Steps of the pre-training under ``LIGHTNING_CONV_SMALL``."""


class LoRAFineTuning(LightningModule):
    """Fine-tunes a small GPT by low-rank adapters (`LoRALinear`) with AdamW, and measures the kernel over the adapters alone.

    Where no `pretrained` file is given, the network is pre-trained first, on the CPU, in `prepare_data`, where others download weights:
    `pretrain_steps` steps on the documentation strings of the standard library (or its sources: `pretrain_on`). The weights are kept in
    `pretrain_folder` under a name that depends on all settings, so the next run with these settings begins with the fine-tuning at
    once, and a killed pre-training is continued. Its seed is its own: the weights do not depend on the seed of the run.

    The loss is the mean cross-entropy of the next token, in nats (natural logarithm) per token. Logged: `train_loss` (mean over the epoch's
    batches, while the weights move), `val_loss`, `val_acc`, `test_loss`, `test_acc` (share of tokens whose likeliest successor is the
    right one).

    Everything but the adapters is frozen, so that the diagnostics, which are over the trainable parameters, are over the adapters
    without an argument: kernel, drift, stability ratio, noise scale, and whether the fine-tuning is lazy, as is assumed where LoRA is
    explained by the kernel of the pre-trained network. `configure_callbacks` adds `ConvergenceDiagnostics`; one in the trainer takes
    precedence.

    Args:
        width: numbers per position; None: those of `pretrained`, otherwise 128.
        depth: number of blocks; None: those of `pretrained`, otherwise 3.
        heads: heads of the attention, which no file of weights tells.
        rank: r of each adapter.
        alpha: scale of each adapter: its term is multiplied by alpha / r.
        adapted: names or patterns of the linear layers that get adapters.
        lr: learning rate of the fine-tuning.
        weight_decay: weight decay of AdamW.
        pretrained: file with the weights of a `GPT`, see `read_weights`; None: pre-train.
        pretrain_on: part of the standard library that is read for it.
        pretrain_steps: its steps.
        pretrain_lr: its largest learning rate.
        pretrain_batch_size: its sequences per step.
        pretrain_folder: where its weights are kept.
        diagnostics: measure with `ConvergenceDiagnostics`.
        measure_every: optimizer steps between two measurements; None: as often as 3 % of the time allows, which in a run of minutes is
            hardly at all.
        probe_size: training sequences on which the kernel of the loss gradients is measured.
        vocabulary: number of tokens; None: from the data module.
        positions: greatest number of positions; None: from `pretrained`, otherwise from the data module.
    """

    def __init__(
        self,
        width: int | None = None,
        depth: int | None = None,
        heads: int = 4,
        rank: int = 8,
        alpha: float = 16.0,
        adapted: Sequence[str] = ("*attn*", "*mlp*"),
        lr: float = 3e-3,
        weight_decay: float = 0.0,
        pretrained: str | None = None,
        pretrain_on: Part = "docstrings",
        pretrain_steps: int = 1000,
        pretrain_lr: float = 3e-3,
        pretrain_batch_size: int = 8,
        pretrain_folder: str = "runs/pretrained",
        diagnostics: bool = True,
        measure_every: int | None = 100,
        probe_size: int = 16,
        vocabulary: int | None = None,
        positions: int | None = None,
    ) -> None:
        super().__init__()
        if pretrain_steps < 1:
            raise MisconfigurationException(f"pretrain_steps: must be at least 1, got {pretrain_steps}")
        self.save_hyperparameters()
        self.net: GPT | None = None

    @property
    def _fits(self) -> bool:
        """Whether a fit has begun; otherwise the weights come from a checkpoint, or are of no interest."""
        trainer = self._trainer
        return trainer is not None and trainer.state.fn == TrainerFn.FITTING

    @property
    def _is_tried(self) -> bool:
        """Whether this is the fit of a check, in which nothing is trained."""
        return self._trainer is not None and find_callback(self._trainer, DryRun) is not None

    @property
    def pretrain_settings(self) -> dict[str, Any]:
        """What decides the pre-trained weights."""
        names = ("heads", "pretrain_on", "pretrain_lr", "pretrain_batch_size")
        steps = SMALL_STEPS if is_small() else self.hparams["pretrain_steps"]
        return self._sizes() | {name: self.hparams[name] for name in names} | {"pretrain_steps": steps}

    @property
    def pretrained_file(self) -> Path:
        """File of the weights with which the fine-tuning begins."""
        given = self.hparams["pretrained"]
        return (
            pretrained_path(self.hparams["pretrain_folder"], self.pretrain_settings) if given is None else Path(given)
        )

    @override
    def prepare_data(self) -> None:
        """Pre-train the network, in one process per node, unless the weights are there."""
        if self.hparams["pretrained"] is not None or not self._fits or self._is_tried or self.pretrained_file.is_file():
            return
        settings, path = self.pretrain_settings, self.pretrained_file
        data = LanguageDataModule(settings["pretrain_on"], length=settings["positions"])
        data.setup()
        title = f"pre-training on {data.n_train:,} sequences of {settings['pretrain_on']}"
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), progress_bar(title, LONG, None) as report:
            torch.manual_seed(0)
            loss = pretrain(
                self._network(),
                data.splits.train,
                path,
                steps=settings["pretrain_steps"],
                batch_size=settings["pretrain_batch_size"],
                lr=settings["pretrain_lr"],
                report=report,
            )
        rank_zero_info(f"{title}: {settings['pretrain_steps']} steps, loss {loss:.3f} nats per byte, kept in {path}")

    @override
    def configure_model(self) -> None:
        """Build the network, once, with the pre-trained weights where a fit begins, and put the adapters in.

        Raises:
            MisconfigurationException: a size is neither given nor known from the data; the weights do not fit; an option of the adapters is
                wrong.
        """
        if self.net is not None:
            return
        sizes = self._sizes()
        try:
            net = self._network()
            if self._fits and not (self._is_tried and not self.pretrained_file.is_file()):
                net.load_state_dict(read_weights(self.pretrained_file))
            add_adapters(net, self.hparams["adapted"], rank=self.hparams["rank"], alpha=self.hparams["alpha"])
        except (ValueError, RuntimeError) as error:  # torch says what does not fit in a RuntimeError
            raise MisconfigurationException(str(error)) from error
        self.net = net
        self.hparams.update(sizes)

    def _network(self) -> GPT:
        sizes = self._sizes()
        return GPT(
            sizes["vocabulary"],
            sizes["positions"],
            width=sizes["width"],
            depth=sizes["depth"],
            heads=self.hparams["heads"],
        )

    def _sizes(self) -> dict[str, int]:
        """Return the sizes of the network: as given, as those of the file of weights, or as the data need them.

        Raises:
            MisconfigurationException: a size is not known, or is not that of the weights.
        """
        given = {name: self.hparams[name] for name in ("vocabulary", "positions", "width", "depth")}
        of_file = {}
        if self.hparams["pretrained"] is not None and (self._fits or None in given.values()):
            of_file = sizes_of(read_weights(self.hparams["pretrained"]))
        data: Any = getattr(self._trainer, "datamodule", None)
        if isinstance(data, InMemoryDataModule):
            data.setup()  # in `prepare_data` it has not been called yet; it reads once
        of_data: dict[str, int] = {}
        if hasattr(data, "num_classes") and hasattr(data, "input_shape"):
            of_data = {"vocabulary": data.num_classes, "positions": data.input_shape[0]}
        sizes = {}
        for name, own in given.items():
            known = [own, of_file.get(name), of_data.get(name), {"width": 128, "depth": 3}.get(name)]
            size = next((each for each in known if each is not None), None)
            if size is None:
                raise MisconfigurationException(
                    f"{name}: is None, and there is no data module to take it from; pass LoRAFineTuning({name}=...), or a data module "
                    "such as LanguageDataModule() to the trainer"
                )
            if of_file and size != of_file[name]:
                raise MisconfigurationException(
                    f"{name}: {size}, and {self.hparams['pretrained']} has {of_file[name]}; leave {name} out"
                )
            sizes[name] = size
        return sizes

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Return the diagnostics, unless the trainer has its own."""
        present: list[Callback] = getattr(self._trainer, "callbacks", [])
        if not self.hparams["diagnostics"] or any(isinstance(each, ConvergenceDiagnostics) for each in present):
            return []
        # A sample has T V outputs, so that the trace kernel would take that many backward passes.
        probe = Probe(self.hparams["probe_size"], outputs="loss")
        return [ConvergenceDiagnostics(probe, every_n_steps=self.hparams["measure_every"])]

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the adapters."""
        trainable = [each for each in self.parameters() if each.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"])

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token, (n, T, V)."""
        if self.net is None:
            self.configure_model()
        assert self.net is not None
        logits: Tensor = self.net(tokens)
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of one batch."""
        tokens, following = batch
        loss = F.cross_entropy(self(tokens).flatten(0, 1), following.flatten())
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(tokens))
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log `val_loss` and `val_acc`."""
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log `test_loss` and `test_acc`."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        tokens, following = batch
        logits = self(tokens)
        options: dict[str, Any] = {"prog_bar": True, "batch_size": len(tokens), "sync_dist": True}
        self.log(f"{stage}_loss", F.cross_entropy(logits.flatten(0, 1), following.flatten()), **options)
        self.log(f"{stage}_acc", (logits.argmax(-1) == following).float().mean(), **options)
