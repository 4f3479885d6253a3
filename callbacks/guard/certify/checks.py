"""The checks that the guard's claim rests on, and the one place that says which of them ``certified`` needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lightning_conv.expressivity import RankCertificate
from lightning_conv.theory.criterion import Verdict

CheckName: TypeAlias = Literal[
    "head probed",
    "nothing follows the head",
    "every sample alike",
    "fixed inputs",
    "no other term in the optimizer",
    "full precision",
    "compared with the step",
    "same loss to the end",
    "gradients of the step",
    "same features in the step",
    "own loss",
    "no narrow cast",
    "at these weights",
    "steps of the rule",
    "given infimum",
    "trunk unmoved",
]
"""
- ``head probed``: the head computes W h + b, at its own weights and at random ones
- ``nothing follows the head``: its result is the network's
- ``every sample alike``: an epoch draws every training sample equally often
- ``fixed inputs``: a sample enters the network as the same tensor whenever it is read
- ``no other term in the optimizer``: the optimizer adds no penalty on the head
- ``full precision``: the steps are not computed in 16 bits
- ``compared with the step``: the loss that the training step returns is a function of the outputs alone, a sum over the samples, and
  the loss that the numbers are about
- ``same loss to the end``: it is the same function of the outputs at the last step and in the last epoch
- ``gradients of the step``: the gradients that the optimizer gets are those of that loss
- ``same features in the step``: the features that the training step computes are those that were certified
- ``own loss``: on all samples the network's outputs are W h + b, and its loss is the one that is logged
- ``no narrow cast``: nothing inside the float64 copy of the trunk computes in less
- ``at these weights``: the rank is certified at the weights of the run, at least on a sample of the rows
- ``steps of the rule``: nothing but the step rule moves the head
- ``given infimum``: the loss does not lie below the infimum that was given
- ``trunk unmoved``: the trunk is bit for bit that of the certificate
"""

NEEDED: tuple[CheckName, ...] = get_args(CheckName)
"""The checks without which neither ``certified`` nor ``refuted`` is said, whatever was computed."""


@dataclass(frozen=True)
class Check:
    """One check, as it was made."""

    name: CheckName
    held: bool | None  # None: it could not be made
    said: str = ""  # what was seen, or why it could not be made


def settle(verdict: Verdict, why: str, checks: Iterable[Check]) -> tuple[Verdict, str]:
    """Let a verdict stand only as far as all checks that it rests on were made and held.

    Args:
        verdict: Verdict that follows if they did.
        why: Reason for it, where it is not ``"certified"``.
        checks: Checks that were made. Of several of one name all must hold.

    Returns:
        The verdict and the reason; ``"undecided"`` where a check failed or is missing, with the names of those that are missing. What
        failed is a caveat (``caveats``) and says so itself.
    """
    if verdict not in ("certified", "refuted"):
        return verdict, why
    made = list(checks)
    if caveats(made):
        return "undecided", ""
    missing = [name for name in NEEDED if not any(check.name == name and check.held for check in made)]
    missing += [check.name for check in made if check.held is None and check.name not in missing]
    if not missing:
        return verdict, why
    reasons = {check.name: f" ({check.said})" for check in made if check.held is None and check.said}
    return "undecided", "not checked: " + "; ".join(f"{name}{reasons.get(name, '')}" for name in missing)


def of_certificate(certificate: RankCertificate | None) -> list[Check]:
    """Return the checks that a certificate carries.

    Args:
        certificate: Certificate of the switch; None: there is none.
    """
    if certificate is None:
        return []
    narrow = certificate.narrow
    found = [Check("no narrow cast", None if narrow is None else not narrow, narrow or "")]
    if certificate.method != "distinct":
        return [*found, Check("at these weights", True)]
    rows, rank = certificate.rows_here, certificate.rank_here
    said = "" if rows else "the rank at these weights was not looked at"
    if rows and rank < rows:
        said = f"of {rows} rows (the largest and random ones) rank {rank} is certified here, so almost every weight is not these"
    return [*found, Check("at these weights", None if not rows else not said, said)]


def caveats(checks: Iterable[Check]) -> list[str]:
    """Return what the checks that failed saw, each once.

    Args:
        checks: Checks that were made.
    """
    return list(dict.fromkeys(check.said for check in checks if check.held is False))


def replaced(checks: Sequence[Check], new: Iterable[Check]) -> list[Check]:
    """Return the checks with those of the new ones' names replaced by them.

    A check that failed stays: what was seen once is not unseen, as the weights bear what happened then.

    Args:
        checks: Checks that were made before.
        new: Checks that were made now.
    """
    made = list(new)
    names = {check.name for check in made}
    kept = [check for check in checks if check.name not in names or (check.held is False and check not in made)]
    return kept + made


def of_reasons(name: CheckName, reasons: Iterable[str]) -> list[Check]:
    """Return the check as failed for each reason, or as held where there is none.

    Args:
        name: Name of the check.
        reasons: Why it failed; empty strings do not count.
    """
    found = [reason for reason in reasons if reason]
    return [Check(name, False, reason) for reason in found] or [Check(name, True)]
