"""The recipe `wide_fc` as a LightningModule: a wide fully-connected softplus network that brings its diagnostics along.

The file is not called `wide_fc.py`: that name of the package is the function which builds the network.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_conv.callbacks import ExpressivityGuard, KernelStability, LambdaMin
from lightning_conv.recipes.models import wide_fc
from lightning_conv.wide_layer import wide_layer_width

Batch = tuple[Tensor, Tensor]


class WideFC(LightningModule):
    """Classifies with `wide_fc`, the network after Theorem 1 of Kawaguchi & Sun (AAAI 2021), by SGD with momentum.

    `Trainer().fit(WideFC(), DigitsDataModule())` measures the kernel and trains with the guarantee, without a list of
    callbacks: `configure_callbacks` brings them. A callback of the same type in the trainer takes precedence.

    The loss is the mean softmax cross-entropy (natural logarithm). Logged: `train_loss` (mean over the epoch's batches,
    in train mode, while the weights move), `val_loss`, `val_acc`, `test_loss`, `test_acc` (accuracies in [0, 1]).

    Sizes left at None are read from the data module (`n_train`, `num_classes`, `input_shape`) when a run starts, and
    written to `hparams`: `WideFC.load_from_checkpoint(path)` needs no data.

    The default settings suit the digits: `lr` below about 2 (1 + momentum) / L_H, the limit of stable last-layer
    steps, with L_H = sigma_max([h, 1])^2 / (2 n) (about 40 there). Larger inputs or widths need a smaller `lr`.

    Args:
        hidden: units of the narrow layers; the theorem asks for at least 2 min(m_x, n) each (m_x input features).
        width: units of the wide last hidden layer; None: ceil(width_factor * n_train).
        width_factor: width per training sample when `width` is None.
        beta: sharpness of the softplus.
        lr: learning rate.
        momentum: momentum of SGD.
        weight_decay: L2 penalty of SGD; the guarantee is stated without one.
        guard: train in two phases with `ExpressivityGuard`.
        diagnostics: measure the kernel with `KernelStability` and `LambdaMin`.
        measure_every: optimizer steps between two measurements of the kernel; None: as often as 3 % of the time allows.
        switch_at: when the guard switches: a share of the run (float) or a step (int).
        in_features: input features m_x after flattening; None: from the data module.
        num_classes: number of classes; None: from the data module.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (128,),
        width: int | None = None,
        width_factor: float = 1.1,
        beta: float = 100.0,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        guard: bool = True,
        diagnostics: bool = True,
        measure_every: int | None = None,
        switch_at: int | float = 0.6,
        in_features: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.loss_fn = nn.CrossEntropyLoss()
        self.net: nn.Sequential | None = None

    @override
    def configure_model(self) -> None:
        """Build the network, once; sizes that were left open are taken from the data module.

        Raises:
            MisconfigurationException: if a size is neither given nor known from the data, or is not positive.
        """
        if self.net is not None:
            return
        hidden, beta = self.hparams["hidden"], self.hparams["beta"]
        try:
            sizes = self._resolve_sizes()
            net = wide_fc(sizes["in_features"], sizes["num_classes"], width=sizes["width"], hidden=hidden, beta=beta)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self.net = net
        self.hparams.update(sizes)
        self.val_acc = MulticlassAccuracy(sizes["num_classes"], average="micro")
        self.test_acc = MulticlassAccuracy(sizes["num_classes"], average="micro")

    def _resolve_sizes(self) -> dict[str, int]:
        """Return `in_features`, `num_classes` and `width`, each from the arguments or else from the data module."""
        data: Any = getattr(self._trainer, "datamodule", None)
        sizes: dict[str, int] = {}
        for name, source in (("in_features", "input_shape"), ("num_classes", "num_classes"), ("width", "n_train")):
            given = self.hparams[name]
            if given is None and not hasattr(data, source):
                raise MisconfigurationException(
                    f"{name}: is None, and there is no data module with `{source}` to take it from; pass "
                    f"WideFC({name}=...), or a data module such as DigitsDataModule() to the trainer"
                )
            if given is not None:
                sizes[name] = given
            elif name == "in_features":
                sizes[name] = math.prod(data.input_shape)
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
            every = self.hparams["measure_every"]
            callbacks += [KernelStability(every_n_steps=every), LambdaMin(every_n_steps=every)]
        if self.hparams["guard"]:
            callbacks.append(ExpressivityGuard(switch_at=self.hparams["switch_at"]))
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
