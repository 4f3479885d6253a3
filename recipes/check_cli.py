"""``built``: module, data and trainer that the words of a command line name, for a check of their run."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_conv.callbacks.check.dry_fit import quiet
from lightning_conv.recipes.runs import RecipeCLI


class CheckCLI(RecipeCLI):
    """Builds module, data and trainer, and runs nothing."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="a checkpoint to go on from")


def built(options: list[str]) -> CheckCLI:
    """Return Lightning's command line with module, data and trainer made; nothing is said.

    Args:
        options: those of `fit`, without the command.

    Raises:
        MisconfigurationException: an option cannot be understood, or a constructor refuses its arguments.
    """
    with quiet():
        return CheckCLI(options, run=False)
