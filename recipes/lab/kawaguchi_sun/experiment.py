"""Kawaguchi and Sun's algorithm on real digits: trained, perturbed, rank certified, head descended with a proven step, bounds held."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_conv.last_layer import (
    Comparator,
    HeadProblem,
    comparator,
    comparators,
    gradient_descent_bound,
    head_curvature,
    linear_bound,
)
from lightning_conv.networks.perturbation import fingerprint
from lightning_conv.recipes.lab.data import Source, splits
from lightning_conv.recipes.lab.kawaguchi_sun.figure import HeadDescent, curve, draw
from lightning_conv.recipes.lab.kawaguchi_sun.phase_one import BATCH, MOMENTUM, RATE, PhaseOne, phase_one
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.reporting.progress import progress_bar
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import (
    ExpressivityFacts,
    expressivity_facts,
    judge_expressivity,
)
from lightning_conv.theory.papers.kawaguchi_sun.phase_two import judge_phase_two

SECONDS_A_STEP = 5e-4
SECONDS_OF_PHASE_ONE = 10.0


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
    """Train everything, perturb, certify rank [h, 1] = n, descend on the last layer alone, and hold the losses against the bounds.

    Args:
        n: images of all ten classes.
        width: units of the wide last hidden layer; width + 1 >= n.
        narrow: units of the last hidden layer that is too narrow.
        beta: sharpness of the softplus.
        noise: of the switch, relative to each tensor's root mean square.
        first: steps of phase 1, in which everything is trained.
        steps: of phase 2, gradient descent on the last layer.
        source: of the images.
        root: folder of MNIST.
        seed: of samples, weights and noise.

    Raises:
        ValueError: n outside the training set's size, or a width that makes no sense.
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
        *_rank_checks(facts),
        *_phase_one_checks(started["wide"]),
        Check(
            "the trunk is the same, bit for bit, and gives the same features", "Kawaguchi, Sun, Algorithm 1",
            frozen and again, "fingerprints and features compared",
        ),
        *(check for each in runs for check in _run_checks(each)),
    ]  # fmt: skip
    setting = (
        f"{n} images of {source}, ten classes; trunk: {inputs.shape[1]} pixels, 128 units, then {width} (wide) or {narrow} (narrow) units, "
        "softplus of "
        f"sharpness {beta:g}, torch's own initialisation, float64. Phase 1: {first} steps of SGD (rate {RATE:g}, momentum {MOMENTUM:g}, "
        f"batches of {BATCH}) on all weights, cross-entropy. Switch: Gaussian noise of {noise:g} of each tensor's root mean square is "
        f"added to the trunk once, which is frozen from then on. Phase 2: {steps} full-batch steps of 1 / L_H on the head alone, which "
        "goes on from its weights of phase 1 for cross-entropy and starts at zero for the squared losses, L_H from the proven "
        "sigma_max([h, 1]). L is the mean over samples: squared error averaged over the 10 outputs, or cross-entropy. Nothing here "
        "is fitted to the run: step and bounds are known before it."
    )
    rows = [
        _facts_row(f"{name}, {when}", each)
        for name, own in started.items()
        for when, each in _moments(own, facts[name])
    ]
    return Report(
        "kawaguchi-sun", "Kawaguchi and Sun: two phases, the second with a certified step", setting, checks,
        {"Features": rows, "Descents": [_run_row(each) for each in runs]}, draw(runs, facts, started),
        {"curves": {each.name: curve(each) for each in runs}, "phase 1": {name: each.curve() for name, each in started.items()}},
    )  # fmt: skip


def _train(
    name: str, inputs: Tensor, labels: Tensor, width: int, beta: float, steps: int, noise: float, seed: int
) -> PhaseOne:
    with progress_bar(f"phase 1, {name}", SECONDS_OF_PHASE_ONE, None) as report:
        return phase_one(inputs, labels, width, beta=beta, steps=steps, noise=noise, seed=seed, report=report)


