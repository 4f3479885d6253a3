"""``ConvergenceCriteria``: which inequalities of the theorems hold in a run, and which theorems do not cover it, and why."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer
from typing_extensions import override

from lightning_conv.callbacks.criteria.run_record import RunRecord
from lightning_conv.callbacks.criteria.tracker import CriteriaTracker, Which, make_trackers
from lightning_conv.callbacks.monitors.base import KernelMonitor, OnError
from lightning_conv.callbacks.run.assumptions import Violation
from lightning_conv.callbacks.run.guarded import guarded
from lightning_conv.callbacks.run.loggers.sending import takes_texts
from lightning_conv.callbacks.run.logging import log_metrics, log_text
from lightning_conv.callbacks.run.losses.loss_modules import LossFn
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.callbacks.run.measuring import measuring
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.callbacks.run.upgrade import upgrade_state
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.reporting.plots import plot_observations
from lightning_conv.reporting.report import EXPLANATION, criteria_text, verdict_counts
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.tools.observation import Observation

PASSES = 12
"""Forward and backward passes of the probe that a measurement takes, roughly: at the first one it looks at the network, too."""

AFTER_PASSES = 4
"""Forward and backward passes that the step after a measurement takes, roughly, before it is known: a copy of the weights among them."""

SECONDS_PER_WEIGHT = 2.5e-7
"""Seconds that norms take for each weight, roughly: 2.8 s for ResNet-18 on one core."""


class ConvergenceCriteria(KernelMonitor):
    r"""Compares the run with the theorems: measures both sides of their inequalities, judges them, and names violated assumptions.

    A measurement computes the loss f on the probe, its gradient and the kernel (shared with monitors of equal settings), and, over the
    optimizer step that follows, the fall of f and the movement of the weights. Judged are the papers below and those added by
    ``register_criteria``:

    - ``"allen_zhu"``: separation of the data, semi-smoothness; for ``AllenZhuNet`` also hidden norms, and the exponent of switching
    - ``"bias_ntk"``: the share of active units at the start and later, for ``BiasedTwoLayer``
    - ``"chatterjee"``: what is proven before the first step (smooth MLPs with one output); whether points of a ball around the start
      refute the criterion; descent efficiency, linear rate and path length of gradient descent
    - ``"clipping"``: descent of delta-GClip (``RegularizedGradientClipping``)
    - ``"du"``: lambda_min(G(k)) >= 2/3 lambda_min(G(0)), \|G(k) - G(0)\|_2 <= lambda_min(G(0)) / 3, and the contraction of every step. For
      ``DuFC``, ``DuResNet``, ``DuConvResNet`` and ``DuTwoLayer`` on inputs of norm 1, what the papers themselves ask of the last hidden
      layer's kernel and its limit, of the layers at the start, of their movement, and of the linearisation of a step
    - ``"frei"``: near orthogonality of the data, for ``LeakyTwoLayer``
    - ``"kawaguchi_sun"``: rank of the last hidden features on the probe, and whether the targets lie in their range; for phase 2 of an
      ``ExpressivityGuard``, on the training set, the step, the gap under its proven bound, and what its certificate proves
    - ``"oymak"``: the step, and misfit and distance under one line

    What a theorem asks for at every step is judged at the worst of the measured steps, which the reason names. Where the run violates an
    assumption of a theorem, its criteria are ``not applicable`` with the reasons, and the measured quantities are logged all the same.
    Examples are momentum, Adam, weight decay, mini-batches, BatchNorm, dropout, augmentation, a loss that is not squared or whose infimum
    is not attained, a network that is not smooth, and an observed step that is not -h grad f, for whatever reason. Everything is measured
    on the probe: a theorem about the training loss applies only if the probe holds the whole training set, ``Probe(size=len(dataset))``.

    Logged, to every logger and to ``trainer.callback_metrics``, in the units of the run's loss (f is the loss minus its infimum where
    that is known); ``docs/tags.md`` has all of them. In a run with several optimizers there is a network for each of them, and its name
    stands behind the group, as in ``theory/generator/loss``:

    - ``theory/loss``: f; ``theory/gradient_norm``: \|grad f\|; ``theory/distance``: \|w_t - w_0\|
    - ``theory/pl_ratio``: \|grad f\|^2 / f; ``theory/pl_infimum``: the smallest so far, an upper bound of the infimum over a ball
    - of a step: ``theory/contraction``, ``theory/curvature``; of plain SGD also ``theory/path_length``, ``theory/descent_efficiency``
      and, where it is full-batch descent on the probe, ``theory/step_departure``
    - for a squared loss ``theory/residual``: \|u - y\|; with the full kernel and full-batch descent on the probe also the linearised
      values, ``theory/residual_predicted``, ``theory/linearisation_error``, ``theory/rate_linearised``
    - quantities without a verdict: how far layers and hidden states have moved from the start, the rank of the last features; for two
      classes and one output the margins
    - once per run, of the data: ``theory/separation``, ``theory/close_pairs``, ``theory/near_orthogonality``; of the start
      ``theory/hidden_norm_min``, ``theory/hidden_norm_max``; for ``BiasedTwoLayer`` ``theory/active_fraction_expected``,
      ``theory/bias_ntk_lambda_min``
    - ``theory/refuted``: number of refuted criteria, without hypotheses about the data and the start
    - text ``theory/criteria``: the table of verdicts, when one of them or a number changes; figures ``theory/path``,
      ``theory/label_projection`` (TensorBoard)

    Quantities of the step from t to t + 1 are logged at t. Those that would be only rounding are left out.

    Args:
        which: names of the papers above, or trackers (``CriteriaTracker``, class or object), one or several; ``"auto"``: all that
            are registered. The former names ``"oymak_soltanolkotabi"`` and ``"implicit_bias"`` are accepted.
        probe: as in ``LambdaMin``.
        every_n_steps: measure at multiples of it; None: within ``max_overhead``.
        max_overhead: as in ``LambdaMin``.
        loss_fn: ``loss_fn(outputs, targets)`` of the training step; None: the one that is observed in it, see ``LambdaMin``. For full-batch
            steps it is also checked that they are steps down this loss.
        radius: radius of the ball around w_0 in which ``"chatterjee"`` searches for points with small \|grad f\|^2 / f, which refute its
            criterion for radii up to this one. None: the criterion is compared with the run's own path only.
        on_error: as in ``LambdaMin``.

    Raises:
        MisconfigurationException: an unknown name in ``which``, a radius that is not positive; otherwise as ``LambdaMin``.

    Cost: a measurement takes one ``ntk_gram`` with its spectrum (shared), one gradient on the probe, up to six forward passes, and two
    spectral norms per layer, of which the part after the step is left out where the step is no plain descent and the run cannot afford
    it; ``"du"`` with the full kernel adds two forward passes in float64, and one eigenvalue problem per run;
    ``radius`` adds about 400 gradients on the probe in float64, once. Memory: a copy of the trained parameters for the whole run (also
    in the checkpoint), two more for the step after a measurement, some ten in float64 during the search.

    Example::

        trainer = Trainer(callbacks=[ConvergenceCriteria(probe=256), ConvergenceReport()])
    """

    def __init__(
        self,
        which: Which | Sequence[Which] = "auto",
        probe: Probe | int | None = None,
        every_n_steps: int | None = None,
        max_overhead: float = 0.03,
        loss_fn: LossFn | None = None,
        radius: float | None = None,
        on_error: OnError = "raise",
    ) -> None:
        self._prototypes = make_trackers(which, {"radius": radius})
        super().__init__(probe, every_n_steps, max_overhead, on_error)
        self.which = which
        self.loss_fn = loss_fn
        self.radius = radius
        self._clear()

    def _clear(self) -> None:
        self.criteria: list[Criterion] = []  # the verdicts of the last measurement
        self.violations: list[Violation] = []  # the assumptions that this run violates
        self._record = RunRecord(self._prototypes, self.loss_fn)
        self._said = ""  # the text that was logged last
        self._waited = False  # whether a measurement waited for a step when the checkpoint was written
        self._observing: float | None = None  # seconds that looking at the last step after a measurement has taken
        self.once = frozenset(f"theory/{name}" for name in self._record.once)

    @override
    def forget(self) -> None:
        super().forget()
        self._clear()

    @property
    def breaches(self) -> list[Violation]:
        """Former name of ``violations``."""
        return self.violations

    @property
    def trackers(self) -> dict[str, CriteriaTracker]:
        """The trackers of this run by name."""
        return self._record.trackers

    def by_paper(self, trainer: pl.Trainer) -> dict[str, list[Criterion]]:
        """Return the verdicts by the name of the paper; empty before the first measurement.

        Args:
            trainer: of the run.
        """
        if not self.criteria or self._kernel is None:
            return {}
        return self._record.by_paper(self._record.view(trainer, self._kernel))

    @property
    def history(self) -> list[Observation]:
        """What was observed, in order."""
        return self._record.observer.history

    @property
    def metrics(self) -> dict[str, float]:
        """The scalars of the last measurement."""
        return dict(self._metrics)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record.begin()
        super().on_train_start(trainer, pl_module)
        at_rest = bool(self.history) and self.history[-1].step == trainer.global_step
        if self._waited and at_rest and self._kernel is not None and self._record.observer.pending is None:
            # The weights of the checkpoint are those of the last observation: what was measured then is computed again.
            step = trainer.global_step
            with measuring(trainer), guarded(step, self._not_observed, failures=self._record.failures):
                gram, spectrum = self._kernel.at(trainer.global_step)
                self._record.resume(trainer, self._kernel, gram, spectrum)
        self._waited = False

    @override
    def _next_look(self) -> float:
        return super()._next_look() if self._record.observer.pending is None else 0.0

    @property
    @override
    def notes_steps(self) -> bool:
        return self._kernel is not None and (self._record.notes_steps(self._kernel.optimizers) or super().notes_steps)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._kernel is not None:
            self._record.before_step(trainer, self._kernel, optimizer, self)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        observer = self._record.observer
        waits = observer.pending is not None and trainer.global_step > self.history[-1].step
        if waits and self._kernel is not None and not self._may_observe(self._kernel, trainer.global_step):
            observer.pending = None
        elif waits and self._kernel is not None and not trainer.received_sigterm:
            begun, step = time.perf_counter(), self.history[-1].step
            with measuring(trainer), guarded(step, self._not_observed, failures=self._record.failures):
                run = self._record.observe(trainer, self._kernel)
                if run is not None:
                    self._judge_again(run, step)
            self._observing = time.perf_counter() - begun
            self._kernel.schedule.spend(trainer.global_step, self._observing)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _may_observe(self, kernel: Measurement, step: int) -> bool:
        """Return whether the step after a measurement is looked at: if it is plain descent, which theorems speak of, or is affordable."""
        pending, schedule = self._record.observer.pending, kernel.schedule
        if pending is None or not math.isnan(pending.rate) or schedule.every_n_steps is not None:
            return True
        seconds = AFTER_PASSES * kernel.pass_seconds if self._observing is None else self._observing
        return kernel.decisions.alike(schedule.allows_beside(seconds, step))

    @override
    def own_seconds(self, kernel: Measurement) -> float:
        # Gradients, features and the step that follows; norms of weights and of their movement.
        return PASSES * kernel.pass_seconds + SECONDS_PER_WEIGHT * kernel.weights

    @override
    def wait(self, trainer: pl.Trainer, kernel: Measurement) -> None:
        self._record.note_start(trainer, kernel)

    @override
    def record(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> dict[str, float]:
        assert self._kernel is not None
        return self._judged(self._record.measure(trainer, self._kernel, gram, spectrum), step)

    @override
    def draw(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> None:
        if sum(not math.isnan(seen.loss) for seen in self.history) > 1:
            self.show(trainer, "theory/path", lambda: plot_observations(self.history))
        for name, figure in self._record.figures().items():
            self.show(trainer, f"theory/{name}", figure)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for each in self.by_optimizer.values():
            each.finish(trainer)

    def finish(self, trainer: pl.Trainer) -> None:
        """Judge again what the end of the fit has brought, as an ``ExpressivityGuard`` does; a second call changes nothing.

        Whoever reads ``criteria`` when the fit ends, as ``ConvergenceReport`` does, calls this first. There is no collective in it.

        Args:
            trainer: of the run.
        """
        if not self.criteria or self._kernel is None:
            return
        with guarded(None, f"{type(self).__name__}: the end of the fit is not judged"):
            run = self._record.view(trainer, self._kernel)
            if self._record.finish(run):
                self._judge_again(run, trainer.global_step)

    @property
    def _not_observed(self) -> str:
        return f"{type(self).__name__}: the step after a measurement is not observed"

    @property
    def left_out(self) -> list[str]:
        """What was left out of the measurements of this run, and why, each once with the number of steps."""
        return self._record.failures.words

    def _judge_again(self, run: RunView, step: int) -> None:
        """Judge, and log the scalars that have changed since the last measurement."""
        before, self._metrics = self._metrics, self._judged(run, step)
        log_metrics(run.trainer, self._tagged({n: v for n, v in self._metrics.items() if before.get(n) != v}), step)

    def _judged(self, run: RunView, step: int) -> dict[str, float]:
        """Judge what was observed at ``step``, log the table if it has changed, and return the scalars."""
        self.violations = list(run.violations)
        self.criteria = self._record.criteria(run)
        self._say(run, step)
        scalars = {f"theory/{name}": value for name, value in self._record.scalars().items()}
        spared = self._record.hypotheses
        failed = [each for each in self.criteria if each.verdict == "refuted" and each.name not in spared]
        return scalars | {"theory/refuted": float(len(failed))}

    def _say(self, run: RunView, step: int) -> None:
        """Log the table of verdicts if there is another verdict or number in it."""
        if not takes_texts(run.trainer) or (said := criteria_text(self.criteria)) == self._said:
            return
        self._said = said
        counts = ", ".join(f"{count} {verdict}" for verdict, count in verdict_counts(self.criteria).items())
        head = f"Step {step}, on the probe's {run.samples} samples: {counts}."
        log_text(run.trainer, self.tag("theory/criteria"), f"{head}\n\n{said}\n\n{EXPLANATION}", step)

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if not self._record.observer.start:
            return state
        waits = self._record.observer.pending is not None
        return state | {"record": self._record.state_dict(), "waits": waits}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = upgrade_state(state_dict)
        super().load_state_dict(state)
        self._record.load_state_dict(state.get("record", {}))
        self._waited = bool(state.get("waits", False))
