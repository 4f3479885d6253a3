"""Kawaguchi & Sun 2021 on real digits: train, perturb, certify the rank, descend on the head with proven bounds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_conv.last_layer import Comparator, HeadProblem, comparator, comparators, head_curvature
from lightning_conv.networks.perturbation import fingerprint
from lightning_conv.recipes.lab.data import Source, splits
from lightning_conv.recipes.lab.kawaguchi_sun.figure import draw
from lightning_conv.recipes.lab.kawaguchi_sun.findings import (
    HeadDescent,
    curve,
    facts_row,
    moments,
    phase_one_checks,
    rank_checks,
    run_checks,
    run_row,
)
from lightning_conv.recipes.lab.kawaguchi_sun.phase_one import BATCH, MOMENTUM, RATE, PhaseOne, phase_one
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.reporting.progress import progress_bar
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import ExpressivityFacts, expressivity_facts
from lightning_conv.theory.papers.kawaguchi_sun.phase_two import judge_phase_two

SECONDS_A_STEP = 5e-4
SECONDS_OF_PHASE_ONE = 10.0
"""Rough durations in seconds, of a step of phase 2 and of phase 1; they only decide whether progress bars are shown."""


SMALL: dict[str, Any] = {"n": 40, "width": 60, "narrow": 20, "first": 20, "steps": 60}
"""Settings with which `run` takes seconds."""


def run(
    *,
    n: int = 200,
    width: int = 256,
    narrow: int = 64,
    beta: float = 100.0,
    noise: float = 0.01,
    first: int = 300,
    steps: int = 20_000,
    source: Source = "digits",
    root: str = "data",
    seed: int = 0,
) -> Report:
    """Train everything, perturb, certify rank [h, 1] = n, descend on the last layer alone, and compare with the bounds.

    Cost: about 28 s on 2 cores with the default settings.

    Args:
        n: images of all ten classes.
        width: units of the wide last hidden layer; width + 1 >= n.
        narrow: units of the last hidden layer of a second network, too narrow for rank n.
        beta: sharpness of the softplus.
        noise: size of the noise added at the switch, relative to the root mean square of each tensor.
        first: steps of phase 1, in which everything is trained.
        steps: steps of phase 2, gradient descent on the last layer.
        source: source of the images: digits, or mnist, which must be on disk.
        root: folder of MNIST.
        seed: seed of samples, weights and noise.

    Returns:
        The checks of the ranks and of the descents, and tables of the features and of the descents.

    Raises:
        ValueError: n is larger than the training set, or not between the two widths.
    """
    if not narrow + 1 < n <= width + 1:
        raise ValueError(f"n, width, narrow: {n}, {width}, {narrow}; need narrow + 1 < n <= width + 1")
    images, labels = splits(source, root, seed=seed).train.tensors
    if n > len(labels):
        raise ValueError(f"n: {n}; the training set has {len(labels)} images")
    inputs, labels = images[:n].double().flatten(1), labels[:n]
    targets = F.one_hot(labels, 10).double()
    started = {
        name: _train(name, inputs, labels, size, beta, first, noise, seed)
        for name, size in (("wide", width), ("narrow", narrow))
    }
    trunks = {name: each.trunk for name, each in started.items()}
    before = {name: fingerprint(dict(trunk.named_parameters())) for name, trunk in trunks.items()}
    features = {name: _features(trunk, inputs) for name, trunk in trunks.items()}
    facts = {name: expressivity_facts(h, targets) for name, h in features.items()}
    head = started["wide"].head
    runs = [
        _descend("squared loss, wide", features["wide"], targets, nn.MSELoss(), steps, facts["wide"]),
        _descend("cross-entropy, wide", features["wide"], labels, nn.CrossEntropyLoss(), steps, facts["wide"], head),
        _descend("squared loss, narrow", features["narrow"], targets, nn.MSELoss(), steps, facts["narrow"]),
    ]
    frozen = all(fingerprint(dict(trunk.named_parameters())) == before[name] for name, trunk in trunks.items())
    again = all(torch.equal(_features(trunk, inputs), features[name]) for name, trunk in trunks.items())
    checks = [
        *rank_checks(facts),
        *phase_one_checks(started["wide"]),
        Check(
            "the trunk is the same, bit for bit, and gives the same features", "Kawaguchi, Sun, Algorithm 1",
            frozen and again, "fingerprints and features compared",
        ),
        *(check for each in runs for check in run_checks(each)),
    ]  # fmt: skip
    setting = (
        f"{n} images of {source}, ten classes; trunk: {inputs.shape[1]} pixels, 128 units, then {width} (wide) or {narrow} (narrow) "
        f"units, softplus of sharpness {beta:g}, torch's own initialisation, float64. Phase 1: {first} steps of SGD (rate {RATE:g}, "
        f"momentum {MOMENTUM:g}, batches of {BATCH}) on all weights, cross-entropy. Switch: Gaussian noise of {noise:g} of each tensor's "
        f"root mean square is added to the trunk once, which is frozen from then on. Phase 2: {steps} full-batch steps of 1 / L_H on the "
        "head alone, which goes on from its weights of phase 1 for cross-entropy and starts at zero for the squared losses, L_H from the "
        "proven sigma_max([h, 1]). L is the mean over samples: squared error averaged over the 10 outputs, or cross-entropy. Nothing "
        "here is fitted to the run: step and bounds are known before it."
    )
    rows = [
        facts_row(f"{name}, {when}", each) for name, own in started.items() for when, each in moments(own, facts[name])
    ]
    return Report(
        "kawaguchi_sun", "Kawaguchi and Sun: two phases, the second with a certified step", setting, checks,
        {"Features": rows, "Descents": [run_row(each) for each in runs]}, draw(runs, facts, started),
        {"curves": {each.name: curve(each) for each in runs}, "phase 1": {name: each.curve() for name, each in started.items()}},
    )  # fmt: skip


def _train(
    name: str, inputs: Tensor, labels: Tensor, width: int, beta: float, steps: int, noise: float, seed: int
) -> PhaseOne:
    with progress_bar(f"phase 1, {name}", SECONDS_OF_PHASE_ONE, None) as report:
        return phase_one(inputs, labels, width, beta=beta, steps=steps, noise=noise, seed=seed, report=report)


def _features(trunk: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        features: Tensor = trunk(inputs)
    return features


def _descend(
    name: str,
    features: Tensor,
    targets: Tensor,
    loss_fn: nn.Module,
    steps: int,
    facts: ExpressivityFacts,
    start: Tensor | None = None,
) -> HeadDescent:
    """Run gradient descent on the head with the features fixed, and judge it."""
    problem = HeadProblem(features, targets, loss_fn)
    curvature = head_curvature(problem)
    w = problem.zeros() if start is None else start
    step, infimum = curvature.step, problem.infimum
    assert infimum is not None
    squared = isinstance(loss_fn, nn.MSELoss)
    floor, mu = 0.0, None
    if facts.certificate.verdict == "certified":
        family = comparators(problem, w)
        sigma = facts.certificate.sigma_min
        if squared and sigma is not None:
            mu = curvature.smoothness / problem.samples * sigma.lower**2
    else:
        family = _narrow_family(problem, w, features, targets)
        assert facts.alignment is not None
        assert facts.alignment.residual is not None
        floor = facts.alignment.residual.lower**2 * float(targets.square().sum()) / targets.numel()
    gaps = []
    with progress_bar(name, SECONDS_A_STEP * steps, None) as report:
        for t in range(steps + 1):
            value, gradient = problem.loss_and_gradient(w)
            gaps.append(value - infimum.lower)
            w = w - step * gradient
            report(t / steps)
    losses = torch.tensor(gaps, dtype=torch.float64)
    return HeadDescent(
        name, losses, family, curvature, mu, floor, judge_phase_two(losses, step, family, curvature, mu=mu)
    )


def _narrow_family(problem: HeadProblem, start: Tensor, features: Tensor, targets: Tensor) -> list[Comparator]:
    """Return two comparators: the start, and the least-squares head, whose loss is above zero."""
    h = torch.cat([features, features.new_ones(len(features), 1)], 1)
    best = torch.linalg.lstsq(h, targets, driver="gelsd").solution
    return [comparator(problem, start, start), comparator(problem, start, best)]
