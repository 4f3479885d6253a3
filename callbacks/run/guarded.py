"""``guarded``: run a step that may fail without ending the training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

READING = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, OSError, MisconfigurationException)
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


@contextmanager
def guarded(
    step: int | None,
    what: str,
    *,
    expects: tuple[type[Exception], ...] = (),
    say: Callable[[str], None] | None = rank_zero_warn,
) -> Iterator[Attempt]:
    """Turn an error of the block into a warning, so that diagnostics never take a training run down.

    In strict mode (see ``set_strict``), which the project's tests switch on, an error that is not among ``expects`` is raised:
    an error that nobody expects is a bug, and a warning would hide it. ``KeyboardInterrupt`` and ``SystemExit`` always pass through.

    Args:
        step: optimizer steps done, for the message; None: the message names none.
        what: what is left out if the block fails, such as ``"LambdaMin: no measurement"``.
        expects: errors that a user's network or data are known to cause here; they are caught in strict mode too.
        say: receives the message; None: the caller says it.

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
        if say is not None:
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
