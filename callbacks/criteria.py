"""``ConvergenceCriteria``: which inequalities of the theorems hold in this run, and which theorems do not cover it, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_conv.callbacks._logging import log_figure, log_metrics, log_text
from lightning_conv.callbacks.batch import to_device
from lightning_conv.callbacks.certificates import (
    descent_certificate,
    expressivity_criteria,
    kernel_criteria,
    separation_criteria,
)
from lightning_conv.callbacks.hypotheses import Breach, breached, find_breaches
from lightning_conv.callbacks.judgement import PAPERS, Evidence, judge
from lightning_conv.callbacks.kernel_monitor import KernelMonitor
from lightning_conv.callbacks.loss import LossFn
from lightning_conv.callbacks.observer import Observer, find_clipping
from lightning_conv.callbacks.plain_descent import NotPlainError
from lightning_conv.callbacks.probe import Probe
from lightning_conv.callbacks.probe_kernel import gram_from_state, gram_state
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.plots import plot_observations
from lightning_conv.report import EXPLANATION, criteria_table, verdict_counts
from lightning_conv.spectrum import Spectrum, kernel_spectrum
from lightning_conv.theory.criterion import Criterion, Verdict
from lightning_conv.theory.loss_scale import loss_scale
from lightning_conv.theory.observation import Observation, observed_metrics


class ConvergenceCriteria(KernelMonitor):
    r"""Holds the run against the theorems: measures what their inequalities are about, judges it, and says what breaks a hypothesis.

    At every measurement: the loss f on the probe and its gradient, the kernel (shared with the other monitors of equal settings), and,
    over the optimizer step that follows, how far f fell and how far the weights moved. From these come the verdicts of

    - ``"chatterjee"``: what is proven before the first step (smooth MLPs with one output); descent efficiency, linear rate and
      path length of gradient descent
    - ``"du"``: lambda_min(G(k)) >= 2/3 lambda_min(G(0)), \|G(k) - G(0)\|_2 <= lambda_min(G(0)) / 3, and the contraction of a step
    - ``"oymak_soltanolkotabi"``: misfit and distance under one line
    - ``"allen_zhu"``: separation of the data, no critical point, semi-smoothness
    - ``"clipping"``: descent of delta-GClip (``RegularizedGradientClipping``)
    - ``"kawaguchi_sun"``: rank of the last hidden features on the probe, and whether the targets lie in their range

    A theorem whose hypotheses the run breaks (momentum, Adam, weight decay, mini-batches, BatchNorm, dropout, augmentation, a loss that
    is not squared or whose infimum is not attained, a network that is not smooth, a probe that is a part of the training set) gets
    ``not applicable`` with the reasons; the raw quantities are logged all the same. All are about the probe: for a theorem about the
    training loss to apply, the probe must hold the whole training set, ``Probe(size=len(dataset))``.

    Logged, to every logger and to ``trainer.callback_metrics``, in the units of the run's loss (f is the loss minus its infimum where
    that is known):

    - ``theory/loss``: f; ``theory/gradient_norm``: \|grad f\|
    - ``theory/pl_ratio``: \|grad f\|^2 / f; ``theory/pl_infimum``: the smallest so far, an upper bound of the infimum over a ball
    - ``theory/distance``: \|w_t - w_0\|; ``theory/path_length``: sum of h \|g\| over all steps, of plain SGD only
    - ``theory/descent_efficiency``: (f_t - f_{t+1}) / (h \|grad f_t\|^2), of plain SGD only
    - ``theory/curvature``: 2 (f_{t+1} - f_t - <grad f_t, w_{t+1} - w_t>) / \|w_{t+1} - w_t\|^2, the semi-smoothness residual
    - ``theory/contraction``: f_{t+1} / f_t
    - ``theory/refuted``: number of criteria that are refuted
    - text ``theory/criteria``: the table of verdicts, when one of them changes; figure ``theory/path`` (TensorBoard)

    Quantities of the step from t to t + 1 are logged at t. Those that would be rounding are left out.

    Args:
        which: names of the papers above, one or a list of them; ``"auto"``: all.
        probe: the samples, a ``Probe`` or their number (default: 128).
        every_n_steps: measure at multiples of it; None: within ``max_overhead``.
        max_overhead: share of wall time that measuring may take. First and last step are always measured.
        loss_fn: the loss of the training step; None: the one loss module on the LightningModule. It is taken on trust that
            the step minimises this and nothing else.

    Raises:
        MisconfigurationException: an unknown name in ``which``; otherwise as ``LambdaMin``.

    Cost: a measurement is one ``ntk_gram`` with its spectrum (shared), one gradient of the probe, and one forward pass after the next
    step. Memory: a copy of the trained parameters for the whole run (also in the checkpoint), two more for the step after a measurement.

    Example::

        trainer = Trainer(callbacks=[ConvergenceCriteria(probe=256), ConvergenceReport()])
    """

    def __init__(
        self,
        which: str | Sequence[str] = "auto",
        probe: Probe | int | None = None,
        every_n_steps: int | None = None,
        max_overhead: float = 0.03,
        loss_fn: LossFn | None = None,
    ) -> None:
        names = [which] if isinstance(which, str) else list(which)
        unknown = [name for name in names if name not in PAPERS and name != "auto"]
        if unknown or not names:
            raise MisconfigurationException(
                f"which: {unknown or which!r} is not known; choose from {', '.join(PAPERS)}, or 'auto' for all of them"
            )
        super().__init__(probe, every_n_steps, max_overhead)
        self.which = which
        self.loss_fn = loss_fn
        self._papers = tuple(PAPERS) if "auto" in names else tuple(dict.fromkeys(names))
        self._clear()

    def _clear(self) -> None:
        self.criteria: list[Criterion] = []
        """The verdicts of the last measurement."""
        self.breaches: list[Breach] = []
        """Hypotheses that do not hold in this run."""
        self._observer = Observer(self.loss_fn, spectral="allen_zhu" in self._papers)
        self._reference: tuple[KernelGram, Spectrum] | None = None
        self._least_lambda = math.inf
        self._fixed: list[Breach] | None = None  # what does not change during the run
        self._gram: KernelGram | None = None
        self._of_start: list[Criterion] = []
        self._of_data: list[Criterion] = []
        self._of_kernel: list[Criterion] = []
        self._of_features: list[Criterion] = []
        self._said: list[tuple[str, Verdict]] = []
        self._waited = False  # when the checkpoint was written

    @override
    def forget(self) -> None:
        super().forget()
        self._clear()

    @property
    def history(self) -> list[Observation]:
        """What was measured, in order."""
        return self._observer.history

    @property
    def metrics(self) -> dict[str, float]:
        """The scalars of the last measurement."""
        return dict(self._metrics)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fixed = None
        self._observer.begin()
        super().on_train_start(trainer, pl_module)
        at_rest = bool(self.history) and self.history[-1].step == trainer.global_step
        if self._waited and at_rest and self._kernel is not None and self._observer.pending is None:
            # The weights of the checkpoint are those of the last observation: what was measured then is computed again.
            try:
                self._note_weights(trainer, pl_module, self._kernel.at(trainer.global_step, pl_module)[0])
                self._observer.wait(pl_module, self._kernel)
            except Exception as error:
                rank_zero_warn(f"{type(self).__name__}: the step after step {self._last_step} is not observed: {error}")
        self._waited = False

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._kernel is not None:
            self._observer.note_step(trainer, self._kernel, optimizer, self)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        waits = self._observer.pending is not None and trainer.global_step > self.history[-1].step
        if waits and self._kernel is not None:
            step = self.history[-1].step
            try:
                if self._observer.observe_step(trainer, self._kernel):
                    before, self._metrics = self._metrics, self._judged(trainer, step)
                    log_metrics(trainer, {n: v for n, v in self._metrics.items() if before.get(n) != v}, step)
            except Exception as error:
                rank_zero_warn(f"{type(self).__name__}: the step after step {step} is not observed: {error}")
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def record(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> dict[str, float]:
        assert self._kernel is not None
        if self._reference is None:
            self._reference = gram, spectrum
        self._least_lambda = min(self._least_lambda, max(spectrum.lambda_min.lower, 0.0))
        self._note_weights(trainer, trainer.lightning_module, gram)
        if not self._observer.started:
            self._certify_start(trainer, gram)
        known = not any(each.hypothesis == "known loss" for each in self._fixed or [])
        try:
            self._observer.observe(trainer, self._kernel, step, with_loss=known)
        except Exception as error:
            if not known or self._observer.measured_loss:
                raise
            why = f"the loss could not be evaluated on the probe ({error}); pass loss_fn= or Probe(target_fn=, forward_fn=)"
            self._fixed = [*(self._fixed or []), Breach("known loss", why)]
            self._observer.observe(trainer, self._kernel, step, with_loss=False)
        return self._judged(trainer, step)

    @override
    def draw(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> None:
        if sum(not math.isnan(seen.loss) for seen in self.history) > 1:
            log_figure(trainer, "theory/path", lambda: plot_observations(self.history), step)

    def _judged(self, trainer: pl.Trainer, step: int) -> dict[str, float]:
        """Judge what was observed at ``step``, say it if a verdict has changed, and return the scalars."""
        assert self._reference is not None
        assert self._gram is not None
        assert self._kernel is not None
        gram, loss_fn = self._gram, self._observer.loss(trainer.lightning_module)
        self.breaches = [*(self._fixed or []), *self._of_optimizer(trainer)]
        evidence = Evidence(
            history=self.history,
            gram=gram,
            first_spectrum=self._reference[1],
            kernel=self._of_kernel,
            least_lambda=self._least_lambda,
            scale=None if self._kernel.targets is None else loss_scale(loss_fn, gram.n_samples, gram.n_outputs),
            whole_set=not any(each.hypothesis == "whole set" for each in self.breaches),
            separation=self._of_data,
            expressivity=self._of_features,
            certified=self._of_start,
            clipped=find_clipping(trainer) is not None,
        )
        self.criteria = judge(self._papers, evidence, self.breaches)
        said = [(each.name, each.verdict) for each in self.criteria]
        if said != self._said:
            counts = ", ".join(f"{count} {verdict}" for verdict, count in verdict_counts(self.criteria).items())
            head = f"Step {step}, on the probe's {gram.n_samples} samples: {counts}."
            log_text(trainer, "theory/criteria", f"{head}\n\n{criteria_table(self.criteria)}\n\n{EXPLANATION}", step)
            self._said = said
        found = {f"theory/{name}": value for name, value in observed_metrics(self.history).items()}
        return found | {"theory/refuted": float(sum(each.verdict == "refuted" for each in self.criteria))}

    def _note_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule, gram: KernelGram) -> None:
        """What takes eigenvalues, once a measurement, and once a run what does not change."""
        assert self._reference is not None
        assert self._kernel is not None
        kernel, network = self._kernel, self.probe.network(pl_module)
        inputs, self._gram = to_device(kernel.inputs, pl_module.device), gram
        if self._fixed is None:
            outputs, loss_fn = kernel.outputs(pl_module), self._observer.loss(pl_module)
            targets = None if kernel.targets is None else kernel.targets.to(outputs.device)
            self._fixed = find_breaches(
                trainer,
                network,
                inputs,
                loss_fn=loss_fn,
                outputs=outputs,
                targets=targets,
                input_fn=self.probe.input_fn,
            )
            self._observer.note_infimum(pl_module, kernel, outputs)
            if "allen_zhu" in self._papers:
                self._of_data = separation_criteria(kernel.inputs, kernel.targets)
        if "du" in self._papers:
            self._of_kernel = kernel_criteria(gram, *self._reference)
        if "kawaguchi_sun" in self._papers:
            self._of_features = expressivity_criteria(network, inputs, kernel.targets)

    def _certify_start(self, trainer: pl.Trainer, gram: KernelGram) -> None:
        """What is proven before the first step, where the theorem covers the run."""
        assert self._kernel is not None
        scale = loss_scale(self._observer.loss(trainer.lightning_module), gram.n_samples, gram.n_outputs)
        broken = breached([*(self._fixed or []), *self._of_optimizer(trainer)], PAPERS["chatterjee"].asks)
        if "chatterjee" in self._papers and trainer.global_step == 0 and scale is not None and not broken:
            step = scale.step_on_mean(self._observer.rate(trainer, self._kernel))
            network = self.probe.network(trainer.lightning_module)
            self._of_start = descent_certificate(network, self._kernel.inputs, self._kernel.targets, step)

    def _of_optimizer(self, trainer: pl.Trainer) -> list[Breach]:
        assert self._kernel is not None
        try:
            self._observer.rate(trainer, self._kernel)
        except NotPlainError as error:
            return [Breach("descent", f"a step is no plain gradient descent: {error}")]
        if find_clipping(trainer) is not None:
            return [Breach("unclipped", "RegularizedGradientClipping scales the gradients")]
        return []

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if not self._observer.started:
            return state
        return state | {
            "observer": self._observer.state_dict(),
            "least_lambda": self._least_lambda,
            "reference": None if self._reference is None else gram_state(self._reference[0]),
            "of_start": [asdict(each) for each in self._of_start],
            "waits": self._observer.pending is not None,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._observer.load_state_dict(state_dict.get("observer", {}))
        self._least_lambda = float(state_dict.get("least_lambda", math.inf))
        self._of_start = [Criterion(**each) for each in state_dict.get("of_start", [])]
        self._waited = bool(state_dict.get("waits", False))
        if state_dict.get("reference") is not None:
            gram = gram_from_state(state_dict["reference"])
            self._reference = gram, kernel_spectrum(gram)
