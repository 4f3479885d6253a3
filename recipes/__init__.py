"""Models, data, LightningModules and configurations to run, and the `lightning-conv` command."""

if __name__ != "lightning_conv.recipes":
    raise ImportError(
        f"this folder is the package `lightning_conv.recipes`; import it by that name, not as `{__name__}`"
    )

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_conv.networks.analytic import make_analytic
    from lightning_conv.networks.wide_layer import widen_head
    from lightning_conv.recipes.bn_resnet_module import BNResNet
    from lightning_conv.recipes.data import DigitsDataModule
    from lightning_conv.recipes.models import bn_resnet, wide_fc
    from lightning_conv.recipes.text_data import TextDataModule
    from lightning_conv.recipes.torchvision_data import TorchvisionDataModule
    from lightning_conv.recipes.wide_fc_module import WideFC

__all__ = [
    "BNResNet",
    "DigitsDataModule",
    "TextDataModule",
    "TorchvisionDataModule",
    "WideFC",
    "bn_resnet",
    "make_analytic",
    "wide_fc",
    "widen_head",
]

# Loaded on first use: the command's help and version then need neither torch nor Lightning.
_HOME = {
    "BNResNet": "lightning_conv.recipes.bn_resnet_module",
    "DigitsDataModule": "lightning_conv.recipes.data",
    "TextDataModule": "lightning_conv.recipes.text_data",
    "TorchvisionDataModule": "lightning_conv.recipes.torchvision_data",
    "WideFC": "lightning_conv.recipes.wide_fc_module",
    "bn_resnet": "lightning_conv.recipes.models",
    "make_analytic": "lightning_conv.networks.analytic",
    "wide_fc": "lightning_conv.recipes.models",
    "widen_head": "lightning_conv.networks.wide_layer",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its file on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, also those not loaded yet."""
    return sorted({*globals(), *__all__})
