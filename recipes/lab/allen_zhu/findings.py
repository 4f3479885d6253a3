"""The findings of `lightning-conv lab allen_zhu`: exponents, checks and rows of the tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_conv.recipes.lab.report import Check, with_verdict
from lightning_conv.theory.papers.allen_zhu import GradientRatios, Residual, SemiSmoothness, Separation, drift_constant
from lightning_conv.theory.tools.power_law import PowerLaw, power_law

SPECTRAL = "|W - W(0)|_2 / |W(0)|_2 at the end, against the width"
FROBENIUS = "|W - W(0)|_F / |W(0)|_F at the end, against the width"
SWITCHED = "share of switched units at the end, against the width"
ALONG = "share of switched units against omega, over training"

MARGIN = 2.0
"""Factor by which a held-out residual may exceed the fitted bound."""

COMMON = 2.0
"""Largest ratio of the constants of two widths that still counts as one constant."""


@dataclass(frozen=True)
class Probe:
    """The measurements at one step."""

    step: int
    ratios: GradientRatios
    omega: float  # max_l |W_l - W_l(0)|_2
    relative_spectral: float  # max_l |W_l - W_l(0)|_2 / |W_l(0)|_2
    relative_frobenius: float
    changed: float  # share of units that switched, mean over samples and trained layers
    changed_layer: float  # of the layer with the largest share
    drift: float  # max |h_{i,l} - h_{i,l}(0)|


@dataclass(frozen=True)
class Fit:
    """Semi-smoothness bound fitted to every other probe of the first initialisation, and the held-out residuals."""

    bound: SemiSmoothness
    same_run: list[Residual]  # held out: the other probes of the first initialisation
    other_runs: list[Residual]  # held out: all probes of the other initialisations


@dataclass
class Run:
    """One trained network; the measurements are appended while it trains."""

    width: int
    seed: int
    eta: float
    norms: tuple[float, float]  # smallest and largest |h_{i,l}| at the start
    probes: list[Probe] = field(default_factory=list)
    steps: list[Residual] = field(default_factory=list)

    @property
    def last(self) -> Probe:
        """The measurements after training."""
        return self.probes[-1]


def laws(runs: Sequence[Run]) -> dict[str, tuple[PowerLaw, str]]:
    """Fit power laws of distances and switched units against the width and omega.

    Returns:
        Description of the law -> (fitted law, exponent that the theory states, as text).
    """
    widths = [r.width for r in runs]

    def against_omega(least: int) -> PowerLaw:
        moved = [p for r in runs if r.width >= least for p in r.probes if p.omega > 0]
        return power_law([p.omega for p in moved], [p.changed for p in moved])

    return {
        SPECTRAL: (power_law(widths, [r.last.relative_spectral for r in runs]), "-1/2"),
        FROBENIUS: (power_law(widths, [r.last.relative_frobenius for r in runs]), "-1"),
        SWITCHED: (power_law(widths, [r.last.changed for r in runs]), "-1/3 or faster, if omega falls as width^(-1/2)"),
        ALONG: (against_omega(0), "2/3 or more as omega falls"),
        f"{ALONG}, width {max(widths)} alone": (against_omega(max(widths)), "2/3 or more as omega falls"),
    }


def checks_of(
    apart: Separation, runs: Sequence[Run], joint: Fit, laws: dict[str, tuple[PowerLaw, str]],
    worst: tuple[list[float], list[float], PowerLaw], depth: int,
) -> list[Check]:  # fmt: skip
    """Check, in the order of the proof: separation, initial norms, movement, switched units, drift, gradient, semi-smoothness."""

    def said(law: PowerLaw) -> str:
        return f"exponent {law.exponent:.3f} +- {law.error:.3f}"

    def falls(law: PowerLaw) -> bool:
        return law.exponent + 2 * (0.0 if math.isnan(law.error) else law.error) < 0

    def semi_smooth(used: Sequence[float]) -> tuple[bool, str]:
        largest = max(used, default=math.nan)
        return largest <= MARGIN, (
            f"largest rho / (a sqrt(m F) |V| + b m |V|^2) {largest:.2f} of {len(used)} steps, above 1 in {sum(one > 1 for one in used)}"
        )

    spectral, frobenius, at_end, along = (laws[name][0] for name in (SPECTRAL, FROBENIUS, SWITCHED, ALONG))
    widths = sorted({r.width for r in runs})
    norms = {
        m: (min(r.norms[0] for r in runs if r.width == m), max(r.norms[1] for r in runs if r.width == m))
        for m in widths
    }
    (low, high), narrow = norms[widths[-1]], norms[widths[0]]
    moved = [(r, p) for r in runs for p in r.probes if p.omega > 0]
    drift = {
        m: max(drift_constant(p.drift, p.omega, depth=depth, width=m) for r, p in moved if r.width == m) for m in widths
    }
    switched = max(p.changed_layer / (p.omega ** (2 / 3) * depth) for _, p in moved)
    least = {m: min(p.ratios.over_sum / m for r in runs if r.width == m for p in r.probes) for m in widths}
    (same_holds, same), (other_holds, other) = (
        semi_smooth(joint.bound.use(steps)) for steps in (joint.same_run, joint.other_runs)
    )
    bound = f"rho <= {MARGIN:g} (a sqrt(m F) |V| + b m |V|^2) with one a, b for all widths"
    paper = "Allen-Zhu, Li, Song 2019"
    return [
        *(Check.of(c, verdicts=("certified", "consistent"), seen=with_verdict(c)) for c in apart.criteria()),
        Check(f"3/4 <= |h_(i,l)| <= 5/4 at the start, width {widths[-1]}", f"{paper}, Lemma 4.1", low >= 0.75 and high <= 1.25,
              f"{low:.3f} to {high:.3f}; at width {widths[0]}: {narrow[0]:.3f} to {narrow[1]:.3f}", must=False),
        Check(f"{SPECTRAL}: falls by more than two standard errors of the exponent, theory -1/2", f"{paper}, Theorem 3",
              falls(spectral), said(spectral)),
        Check(f"{FROBENIUS}: falls by more than two standard errors of the exponent, theory -1", f"{paper}, Theorem 3",
              falls(frobenius), said(frobenius)),
        Check(f"{SWITCHED}: falls by more than two standard errors of the exponent", f"{paper}, Lemma 5.2", falls(at_end), said(at_end)),
        Check("share of switched units <= C omega^(2/3) L in every layer: exponent in omega 2/3 or more", f"{paper}, Lemma 5.2",
              along.exponent >= 2 / 3, f"{said(along)} over training; C = {switched:.3f} at most", must=False),
        Check("the worst step attains the exponent 2/3", "derived: Lemma 5.2 is sharp in omega",
              abs(worst[2].exponent - 2 / 3) < 0.03, said(worst[2])),
        Check(f"|h_(i,l) - h_(i,l)(0)| <= C omega L^(5/2) sqrt(ln m), one C for all widths: least C of each within a factor {COMMON:g}",
              f"{paper}, Lemma 5.2", max(drift.values()) <= COMMON * min(drift.values()),
              "least C by width: " + ", ".join(f"{m}: {value:.3g}" for m, value in drift.items()), must=False),
        Check("|grad F|^2 >= c m F along training with one c for all widths: no critical point on the way", f"{paper}, Theorem 3",
              least[widths[-1]] >= least[widths[0]] / COMMON, "least |grad F|^2 / (m F) by width: "
              + ", ".join(f"{m}: {value:.3g}" for m, value in least.items()), must=False),
        Check(f"{bound}, on held-out steps of the runs whose other steps a sqrt(m F) |V| + b m |V|^2 bounds", f"{paper}, Theorem 4",
              same_holds, same),
        Check(f"{bound}, on other initialisations", f"{paper}, Theorem 4", other_holds, other, must=False),
    ]  # fmt: skip


def data_row(apart: Separation) -> dict[str, object]:
    """Return the row of the data: the separation delta, its pair of samples, and how many pairs are close."""
    by_label = apart.by_label
    row: dict[str, object] = {"delta": apart.delta.distance.value, "pair": f"{apart.delta.first}, {apart.delta.second}"}
    if by_label is not None:
        row["by label"] = by_label.distance.value
    return {**row, **{f"pairs within {d:g}": count for d, count in apart.below.items()}}


def row_of(runs: Sequence[Run], width: int, n: int, depth: int, apart: Separation) -> dict[str, object]:
    """Return the row of one width after training: means over its runs, and the extreme gradient constants."""
    mine = [r for r in runs if r.width == width]
    delta = apart.delta.distance.value
    lower = [p.ratios.lower_constant(width=width, samples=n, outputs=1, delta=delta) for r in mine for p in r.probes]
    upper = [p.ratios.upper_constant(width=width, samples=n, outputs=1, depth=depth) for r in mine for p in r.probes]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return {
        "width": width,
        "steps": round(mean([r.last.step for r in mine])),
        "F": mean([r.last.ratios.loss for r in mine]),
        "omega": mean([r.last.omega for r in mine]),
        "relative, spectral": mean([r.last.relative_spectral for r in mine]),
        "relative, Frobenius": mean([r.last.relative_frobenius for r in mine]),
        "switched units": mean([r.last.changed for r in mine]),
        "drift of h": mean([r.last.drift for r in mine]),
        "grad^2 / max F_i over delta m/(d n), least": min(lower),
        "grad^2 / F over L n m/d, most": max(upper),
    }


def fit_row(name: int | str, width: int, fit: Fit) -> dict[str, object]:
    """Return the row of one fitted bound; the joint fit is already per sqrt(m) and m, so its ``width`` is 1."""
    bound, same, other = fit.bound, fit.bound.use(fit.same_run), fit.bound.use(fit.other_runs)
    return {
        "width": name, "a / sqrt(m)": bound.a / math.sqrt(width), "b / m": bound.b / width, "margin": bound.margin,
        "condition": bound.condition, "fitted to": bound.steps, "held out, same run": len(same),
        "largest rho / bound": max(same, default=math.nan), "above 1": sum(use > 1 for use in same), "held out, other runs": len(other),
        "largest rho / bound there": max(other, default=math.nan), "above 1 there": sum(use > 1 for use in other),
    }  # fmt: skip


def plain(r: Run) -> dict[str, object]:
    """Return a run as plain numbers for the JSON file, one list per measured quantity."""
    keys = ("step", "omega", "relative_spectral", "relative_frobenius", "changed", "changed_layer", "drift")
    rows = {key: [getattr(p, key) for p in r.probes] for key in keys}
    losses = {
        "loss": [p.ratios.loss for p in r.probes],
        "squared_gradient": [p.ratios.squared_gradient for p in r.probes],
    }
    return {"width": r.width, "seed": r.seed, "eta": r.eta, "norms": r.norms, **rows, **losses}
