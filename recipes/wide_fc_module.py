"""The recipe `wide_fc` as a LightningModule: a wide fully-connected softplus network with its own diagnostics.

The file is not called `wide_fc.py`: that name of the package is the function which builds the network.
"""

import math
from collections.abc import Sequence
from typing import Literal

from torch import nn
from typing_extensions import override

from lightning_conv.callbacks.guard.settings import StepRule
from lightning_conv.expressivity import Method
from lightning_conv.recipes.models import wide_fc
from lightning_conv.recipes.wide_classifier import WideClassifier


class WideFC(WideClassifier):
    """Classifies with `wide_fc`, the network after Theorem 1 of Kawaguchi & Sun (AAAI 2021), by SGD with momentum.

    `Trainer().fit(WideFC(), DigitsDataModule())` measures the kernel and trains with the guarantee, without a list of
    callbacks: `configure_callbacks` adds them. A callback of the same type in the trainer takes precedence.

    The loss is the mean softmax cross-entropy (natural logarithm). Logged: `train_loss` (mean over the epoch's batches,
    in train mode, while the weights move), `val_loss`, `val_acc`, `test_loss`, `test_acc` (accuracies in [0, 1]).

    Sizes left at None are read from the data module (`n_train`, `num_classes`, `input_shape`) when a run starts, and
    written to `hparams`: `WideFC.load_from_checkpoint(path)` needs no data.

    The default settings suit the digits: `lr` near 2 (1 + momentum) / L_H, below which last-layer steps on the whole
    training set cannot diverge, with L_H = sigma_max([h, 1])^2 / (2 n), about 45 there. L_H bounds the curvature for
    all outputs; where the samples are fitted already it is far smaller. Larger inputs or widths need a smaller `lr`.

    Args:
        hidden: units of the narrow layers; the theorem requires at least 2 min(m_x, n) each (m_x input features).
        width: units of the wide last hidden layer; None: ceil(width_factor * n_train).
        width_factor: width per training sample when `width` is None.
        beta: sharpness of the softplus.
        lr: learning rate.
        momentum: momentum of SGD.
        weight_decay: L2 penalty of SGD; the guarantee is stated without one.
        guard: train in two phases with `ExpressivityGuard`.
        diagnostics: measure the kernel with `KernelStability` and `LambdaMin`.
        measure_every: optimizer steps between two measurements of the kernel; None: as often as 3 % of the time allows.
        probe_size: training samples on which the kernel is measured.
        switch_at: when the guard switches: a share of the run (float), a step (int), or `"auto"`, see
            `ExpressivityGuard`.
        method: method of the guard's certificate, see `certify_expressivity`.
        step_rule: rule that moves the head in phase 2: `"base"` (this optimizer), `"certified"` or `"solve"`, see
            `ExpressivityGuard`.
        cache_features: compute the trunk's features once in phase 2 and look them up; augmented images are computed
            every time.
        in_features: input features m_x after flattening; None: from the data module.
        num_classes: number of classes; None: from the data module.
    """

    input_setting = "in_features"

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
        probe_size: int = 128,
        switch_at: int | float | Literal["auto"] = 0.6,
        method: Method = "auto",
        step_rule: StepRule = "base",
        cache_features: bool = True,
        in_features: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    @override
    def build(self, sizes: dict[str, int]) -> nn.Sequential:
        """Build the network from `in_features`, `num_classes` and `width`."""
        hidden, beta = self.hparams["hidden"], self.hparams["beta"]
        return wide_fc(sizes["in_features"], sizes["num_classes"], width=sizes["width"], hidden=hidden, beta=beta)

    @override
    def input_size(self, shape: tuple[int, ...]) -> int:
        """Return the number of features after flattening."""
        return math.prod(shape)
