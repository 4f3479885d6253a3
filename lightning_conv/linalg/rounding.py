"""The unit roundoff and the constants of rounding error bounds.

A sum of k products, in any order, errs by at most gamma_k |x||y| with gamma_k = k u / (1 - k u), where the unit
roundoff u is 2^-24 in float32 and 2^-53 in float64 (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed.,
Lemma 3.1, (3.5)).
"""

from __future__ import annotations

import torch


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return u of a floating type: half the distance from 1 to the next larger number."""
    return torch.finfo(dtype).eps / 2


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Return gamma_k = k u / (1 - k u) for k = ``terms``, Higham (3.1); infinity where k u is 1 or more."""
    ku = terms * unit_roundoff(dtype)
    return ku / (1 - ku) if ku < 1 else float("inf")
