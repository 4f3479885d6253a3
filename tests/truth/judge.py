"""What is asserted of every run: no false ``certified``, no bound that excludes the truth, no gap below the network's own loss."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from adversary import Case
from runs import Run, exact, fit, loss_of, targets_reached

# Where one of these failed, the guard has said that its numbers are not about the network and the samples as they are.
VOID = {"own loss", "steps of the rule", "trunk unmoved", "same features in the step", "fixed inputs"}
SLACK = {"32-true": 2e-4, "64-true": 1e-9, "bf16-mixed": 5e-2}


def judge(case: Case, build: Callable[[Case], Run], honest: bool = False) -> str:
    """Run a case and compare what the guard says with the truth; return how it came out. An honest one is refused for its rule alone."""
    run = fit(case, build)
    if isinstance(run, str):
        assert not honest or "step_rule='certified'" in run, f"refused: {run}"
        return "refused"
    guard = run.seen
    assert guard is not None
    features, outputs = exact(run, case.batch)
    known = targets_reached(features, run.y, run.loss)
    said = guard.verdict
    context = f"{guard.why} {guard.caveats} {guard.certificate}"
    if not run.claimable:
        assert said not in ("certified", "refuted"), f"{said}, and the step minimises something else. {context}"
    elif said == "certified":
        assert known is not False, f"certified, and the head does not come to the infimum. {context}"
    elif said == "refuted":
        assert known is not True, f"refuted, and the head comes to the infimum. {context}"
    if run.claimable and run.covered and known and case.precision != "bf16-mixed" and full_rank(features):
        assert said == "certified", f"{said} of an honest run. {context}"
    own = float(loss_of(case)(outputs, run.y.double() if run.y.is_floating_point() else run.y))
    hold_numbers(case, run, own, features)
    return said


def full_rank(features: np.ndarray) -> bool:
    sizes = np.linalg.svd(features, compute_uv=False)
    return len(sizes) == len(features) and bool(sizes[-1] > 1e-8 * sizes[0])


def hold_numbers(case: Case, run: Run, own: float, features: np.ndarray) -> None:
    """Assert that the last gap and bound, and the bounds of the certificate, contain the truth; every infimum here is 0."""
    guard = run.seen
    assert guard is not None
    rounding = SLACK[case.precision] * max(1.0, own)
    moved = {check.name for check in guard.checks if check.held is False} & VOID
    if guard.history and np.isfinite(own) and not moved:  # the guard said that the weights are not those of the number
        last = guard.history[-1]
        for name in ("gap", "bound"):
            if name in last and not (name == "bound" and guard.caveats):
                assert last[name] >= own - rounding, f"{name} {last[name]} below the network's own loss {own}"
    certificate = guard.certificate
    if certificate is None or guard.phase != 2 or not torch.isfinite(torch.from_numpy(features)).all():
        return
    sizes = np.linalg.svd(features, compute_uv=False)
    error = 1e-12 * sizes[0] + certificate.feature_error
    true = {"sigma_max": sizes[0], "sigma_min": sizes[-1] if len(sizes) == len(features) else 0.0}
    for name, value in true.items():
        found = getattr(certificate, name)
        if found is not None and found.certified:
            assert found.lower - error <= value <= found.upper + error, f"{name} {value} outside {found}"
    if certificate.verdict == "certified" and certificate.method == "singular":
        assert full_rank_at(features, error), f"rank {certificate.rank_lower} certified of singular values {sizes}"


def full_rank_at(features: np.ndarray, error: float) -> bool:
    sizes = np.linalg.svd(features, compute_uv=False)
    return len(sizes) == len(features) and bool(sizes[-1] > 1e-15 * sizes[0])
