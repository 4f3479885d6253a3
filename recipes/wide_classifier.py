"""The base of the recipes: a classifier with a wide last hidden layer that adds its own diagnostics to the trainer."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_conv.callbacks import ConvergenceReport, ExpressivityGuard, KernelStability, LambdaMin
from lightning_conv.networks.wide_layer import wide_layer_width

Batch = tuple[Tensor, Tensor]


class WideClassifier(LightningModule):
    """Base of the recipes: SGD with momentum on the mean softmax cross-entropy (natural logarithm), with diagnostics.

    Logged: `train_loss` (mean over the epoch's batches, in train mode, while the weights move), `val_loss`, `val_acc`,
    `test_loss`, `test_acc` (accuracies in [0, 1]).

    Sizes left at None are read from the data module (`n_train`, `num_classes`, `input_shape`) when a run starts, and
    written to `hparams`: `load_from_checkpoint(path)` needs no data.

    A subclass names its settings in its constructor, keeps them by `save_hyperparameters`, and makes the network in
    `build`. Among its settings are `width`, `width_factor`, `num_classes`, `lr`, `momentum`, `weight_decay`, `guard`,
    `diagnostics`, `measure_every`, `probe_size`, `switch_at`, `method`, `step_rule`, `cache_features` and the one that
    `input_setting` names.
    """

    input_setting: ClassVar[str]  # name of the setting that holds the size of the network's input

    def __init__(self) -> None:
        super().__init__()
        self.loss_fn = nn.CrossEntropyLoss()
        self.net: nn.Sequential | None = None

    @abstractmethod
    def build(self, sizes: dict[str, int]) -> nn.Sequential:
        """Build the network from `num_classes`, `width` and `input_setting`; a `ValueError` is reported to the user."""

    @abstractmethod
    def input_size(self, shape: tuple[int, ...]) -> int:
        """Return the value of `input_setting` for inputs of this shape; raise a `ValueError` if they do not fit."""

    @override
    def configure_model(self) -> None:
        """Build the network, once; sizes that were left open are taken from the data module.

        Raises:
            MisconfigurationException: if a size is neither given nor known from the data, or is not positive.
        """
        if self.net is not None:
            return
        try:
            sizes = self._resolve_sizes()
            net = self.build(sizes)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self.net = net
        self.hparams.update(sizes)
        self.val_acc = MulticlassAccuracy(sizes["num_classes"], average="micro")
        self.test_acc = MulticlassAccuracy(sizes["num_classes"], average="micro")

    def _resolve_sizes(self) -> dict[str, int]:
        """Return the input's size, `num_classes` and `width`, each from the settings or else from the data module."""
        data: Any = getattr(self._trainer, "datamodule", None)
        sources = {self.input_setting: "input_shape", "num_classes": "num_classes", "width": "n_train"}
        sizes: dict[str, int] = {}
        for name, source in sources.items():
            given = self.hparams[name]
            if given is None and not hasattr(data, source):
                raise MisconfigurationException(
                    f"{name}: is None, and there is no data module with `{source}` to take it from; pass "
                    f"{type(self).__name__}({name}=...), or a data module such as DigitsDataModule() to the trainer"
                )
            if given is not None:
                sizes[name] = given
            elif name == self.input_setting:
                sizes[name] = self.input_size(data.input_shape)
            elif name == "num_classes":
                sizes[name] = data.num_classes
            else:
                sizes[name] = wide_layer_width(data.n_train, self.hparams["width_factor"])
        return sizes

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Return the callbacks of the recipe, except the types that the trainer already has."""
        callbacks: list[Callback] = []
        if self.hparams["diagnostics"]:
            probe, every = self.hparams["probe_size"], self.hparams["measure_every"]
            callbacks += [KernelStability(probe, every_n_steps=every), LambdaMin(probe, every_n_steps=every)]
            if getattr(self._trainer, "loggers", []):  # without one its page would be in the working directory
                callbacks.append(ConvergenceReport())
        if self.hparams["guard"]:
            names = ("switch_at", "method", "step_rule", "cache_features")
            callbacks.append(ExpressivityGuard(**{name: self.hparams[name] for name in names}))
        # Lightning lets the model's callback replace the trainer's of the same type; here the user's must win.
        present: list[Callback] = getattr(self._trainer, "callbacks", [])
        return [callback for callback in callbacks if not any(isinstance(other, type(callback)) for other in present)]

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD over all parameters."""
        return torch.optim.SGD(
            self.parameters(),
            lr=self.hparams["lr"],
            momentum=self.hparams["momentum"],
            weight_decay=self.hparams["weight_decay"],
        )

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, shape (batch, num_classes)."""
        if self.net is None:
            self.configure_model()
        assert self.net is not None
        logits: Tensor = self.net(inputs)
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of one batch."""
        inputs, labels = batch
        loss: Tensor = self.loss_fn(self(inputs), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log `val_loss` and `val_acc`."""
        self._evaluate(batch, "val", self.val_acc)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log `test_loss` and `test_acc`."""
        self._evaluate(batch, "test", self.test_acc)

    def _evaluate(self, batch: Batch, stage: str, accuracy: MulticlassAccuracy) -> None:
        inputs, labels = batch
        logits = self(inputs)
        accuracy(logits, labels)
        options: dict[str, Any] = {"prog_bar": True, "batch_size": len(labels), "sync_dist": True}
        self.log(f"{stage}_loss", self.loss_fn(logits, labels), **options)
        self.log(f"{stage}_acc", accuracy, prog_bar=True)
