"""Averaged SGD in one pass over the digits: the decay of the NTK's spectrum, and the averaged iterate beside the last one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

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
    widths: tuple[int, ...] = (64, 256, 1024, 4096),
    runs: int = 5,
    penalty: float | None = None,
    first: int = 3,
    last: int = 300,
) -> Report:
    """One pass of SGD over n digits, several times.

    Args:
        n: training samples = steps.
        width: M of the runs that are compared.
        widths: M of the runs that are held against the linearised network.
        runs: seeds of the order and of the initialisation.
        penalty: lambda; None: T^(-beta / (2 r beta + 1)) of Corollary 1 with r = 1/2 and the measured beta.
        first: rank of the first eigenvalue that the decay is fitted to.
        last: of the last one.

    Raises:
        ValueError: fewer than two runs, or too few samples.
    """
    if runs < 2:
        raise ValueError(f"runs: {runs}; need two or more to say how far they scatter")
    data = _parity(n)
    n = len(data.inputs)
    network = SymmetricTwoLayer(data.inputs.shape[1], max(widths), generator=torch.Generator().manual_seed(0))
    eigenvalues = torch.linalg.eigvalsh(network.kernel(data.inputs) / n)
    floor = n * torch.finfo(torch.float64).eps * float(eigenvalues[-1])
    decay = spectrum_decay(eigenvalues, first=first, last=min(last, n // 2), floor=floor)
    penalty = decay.penalty(n) if penalty is None else penalty
    passes: dict[int, list[Pass]] = {}
    total = runs * len({*widths, width})
    with progress_bar("averaged SGD", 2.0 * total, None) as report:
        for size in sorted({*widths, width}):
            passes[size] = []
            for seed in range(runs):
                passes[size].append(_one_pass(data, size, penalty, seed))
                report(sum(map(len, passes.values())) / total)
    chosen = passes[width]
    gaps = {size: _mean([each.gap for each in passes[size]]) for size in widths}
    start = float(network(data.test_inputs).detach().abs().max())
    checks = _checks(decay, eigenvalues, penalty, chosen, gaps, start)
    rows = [
        {
            "width": size, "test error, last": _mean([p.last[-1] for p in each]),
            "test error, averaged": _mean([p.averaged[-1] for p in each]),
            "wrong signs, last": _mean([p.wrong[0] for p in each]), "wrong signs, averaged": _mean([p.wrong[1] for p in each]),
            "distance to start": _mean([p.distance for p in each]), "gap to the linearised network": _mean([p.gap for p in each]),
        }
        for size, each in passes.items()
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
        "layers of M tanh units with the symmetric initialisation, all parameters trained; one pass of SGD, a sample a step, on "
        f"1/2 (g(x) - y)^2 + (lambda/2) |theta - theta_0|^2 with lambda = {penalty:.4g} and the largest constant step of the theorem, "
        f"eta = {largest_step(penalty):.4g}. Errors are means of (g(x) - y)^2 on the test set, over {runs} seeds. The linearised "
        "network is the same SGD on g's tangent at theta_0, exactly, through its kernel."
    )
    return Report(
        "averaged-sgd", "Averaged SGD under the NTK", setting, checks,
        {"By width": rows, "Degrees of freedom of the kernel on the training set": freedom},
        _figure(eigenvalues, decay, chosen, gaps, width), {"beta": decay.beta, "gaps": gaps, "steps": chosen[0].steps},
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


def _one_pass(data: Parity, width: int, penalty: float, seed: int) -> Pass:
    generator = torch.Generator().manual_seed(1000 * width + seed)
    network = SymmetricTwoLayer(data.inputs.shape[1], width, generator=generator)
    order = torch.randperm(len(data.inputs), generator=generator)
    inputs, targets, eta = data.inputs[order], data.targets[order], largest_step(penalty)
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    kernel, across = network.kernel(inputs), network.kernel(data.test_inputs, inputs)
    coefficients = torch.zeros(len(inputs), dtype=torch.float64)  # theta - theta_0 = sum c_s grad g(x_s; theta_0)
    mean_coefficients = coefficients.clone()
    average = AveragedIterate(network.named_parameters())
    average.add(network.named_parameters())
    moments = _moments(len(inputs))
    steps, last, averaged, linear = [], [], [], []
    parameters = dict(network.named_parameters())
    mean_network = SymmetricTwoLayer(data.inputs.shape[1], width)
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
            last.append(_error(_outputs(network, data), data))
            averaged.append(_error(_outputs(mean_network, data), data))
            linear.append(_error(across @ mean_coefficients, data))
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


def _error(outputs: Tensor, data: Parity) -> float:
    return float((outputs - data.test_targets).square().mean())


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    centre = _mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def _checks(
    decay: Decay, eigenvalues: Tensor, penalty: float, passes: Sequence[Pass], gaps: dict[int, float], start: float
) -> list[Check]:
    freedom = degrees_of_freedom(eigenvalues, penalty)
    most = min(len(eigenvalues), float(eigenvalues.sum()) / penalty)
    eta = largest_step(penalty)
    gain = [each.last[-1] - each.averaged[-1] for each in passes]
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
        Check(
            "the averaged iterate has the smaller test error", f"{SOURCE}, Theorem 1", _mean(gain) > 2 * _standard_error(gain),
            f"last minus averaged {_mean(gain):.4f} +- {_standard_error(gain):.4f} (standard error of {len(gain)} seeds)", must=False,
        ),
        Check(
            "network and linearised network come together with the width", f"{SOURCE}, section 3", slope < 0,
            f"gap ~ M^{slope:.2f} from {sizes[0]} to {sizes[-1]} units", must=False,
        ),
    ]  # fmt: skip


def _figure(eigenvalues: Tensor, decay: Decay, passes: Sequence[Pass], gaps: dict[int, float], width: int) -> Figure:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    values = eigenvalues.flip(0)
    rank = torch.arange(1, len(values) + 1)
    left.plot(rank, values.clamp(min=1e-300), color="tab:blue", linewidth=1.2, label="NTK Gram / n")
    fitted = torch.tensor([decay.first, decay.last], dtype=torch.float64)
    left.plot(
        fitted,
        decay.constant * fitted**-decay.beta,
        color="black",
        linestyle="--",
        label=f"$i^{{-{decay.beta:.2f}}}$, fitted",
    )
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_ylim(bottom=float(values[values > 0].min()) / 2)
    left.set_xlabel("index")
    left.set_ylabel("eigenvalue")
    left.set_title("Spectrum of the kernel", fontsize=10)

    steps = passes[0].steps
    for name, curves, colour, style in (
        ("last iterate", [each.last for each in passes], "tab:gray", "-"),
        ("averaged iterate", [each.averaged for each in passes], "tab:blue", "-"),
        ("averaged, linearised", [each.linear for each in passes], "tab:orange", "--"),
    ):
        table = torch.tensor(curves, dtype=torch.float64)
        centre, error = table.mean(0), table.std(0) / math.sqrt(len(table))
        middle.plot(steps, centre, color=colour, linestyle=style, label=name)
        middle.fill_between(steps, centre - error, centre + error, color=colour, alpha=0.2, linewidth=0)
    middle.set_xscale("log")
    middle.set_yscale("log")
    middle.set_xlabel("samples seen")
    middle.set_ylabel("test error")
    middle.set_title(f"One pass, {width} units (band: standard error)", fontsize=10)

    right.plot(list(gaps), list(gaps.values()), marker="o", color="tab:blue", label="measured")
    anchor = next(iter(gaps))
    right.plot(
        list(gaps),
        [gaps[anchor] * (m / anchor) ** -0.5 for m in gaps],
        color="black",
        linestyle=":",
        label="$M^{-1/2}$",
    )
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("units M")
    right.set_ylabel("distance of the outputs")
    right.set_title("Network against its linearisation", fontsize=10)
    for axes in (left, middle, right):
        axes.grid(visible=True, alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    return figure
