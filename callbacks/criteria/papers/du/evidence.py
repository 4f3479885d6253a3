"""``DuEvidence``: kernel and weights of a network of Du et al. during a run, and the kernel of any other network after them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_conv.callbacks.criteria.papers.du.kernel import (
    PapersNetwork,
    hidden_gram,
    limit_kernel,
    not_of_the_paper,
    own_criteria,
    own_lambda_0,
    papers_criteria,
    papers_network,
)
from lightning_conv.callbacks.criteria.papers.du.movement import (
    movement_criteria,
    movement_quantities,
    start_norms,
    start_radius,
)
from lightning_conv.callbacks.run.measured_kernel import gram_from_state, gram_state
from lightning_conv.callbacks.run.worst_step import Side, Worst
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.infinite import LimitKernel
from lightning_conv.kernels.spectrum import kernel_spectrum
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.networks.inputs import Inputs
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.networks import DuNetwork

SIDES: dict[str, Side] = {
    "own_lambda_min_share": "least",
    "lambda_min_share": "least",
    "kernel_drift": "greatest",
    "limit_distance": "greatest",
    "layer_movement": "greatest",
    "neuron_movement": "greatest",
}


class DuEvidence:
    """Follows one run."""

    def __init__(self) -> None:
        self.place: str | None = None  # name of the papers' network in the module; None: the run trains another network
        self._limit: LimitKernel | None = None
        self._lambda_0: Bounded | None = None  # of the limit
        self._deep = False
        self._first: tuple[KernelGram, Spectrum] | None = None  # the kernel over all layers at the start
        self._hidden_first: Tensor | None = None  # G^(H)(0)
        self._at_start: list[Criterion] = []
        self._radius: float | None = None
        self._worst = Worst(SIDES)

    @property
    def of_the_paper(self) -> bool:
        """Whether the network is one of the papers', so that lambda_0 is the theorem's."""
        return self._limit is not None

    @property
    def deep(self) -> bool:
        """Whether the network is one of the deep ones."""
        return self.of_the_paper and self._deep

    def begin(
        self, network: nn.Module, inputs: Inputs, trained: tuple[str, ...], max_memory: float | None = None
    ) -> None:
        """Look for the papers' network in the module, and compute its limit kernel.

        Args:
            network: whose kernel is measured.
            inputs: of the probe.
            trained: names of the kernel's parameters.
            max_memory: bytes that the limit kernel may use.
        """
        self._limit = self._lambda_0 = None
        self.place = papers_network(network, inputs, trained)
        if self.place is None:
            return
        own = cast("PapersNetwork", network.get_submodule(self.place))
        try:
            self._limit = limit_kernel(own, cast("Tensor", inputs), max_memory)
        except MemoryError as error:
            rank_zero_warn(f"ConvergenceCriteria: {error}; the network is judged as any other is. Use fewer samples")
            self.place = None
            return
        self._lambda_0, self._deep = self._limit.lambda_0, isinstance(own, DuNetwork)

    def measure(
        self,
        network: nn.Module,
        inputs: Inputs,
        targets: Tensor | None,
        gram: KernelGram,
        spectrum: Spectrum,
        start: Mapping[str, Tensor] | None,
        step: int,
    ) -> None:
        """Compare a measurement with the start and the limit.

        Args:
            network: now.
            inputs: of the probe.
            targets: of the probe.
            gram: the kernel.
            spectrum: of the kernel.
            start: weights at the start, by their names in the network; None: those of now.
            step: optimizer steps done.
        """
        self._first = self._first or (gram, spectrum)
        if self.place is None or self._limit is None or self._lambda_0 is None:
            self._worst.note(own_criteria(gram, *self._first), step)
            return
        own, x = cast("PapersNetwork", network.get_submodule(self.place)), cast("Tensor", inputs)
        hidden = hidden_gram(own, x)
        if self._hidden_first is None:
            self._hidden_first = hidden
            self._at_start = start_norms(own, x)
            self._radius = start_radius(own, x, targets, self._lambda_0)
        found = papers_criteria(hidden, self._hidden_first, self._limit)
        if self._radius is not None:
            found += movement_criteria(own, self._own(network, start), self._radius)
        self._worst.note(found, step)

    @property
    def lambda_0(self) -> Bounded:
        """lambda_min of the limit kernel; for other networks 4/3 lambda_min(G(0))."""
        assert self._first is not None
        return self._lambda_0 or own_lambda_0(self._first[1])

    def criteria(self) -> list[Criterion]:
        """Return what is asked of kernel and weights at the start, and during the run where it was worst."""
        found = self._worst.criteria()
        if self.of_the_paper:
            return [*found, *self._at_start]
        return [not_of_the_paper(each) if each.name == "kernel_drift" else each for each in found]

    def quantities(self, network: nn.Module, start: Mapping[str, Tensor]) -> dict[str, float]:
        """Return how far the papers' networks have moved, and R' where there is one; nothing for other networks.

        Args:
            network: now.
            start: weights at the start, by their names in the network.
        """
        if self.place is None:
            return {}
        own = cast("PapersNetwork", network.get_submodule(self.place))
        radius = float("nan") if self._radius is None else self._radius
        return movement_quantities(own, self._own(network, start), radius)

    def _own(self, network: nn.Module, start: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Return the start of the papers' network, by its own names and on its device."""
        assert self.place is not None
        now = dict(network.get_submodule(self.place).named_parameters())
        if start is None:
            return {name: weight.detach() for name, weight in now.items()}
        prefix = f"{self.place}." if self.place else ""
        kept = {name.removeprefix(prefix): weight for name, weight in start.items()}
        return {name: weight.to(now[name].device) for name, weight in kept.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types, for a checkpoint."""
        return {
            "reference": None if self._first is None else gram_state(self._first[0]),
            "hidden_reference": self._hidden_first,
            "at_start": [asdict(each) for each in self._at_start],
            "radius": self._radius,
            "worst": self._worst.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; what an older version did not store is left out."""
        if state.get("reference") is not None:
            gram = gram_from_state(state["reference"])
            self._first = gram, kernel_spectrum(gram)
        self._hidden_first = state.get("hidden_reference")
        self._at_start = [Criterion(**each) for each in state.get("at_start", [])]
        radius = state.get("radius")
        self._radius = None if radius is None else float(radius)
        self._worst.load_state_dict(state.get("worst", {}))
