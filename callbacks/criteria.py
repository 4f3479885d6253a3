"""``ConvergenceCriteria``: which inequalities of the theorems hold in this run, and which theorems do not cover it, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_conv.callbacks._logging import log_criteria, log_figure, log_metrics
from lightning_conv.callbacks.batch import to_device
from lightning_conv.callbacks.breach import EVERYWHERE, Breach, Hypothesis, breached
from lightning_conv.callbacks.certificates import StartCertificate, descent_certificate, no_certificate
from lightning_conv.callbacks.hypotheses import find_breaches
from lightning_conv.callbacks.judgement import PAPERS, Evidence, judge
from lightning_conv.callbacks.kernel_monitor import KernelMonitor
from lightning_conv.callbacks.loss import LossFn
from lightning_conv.callbacks.measured import Measured
from lightning_conv.callbacks.observer import Observer, find_clipping, optimizer_breaches
from lightning_conv.callbacks.probe import Probe
from lightning_conv.callbacks.quantities import path_quantities, probe_quantities
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.plots import plot_observations
from lightning_conv.spectrum import Spectrum
from lightning_conv.theory.criterion import Criterion, Verdict
from lightning_conv.theory.loss_scale import LossScale, loss_scale
from lightning_conv.theory.observation import Observation, observed_metrics

COMPARED: frozenset[Hypothesis] = EVERYWHERE - {"unclipped"} | {"full batch", "whole set"}
"""Where all of these hold, a step must be -h grad f with f as it is on the probe."""


class ConvergenceCriteria(KernelMonitor):
    r"""Holds the run against the theorems: measures what their inequalities are about, judges it, and says what breaks a hypothesis.

    At every measurement: the loss f on the probe and its gradient, the kernel (shared with the other monitors of equal settings), and,
    over the optimizer step that follows, how far f fell and how far the weights moved. From these come the verdicts of

    - ``"chatterjee"``: what is proven before the first step (smooth MLPs with one output); descent efficiency, linear rate and
      path length of gradient descent
    - ``"du"``: lambda_min(G(k)) >= 2/3 lambda_min(G(0)), \|G(k) - G(0)\|_2 <= lambda_min(G(0)) / 3, and the contraction of a step; of
      ``DuFC`` and ``DuResNet`` on inputs of norm 1 what the paper asks itself, of the last hidden layer's kernel and its limit
    - ``"oymak_soltanolkotabi"``: the step, and misfit and distance under one line
    - ``"allen_zhu"``: separation of the data, semi-smoothness
    - ``"clipping"``: descent of delta-GClip (``RegularizedGradientClipping``)
    - ``"kawaguchi_sun"``: rank of the last hidden features on the probe, and whether the targets lie in their range

    What a theorem asks for at every step is judged at the worst of those measured, which the reason names.

    A theorem whose hypotheses the run breaks (momentum, Adam, weight decay, mini-batches, BatchNorm, dropout, augmentation, a loss that
    is not squared or whose infimum is not attained, a network that is not smooth, a probe that is a part of the training set, an
    observed step that is not -h grad f whatever the reason) gets
    ``not applicable`` with the reasons; the raw quantities are logged all the same. All are about the probe: for a theorem about the
    training loss to apply, the probe must hold the whole training set, ``Probe(size=len(dataset))``.

    Logged, to every logger and to ``trainer.callback_metrics``, in the units of the run's loss (f is the loss minus its infimum where
    that is known); ``docs/criteria.md`` has all of them:

    - ``theory/loss``: f; ``theory/gradient_norm``: \|grad f\|; ``theory/distance``: \|w_t - w_0\|
    - ``theory/pl_ratio``: \|grad f\|^2 / f; ``theory/pl_infimum``: the smallest so far, an upper bound of the infimum over a ball
    - of a step: ``theory/contraction``, ``theory/curvature``; of plain SGD also ``theory/path_length``, ``theory/descent_efficiency``
      and, where it is full-batch descent on the probe, ``theory/step_departure``
    - layers, hidden states and the rank of the last features against the start, from which no verdict follows
    - ``theory/refuted``: number of criteria that are refuted
    - text ``theory/criteria``: the table of verdicts, when one of them changes; figure ``theory/path`` (TensorBoard)

    Quantities of the step from t to t + 1 are logged at t. Those that would be rounding are left out.

    Args:
        which: names of the papers above, one or a list of them; ``"auto"``: all.
        probe: the samples, a ``Probe`` or their number (default: 128).
        every_n_steps: measure at multiples of it; None: within ``max_overhead``.
        max_overhead: share of wall time that measuring may take. First and last step are always measured.
        loss_fn: the loss of the training step; None: the one loss module on the LightningModule. That a full-batch step
            minimises this and nothing else is seen; of mini-batches it is taken on trust.

    Raises:
        MisconfigurationException: an unknown name in ``which``; otherwise as ``LambdaMin``.

    Cost: a measurement is one ``ntk_gram`` with its spectrum (shared), one gradient of the probe, up to six forward passes of it, and
    the spectral norm of every layer's change. Memory: a copy of the trained parameters for the whole run (also in the checkpoint), two
    more for the step after a measurement.

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
        self._measured = Measured(self._papers)
        self._fixed: list[Breach] | None = None  # what does not change during the run
        self._certificate: StartCertificate | None = None
        self._raw: dict[str, float] = {}  # quantities of the last measurement that no verdict follows from
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
        self._measured.begin()
        super().on_train_start(trainer, pl_module)
        at_rest = bool(self.history) and self.history[-1].step == trainer.global_step
        if self._waited and at_rest and self._kernel is not None and self._observer.pending is None:
            # The weights of the checkpoint are those of the last observation: what was measured then is computed again.
            try:
                self._note_weights(trainer, pl_module, self._kernel.at(trainer.global_step, pl_module))
                self._observer.wait(pl_module, self._kernel)
                self._note_quantities(trainer)
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
                compared = not breached(self._fixed or [], COMPARED)
                if self._observer.observe_step(trainer, self._kernel, compared=compared):
                    before, self._metrics = self._metrics, self._judged(trainer, step)
                    log_metrics(trainer, {n: v for n, v in self._metrics.items() if before.get(n) != v}, step)
            except Exception as error:
                rank_zero_warn(f"{type(self).__name__}: the step after step {step} is not observed: {error}")
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def record(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> dict[str, float]:
        assert self._kernel is not None
        self._note_weights(trainer, trainer.lightning_module, (gram, spectrum))
        if not self._observer.started and "chatterjee" in self._papers:
            self._certify_start(trainer)
        known = not any(each.hypothesis == "known loss" for each in self._fixed or [])
        try:
            self._observer.observe(trainer, self._kernel, step, with_loss=known)
        except Exception as error:
            if not known or self._observer.measured_loss:
                raise
            why = f"the loss could not be evaluated on the probe ({error}); pass loss_fn= or Probe(target_fn=, forward_fn=)"
            self._fixed = [*(self._fixed or []), Breach("known loss", why)]
            self._observer.observe(trainer, self._kernel, step, with_loss=False)
        self._note_quantities(trainer)
        return self._judged(trainer, step)

    @override
    def draw(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> None:
        if sum(not math.isnan(seen.loss) for seen in self.history) > 1:
            log_figure(trainer, "theory/path", lambda: plot_observations(self.history), step)

    def _judged(self, trainer: pl.Trainer, step: int) -> dict[str, float]:
        """Judge what was observed at ``step``, say it if a verdict has changed, and return the scalars."""
        assert self._kernel is not None
        self.breaches = [*(self._fixed or []), *optimizer_breaches(self._observer, trainer, self._kernel)]
        clipping = find_clipping(trainer)
        evidence = Evidence(
            history=self.history,
            measured=self._measured,
            scale=self._scale(trainer),
            whole_set=not any(each.hypothesis == "whole set" for each in self.breaches),
            certificate=self._certificate,
            largest_rate=self._observer.largest_rate,
            clipped=clipping is not None,
        )
        self.criteria = judge(self._papers, evidence, self.breaches)
        said = [(each.name, each.verdict) for each in self.criteria]
        if said != self._said:
            log_criteria(trainer, self.criteria, evidence.gram.n_samples, step)
            self._said = said
        raw = observed_metrics(self.history) | self._raw | path_quantities(self.history, clipping)
        found = {f"theory/{name}": value for name, value in raw.items()}
        return found | {"theory/refuted": float(sum(each.verdict == "refuted" for each in self.criteria))}

    def _note_weights(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, measured: tuple[KernelGram, Spectrum]
    ) -> None:
        """What takes eigenvalues, once a measurement, and once a run what does not change."""
        assert self._kernel is not None
        kernel, network = self._kernel, self.probe.network(pl_module)
        inputs = to_device(kernel.inputs, pl_module.device)
        if self._fixed is None:
            outputs, loss_fn = kernel.outputs(pl_module), self._observer.loss(pl_module)
            targets = None if kernel.targets is None else kernel.targets.to(outputs.device)
            self._fixed = find_breaches(
                trainer, network, inputs, loss_fn=loss_fn, outputs=outputs, targets=targets, probe=self.probe
            )
            self._observer.note_infimum(pl_module, kernel, outputs)
        self._measured.note(network, inputs, kernel.targets, measured, trainer.global_step)

    def _note_quantities(self, trainer: pl.Trainer) -> None:
        """What no verdict follows from; a network that does not let itself be looked at has fewer of them."""
        assert self._kernel is not None
        module, last, scale = trainer.lightning_module, self.history[-1], self._scale(trainer)
        start = self._observer.weights_at_start(module, self._kernel)
        try:
            self._raw = probe_quantities(module, self._kernel, start, self._measured, last, scale)
        except Exception as error:
            self._raw = {}
            rank_zero_warn(
                f"{type(self).__name__}: distances and hidden states are left out at step {last.step}: {error}"
            )

    def _scale(self, trainer: pl.Trainer) -> LossScale | None:
        """Of a squared loss on the probe."""
        assert self._kernel is not None
        gram = self._measured.gram
        if gram is None or self._kernel.targets is None:
            return None
        return loss_scale(self._observer.loss(trainer.lightning_module), gram.n_samples, gram.n_outputs)

    def _certify_start(self, trainer: pl.Trainer) -> None:
        """What is proven before the first step, where the theorem covers the run."""
        assert self._kernel is not None
        breaches = [*(self._fixed or []), *optimizer_breaches(self._observer, trainer, self._kernel)]
        why = breached(breaches, PAPERS["chatterjee"].asks)
        if trainer.global_step > 0:
            why = "the run was not seen from its first step on"
        elif not why and self._scale(trainer) is None:
            why = "the certificate is about the squared loss, nn.MSELoss"
        network, inputs, targets = (
            self.probe.network(trainer.lightning_module),
            self._kernel.inputs,
            self._kernel.targets,
        )
        self._certificate = no_certificate(why) if why else descent_certificate(network, inputs, targets)

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if not self._observer.started:
            return state
        return state | {
            "observer": self._observer.state_dict(),
            "measured": self._measured.state_dict(),
            "certificate": None if self._certificate is None else self._certificate.state(),
            "waits": self._observer.pending is not None,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._observer.load_state_dict(state_dict.get("observer", {}))
        self._measured.load_state_dict(state_dict.get("measured", {}))
        certificate = state_dict.get("certificate")
        self._certificate = None if certificate is None else StartCertificate.from_state(certificate)
        self._waited = bool(state_dict.get("waits", False))
