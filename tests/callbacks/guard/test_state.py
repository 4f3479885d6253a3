"""What an earlier version has written into a checkpoint is read back: every field, and the claims that rest on it."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.callbacks.guard.state import GuardState

KEPT = Path(__file__).parent / "state_of_0_1.json"
"""State of a guard of version 0.1: a narrow head, ``switch_at="auto"``, certified steps and tracked ranks, in phase 2."""


def test_the_state_of_an_earlier_version_survives_a_load_and_a_save():
    stored = json.loads(KEPT.read_text())
    kept = GuardState.from_plain(stored).as_plain()
    certificate = kept.pop("certificate")
    assert stored.pop("certificate").items() <= certificate.items()
    assert kept == stored | {"checks": [], "certified_on": {}}


def test_a_guard_with_the_state_of_an_earlier_version_claims_the_same():
    stored, guard = json.loads(KEPT.read_text()), ExpressivityGuard(step_rule="certified")
    guard.load_state_dict(stored)
    assert (guard.phase, guard.verdict, guard.reason) == (2, "refuted", stored["reason"])
    assert guard.certificate.residual.value == stored["certificate"]["residual"]["value"]
    assert guard.perturbation.tensors == stored["perturbation"]["tensors"]
    assert guard.descent.not_covered == ""
    assert [gap.steps for gap in guard.descent.gaps] == [0, 1]
    assert guard.descent.step == stored["steps"]["first"]
    guard._state.judge()  # as when the run goes on, before it has made the checks that were not made then
    assert guard.verdict == "undecided"
    assert "not checked: head probed" in guard.why


def test_fields_that_an_older_checkpoint_lacks_keep_their_defaults():
    stored = json.loads(KEPT.read_text())
    for name in ("curvature", "ranks", "bounds", "steps"):
        del stored[name]
    state = GuardState.from_plain(stored | {"unknown": 1})
    assert (state.curvature, state.ranks, state.bounds, state.steps) == (None, {}, None, {})
