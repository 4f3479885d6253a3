"""How numbers and lists are written in sentences: ``subject_of``, ``figure``, ``listed``, ``counted``, ``page_of``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

PAGE = "docs/health.md"
"""The page that explains every finding, one section for each."""


SUBJECTS: Mapping[str, str] = {
    "critical_sharpness": "how far the optimizer's step is from too large",
    "forecast": "where the loss will be",
    "frozen_trunk": "the least loss of the last layer alone",
    "gradient_noise": "the noise of the gradient",
    "inputs": "the scale of the inputs",
    "labels": "the labels of the probe",
    "layers": "whether every layer moves the outputs",
    "linearisation_error": "how far the network is from its linearisation",
    "loss": "the loss of the probe",
    "regime": "whether the network learns features",
    "stability": "the stability of the step",
    "training_floor": "the least loss on the training set",
    "units": "whether units are switched off",
    "width": "whether the last layer can fit the targets",
}
"""What a finding is about, by its name, for what could not be judged."""


def subject_of(name: str) -> str:
    """Write what a finding is about, also behind the name of an optimizer.

    Example:
        >>> subject_of("stability"), subject_of("critic: forecast"), subject_of("descent")
        ('the stability of the step', 'critic: where the loss will be', 'descent')
    """
    head, separator, last = name.rpartition(": ")
    return f"{head}{separator}{SUBJECTS.get(last, last.replace('_', ' '))}"


def figure(value: float) -> str:
    """Write a number with two or three digits.

    Example:
        >>> figure(5.0937), figure(0.04999), figure(1234.5), figure(2e-7)
        ('5.09', '0.05', '1,234', '2e-07')
    """
    if not math.isfinite(value):
        return {math.inf: "infinite", -math.inf: "minus infinite"}.get(value, "not a number")
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percent(share: float) -> str:
    """Write a share in per cent.

    Example:
        >>> percent(0.0312), percent(0.5), percent(0.004)
        ('3 %', '50 %', '0.4 %')
    """
    return f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else f"{100 * share:.1g} %"


def listed(names: Sequence[object], most: int = 3) -> str:
    """Join names with commas and "and"; of more than ``most`` only the first ones are named, and the rest is counted.

    Example:
        >>> listed([7, 39]), listed("abcdef")
        ('7 and 39', 'a, b, c and 3 more')
    """
    shown = [str(each) for each in names[:most]]
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else "".join(shown)


def counted(number: int, singular: str, plural: str = "") -> str:
    """Write a number with its noun.

    Example:
        >>> counted(1, "pair"), counted(32, "pair"), counted(2, "class", "classes")
        ('1 pair', '32 pairs', '2 classes')
    """
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def page_of(name: str) -> str:
    """Return the page and section that explain a finding.

    Example:
        >>> page_of("loss_floor")
        'docs/health.md#loss-floor'
    """
    return f"{PAGE}#{name.replace('_', '-')}"
