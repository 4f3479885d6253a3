"""The head's convex problem solved at the switch: there is nothing left to train."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lightning_conv.callbacks.guard.head_steps import HeadWeights
from lightning_conv.callbacks.guard.ranks import Ranks
from lightning_conv.last_layer import HeadProblem, HeadSolution, solve_head


class SolvedHead:
    """Writes the solution into the head, once, and holds the head there until the run ends.

    All ranks solve alike (what is not held in memory they compute together); rank 0's solution is taken.

    Args:
        problem: the head's.
        weights: of the head.
        ranks: of the run.
        memory: of the rule, in the checkpoint; empty: not solved yet.
        tol: gap that is asked for.
    """

    def __init__(
        self, problem: HeadProblem, weights: HeadWeights, ranks: Ranks, memory: dict[str, Any], tol: float
    ) -> None:
        self._problem, self._weights, self._memory = problem, weights, memory
        self.solution: HeadSolution | None = None  # of this process; a resumed run has its memory only
        if memory:
            return
        self.solution = solution = ranks.gather(lambda: solved(problem, weights, tol))[0]
        weights.write(problem, problem.stack(*solution.layer()))
        gap = solution.rounded_gap
        memory |= {
            "rule": "solve",
            "verdict": solution.verdict,
            "reason": f"the last layer is solved by {solution.method}: {solution.reason}; training stops, there is nothing left to train",
            "bound": None if gap is None or not gap.certified else gap.upper,
        }

    @property
    def reason(self) -> str:
        """Why training stops."""
        return str(self._memory["reason"])

    def before_step(self, optimizer: Optimizer) -> None:
        """The head stays where it is, should the run go on (``min_epochs``)."""
        for parameter in self._weights.parameters:
            parameter.grad = None

    def after_step(self) -> str | None:
        """Nothing to say."""
        return None

    def measure(self) -> dict[str, float]:
        """Loss, gap and the proven bound of it: one pass over the features."""
        value, infimum = self._problem.value(self._weights.read(self._problem)), self._problem.infimum
        found = {"loss": value.value}
        if infimum is not None:
            found["gap"] = value.value - infimum.value
        return found if self._memory["bound"] is None else found | {"bound": self._memory["bound"]}


def solved(problem: HeadProblem, weights: HeadWeights, tol: float) -> HeadSolution:
    """The head's problem, solved from where the head is, for its type.

    Args:
        problem: the head's.
        weights: of the head.
        tol: gap that is asked for.
    """
    start = problem.split(weights.read(problem))
    return solve_head(problem, tol=tol, start=start, dtype=weights.parameters[0].dtype)
