"""The empirical neural tangent kernel of any ``nn.Module``."""

from typing import TYPE_CHECKING

from lightning_conv._lazy import lazy

__all__ = [
    "KernelGram",
    "LayerRule",
    "NTKOperator",
    "NTKPlan",
    "OuterRule",
    "Outputs",
    "Precision",
    "Processes",
    "ProcessesError",
    "ntk_gram",
    "plan_ntk",
    "register_rule",
]

if TYPE_CHECKING:
    from lightning_conv.kernels.gram import KernelGram, Outputs, ntk_gram
    from lightning_conv.kernels.operator import NTKOperator
    from lightning_conv.kernels.plan import NTKPlan, plan_ntk
    from lightning_conv.kernels.products.precision import Precision
    from lightning_conv.kernels.rules import LayerRule, OuterRule, register_rule
    from lightning_conv.machine.processes import Processes, ProcessesError
else:
    __getattr__, __dir__ = lazy(__name__)
