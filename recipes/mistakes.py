"""A user's mistake in one line: what jsonargparse, Lightning and the experiments raise, with a suggestion; a bug keeps its traceback."""

import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import TracebackType

from lightning_conv.recipes.usage import UsageError, did_you_mean, no_such_option

NOTHING = "there is no such option"


@contextmanager
def usage_errors(prefix: str = "") -> Iterator[None]:
    """Turn the errors of a user's mistake into ``UsageError``s.

    These are what Lightning and this package raise for impossible settings, and files and modules that are missing, unless the code of
    the user asked for them.

    Args:
        prefix: what the messages begin with.

    Raises:
        UsageError: the mistake; other errors are not touched.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if not is_mistake(error):
            raise
        raise UsageError(prefix + " ".join(str(error).split())) from error


def is_mistake(error: Exception) -> bool:
    """Return whether an error is about what the user asked for, and not a bug.

    Args:
        error: a caught error.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightning_conv.callbacks import ExpressivityError

    if isinstance(error, FileNotFoundError | ModuleNotFoundError):
        return not asked_by_user_code(error.__traceback__)
    weights = isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict for ")
    return weights or isinstance(error, MisconfigurationException | ExpressivityError)


def asked_by_user_code(traceback: TracebackType | None) -> bool:
    """Return whether a traceback passes through code that is neither installed nor of this package.

    Args:
        traceback: of a caught error.
    """
    installed = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    while traceback is not None:
        frame = traceback.tb_frame
        file, name = frame.f_code.co_filename, frame.f_globals.get("__name__", "")
        known = file.startswith("<") or name.partition(".")[0] == "lightning_conv"
        if not known and not any(Path(file).is_relative_to(folder) for folder in installed):
            return True
        traceback = traceback.tb_next
    return False


def in_one_line(message: str, options: Iterable[str], classes: Iterable[str] = (), *, inner: bool = False) -> str:
    """Say what a message of jsonargparse is about: it also lists every type that it tried.

    Args:
        message: the message.
        options: the options of the parser that refused, without hyphens.
        classes: names of classes that may be meant.
        inner: the parser is that of a class, whose message becomes part of another one.

    Returns:
        One line, which begins with the option, without hyphens if the parser is an inner one.
    """
    dashes = "" if inner else "--"
    if unknown := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
        return no_such_option(unknown[1], [f"--{each}" for each in options])
    if unknown := re.fullmatch(r"(?:Subcommand '\w+' does not accept o|O)ption '(\S+?)'(?: is not accepted)?", message):
        return f"{dashes}{unknown[1]}: {NOTHING}{did_you_mean(unknown[1], options).replace('mean ', f'mean {dashes}')}"
    key = re.match(r'Parser key "([^"]+)":', message)
    said = (
        _expected(message) or _misspelt_class(message, classes) or _condensed(message[key.end() :] if key else message)
    )
    if key is None:
        return said
    place = dashes + key[1]
    # What an inner parser has said, in another section or for another of the types that are possible: the first that knows the option.
    nested = re.search(
        rf"([\w.]+): (?:expected .*?, got '[^']*'(?:; did you mean \S+\?)?|{NOTHING}(?:; did you mean (\S+)\?)?)", said
    )
    if nested is None:
        return f"{place}: {said}"
    return f"{place}.{nested[0].replace('did you mean ', f'did you mean {place}.') if nested[2] else nested[0]}"


def _expected(message: str) -> str:
    """Return what was expected and what was given, if the message says no more than that."""
    names: list[str] = []
    choices: list[str] = []
    given = None
    for line in _lines(message):
        if match := _KIND.match(line):
            words = [word.strip(" '\"") for word in (match[2] or "").split(",") if word]
            choices += words
            names += words or [match[1]]
            given = match[3] or given
        elif line.startswith("Given value: "):
            given = line.removeprefix("Given value: ")
        elif not line.startswith((*_NOISE, "Parser key ")):
            return ""
    if not names or given is None:
        return ""
    names = list(dict.fromkeys("null" if name == "NoneType" else name for name in names))
    return f"expected {' or '.join(names)}, got {given!r}{did_you_mean(given, choices)}"


def _misspelt_class(message: str, classes: Iterable[str]) -> str:
    """Return that there is no class of a name, if that is what the message is about."""
    if missing := re.search(r"Expected a dot import path string: (\S+)", message):
        return f"there is no class {missing[1]!r}{did_you_mean(missing[1], classes)}"
    if missing := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        near = did_you_mean(missing[2], dir(import_module(missing[1]))).replace("mean ", f"mean {missing[1]}.")
        return f"there is no {missing[2]!r} in {missing[1]}{near}"
    if missing := re.search(r"class_path '([\w.]+)':\s+No module named '([\w.]+)'", message):
        return f"there is no module {missing[2]!r}{did_you_mean(missing[1].rpartition('.')[2], classes)}"
    return ""


def _condensed(message: str) -> str:
    kept = [line for line in _lines(message) if not line.startswith((*_NOISE, "Expected a <class 'NoneType'>"))]
    return " ".join(dict.fromkeys(kept)) or " ".join(message.split())


def _lines(message: str) -> list[str]:
    return [line for raw in message.splitlines() if (line := raw.strip().removeprefix("- "))]


_NOISE = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a path but")
"""Beginnings of the lines that tell how jsonargparse has searched."""
_KIND = re.compile(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.*?)\])(?:\. Got value: (.*))?$")
"""A line about a type that was tried: name of the class, or the words of a literal; what was given."""
