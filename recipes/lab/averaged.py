"""Averaged SGD in one pass over the digits: the decay of the NTK's spectrum, and the averaged iterate beside the last one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_conv.progress import progress_bar
from lightning_conv.recipes.data import DigitsDataModule
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.theory.averaged_sgd import (
    SOURCE,
    AveragedIterate,
    Decay,
    SymmetricTwoLayer,
    degrees_of_freedom,
    largest_step,
    spectrum_decay,
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
    """One pass over the samples: errors on the test set at some steps, by iterate."""

    steps: list[int]
    last: list[float]  # mean squared error of theta_t
    averaged: list[float]  # of the average of theta_0 ... theta_t
    linear: list[float]  # of the averaged iterate of the linearised network
    wrong: tuple[float, float]  # share of wrong signs at the end: last, averaged
    distance: float  # |theta_T - theta_0|
    gap: float  # root mean square on the test set between network and linearised network, both averaged


def run(
    n: int = 1437,
    width: int = 1024,
    widths: tuple[int, ...] = (64, 256, 1024),
    noise: float = 0.3,
    sharpness: float = 64.0,
    runs: int = 5,
    penalty: float | None = None,
    first: int = 3,
    last: int = 200,
) -> Report:
    """One pass of SGD over n digits, several times.

    Args:
        n: training samples = steps.
        width: M of the runs that are compared.
        widths: M of the runs that are held against the linearised network.
        noise: share of training labels that are flipped in the second comparison.
        sharpness: beta of the softplus; |s''| <= beta / 4, as the theorem asks for a bound.
        runs: seeds of the order and of the initialisation.
        penalty: lambda; None: T^(-beta / (2 r beta + 1)) of Corollary 1 with r = 1/2 and the measured beta.
        first: rank of the first eigenvalue that the decay is fitted to.
        last: of the last one.

    Raises:
        ValueError: fewer than two runs, or too few samples.
    """
    if not 0 <= noise < 0.5:
        raise ValueError(f"noise: {noise}; need a share in [0, 0.5), beyond which the labels mean their opposite")
    if runs < 2:
        raise ValueError(f"runs: {runs}; need two or more to say how far they scatter")
    data = _parity(n)
    n = len(data.inputs)
    network = _network(data, max(widths), sharpness, torch.Generator().manual_seed(0))
    eigenvalues = torch.linalg.eigvalsh(network.kernel(data.inputs) / n)
    floor = n * torch.finfo(torch.float64).eps * float(eigenvalues[-1])
    decay = spectrum_decay(eigenvalues, first=first, last=min(last, n // 2), floor=floor)
    penalty = decay.penalty(n) if penalty is None else penalty
    passes: dict[int, list[Pass]] = {}
    total = runs * (len({*widths, width}) + 1)
    with progress_bar("averaged SGD", 2.0 * total, None) as report:
        for size in sorted({*widths, width}):
            passes[size] = []
            for seed in range(runs):
                passes[size].append(_one_pass(data, size, sharpness, penalty, 0.0, seed))
                report(sum(map(len, passes.values())) / total)
        noisy = [_one_pass(data, width, sharpness, penalty, noise, seed) for seed in range(runs)]
    chosen = passes[width]
    gaps = {size: _mean([each.gap for each in passes[size]]) for size in widths}
    start = float(network(data.test_inputs).detach().abs().max())
    checks = _checks(decay, eigenvalues, penalty, {0.0: chosen, noise: noisy}, gaps, start)
    rows = [
        {
            "width": size, "labels flipped": f"{share:.0%}",
            "test error, last": _mean([p.last[-1] for p in each]), "test error, averaged": _mean([p.averaged[-1] for p in each]),
            "wrong signs, last": _mean([p.wrong[0] for p in each]), "wrong signs, averaged": _mean([p.wrong[1] for p in each]),
            "distance to start": _mean([p.distance for p in each]), "gap to the linearised network": _mean([p.gap for p in each]),
        }
        for size, share, each in [*((size, 0.0, each) for size, each in passes.items()), (width, noise, noisy)]
    ]  # fmt: skip
    freedom = [
        {
            "lambda": value, "degrees of freedom": degrees_of_freedom(eigenvalues, value),
            "bound Tr(K/n) / lambda": float(eigenvalues.sum()) / value,
        }
        for value in (1.0, 0.1, penalty, 1e-3, 1e-4)
    ]  # fmt: skip
    setting = (
        f"Even against odd digits (targets 1 and -1, rows of norm 1), {n} for training and {len(data.test_inputs)} for testing. Two "
        f"layers of M softplus({sharpness:g}) units with the symmetric initialisation, all parameters trained; one pass of SGD, a sample "
        f"a step, on 1/2 (g(x) - y)^2 + (lambda/2) |theta - theta_0|^2 with lambda = {penalty:.4g} and the largest constant step of the "
        f"theorem, eta = {largest_step(penalty):.4g}. Errors are means of (g(x) - g_rho(x))^2 on the test set, over {runs} seeds; g_rho is "
        "the mean label, y itself or, where a share p of the training labels is flipped, (1 - 2p) y. The linearised network is the same "
        "SGD on g's tangent at theta_0, exactly, through its kernel."
    )
    return Report(
        "averaged-sgd", "Averaged SGD under the NTK", setting, checks,
        {"By width": rows, "Degrees of freedom of the kernel on the training set": freedom},
        _figure(eigenvalues, decay, {0.0: chosen, noise: noisy}, gaps, width), {"beta": decay.beta, "gaps": gaps, "steps": chosen[0].steps},
    )  # fmt: skip


def _parity(n: int) -> Parity:
    module = DigitsDataModule()
    module.setup()

    def half(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = images.double().flatten(1)
        return rows / rows.norm(dim=1, keepdim=True), 1.0 - 2.0 * (labels % 2).double()

    inputs, targets = half(*module.splits.train.tensors)
    if not 10 <= n <= len(inputs):
        raise ValueError(f"n: {n}; need 10 to {len(inputs)} training samples")
    return Parity(inputs[:n], targets[:n], *half(*module.splits.test.tensors))


def _network(data: Parity, width: int, sharpness: float, generator: torch.Generator | None = None) -> SymmetricTwoLayer:
    return SymmetricTwoLayer(data.inputs.shape[1], width, activation=nn.Softplus(sharpness), generator=generator)


def _one_pass(data: Parity, width: int, sharpness: float, penalty: float, noise: float, seed: int) -> Pass:
    generator = torch.Generator().manual_seed(1000 * width + seed)
    network = _network(data, width, sharpness, generator)
    order = torch.randperm(len(data.inputs), generator=generator)
    inputs, targets, eta = data.inputs[order], data.targets[order], largest_step(penalty)
    flipped = torch.rand(len(targets), generator=generator) < noise
    targets = torch.where(flipped, -targets, targets)
    truth = (1 - 2 * noise) * data.test_targets
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    kernel, across = network.kernel(inputs), network.kernel(data.test_inputs, inputs)
    coefficients = torch.zeros(len(inputs), dtype=torch.float64)  # theta - theta_0 = sum c_s grad g(x_s; theta_0)
    mean_coefficients = coefficients.clone()
    average = AveragedIterate(network.named_parameters())
    average.add(network.named_parameters())
    moments = _moments(len(inputs))
    steps, last, averaged, linear = [], [], [], []
    parameters = dict(network.named_parameters())
    mean_network = _network(data, width, sharpness)
    for t in range(len(inputs)):
        loss = 0.5 * (network(inputs[t : t + 1])[0, 0] - targets[t]).square()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                parameter.sub_(gradient + penalty * (parameter - start[name]), alpha=eta)
        error = float(kernel[t] @ coefficients - targets[t])
        coefficients *= 1 - eta * penalty
        coefficients[t] -= eta * error
        average.add(network.named_parameters())
        mean_coefficients += (coefficients - mean_coefficients) / (t + 2)
        if t + 1 in moments:
            mean_network.load_state_dict(average.mean)
            steps.append(t + 1)
            last.append(_error(_outputs(network, data), truth))
            averaged.append(_error(_outputs(mean_network, data), truth))
            linear.append(_error(across @ mean_coefficients, truth))
    outputs = _outputs(network, data), _outputs(mean_network, data)
    signs = [float((each * data.test_targets <= 0).double().mean()) for each in outputs]
    moved = math.sqrt(sum(float((value.detach() - start[name]).square().sum()) for name, value in parameters.items()))
    gap = float((outputs[1] - across @ mean_coefficients).square().mean().sqrt())
    return Pass(steps, last, averaged, linear, (signs[0], signs[1]), moved, gap)


def _moments(total: int) -> set[int]:
    """Steps that are evaluated: about 25, evenly on a logarithmic axis, and the last one."""
    return {round(total ** (k / 24)) for k in range(25)} | {total}


@torch.no_grad()
def _outputs(network: SymmetricTwoLayer, data: Parity) -> Tensor:
    outputs: Tensor = network(data.test_inputs)[:, 0]
    return outputs


def _error(outputs: Tensor, truth: Tensor) -> float:
    return float((outputs - truth).square().mean())


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    centre = _mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def _checks(
    decay: Decay,
    eigenvalues: Tensor,
    penalty: float,
    passes: dict[float, list[Pass]],
    gaps: dict[int, float],
    start: float,
) -> list[Check]:
    freedom = degrees_of_freedom(eigenvalues, penalty)
    most = min(len(eigenvalues), float(eigenvalues.sum()) / penalty)
    eta = largest_step(penalty)
    gains = {share: [each.last[-1] - each.averaged[-1] for each in runs] for share, runs in passes.items()}
    sizes = sorted(gaps)
    slope = math.log(gaps[sizes[-1]] / gaps[sizes[0]]) / math.log(sizes[-1] / sizes[0]) if len(sizes) > 1 else math.nan
    largest = float(eigenvalues[-1])
    return [
        Check("g_0 = 0 under the symmetric initialisation", f"{SOURCE}, section 2", start < 1e-12, f"largest output {start:.1e}"),
        Check(
            "0 < Tr(K (K + n lambda)^-1) <= min(n, Tr(K/n) / lambda)", SOURCE, 0 < freedom <= most,
            f"{freedom:.4g} <= {most:.4g} at lambda = {penalty:.4g}",
        ),
        Check("4 (6 + lambda) eta <= 1", f"{SOURCE}, Theorem 1", 4 * (6 + penalty) * eta <= 1 + 1e-12, f"eta = {eta:.4g}"),
        Check(
            "lambda is at most the largest eigenvalue of the kernel operator", f"{SOURCE}, Theorem 1", penalty <= largest,
            f"{penalty:.4g} <= {largest:.4g}", must=False,
        ),
        Check(
            "the spectrum decays as i^-beta with beta > 1", f"{SOURCE}, assumption A4", decay.beta > 1,
            f"beta = {decay.beta:.3f} +- {decay.standard_error:.3f} from eigenvalues {decay.first} to {decay.last}, "
            f"R^2 = {decay.r_squared:.4f}",
            must=False,
        ),
        *(
            Check(
                f"the averaged iterate has the smaller test error, {share:.0%} of labels flipped", f"{SOURCE}, Theorem 1",
                _mean(gain) > 2 * _standard_error(gain),
                f"last minus averaged {_mean(gain):.4f} +- {_standard_error(gain):.4f} (standard error of {len(gain)} seeds)", must=False,
            )
            for share, gain in gains.items()
        ),
        Check(
            "network and linearised network come together with the width", f"{SOURCE}, section 3", slope < 0,
            f"gap ~ M^{slope:.2f} from {sizes[0]} to {sizes[-1]} units", must=False,
        ),
    ]  # fmt: skip


def _figure(
    eigenvalues: Tensor, decay: Decay, passes: dict[float, list[Pass]], gaps: dict[int, float], width: int
) -> Figure:
    figure = Figure(figsize=(10, 7), layout="constrained")
    ((spectrum, clean), (gap, noisy)) = figure.subplots(2, 2)
    values = eigenvalues.flip(0)
    rank = torch.arange(1, len(values) + 1)
    spectrum.plot(rank, values.clamp(min=1e-300), color="tab:blue", linewidth=1.2, label="NTK Gram / n")
    fitted = torch.tensor([decay.first, decay.last], dtype=torch.float64)
    line = f"$i^{{-{decay.beta:.2f}}}$, fitted"
    spectrum.plot(fitted, decay.constant * fitted**-decay.beta, color="black", linestyle="--", label=line)
    spectrum.set_xscale("log")
    spectrum.set_yscale("log")
    spectrum.set_ylim(bottom=float(values[values > 0].min()) / 2)
    spectrum.set_xlabel("index")
    spectrum.set_ylabel("eigenvalue")
    spectrum.set_title("Spectrum of the kernel", fontsize=10)

    for axes, (share, runs) in zip((clean, noisy), passes.items(), strict=False):
        for name, curves, colour, style in (
            ("last iterate", [each.last for each in runs], "tab:gray", "-"),
            ("averaged iterate", [each.averaged for each in runs], "tab:blue", "-"),
            ("averaged, linearised", [each.linear for each in runs], "tab:orange", "--"),
        ):
            table = torch.tensor(curves, dtype=torch.float64)
            centre, error = table.mean(0), table.std(0) / math.sqrt(len(table))
            axes.plot(runs[0].steps, centre, color=colour, linestyle=style, label=name)
            axes.fill_between(runs[0].steps, centre - error, centre + error, color=colour, alpha=0.2, linewidth=0)
        axes.set_xscale("log")
        axes.set_xlabel("samples seen")
        axes.set_ylabel("test error")
        axes.set_title(f"{width} units, {share:.0%} of labels flipped (band: standard error)", fontsize=10)

    gap.plot(list(gaps), list(gaps.values()), marker="o", color="tab:blue", label="measured")
    anchor = next(iter(gaps))
    for power, style in ((-0.5, ":"), (-1.0, "--")):
        law = [gaps[anchor] * (m / anchor) ** power for m in gaps]
        gap.plot(list(gaps), law, color="black", linestyle=style, linewidth=1, label=f"$M^{{{power:g}}}$")
    gap.set_xscale("log")
    gap.set_yscale("log")
    gap.set_xlabel("units M")
    gap.set_ylabel("distance of the outputs")
    gap.set_title("Network against its linearisation, averaged", fontsize=10)
    for axes in (spectrum, clean, gap, noisy):
        axes.grid(visible=True, alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    return figure
