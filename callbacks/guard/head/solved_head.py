"""The head's convex problem solved at the switch: there is nothing left to train."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lightning_conv.callbacks.guard.head.head_steps import HeadWeights
from lightning_conv.callbacks.run.ranks import Ranks
from lightning_conv.last_layer import HeadProblem, HeadSolution, solve_head


class SolvedHead:
    """Holds the head where it was solved until the run ends.

    Args:
        problem: the head's.
        weights: of the head, solved.
        memory: of the rule, in the checkpoint; from ``memory_of``.
    """

    def __init__(self, problem: HeadProblem, weights: HeadWeights, memory: dict[str, Any]) -> None:
        self._problem, self._weights, self._memory = problem, weights, memory

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

    def give_up(self, why: str) -> None:
        """The bound is about the head as it is, not about steps."""


def solve_and_write(problem: HeadProblem, weights: HeadWeights, ranks: Ranks, tol: float) -> HeadSolution:
    """Solve, and write the solution into the head; one that misses ``tol`` only if its loss is lower than the head's.

    All ranks solve alike (what is not held in memory they compute together); rank 0's solution is taken.

    Args:
        problem: the head's.
        weights: of the head.
        ranks: of the run.
        tol: gap that is asked for.
    """
    solution = ranks.gather(lambda: solved(problem, weights, tol))[0]
    better = solution.rounded_loss.value < problem.value(weights.read(problem)).value
    if ranks.broadcast(better or is_solved(solution, tol)):
        weights.write(problem, problem.stack(*solution.layer()))
    return solution


def is_solved(solution: HeadSolution, tol: float) -> bool:
    """Whether a gap that is asked for is reached: proven, or by the infimum that the caller gave."""
    gaps = (solution.rounded_gap, solution.rounded_head_gap)
    return any(gap is not None and gap.upper <= tol for gap in gaps)


def memory_of(solution: HeadSolution) -> dict[str, Any]:
    """What the checkpoint keeps of a solved head."""
    gap = solution.rounded_gap
    return {
        "rule": "solve",
        "verdict": solution.verdict,
        "reason": f"the last layer is solved by {solution.method}: {solution.reason}; training stops, there is nothing left to train",
        "bound": None if gap is None or not gap.certified else gap.upper,
    }


def solved(problem: HeadProblem, weights: HeadWeights, tol: float) -> HeadSolution:
    """The head's problem, solved from where the head is, for its type.

    Args:
        problem: the head's.
        weights: of the head.
        tol: gap that is asked for.
    """
    start = problem.split(weights.read(problem))
    return solve_head(problem, tol=tol, start=start, dtype=weights.parameters[0].dtype)
