"""The commands of `lightning-conv`: what each one is for, and its page of help, without heavy imports.

The pages of `fit`, `validate`, `test`, `compare` and `audit` name their own options and the sections of the rest. All options, Lightning's
too, are printed by `--help-all`, and those of a class by `--model.help CLASS`.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from lightning_conv.recipes.named_configs import OPTIONS, guarded_recipe_names, listing, overlay_names, recipe_names
from lightning_conv.recipes.small import SAMPLES, is_small
from lightning_conv.recipes.usage import UsageError, UsageParser

COMMANDS = {
    "fit": "train, then print a table of what was measured and where to look at it",
    "validate": "evaluate on the validation split",
    "test": "evaluate on the test split",
    "compare": "run a recipe with the guard and again without it (same seed, settings and iterations), side by side",
    "check": "say what would be measured in a run, at which cost, and what voids which theorem; nothing is trained",
    "audit": "list the training labels that the other samples contradict, by the recipe's network as it is or from a checkpoint",
    "report": "write one HTML file about a run from its folder, or about several side by side",
    "tables": "run the recipes over data sets and seeds, and write tables of ranks and test errors",
    "lab": "run a theorem's own setting on real data and check its inequalities",
    "configs": "list the packaged configurations",
    "completion": "print the script that completes commands and options in bash or zsh",
    "version": "print the versions in use",
}
"""Name -> one line for the help."""

RUNS = ("fit", "validate", "test", "compare", "audit")
"""Commands that take a configuration; their options are those of Lightning's command line."""

EXAMPLES = {
    "fit": (
        "fit --config wide_fc",
        "fit --config wide_fc --config +diagnostics --trainer.max_epochs 5",
        "fit --config wide_fc --data TorchvisionDataModule --data.dataset MNIST --data.n_train 1000",
    ),
    "validate": ("validate --config wide_fc --ckpt_path PATH",),
    "test": ("test --config wide_fc --ckpt_path PATH",),
    "compare": ("compare --config wide_fc --trainer.max_epochs 5",),
    "audit": ("audit --config wide_fc --samples 200",),
}
"""Command -> the examples of its help."""

MODELS = ("WideFC", "BNResNet", "LoRAFineTuning")
DATA = ("DigitsDataModule", "LanguageDataModule", "TextDataModule", "TorchvisionDataModule")
"""Classes of this package that the command line knows by their short names."""

OUT = "runs/audit"
LENGTHS = ("max_epochs", "max_steps", "max_time", "fast_dev_run")


