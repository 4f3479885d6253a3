"""The command `lightning-conv`: read the first word, run that command, report a usage error as one message.

Nothing heavy is imported before a command needs it, so that help and version answer at once.
"""

import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version as installed_version

from lightning_conv import __version__
from lightning_conv.recipes.usage import UsageError, recipe_names, resolve_configs

HELP = """\
usage: lightning-conv COMMAND [options]

Train a network with convergence diagnostics and a two-phase rule guarded by an expressivity check.

commands:
  fit       train, then print a table of what was measured and where to look at it
  validate  evaluate on the validation split
  test      evaluate on the test split
  compare   run a recipe with the guard and again without it (same seed, settings and iterations), side by side
  check     say what would be measured in a run, at which cost, and what voids which theorem; nothing is trained (check --help)
  audit     list the training labels that the other samples contradict, by the recipe's network as it is or from a checkpoint
  report    write one HTML file about a run from its folder, or about several side by side (report --help)
  tables    run the recipes over data sets and seeds, and write tables of ranks and test errors (tables --help)
  lab       run a theorem's own setting on real data and check its inequalities (`lightning-conv lab` lists them)
  version   print the versions in use

options of fit, validate, test, compare and audit:
  --config NAME             a recipe ({recipes}) or the path of a YAML file
  --model.NAME VALUE        a setting of the model, such as --model.lr 0.05
  --data.NAME VALUE         a setting of the data, such as --data.batch_size 32
  --trainer.NAME VALUE      a setting of Lightning's Trainer, such as --trainer.max_epochs 20
  --model CLASS             another model: WideFC, BNResNet, or the import path of any LightningModule
  --data CLASS              other data: DigitsDataModule, TextDataModule, TorchvisionDataModule, or the import path of any data module
  --ckpt_path PATH          resume from, or evaluate, a checkpoint
  --print_config            print the complete configuration and stop
  --help                    all options of a command

options of audit:
  --checkpoint PATH         take the weights of a checkpoint
  --samples N               training samples, 500 by default
  --out FOLDER              where labels.md, labels.csv and, of images, labels.png are written

examples:
  lightning-conv fit --config wide_fc
  lightning-conv fit --config bn_resnet
  lightning-conv compare --config wide_fc --trainer.max_epochs 5
  lightning-conv audit --config wide_fc --samples 200
  lightning-conv report runs/wide_fc/version_0
  lightning-conv fit --config wide_fc --data TorchvisionDataModule --data.dataset MNIST --data.n_train 1000
"""

RUN_COMMANDS = ("fit", "validate", "test", "compare", "audit", "tables")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        args: the words after `lightning-conv`; None: those of the running process.

    Returns:
        The exit code: 0 after a completed run, 1 if a required inequality of `lab` is violated, 2 after a usage error, whose
            message went to stderr.
    """
    try:
        return _dispatch(*(sys.argv[1:] if args is None else args))
    except UsageError as error:
        print(f"lightning-conv: error: {error}", file=sys.stderr)
        return 2


def _dispatch(command: str = "--help", *rest: str) -> int:
    """Print help or version, or run a command that needs torch."""
    if command in ("-h", "--help", "help"):
        print(HELP.format(recipes=", ".join(recipe_names())), end="")
        return 0
    if command in ("version", "--version"):
        libraries = ", ".join(f"{name} {installed_version(name)}" for name in ("torch", "lightning"))
        print(f"lightning-conv {__version__} (Python {platform.python_version()}, {libraries})")
        return 0
    if command == "lab":
        return _lab(*rest)
    if command == "report":
        return _report(*rest)
    if command == "check":
        from lightning_conv.recipes.check_command import check

        return check(resolve_configs(rest))
    if command not in RUN_COMMANDS:
        raise UsageError(
            f"there is no command {command!r}; choose one of: {', '.join(RUN_COMMANDS)}, check, report, lab, version"
        )
    if command == "tables" and {"-h", "--help"} & {*rest}:
        from lightning_conv.recipes.paper_tables.command import parser

        parser().print_help()
        return 0
    return _run(command, resolve_configs(rest))


def _run(command: str, args: list[str]) -> int:
    """Run a command that needs torch.

    Raises:
        UsageError: the command line contains a mistake that the user can correct.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightning_conv.callbacks import ExpressivityError
    from lightning_conv.recipes import runs
    from lightning_conv.recipes.paper_tables import command as tables

    try:
        if command == "compare":
            runs.compare(args)
        elif command == "audit":
            from lightning_conv.recipes.audit import audit

            audit(args)
        elif command == "tables":
            tables.run(args)
        else:
            runs.RecipeCLI([command, *args])
    except (MisconfigurationException, ExpressivityError, FileNotFoundError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from error
    except SystemExit as stop:  # help and --print_config leave this way
        return _exit_code(stop)
    return 0


def _lab(name: str = "--help", *settings: str) -> int:
    """List the experiments, or run one.

    Raises:
        UsageError: the command line contains a mistake that the user can correct.
    """
    from lightning_conv.recipes.lab import command as lab

    if name in ("-h", "--help", "help", "list"):
        print(lab.overview(), end="")
        return 0
    try:
        return lab.run_lab(name, settings)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        raise UsageError(f"lab {name}: {error}") from error
    except SystemExit as stop:  # help leaves this way, and so does an argument that cannot be read
        return _exit_code(stop)


def _report(*words: str) -> int:
    """Write the page of one run, or of several."""
    from lightning_conv.recipes.report_command import report

    try:
        report(words)
    except SystemExit as stop:  # help leaves this way
        return _exit_code(stop)
    return 0


def _exit_code(stop: SystemExit) -> int:
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


if __name__ == "__main__":
    sys.exit(main())
