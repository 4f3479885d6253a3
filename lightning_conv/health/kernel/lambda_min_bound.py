"""``lambda_min_bound``: a proven lower bound of lambda_min for networks of any size, from the kernel over some of the parameters."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_conv.arguments import require_truth
from lightning_conv.health.kernel.subset_bound import SubsetBound, require_whole_kernel, subset_bound
from lightning_conv.health.kernel.subset_parameters import LAST_BLOCK, Subset, subset_parameters
from lightning_conv.kernels.gram import Outputs
from lightning_conv.kernels.planning.request import contracted_outputs
from lightning_conv.kernels.resolve import resolved_spectrum
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.inputs import Inputs, sample_count
from lightning_conv.networks.supported import require_module


def lambda_min_bound(
    model: nn.Module,
    inputs: Inputs,
    *,
    parameters: Subset = LAST_BLOCK,
    outputs: Outputs = "trace",
    cotangents: Tensor | None = None,
    batch_norm: BatchNormMode = "eval",
    max_memory: float | None = None,
    on_training_set: bool = False,
    whole: Bounded | None = None,
) -> SubsetBound:
    r"""Bound lambda_min of the kernel over all trainable parameters from below by the exact kernel over some of them.

    .. math:: \lambda_{\min}(J J^T) \ge \lambda_{\min}(J_S J_S^T)

    since J J^T is the sum of J_S J_S^T and of the kernel over the others, which is positive semidefinite, see ``subset_bound``. The
    parameters of several patterns make one kernel: its lambda_min is at least the sum of theirs, for the same passes. The kernel is
    computed in ``precision="certified"``.

    Args:
        model: see ``ntk_gram``.
        inputs: see ``ntk_gram``.
        parameters: names or patterns such as ``"*lora_*"`` of trainable parameters, or ``"last block"``, see ``subset_parameters``.
        outputs: see ``ntk_gram``; not ``"projected"``, which is an estimate.
        cotangents: see ``ntk_gram``.
        batch_norm: see ``ntk_gram``.
        max_memory: see ``ntk_gram``.
        on_training_set: see ``subset_bound``.
        whole: see ``subset_bound``.

    Returns:
        The bounds. ``probe.certified`` is False where nothing is proven, such as for a network that casts to a narrower type, or where
        the kernel over these parameters is singular.

    Raises:
        TypeError: see ``subset_parameters``, ``subset_bound`` and ``ntk_gram``.
        ValueError: ``outputs`` is ``"projected"``, or stands beside ``cotangents``; see ``subset_parameters`` and ``subset_bound``.

    Cost: one ``ntk_gram`` in float64 whose backward passes end at these parameters, and an eigenvalue problem.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        >>> found = lambda_min_bound(model, torch.eye(4))
        >>> found.parameters, found.probe.certified
        (('2.weight', '2.bias'), True)
    """
    if outputs == "projected" and cotangents is None:
        raise ValueError("outputs: 'projected' is an estimate, and proves nothing; need 'trace', 'full' or 'sum'")
    contracted_outputs(outputs, cotangents, default="trace", allowed=("trace", "full", "sum"))
    require_module(model)
    sample_count(inputs)
    require_whole_kernel(whole)
    require_truth("on_training_set", on_training_set)
    names = subset_parameters(model, inputs, parameters, one_row=cotangents is not None, batch_norm=batch_norm)
    gram, spectrum = resolved_spectrum(
        model,
        inputs,
        outputs=outputs,
        cotangents=cotangents,
        parameters=names,
        start="certified",
        batch_norm=batch_norm,
        max_memory=max_memory,
    )
    return subset_bound([gram], [spectrum.lambda_min], on_training_set=on_training_set, whole=whole)
