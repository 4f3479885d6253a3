"""``ConvergenceHealth``: what a run is doing, in sentences with their numbers, and what to do."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_conv.callbacks.health.announcements import Announcements, OnAlert, require_on_alert
from lightning_conv.callbacks.health.health_record import HealthRecord
from lightning_conv.callbacks.health.hooks import HealthHooks
from lightning_conv.callbacks.health.labels_of_run import LabelsOfRun
from lightning_conv.callbacks.monitors.base import OnError
from lightning_conv.callbacks.run.losses.loss_modules import LossFn
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.reporting.plain_words import tag_of
from lightning_conv.reporting.series import Series


class ConvergenceHealth(HealthHooks):
    """Says what a run is doing: whether its steps are too long, what its loss can reach, which units are off, and what is not finite.

    Judged are, each in one sentence with its number, its limit and what to do (``docs/health.md``):

    - ``stability``: the curvature of the run's loss on the probe over the limit of the optimizer's steps, for torch's SGD, Adam, AdamW,
      NAdam, RMSprop and Adagrad. A ratio above 1 is usual; it is named as the cause where the loss has risen. For any other optimizer
      it rests on the loss along the next update, or where the optimizer is not torch's along the run's own step after a measurement
    - ``progress``: the training loss has not fallen since the start by more than it scatters
    - ``loss_rise``: the loss has risen though the steps are not too long, or with Adam and its kin stays above its start
    - ``loss_floor``, ``training_floor``: the loss that equal inputs with unequal targets force on the probe, and on the training set
    - ``frozen_trunk``: the least loss that the last layer can reach, where it alone is trained
    - ``width``: what the number of features before the last layer forces
    - ``units``, ``layers``: units that are dead, saturated or constant on the probe, layers on which the outputs do not depend
    - ``inputs``, ``signal``: inputs that are equal or of a scale far from 1, and what tells the samples apart layer by layer
    - ``movement``: layers that require gradients and never move
    - ``descent``: a loss that curves downward and falls below zero, as one with the wrong sign does
    - ``gradient_noise``: the batch against the noise scale, samples that carry the gradient
    - ``forecast``: the loss of the probe at the next measurement, if earlier forecasts were right
    - ``regime``: lazy or feature learning, behind a ``KernelStability`` in the list
    - ``lambda_min_bound``: what a ``LambdaMin(bound=...)`` before it in the list has proven at the same step
    - ``labels``: labels of the probe that the other samples contradict, if ``audit_labels``
    - ``not_finite``: the first loss, input or weight that was not finite

    Levels are ``ok``, ``notice`` (usual in runs that end well), ``warning`` (the run is held back) and ``alert`` (it cannot go on well).

    Logged: scalars ``health/<name>`` (the value) and ``health/level`` (0 to 3), ``health/critical_ratio`` and ``health/critical_sharpness``
    (the length of the next update over the one from which on it raises the loss, and the curvature that this means),
    ``health/zero_gradients`` (share of zeros in the gradient of the probe), ``health/linearisation_error`` (of the network linearised at
    the start, as a share of what the outputs have moved; behind a ``KernelStability``), the figures ``health/layers_over_training`` (share
    of the trace, norm of the gradient and dead units of each layer by step) and ``health/layer_gradients`` (gradient and update of each
    layer), the text ``convergence/health`` when a sentence changes, a block in the terminal when the fit ends, and once a warning for each
    alert. ``ConvergenceReport`` has the sentences at the top of its page.

    Args:
        probe: as in ``LambdaMin``.
        every_n_steps: measure at multiples of it; None: within ``max_overhead``.
        max_overhead: as in ``LambdaMin``.
        loss_fn: of the training step; None: the one that is observed in it.
        on_alert: what to do at an alert: ``"warn"``, ``"stop"`` training after the batch, or a function of the ``Finding``.
        on_error: as in ``LambdaMin``.
        audit_labels: whether to look for labels that the other samples contradict. The table is then the text ``health/labels_table`` and a
            section of ``ConvergenceReport``; of images TensorBoard gets pictures, ``health/labels_top``.

    Attributes:
        findings: what is known of the run now, the most severe first.

    Raises:
        MisconfigurationException: ``on_alert`` is neither of these; otherwise as ``LambdaMin``.

    Cost: a measurement takes one ``ntk_gram`` (shared), a forward pass in float64 and four in the network's type. Stability takes twenty
    products with the Jacobian the first time and four later, the forecast twelve, the noise two backward passes, the critical sharpness six
    to sixteen forward passes and copies of the weights and of the optimizer's state, the linearised network ten forward passes and a copy
    of the weights of the start, the floor of a frozen trunk a convex solver of up to a thousand iterations, the floor of the training set
    0.1 s of reading until all is read; these are left out, and said to be, where they would take more than 0.1 s and a third of
    ``max_overhead``. The loss of every step is read, on an accelerator 32 at a time. The audit of labels takes at most four
    eigendecompositions of the size of the probe, until the network knows labels by heart.

    Example::

        trainer = Trainer(callbacks=[ConvergenceHealth(on_alert="stop")])
    """

    def __init__(
        self,
        probe: Probe | int | None = None,
        every_n_steps: int | None = None,
        max_overhead: float = 0.03,
        loss_fn: LossFn | None = None,
        on_alert: OnAlert = "warn",
        on_error: OnError = "raise",
        audit_labels: bool = False,
    ) -> None:
        require_on_alert(on_alert, type(self).__name__)
        if not isinstance(audit_labels, bool):
            raise MisconfigurationException(f"{type(self).__name__}: audit_labels={audit_labels!r}; need True or False")
        super().__init__(probe, every_n_steps, max_overhead, on_error)
        self.loss_fn = loss_fn
        self.on_alert: OnAlert = on_alert
        self.audit_labels = audit_labels
        self._clear()

    def _clear(self) -> None:
        self._record = HealthRecord(audit_labels=self.audit_labels)
        self._announcements = Announcements(self.on_alert)
        self._tags = set()

    @override
    def forget(self) -> None:
        super().forget()
        self._clear()

    @property
    @override
    def steps_of_values(self) -> dict[str, int]:
        of_findings = {self.tag(tag_of(each)): each.step for each in reversed(self.findings) if each.step is not None}
        return super().steps_of_values | of_findings

    @property
    def labels(self) -> LabelsOfRun | None:
        """Return the audit of the probe's labels, with the numbers of the samples; None: it was not asked for."""
        return self._record.labels

    def losses_so_far(self, trainer: pl.Trainer) -> Series:
        """Return the losses of all steps, thinned, those that wait included; look at them first.

        Args:
            trainer: Trainer of the run.
        """
        self._fetch(trainer)
        return self._record.losses.series

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return (
            state | {"health": self._record.state_dict(), "alerted": sorted(self._announcements.alerted)}
            if state
            else state
        )

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "health" in state_dict:
            self._record.load_state_dict(state_dict["health"])
        self._announcements.alerted = set(state_dict.get("alerted", ()))
