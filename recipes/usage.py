"""Parts that all commands share without heavy imports: the error for a user's mistake, the page of a run, configurations by name."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

PAGE = "convergence.html"
"""Name of the page of a run, in the folder of its logger (``ConvergenceReport``)."""


class UsageError(Exception):
    """A mistake in the command line; its text is the whole message to the user."""


def recipe_names() -> list[str]:
    """Return the names of the packaged configurations."""
    folder = files("lightning_conv.recipes.configs")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def resolve_configs(args: Sequence[str]) -> list[str]:
    """Replace the name of a packaged recipe after `--config` by the path of its YAML file.

    Args:
        args: words of the command line.

    Returns:
        The words, with every `--config` naming an existing file.

    Raises:
        UsageError: if a value names neither a recipe nor a file.
    """
    resolved: list[str] = []
    for word in args:
        option, separator, value = word.partition("=")
        if option in ("-c", "--config") and separator:
            resolved.append(f"--config={_config_path(value)}")
        elif resolved and resolved[-1] in ("-c", "--config"):
            resolved.append(_config_path(word))
        else:
            resolved.append(word)
    return resolved


def _config_path(value: str) -> str:
    if value in recipe_names():
        return str(files("lightning_conv.recipes.configs") / f"{value}.yaml")
    if Path(value).is_file():
        return value
    raise UsageError(
        f"--config: {value!r} is neither a recipe nor a file; recipes: {', '.join(recipe_names())}; "
        f"a file would be {Path(value).resolve()}"
    )
