"""``TrainingLoss``: the mean loss on the whole training set, its infimum, and the Lipschitz constant of its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_conv.callbacks.guard.settings import RunFunctions
from lightning_conv.callbacks.run.data.batch import TARGET_KEYS, TargetFn, take_targets
from lightning_conv.callbacks.run.data.training_set import TrainingSet
from lightning_conv.callbacks.run.losses.run_loss import RunLoss
from lightning_conv.losses.facts import LossFacts
from lightning_conv.losses.kind import loss_kind
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.head import Head
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.undisturbed import undisturbed

# A step makes class numbers of them; torch's losses take no others as such.
WHOLE = (torch.int8, torch.int16, torch.int32, torch.uint8)


class TrainingLoss:
    r"""The loss :math:`L = \frac1n \sum_i \ell(u_i, y_i)` of a training set and its infimum :math:`\frac1n \sum_i \inf_q \ell(q, y_i)`.

    Args:
        found: Loss of the training step, as far as it is known.
        target_fn: Function that takes the targets out of a batch; None: they are where batches usually have them.
        data: The training set.
        head: Head of the network.
        functions: Functions of the user that read the run.

    Attributes:
        found: See above.
        loss_fn: ``loss_fn(outputs, targets)`` of the training step; None: not known.
        kind: Known properties of this function.
        given_infimum: Infimum that the user passed (a number, or a function of the targets); None: use that of ``kind``; NaN: it is not
            known.
        cached_outputs: Function that returns the outputs of the network on the training set without a pass over it; None: there is none.
    """

    def __init__(
        self, found: RunLoss, target_fn: TargetFn | None, data: TrainingSet, head: Head, functions: RunFunctions
    ) -> None:
        self._data, self._outputs, self._target_fn = data, head.module.out_features, target_fn
        self._target_given = functions.target_fn is not None
        self.found, self.loss_fn = found, found.fn
        self.kind = loss_kind(self.loss_fn)
        # The function that follows the head is not examined, so the infimum over its outputs is not known.
        known = head.last or functions.infimum is not None
        self.given_infimum = functions.infimum if known else math.nan
        self.cached_outputs: Callable[[], Tensor] | None = None
        self._targets: Tensor | None = None

    def announce(self) -> None:
        """Warn at the start of a run if the gap cannot be logged, judged by the targets of its first batch."""
        if self.loss_fn is None:
            rank_zero_warn(
                f"ExpressivityGuard: {self.found.words}, so the gap is not logged; pass ExpressivityGuard(loss_fn=nn.MSELoss()) or "
                "what the training step makes of outputs and targets"
            )
            return
        targets = take_targets(next(self._data.batches())[1], self._target_fn)
        if targets is not None and self.infimum(targets) is None:
            rank_zero_warn(
                f"ExpressivityGuard: the infimum of {self.kind.name} is not known, so the gap is not logged; pass infimum=..."
            )

    def measure(self, network: nn.Module, *, cached: bool = True) -> dict[str, float]:
        """Measure the mean loss on the training set.

        The network runs in eval mode and in its own precision; the loss of all its outputs is taken at once, in float64. Each rank
        computes the outputs of its share of the samples; the loss is the same number on all of them. Where ``cached_outputs`` gives
        the outputs, neither the network nor the data set is called (the targets are read once).

        Args:
            network: Module that is called on the inputs.
            cached: Whether ``cached_outputs`` may give the outputs.

        Returns:
            ``loss``, the mean loss, and where the infimum is known ``gap``, the loss minus its infimum; an empty dict if the loss is not
            known.
        """
        if self.loss_fn is None:
            return {}
        if cached and self.cached_outputs is not None:
            return self.of(self.cached_outputs(), self.targets())
        module = StatelessModule(network)

        def outputs_of(inputs: Inputs, batch: Any) -> tuple[Tensor, Tensor]:
            with undisturbed(network), torch.no_grad():
                outputs = module.call({}, module.convert(inputs))
            assert isinstance(outputs, Tensor)
            return outputs.double().cpu(), self.targets_of(batch).cpu()

        outputs, targets = (torch.cat(side) for side in zip(*self._data.collect(outputs_of), strict=True))
        return self.of(outputs, targets)

    def of(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Compute the mean loss of some samples from their outputs.

        Args:
            outputs: Outputs u in float64, one row per sample.
            targets: Targets y of the same samples.

        Returns:
            ``loss``, and ``gap`` where the infimum is known, as ``measure`` does.
        """
        targets = self.kind.aligned(outputs, targets)
        with torch.no_grad():
            mean = float(self.mean(outputs, targets))
        infimum = self.infimum(targets)
        return {"loss": mean} if infimum is None else {"loss": mean, "gap": mean - infimum}

    def mean(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of some samples, in the type of the outputs; a sum over samples is divided by their number.

        Args:
            outputs: Outputs u, one row per sample.
            targets: Targets y of the same samples.
        """
        loss = self.kind.evaluate(outputs, targets)
        return loss / len(outputs) if self.kind.summed else loss.mean()

    def of_step(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch as a training step gives it: a sum stays a sum, and a loss without reduction is averaged.

        Args:
            outputs: Outputs u, one row per sample.
            targets: Targets y of the same samples.
        """
        return self.kind.evaluate(outputs, targets).mean()  # one number already, unless there is no reduction

    def infimum(self, targets: Tensor) -> float | None:
        """Return the infimum of the mean loss over all outputs: 0, or the entropy of soft or smoothed targets; None: not known.

        Args:
            targets: Targets y, one row per sample.

        Raises:
            MisconfigurationException: The function that the user passed returned something else than finite numbers.
        """
        given = self.given_infimum
        if callable(given):
            return _finite(given(targets))
        if given is not None:
            return None if math.isnan(given) else given
        facts = self._facts(targets)
        return None if facts is None else facts.infimum

    def smoothness(self) -> float | None:
        """Return L_ell, the Lipschitz constant of the gradient of a sample's loss with respect to its outputs; None: not known.

        All ranks must call it together, as it reads the targets.
        """
        facts = self._facts(self.targets())
        return None if facts is None else facts.smoothness

    def _facts(self, targets: Tensor) -> LossFacts | None:
        shape = torch.empty(1, 1, dtype=torch.float64).expand(len(targets), self._outputs)
        return self.kind.facts(shape, targets)

    def targets_of(self, batch: Any) -> Tensor:
        """Return the targets in a batch.

        Args:
            batch: A batch of the training loader.

        Raises:
            MisconfigurationException: The batch holds no tensor of targets.
        """
        found = take_targets(batch, self._target_fn)
        if found is not None:
            return found.long() if found.dtype in WHOLE else found
        raise MisconfigurationException(
            f"batch: found no tensor of targets (looked for batch[1] or one of the keys {', '.join(TARGET_KEYS)}), so the loss on the "
            "training set is unknown; pass target_fn=lambda batch: ..."
        )

    def with_targets(self, batch: Any) -> Any:
        """Return a batch with the targets that the user's function gives for it, which may come from elsewhere; else as it is.

        Args:
            batch: A batch of the training loader.
        """
        return (batch, self._target_fn(batch)) if self._target_given and self._target_fn is not None else batch

    def targets(self) -> Tensor:
        """Return the targets of all n samples, which all ranks read together at the first call."""
        if self._targets is None:
            self._targets = torch.cat(self._data.collect(lambda _, batch: self.targets_of(batch).cpu()))
        return self._targets


def _finite(given: Any) -> float:
    """Return the mean of what the function ``infimum`` returned.

    Raises:
        MisconfigurationException: It is not finite.
    """
    try:
        mean = float(torch.as_tensor(given).double().mean())
    except (TypeError, ValueError, RuntimeError):
        mean = math.nan
    if not math.isfinite(mean):
        raise MisconfigurationException(
            f"infimum: the function returned {given!r:.200} for the targets; it must return the infimum of each sample's loss, as finite "
            "numbers"
        )
    return mean
