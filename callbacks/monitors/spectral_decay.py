"""``decay_quantities``: how the eigenvalues of a kernel decay, and its degrees of freedom, as averaged SGD under the NTK needs them."""

from __future__ import annotations

from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.theory.papers.averaged_sgd import degrees_of_freedom, spectrum_decay

CLEAR = 10.0
"""Eigenvalues count where they are at least this many times their error: their logarithms are then known to a tenth."""


def decay_quantities(spectrum: Spectrum, samples: int) -> dict[str, float]:
    """Return beta of lambda_i ~ i^-beta, and Tr(K (K + n lambda)^-1) at lambda = Tr(K) / n^2.

    beta is the slope of log eigenvalue against log rank from rank max(2, N / 32) to N / 2. The first eigenvalue, which comes from the
    mean of the features, and the last tenths of those of a Gram matrix do not follow the operator's law. Eigenvalues below ten times
    their error are left out.

    lambda does not depend on the kernel's scale, and n lambda is the mean of K(x, x). The degrees of freedom are therefore those of
    kernel ridge regression whose ridge weighs as much as one sample. Up to its constant this is the least lambda of Corollary 1,
    T^(-beta / (2 r beta + 1)) with T = n, r >= 1/2 and any beta. The degrees of freedom are n / (n + 1) for a kernel of rank one, and
    n / 2 where all n eigenvalues are equal.

    Args:
        spectrum: of K, with N eigenvalues; N = n C for the full kernel of C outputs.
        samples: n.

    Returns:
        ``decay_exponent``, where three eigenvalues or more are left, and ``degrees_of_freedom``; nothing where only the outermost two
        eigenvalues are known, or the kernel is zero.

    Source: Nitanda & Suzuki 2021, assumption A4, Theorem 1 and Corollary 1.
    """
    if spectrum.eigenvalues is None or not float(spectrum.eigenvalues.sum()) > 0:
        return {}
    scaled = spectrum.eigenvalues / samples
    size = len(scaled)
    found = {"degrees_of_freedom": degrees_of_freedom(scaled, float(scaled.sum()) / samples)}
    try:
        floor = CLEAR * (spectrum.radius or 0.0) / samples
        decay = spectrum_decay(scaled, first=max(2, size // 32), last=size // 2, floor=floor)
        return found | {"decay_exponent": decay.beta}
    except ValueError:  # too few of them
        return found
