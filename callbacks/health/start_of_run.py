"""What enters the network, how it arrives in the layers, which weights never move, and which way the loss curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_conv.callbacks.health.step_of_run import loss_in_outputs
from lightning_conv.callbacks.run.guarded import READING, attempted
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.finding import Finding
from lightning_conv.health.findings.of_inputs import finding_of_inputs, finding_of_signal, input_scale, is_lost
from lightning_conv.health.findings.of_movement import (
    Unmoved,
    curves_downward,
    finding_of_descent,
    finding_of_movement,
    weight_digests,
)
from lightning_conv.health.layers.layer_signal import layer_signal
from lightning_conv.health.step.course import LossCourse
from lightning_conv.losses.gradient import wide
from lightning_conv.losses.of_outputs import evaluate
from lightning_conv.losses.separation import curvature_product

DIRECTIONS = 4
"""Random directions of the outputs in which the curvature of the loss is looked at."""


class StartOfRun:
    """Follows what a run began with.

    Attributes:
        equal_inputs: Whether all samples of the probe are the same.
        downward_since: Step from which on the loss curved downward; None: it does not.
    """

    def __init__(self) -> None:
        self.equal_inputs = False
        self.downward_since: int | None = None
        self._excess: float | None = None  # first loss over that of outputs of zero
        self._largest = 0.0  # curvature of the loss in the outputs so far
        self._lost_since: int | None = None
        self._first: tuple[int, dict[str, tuple[int, int]]] | None = None  # weights of the first measurement
        self._still: list[str] | None = None  # weights that have not moved since; None: all

    def look_at_inputs(self, run: RunView, loss: float | None) -> Finding:
        """Judge the inputs of the probe.

        Args:
            run: The run at this moment.
            loss: The loss on the probe; None: not known.
        """
        if run.step == 0 and loss is not None:
            with attempted(*READING):  # a loss need not be defined at zero
                self._excess = _excess(run, loss)
        found = input_scale(run.measurement.inputs)
        self.equal_inputs = found.equal
        return finding_of_inputs(found, excess=self._excess, step=run.step)

    def look_at_signal(self, run: RunView) -> list[Finding]:
        """Judge what arrives in the layers; a finding or none.

        Args:
            run: The run at this moment.
        """
        layers = run.seen_by(layer_signal)
        self._lost_since = (run.step if self._lost_since is None else self._lost_since) if is_lost(layers) else None
        found = finding_of_signal(layers, excess=self._excess, lost_since=self._lost_since, step=run.step)
        return [] if found is None or self.equal_inputs else [found]

    def look_at_movement(self, run: RunView) -> list[Finding]:
        """Judge which layers have moved since the first measurement; a finding or none.

        Args:
            run: The run at this moment.

        Cost: the weights that have not moved so far are read once.
        """
        network = run.measurement.probe.network(run.module)
        weights = {name: each for name, each in network.named_parameters() if each.requires_grad}
        if self._first is None:
            self._first, self._still = (run.step, weight_digests(weights)), list(weights)
            return []
        since, first = self._first
        still = {name: weights[name] for name in self._still or () if name in weights}
        now = weight_digests(still)
        self._still = [name for name in still if now[name] == first[name]]
        layers = {name.rpartition(".")[0] for name in weights}
        moved = {name.rpartition(".")[0] for name in weights.keys() - set(self._still)}
        groups = {
            id(each): group for of in run.trainer.optimizers for group in of.param_groups for each in group["params"]
        }
        reasons: dict[str, str] = {}
        for name in self._still:
            if (layer := name.rpartition(".")[0]) not in moved:
                group = groups.get(id(weights[name]))
                why = "absent" if group is None else "rate" if not float(group["lr"]) else ""
                reasons[layer] = why if reasons.get(layer, why) == why else ""
        if reasons and _is_at_rest(run):
            return []  # nothing is to move
        unmoved = [Unmoved(name or "the module", why) for name, why in reasons.items()]
        found = finding_of_movement(unmoved, layers=len(layers), since=since, step=run.step)
        return [] if found is None else [found]

    def look_at_curvature(self, run: RunView) -> None:
        """Note which way the loss curves in the outputs of the probe.

        Args:
            run: The run at this moment.
        """
        if run.loss_unknown or run.loss_targets is None:
            return
        with attempted(*READING) as attempt:
            forms = _forms(run)
            down = curves_downward(forms, self._largest)
            self._largest = max(self._largest, float(forms.abs().max()))
            if down is not None:
                self.downward_since = (
                    (run.step if self.downward_since is None else self.downward_since) if down else None
                )
        if attempt.failed:
            self.downward_since = None

    def descent(self, course: LossCourse | None) -> list[Finding]:
        """Judge where a loss leads that curves downward; a finding or none.

        Args:
            course: The losses; None: not known.
        """
        if course is None:
            return []
        found = finding_of_descent(course, downward_since=self.downward_since, step=course.step)
        return [] if found is None else [found]

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        vars(self).update(state)


def _is_at_rest(run: RunView) -> bool:
    """Return whether the loss has no gradient by the outputs of any sample, as at its smallest value."""
    if run.loss_unknown or run.loss_targets is None:
        return False
    return not bool(evaluate(loss_in_outputs(run), wide(run.shaped_outputs)).slope.any())


def _excess(run: RunView, loss: float) -> float | None:
    """Return the loss over that of outputs of zero; None: that is not positive."""
    at_zero = float(loss_in_outputs(run)(torch.zeros_like(run.shaped_outputs)).detach())
    return loss / at_zero if at_zero > 0 else None


def _forms(run: RunView) -> Tensor:
    """Return v^T S_i v for every sample in random directions, (``DIRECTIONS``, n)."""
    u = wide(run.shaped_outputs)
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(DIRECTIONS):
        v = torch.randn(u.shape, generator=generator, dtype=torch.float64).to(u)
        made.append((curvature_product(loss_in_outputs(run), u, v) * v).reshape(len(v), -1).sum(1))
    return torch.stack(made)
