"""Du et al. in a run: what they ask of the kernel, of the paper's own networks and, after them, of any other."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_conv.callbacks.certificates import sole_child, voided
from lightning_conv.contraction import is_full
from lightning_conv.eigenvalues.bounded import Bounded
from lightning_conv.evaluation import Inputs
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.infinite import LimitKernel, fully_connected_limit, residual_limit
from lightning_conv.spectrum import Spectrum
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.du import (
    drift_criterion,
    initial_criterion,
    lambda_min_criterion,
    last_hidden_gram,
    own_lambda_min_criterion,
)
from lightning_conv.theory.networks import DuFC, DuNetwork, DuResNet

DU = "Du et al. 2019 (1811.03804)"

OWN = "lambda_0 := 4/3 lambda_min(G(0)), all layers"
"""What stands for lambda_0 = lambda_min(K^(H)) where there is no limit kernel."""

UNIT = 1e-4
"""How far the norm of an input may be from the 1 that the paper asks for."""


def papers_network(network: nn.Module, inputs: Inputs) -> str | None:
    """Name of the ``DuFC`` or ``DuResNet`` that the module is, or hands its inputs to, on inputs of norm 1; None: it is no such network."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return None
    if not any(isinstance(module, (DuFC, DuResNet)) for module in network.modules()):
        return None
    try:
        name = sole_child(network, inputs)
    except (ValueError, TypeError, RuntimeError):
        return None
    unit = bool(((inputs.double().flatten(1).norm(dim=1) - 1).abs() <= UNIT).all())
    return name if unit and isinstance(network.get_submodule(name), (DuFC, DuResNet)) else None


def limit_kernel(network: DuNetwork, inputs: Tensor) -> LimitKernel:
    """K^(H) of the network on the inputs."""
    x = inputs.detach().cpu().double()
    if network.c_res is None:
        return fully_connected_limit(x, network.depth, network.activation)
    return residual_limit(x, network.depth, network.activation, c_res=network.c_res)


def hidden_gram(network: DuNetwork, inputs: Tensor) -> Tensor:
    """G^(H) on the inputs, on the CPU."""
    with torch.no_grad():
        return last_hidden_gram(network, inputs).cpu()


def papers_criteria(gram: Tensor, first: Tensor, limit: LimitKernel) -> list[Criterion]:
    """What the paper asks of the kernel of the last hidden layer.

    Args:
        gram: G^(H)(k).
        first: G^(H)(0).
        limit: K^(H).
    """
    lambda_0 = limit.lambda_0
    return [
        lambda_min_criterion(gram, lambda_0),
        drift_criterion(gram, first, lambda_0),
        initial_criterion(first, limit),
    ]


def own_criteria(gram: KernelGram, first: KernelGram, first_spectrum: Spectrum) -> list[Criterion]:
    """After Du et al., for any network: the kernel over all layers, and 4/3 lambda_min(G(0)) for lambda_0."""
    drift = drift_criterion(gram, first, own_lambda_0(first_spectrum))
    found = [
        own_lambda_min_criterion(gram, first),
        replace(drift, source=f"after {drift.source}", asks=f"{drift.asks}, {OWN}"),
    ]
    if is_full(gram):
        return found
    why = f'the kernel is summed over {gram.n_outputs} outputs; Probe(outputs="full") gives the one that the theorem is about'
    return [voided(each, why) for each in found]


def own_lambda_0(spectrum: Spectrum) -> Bounded:
    """4/3 lambda_min(G(0)): the largest lambda_0 for which lambda_min(G(0)) >= 3/4 lambda_0, as the proofs have it."""
    smallest = spectrum.lambda_min
    value, lower, upper = (4 / 3 * end for end in (smallest.value, smallest.lower, smallest.upper))
    return replace(smallest, value=value, lower=lower, upper=upper)


def not_of_the_paper(criterion: Criterion) -> Criterion:
    """A failure with a lambda_0 that is not the theorem's refutes nothing that the theorem says."""
    if criterion.verdict != "refuted":
        return criterion
    why = "; the kernel is over all layers, and the paper's lambda_0 is that of the last hidden one, which is smaller"
    return replace(criterion, verdict="undecided", reason=criterion.reason + why)
