"""``guarded``: run a step that may fail without ending the training run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

READING = (
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    AssertionError,
    LookupError,
    OSError,
    MisconfigurationException,
)
"""Errors that a user's network or data may raise when they are read in another way than the training step does."""

_strict = False


@dataclass
class Attempt:
    """The outcome of a guarded step."""

    error: Exception | None = None  # what went wrong; None: nothing did

    @property
    def failed(self) -> bool:
        """Whether the step ended in an error."""
        return self.error is not None

    @property
    def reason(self) -> str:
        """The error as words, such as ``"ValueError: x"``, the first line of its message; empty if there was none."""
        if self.error is None:
            return ""
        first, *_ = [*str(self.error).strip().splitlines(), ""]
        return f"{type(self.error).__name__}: {first}"


@dataclass
class Failure:
    """What failed, for one reason.

    Attributes:
        what: What was left out.
        reason: Why, the first time.
        first: The step of the first time; None: no step was named.
        whose: Names of the callbacks that left it out, in order.
        steps: Number of steps at which it was.
    """

    what: str
    reason: str
    first: int | None
    whose: dict[str, None] = field(default_factory=dict)
    steps: int = 0
    last: int | None = None

    @property
    def words(self) -> str:
        """Such as ``"LambdaMin: no measurement at 17 steps, first at step 20: the inputs contain NaN"``."""
        of = f"{', '.join(self.whose)}: " if self.whose else ""
        when = "" if self.first is None else f" at step {self.first}"
        if self.steps > 1:
            when = f" {self.steps} times" if self.first is None else f" at {self.steps} steps, first{when}"
        return f"{of}{self.what}{when}: {self.reason}"


class Failures:
    """The failures of a run, each kind once with the number of steps: the same sentence is not said twice.

    Reasons that differ in numbers alone are the same.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Failure] = {}

    def note(self, what: str, step: int | None, reason: str) -> bool:
        """Note a failure and return whether it is the first one of its kind.

        Args:
            what: What is left out, after the name of the callback and a colon.
            step: Optimizer steps done; None: unknown.
            reason: Why.
        """
        whose, _, left_out = what.rpartition(": ")
        key = left_out, re.sub(r"\d[\d.]*(e[+-]?\d+)?", "#", reason)
        new = key not in self._found
        found = self._found.setdefault(key, Failure(left_out, reason, step))
        found.steps += new or step is None or step != found.last
        found.last = step
        if whose:
            found.whose[whose] = None
        return new

    @property
    def words(self) -> list[str]:
        """A sentence for each kind."""
        return [each.words for each in self._found.values()]


@contextmanager
def guarded(
    step: int | None,
    what: str,
    *,
    expects: tuple[type[Exception], ...] = (),
    say: Callable[[str], None] | None = rank_zero_warn,
    failures: Failures | None = None,
) -> Iterator[Attempt]:
    """Turn an error of the block into a warning, so that diagnostics never take a training run down.

    In strict mode (see ``set_strict``), which the project's tests switch on, an error that is not among ``expects`` is raised:
    an error that nobody expects is a bug, and a warning would hide it. ``KeyboardInterrupt`` and ``SystemExit`` always pass through.

    Args:
        step: optimizer steps done, for the message; None: the message names none.
        what: what is left out if the block fails, such as ``"LambdaMin: no measurement"``.
        expects: errors that a user's network or data are known to cause here; they are caught in strict mode too.
        say: receives the message; None: the caller says it.
        failures: notes the failure, which is said once then; None: it is said each time.

    Yields:
        The outcome, which is complete when the block is left.

    Example::

        with guarded(trainer.global_step, "LambdaMin: no measurement") as attempt:
            measure()
        if attempt.failed:
            ...
    """
    attempt = Attempt()
    try:
        yield attempt
    except Exception as error:
        if _strict and not isinstance(error, expects):
            raise
        attempt.error = error
        new = failures is None or failures.note(what, step, str(error))
        if say is not None and new:
            where = "" if step is None else f" at step {step}"
            say(f"{what}{where}: {error}")


def attempted(*expects: type[Exception]) -> AbstractContextManager[Attempt]:
    """Guard a block whose failure the caller reports, or takes for an answer.

    Args:
        expects: see ``guarded``.
    """
    return guarded(None, "", expects=expects, say=None)


def set_strict(on: bool) -> bool:
    """Switch strict mode on or off and return what it was.

    Args:
        on: whether ``guarded`` raises errors that are not expected.
    """
    global _strict
    before, _strict = _strict, on
    return before