def overview() -> str:
    """Return the help of the command itself."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items())
    examples = (
        "fit --config wide_fc",
        "compare --config wide_fc --trainer.max_epochs 5",
        "report runs/wide_fc/guarded_0",
    )
    return (
        "usage: lightning-conv COMMAND [options]\n\n"
        "Train a network with convergence diagnostics and a two-phase rule guarded by an expressivity check.\n\n"
        f"commands:\n{lines}\n\n"
        f"`lightning-conv COMMAND --help` has the options of a command. Recipes: {', '.join(recipe_names())}.\n\n"
        f"examples:\n{_lines(examples)}"
    )


def page(command: str) -> UsageParser:
    """Return the parser that prints the help of a command of ``RUNS``; Lightning's parser reads the options.

    Args:
        command: name of the command.
    """
    made = UsageParser(
        command,
        usage=f"lightning-conv {command} --config NAME [--config +OVERLAY] [options]",
        description=f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}.",
        epilog=f"examples:\n{_lines(EXAMPLES[command])}",
    )
    if command == "audit":
        add_audit_options(made.add_argument)
    add = made.add_argument_group("what is run").add_argument
    recipes, overlays = ", ".join(recipe_names()), ", ".join(overlay_names())
    add(
        "-c",
        "--config",
        metavar="NAME",
        help=f"a recipe ({recipes}), an overlay ({overlays}) or a YAML file; may be repeated",
    )
    add(
        "--model",
        metavar="CLASS",
        help=f"another model: {', '.join(MODELS)}, or the import path of any LightningModule",
    )
    add("--data", metavar="CLASS", help=f"other data: {', '.join(DATA)}, or the import path of any data module")
    if command in ("fit", "validate", "test"):
        what = "resume from a checkpoint" if command == "fit" else "take the weights of a checkpoint"
        add("--ckpt_path", metavar="PATH", help=what)
    add = made.add_argument_group("settings").add_argument
    add("--model.NAME", metavar="VALUE", help="a setting of the model, such as --model.lr 0.05")
    add("--data.NAME", metavar="VALUE", help="a setting of the data, such as --data.batch_size 32")
    add("--trainer.NAME", metavar="VALUE", help="a setting of Lightning's Trainer, such as --trainer.max_epochs 20")
    add("--trainer.callbacks+", metavar="CLASS", help="add a callback, such as ConvergenceHealth or EarlyStopping")
    add("--seed_everything", metavar="N", help="seed of the run; true: any")
    add = made.add_argument_group("more help").add_argument
    add("--print_config", action="store_true", help="print the complete configuration, with every setting, and stop")
    add("--model.help", metavar="CLASS", help="the settings of a model; likewise --data.help, --trainer.callbacks.help")
    add("--help-all", action="store_true", help="every option, with all of Lightning's")
    return made


def add_audit_options(add: Callable[..., Any]) -> None:
    """Add the options of `audit` that the other commands do not have.

    Args:
        add: ``add_argument`` of a parser of argparse or jsonargparse.
    """
    samples = SAMPLES if is_small() else 500
    add("--checkpoint", metavar="PATH", type=str, default=None, help="take the weights of a checkpoint")
    add("--samples", metavar="N", type=int, default=samples, help=f"training samples (default: {samples})")
    where = f"folder of labels.md, labels.csv and, of images, labels.png (default: {OUT})"
    add("--out", "--output", metavar="FOLDER", type=str, default=OUT, help=where)


def check_configured(command: str, words: Sequence[str]) -> None:
    """Refuse to run what nobody has chosen: Lightning would train for 1,000 epochs.

    Args:
        command: name of a command of ``RUNS``.
        words: words of the command line after it.

    Raises:
        UsageError: neither a configuration nor a model is named, or a model is trained without one and without an end, or a
            model of the user's without data; a recipe without a guard is to be compared.
    """
    options = {word.partition("=")[0] for word in words if word.startswith("-")}
    if command == "compare" and "--model" not in options:
        named = {
            value
            for word, after in pairwise([*words, ""])
            for value in (after, word.partition("=")[2])
            if word.partition("=")[0] in OPTIONS
        }
        if without := named & {*recipe_names()} - {*guarded_recipe_names()}:
            raise UsageError(
                f"--config: {without.pop()} has no guard, with and without which compare would run it; recipes with one: "
                f"{', '.join(guarded_recipe_names())}"
            )
    if options & {*OPTIONS, "--print_config"} or any(option.endswith(".help") for option in options):
        return
    if "--model" not in options:
        raise UsageError(
            f"--config: {command} needs a configuration, such as: lightning-conv {EXAMPLES[command][0]}",
            f"\n{listing()}`lightning-conv {command} --help` has the options.\n",
        )
    if command in ("fit", "compare") and not options & {f"--trainer.{name}" for name in LENGTHS}:
        raise UsageError(f"--trainer.max_epochs: {command} without a configuration needs a number of epochs")
    model = next(
        (_value(words, number) for number, word in enumerate(words) if word.partition("=")[0] == "--model"), ""
    )
    if (
        "." in model
        and not model.startswith("lightning_conv.")
        and not any(each.startswith("--data") for each in options)
    ):
        raise UsageError(
            f"--data: {command} of {model} needs a data module, as in --data my_package.MyData; --data DigitsDataModule takes the digits"
        )


def _value(words: Sequence[str], number: int) -> str:
    """Return the value of the option at this place of the command line."""
    given = words[number].partition("=")[2]
    return given or next(iter(words[number + 1 : number + 2]), "")


def _lines(examples: Sequence[str]) -> str:
    return "".join(f"  lightning-conv {example}\n" for example in examples)
