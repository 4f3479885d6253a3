"""``KernelStability``: does the neural tangent kernel stay what it was at the start?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_conv.callbacks.monitors.base import KernelMonitor, OnError
from lightning_conv.callbacks.monitors.error_of_run import ErrorOfRun
from lightning_conv.callbacks.monitors.labels_of import labels_of
from lightning_conv.callbacks.run.assumptions import without_verdict
from lightning_conv.callbacks.run.guarded import guarded
from lightning_conv.callbacks.run.logging import log_text
from lightning_conv.callbacks.run.measured_kernel import (
    gram_from_state,
    gram_state,
    is_of_loss,
    kernel_name,
    not_full,
    tags_of,
)
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.callbacks.run.worst_step import Worst
from lightning_conv.kernels.drift import Drift, kernel_drift
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.spectrum import kernel_spectrum
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.reporting.figures.kernel_by_class import kernel_of_samples, plot_kernel_by_class
from lightning_conv.reporting.figures.spectrum import plot_spectra
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.papers.du import lambda_min_share_criterion


class KernelStability(KernelMonitor):
    """Compares the empirical NTK on a fixed probe with the one at the first measured step.

    In the lazy regime the kernel barely moves; a network that learns features shows a growing change and a falling alignment. After
    Du et al. 2019, lambda_min(G) stays above 2/3 of lambda_min(G_0), and |G - G_0|_2 below 1/3 of it (``own_lambda_min_criterion`` in
    ``lightning_conv.theory.papers.du`` derives the two from the 1/2 and 1/4 of the paper's lambda_0). The kernel is over the parameters
    that were trainable at the start, also when some are frozen later. Their network has one output. For several outputs the argument
    is about the kernel of ``Probe(outputs="full")``, and the trace kernel (the default) is a summary of it.

    With ``Probe(outputs="loss")`` the kernel is M_ij = s_i^T K_ij s_j with the gradients s of the loss. They shrink as the loss does, and
    a comparison of M at two moments would mostly show that. So s is held at its first value s_0: compared are s_0i^T K_ij(t) s_0j and
    s_0i^T K_ij(0) s_0j, the kernels of the fixed combinations s_0i . u_i of the outputs. They differ only where the NTK does, though
    not each change of the NTK shows in them. That takes a second kernel per measurement, and s_0 (m C numbers) is in the checkpoint. The
    tags then begin with ``loss_kernel/``, there is no headline, and the criterion is not applicable.

    Logged, to every logger and to ``trainer.callback_metrics``; in a run with several optimizers there is a network for each of them, and
    its name stands behind the group, as in ``kernel/generator/alignment``:

    - ``kernel/relative_frobenius_change``: |G - G_0|_F / |G_0|_F
    - ``kernel/relative_spectral_change``: |G - G_0|_2 / |G_0|_2
    - ``kernel/spectral_change_over_lambda_min``: |G - G_0|_2 / lambda_min(G_0), in ``trainer.callback_metrics`` alone
    - ``kernel/alignment``: centred kernel alignment with G_0
    - ``kernel/lambda_min_ratio`` with ``_lower`` and ``_upper``: lambda_min(G) / lambda_min(G_0) on the probe
    - ``kernel/drift_floor``: relative changes below this are rounding
    - figures ``kernel/spectrum_against_start`` (both spectra); ``kernel/error_modes``, the components of the error in the eigenbasis of G_0
      from the second measurement on, where the loss is known (a text under this tag says why not); ``kernel/by_class``, the kernel with
      its samples sorted by class, where the targets are classes (TensorBoard). They are drawn at the first measurement and whenever
      the step has doubled, as far as the run can afford it, and at the end

    Args:
        probe: the samples, a ``Probe`` or their number; None: up to 128, as many as ``max_overhead`` allows. The network is the
            one that the training step calls, unless the ``Probe`` says how it is called. Monitors with equal settings share one
            kernel per step.
        every_n_steps: measure at multiples of it; None: within ``max_overhead``.
        max_overhead: share of wall time that measuring may take. First and last step are measured beside it. The first measurement is
            chosen so that it takes at most the larger of 1 s and this share of an epoch, finding the network included; what it
            takes beyond 1.2 s, later ones make up for. It waits where it would take 3 s or more, and the last step is left out
            where all measurements together would take more than 2 s and twice this share; one line says so. Not so with
            ``every_n_steps``, or where the ``Probe`` names both size and outputs.
        on_error: what to do if the network cannot be measured before the first step. ``"raise"``: end the run. ``"warn"``: say it,
            and train. ``"disable"``: the same, and stop measuring after the first failure later on. After the first step no failure
            ends the run.

    Raises:
        MisconfigurationException: FSDP (1) and DeepSpeed, another value of ``on_error``, parameters that the network does not have; with
            ``on_error="raise"`` a network that cannot be measured: the message names what was seen, and the line to write.

    Cost: one ``ntk_gram`` (again in higher precision where lambda_min asks for it) and two eigenvalue problems of the
    probe's size.

    Example::

        trainer = Trainer(callbacks=[KernelStability(every_n_steps=50)])
    """

    measures_sharded = True

    def __init__(
        self,
        probe: Probe | int | None = None,
        every_n_steps: int | None = None,
        max_overhead: float = 0.03,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(probe, every_n_steps, max_overhead, on_error)
        self.drift: Drift | None = None
        self._reference: tuple[KernelGram, Spectrum] | None = None
        self._reference_step = 0
        self._cotangents: Tensor | None = None  # s of the reference, where the kernel is that of the loss gradients
        self._compared: Spectrum | None = None  # of the last kernel
        self._worst = Worst({"own_lambda_min_share": "least"})
        self._error, self._said = ErrorOfRun(), ""

    @property
    def criteria(self) -> list[Criterion]:
        """The criterion of lambda_min after Du et al. at its worst step; which assumptions the run violates is not looked at."""
        why = "; which assumptions this run violates, ConvergenceCriteria would tell"
        return [replace(each, reason=each.reason + why) for each in self._worst.criteria()]

    @override
    def record(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> dict[str, float]:
        assert self._kernel is not None
        if self._reference is None:
            self._reference, self._reference_step = (gram, spectrum), step
            self._cotangents = self._kernel.cotangents
        elif self._cotangents is not None and step != self._reference_step:
            gram, spectrum = self._kernel.with_cotangents(self._cotangents)
        self._compared, tags = spectrum, tags_of(gram)
        reference, reference_spectrum = self._reference
        # Whatever a loss of the user's fails by: only this figure is without it.
        what = f"{self._name}: the error in the kernel's eigenbasis is left out"
        with guarded(step, what, failures=self.failures):
            self._error.measure(self._kernel, reference, reference_spectrum, step)
        if self._said != self._error.reason:
            self._said = self._error.reason
            if self._said:
                log_text(
                    trainer, self.tag(f"{tags}/error_modes"), f"Not drawn from step {step} on: {self._said}.", step
                )
        drift = kernel_drift(gram, reference, spectrum=spectrum, reference_spectrum=reference_spectrum)
        self.drift = drift
        judged = lambda_min_share_criterion(drift.lambda_min_ratio)
        self._worst.note([without_verdict(judged, why) if (why := not_full(gram)) else judged], step)
        headline = {} if is_of_loss(gram) else {"convergence/kernel_change": drift.relative_frobenius}
        return headline | {
            f"{tags}/relative_frobenius_change": drift.relative_frobenius,
            f"{tags}/relative_spectral_change": drift.relative_spectral,
            f"{tags}/spectral_change_over_lambda_min": drift.spectral_over_lambda_min,
            f"{tags}/alignment": drift.alignment,
            f"{tags}/lambda_min_ratio": drift.lambda_min_ratio.value,
            f"{tags}/lambda_min_ratio_lower": drift.lambda_min_ratio.lower,
            f"{tags}/lambda_min_ratio_upper": drift.lambda_min_ratio.upper,
            f"{tags}/drift_floor": drift.floor,
        }

    @override
    def draw(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> None:
        assert self._reference is not None
        assert self._kernel is not None
        tags, begun = tags_of(gram), self._reference_step
        spectra = {f"step {begun}": self._reference[1], f"step {step}": self._compared or spectrum}
        name = kernel_name(gram)
        when = f"step {step}" if step == begun else f"steps {begun} and {step}"
        named = f"Spectrum of the {name}, {when}"
        self.show(trainer, f"{tags}/spectrum_against_start", lambda: plot_spectra(spectra, named))
        if len(self._error) > 1 and not self._error.reason:
            self.show(trainer, f"{tags}/error_modes", self._error.figure)
        if self.may_show(f"{tags}/by_class") and (labels := labels_of(self._kernel)) is not None:
            matrix = kernel_of_samples(gram)
            named = f"{name.capitalize()} by class, step {step}"
            self.show(trainer, f"{tags}/by_class", lambda: plot_kernel_by_class(matrix, labels, named))

    @override
    def forget(self) -> None:
        super().forget()
        self.drift, self._reference, self._reference_step = None, None, 0
        self._cotangents = self._compared = None
        self._error, self._said = ErrorOfRun(), ""
        self._worst = Worst({"own_lambda_min_share": "least"})

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._reference is not None:
            state |= {"reference": gram_state(self._reference[0]), "reference_step": self._reference_step}
            state |= {"worst": self._worst.state_dict(), "error": self._error.state_dict()}
            state |= {"cotangents": None if self._cotangents is None else self._cotangents.cpu()}
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict.get("reference") is not None:
            gram = gram_from_state(state_dict["reference"])
            self._reference = gram, kernel_spectrum(gram)
            self._reference_step = int(state_dict.get("reference_step", 0))
            self._cotangents = state_dict.get("cotangents")
        self._worst.load_state_dict(state_dict.get("worst", {}))
        self._error.load_state_dict(state_dict.get("error", {}))
