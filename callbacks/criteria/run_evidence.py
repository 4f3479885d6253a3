"""``RunEvidence``: all that ``ConvergenceCriteria`` gathers in a run, and what of it goes into a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_conv.callbacks.criteria.data_facts import DataFacts, data_facts
from lightning_conv.callbacks.criteria.judgement import PAPERS, Evidence
from lightning_conv.callbacks.criteria.layer_norms import LayerNorms
from lightning_conv.callbacks.criteria.measured import Measured
from lightning_conv.callbacks.criteria.observer import Observer, find_clipping, optimizer_breaches
from lightning_conv.callbacks.criteria.papers.allen_zhu_states import ForwardStability
from lightning_conv.callbacks.criteria.papers.bias_ntk_activation import SparseActivation
from lightning_conv.callbacks.criteria.papers.chatterjee_start import StartEvidence
from lightning_conv.callbacks.criteria.papers.du_linearised import LinearisedRun
from lightning_conv.callbacks.criteria.papers.du_projection import LabelProjection
from lightning_conv.callbacks.criteria.papers.frei_margins import ImplicitBias
from lightning_conv.callbacks.criteria.papers.kawaguchi_sun_phase_two import find_guard, phase_two_criteria
from lightning_conv.callbacks.criteria.quantities import path_quantities, probe_quantities
from lightning_conv.callbacks.run.assumptions import EVERYWHERE, Breach, Hypothesis, breached
from lightning_conv.callbacks.run.batch import to_device
from lightning_conv.callbacks.run.loss import LossFn
from lightning_conv.callbacks.run.measurement import ProbeKernel
from lightning_conv.callbacks.run.violations import find_breaches
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.losses.scale import LossScale, loss_scale
from lightning_conv.theory.tools.observation import observed_metrics

COMPARED: frozenset[Hypothesis] = EVERYWHERE - {"unclipped"} | {"full batch", "whole set"}
"""Where all of these hold, a step must be -h grad f with f as it is on the probe."""

ONCE = (
    "separation", "separation_by_label", "close_pairs", "near_orthogonality", "hidden_norm_min", "hidden_norm_max",
    "active_fraction_expected", "bias_ntk_lambda_min",
)  # fmt: skip
"""Quantities that stay the same for a whole run."""


class RunEvidence:
    """Follows one run.

    Args:
        papers: whose criteria are wanted.
        loss_fn: see ``Observer``.
        radius: of the ball around the start that is searched for small |grad f|^2 / f; None: nothing is searched.
    """

    def __init__(self, papers: Sequence[str], loss_fn: LossFn | None, radius: float | None = None) -> None:
        self._papers = tuple(papers)
        self.observer = Observer(loss_fn, spectral="allen_zhu" in papers)
        """Of the steps."""
        self._measured = Measured(papers)
        self._linearised = LinearisedRun(self.observer, self._measured)
        self._norms = LayerNorms()
        self._data = DataFacts(0, 0.0, None, None, "not looked at")
        self._bias = ImplicitBias()
        self._stability, self._sparse = ForwardStability(), SparseActivation()
        self._fixed: list[Breach] | None = None  # what does not change during the run
        self._start = StartEvidence(radius)
        self._raw: dict[str, float] = {}  # quantities of the last measurement that no verdict follows from

    def begin(self) -> None:
        """A run begins, or goes on: its module, data and optimizer are looked at again."""
        self._fixed = None
        self.observer.begin()
        self._measured.begin()

    @property
    def compared(self) -> bool:
        """Whether a step can be told from -h grad f."""
        return not breached(self._fixed or [], COMPARED)

    def note_weights(self, trainer: pl.Trainer, kernel: ProbeKernel, measured: tuple[KernelGram, Spectrum]) -> None:
        """What takes eigenvalues, once a measurement; once a run what does not change, and what is proven before its first step."""
        pl_module, network = trainer.lightning_module, kernel.probe.network(trainer.lightning_module)
        inputs = to_device(kernel.inputs, pl_module.device)
        if self._fixed is None:
            outputs, loss_fn = kernel.outputs(pl_module), self.observer.loss(pl_module)
            targets = None if kernel.targets is None else kernel.targets.to(outputs.device)
            self._fixed = find_breaches(
                trainer, network, inputs, loss_fn=loss_fn, outputs=outputs, targets=targets, probe=kernel.probe
            )
            self.observer.note_infimum(pl_module, kernel, outputs)
            self._data = data_facts(
                inputs, targets, separated="allen_zhu" in self._papers, orthogonal="implicit_bias" in self._papers
            )
            self._bias.look(network, inputs, targets, kernel.parameters, loss_fn)
            for each in (self._stability, self._sparse):
                each.look(network, inputs, kernel.parameters)
        self._measured.note(
            network, inputs, kernel.targets, measured, trainer.global_step,
            start=self.observer.weights_at_start(pl_module, kernel), max_memory=kernel.probe.max_memory,
        )  # fmt: skip
        if not self.observer.started and "chatterjee" in self._papers:
            why = breached(self.breaches(trainer, kernel), PAPERS["chatterjee"].asks)
            squared = self._scale(trainer, kernel) is not None
            self._start.look(trainer, kernel, self.observer, squared=squared, why=why)

    def observe(self, trainer: pl.Trainer, kernel: ProbeKernel, step: int) -> None:
        """The loss and its gradient, where the loss is known and can be evaluated on the probe."""
        known = not any(each.hypothesis == "known loss" for each in self._fixed or [])
        try:
            self.observer.observe(trainer, kernel, step, with_loss=known)
        except Exception as error:
            if not known or self.observer.measured_loss:
                raise
            why = f"the loss could not be evaluated on the probe ({error}); pass loss_fn= or Probe(target_fn=, forward_fn=)"
            self._fixed = [*(self._fixed or []), Breach("known loss", why)]
            self.observer.observe(trainer, kernel, step, with_loss=False)

    def note_errors(self, trainer: pl.Trainer, kernel: ProbeKernel) -> None:
        """After ``observe``: the error on the probe beside that of the linearised run."""
        if "du" in self._papers:
            self._linearised.note(trainer, kernel, self._scale(trainer, kernel), self.breaches(trainer, kernel))

    def resume(self, trainer: pl.Trainer, kernel: ProbeKernel, measured: tuple[KernelGram, Spectrum]) -> None:
        """The weights are those of the last observation: what waits for the step after it is measured again."""
        self.note_weights(trainer, kernel, measured)
        self.observer.wait(trainer.lightning_module, kernel)
        if "du" in self._papers:
            self._linearised.wait(trainer, kernel, self._scale(trainer, kernel), self.breaches(trainer, kernel))
        self.note_quantities(trainer, kernel)

    def note_step(self, trainer: pl.Trainer, kernel: ProbeKernel, optimizer: Optimizer, callback: pl.Callback) -> None:
        """Before an optimizer step."""
        self._linearised.note_step(self.observer.note_step(trainer, kernel, optimizer, callback))

    def observe_step(self, trainer: pl.Trainer, kernel: ProbeKernel) -> bool:
        """After the step that the last observation waited for: what it did. False if another one was done meanwhile."""
        seen = self.observer.observe_step(trainer, kernel, compared=self.compared)
        if seen:
            self._linearised.observe_step(trainer, kernel, self._scale(trainer, kernel))
        return seen

    @property
    def projection(self) -> LabelProjection:
        """Of the error on the first kernel's eigenvectors."""
        return self._linearised.projection

    def note_quantities(self, trainer: pl.Trainer, kernel: ProbeKernel) -> None:
        """What no verdict follows from; a network that does not let itself be looked at has fewer of them."""
        module, last = trainer.lightning_module, self.observer.history[-1]
        start = self.observer.weights_at_start(module, kernel)
        scale = self._scale(trainer, kernel)
        try:
            self._raw = probe_quantities(
                module, kernel, start, self._measured, self._norms, last, scale, self.observer.loss(module)
            )
            k, delta = math.nan if scale is None else scale.k, self._data.quantities().get("separation", math.nan)
            self._raw |= self._stability.note(self._raw, last, k=k, delta=delta)
            self._raw |= self._bias.quantities(kernel.probe.network(module))
            self._sparse.note(self._raw, last.step)
        except Exception as error:
            self._raw = {}
            rank_zero_warn(
                f"ConvergenceCriteria: distances and hidden states are left out at step {last.step}: {error}"
            )

    def breaches(self, trainer: pl.Trainer, kernel: ProbeKernel) -> list[Breach]:
        """Hypotheses that do not hold now."""
        return [*(self._fixed or []), *optimizer_breaches(self.observer, trainer, kernel)]

    def evidence(self, trainer: pl.Trainer, kernel: ProbeKernel, breaches: Sequence[Breach]) -> Evidence:
        """What there is to judge."""
        return Evidence(
            history=self.observer.history,
            measured=self._measured,
            scale=self._scale(trainer, kernel),
            whole_set=not any(each.hypothesis == "whole set" for each in breaches),
            certificate=self._start.certificate,
            ball=self._start.ball,
            radius=self._start.radius,
            infimum=self.observer.infimum,
            largest_rate=self.observer.largest_rate,
            data=self._data,
            leaky=self._bias.slope,
            stability=self._stability,
            sparse=self._sparse,
            clipped=find_clipping(trainer) is not None,
            phase_two=phase_two_criteria(find_guard(trainer)),
            linearised=self._linearised.criteria,
        )

    def quantities(self, trainer: pl.Trainer, kernel: ProbeKernel) -> dict[str, float]:
        """The scalars of the last observation."""
        history, scale = self.observer.history, self._scale(trainer, kernel) if "du" in self._papers else None
        return (
            observed_metrics(history)
            | self._data.quantities()
            | self._sparse.quantities()
            | self._raw
            | path_quantities(history, find_clipping(trainer))
            | self._linearised.quantities(scale)
        )

    def _scale(self, trainer: pl.Trainer, kernel: ProbeKernel) -> LossScale | None:
        """Of a squared loss on the probe."""
        gram = self._measured.gram
        if gram is None or kernel.targets is None:
            return None
        return loss_scale(self.observer.loss(trainer.lightning_module), gram.n_samples, gram.n_outputs)

    def state_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return {
            "observer": self.observer.state_dict(),
            "measured": self._measured.state_dict(),
            "linearised": self._linearised.state_dict(),
            "start": self._start.state_dict(),
            "stability": self._stability.state_dict(),
            "sparse": self._sparse.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.observer.load_state_dict(state.get("observer", {}))
        self._measured.load_state_dict(state.get("measured", {}))
        self._start.load_state_dict(state.get("start", {}))
        self._stability.load_state_dict(state.get("stability", {}))
        self._sparse.load_state_dict(state.get("sparse", {}))
        self._linearised.load_state_dict(state.get("linearised", {}))
