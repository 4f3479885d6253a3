"""Yang et al. 2023 in a run: the share of active units at the start and later, and the limit kernel H(B)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_conv.callbacks.criteria.networks import find_network, unit_rows
from lightning_conv.callbacks.criteria.tracker import CriteriaTracker, register_criteria
from lightning_conv.callbacks.run.assumptions import EVERYWHERE, without_verdict
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.callbacks.run.worst_step import Worst
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.spectrum import kernel_spectrum
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.networks.inputs import Inputs
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.networks import BiasedTwoLayer
from lightning_conv.theory.papers.bias_ntk import SOURCE, active_probability, bias_ntk, starts_sparse, stays_sparse

SETTING = "one hidden ReLU layer whose biases begin at a constant, with fixed output weights (BiasedTwoLayer)"


@dataclass(frozen=True)
class Setting:
    """The paper's network in a run."""

    threshold: float  # B
    width: int  # m
    lambda_min: float  # of H(B); NaN: it could not be computed


def find_setting(network: nn.Module, inputs: Inputs, trained: Collection[str]) -> Setting | str:
    """Return the setting of a ``BiasedTwoLayer`` with B >= 0 on inputs of norm 1; for another run say why it is another one.

    Args:
        network: whose kernel is measured.
        inputs: of the probe.
        trained: names of the parameters that the kernel is over.

    Cost: for the paper's network one eigenvalue problem of the probe's size.
    """
    found = find_network(network, inputs, BiasedTwoLayer, trained, asks=SETTING)
    if isinstance(found, str):
        return found
    if "hidden.weight" not in found.trained:
        return "the theorem trains the hidden weights"
    if not found.network.threshold >= 0:
        return f"B = {found.network.threshold:g}: activation is sparse for B >= 0 only"
    assert isinstance(inputs, Tensor)
    if not unit_rows(inputs):
        return "the theorem asks for inputs of norm 1"
    x = nn.functional.normalize(inputs.detach().cpu().double().flatten(1))
    try:
        kernel = bias_ntk(x, found.network.threshold, trained_bias="hidden.bias" in found.trained)
        smallest = kernel_spectrum(kernel, method="auto").lambda_min.value
    except (RuntimeError, MemoryError):  # LinAlgError is one
        smallest = math.nan
    return Setting(found.network.threshold, len(found.network.hidden.weight), smallest)


@register_criteria
class BiasNTKTracker(CriteriaTracker):
    """Judges the share of active units; for other networks than the paper's it is reported and not judged."""

    name, position = "bias_ntk", 70
    source = SOURCE
    assumes = EVERYWHERE | {"full batch", "squared loss"}
    needs = frozenset({"activity"})
    once = frozenset({"active_fraction_expected", "bias_ntk_lambda_min"})

    def __init__(self) -> None:
        self._setting: Setting | str = "not looked at"
        self._first: float = math.nan  # share of active units before the first step
        self._last: float = math.nan
        self._worst = Worst({"active_fraction": "greatest"})

    def begin(self, run: RunView) -> None:
        """Look whether the run trains the paper's network."""
        self._setting = find_setting(run.network, run.inputs, run.measurement.parameters)

    def measure(self, run: RunView, gram: KernelGram, spectrum: Spectrum) -> dict[str, float]:
        """Return 1 - Phi(B), and lambda_min(H(B)) in the convention of the loss 1/2 sum (u - y)^2; nothing for other networks."""
        self._last = run.activity.get("active_fraction", math.nan)
        if run.step == 0:
            self._first = self._last
        if isinstance(self._setting, str):
            return {}
        if not math.isnan(self._last):
            self._worst.note([stays_sparse(self._last, self._setting.threshold)], run.step)
        return {
            "active_fraction_expected": active_probability(self._setting.threshold),
            "bias_ntk_lambda_min": self._setting.lambda_min,
        }

    def criteria(self, run: RunView) -> list[Criterion]:
        """Return the share of active units before the first step against 1 - Phi(B), and the largest share against exp(-B^2 / 2).

        For other networks the two are the share before the first step and the present one, without a verdict.
        """
        if isinstance(self._setting, str):
            shares = replace(starts_sparse(self._first, 0.0, 1), measured=self._first), stays_sparse(self._last, 0.0)
            return [without_verdict(each, self._setting) for each in shares]
        first = starts_sparse(self._first, self._setting.threshold, self._setting.width)
        if math.isnan(self._first):
            first = without_verdict(first, "the run was not observed from its first step")
        largest = self._worst.criteria() or [stays_sparse(math.nan, self._setting.threshold)]
        return [first, *(_of_an_order(each) for each in largest)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types, for a checkpoint."""
        return {"first": self._first, "worst": self._worst.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._first = float(state.get("first", math.nan))
        self._worst.load_state_dict(state.get("worst", {}))


def _of_an_order(criterion: Criterion) -> Criterion:
    """Turn ``refuted`` into ``undecided``: the theorem has O(exp(-B^2 / 2)), so a share above exp(-B^2 / 2) does not refute it."""
    if criterion.verdict != "refuted":
        return criterion
    why = f"{criterion.reason}; the paper's bound is O(exp(-B^2/2)), its constant unspecified"
    return replace(criterion, verdict="undecided", reason=why)
