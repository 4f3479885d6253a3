"""The command `lightning-conv`: reads the first word, resolves configuration names, reports errors of the user.

Nothing heavy is imported here, so that help and version answer at once; `runs` does the work.
"""

import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version as installed_version
from importlib.resources import files
from pathlib import Path

from lightning_conv import __version__

HELP = """\
usage: lightning-conv COMMAND [options]

Train a network with convergence diagnostics and a two-phase rule guarded by an expressivity check.

commands:
  fit       train, then print a table of what was measured and where to look at it
  validate  evaluate on the validation split
  test      evaluate on the test split
  compare   run a recipe with the guard and again without it (same seed, settings and iterations), side by side
  tables    run the recipes over data sets and seeds, and write tables of ranks and test errors (tables --help)
  lab       run a theorem's own setting on real data and check its inequalities (`lightning-conv lab` lists them)
  version   print the versions in use

options of fit, validate, test and compare:
  --config NAME             a recipe ({recipes}) or the path of a YAML file
  --model.NAME VALUE        a setting of the model, such as --model.lr 0.05
  --data.NAME VALUE         a setting of the data, such as --data.batch_size 32
  --trainer.NAME VALUE      a setting of Lightning's Trainer, such as --trainer.max_epochs 20
  --model CLASS             another model: WideFC, BNResNet, or the import path of any LightningModule
  --data CLASS              other data: DigitsDataModule, TorchvisionDataModule, or the import path of any data module
  --ckpt_path PATH          resume from, or evaluate, a checkpoint
  --print_config            print the complete configuration and stop
  --help                    all options of a command

examples:
  lightning-conv fit --config wide_fc
  lightning-conv fit --config bn_resnet
  lightning-conv compare --config wide_fc --trainer.max_epochs 20
  lightning-conv fit --config wide_fc --data TorchvisionDataModule --data.dataset MNIST --data.n_train 1000
"""

RUN_COMMANDS = ("fit", "validate", "test", "compare", "tables")


class UsageError(Exception):
    """A mistake in the command line, told in one message."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        args: the words after `lightning-conv`; None: those of the running process.

    Returns:
        The exit code: 0 after a completed run, 2 after an error of the user, whose message went to stderr.
    """
    try:
        return _dispatch(*(sys.argv[1:] if args is None else args))
    except UsageError as error:
        print(f"lightning-conv: error: {error}", file=sys.stderr)
        return 2


def _dispatch(command: str = "--help", *rest: str) -> int:
    """Answer at once, or run a command that needs torch."""
    if command in ("-h", "--help", "help"):
        print(HELP.format(recipes=", ".join(recipe_names())), end="")
        return 0
    if command in ("version", "--version"):
        libraries = ", ".join(f"{name} {installed_version(name)}" for name in ("torch", "lightning"))
        print(f"lightning-conv {__version__} (Python {platform.python_version()}, {libraries})")
        return 0
    if command == "lab":
        return _lab(*rest)
    if command not in RUN_COMMANDS:
        raise UsageError(f"there is no command {command!r}; choose one of: {', '.join(RUN_COMMANDS)}, lab, version")
    if command == "tables" and {"-h", "--help"} & {*rest}:
        from lightning_conv.recipes.paper_tables.command import parser

        parser().print_help()
        return 0
    return _run(command, resolve_configs(rest))


def _run(command: str, args: list[str]) -> int:
    """Run a command that needs torch; turn what the user can cure into a `UsageError`."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightning_conv.callbacks import ExpressivityError
    from lightning_conv.recipes import runs
    from lightning_conv.recipes.paper_tables import command as tables

    try:
        if command == "compare":
            runs.compare(args)
        elif command == "tables":
            tables.run(args)
        else:
            runs.RecipeCLI([command, *args])
    except (MisconfigurationException, ExpressivityError, FileNotFoundError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from error
    except SystemExit as stop:  # help and --print_config leave this way
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _lab(name: str = "--help", *settings: str) -> int:
    """List the experiments, or run one; turn what the user can cure into a `UsageError`."""
    from lightning_conv.recipes.lab import EXPERIMENTS
    from lightning_conv.recipes.lab import command as lab

    if name in ("-h", "--help", "help", "list"):
        print(lab.overview(), end="")
        return 0
    if name not in EXPERIMENTS:
        raise UsageError(f"lab: there is no experiment {name!r}; choose one of: {', '.join(sorted(EXPERIMENTS))}")
    try:
        return lab.run_lab(name, settings)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        raise UsageError(f"lab {name}: {error}") from error
    except SystemExit as stop:  # help leaves this way, and so does an argument that cannot be read
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


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


if __name__ == "__main__":
    sys.exit(main())
