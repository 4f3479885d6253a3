"""Kawaguchi and Sun's second phase on real digits: rank certified, head descended with a proven step, bounds held at every step."""

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
from lightning_conv.progress import progress_bar
from lightning_conv.recipes.lab.data import Source, splits
from lightning_conv.recipes.lab.kawaguchi_sun_figure import HeadDescent, curve, draw
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.recipes.models import wide_fc
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.kawaguchi_sun import (
    ExpressivityFacts,
    expressivity_facts,
    judge_expressivity,
)
from lightning_conv.theory.phase_two import judge_phase_two
from lightning_conv.two_phase import fingerprint, perturb

SECONDS_A_STEP = 5e-4


def run(
    *,
    n: int = 200,
    width: int = 256,
    narrow: int = 64,
    beta: float = 100.0,
    noise: float = 0.01,
    steps: int = 20_000,
    source: Source = "digits",
    root: str = "data",
    seed: int = 0,
) -> Report:
    """Certify rank [h, 1] = n, descend on the last layer alone, and hold the losses against the O(1/t) and the linear bound.

    Args:
        n: images of all ten classes.
        width: units of the wide last hidden layer; width + 1 >= n.
        narrow: units of the last hidden layer that is too narrow.
        beta: sharpness of the softplus.
        noise: of the switch, relative to each tensor's root mean square.
        steps: of gradient descent.
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
    trunks = {
        name: _trunk(inputs.shape[1], size, beta, noise, seed) for name, size in (("wide", width), ("narrow", narrow))
    }
    before = {name: fingerprint(dict(trunk.named_parameters())) for name, trunk in trunks.items()}
    features = {name: _features(trunk, inputs) for name, trunk in trunks.items()}
    facts = {name: expressivity_facts(h, targets) for name, h in features.items()}
    runs = [
        _descend("squared loss, wide", features["wide"], targets, nn.MSELoss(), steps, facts["wide"]),
        _descend("cross-entropy, wide", features["wide"], labels, nn.CrossEntropyLoss(), steps, facts["wide"]),
        _descend("squared loss, narrow", features["narrow"], targets, nn.MSELoss(), steps, facts["narrow"]),
    ]
    frozen = all(fingerprint(dict(trunk.named_parameters())) == before[name] for name, trunk in trunks.items())
    again = all(torch.equal(_features(trunk, inputs), features[name]) for name, trunk in trunks.items())
    checks = [
        *_rank_checks(facts),
        Check(
            "the trunk is the same, bit for bit, and gives the same features", "Kawaguchi, Sun, Algorithm 1",
            frozen and again, "fingerprints and features compared",
        ),
        *(check for each in runs for check in _run_checks(each)),
    ]  # fmt: skip
    setting = (
        f"{n} images of {source}, ten classes; trunk: {inputs.shape[1]} pixels, 128 units, then {width} (wide) or {narrow} (narrow) units, "
        "softplus of "
        f"sharpness {beta:g}, torch's own initialisation, Gaussian noise of {noise:g} of each tensor's root mean square added once "
        f"(the switch), float64, frozen. The head starts at zero and takes {steps} full-batch steps of 1 / L_H, L_H from the proven "
        "sigma_max([h, 1]). L is the mean over samples: squared error averaged over the 10 outputs, or cross-entropy. Nothing here "
        "is fitted to the run: step and bounds are known before it."
    )
    return Report(
        "kawaguchi_sun", "Kawaguchi and Sun: the second phase with a certified step", setting, checks,
        {"Features": [_facts_row(name, each) for name, each in facts.items()], "Descents": [_run_row(each) for each in runs]},
        draw(runs, facts), {"curves": {each.name: curve(each) for each in runs}},
    )  # fmt: skip


def _trunk(pixels: int, width: int, beta: float, noise: float, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = wide_fc(pixels, 10, width=width, beta=beta).get_submodule("trunk").double()
    perturb(dict(trunk.named_parameters()), noise, seed)
    return trunk.requires_grad_(False).eval()


def _features(trunk: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        features: Tensor = trunk(inputs)
    return features


def _descend(
    name: str, features: Tensor, targets: Tensor, loss_fn: nn.Module, steps: int, facts: ExpressivityFacts
) -> HeadDescent:
    problem = HeadProblem(features, targets, loss_fn)
    curvature = head_curvature(problem)
    w = problem.zeros()
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
        "alignment residual": residual.value if residual else 0.0,
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
