"""The head's convex problem solved at the switch: there is nothing left to train."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lightning_conv.callbacks.guard.head.problem import TrainedHead
from lightning_conv.callbacks.guard.head.steps import HeadSteps
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.ranks import Ranks
from lightning_conv.last_layer import HeadSolution, solve_head


class SolvedHead(HeadSteps):
    """The head stays where it was solved until the run ends.

    Args:
        view: The run.
        head: Head of the run, solved.
        memory: Memory of the rule in the checkpoint, from ``memory_of``.
    """

    def __init__(self, view: GuardView, head: TrainedHead, memory: dict[str, Any]) -> None:
        super().__init__(view)
        self._head, self._memory = head, memory

    def before_step(self, optimizer: Optimizer) -> None:
        """Keep the head where it is, should the run go on (``min_epochs``).

        Args:
            optimizer: Optimizer of the run.
        """
        for parameter in self._head.parameters:
            parameter.grad = None

    def measure(self) -> dict[str, float]:
        """Return loss, gap and the proven bound of the gap: one pass over the features. The bound is about the head, not about steps."""
        found, bound = self._head.measure(), self._memory["bound"]
        return found if bound is None else found | {"bound": bound}


def solve_and_write(head: TrainedHead, ranks: Ranks, tol: float) -> HeadSolution:
    """Solve, and write the solution into the head; one that misses ``tol`` only if its loss is lower than the head's.

    All ranks solve alike (what is not held in memory they compute together); the solution of rank 0 is taken.

    Args:
        head: Head of the run.
        ranks: Processes of the run.
        tol: Gap that is asked for.
    """
    problem, solution = head.problem, solve_on(head, ranks, tol)
    better = solution.rounded_loss.value < problem.value(head.w).value
    if ranks.broadcast(better or is_solved(solution, tol)):
        head.write(problem.stack(*solution.layer()))
    return solution


def solve_on(head: TrainedHead, ranks: Ranks, tol: float) -> HeadSolution:
    """Solve the head's problem from where the head is, for its type; the solution of rank 0, on all ranks.

    Args:
        head: Head of the run.
        ranks: Processes of the run.
        tol: Gap that is asked for.
    """
    problem, dtype = head.problem, head.parameters[0].dtype
    return ranks.gather(lambda: solve_head(problem, tol=tol, start=problem.split(head.w), dtype=dtype))[0]


def is_solved(solution: HeadSolution, tol: float) -> bool:
    """Return whether the gap that is asked for is reached: proven, or by the infimum that the user gave.

    Args:
        solution: Solution of the head's problem.
        tol: Gap that is asked for.
    """
    gaps = (solution.rounded_gap, solution.rounded_head_gap)
    return any(gap is not None and gap.upper <= tol for gap in gaps)


def memory_of(solution: HeadSolution) -> dict[str, Any]:
    """Return what the checkpoint keeps of a solved head.

    Args:
        solution: Solution of the head's problem.
    """
    gap = solution.rounded_gap
    return {
        "rule": "solve",
        "verdict": solution.verdict,
        "reason": f"the last layer is solved by {solution.method}: {solution.reason}; training stops, there is nothing left to train",
        "bound": None if gap is None or not gap.certified else gap.upper,
    }
