"""``ForwardStability``: hidden states of a run around its start: their norms, their drift, and units that switch (Allen-Zhu et al.)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_conv.callbacks.criteria.networks import find_network
from lightning_conv.callbacks.run.assumptions import without_verdict
from lightning_conv.networks.inputs import Inputs
from lightning_conv.theory.criterion import Criterion, not_applicable
from lightning_conv.theory.networks import AllenZhuNet
from lightning_conv.theory.papers.allen_zhu import (
    GradientRatios,
    HiddenNorms,
    are_unit_inputs,
    drift_constant,
    sign_change_exponent,
)
from lightning_conv.theory.papers.allen_zhu.stability import DRIFT, SIGN_ASKS
from lightning_conv.theory.tools.observation import Observation

SETTING = "h_0 = relu(A x), h_l = relu(W_l h_{l-1}), u = B h_L with W_1..W_L trained alone (AllenZhuNet)"

POINTS, SPAN = 4, 2.0
"""Least number of different omegas that the exponent is fitted to, and least quotient of the largest and the smallest."""

ERRORS = 2.0
"""Standard errors of the fitted exponent that are allowed to either side."""


@dataclass(frozen=True)
class Setting:
    """Sizes of the paper's network."""

    width: int  # m
    depth: int  # L
    outputs: int  # d
    samples: int  # n


def find_setting(network: nn.Module, inputs: Inputs, trained: Collection[str]) -> Setting | str:
    """Return the sizes of an ``AllenZhuNet`` whose W_l alone are trained, on ``unit_inputs``.

    Args:
        network: Network whose kernel is measured.
        inputs: Inputs of the probe, (n, ...).
        trained: Names of the parameters that the kernel is over.

    Returns:
        The sizes; for any other run a string that explains the difference.
    """
    found = find_network(network, inputs, AllenZhuNet, trained, asks=SETTING)
    if isinstance(found, str):
        return found
    own = found.network
    if found.trained != {f"hidden.{k}.weight" for k in range(len(own.hidden))}:
        return "the theorem trains W_1..W_L, all of them and nothing else"
    assert isinstance(inputs, Tensor)
    if not are_unit_inputs(inputs.cpu()):
        return "the theorem asks for inputs of norm 1 whose last number is 1/sqrt2 (unit_inputs)"
    return Setting(own.weights[0].shape[0], len(own.hidden), own.last.weight.shape[0], len(inputs))


class ForwardStability:
    """Collects hidden norms, drift and switched units of one run.

    For other networks than the paper's the norms are reported without a verdict, and no exponent is fitted.
    """

    def __init__(self) -> None:
        self._setting: Setting | str = "not looked at"
        self._norms: HiddenNorms | None = None
        self._points: dict[int, tuple[float, float]] = {}  # step -> omega, share of switched units

    def begin(self, network: nn.Module, inputs: Inputs, trained: Collection[str]) -> None:
        """Detect the paper's network; arguments as in ``find_setting``."""
        self._setting = find_setting(network, inputs, trained)

    def measure(
        self, raw: Mapping[str, float], seen: Observation, *, k: float = math.nan, delta: float = math.nan
    ) -> dict[str, float]:
        """Record a measurement; a second one of the same step replaces the first.

        Args:
            raw: ``RunView.layers`` and ``RunView.activity``, with ``gradient_over_largest``.
            seen: the observation of the same weights.
            k: the run's loss is k F.
            delta: separation of the inputs.

        Returns:
            For the paper's network, what stands for the constant of Lemma 5.2, ``drift_constant``, and for those of the two bounds of
            Theorem 3, ``gradient_lower_constant`` and ``gradient_upper_constant``.
        """
        if "hidden_norm_min" in raw:
            self._norms = HiddenNorms(raw["hidden_norm_min"], raw["hidden_norm_max"])
        if isinstance(self._setting, str):
            return {}
        sizes, omega = self._setting, raw.get("layer_distance_spectral", math.nan)
        if omega > 0 and (share := raw.get("sign_changes", math.nan)) > 0:
            self._points[seen.step] = omega, share
        found = {
            "drift_constant": drift_constant(
                raw.get("forward_drift", math.nan), omega, depth=sizes.depth, width=sizes.width
            )
        }
        if k > 0 and raw.get("gradient_over_largest", 0) > 0:
            squared = seen.gradient_norm**2 / k**2
            ratios = GradientRatios(seen.loss / k, squared * k / raw["gradient_over_largest"], squared)
            found["gradient_lower_constant"] = ratios.lower_constant(
                width=sizes.width, samples=sizes.samples, outputs=sizes.outputs, delta=delta
            )
            found["gradient_upper_constant"] = ratios.upper_constant(
                width=sizes.width, samples=sizes.samples, outputs=sizes.outputs, depth=sizes.depth
            )
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def criteria(self, *, from_the_start: bool) -> list[Criterion]:
        """Judge whether the norms at the start lie in [3/4, 5/4], and the exponent with which switched units follow the movement.

        Args:
            from_the_start: whether the run was observed from its first step.
        """
        why = self._setting if isinstance(self._setting, str) else ""
        if not why and not from_the_start:
            why = "the run was not observed from its first step, and the lemmas are about its initialisation"
        norms = (self._norms or HiddenNorms(math.nan, math.nan)).criteria(papers_network=not why)
        if isinstance(self._setting, str):
            exponent = not_applicable("sign_change_exponent", DRIFT, SIGN_ASKS, why)
        else:
            exponent = self._exponent()
        return [without_verdict(each, why) if why else each for each in [*norms, exponent]]

    def _exponent(self) -> Criterion:
        omegas, shares = [each[0] for each in self._points.values()], [each[1] for each in self._points.values()]
        different, span = len(set(omegas)), max(omegas, default=1.0) / min(omegas, default=1.0)
        if different < POINTS or span < SPAN:
            why = (
                f"{different} different omega > 0 with switched units, the largest {span:.3g} times the smallest; "
                f"it takes {POINTS} and a factor of {SPAN:g}"
            )
            return Criterion("sign_change_exponent", DRIFT, SIGN_ASKS, math.nan, math.nan, "undecided", why)
        found = sign_change_exponent(omegas, shares, errors=ERRORS)
        where = f"fitted to {len(omegas)} measurements with omega from {min(omegas):.3g} to {max(omegas):.3g}"
        if found.verdict == "refuted":
            # The theorem has an upper bound with an unspecified constant, for small omega. At large ones, where nearly all units have
            # switched, the curve flattens.
            why = f"{found.reason}, {where}; that refutes no bound whose constant is unspecified and which is about small omega"
            return replace(found, verdict="undecided", reason=why)
        return replace(found, reason=f"{found.reason}, {where}")

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types, for a checkpoint."""
        norms = None if self._norms is None else [self._norms.smallest, self._norms.largest]
        return {"norms": norms, "points": [[step, *point] for step, point in self._points.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        norms = state.get("norms")
        self._norms = None if norms is None else HiddenNorms(*norms)
        self._points = {int(step): (omega, share) for step, omega, share in state.get("points", [])}
