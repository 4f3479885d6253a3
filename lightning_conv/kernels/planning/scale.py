"""``Rates``: seconds of a rank's work from a few constants; ``fit_rates`` finds them from measured kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy.optimize import nnls

from lightning_conv.kernels.planning.division import GLOO_BYTE
from lightning_conv.kernels.planning.work import Work
from lightning_conv.kernels.products.precision import Precision
from lightning_conv.machine.devices import Device

GLOO_MESSAGE = 3.0e-4
"""Seconds per message by gloo: as docs/results/scale_model.md has it, on one machine."""

FIXED = 1.3e-2
"""Seconds of a measurement whatever its size, from the same page."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds per unit of a rank's work.

    Attributes:
        matrices: Per flop of products of large matrices.
        small: Per flop of many small products, as in convolutions.
        moved: Per byte that passes through memory.
        sent: Per byte that is sent.
        message: Per message.
        fixed: Per measurement, whatever its size.
    """

    matrices: float
    small: float
    moved: float
    sent: float
    message: float
    fixed: float

    def parts(self, work: Work) -> dict[str, float]:
        """Return the seconds of each part of a rank's work, by the names of these rates.

        Args:
            work: What it does; eigenvalues and gathered parameters are not counted.
        """
        return {name: amount * getattr(self, name) for name, amount in amounts(work).items()}

    def seconds(self, work: Work) -> float:
        """Return the seconds of a rank.

        Args:
            work: As for ``parts``.
        """
        return math.fsum(self.parts(work).values())


def amounts(work: Work) -> dict[str, float]:
    """Return how much of each kind of work a rank has, by the names of ``Rates``.

    Args:
        work: What it does.
    """
    return {
        "matrices": work.computed.matrices,
        "small": work.computed.small,
        "moved": work.computed.moved,
        "sent": work.sent,
        "message": work.messages,
        "fixed": 1.0,
    }


def fit_rates(works: Sequence[Work], seconds: Sequence[float]) -> Rates:
    """Return the rates with the least sum of squared relative errors, none of them negative.

    Args:
        works: What was done.
        seconds: What each of them took.

    Raises:
        ValueError: There are fewer measurements than rates, or not as many seconds as works.
    """
    names = [each.name for each in fields(Rates)]
    if len(works) != len(seconds) or len(works) < len(names):
        raise ValueError(
            f"seconds: {len(seconds)} for {len(works)} works; need one for each, and at least {len(names)} of them"
        )
    table = np.array([[amounts(work)[name] for name in names] for work in works]) / np.array(seconds)[:, None]
    scale = table.max(axis=0)
    scale[scale == 0] = 1.0  # nothing was sent, for instance
    found, _ = nnls(table / scale, np.ones(len(seconds)))
    return Rates(**{name: float(each) for name, each in zip(names, found / scale, strict=True)})


def device_rates(device: Device, precision: Precision = "fast") -> Rates:
    """Return the rates of a device, at its sustained share, with data sent by gloo.

    Args:
        device: The device.
        precision: Of the kernel: ``"exact"`` multiplies large matrices in float64, and ``"certified"`` does all in it.
    """
    single, double = 1 / device.flops, 1 / device.double_flops
    return Rates(
        matrices=(single if precision == "fast" else double) / device.sustained,
        small=(double if precision == "certified" else single) / device.sustained_small,
        moved=1 / (device.sustained_memory * device.bandwidth),
        sent=GLOO_BYTE,
        message=GLOO_MESSAGE,
        fixed=FIXED,
    )
