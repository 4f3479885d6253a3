"""What the guard says of a switch: the reason in a sentence, and the numbers as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_conv.callbacks.guard.head.curvature import largest_step
from lightning_conv.callbacks.guard.settings import GuardSettings
from lightning_conv.callbacks.guard.state import GuardState
from lightning_conv.networks.analytic import Kink
from lightning_conv.reporting.markdown import markdown_table

SHOWN = 5  # functions that are named one by one


def reason_to_switch(state: GuardState, settings: GuardSettings, step: int, found: str, kinks: Sequence[Kink]) -> str:
    """Return the claim of the switch, what it rests on, and what limits it.

    Args:
        state: Memory of the guard, with the certificate.
        settings: Settings of the guard.
        step: Step of the switch.
        found: Reason of the certificate.
        kinks: Functions in the network that are not real-analytic, or not known to be.
    """
    said = [f"switched at step {step}: {_claim(state, settings)}", found, *filter(None, [state.why]), *state.caveats]
    if kinks:
        shown = ", ".join(map(str, kinks[:SHOWN])) + (f" and {len(kinks) - SHOWN} more" if len(kinks) > SHOWN else "")
        analytic = "real-analytic" if any(kink.known for kink in kinks) else "known to be real-analytic"
        said.append(
            f"the network is not {analytic} ({shown}), so nothing is claimed of almost all weights, but of these, which phase 2 keeps"
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


def report_switch(state: GuardState, head: str) -> str:
    """Return the switch as Markdown.

    Args:
        state: Memory of the guard.
        head: Dotted name of the head.
    """
    rows = [("verdict", f"{state.verdict}{': ' + state.why if state.why else ''}"), ("head", head)]
    if (certificate := state.certificate) is not None:
        rows += [
            ("certificate", certificate.verdict),
            ("rank of [h, 1] / n", f"{certificate.rank_lower} / {certificate.n}"),
            ("width m_H", f"{certificate.width}"),
            ("method", certificate.method),
        ]
        if (bounded := certificate.sigma_min) is not None:
            rows.append(("sigma_min", f"{bounded.value:.6e}, at least {bounded.lower:.6e}"))
        if (bounded := certificate.sigma_max) is not None:
            rows.append(("sigma_max", f"{bounded.value:.6e}, at most {bounded.upper:.6e}"))
        if (bounded := certificate.distance) is not None:
            rows.append(("closest two samples", f"{bounded.value:.6e} apart, at least {bounded.lower:.6e}"))
        if (bounded := certificate.residual) is not None:
            rows.append(
                ("residual of the targets", f"{bounded.value:.6e}, from {bounded.lower:.6e} to {bounded.upper:.6e}")
            )
    if state.curvature is not None:
        rows.append(("L_H", f"{state.curvature.value:.6e}, at most {state.curvature.upper:.6e}"))
        rows.append(("largest safe step 2 / L_H", f"{largest_step(state.curvature):.6e}"))
    if state.perturbation is not None:
        rows.append(("noise, relative norm", f"{state.perturbation.relative:.3e}"))
    return "\n".join([state.reason, "", markdown_table(("quantity", "value"), rows)])
