"""``SparseActivation``: Yang et al. in a run: the share of active units at the start and later, and the limit kernel H(B)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_conv.callbacks.criteria.certificates import voided
from lightning_conv.callbacks.criteria.networks import find_network, unit_rows
from lightning_conv.callbacks.criteria.worst import Worst
from lightning_conv.linalg.spectrum import kernel_spectrum
from lightning_conv.networks.evaluation import Inputs
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.networks import BiasedTwoLayer
from lightning_conv.theory.papers.bias_ntk import active_probability, bias_ntk, starts_sparse, stays_sparse

SETTING = "one hidden ReLU layer whose biases begin at a constant, with fixed output weights (BiasedTwoLayer)"


@dataclass(frozen=True)
class Setting:
    """The paper's network in a run."""

    threshold: float  # B
    width: int  # m
    lambda_min: float  # of H(B); NaN: there was no room for it


def find_setting(network: nn.Module, inputs: Inputs, trained: Collection[str]) -> Setting | str:
    """Of a ``BiasedTwoLayer`` with B >= 0 on inputs of norm 1; otherwise the reason why the run is another one.

    Args:
        network: whose kernel is measured.
        inputs: of the probe.
        trained: names of the parameters that the kernel is over.

    Cost: of the paper's network one eigenvalue problem of the probe's size.
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


class SparseActivation:
    """Follows one run; of other networks than the paper's the share is told and not judged."""

    def __init__(self) -> None:
        self._setting: Setting | str = "not looked at"
        self._first: float = math.nan  # share of active units before the first step
        self._last: float = math.nan
        self._worst = Worst({"active_fraction": "greatest"})

    def look(self, network: nn.Module, inputs: Inputs, trained: Collection[str]) -> None:
        """A run begins, or goes on: whether it trains the paper's network; arguments as in ``find_setting``."""
        self._setting = find_setting(network, inputs, trained)

    def note(self, raw: Mapping[str, float], step: int) -> None:
        """A measurement; the same step twice is one.

        Args:
            raw: ``probe_quantities`` of it.
            step: optimizer steps done.
        """
        self._last = raw.get("active_fraction", math.nan)
        if step == 0:
            self._first = self._last
        if isinstance(self._setting, Setting) and not math.isnan(self._last):
            self._worst.note([stays_sparse(self._last, self._setting.threshold)], step)

    def quantities(self) -> dict[str, float]:
        """1 - Phi(B), and lambda_min(H(B)) in the convention of the loss 1/2 sum (u - y)^2; nothing for other networks."""
        if isinstance(self._setting, str):
            return {}
        found = {
            "active_fraction_expected": active_probability(self._setting.threshold),
            "bias_ntk_lambda_min": self._setting.lambda_min,
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def criteria(self) -> list[Criterion]:
        """The share of active units before the first step against 1 - Phi(B), and the largest share against exp(-B^2 / 2).

        Of other networks the two are the share before the first step and that of now.
        """
        if isinstance(self._setting, str):
            shares = replace(starts_sparse(self._first, 0.0, 1), measured=self._first), stays_sparse(self._last, 0.0)
            return [voided(each, self._setting) for each in shares]
        first = starts_sparse(self._first, self._setting.threshold, self._setting.width)
        if math.isnan(self._first):
            first = voided(first, "the run was not seen from its first step on")
        largest = self._worst.criteria() or [stays_sparse(math.nan, self._setting.threshold)]
        return [first, *(_of_an_order(each) for each in largest)]

    def state_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return {"first": self._first, "worst": self._worst.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self._first = float(state.get("first", math.nan))
        self._worst.load_state_dict(state.get("worst", {}))


def _of_an_order(criterion: Criterion) -> Criterion:
    """A share above exp(-B^2 / 2) refutes nothing that the theorem says: it has O(exp(-B^2 / 2))."""
    if criterion.verdict != "refuted":
        return criterion
    why = f"{criterion.reason}; the paper's bound is O(exp(-B^2/2)), its constant unspecified"
    return replace(criterion, verdict="undecided", reason=why)
