r"""``UpdateRule``: an optimizer with a fixed preconditioner as a linear recurrence, and the curvature up to which it is stable.

Source: Cohen et al. 2021 (2103.00065, Appendix B: gradient descent, heavy ball, Nesterov); Cohen et al. 2022 (2207.14484, section 2:
preconditioned steps). The rule that covers all of them, dampening, decay and NAdam included, is derived here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    r"""A step on a quadratic of curvature h along one direction, whose coordinate is x and whose gradient is h x.

    .. math:: m \leftarrow a m + b h x, \qquad x \leftarrow (1 - d) x - (c m + e h x)

    The learning rate, and the preconditioner of Adam and its kin, are inside h: it is an eigenvalue of
    :math:`D^{1/2} H D^{1/2}`, where the diagonal D holds the rate over the preconditioner of every coordinate.

    Attributes:
        a: What stays of the momentum m.
        b: What the gradient adds to it.
        c: Share of the new momentum in a step.
        e: Share of the gradient itself in a step, as Nesterov's momentum has it.
        d: Decoupled decay of a step, rate times ``weight_decay`` of AdamW.
    """

    a: float = 0.0
    b: float = 1.0
    c: float = 1.0
    e: float = 0.0
    d: float = 0.0

    @property
    def limit(self) -> float:
        r"""Return the largest h for which no solution of the recurrence grows; ``inf``: nothing moves, 0: they grow for every h > 0.

        The characteristic polynomial of the recurrence is :math:`z^2 - t z + q` with

        .. math:: t = 1 - d + a - h (c b + e), \qquad q = a (1 - d) - h a e

        Its roots lie within the unit circle if :math:`|q| \le 1` and :math:`|t| \le 1 + q` (Jury). For :math:`0 \le a, d < 1` the second
        condition ends at a root of -1, :math:`h = (1 + a) (2 - d) / (c b + e (1 + a))`, and the first one at
        :math:`h = (1 + a (1 - d)) / (a e)`.

        For plain descent it is 2, for heavy ball 2 + 2 beta, with Nesterov's step (2 + 2 beta) / (1 + 2 beta), for Adam
        (2 + 2 beta1) / (1 - beta1).
        """
        if not (0 <= self.a < 1 and 0 <= self.d < 2):
            return math.nan
        flips = self.c * self.b + self.e * (1 + self.a)
        turns = self.a * self.e
        if flips < 0 or self.c * self.b + self.e * (1 - self.a) < 0:
            return 0.0
        return min(
            (1 + self.a) * (2 - self.d) / flips if flips > 0 else math.inf,
            (1 + self.a * (1 - self.d)) / turns if turns > 0 else math.inf,
        )
