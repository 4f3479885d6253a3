"""One pass of SGD on even against odd digits, and the same pass of the linearised network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_conv.recipes.lab.data import Source, splits
from lightning_conv.theory.papers.averaged_sgd import (
    AveragedIterate,
    SymmetricTwoLayer,
    largest_step,
    progressive_bound,
)


@dataclass(frozen=True)
class Parity:
    """Digits with targets 1 (even) and -1 (odd), rows of norm 1, float64."""

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


@dataclass(frozen=True)
class Pass:
    """Test errors of the last, the averaged and the linearised iterate at some steps of one pass over the samples."""

    steps: list[int]
    last: list[float]  # mean squared error of theta_t
    averaged: list[float]  # mean squared error of the average of theta_0 ... theta_t
    linear: list[float]  # mean squared error of the averaged iterate of the linearised network
    wrong: tuple[float, float]  # share of wrong signs at the end: last, averaged
    distance: float  # |theta_T - theta_0|
    progressive: list[float]  # linearised network: mean loss up to these steps on each sample, before it is learned
    promised: list[float]  # its upper bound, by ``progressive_bound``
    diagonal: float  # max |grad g(x; theta_0)|^2 over the samples
    gap: float  # root mean square on the test set between network and linearised network, both averaged


def parity(n: int, source: Source = "digits", root: str = "data", tests: int = 1000) -> Parity:
    """Return the first n training images and up to ``tests`` test images, with their parity as the target.

    Args:
        n: number of training images.
        source: source of the images: digits, or mnist, which must be on disk.
        root: folder of MNIST.
        tests: largest number of test images.

    Raises:
        ValueError: n is below 10, or larger than the training set.
    """
    found = splits(source, root)

    def half(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = images.double().flatten(1)
        return rows / rows.norm(dim=1, keepdim=True), 1.0 - 2.0 * (labels % 2).double()

    inputs, targets = half(*found.train.tensors)
    if not 10 <= n <= len(inputs):
        raise ValueError(f"n: {n}; need 10 to {len(inputs)} training samples")
    return Parity(inputs[:n], targets[:n], *(part[:tests] for part in half(*found.test.tensors)))


def network_of(
    data: Parity, width: int, sharpness: float, generator: torch.Generator | None = None
) -> SymmetricTwoLayer:
    """Return M softplus units with the symmetric initialisation."""
    return SymmetricTwoLayer(data.inputs.shape[1], width, activation=nn.Softplus(sharpness), generator=generator)


def one_pass(data: Parity, width: int, sharpness: float, penalty: float, noise: float, seed: int) -> Pass:
    """Run one pass of SGD over the samples in a random order, and the same pass of the linearised network.

    Args:
        data: training and test samples.
        width: number M of units.
        sharpness: sharpness beta of the softplus.
        penalty: weight lambda of (lambda/2) |theta - theta_0|^2.
        noise: share of training labels that are flipped.
        seed: seed of the order, the flips and the initialisation.
    """
    generator = torch.Generator().manual_seed(1000 * width + seed)
    network = network_of(data, width, sharpness, generator)
    order = torch.randperm(len(data.inputs), generator=generator)
    inputs, targets, eta = data.inputs[order], data.targets[order], largest_step(penalty)
    flipped = torch.rand(len(targets), generator=generator) < noise
    targets = torch.where(flipped, -targets, targets)
    truth = (1 - 2 * noise) * data.test_targets
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    kernel, across = network.kernel(inputs), network.kernel(data.test_inputs, inputs)
    coefficients = torch.zeros(len(inputs), dtype=torch.float64)  # theta - theta_0 = sum c_s grad g(x_s; theta_0)
    mean_coefficients = coefficients.clone()
    square, paid, progressive = 0.0, 0.0, []  # |theta_t - theta_0|^2 of the linearised network, and its losses so far
    average = AveragedIterate(network.named_parameters())
    average.add(network.named_parameters())
    moments = _moments(len(inputs))
    steps, last, averaged, linear = [], [], [], []
    parameters = dict(network.named_parameters())
    mean_network = network_of(data, width, sharpness)
    for t in range(len(inputs)):
        loss = 0.5 * (network(inputs[t : t + 1])[0, 0] - targets[t]).square()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                parameter.sub_(gradient + penalty * (parameter - start[name]), alpha=eta)
        output = float(kernel[t] @ coefficients)
        error = output - float(targets[t])
        paid += (error**2 + penalty * square) / 2
        shrunk = 1 - eta * penalty
        square = shrunk**2 * square - 2 * eta * error * shrunk * output + (eta * error) ** 2 * float(kernel[t, t])
        coefficients *= shrunk
        coefficients[t] -= eta * error
        average.add(network.named_parameters())
        mean_coefficients += (coefficients - mean_coefficients) / (t + 2)
        if t + 1 in moments:
            mean_network.load_state_dict(average.mean)
            steps.append(t + 1)
            progressive.append(paid / (t + 1))
            last.append(_error(_outputs(network, data), truth))
            averaged.append(_error(_outputs(mean_network, data), truth))
            linear.append(_error(across @ mean_coefficients, truth))
    outputs = _outputs(network, data), _outputs(mean_network, data)
    signs = [float((each * data.test_targets <= 0).double().mean()) for each in outputs]
    moved = math.sqrt(sum(float((value.detach() - start[name]).square().sum()) for name, value in parameters.items()))
    gap = float((outputs[1] - across @ mean_coefficients).square().mean().sqrt())
    bounds = progressive_bound(kernel, targets, eta, penalty, steps)
    return Pass(
        steps, last, averaged, linear, (signs[0], signs[1]), moved, progressive,
        [bound / t for bound, t in zip(bounds, steps, strict=True)],
        float(kernel.diagonal().max()), gap,
    )  # fmt: skip


def _moments(total: int) -> set[int]:
    """Return the steps that are evaluated: about 25, evenly spaced on a logarithmic axis, and the last one."""
    return {round(total ** (k / 24)) for k in range(25)} | {total}


@torch.no_grad()
def _outputs(network: SymmetricTwoLayer, data: Parity) -> Tensor:
    outputs: Tensor = network(data.test_inputs)[:, 0]
    return outputs


def _error(outputs: Tensor, truth: Tensor) -> float:
    return float((outputs - truth).square().mean())
