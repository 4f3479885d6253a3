"""``step_rule="solve"``: the convex problem of the head is solved at the switch, so there is nothing left to train."""

from __future__ import annotations

from typing import Any

from lightning_conv.callbacks.guard.head.problem import TrainedHead
from lightning_conv.callbacks.guard.head.steps import HeadSteps
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.ranks import Ranks
from lightning_conv.last_layer import HeadSolution, solve_head


class SolvedHead(HeadSteps):
    """Keeps the solved head constant until the run ends.

    Args:
        view: Run, with its network split into trunk and head.
        head: Head of the run, with the solution written into it.
        memory: State of the rule in the checkpoint, from ``memory_of``.
    """

    def __init__(self, view: GuardView, head: TrainedHead, memory: dict[str, Any]) -> None:
        super().__init__(view)
        self._head, self._memory = head, memory

    def move_head(self) -> None:
        """Remove the head's gradients, so that the optimizer leaves it alone if the run goes on (``min_epochs``).

        Hooks of the module before the step have seen them, as they log their norms.
        """
        for parameter in self._head.parameters:
            parameter.grad = None

    def measure(self) -> dict[str, float]:
        """Measure the solved head, with one pass over the features.

        Returns:
            ``loss``, ``gap`` where the infimum is known, and ``bound``, the proven bound of the gap of this head, where there is one.
        """
        found, bound = self._head.measure(), self._memory["bound"]
        return found if bound is None else found | {"bound": bound}

    def give_up(self, why: str) -> None:
        """Withdraw the bound of the gap.

        Args:
            why: The reason.
        """
        self._memory["bound"] = None


def solve_and_write(head: TrainedHead, ranks: Ranks, tol: float) -> HeadSolution:
    """Solve the head's problem and write the solution into the head.

    A solution that misses ``tol`` is written only if its loss is lower than the head's. All ranks solve the problem (features that are not
    held in memory are computed jointly); the solution of rank 0 is used.

    Args:
        head: Head of the run, which is overwritten.
        ranks: Processes of the run.
        tol: Requested gap, in units of the loss.
    """
    problem, solution = head.problem, solve_on(head, ranks, tol)
    better = solution.rounded_loss.value < problem.value(head.w).value
    if ranks.broadcast(better or is_solved(solution, tol)):
        head.write(problem.stack(*solution.layer()))
    return solution


def solve_on(head: TrainedHead, ranks: Ranks, tol: float) -> HeadSolution:
    """Solve the head's problem, starting at its present weights, and return the solution of rank 0 on all ranks.

    Args:
        head: Head of the run; the solution is also judged after rounding to its dtype.
        ranks: Processes of the run.
        tol: Requested gap, in units of the loss.
    """
    problem, dtype = head.problem, head.parameters[0].dtype
    return ranks.gather(lambda: solve_head(problem, tol=tol, start=problem.split(head.w), dtype=dtype))[0]


def is_solved(solution: HeadSolution, tol: float) -> bool:
    """Return whether the gap of the solution, rounded to the head's dtype, is at most ``tol``.

    Args:
        solution: Solution of the head's problem.
        tol: Requested gap to the infimum over all outputs or over all heads, in units of the loss.
    """
    gaps = (solution.rounded_gap, solution.rounded_head_gap)
    return any(gap is not None and gap.upper <= tol for gap in gaps)


def memory_of(solution: HeadSolution) -> dict[str, Any]:
    """Return the state of the rule for the checkpoint, as plain types: ``rule``, ``verdict``, ``reason`` and ``bound``.

    Args:
        solution: Solution of the head's problem. ``bound`` is None unless its gap is certified.
    """
    gap = solution.rounded_gap
    return {
        "rule": "solve",
        "verdict": solution.verdict,
        "reason": f"the last layer is solved by {solution.method}: {solution.reason}; training stops, there is nothing left to train",
        "bound": None if gap is None or not gap.certified else gap.upper,
    }
