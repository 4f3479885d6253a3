"""``LayersOfRun``: what every layer does, at steps that are evenly spaced on a logarithmic scale, for one figure of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lightning_conv.health.layers.activity import LayerActivity
from lightning_conv.health.layers.layer_gradients import LayerGradient
from lightning_conv.reporting.figures.layer_map import LayerValues, group_layers, layer_row, plot_layer_map
from lightning_conv.reporting.log_steps import LogSteps


class LayersOfRun:
    """Follows the layers of one run: share of the kernel's trace, norm of the gradient, and dead units.

    Memory: at most 32 rows of three numbers for each of 60 groups of layers, 46 kB, also in checkpoints.
    """

    def __init__(self) -> None:
        self._groups: list[tuple[str, list[str]]] = []
        self._seen = LogSteps()

    def note(
        self,
        step: int,
        parameters: Sequence[str],
        shares: Mapping[str, float],
        gradients: Sequence[LayerGradient],
        activity: Sequence[LayerActivity],
    ) -> None:
        """Note a measurement.

        Args:
            step: Its step.
            parameters: Names of the weights that the kernel is over.
            shares: Of the trace of the kernel, by layer.
            gradients: Of the layers; empty: not known.
            activity: The units, each with the layer that it follows; empty: not known.
        """
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
        norms = {each.name: each.norm for each in gradients}
        units: dict[str, list[LayerActivity]] = {}
        for each in activity:
            units.setdefault(each.after, []).append(each)
        known = {"share": shares, "gradient": norms}
        values = {}
        for layer in layers:
            found = {name: float(of[layer]) for name, of in known.items() if layer in of}
            if layer in units:
                found["units"] = float(sum(each.units for each in units[layer]))
                found["dead"] = float(sum(len({*each.dead, *each.saturated, *each.constant}) for each in units[layer]))
            values[layer] = LayerValues(**found)
        groups = group_layers(layers)
        if groups != self._groups:
            self._groups, self._seen = groups, LogSteps()
        self._seen.note(step, layer_row(groups, values))

    def figure(self) -> Figure:
        """Draw what was noted."""
        return plot_layer_map(self._seen, [name for name, _ in self._groups])

    def __len__(self) -> int:
        return len(self._seen)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types."""
        return {"groups": [[name, list(members)] for name, members in self._groups], "seen": self._seen.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._groups = [(name, list(members)) for name, members in state.get("groups", ())]
        self._seen.load_state_dict(state.get("seen", {}))
