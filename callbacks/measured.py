"""``Measured``: what the measurements of a run have shown of its kernel and its features, and the worst of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, cast

from torch import Tensor, nn

from lightning_conv.callbacks.certificates import expressivity
from lightning_conv.callbacks.du_kernel import (
    hidden_gram,
    limit_kernel,
    not_of_the_paper,
    own_criteria,
    own_lambda_0,
    papers_criteria,
    papers_network,
)
from lightning_conv.callbacks.probe_kernel import gram_from_state, gram_state
from lightning_conv.callbacks.worst import Worst
from lightning_conv.eigenvalues.bounded import Bounded
from lightning_conv.evaluation import Inputs
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.infinite import LimitKernel
from lightning_conv.spectrum import Spectrum, kernel_spectrum
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.kawaguchi_sun import ExpressivityFacts, judge_expressivity
from lightning_conv.theory.networks import DuNetwork


class Measured:
    """Follows one run.

    Args:
        papers: whose criteria are wanted.
    """

    def __init__(self, papers: Collection[str]) -> None:
        self._papers = frozenset(papers)
        self.gram: KernelGram | None = None
        """The last kernel."""
        self.least_lambda_min = math.inf
        """The smallest lower bound of lambda_min."""
        self.greatest_lambda_max = 0.0
        """The largest lower bound of lambda_max."""
        self.features: ExpressivityFacts | Criterion | None = None
        """Of the last hidden layer, or why there are none."""
        self._reference: tuple[KernelGram, Spectrum] | None = None
        self._worst = Worst(
            {"own_lambda_min_share": "least", "lambda_min_share": "least", "kernel_drift": "greatest", "limit_distance": "greatest"}
        )  # fmt: skip
        self._hidden_reference: Tensor | None = None  # G^(H)(0), of the paper's networks
        self._limit: LimitKernel | None = None
        self._limit_lambda: Bounded | None = None
        self._place: str | None = None  # of the paper's network in the module
        self._sought = False

    def begin(self) -> None:
        """A run begins, or goes on with another module: what is known of the module is looked up again."""
        self._sought = False

    def note(
        self,
        network: nn.Module,
        inputs: Inputs,
        targets: Tensor | None,
        measured: tuple[KernelGram, Spectrum],
        step: int,
    ) -> None:
        """A measurement; the same one twice is one.

        Args:
            network: whose kernel it is.
            inputs: of the probe, on the network's device.
            targets: of the probe.
            measured: the kernel and its spectrum.
            step: optimizer steps done.
        """
        gram, spectrum = measured
        self.gram = gram
        self._reference = self._reference or measured
        self.least_lambda_min = min(self.least_lambda_min, max(spectrum.lambda_min.lower, 0.0))
        self.greatest_lambda_max = max(self.greatest_lambda_max, spectrum.lambda_max.lower)
        if not self._sought:
            self._sought = True
            if "du" in self._papers:
                self._place = papers_network(network, inputs)
                if self._place is not None:
                    own = cast("DuNetwork", network.get_submodule(self._place))
                    self._limit = limit_kernel(own, cast("Tensor", inputs))
                    self._limit_lambda = self._limit.lambda_0
        if "du" in self._papers:
            self._worst.note(self._kernel_criteria(network, inputs), step)
        if "kawaguchi_sun" in self._papers:
            self.features = expressivity(network, inputs, targets)

    def _kernel_criteria(self, network: nn.Module, inputs: Inputs) -> list[Criterion]:
        assert self.gram is not None
        assert self._reference is not None
        if self._place is None or self._limit is None:
            return own_criteria(self.gram, *self._reference)
        gram = hidden_gram(cast("DuNetwork", network.get_submodule(self._place)), cast("Tensor", inputs))
        if self._hidden_reference is None:
            self._hidden_reference = gram
        return papers_criteria(gram, self._hidden_reference, self._limit)

    @property
    def place(self) -> str | None:
        """Name of the network of Du et al. in the module; None: there is none."""
        return self._place

    @property
    def of_the_paper(self) -> bool:
        """Whether the network is one of Du et al., so that lambda_0 is the theorem's."""
        return self._limit is not None

    @property
    def lambda_0(self) -> Bounded:
        """lambda_min(K^(H)) of the paper's networks; of others 4/3 lambda_min(G(0))."""
        assert self._reference is not None
        return self._limit_lambda or own_lambda_0(self._reference[1])

    @property
    def of_kernel(self) -> list[Criterion]:
        """What Du et al. ask of the kernel, at the step where it was worst."""
        found = self._worst.criteria()
        if self.of_the_paper:
            return found
        return [not_of_the_paper(each) if each.name == "kernel_drift" else each for each in found]

    @property
    def of_features(self) -> list[Criterion]:
        """The expressivity condition and the alignment of the targets."""
        if isinstance(self.features, Criterion):
            return [self.features]
        return [] if self.features is None else judge_expressivity(self.features)

    def state_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return {
            "reference": None if self._reference is None else gram_state(self._reference[0]),
            "hidden_reference": self._hidden_reference,
            "least_lambda": self.least_lambda_min,
            "greatest_lambda": self.greatest_lambda_max,
            "worst": self._worst.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        if state.get("reference") is not None:
            gram = gram_from_state(state["reference"])
            self._reference = gram, kernel_spectrum(gram)
        self._hidden_reference = state.get("hidden_reference")
        self.least_lambda_min = float(state.get("least_lambda", math.inf))
        self.greatest_lambda_max = float(state.get("greatest_lambda", 0.0))
        self._worst.load_state_dict(state.get("worst", {}))
