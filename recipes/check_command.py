"""The command `lightning-conv check`: what would be measured in a run, at which cost, and what voids which theorem; nothing is trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from lightning_conv.recipes.usage import UsageError, did_you_mean

HELP = """\
usage: lightning-conv check --config NAME_OR_FILE [--config ...] [options of fit]
       lightning-conv check --config NAME_OR_FILE --ranks N --device NAME
       lightning-conv check --module PKG.MODULE --data PKG.DATA [options of fit]

Begin a run, say what would be measured in it, and give it up before its first step: the network and the loss as the training step is
seen to use them, the samples, the last layer that the guard would take, seconds and bytes, and what voids which theorem. Nothing is
trained and no file is written. It takes as long as the first measurement of the run.

options:
  --module CLASS       the import path of a LightningModule, the same as --model; settings as --module.NAME VALUE
  --data CLASS         the import path of a data module; settings as --data.NAME VALUE
  --ckpt_path PATH     a checkpoint from which the run would go on
  --ranks N            predict what a measurement takes on each of N ranks (docs/scale.md), on the device that --device names
  --device NAME        a100, h100, h200, or cpu: a core of this processor for each rank (the default)
  --json               print all of it as JSON
  and those of `lightning-conv fit --help`

exit code: 0 if everything can be measured, 1 if something is refused, 2 after a usage error
"""


def check(words: Sequence[str]) -> int:
    """Run the command.

    Args:
        words: The words of the command line after `check`, with the paths of configurations in place of names.

    Returns:
        The exit code.

    Raises:
        UsageError: The command line contains a mistake that the user can correct.
    """
    rest, ranks = _taken(words, "--ranks")
    rest, device = _taken(rest, "--device")
    options = [_as_model(word) for word in rest if word != "--json"]
    named = ("-c", "--config", "--model", "--print_config")
    if not any(word.partition("=")[0] in named for word in options):
        raise UsageError(
            "check: name a run, as in lightning-conv check --config wide_fc, or --module PKG.MODULE --data PKG.DATA; check --help says more"
        )
    where = _where(ranks, device)
    from lightning_conv.callbacks import check_run
    from lightning_conv.recipes.check_cli import built
    from lightning_conv.recipes.check_page import show_check
    from lightning_conv.recipes.mistakes import usage_errors
    from lightning_conv.reporting.terminal import console

    try:
        with usage_errors("check: "):
            made = built(options)
            path: str | None = made.config["ckpt_path"]
            found = check_run(
                made.trainer, made.model, made.datamodule, ckpt_path=path, ranks=where[0], device=where[1]
            )
    except UsageError as error:
        if not any(word.startswith("--module") for word in words):
            raise
        raise UsageError(
            str(error).replace("--model", "--module"), error.more
        ) from error  # the name that the user has written
    if not any(word.startswith(("--data", "--config", "-c")) for word in options):
        data = type(made.datamodule).__name__
        note = f"no --data was given, so the samples are those of {data}, the data of the recipes; --data PKG.DATA names others"
        found = replace(found, notes=(note, *found.notes))
    if "--json" in words:
        print(json.dumps(found.to_dict(), indent=1, allow_nan=False))
    else:
        show_check(found, console(sys.stdout))
    return 0 if found.ok else 1


def _taken(words: Sequence[str], option: str) -> tuple[list[str], str | None]:
    """Return the words without an option that is this command's own, and its value; None: it is not there.

    Raises:
        UsageError: The option has no value.
    """
    rest: list[str] = []
    value: str | None = None
    following = iter(words)
    for word in following:
        name, separator, given = word.partition("=")
        if name != option:
            rest.append(word)
            continue
        value = given if separator else next(following, "")
        if not value or (not separator and value.startswith("--")):
            raise UsageError(f"check: {option} needs a value, as in check --ranks 8 --device h100")
    return rest, value


def _where(ranks: str | None, device: str | None) -> tuple[int | None, str | None]:
    """Return the number of ranks and the name of the device.

    Raises:
        UsageError: The number is no whole number of at least 1, or there is no such device.
    """
    if ranks is not None and not (ranks.isdecimal() and int(ranks) > 0):
        raise UsageError(f"check: --ranks: {ranks!r}; need a whole number of at least 1, such as 8")
    if device is not None:
        from lightning_conv.machine.devices import DEVICES

        if device.lower() not in DEVICES:
            hint = did_you_mean(device, DEVICES) or ";"
            raise UsageError(f"check: --device: {device!r} is not known{hint} known are {', '.join(DEVICES)}")
    return None if ranks is None else int(ranks), device


def _as_model(word: str) -> str:
    """Return the option with the name that Lightning has for a module."""
    name, separator, rest = word.partition("=")
    if name == "--module" or name.startswith("--module."):
        name = "--model" + name.removeprefix("--module")
    return f"{name}{separator}{rest}"
