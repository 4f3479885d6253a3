"""Packaged configurations: recipes by name, and overlays, which add to what is there, as `+NAME`; nothing heavy is imported."""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from lightning_conv.recipes.usage import UsageError, did_you_mean

OPTIONS = ("-c", "--config")
"""How a configuration is named on the command line."""


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes."""
    return sorted(_named("lightning_conv.recipes.configs"))


def guarded_recipe_names() -> list[str]:
    """Return the names of those recipes whose model has a setting `guard`: `compare` and `tables` run them with and without it."""
    return [name for name in recipe_names() if "guard" in _read(name)["model"]["init_args"]]


def overlay_names() -> list[str]:
    """Return the names of the packaged overlays, with their plus signs."""
    return sorted(f"+{name}" for name in _named("lightning_conv.recipes.configs.overlays"))


def config_file(name: str) -> Traversable:
    """Return the file of a packaged configuration.

    Args:
        name: of a recipe, or of an overlay with its plus sign.
    """
    folder = "lightning_conv.recipes.configs"
    return _named(f"{folder}.overlays")[name[1:]] if name.startswith("+") else _named(folder)[name]


def subject(name: str) -> str:
    """Return the first line of a packaged configuration, which says what it is.

    Args:
        name: of a recipe, or of an overlay with its plus sign.
    """
    return config_file(name).read_text("utf-8").partition("\n")[0].removeprefix("# ").removesuffix(".")


def listing() -> str:
    """Return the table of the packaged configurations, and an example of their use."""
    names = [*recipe_names(), *overlay_names()]
    width = max(map(len, names))
    recipes, overlays = (
        "\n".join(f"  {name:<{width}}  {subject(name)}" for name in part) for part in (recipe_names(), overlay_names())
    )
    return (
        f"recipes:\n{recipes}\n\noverlays, which add to a recipe or to a file of your own:\n{overlays}\n\n"
        "example: lightning-conv fit --config wide_fc --config +diagnostics\n"
    )


def settings(section: str) -> list[str]:
    """Return the names of all settings of the recipes in a section.

    Args:
        section: ``"model"`` or ``"data"``.
    """
    return list(dict.fromkeys(name for recipe in recipe_names() for name in _read(recipe)[section]["init_args"]))


def resolve_configs(args: Sequence[str]) -> list[str]:
    """Replace the names of packaged configurations after `--config` by the paths of their files, overlays behind all others.

    An overlay adds to lists, such as ``trainer.callbacks``, so it has to be read after the file that defines them.

    Args:
        args: words of the command line.

    Returns:
        The words, with every `--config` naming an existing file.

    Raises:
        UsageError: if a value names neither a configuration nor a file.
    """
    resolved, places, values = list(args), [], []
    for place, word in enumerate(args):
        option, joined, value = word.partition("=")
        if option in OPTIONS and joined:
            places.append(place)
            values.append(value)
            resolved[place] = "--config="
        elif place and args[place - 1] in OPTIONS:
            places.append(place)
            values.append(word)
            resolved[place] = ""
    for place, value in zip(places, sorted(values, key=lambda value: value.startswith("+")), strict=True):
        resolved[place] += _path(value)
    return resolved


def _path(value: str) -> str:
    if value in (*recipe_names(), *overlay_names()):
        return str(config_file(value))
    own = value.removeprefix("+")
    if Path(own).is_file():
        return own
    known = [*recipe_names(), *overlay_names()]
    hint = did_you_mean(value, known)
    raise UsageError(
        f"--config: {value!r} is neither a packaged configuration nor a file{hint or ';'} packaged are {', '.join(known)}; "
        f"a file would be {Path(own).resolve()}"
    )


@cache
def _named(package: str) -> dict[str, Traversable]:
    return {
        entry.name.removesuffix(".yaml"): entry for entry in files(package).iterdir() if entry.name.endswith(".yaml")
    }


def _read(name: str) -> dict[str, Any]:
    import yaml

    config: dict[str, Any] = yaml.safe_load(config_file(name).read_text("utf-8"))
    return config
