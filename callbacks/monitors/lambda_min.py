"""``LambdaMin``: the smallest eigenvalue of the neural tangent kernel over training, with bounds."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_conv.callbacks.monitors.base import KernelMonitor, OnError
from lightning_conv.callbacks.monitors.proven_bound import ProvenBound, asked_bound, whole_lambda_min
from lightning_conv.callbacks.monitors.spectrum_scalars import counted_eigenvalues, spectrum_scalars
from lightning_conv.callbacks.monitors.step_size import StepSize, report
from lightning_conv.callbacks.run.callbacks import callbacks_of
from lightning_conv.callbacks.run.loggers.sending import takes_texts
from lightning_conv.callbacks.run.logging import log_histogram, log_text
from lightning_conv.callbacks.run.losses.loss_modules import LossFn
from lightning_conv.callbacks.run.measured_kernel import kernel_name, tags_of
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.callbacks.run.series_keeper import SeriesKeeper
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.finding import Finding
from lightning_conv.health.kernel.subset_bound import SubsetBound
from lightning_conv.health.kernel.subset_parameters import Subset
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.layers import layer_spectra, layer_table, trace_shares
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.reporting.figures.spectrum import plot_spectra, plot_spectrum_over_training, spectrum_row
from lightning_conv.reporting.log_steps import LogSteps
from lightning_conv.reporting.plots import plot_layers

PerLayer: TypeAlias = Literal["traces", "spectra"]


class LambdaMin(KernelMonitor):
    """Tracks lambda_min, lambda_max and the shape of the spectrum of the empirical NTK on a fixed probe.

    For one output, or ``outputs="full"``, and S = 1/2 sum |u - y|^2 over the probe, 2 lambda_min <= |grad S|^2 / S <= 2
    lambda_max: with lambda_min above zero the gradient vanishes only where the loss does. The trace kernel of C outputs (the
    default, C times cheaper) bounds that from above only: lambda_min(trace) >= C lambda_min(full). On m probe samples
    lambda_min is an UPPER bound of lambda_min on the whole training set (interlacing). The kernel is over the parameters
    that were trainable at the start. It is computed again in higher precision until it stands clear of its rounding error;
    the precision is logged.

    The kernel is a sum over the layers, G = sum_l G_l, each positive semidefinite: lambda_min(G) is at least the sum of the
    layers' (Du et al. 2019, section 4, use the largest one). With ``per_layer="spectra"`` that sum of lower bounds is taken
    for ``_lower`` where it is the better one.

    For plain SGD (one rate, no momentum, weight decay, clipping or accumulation) on ``nn.MSELoss`` the learning rate eta
    is converted to S exactly, eta_S = 2 eta / N over the probe's N = m C numbers. In the linearised model one step of
    full-batch gradient descent changes r = u - y by r <- (I - eta_S G) r: it is stable if and only if eta_S < 2 /
    lambda_max(G), and k steps make of |r|^2 the predicted sum_i <v_i, r>^2 prod_j (1 - eta_j lambda_i)^2. That is exact for a
    linear model when the batch and the probe are the training set. Otherwise it is an estimate: a mini-batch's gradient is
    the mean one plus noise, the probe is a sample of the training set (G / m estimates the whole set's kernel over n;
    lambda_max / m is too large on average), the kernel moves, and dropout and BatchNorm train another function. With
    several outputs the contraction needs ``Probe(outputs="full")``; the trace kernel gives bounds of the ratio.

    Logged, to every logger and to ``trainer.callback_metrics``; in a run with several optimizers there is a network for each of them, and
    its name stands behind the group, as in ``kernel/generator/lambda_min``:

    - ``kernel/lambda_min`` with ``_lower`` and ``_upper``
    - ``kernel/lambda_max``, ``kernel/condition_number``, ``kernel/trace``
    - ``kernel/effective_rank``: exp of the entropy of the spectrum
    - ``kernel/decay_exponent``: beta of lambda_i ~ i^-beta, from rank max(2, N / 32) to N / 2; ``kernel/degrees_of_freedom``:
      Tr(K (K + n lambda)^-1) with n lambda = Tr(K) / n, what one sample weighs (Nitanda & Suzuki 2021). Both come with the spectrum
    - ``kernel/floor``: proven bound on the rounding error of the products; ``kernel/precision``: 0 fast, 1 exact, 2
      certified; with ``outputs="projected"`` also ``kernel/projection_error``, the standard error in the Frobenius norm
    - ``kernel/lambda_min_layers``, with ``per_layer="spectra"``: the largest lambda_min of a layer's own kernel
    - ``kernel/step_size_ratio``: eta_S lambda_max / 2 with the rate that is set when it is measured; below 1 is stable in the
      linearised model. ``_lower``, ``_upper``: its bounds, the only ones with the trace kernel of several outputs (the lower
      one only with ``"sum"``). Only for plain SGD on a squared loss
    - ``kernel/contraction_predicted``, ``kernel/contraction_measured``: |r|^2 on the probe over its value at the measurement
      before. Only where a ratio is known and the probe has targets
    - with ``Probe(outputs="loss")`` all of these begin with ``loss_kernel/`` and are those of the loss gradients, without headline, decay
      and step size; ``loss_kernel/gradient_norm`` is the norm of the gradient of the probe's loss
    - with ``bound=`` none of these, but ``kernel/lambda_min_bound`` (``loss_kernel/`` with ``Probe(outputs="loss")``): the proven lower
      bound, 0 where nothing is proven, and as a text with the same tag what it says, and the parameters that it rests on
    - histogram ``kernel/log10_eigenvalues`` of all eigenvalues, with those that are below their error counted at it; figures
      ``kernel/spectrum``, ``kernel/spectrum_over_training`` (from the second measurement on) and ``kernel/per_layer``; texts
      ``kernel/layers`` (which layer has how much) and ``kernel/step_size`` (what does not apply, and why; when that changes) (TensorBoard).
      A figure is drawn at the first measurement and whenever the step has doubled, as far as the run can afford it, and at the end

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
        per_layer: ``"traces"``: every layer's share of the trace, which comes with the kernel. ``"spectra"``: its lambda_min too, at
            the price of one more matrix and one more eigenvalue problem per layer. None: neither.
        loss_fn: ``loss_fn(outputs, targets)`` of the training step; None: the one that is observed. The step is run with other
            outputs, and its value and gradient are compared with those of the module's own losses and of torch's; any other loss
            is taken from the step's own graph. A loss that is given is taken as it is.
        bound: measure the kernel over a few of the trainable parameters in place of the whole one, which may be too expensive. It is
            exact, and certified in float64. The kernel over the others is positive semidefinite, so its lambda_min is a proven LOWER
            bound of that of the whole kernel on the probe; of that of the training set only where the probe holds all of it
            (``Probe(size=...)``, no augmentation). Names or patterns such as ``"*lora_*"``, whose parameters are taken together, or
            ``"last block"``: the layers that are called last, as many as have together twice as many numbers as the probe has outputs,
            or half of all numbers. Behind a ``LambdaMin()`` in the list, on the same samples, the two are compared. None: the whole
            kernel.
        on_error: what to do if the network cannot be measured before the first step. ``"raise"``: end the run. ``"warn"``: say it,
            and train. ``"disable"``: the same, and stop measuring after the first failure later on. After the first step no failure
            ends the run.

    Raises:
        MisconfigurationException: FSDP (1) and DeepSpeed, another value of ``on_error`` or ``per_layer``, parameters that the network
            does not have; a ``bound`` that names nothing, or stands beside an estimate, a lower precision or ``"spectra"``, or a second
            one in the list; with ``on_error="raise"`` a kernel for which there is no room, or a network that cannot be measured: the
            message names what was seen, and the line to write.

    Cost: one ``ntk_gram`` (again in higher precision where needed) and one eigenvalue problem of the probe's size; one more, and
    one forward pass, where the contraction is predicted. With ``bound=`` one ``ntk_gram`` in float64 whose backward passes end at these
    parameters.

    Example::

        trainer = Trainer(callbacks=[LambdaMin(probe=64), EarlyStopping("kernel/lambda_min", mode="max")])
    """

    measures_sharded = True

    def __init__(
        self,
        probe: Probe | int | None = None,
        every_n_steps: int | None = None,
        max_overhead: float = 0.03,
        per_layer: PerLayer | None = "traces",
        loss_fn: LossFn | None = None,
        on_error: OnError = "raise",
        bound: Subset | None = None,
    ) -> None:
        if per_layer is not None and per_layer not in get_args(PerLayer):
            raise MisconfigurationException(
                f"per_layer: {per_layer!r} is not one of {', '.join(get_args(PerLayer))}, or None"
            )
        super().__init__(probe, every_n_steps, max_overhead, on_error)
        self.per_layer = per_layer
        self.loss_fn = loss_fn
        self.bound = None if bound is None else asked_bound(bound, self.probe, per_layer)
        self.spectrum: Spectrum | None = None
        self._forget_own()

    def _forget_own(self) -> None:
        self._layers: tuple[int, dict[str, Spectrum]] | None = None  # step, and the layers' spectra
        self._step_size = StepSize()
        self._said: tuple[str, ...] | None = None
        self._table = ""  # of the layers, as it was logged last
        self._proven = ProvenBound()
        self._bound_text = ""  # what was said of it last
        self._over_training = LogSteps()  # of the spectrum

    @property
    @override
    def state_key(self) -> str:
        """A monitor of the whole kernel and one of a bound may stand in one list."""
        return super().state_key if self.bound is None else self._generate_state_key(bound=self.bound)

    @property
    def proven(self) -> SubsetBound | None:
        """With ``bound=``, what the last measurement has proven; None: there was none."""
        return self._proven.found

    @property
    def finding(self) -> Finding | None:
        """The same in a sentence; None: nothing is proven."""
        return self._proven.finding

    @property
    @override
    def wants_layers(self) -> bool:
        return self.per_layer == "spectra"

    @property
    def remarks(self) -> tuple[str, ...]:
        """Why step size or contraction are not logged; empty if they are."""
        return self._step_size.remarks

    @override
    def forget(self) -> None:
        super().forget()
        self.spectrum = None
        self._forget_own()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        bounds = [each for each in callbacks_of(trainer, LambdaMin) if each.bound is not None]
        if len(bounds) > 1:
            asked = list(dict.fromkeys(pattern for each in bounds for pattern in each.bound or ()))
            raise MisconfigurationException(
                f"LambdaMin: {len(bounds)} bounds would be logged under one tag; take their parameters together: bound={asked}"
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._proven.begin()
        super().on_train_start(trainer, pl_module)

    @property
    @override
    def notes_steps(self) -> bool:
        return self._step_size.follows or super().notes_steps

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._kernel is not None and self._step_size.follows:
            self._step_size.before_step(RunView(trainer, self._kernel, self.loss_fn))
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def record(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> dict[str, float]:
        assert self._kernel is not None
        if self.bound is not None:
            whole = whole_lambda_min(trainer, self._kernel, self.optimizer)
            return self._proven.measure(RunView(trainer, self._kernel), gram, spectrum.lambda_min, whole)
        self.spectrum = spectrum
        if self.per_layer is not None:
            for keeper in callbacks_of(trainer, SeriesKeeper):
                keeper.keep_shares(self.optimizer, trace_shares(gram))
        tags, metrics = tags_of(gram), spectrum_scalars(gram, spectrum, self._spectra(gram, step))
        metrics |= self._step_size.measure(RunView(trainer, self._kernel, self.loss_fn), gram, spectrum)
        if self._said != self.remarks:
            log_text(trainer, self.tag(f"{tags}/step_size"), report(self.remarks), step)
            self._said = self.remarks
        self._say_layers(trainer, gram, step)
        self._over_training.note(step, spectrum_row(spectrum))
        if len(counted := counted_eigenvalues(spectrum, f"{tags}/log10_eigenvalues")):
            log_histogram(trainer, self.tag(f"{tags}/log10_eigenvalues"), counted, step)
        return metrics

    @override
    def draw(self, trainer: pl.Trainer, gram: KernelGram, spectrum: Spectrum, step: int) -> None:
        tags = tags_of(gram)
        if self.bound is not None:
            if self._proven.text != self._bound_text:
                log_text(trainer, self.tag(f"{tags}/lambda_min_bound"), self._proven.text, step)
                self._bound_text = self._proven.text
            return
        name = kernel_name(gram)
        named = f"Spectrum of the {name}, step {step}"
        self.show(trainer, f"{tags}/spectrum", lambda: plot_spectra({"": spectrum}, named))
        if len(self._over_training) > 1:
            seen, titled = self._over_training, f"Spectrum of the {name} over training"
            self.show(trainer, f"{tags}/spectrum_over_training", lambda: plot_spectrum_over_training(seen, titled))
        if self.per_layer is None or not (shares := trace_shares(gram)):
            return
        smallest = {layer: each.lambda_min for layer, each in self._spectra(gram, step).items()}
        self.show(trainer, f"{tags}/per_layer", lambda: plot_layers(shares, smallest, spectrum.lambda_min))

    def _say_layers(self, trainer: pl.Trainer, gram: KernelGram, step: int) -> None:
        """Log the table of the layers if a number in it has changed."""
        if self.per_layer is None or not takes_texts(trainer) or not (shares := trace_shares(gram)):
            return
        table = layer_table(shares, {layer: each.lambda_min for layer, each in self._spectra(gram, step).items()})
        if table != self._table:
            log_text(trainer, self.tag(f"{tags_of(gram)}/layers"), table, step)
            self._table = table

    def _spectra(self, gram: KernelGram, step: int) -> dict[str, Spectrum]:
        """Return the layers' spectra at ``step``, computed once; empty if they are not wanted."""
        if not self.wants_layers:
            return {}
        if self._layers is None or self._layers[0] != step:
            self._layers = step, layer_spectra(gram)
        return self._layers[1]

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if not state:
            return state
        return state | {"step_size": self._step_size.state_dict(), "over_training": self._over_training.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._step_size.load_state_dict(state_dict.get("step_size", {}))
        self._over_training.load_state_dict(state_dict.get("over_training", {}))
