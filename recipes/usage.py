"""What all commands share without heavy imports: the error for a user's mistake, suggestions, and the name of the page of a run."""

import argparse
import difflib
from collections.abc import Iterable
from typing import NoReturn

PAGE = "convergence.html"
"""Name of the page of a run, in the folder of its logger (``ConvergenceReport``)."""


class UsageError(Exception):
    """A mistake in the command line.

    Args:
        message: the message to the user, one line.
        more: what is printed below it, such as the names to choose from; empty: nothing.
    """

    def __init__(self, message: str, more: str = "") -> None:
        super().__init__(message)
        self.more = more


class UsageParser(argparse.ArgumentParser):
    """Parser that reports a mistake as a ``UsageError``, with a suggestion for an option that does not exist; nothing is abbreviated."""

    def __init__(self, command: str, *, description: str, epilog: str = "", usage: str | None = None) -> None:
        super().__init__(
            prog=f"lightning-conv {command}",
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.command = command

    def options(self) -> list[str]:
        """Return the options in the order of the help."""
        return [flag for action in self._actions for flag in action.option_strings]

    def error(
        self, message: str
    ) -> NoReturn:  # without the decorator `override`, whose module would be half of the time of the help
        """Raise the message as an exception, which the command reports.

        Raises:
            UsageError: always.
        """
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message = no_such_option(unknown, self.options())
        joined = " " if message.endswith("?") else "; "
        raise UsageError(f"{self.command}: {message}{joined}`lightning-conv {self.command} --help` says more")


def did_you_mean(word: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> str:
    """Return a suggestion for a misspelt word, as the end of a sentence.

    Args:
        word: what the user wrote.
        known: what could have been meant.
        most: largest number of suggestions.
        cutoff: least similarity, from 0 to 1, as in ``difflib.get_close_matches``.

    Returns:
        Text such as ``"; did you mean wide_fc?"``; empty if nothing is similar.
    """
    originals = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), originals, n=most, cutoff=cutoff)
    return f"; did you mean {' or '.join(originals[name] for name in near)}?" if near else ""


def no_such_option(words: str, known: Iterable[str]) -> str:
    """Describe words of a command line that no option takes.

    Args:
        words: the words, separated by spaces; the first one is described.
        known: the options that exist, with their hyphens.

    Returns:
        The description, with a suggestion where an option is similar, or has the same name in another section (``--lr``,
        ``--model.lr``).
    """
    option = words.split()[0].partition("=")[0] if words.split() else words
    if not option.startswith("-"):
        return f"{option!r} is no option, and follows none that takes it"
    options = list(known)
    name = option.lstrip("-")
    elsewhere = [each for each in options if each.rpartition(".")[2] == name and "." in each]
    hint = f"; did you mean {elsewhere[0]}?" if elsewhere else did_you_mean(option, options, cutoff=0.75)
    return f"{option}: there is no such option{hint}"
