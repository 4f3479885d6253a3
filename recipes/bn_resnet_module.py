"""The recipe `bn_resnet` as a LightningModule: a residual network with BatchNorm and a wide last hidden layer.

The file is not called `bn_resnet.py`: that name of the package is the function which builds the network.
"""

from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_conv.callbacks.guard.settings import StepRule
from lightning_conv.expressivity import Method
from lightning_conv.recipes.models import SMALLEST_IMAGE, Arch, bn_resnet
from lightning_conv.recipes.wide_classifier import WideClassifier


class BNResNet(WideClassifier):
    """Classifies images with `bn_resnet`, after the experiments of Kawaguchi & Sun (AAAI 2021), by SGD with momentum.

    Images of any number of channels, 8 x 8 pixels or more. `Trainer().fit(BNResNet(), DigitsDataModule())` measures the
    kernel and trains with the guarantee: `configure_callbacks` adds the callbacks. A callback of the same type in the
    trainer takes precedence.

    No theorem proves that this network satisfies the expressivity condition. The guard certifies it at the switch, for
    the trained trunk in eval mode (running statistics of BatchNorm); where it cannot, it leaves the run as it is. In
    phase 2 the whole network stays in eval mode. The kernel is measured with the probe's own batch statistics, held
    constant (`Probe(batch_norm="frozen")`). It needs gradients through the convolutions, hence the small probe.

    The loss is the mean softmax cross-entropy (natural logarithm). Logged: `train_loss` (mean over the epoch's batches,
    in train mode, while the weights move), `val_loss`, `val_acc`, `test_loss`, `test_acc` (accuracies in [0, 1]).

    Sizes left at None are read from the data module (`n_train`, `num_classes`, `input_shape`) when a run starts, and
    written to `hparams`: `BNResNet.load_from_checkpoint(path)` needs no data.

    Args:
        arch: `"resnet8"`, `"resnet14"`, `"resnet20"` (three stages) or `"resnet18"` (torchvision's four, with a 3 x 3
            stem).
        channels: channels of the first stage; None: 16, and 64 for `"resnet18"`.
        width: units of the wide last hidden layer; None: ceil(width_factor * n_train).
        width_factor: width per training sample when `width` is None.
        feature_norm: BatchNorm before the wide layer, see `bn_resnet`.
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
        in_channels: channels of the images; None: from the data module.
        num_classes: number of classes; None: from the data module.
    """

    input_setting = "in_channels"

    def __init__(
        self,
        arch: Arch = "resnet14",
        channels: int | None = None,
        width: int | None = None,
        width_factor: float = 1.1,
        feature_norm: bool = True,
        beta: float = 100.0,
        lr: float = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        guard: bool = True,
        diagnostics: bool = True,
        measure_every: int | None = None,
        probe_size: int = 32,
        switch_at: int | float | Literal["auto"] = 0.6,
        method: Method = "auto",
        step_rule: StepRule = "base",
        cache_features: bool = True,
        in_channels: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    @override
    def build(self, sizes: dict[str, int]) -> nn.Sequential:
        """Build the network from `in_channels`, `num_classes` and `width`."""
        names = ("arch", "channels", "feature_norm", "beta")
        options: dict[str, Any] = {name: self.hparams[name] for name in names}
        return bn_resnet(sizes["in_channels"], sizes["num_classes"], width=sizes["width"], **options)

    @override
    def input_size(self, shape: tuple[int, ...]) -> int:
        """Return the number of channels.

        Raises:
            ValueError: if the inputs are no images of 8 x 8 pixels or more.
        """
        if len(shape) != 3 or min(shape[1:]) < SMALLEST_IMAGE:
            raise ValueError(
                f"data: inputs of shape {shape}; BNResNet takes images (channels, height, width) of at least "
                f"{SMALLEST_IMAGE} x {SMALLEST_IMAGE} pixels"
            )
        return shape[0]

    @override
    def on_fit_start(self) -> None:
        """Refuse a last batch over which BatchNorm has no variance: before the first epoch, not at its end.

        Raises:
            MisconfigurationException: if the last batch of an epoch has a single sample.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        n, size = getattr(data, "n_train", None), getattr(data, "batch_size", None)
        if isinstance(n, int) and isinstance(size, int) and (n - 1) % size == 0:
            raise MisconfigurationException(
                f"batch_size: {size} leaves a last batch of a single one of the {n} training samples, over which BatchNorm has no "
                f"variance; choose another, such as {size + 1}"
            )
