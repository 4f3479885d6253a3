"""Which hypotheses of the theorems a run breaks, found on the run itself: ``find_breaches``."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_conv.callbacks.run.assumptions import Breach
from lightning_conv.callbacks.run.data import data_breaches
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.losses.facts import LossFacts, loss_facts
from lightning_conv.losses.kind import loss_kind
from lightning_conv.networks.analytic import find_kinks
from lightning_conv.networks.evaluation import Inputs


def find_breaches(
    trainer: pl.Trainer,
    network: nn.Module,
    inputs: Inputs,
    *,
    loss_fn: object | None,
    outputs: Tensor,
    targets: Tensor | None,
    probe: Probe,
) -> list[Breach]:
    """What does not change during a run; the optimizer, whose settings may, is asked at every step instead.

    Args:
        trainer: of the run.
        network: the module whose loss is meant.
        inputs: the probe's.
        loss_fn: of the training step, or None if it is not known.
        outputs: the network's on the probe.
        targets: of the probe, or None.
        probe: its settings.

    Cost: two readings of a few samples, one forward of one; with hand-given samples a reading of as many.
    """
    return [
        *_of_loss(loss_fn, outputs, targets),
        *_of_network(network, inputs),
        *data_breaches(trainer, inputs, targets, probe),
    ]


def facts_of(loss_fn: object, outputs: Tensor, targets: Tensor) -> LossFacts | None:
    """``loss_facts``; None too where the targets are not those of the loss, which is found out when it is evaluated."""
    try:
        return loss_facts(loss_fn, outputs, targets)
    except (ValueError, TypeError, RuntimeError, IndexError):
        return None


def _of_loss(loss_fn: object | None, outputs: Tensor, targets: Tensor | None) -> list[Breach]:
    if loss_fn is None:
        why = "no loss module was found on the LightningModule (pass loss_fn=nn.MSELoss() or what the step uses)"
        return [Breach("known loss", why), Breach("squared loss", why), Breach("attained infimum", why)]
    loss = loss_kind(loss_fn)
    if targets is None:
        why = "no targets were found in a batch (pass Probe(target_fn=lambda batch: ...))"
        return [Breach("known loss", why)]
    found = []
    if loss.kind != "squared":
        found.append(Breach("squared loss", f"the theorem is about the squared loss, and the run's is {loss.name}"))
    facts = facts_of(loss_fn, outputs, targets)
    if facts is None:
        found.append(Breach("attained infimum", f"the infimum of {loss.name} on these targets is not known"))
    elif not facts.attained:
        found.append(Breach("attained infimum", f"no weights attain the infimum of {loss.name} on these targets"))
    return found


def _of_network(network: nn.Module, inputs: Inputs) -> list[Breach]:
    found = []
    coarse = {p.dtype for p in network.parameters() if p.is_floating_point() and torch.finfo(p.dtype).bits < 32}
    if coarse:
        kinds = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in coarse))
        found.append(Breach("descent", f"the weights are {kinds}, whose rounding is a part of every step"))
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        found.append(Breach("no BatchNorm", "BatchNorm couples the samples of a batch in training"))
    dropping = [m for m in network.modules() if isinstance(m, _DropoutNd) and m.p > 0]
    if dropping:
        found.append(Breach("no dropout", f"dropout (p={dropping[0].p:g}) makes the loss random"))
    try:
        kinks = find_kinks(network, inputs)
    except Exception as error:
        return [*found, Breach("smooth", f"whether the network is smooth could not be found out ({error})")]
    if kinks:
        kinds = ", ".join(dict.fromkeys(str(kink) for kink in kinks[:3]))
        found.append(Breach("smooth", f"the network is not smooth in its weights ({kinds})"))
    return found
