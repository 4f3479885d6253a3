"""``LambdaMin``: the smallest eigenvalue of the neural tangent kernel over training, with bounds."""

from __future__ import annotations

import lightning.pytorch as pl
from typing_extensions import override

from lightning_conv.callbacks._logging import log_figure, log_histogram
from lightning_conv.callbacks.kernel_monitor import KernelMonitor
from lightning_conv.callbacks.probe import Probe
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.precision import PRECISIONS
from lightning_conv.plots import plot_spectra
from lightning_conv.spectrum import Spectrum


class LambdaMin(KernelMonitor):
    """Tracks lambda_min, lambda_max and the shape of the spectrum of the empirical NTK on a fixed probe.

    For one output, or ``outputs="full"``, and S = 1/2 sum |u - y|^2 over the probe, 2 lambda_min <= |grad S|^2 / S <= 2
    lambda_max: with lambda_min above zero the gradient vanishes only where the loss does. The trace kernel of C outputs (the
    default, C times cheaper) bounds that from above only: lambda_min(trace) >= C lambda_min(full). On m probe samples
    lambda_min is an UPPER bound of lambda_min on the whole training set (interlacing). The kernel is over the parameters
    that were trainable at the start. It is computed again in higher precision until it stands clear of its rounding error;
    the precision is logged.

    Logged, to every logger and to ``trainer.callback_metrics``:

    - ``kernel/lambda_min`` with ``_lower`` and ``_upper`` (also as the headline ``convergence/lambda_min``)
    - ``kernel/lambda_max``, ``kernel/condition_number``, ``kernel/trace``
    - ``kernel/effective_rank``: exp of the entropy of the spectrum
    - ``kernel/floor``: proven bound on the rounding error of the products; ``kernel/precision``: 0 fast, 1 exact, 2
      certified
    - histogram ``kernel/log10_eigenvalues`` of those above their error, and figure ``kernel/spectrum`` (TensorBoard)

    Args:
        probe: the samples, a ``Probe`` or their number (default: 128). Monitors with equal settings share one kernel a
            step.
        every_n_steps: measure at multiples of it; None: within ``max_overhead``.
        max_overhead: share of wall time that measuring may take. First and last step are always measured.

    Raises:
        MisconfigurationException: sharded strategies, data without random access, no recognisable input.

    Cost: one ``ntk_gram`` (again in higher precision where needed) and one eigenvalue problem of the probe's size.

    Example::

        trainer = Trainer(callbacks=[LambdaMin(probe=64), EarlyStopping("kernel/lambda_min", mode="max")])
    """

    def __init__(
        self, probe: Probe | int | None = None, every_n_steps: int | None = None, max_overhead: float = 0.03
    ) -> None:
        super().__init__(probe, every_n_steps, max_overhead)
        self.spectrum: Spectrum | None = None

    @override
    def forget(self) -> None:
        super().forget()
        self.spectrum = None

    @override
    def record(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> dict[str, float]:
        self.spectrum = spectrum
        metrics = {
            "convergence/lambda_min": spectrum.lambda_min.value,
            "kernel/lambda_min": spectrum.lambda_min.value,
            "kernel/lambda_min_lower": spectrum.lambda_min.lower,
            "kernel/lambda_min_upper": spectrum.lambda_min.upper,
            "kernel/lambda_max": spectrum.lambda_max.value,
            "kernel/condition_number": spectrum.condition_number,
            "kernel/trace": gram.trace,
            "kernel/effective_rank": spectrum.effective_rank,
            "kernel/floor": gram.floor,
            "kernel/precision": float(PRECISIONS.index(gram.precision)),
        }
        # Zeros and values below their own error would make a wall at the left of the histogram.
        values = spectrum.all_eigenvalues("kernel/log10_eigenvalues")
        clear = values[values > spectrum.lambda_min.upper - spectrum.lambda_min.value]
        if len(clear):
            log_histogram(trainer, "kernel/log10_eigenvalues", clear.log10(), step)
        return metrics

    @override
    def draw(self, trainer: pl.Trainer, spectrum: Spectrum, step: int) -> None:
        log_figure(trainer, "kernel/spectrum", lambda: plot_spectra({f"step {step}": spectrum}), step)
