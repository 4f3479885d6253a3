"""Judgement of the criterion on a run of full-batch gradient descent that is known at every step: ``judge_path``."""

from __future__ import annotations

import math

import torch

from lightning_conv.theory.criterion import Criterion, at_least, at_most
from lightning_conv.theory.papers.chatterjee.certificate import DescentCertificate
from lightning_conv.theory.papers.chatterjee.ratio import SOURCE, criterion_score, length_bound
from lightning_conv.theory.tools.descent import Descent

ROUNDING = 1e-9
"""Relative slack of comparisons between a measured and a predicted number."""


def judge_path(
    path: Descent, *, radius: float | None = None, epsilon: float = 0.5, certificate: DescentCertificate | None = None
) -> list[Criterion]:
    """Judge the criterion and its consequences along a run of full-batch gradient descent.

    Without a certificate every inequality is measured along the path alone, which can refute it but proves nothing
    about the ball. The radius of the path itself is no candidate for r: the path is shorter than 2 sqrt(f_0 / a), so
    the criterion is always false there.

    Args:
        path: The run, on f of any scale; with a certificate on f = (1/n) sum (u - y)^2.
        radius: Radius r of a ball that is claimed to satisfy the criterion; None: that of the certificate, if there is
            one.
        epsilon: Share of the first-order decrease h |grad f|^2 that a step may lose to curvature; with a certificate, its
            own epsilon is used.
        certificate: Certificate of the network at the start of the path; the bounds that it implies are judged too.

    Returns:
        In this order:

        - ``descent_efficiency``: the smallest efficiency e_t against 1 - eps.
        - ``path_length``: the largest quotient of the path length and its bound by the smallest ratio and the smallest
          efficiency. It is ``undecided`` if a step did not lower f, because then there is no bound.
        - ``criterion_score_path``, with a radius: (1 - eps)^2 r^2 a / (4 f_0), with a the smallest ratio on the part of
          the path that lies in the ball. Below 1 the criterion is refuted at r, since alpha is at most a.
        - ``certified_loss``, ``certified_distance``, ``certified_length``, ``certified_ratio``: with a certificate, for
          its step or a smaller one.

    Raises:
        ValueError: A step is larger than that of the certificate.
    """
    epsilon = certificate.epsilon if certificate else epsilon
    radius = certificate.radius if certificate else radius
    value = float(path.losses[0])
    least = float(path.efficiencies.min()) if path.taken else 1.0
    lost = max(1 - least, 0.0)
    found = [
        at_least(
            "descent_efficiency", SOURCE, "f_t - f_{t+1} >= (1 - eps) h |grad f_t|^2 at every step", least, 1 - epsilon
        ),
        _path_length(path, value, lost),
    ]
    if radius is not None:
        inside = path.distances <= radius
        ratio = float(path.ratios[inside].min())
        score = criterion_score(value, ratio, radius, epsilon=epsilon)
        asks = f"(1 - eps)^2 r^2 alpha(x_0, r) > 4 f(x_0) at r = {radius:.4g}"
        found.append(at_least("criterion_score_path", SOURCE, asks, score, 1.0))
    return found + (_promises(path, certificate) if certificate and path.taken else [])


def _path_length(path: Descent, value: float, lost: float) -> Criterion:
    """Judge the length by the telescoped bound, with the smallest ratio and the smallest efficiency, 1 - ``lost``."""
    source, asks = f"{SOURCE}, telescoped", "path length <= 2 (sqrt f_0 - sqrt f_t) / ((1 - eps_t) sqrt a_t)"
    pairs = zip(path.losses.tolist(), path.running_infimum.tolist(), strict=True)
    bounds = path.losses.new_tensor([length_bound(value, now, ratio, epsilon=lost) for now, ratio in pairs])[1:]
    if path.taken and not bool(bounds.isfinite().all()):
        why = "a step did not lower f" if lost >= 1 else "the gradient vanished on the way"
        return Criterion(
            "path_length", source, asks, math.nan, math.nan, "undecided", f"{why}, so that nothing bounds the length"
        )
    share = float((path.lengths[1:] / bounds).max()) if path.taken else 0.0
    return at_most("path_length", source, asks, share, 1 + ROUNDING)


def _promises(path: Descent, certificate: DescentCertificate) -> list[Criterion]:
    most = float(path.steps.max())
    if most > certificate.step:
        raise ValueError(f"path: steps up to {most:.4g}; the certificate covers steps up to {certificate.step:.4g}")
    lost = torch.log1p(-(1 - certificate.epsilon) * certificate.alpha.lower * path.steps).cumsum(0)
    above = (path.losses[1:] / path.losses[0]).log() - lost  # at most 0
    loss, length = float(above.exp().max()), float(path.lengths[-1])
    farthest, least = float(path.distances.max()), float(path.ratios.min())
    longest = "path length <= 2 sqrt(f_0 / alpha) / (1 - eps)"
    return [
        at_most("certified_loss", SOURCE, "f_k <= (1 - delta)^k f_0 at every step", loss, 1 + ROUNDING),
        at_most("certified_distance", SOURCE, "|x_k - x_0| <= r at every step", farthest, certificate.radius),
        at_most("certified_length", SOURCE, longest, length, certificate.length),
        at_least("certified_ratio", SOURCE, "|grad f|^2 / f >= alpha on the path", least, certificate.alpha.lower),
    ]
