"""``UnitsOfRun``: units that are switched off and layers without a gradient, at one measurement after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_conv.callbacks.health.fit_of_run import is_constant
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.finding import Finding
from lightning_conv.health.findings.of_units import finding_of_layers, finding_of_units
from lightning_conv.health.layers.activity import LayerActivity, unit_activity
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.layers import trace_shares


class UnitsOfRun:
    """Follows one run.

    Attributes:
        activity: The units of the last measurement; empty: they were not looked at.
    """

    def __init__(self) -> None:
        self.activity: list[LayerActivity] = []
        self._out: dict[str, int] = {}  # layers whose units are all out, with the step from which on
        self._on: set[str] = set()  # layers that had units that were not out, at some measurement
        self._shares: dict[str, float] | None = None  # of the layers in the trace, at the last measurement

    def look_at_units(self, run: RunView, *, equal_inputs: bool) -> Finding | None:
        """Judge the units of all activations; None: the samples are all the same, and so are all units.

        Args:
            run: The run at this moment.
            equal_inputs: Whether they are.

        Cost: a forward pass.
        """
        self.activity = []
        if equal_inputs:
            return None
        self.activity = layers = run.seen_by(unit_activity)
        self._out = {each.name: self._out.get(each.name, run.step) for each in layers if each.is_out}
        since = min(self._out.values(), default=None)
        were_on = bool(self._on & self._out.keys())
        self._on |= {each.name for each in layers if not each.is_out}
        return finding_of_units(
            layers,
            samples=run.samples,
            step=run.step,
            since=since,
            were_on=were_on,
            outputs_constant=is_constant(run.outputs),
        )

    def look_at_layers(self, gram: KernelGram, step: int) -> Finding | None:
        """Judge how the kernel's trace is shared among the layers; None: there is none to share.

        Args:
            gram: The kernel on the probe.
            step: Step of the measurement.
        """
        shares = trace_shares(gram)
        found = finding_of_layers(shares, self._shares, step=step)
        self._shares = shares or None
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types."""
        shares = None if self._shares is None else dict(self._shares)
        return {"out": dict(self._out), "on": sorted(self._on), "shares": shares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._out, self._on = dict(state["out"]), set(state.get("on", ()))
        self._shares = None if state["shares"] is None else dict(state["shares"])
