"""The findings of `lightning-conv lab averaged_sgd`: the checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from lightning_conv.recipes.lab.averaged_sgd.one_pass import Pass
from lightning_conv.recipes.lab.report import Check
from lightning_conv.theory.papers.averaged_sgd import SOURCE, Decay, largest_step
from lightning_conv.theory.tools.power_law import power_law


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean over some seeds."""
    centre = fmean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def checks_of(
    decay: Decay,
    eigenvalues: Tensor,
    penalty: float,
    passes: dict[float, list[Pass]],
    gaps: dict[int, float],
    start: float,
) -> list[Check]:
    """Check the hypotheses of the theorem, the inequalities that are proven, and the predicted rate.

    Args:
        decay: fitted decay of the spectrum.
        eigenvalues: eigenvalues of the NTK Gram matrix divided by n, ascending.
        penalty: weight lambda of (lambda/2) |theta - theta_0|^2.
        passes: share of flipped labels -> one pass per seed; contains 0.0.
        gaps: width -> distance of the network from its linearisation.
        start: largest |g_0| on the test set.
    """
    gains = {share: [each.last[-1] - each.averaged[-1] for each in runs] for share, runs in passes.items()}
    sizes = sorted(gaps)
    slope = math.log(gaps[sizes[-1]] / gaps[sizes[0]]) / math.log(sizes[-1] / sizes[0]) if len(sizes) > 1 else math.nan
    largest = float(eigenvalues[-1])
    diagonal = max(each.diagonal for runs in passes.values() for each in runs)
    clean = passes[0.0]
    lost = [
        fmean([each.linear[k] for each in clean]) / 2 / fmean([each.promised[k] for each in clean])
        for k in range(len(clean[0].steps))
    ]
    slopes = [_slope(each) for each in clean]
    return [
        Check("g_0 = 0 under the symmetric initialisation", f"{SOURCE}, section 2", start < 1e-12, f"largest output {start:.1e}"),
        Check(
            "|grad g(x; theta_0)|^2 <= 12 on every sample, which is what 4 (6 + lambda) eta <= 1 counts on", f"{SOURCE}, Theorem 1",
            diagonal <= 12, f"largest {diagonal:.4g}; eta = {largest_step(penalty):.4g}",
        ),
        *(
            Check(
                f"linearised network, {share:.0%} of labels flipped: the mean loss on each next sample is at most min over w of [mean "
                "loss of w + |w|^2 / (2 eta t)] / (1 - eta (max K_ii + lambda)), at every step looked at and for every seed",
                "derived: regret of gradient descent on smooth losses",
                max(pair[0] / pair[1] for each in runs for pair in zip(each.progressive, each.promised, strict=True)) <= 1 + 1e-9,
                ", ".join(
                    f"t = {runs[0].steps[k]}: {fmean([each.progressive[k] for each in runs]):.4f} <= "
                    f"{fmean([each.promised[k] for each in runs]):.4f}"
                    for k in (len(runs[0].steps) // 3, 2 * len(runs[0].steps) // 3, -1)
                ) + f" (means of {len(runs)} seeds)",
            )
            for share, runs in passes.items()
        ),
        Check(
            "linearised network: half the averaged iterate's squared error on the test set is below the same bound (which by convexity "
            "it is "
            "in expectation over the split; this is one split)", "derived: online to batch",
            max(lost) <= 1, f"at most {max(lost):.3f} of the bound", must=False,
        ),
        Check(
            f"the averaged iterate's error falls like T^-{decay.rate():.2f} or faster (r = 1/2; lambda as for T = n throughout)",
            f"{SOURCE}, Corollary 1", fmean(slopes) - 2 * standard_error(slopes) <= -decay.rate(),
            f"T^({fmean(slopes):.3f} +- {standard_error(slopes):.3f}) over the last tenfold of samples, standard error of {len(slopes)} "
            f"seeds; predicted exponents {-decay.rate():.2f} (r = 1/2) to {-decay.rate(1.0):.2f} (r = 1), up to constants",
            must=False,
        ),
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
                fmean(gain) > 2 * standard_error(gain),
                f"last minus averaged {fmean(gain):.4f} +- {standard_error(gain):.4f} (standard error of {len(gain)} seeds)", must=False,
            )
            for share, gain in gains.items()
        ),
        Check(
            "network and linearised network come together with the width", f"{SOURCE}, section 3", slope < 0,
            f"gap ~ M^{slope:.2f} from {sizes[0]} to {sizes[-1]} units", must=False,
        ),
    ]  # fmt: skip


def _slope(one: Pass) -> float:
    """Fit the exponent of the averaged iterate's error over the last tenfold of samples."""
    late = [(t, error) for t, error in zip(one.steps, one.averaged, strict=True) if 10 * t >= one.steps[-1]]
    return power_law([t for t, _ in late], [error for _, error in late]).exponent
