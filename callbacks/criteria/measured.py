"""``Measured``: what the measurements of a run have shown of its kernel and its features, and the worst of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_conv.callbacks.criteria.certificates import expressivity
from lightning_conv.callbacks.criteria.papers.du_evidence import DuEvidence
from lightning_conv.callbacks.run.measurement import gram_from_state, gram_state
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.spectrum import Spectrum, kernel_spectrum
from lightning_conv.networks.evaluation import Inputs
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import ExpressivityFacts, judge_expressivity


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
        self.spectrum: Spectrum | None = None
        """Of the last kernel."""
        self._reference: tuple[KernelGram, Spectrum] | None = None
        self.du = DuEvidence()
        """Of kernel and weights after Du et al."""
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
        *,
        start: Mapping[str, Tensor] | None = None,
        max_memory: float | None = None,
    ) -> None:
        """A measurement; the same one twice is one.

        Args:
            network: whose kernel it is.
            inputs: of the probe, on the network's device.
            targets: of the probe.
            measured: the kernel and its spectrum.
            step: optimizer steps done.
            start: weights at the start, by their names in the network; None: those of now.
            max_memory: bytes that a limit kernel may use; None: a quarter of what is free.
        """
        gram, spectrum = measured
        self.gram, self.spectrum = gram, spectrum
        self._reference = self._reference or measured
        self.least_lambda_min = min(self.least_lambda_min, max(spectrum.lambda_min.lower, 0.0))
        self.greatest_lambda_max = max(self.greatest_lambda_max, spectrum.lambda_max.lower)
        if not self._sought:
            self._sought = True
            if "du" in self._papers:
                self.du.look(network, inputs, gram.parameters, max_memory)
        if "du" in self._papers:
            self.du.note(network, inputs, targets, gram, self._reference, start, step)
        if "kawaguchi_sun" in self._papers:
            self.features = expressivity(network, inputs, targets)

    @property
    def lambda_0(self) -> Bounded:
        """lambda_min(K^(H)) of the paper's networks; of others 4/3 lambda_min(G(0))."""
        assert self._reference is not None
        return self.du.lambda_0(self._reference[1])

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
            "least_lambda": self.least_lambda_min,
            "greatest_lambda": self.greatest_lambda_max,
        } | self.du.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        if state.get("reference") is not None:
            gram = gram_from_state(state["reference"])
            self._reference = gram, kernel_spectrum(gram)
        self.least_lambda_min = float(state.get("least_lambda", math.inf))
        self.greatest_lambda_max = float(state.get("greatest_lambda", 0.0))
        self.du.load_state_dict(state)
