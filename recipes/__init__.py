"""Models, data, LightningModules and configurations to run, and the `lightning-conv` command."""

if __name__ != "lightning_conv.recipes":
    raise ImportError(
        f"this folder is the package `lightning_conv.recipes`; import it by that name, not as `{__name__}`"
    )

from typing import TYPE_CHECKING

from lightning_conv._lazy import lazy

__all__ = [
    "GPT",
    "BNResNet",
    "DigitsDataModule",
    "LanguageDataModule",
    "LoRAFineTuning",
    "LoRALinear",
    "TextDataModule",
    "TorchvisionDataModule",
    "WideFC",
    "add_adapters",
    "bn_resnet",
    "make_analytic",
    "merge_adapters",
    "wide_fc",
    "widen_head",
]

if TYPE_CHECKING:
    from lightning_conv.networks.analytic import make_analytic
    from lightning_conv.networks.wide_layer import widen_head
    from lightning_conv.recipes.bn_resnet_module import BNResNet
    from lightning_conv.recipes.data import DigitsDataModule
    from lightning_conv.recipes.language_data import LanguageDataModule
    from lightning_conv.recipes.language_model import GPT
    from lightning_conv.recipes.lora_module import LoRAFineTuning
    from lightning_conv.recipes.low_rank import LoRALinear, add_adapters, merge_adapters
    from lightning_conv.recipes.models import bn_resnet, wide_fc
    from lightning_conv.recipes.text_data import TextDataModule
    from lightning_conv.recipes.torchvision_data import TorchvisionDataModule
    from lightning_conv.recipes.wide_fc_module import WideFC
else:
    __getattr__, __dir__ = lazy(__name__)
