"""The rank of [h, 1] where it decides nothing: at the start of a run, and at the switch before the noise."""

from __future__ import annotations

from typing import Literal, TypeAlias

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_conv.callbacks.guard.certify.certificate import certify_trunk
from lightning_conv.callbacks.run.training_set import TrainingSet
from lightning_conv.networks.head import Head

Moment: TypeAlias = Literal["at_start", "before_noise"]


def rank_at(moment: Moment, data: TrainingSet, network: nn.Module, head: Head) -> dict[str, float]:
    """Certified rank and sigma_min at the present weights, named after the moment; empty, with a warning, where none could be computed.

    Args:
        moment: of the run.
        data: the training set.
        network: that takes its inputs.
        head: of the network.

    Cost: a certificate by the present weights (``"singular"``), whatever the method of the switch.
    """
    try:
        found = certify_trunk(data, network, head, "singular")
    except Exception as error:  # figures for the log
        rank_zero_warn(f"ExpressivityGuard: no rank {moment.replace('_', ' ')}: {error}")
        return {}
    numbers = {f"rank_{moment}": float(found.rank_lower)}
    if found.sigma_min is not None:
        numbers |= {f"sigma_min_{moment}": found.sigma_min.value, f"sigma_min_{moment}_lower": found.sigma_min.lower}
    return numbers
