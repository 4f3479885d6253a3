"""``plan_ntk``: what a tangent kernel will cost in time and memory, and in which form each layer contributes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_conv.kernels.planning.plan import NTKPlan
from lightning_conv.kernels.planning.request import EngineName, Outputs, Request, contracted_outputs
from lightning_conv.kernels.planning.task import Task
from lightning_conv.kernels.products.precision import Precision
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.stage import staged
from lightning_conv.networks.undisturbed import undisturbed

__all__ = ["NTKPlan", "plan_ntk"]


def plan_ntk(
    model: nn.Module,
    inputs: Inputs,
    inputs2: Inputs | None = None,
    *,
    outputs: Outputs = "trace",
    cotangents: Tensor | None = None,
    cotangents2: Tensor | None = None,
    parameters: Sequence[str] | str | None = None,
    per_layer: bool = False,
    precision: Precision = "exact",
    batch_norm: BatchNormMode = "eval",
    max_memory: float | None = None,
    engine: EngineName = "auto",
    projections: int = 16,
) -> NTKPlan:
    """Predict what ``ntk_gram`` does with the same arguments: flops, peak memory, seconds, and the form of each layer.

    Only a few samples pass through the network. All samples do where they couple, and where the few leave a parameter
    unused. This takes a part of the predicted seconds, ``NTKPlan.reading_seconds``; pass the plan to ``ntk_gram`` to
    save it there. Arguments and errors are those of ``ntk_gram``. The plan does not depend on the values of ``cotangents``.

    Returns:
        The plan; printed, it is a table of the layers.

    Example:
        >>> import torch
        >>> plan = plan_ntk(torch.nn.Linear(784, 10), torch.rand(100, 784))
        >>> plan.contributions[0].way
        'Hadamard product'
    """
    kind = contracted_outputs(outputs, cotangents, default="trace")
    request = Request(kind, per_layer, precision, batch_norm, max_memory, engine, projections)
    with undisturbed(model), staged(model, inputs) as stage, request.path(stage.stateless, inputs):
        return Task(stage, inputs, inputs2, parameters, request, None, cotangents, cotangents2).plan
