"""What the guard says of a switch."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_conv.callbacks.guard.settings import GuardSettings
from lightning_conv.callbacks.guard.state import GuardState

SHOWN = 5
"""Functions that are named one by one."""


def reason_to_switch(state: GuardState, settings: GuardSettings, step: int, found: str, kinks: Sequence[str]) -> str:
    """The claim, what it rests on, and what limits it.

    Args:
        state: of the guard, with the certificate.
        settings: of the guard.
        step: of the switch.
        found: the reason of the certificate.
        kinks: what in the network is not real-analytic.
    """
    said = [
        f"switched at step {step}: {_claim(state, settings)}",
        found,
        *([state.why] if state.why else []),
        *state.caveats,
    ]
    if kinks:
        shown = ", ".join(kinks[:SHOWN]) + (f" and {len(kinks) - SHOWN} more" if len(kinks) > SHOWN else "")
        said.append(
            f"the network is not real-analytic ({shown}), so nothing is claimed of almost all weights, but of these, which phase 2 keeps"
        )
    return "; ".join(said)


def _claim(state: GuardState, settings: GuardSettings) -> str:
    certificate = state.certificate
    if state.certified and certificate is not None:
        if certificate.method == "alignment":
            return "the last layer is certified to reach the targets"
        return f"rank [h, 1] = n = {certificate.n} is certified"
    if settings.method == "alignment":
        return "rank n is not certified: the last layer is trained to its own infimum, on this trunk"
    return "NOT certified, on_undecided='continue'"
