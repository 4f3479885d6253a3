"""``upgrade_state``: the state of a callback in an old checkpoint, in the present layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KERNEL = ("reference", "hidden_reference", "at_start", "radius", "worst")
EIGENVALUES = ("least_lambda", "greatest_lambda")


def upgrade_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a monitor, or of ``ConvergenceCriteria``, in the present layout; a state that is in it stays as it is.

    ``ConvergenceCriteria`` once kept its state by role under ``run`` (``observer``, ``measured``, ``linearised``, ``start``, ``stability``,
    ``sparse``). Now it keeps it by paper, under ``record``.

    Args:
        state: as it was stored.
    """
    found = dict(state)
    if "run" in found:
        found["record"] = _by_paper(found.pop("run"))
    return found


def _by_paper(run: Mapping[str, Any]) -> dict[str, Any]:
    measured, linearised = run.get("measured", {}), run.get("linearised", {})
    du = {"evidence": {name: measured[name] for name in KERNEL if name in measured}, "steps": {}}
    trackers = {
        "allen_zhu": run.get("stability", {}),
        "bias_ntk": run.get("sparse", {}),
        "chatterjee": run.get("start", {}),
        "du": du | {name: linearised[name] for name in ("steps", "projection") if name in linearised},
        "oymak": {name: measured[name] for name in EIGENVALUES if name in measured},
    }
    return {"observer": run.get("observer", {}), "trackers": trackers}
