"""What Du et al. ask of the kernel during a run: for the papers' own networks and, after them, for any other."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from lightning_conv.callbacks.criteria.networks import find_network, unit_rows
from lightning_conv.callbacks.run.assumptions import without_verdict
from lightning_conv.callbacks.run.measured_kernel import is_of_loss, not_full
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.infinite import (
    LimitKernel,
    c_sigma,
    convolutional_limit,
    fully_connected_limit,
    h_infinity,
    residual_limit,
)
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.machine.memory import allowed_memory, mebibytes
from lightning_conv.networks.activation import is_relu
from lightning_conv.networks.analytic import find_kinks
from lightning_conv.networks.inputs import Inputs
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.networks import DuConvResNet, DuFC, DuNetwork, DuResNet, DuTwoLayer
from lightning_conv.theory.papers.du import (
    drift_criterion,
    initial_criterion,
    lambda_min_criterion,
    last_hidden_gram,
    own_lambda_min_criterion,
)

DU = "Du et al. 2019 (1811.03804)"

OWN = "lambda_0 := 4/3 lambda_min(G(0)), all layers"
"""What replaces lambda_0 = lambda_min(K^(H)) where there is no limit kernel."""

SLOWEST = 60.0
"""Seconds that a limit kernel may take; it is computed once per fit, before the first step."""

PapersNetwork: TypeAlias = DuNetwork | DuTwoLayer


def papers_network(network: nn.Module, inputs: Inputs, trained: Collection[str]) -> str | None:
    """Return the name of the network of Du et al. that the module is or hands its inputs to; None if the theorems are not about it.

    The theorems ask for inputs of norm 1 (images: |x_i|_F). For the deep networks (``DuFC``, ``DuResNet``, ``DuConvResNet``) they ask
    for a smooth activation and that all weights are trained; for the two-layer one (``DuTwoLayer``) for ReLU, a_r in {-1, 1}, and that
    W alone is trained.

    Args:
        network: whose kernel it is.
        inputs: of the probe.
        trained: names, in ``network``, of the parameters that the kernel is over.
    """
    kinds: tuple[tuple[type[PapersNetwork], ...], ...] = ((DuFC, DuResNet, DuConvResNet), (DuTwoLayer,))
    for several in kinds:
        found = find_network(network, inputs, several, trained)
        if isinstance(found, str):
            continue
        own, x = found.network, cast("Tensor", inputs)
        fixed = {"output.weight"} if isinstance(own, DuTwoLayer) else set()
        alone = found.trained == {name for name, _ in own.named_parameters()} - fixed
        return found.place if alone and unit_rows(x) and _as_in_the_paper(own, x) else None
    return None


def _as_in_the_paper(network: PapersNetwork, inputs: Tensor) -> bool:
    if isinstance(network, DuTwoLayer):
        return is_relu(network.activation) and bool((network.output.weight.detach().abs() == 1).all())
    try:
        return not find_kinks(network, inputs)
    except (ValueError, TypeError, RuntimeError):  # it is not known whether the network is smooth
        return False


def limit_kernel(network: PapersNetwork, inputs: Tensor, max_memory: float | None = None) -> LimitKernel:
    """Return K^(H) of the network on the inputs, without its covariances; for the two-layer network H_inf.

    Args:
        network: of the papers.
        inputs: n samples.
        max_memory: bytes that it may use; None: a quarter of what is free.

    Raises:
        MemoryError: the convolutional limit, over all pairs of positions of all pairs of images, takes too much memory or time.
    """
    x = inputs.detach().cpu().double()
    if isinstance(network, DuTwoLayer):
        matrix = h_infinity(x)
        # Products of d terms, an angle and an arc tangent, each to some units in the last place.
        error = 2.0**-52 * (x.flatten(1).shape[1] + 32) * float(matrix.norm())
        return LimitKernel(matrix, (), error, 0, c_sigma(network.activation))
    if isinstance(network, DuConvResNet):
        _require_room(network, x, max_memory)
        assert network.c_res is not None
        found = convolutional_limit(
            x, network.depth, network.activation, kernel_size=network.kernel_size, c_res=network.c_res
        )
    elif network.c_res is None:
        found = fully_connected_limit(x, network.depth, network.activation)
    else:
        found = residual_limit(x, network.depth, network.activation, c_res=network.c_res)
    return replace(found, covariances=())


def _require_room(network: DuConvResNet, images: Tensor, max_memory: float | None) -> None:
    rows, depth = len(images) * math.prod(images.shape[2:]), network.depth
    # Measured: at the peak 4 H + 3 matrices of (n p)^2 numbers; 2.5e-9 s per entry, layer and node of the quadrature.
    wanted, allowed = 8 * rows**2 * (4 * depth + 3), allowed_memory(max_memory, torch.device("cpu"))
    seconds = 2.5e-9 * 1024 * rows**2 * (depth - 1)
    if wanted > allowed or seconds > SLOWEST:
        raise MemoryError(
            f"the limit kernel of DuConvResNet on {len(images)} images of {rows // len(images)} positions takes {mebibytes(wanted)} "
            f"({mebibytes(allowed)} are allowed) and about {seconds:.0f} s ({SLOWEST:.0f} are)"
        )


def hidden_gram(network: PapersNetwork, inputs: Tensor) -> Tensor:
    """Return G^(H) on the inputs, on the CPU; for the two-layer network H(k)."""
    with torch.no_grad():
        return last_hidden_gram(network, inputs).cpu()


def papers_criteria(gram: Tensor, first: Tensor, limit: LimitKernel) -> list[Criterion]:
    """Judge what the papers ask of the kernel of the last hidden layer.

    Args:
        gram: G^(H)(k), or H(k).
        first: G^(H)(0), or H(0).
        limit: K^(H), or H_inf.
    """
    lambda_0 = limit.lambda_0
    return [
        lambda_min_criterion(gram, lambda_0),
        drift_criterion(gram, first, lambda_0),
        initial_criterion(first, limit),
    ]


def own_criteria(gram: KernelGram, first: KernelGram, first_spectrum: Spectrum) -> list[Criterion]:
    """Judge the kernel over all layers of any network after Du et al., with 4/3 lambda_min(G(0)) in place of lambda_0."""
    drift = drift_criterion(gram, first, own_lambda_0(first_spectrum))
    found = [
        own_lambda_min_criterion(gram, first),
        replace(drift, source=f"after {drift.source}", asks=f"{drift.asks}, {OWN}"),
    ]
    why = not_full(gram)
    if is_of_loss(gram):  # numbers of another kernel than the one that is asked about
        found = [replace(each, measured=math.nan) for each in found]
    return [without_verdict(each, why) for each in found] if why else found


def own_lambda_0(spectrum: Spectrum) -> Bounded:
    """Return 4/3 lambda_min(G(0)), the largest lambda_0 for which lambda_min(G(0)) >= 3/4 lambda_0, as in the proofs."""
    smallest = spectrum.lambda_min
    value, lower, upper = (4 / 3 * end for end in (smallest.value, smallest.lower, smallest.upper))
    return replace(smallest, value=value, lower=lower, upper=upper)


def not_of_the_paper(criterion: Criterion) -> Criterion:
    """Turn ``refuted`` into ``undecided``: with a lambda_0 that is not the theorem's, a failure does not refute the theorem."""
    if criterion.verdict != "refuted":
        return criterion
    why = "; the kernel is over all layers, and the paper's lambda_0 is that of the last hidden one, which is smaller"
    return replace(criterion, verdict="undecided", reason=criterion.reason + why)
