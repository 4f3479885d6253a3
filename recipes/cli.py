"""The command `lightning-conv`: read the first word, run that command, report a usage error as one message.

Nothing heavy is imported before a command needs it, so that help, version and completion answer at once.
"""

import sys
from collections.abc import Sequence

from lightning_conv import __version__
from lightning_conv.recipes.commands import COMMANDS, RUNS, check_configured, overview, page
from lightning_conv.recipes.named_configs import listing, resolve_configs
from lightning_conv.recipes.usage import UsageError, did_you_mean

HELP_WORDS = ("-h", "--help", "help")


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
        print(error.more, end="", file=sys.stderr)
        return 2
    except SystemExit as stop:  # help and --print_config leave this way
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _dispatch(command: str = "--help", *rest: str) -> int:
    """Print help or version, or run a command.

    Raises:
        UsageError: the command line contains a mistake that the user can correct.
    """
    if command in HELP_WORDS:
        print(overview(), end="")
    elif command in ("version", "--version"):
        import platform
        from importlib.metadata import version as installed_version

        libraries = ", ".join(f"{name} {installed_version(name)}" for name in ("torch", "lightning"))
        print(f"lightning-conv {__version__} (Python {platform.python_version()}, {libraries})")
    elif command == "configs":
        print(listing(), end="")
    elif command == "completion":
        from lightning_conv.recipes.completion import completion

        completion(rest)
    elif command == "check":
        return _check(rest)
    elif command == "lab":
        return _lab(*rest)
    elif command == "report":
        from lightning_conv.recipes.report_command import report

        report(rest)
    elif command == "tables":
        from lightning_conv.recipes.mistakes import usage_errors
        from lightning_conv.recipes.paper_tables import command as tables

        with usage_errors("tables: "):
            tables.run(rest)
    elif command in RUNS:
        _run(command, rest)
    else:
        raise UsageError(
            f"there is no command {command!r}{did_you_mean(command, COMMANDS) or ';'} choose one of: {', '.join(COMMANDS)}"
        )
    return 0


def _run(command: str, words: Sequence[str]) -> None:
    """Print the help of a command that takes a configuration, or run it.

    Raises:
        UsageError: the command line contains a mistake that the user can correct.
    """
    if {"-h", "--help"} & {*words}:
        page(command).print_help()
        return
    if "--help-all" in words:
        words = ["--help"]
    else:
        check_configured(command, words)
        words = resolve_configs(words)
    from lightning_conv.recipes import runs
    from lightning_conv.recipes.mistakes import usage_errors

    with usage_errors():
        if command == "compare":
            runs.compare(words)
        elif command == "audit":
            from lightning_conv.recipes.audit import audit

            audit(words)
        else:
            runs.RecipeCLI([command, *words])


def _check(words: Sequence[str]) -> int:
    """Print the help of `check`, or run it.

    Raises:
        UsageError: the command line contains a mistake that the user can correct.
    """
    from lightning_conv.recipes.check_command import HELP, check

    if {"-h", "--help"} & {*words}:
        print(HELP, end="")
        return 0
    return check(resolve_configs(words))


def _lab(name: str = "--help", *settings: str) -> int:
    """List the experiments, or run one.

    Raises:
        UsageError: the command line contains a mistake that the user can correct.
    """
    if name in (*HELP_WORDS, "list"):
        from lightning_conv.recipes.lab import overview as experiments

        print(experiments(), end="")
        return 0
    from lightning_conv.recipes.lab import resolve
    from lightning_conv.recipes.mistakes import usage_errors

    try:
        resolve(name, settings)
    except ValueError as error:  # said before torch is loaded
        raise UsageError(f"lab: {error}") from error
    from lightning_conv.recipes.lab.command import run_lab

    with usage_errors(f"lab {name}: "):
        return run_lab(name, settings)


if __name__ == "__main__":
    sys.exit(main())
