"""``ConvergenceCriteria``: which inequalities of the theorems hold in this run, and which theorems do not cover it, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
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
from lightning_conv.callbacks.clipping import RegularizedGradientClipping, gradients_of, total_norm
from lightning_conv.callbacks.hypotheses import Breach, breached, find_breaches
from lightning_conv.callbacks.judgement import PAPERS, Evidence, judge
from lightning_conv.callbacks.kernel_monitor import KernelMonitor
from lightning_conv.callbacks.loss import LossFn, find_loss
from lightning_conv.callbacks.plain_descent import NotPlainError, PlainDescent
from lightning_conv.callbacks.probe import Probe
from lightning_conv.callbacks.probe_kernel import gram_from_state, gram_state
from lightning_conv.evaluation import sample_count
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.loss_gradient import SampleLoss, inner, norm
from lightning_conv.losses import loss_facts
from lightning_conv.plots import plot_observations
from lightning_conv.report import EXPLANATION, criteria_table, verdict_counts
from lightning_conv.spectrum import Spectrum, kernel_spectrum
from lightning_conv.theory.allen_zhu.semi_smoothness import step_size as largest_spectral_norm
from lightning_conv.theory.criterion import Criterion, Verdict
from lightning_conv.theory.loss_scale import loss_scale
from lightning_conv.theory.observation import NOISE, Observation, observed_metrics


@dataclass
class Pending:
    """An observation that waits for the step after it."""

    weights: dict[str, Tensor]  # a copy of w_t
    gradient: dict[str, Tensor]
    rate: float = math.nan  # of the step, noted just before it


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
        self.history: list[Observation] = []
        """What was measured, in order."""
        self.breaches: list[Breach] = []
        """Hypotheses that do not hold in this run."""
        self._start: dict[str, Tensor] = {}
        self._reference: tuple[KernelGram, Spectrum] | None = None
        self._least_lambda = math.inf
        self._path: Tensor | float = 0.0
        self._path_known = True
        self._fixed: list[Breach] | None = None
        self._separation: list[Criterion] = []
        self._pending: Pending | None = None
        self._resume_pending = False
        self._descent: PlainDescent | None = None
        self._said: list[tuple[str, Verdict]] = []
        self._seen: tuple[KernelGram, Spectrum] | None = None
        self._expressivity: list[Criterion] = []
        self._certified: list[Criterion] = []
        self._infimum = 0.0
        self._of_kernel: list[Criterion] = []

    @override
    def forget(self) -> None:
        super().forget()
        self._clear()

    @property
    def metrics(self) -> dict[str, float]:
        """The scalars of the last measurement."""
        return dict(self._metrics)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._descent, self._fixed, self._pending = None, None, None
        super().on_train_start(trainer, pl_module)
        at_rest = self.history and self.history[-1].step == trainer.global_step
        if self._resume_pending and at_rest and self._kernel is not None and self._pending is None:
            # The weights of the checkpoint are those of the last observation: what was measured then is computed again.
            try:
                self._seen = self._kernel.at(trainer.global_step, pl_module)
                self._note_fixed(trainer, pl_module)
                self._note_weights(pl_module, self._seen[0])
                self._await_step(pl_module, self._gradient(pl_module)[1])
            except Exception as error:
                rank_zero_warn(f"{type(self).__name__}: the step after step {self._last_step} is not observed: {error}")
        self._resume_pending = False

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._kernel is None:
            return
        try:
            rate = self._rate(trainer)
            if self._pending is not None:
                self._pending.rate = rate
            if self._path_known and (gradients := self._gradients(trainer, optimizer)):
                length = rate * total_norm(gradients)
                self._path = self._path + (length if length.device.type == "mps" else length.double())
        except NotPlainError:
            self._path_known = False

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._pending is not None and self.history and trainer.global_step > self.history[-1].step:
            try:
                self._observe_step(trainer, pl_module)
            except Exception as error:
                rank_zero_warn(
                    f"{type(self).__name__}: the step after step {self.history[-1].step} is not observed: {error}"
                )
            self._pending = None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def record(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> dict[str, float]:
        assert self._kernel is not None
        pl_module = trainer.lightning_module
        if self._reference is None:
            self._reference = gram, spectrum
        self._least_lambda = min(self._least_lambda, max(spectrum.lambda_min.lower, 0.0))
        self._seen = gram, spectrum
        self._note_fixed(trainer, pl_module)
        self._note_weights(pl_module, gram)
        # Before the first step nothing has shown yet whether the steps are plain ones.
        self._path_known &= not any(each.hypothesis == "descent" for each in self._of_optimizer(trainer))
        parameters = self._parameters(pl_module)
        if not self._start:
            self._certify_start(trainer, pl_module, gram)
            self._start = {name: value.detach().clone() for name, value in parameters.items()}
        moved = {name: value.detach() - self._start[name].to(value) for name, value in parameters.items()}
        self._pending = None
        if (found := self._loss_and_gradient(pl_module)) is not None:
            loss, gradient = found
            self.history.append(self._observation(trainer, step, loss, norm(gradient), norm(moved)))
            self._await_step(pl_module, gradient)
        else:
            self.history.append(self._observation(trainer, step, math.nan, math.nan, norm(moved)))
        self._judge(trainer, pl_module, step)
        return self._scalars()

    @override
    def draw(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> None:
        if sum(not math.isnan(seen.loss) for seen in self.history) > 1:
            log_figure(trainer, "theory/path", lambda: plot_observations(self.history), step)

    def _observation(self, trainer: pl.Trainer, step: int, loss: float, slope: float, distance: float) -> Observation:
        float64 = next(trainer.lightning_module.parameters()).dtype == torch.float64
        return Observation(
            step=step,
            loss=loss,
            gradient_norm=slope,
            distance=distance,
            path_length=float(self._path) if self._path_known else math.nan,
            noise=1e-14 if float64 else NOISE / 10,
        )

    def _observe_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._pending is not None
        seen, pending = self.history[-1], self._pending
        if trainer.global_step != seen.step + 1:
            return
        parameters = self._parameters(pl_module)
        moved = {name: parameters[name].detach() - before for name, before in pending.weights.items()}
        self.history[-1] = replace(
            seen,
            next_loss=self._sample_loss(pl_module).value() - self._infimum,
            linear=inner(pending.gradient, moved),
            moved=norm(moved),
            spectral=largest_spectral_norm(moved) if "allen_zhu" in self._papers else math.nan,
            step_size=pending.rate * self._clip_factor(trainer),
        )
        before = self._metrics
        self._judge(trainer, pl_module, seen.step)
        self._metrics = self._scalars()
        fresh = {name: value for name, value in self._metrics.items() if before.get(name) != value}
        log_metrics(trainer, fresh, seen.step)

    def _judge(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        assert self._reference is not None
        assert self._seen is not None
        assert self._kernel is not None
        assert self._fixed is not None
        targets, gram = self._kernel.targets, self._seen[0]
        self.breaches = [*self._fixed, *self._of_optimizer(trainer)]
        evidence = Evidence(
            history=self.history,
            gram=gram,
            first_spectrum=self._reference[1],
            kernel=self._of_kernel,
            least_lambda=self._least_lambda,
            scale=None if targets is None else loss_scale(self._loss(pl_module), gram.n_samples, gram.n_outputs),
            whole_set=not any(each.hypothesis == "whole set" for each in self.breaches),
            separation=self._separation,
            expressivity=self._expressivity,
            certified=self._certified,
            clipped=_clipping(trainer) is not None,
        )
        self.criteria = judge(self._papers, evidence, self.breaches)
        said = [(each.name, each.verdict) for each in self.criteria]
        if said != self._said:
            counts = ", ".join(f"{count} {verdict}" for verdict, count in verdict_counts(self.criteria).items())
            text = f"Step {step}, on the probe's {gram.n_samples} samples: {counts}.\n\n{criteria_table(self.criteria)}\n\n{EXPLANATION}"
            log_text(trainer, "theory/criteria", text, step)
            self._said = said

    def _scalars(self) -> dict[str, float]:
        found = {f"theory/{name}": value for name, value in observed_metrics(self.history).items()}
        found["theory/refuted"] = float(sum(each.verdict == "refuted" for each in self.criteria))
        return found

    def _note_fixed(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What holds for the whole run, looked at once."""
        if self._fixed is not None:
            return
        assert self._kernel is not None
        kernel, network = self._kernel, self.probe.network(pl_module)
        outputs, targets = kernel.outputs(pl_module), kernel.targets
        targets = None if targets is None else targets.to(outputs.device)
        self._fixed = find_breaches(
            trainer, network, to_device(kernel.inputs, pl_module.device), loss_fn=self._loss(pl_module), outputs=outputs,
            targets=targets, input_fn=self.probe.input_fn,
        )  # fmt: skip
        facts = None if targets is None else loss_facts(self._loss(pl_module), outputs, targets)
        scale = sample_count(kernel.inputs) if getattr(self._loss(pl_module), "reduction", "mean") == "sum" else 1
        self._infimum = 0.0 if facts is None else facts.infimum * scale
        if "allen_zhu" in self._papers:
            self._separation = separation_criteria(kernel.inputs, kernel.targets)

    def _of_optimizer(self, trainer: pl.Trainer) -> list[Breach]:
        try:
            self._rate(trainer)
        except NotPlainError as error:
            return [Breach("descent", f"a step is no plain gradient descent: {error}")]
        if _clipping(trainer) is not None:
            return [Breach("unclipped", "RegularizedGradientClipping scales the gradients")]
        return []

    def _rate(self, trainer: pl.Trainer) -> float:
        assert self._kernel is not None
        if self._descent is None:
            self._descent = PlainDescent(self.probe.network(trainer.lightning_module), self._kernel.parameters)
        return self._descent.rate(trainer, clipped=True)

    @staticmethod
    def _clip_factor(trainer: pl.Trainer) -> float:
        """h / eta of the step just taken."""
        clipping = _clipping(trainer)
        return 1.0 if clipping is None else clipping.metrics.get("clipping/factor", math.nan)

    def _gradients(self, trainer: pl.Trainer, optimizer: Optimizer) -> list[Tensor]:
        """The gradients of the step, clipped: callbacks run in the trainer's order.

        Raises:
            NotPlainError: they will be clipped after this one.
        """
        clipping, order = _clipping(trainer), trainer.callbacks  # type: ignore[attr-defined]
        if clipping is not None and order.index(clipping) > order.index(self):
            raise NotPlainError(
                "RegularizedGradientClipping stands behind ConvergenceCriteria in Trainer(callbacks=[...])"
            )
        return gradients_of(optimizer)

    def _loss(self, pl_module: pl.LightningModule) -> LossFn | nn.Module | None:
        return self.loss_fn if self.loss_fn is not None else find_loss(pl_module)

    def _has_loss(self) -> bool:
        assert self._fixed is not None
        return not any(each.hypothesis == "known loss" for each in self._fixed)

    def _sample_loss(self, pl_module: pl.LightningModule) -> SampleLoss:
        assert self._kernel is not None
        loss_fn, targets = self._loss(pl_module), self._kernel.targets
        assert loss_fn is not None
        assert targets is not None
        inputs = to_device(self._kernel.inputs, pl_module.device)
        return SampleLoss(self.probe.network(pl_module), inputs, targets, loss_fn, batch_norm=self.probe.batch_norm)

    def _loss_and_gradient(self, pl_module: pl.LightningModule) -> tuple[float, dict[str, Tensor]] | None:
        """None where the loss is not known, or turns out at the first measurement not to be one of (outputs, targets)."""
        if not self._has_loss():
            return None
        try:
            return self._gradient(pl_module)
        except Exception as error:
            if self.history:
                raise
            assert self._fixed is not None
            why = f"the loss could not be evaluated on the probe ({error}); pass loss_fn= or Probe(target_fn=, forward_fn=)"
            self._fixed.append(Breach("known loss", why))
            return None

    def _gradient(self, pl_module: pl.LightningModule) -> tuple[float, dict[str, Tensor]]:
        assert self._kernel is not None
        loss, gradient = self._sample_loss(pl_module).gradient(self._kernel.parameters)
        return loss - self._infimum, gradient

    def _await_step(self, pl_module: pl.LightningModule, gradient: dict[str, Tensor]) -> None:
        weights = {name: value.detach().clone() for name, value in self._parameters(pl_module).items()}
        self._pending = Pending(weights, gradient)

    def _parameters(self, pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
        assert self._kernel is not None
        named = dict(self.probe.network(pl_module).named_parameters())
        return {name: named[name] for name in self._kernel.parameters}

    def _note_weights(self, pl_module: pl.LightningModule, gram: KernelGram) -> None:
        """The verdicts of these weights that take eigenvalues, once a measurement."""
        assert self._reference is not None
        assert self._kernel is not None
        if "du" in self._papers:
            self._of_kernel = kernel_criteria(gram, *self._reference)
        if "kawaguchi_sun" in self._papers:
            network, inputs = self.probe.network(pl_module), to_device(self._kernel.inputs, pl_module.device)
            self._expressivity = expressivity_criteria(network, inputs, self._kernel.targets)

    def _certify_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, gram: KernelGram) -> None:
        """What is proven before the first step, where the theorem covers the run."""
        assert self._kernel is not None
        scale = loss_scale(self._loss(pl_module), gram.n_samples, gram.n_outputs)
        broken = breached([*(self._fixed or []), *self._of_optimizer(trainer)], PAPERS["chatterjee"].asks)
        if "chatterjee" in self._papers and trainer.global_step == 0 and scale is not None and not broken:
            step, network = scale.step_on_mean(self._rate(trainer)), self.probe.network(pl_module)
            self._certified = descent_certificate(network, self._kernel.inputs, self._kernel.targets, step)

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if not self._start:
            return state
        path = float(self._path)
        reference = None if self._reference is None else gram_state(self._reference[0])
        return state | {
            "history": [seen.state() for seen in self.history],
            "start": {name: value.cpu() for name, value in self._start.items()},
            "path": path,
            "path_known": self._path_known,
            "least_lambda": self._least_lambda,
            "reference": reference,
            "certified": [asdict(each) for each in self._certified],
            "pending": self._pending is not None,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.history = [Observation.from_state(seen) for seen in state_dict.get("history", [])]
        self._start = dict(state_dict.get("start", {}))
        self._path, self._path_known = float(state_dict.get("path", 0.0)), bool(state_dict.get("path_known", True))
        self._least_lambda = float(state_dict.get("least_lambda", math.inf))
        self._certified = [Criterion(**each) for each in state_dict.get("certified", [])]
        self._resume_pending = bool(state_dict.get("pending", False))
        if state_dict.get("reference") is not None:
            gram = gram_from_state(state_dict["reference"])
            self._reference = gram, kernel_spectrum(gram)


def _clipping(trainer: pl.Trainer) -> RegularizedGradientClipping | None:
    found = [c for c in trainer.callbacks if isinstance(c, RegularizedGradientClipping)]  # type: ignore[attr-defined]
    return found[0] if found else None