def _moments(each: PhaseOne, after: ExpressivityFacts) -> list[tuple[str, ExpressivityFacts]]:
    return [("at the start", each.looks[0].facts), ("at tau", each.looks[-1].facts), ("after the noise", after)]


def _phase_one_checks(wide: PhaseOne) -> list[Check]:
    """Rank n at one weight vector makes it rank n at almost every one, so nothing but rounding can hide it on the way."""
    n = wide.after.facts.certificate.n
    ranks = [look.facts.certificate.rank_lower for look in wide.looks]
    lost = n - wide.looks[-1].facts.certificate.rank_lower
    source = "Kawaguchi, Sun, Assumption on expressivity"
    return [
        Check(
            "wide: rank [h, 1] = n is certified at every look of phase 1", source, min(ranks) == n,
            f"least {min(ranks)} of {n} at {len(ranks)} looks; {lost} short at tau", must=False,
        ),
        Check(
            "wide: the loss of phase 1 falls", "nobody", wide.looks[-1].loss < wide.looks[0].loss,
            f"{wide.looks[0].loss:.4g} to {wide.looks[-1].loss:.4g}; {wide.after.loss:.4g} after the noise", must=False,
        ),
    ]  # fmt: skip


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
    """Staying, and the least-squares head, whose loss is above zero."""
    h = torch.cat([features, features.new_ones(len(features), 1)], 1)
    best = torch.linalg.lstsq(h, targets, driver="gelsd").solution
    return [comparator(problem, start, start), comparator(problem, start, best)]


def _rank_checks(facts: dict[str, ExpressivityFacts]) -> list[Check]:
    wide, narrow = (judge_expressivity(facts[name]) for name in ("wide", "narrow"))
    return [_check("wide", wide[0]), *(_check("narrow", criterion, must=False) for criterion in narrow)]


def _check(name: str, criterion: Criterion, *, must: bool = True) -> Check:
    seen = f"{criterion.verdict}: {criterion.reason}"
    return Check(f"{name}: {criterion.asks}", criterion.source, criterion.verdict == "certified", seen, must=must)


def _run_checks(each: HeadDescent) -> list[Check]:
    checks = [
        Check(f"{each.name}: {criterion.asks}", criterion.source, criterion.verdict == "consistent", criterion.reason)
        for criterion in each.criteria
    ]
    if each.floor:
        lowest = float(each.gaps.min())
        seen = f"floor {each.floor:.6g}, lowest loss {lowest:.6g}"
        checks += [
            Check(
                f"{each.name}: no loss lies below rho^2 |Y|^2 / (n C), rho the alignment residual", "least squares",
                lowest >= each.floor * (1 - 1e-12), seen,
            ),
            Check(
                f"{each.name}: the loss comes within a tenth of that floor", "nobody", lowest <= 1.1 * each.floor, seen, must=False
            ),
        ]  # fmt: skip
    return checks


def _facts_row(name: str, facts: ExpressivityFacts) -> dict[str, Any]:
    certificate, residual = facts.certificate, facts.alignment.residual if facts.alignment else None
    return {
        "features": name, "verdict": certificate.verdict, "rank at least": certificate.rank_lower, "n": certificate.n,
        "sigma_min": certificate.sigma_min.value if certificate.sigma_min else 0.0,
        "sigma_max": certificate.sigma_max.value if certificate.sigma_max else 0.0, "log phi": facts.log_phi.value,
        "condition number": facts.condition_number, "stable rank": facts.stable_rank, "effective rank": facts.effective_rank,
        "alignment residual": residual.value if residual else float("nan"),
    }  # fmt: skip


def _run_row(each: HeadDescent) -> dict[str, Any]:
    last = len(each.gaps) - 1
    return {
        "run": each.name, "step 1 / L_H": each.curvature.step, "loss at the start": float(each.gaps[0]),
        "loss in the end": float(each.gaps[-1]),
        "bound in the end": gradient_descent_bound(each.family, each.curvature.step, last),
        "linear bound in the end": linear_bound(float(each.gaps[0]), each.curvature.step, each.mu, last) if each.mu else float("nan"),
        "floor": each.floor,
    }  # fmt: skip
