"""``find_violations``: the assumptions of the theorems that a run violates, found on the run itself."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_conv.callbacks.run.assumptions import Violation
from lightning_conv.callbacks.run.data.samples import data_violations
from lightning_conv.callbacks.run.guarded import READING, attempted
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.losses.facts import LossFacts
from lightning_conv.networks.analytic import Kink, find_kinks
from lightning_conv.networks.inputs import Inputs

NAMED_KINKS = 3
"""Number of functions with a kink that are named."""


def find_violations(run: RunView) -> list[Violation]:
    """Return the violated assumptions that do not change during a run.

    The optimizer's settings may change; they are looked at before every step.

    Cost: two readings of a few samples, two forward passes of four; where the probe's samples were given by hand, a reading of as many.
    """
    return [*violations_of_loss(run), *_of_network(run.network, run.inputs), *data_violations(run)]


def loss_infimum(run: RunView) -> float:
    """Return the infimum of the loss on the probe; 0 where it is not known."""
    facts = _facts(run)
    return 0.0 if facts is None else facts.infimum * (run.samples if run.loss.summed else 1)


def _facts(run: RunView) -> LossFacts | None:
    """Return the facts of the loss; None where they are not known, or the targets are not those of the loss."""
    if run.targets is None:
        return None
    try:
        return run.loss.facts(run.outputs, run.targets.to(run.outputs.device))
    except (ValueError, TypeError, RuntimeError, IndexError):
        return None


def violations_of_loss(run: RunView) -> list[Violation]:
    """Return the violated assumptions about the loss.

    Args:
        run: The run at this moment.
    """
    loss = run.loss
    if loss.kind == "unknown":
        why = f"the loss of the training step is not known: {run.loss_unknown} (pass loss_fn=nn.MSELoss() or what the step uses)"
        return [Violation("known loss", why), Violation("squared loss", why), Violation("attained infimum", why)]
    if run.loss_targets is None:
        why = "no targets were found in a batch (pass Probe(target_fn=lambda batch: ...))"
        return [Violation("known loss", why)]
    found = []
    if loss.kind != "squared":
        found.append(Violation("squared loss", f"the theorem is about the squared loss, and the run's is {loss.name}"))
    facts = _facts(run)
    if facts is None:
        found.append(Violation("attained infimum", f"the infimum of {loss.name} on these targets is not known"))
    elif not facts.attained:
        found.append(Violation("attained infimum", f"no weights attain the infimum of {loss.name} on these targets"))
    return found


def _of_network(network: nn.Module, inputs: Inputs) -> list[Violation]:
    found = []
    coarse = {p.dtype for p in network.parameters() if p.is_floating_point() and torch.finfo(p.dtype).bits < 32}
    if coarse:
        kinds = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in coarse))
        found.append(Violation("descent", f"the weights are {kinds}, whose rounding is a part of every step"))
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        found.append(Violation("no BatchNorm", "BatchNorm couples the samples of a batch in training"))
    dropping = [m for m in network.modules() if isinstance(m, _DropoutNd) and m.p > 0]
    if dropping:
        found.append(Violation("no dropout", f"dropout (p={dropping[0].p:g}) makes the loss random"))
    kinks: list[Kink] = []
    with attempted(*READING) as attempt:
        kinks = find_kinks(network, inputs, enough=NAMED_KINKS)
    if attempt.failed:
        return [*found, Violation("smooth", f"whether the network is smooth could not be found out ({attempt.error})")]
    if kinks:
        kinds = ", ".join(dict.fromkeys(str(kink) for kink in kinks[:NAMED_KINKS]))
        smooth = "smooth" if any(kink.known for kink in kinks) else "known to be smooth"
        found.append(Violation("smooth", f"the network is not {smooth} in its weights ({kinds})"))
    return found
