"""Loss and gap on the whole training set: which loss it is, what its infimum is, and what it is now."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_conv.callbacks.run.batch import TARGET_KEYS, TargetFn, take_targets
from lightning_conv.callbacks.run.loss import LossFn, find_loss
from lightning_conv.callbacks.run.training_set import TrainingSet
from lightning_conv.losses.facts import loss_facts
from lightning_conv.networks.evaluation import Inputs, StatelessModule, undisturbed

ELEMENTWISE = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)


class TrainingLoss:
    """L(w) = (1/n) sum_i ell(u_i, y_i) over the training set, and its distance to inf L = (1/n) sum_i inf_q ell(q, y_i).

    Args:
        pl_module: of the run; searched for its loss module if ``loss_fn`` is None.
        loss_fn: ``loss_fn(outputs, targets)`` of the training step.
        infimum: of the mean loss, or a function of the targets that gives it for each sample (or their mean); None: looked up for
            torch's losses; NaN: not known.
        target_fn: takes the targets out of a batch; None: ``batch[1]`` or the keys y, target(s), label(s) of a dict.
    """

    def __init__(
        self,
        pl_module: pl.LightningModule,
        loss_fn: LossFn | None,
        infimum: float | Callable[[Tensor], Tensor] | None,
        target_fn: TargetFn | None,
    ) -> None:
        self._target_fn = target_fn
        self.loss_fn = loss_fn if loss_fn is not None else find_loss(pl_module)
        self.given_infimum = infimum
        self.known_outputs: Callable[[], Tensor] | None = (
            None  # of the network, where they need no pass over the training set
        )
        self._known_targets: Tensor | None = None

    @property
    def name(self) -> str:
        """Of the loss, for messages."""
        return getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__)

    def announce(self, data: TrainingSet, outputs: int) -> None:
        """Warn at the start of a run of what will be missing: by the targets of its first batch.

        Args:
            data: the training set.
            outputs: C.
        """
        if self.loss_fn is None:
            rank_zero_warn(
                "ExpressivityGuard: found no loss module on the LightningModule, so the gap is not logged; pass "
                "loss_fn=nn.MSELoss() or what the training step uses"
            )
            return
        targets = take_targets(next(data.batches())[1], self._target_fn)
        if targets is not None and self.infimum(targets, outputs) is None:
            rank_zero_warn(
                f"ExpressivityGuard: the infimum of {self.name} is not known, so the gap is not logged; pass infimum=..."
            )

    def measure(self, network: nn.Module, data: TrainingSet) -> dict[str, float]:
        """``loss``, and ``gap`` where the infimum is known; empty if the loss itself is not known.

        The network runs in eval mode and its own precision; the loss of all its outputs is taken at once, in float64. The ranks
        compute the outputs of their samples; the loss is the same number on all of them. Where ``known_outputs`` gives these outputs,
        neither the network nor the data set is asked (the targets are read once).
        """
        if self.loss_fn is None:
            return {}
        if self.known_outputs is not None:
            return self.of(self.known_outputs(), self.targets(data))
        module = StatelessModule(network)

        def outputs_of(inputs: Inputs, batch: Any) -> tuple[Tensor, Tensor]:
            with undisturbed(network), torch.no_grad():
                outputs = module.call({}, module.convert(inputs))
            assert isinstance(outputs, Tensor)
            return outputs.double().cpu(), self.targets_of(batch).cpu()

        outputs, targets = (torch.cat(side) for side in zip(*data.collect(outputs_of), strict=True))
        return self.of(outputs, targets)

    def of(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """``loss``, and ``gap`` where the infimum is known, of the float64 outputs of all samples."""
        assert self.loss_fn is not None
        if targets.is_floating_point():
            targets = targets.double()
        if isinstance(self.loss_fn, ELEMENTWISE):
            # (n, 1) against (n,) would broadcast to n x n.
            targets = targets.reshape(outputs.shape)
        exact = copy.deepcopy(self.loss_fn).to(outputs) if isinstance(self.loss_fn, nn.Module) else self.loss_fn
        with torch.no_grad():
            loss = exact(outputs, targets)
        mean = float(loss) / len(outputs) if getattr(exact, "reduction", "mean") == "sum" else float(loss.mean())
        infimum = self.infimum(targets, outputs[0].numel())
        return {"loss": mean} if infimum is None else {"loss": mean, "gap": mean - infimum}

    def infimum(self, targets: Tensor, outputs: int) -> float | None:
        """The infimum of the mean loss over all outputs: 0, or the entropy of soft or smoothed targets; None: not known.

        Args:
            targets: of some samples.
            outputs: C.
        """
        given = self.given_infimum
        if callable(given):
            return float(torch.as_tensor(given(targets)).double().mean())
        if given is not None:
            return None if math.isnan(given) else given
        facts = loss_facts(self.loss_fn, torch.empty(1, 1, dtype=torch.float64).expand(len(targets), outputs), targets)
        return None if facts is None else facts.infimum

    def smoothness(self, data: TrainingSet, outputs: int) -> float | None:
        """L_ell, the Lipschitz constant of the gradient of a sample's loss by its outputs; None: none, or not known."""
        facts = loss_facts(
            self.loss_fn, torch.empty(1, 1, dtype=torch.float64).expand(data.size, outputs), self.targets(data)
        )
        return None if facts is None else facts.smoothness

    def targets_of(self, batch: Any) -> Tensor:
        """The targets in a batch.

        Raises:
            MisconfigurationException: there are none.
        """
        found = take_targets(batch, self._target_fn)
        if found is not None:
            return found
        raise MisconfigurationException(
            f"batch: found no tensor of targets (looked for batch[1] or one of the keys {', '.join(TARGET_KEYS)}), so the loss on the "
            "training set is unknown; pass target_fn=lambda batch: ..."
        )

    def targets(self, data: TrainingSet) -> Tensor:
        """The targets of all samples, read once."""
        if self._known_targets is None:
            self._known_targets = torch.cat(data.collect(lambda _, batch: self.targets_of(batch).cpu()))
        return self._known_targets
