"""Frei et al. 2023 in a run: near orthogonality of the data, the rank of their network, the margins of a classifier with one output."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lightning_conv.callbacks.criteria.networks import Found, find_network
from lightning_conv.callbacks.criteria.tracker import CriteriaTracker, register_criteria
from lightning_conv.callbacks.run.assumptions import EVERYWHERE, on_the_probe
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.losses.kind import LossKind
from lightning_conv.networks.inputs import Inputs
from lightning_conv.theory.criterion import Criterion, not_applicable
from lightning_conv.theory.networks import LeakyTwoLayer
from lightning_conv.theory.papers.frei import FREI, NearOrthogonality, margins, near_orthogonality
from lightning_conv.theory.tools.matrix_norms import numerical_rank

SETTING = "two layers with a leaky ReLU between them and fixed output weights (LeakyTwoLayer)"


ASKS = "|x_i|^2 >= C n max |x_i . x_k|, C = 3 gamma^-3 (R_max/R_min)^2"


@register_criteria
class FreiTracker(CriteriaTracker):
    """Judges whether the data are nearly orthogonal; reports margins and, of ``LeakyTwoLayer``, the rank of the weights."""

    name, aliases, position = "frei", ("implicit_bias",), 60
    source = FREI
    assumes = EVERYWHERE | {"full batch"}
    needs = frozenset({"layers"})
    once = hypotheses = frozenset({"near_orthogonality"})

    def __init__(self) -> None:
        # gamma of a ``LeakyTwoLayer`` that the run trains as Frei et al. do; a string: why the paper is not about the run.
        self.slope: float | str = "not looked at"
        # Of the probe's inputs; a string says why it is not known.
        self.orthogonality: NearOrthogonality | str = "not looked at"
        self._place: str | None = None  # of a LeakyTwoLayer in the module

    def begin(self, run: RunView) -> None:
        """Look at the data, and whether the run trains the paper's network."""
        found = find_network(run.network, run.inputs, LeakyTwoLayer, run.measurement.parameters, asks=SETTING)
        self._place = None if isinstance(found, str) else found.place
        self.slope = found if isinstance(found, str) else _slope_of(found, run.targets, run.loss)
        self.orthogonality = find_orthogonality(run.inputs)

    def measure(self, run: RunView, gram: KernelGram, spectrum: Spectrum) -> dict[str, float]:
        """Return kappa, the margins, and the rank of the hidden weights, as far as they are defined.

        ``numerical_rank``: how many singular values of the hidden weights exceed 1e-3 of the largest; of ``LeakyTwoLayer``, where two
        are left in the limit. Cost: all singular values of one matrix.
        """
        found: dict[str, float] = {}
        if isinstance(self.orthogonality, NearOrthogonality):
            found["near_orthogonality"] = self.orthogonality.kappa.value
        if self._place is not None:
            own = run.network.get_submodule(self._place)
            assert isinstance(own, LeakyTwoLayer)
            found["numerical_rank"] = float(numerical_rank(own.weight.cpu()))
        if run.targets is not None and signs(run.targets, run.loss) is not None:
            found |= margin_quantities(run.outputs, run.targets, run.loss)
        return found

    def criteria(self, run: RunView) -> list[Criterion]:
        """Return ``near_orthogonality``: kappa against what Frei et al. ask."""
        if isinstance(self.orthogonality, str):
            return [not_applicable("near_orthogonality", FREI, ASKS, self.orthogonality)]
        if isinstance(self.slope, str):
            kappa = self.orthogonality.kappa.value
            return [not_applicable("near_orthogonality", FREI, ASKS, self.slope, kappa)]
        return [judge_orthogonality(self.orthogonality, self.slope, whole_set=run.whole_set)]


def find_orthogonality(inputs: Inputs) -> NearOrthogonality | str:
    """Measure how close the inputs are to being orthogonal, or say why that is not known.

    Args:
        inputs: of the probe.

    Cost: up to 2 n^2 d flops in float64, and a copy of the inputs.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return "the input is not one tensor of numbers"
    with attempted(ValueError, RuntimeError, MemoryError) as attempt:
        return near_orthogonality(inputs.detach().cpu())
    return str(attempt.error)


def judge_orthogonality(measured: NearOrthogonality, slope: float, *, whole_set: bool) -> Criterion:
    """Judge kappa against what Frei et al. ask, with the least orthogonal pair in the reason.

    Args:
        measured: of the probe's inputs.
        slope: gamma of the leaky ReLU, above 0.
        whole_set: whether the probe is the training set, whose kappa may otherwise be smaller.
    """
    (found,) = (each for each in measured.criteria(slope) if each.name == "near_orthogonality")
    first, second = measured.pair
    reason = f"{found.reason}; samples {first} and {second} are the least orthogonal"
    return on_the_probe(replace(found, reason=reason), "kappa", whole_set=whole_set)


def _slope_of(found: Found[LeakyTwoLayer], targets: Tensor | None, loss: LossKind) -> float | str:
    if found.trained != {"hidden.weight"}:
        return f"the theorem trains hidden.weight alone, and here it is {', '.join(sorted(found.trained)) or 'nothing'}"
    if not found.network.slope > 0:
        return "gamma = 0: Frei et al. say nothing about the ReLU"
    if not loss.logistic:
        asks = "the logistic loss (nn.SoftMarginLoss, nn.BCEWithLogitsLoss)"
        return f"the theorem is about {asks}, and the run's is {loss.name}"
    if targets is None or signs(targets, loss) is None:
        return "the theorem is about two classes, and the targets are not those of two"
    return found.network.slope


def signs(targets: Tensor, loss: LossKind) -> Tensor | None:
    """Return the targets as y_i = -1 and 1; None unless they are two classes, both present, that the sign of one output tells apart.

    There is one number per sample; dense targets are not read at all.

    ``nn.BCEWithLogitsLoss`` numbers the classes 0 and 1 and compares its outputs with 0. For every other loss the classes are -1 and
    1: for a squared loss 0 and 1 are values, and its outputs would have to be compared with 1/2.

    Args:
        targets: of the probe.
        loss: of the training step.
    """
    if targets.ndim == 0 or targets.numel() != len(targets):
        return None
    y = targets.detach().cpu().double().flatten()
    if loss.classes_0_and_1:
        y = 2 * y - 1
    positive, negative = y == 1, y == -1
    two_classes = (positive | negative).all() and positive.any() and negative.any()
    return y if bool(two_classes) else None


def margin_quantities(outputs: Tensor, targets: Tensor, loss: LossKind) -> dict[str, float]:
    """Return ``margin_min``, min_i y_i f(x_i), and ``margin_spread``, the smallest margin over the largest.

    The spread is 1 where all margins are equal and negative where a sample is classified wrongly; where all are, it is left out. There
    are no margins for more than one output per sample, or targets that ``signs`` does not read.

    Args:
        outputs: f, one row per sample.
        targets: of the probe.
        loss: of the training step.
    """
    if outputs.numel() != len(outputs) or targets.numel() != len(outputs) or (y := signs(targets, loss)) is None:
        return {}
    found = margins(outputs.cpu(), y)
    return {"margin_min": found.smallest} | ({"margin_spread": found.spread} if found.largest > 0 else {})
