"""The runs of the command: Lightning's command line with the defaults of this project, and a comparison of two runs."""

import time
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_conv import callbacks
from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.callbacks.run.callbacks import find_callback
from lightning_conv.recipes import (
    BNResNet,
    DigitsDataModule,
    LanguageDataModule,
    LoRAFineTuning,
    TextDataModule,
    TorchvisionDataModule,
    WideFC,
)
from lightning_conv.recipes.checkpoints import require_checkpoint
from lightning_conv.recipes.mistakes import in_one_line
from lightning_conv.recipes.named_configs import settings
from lightning_conv.recipes.run_names import kind_of_run, named_logger
from lightning_conv.recipes.small import EPOCHS, is_small
from lightning_conv.recipes.summary import RunOutcome, mean_train_loss, print_comparison, print_run
from lightning_conv.reporting.progress import LONG, said_duration

# Imported here, these classes can be named by their short names on the command line.
SHORT_NAMES = (
    BNResNet,
    DigitsDataModule,
    LanguageDataModule,
    LoRAFineTuning,
    TextDataModule,
    TorchvisionDataModule,
    WideFC,
)
SHORT_NAMES_OF_CALLBACKS = [
    kind
    for name in callbacks.__all__
    if isinstance(kind := getattr(callbacks, name), type) and issubclass(kind, Callback)
]
BASES = (LightningModule, LightningDataModule, Callback, Logger)


class RecipeParser(LightningArgumentParser):
    """Lightning's parser, which reports an error in one message instead of the whole usage."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as an exception, which the command reports.

        Raises:
            MisconfigurationException: always.
        """
        parsers = [
            self,
            *(() if self._subcommands_action is None else self._subcommands_action._name_parser_map.values()),
        ]
        options = [action.dest for parser in parsers for action in parser._actions if action.option_strings]
        inner = (
            "config" not in options
        )  # the parser of a class; that of a command does not know the settings of the classes
        if not inner:
            options += [f"{section}.{name}" for section in ("model", "data") for name in settings(section)]
        raise MisconfigurationException(in_one_line(message, options, known_classes(), inner=inner)) from ex


def known_classes() -> list[str]:
    """Return the short names that the command line understands: classes of models, data, callbacks and loggers that are imported."""
    found: set[type] = set()
    waiting: list[type] = [*BASES]
    while waiting:
        kind = waiting.pop()
        if kind not in found:
            found.add(kind)
            waiting += kind.__subclasses__()
    return sorted({kind.__name__ for kind in found if not kind.__name__.startswith("_")})


class SaveFitConfig(SaveConfigCallback):
    """Saves the configuration of a training run next to its logs, but not of evaluations and runs without a logger.

    Without a logger Lightning would write `config.yaml` into the working directory and refuse the next run.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the configuration when training starts."""
        if stage == "fit" and trainer.loggers:
            super().setup(trainer, pl_module, stage)


class RecipeCLI(LightningCLI):
    """Runs `fit`, `validate` or `test` for any LightningModule and data module; `WideFC` on the digits by default."""

    def __init__(self, args: list[str], *, run: bool = True) -> None:
        if is_small() and run and args[0] == "fit":
            args = [*args, f"--trainer.max_epochs={EPOCHS}"]
        super().__init__(
            model_class=LightningModule,
            subclass_mode_model=True,
            datamodule_class=LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveFitConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            # Without this, the typing error `--trainer.max_epoch 3` is taken for an abbreviation.
            parser_kwargs={"prog": "lightning-conv", "allow_abbrev": False},
            parser_class=RecipeParser,
            auto_configure_optimizers=False,  # the recipes have their own optimizer
            run=run,
            args=args,
        )

    @override
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands that Lightning runs."""
        ours = ("fit", "validate", "test")
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in ours}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the digits and the wide network as defaults."""
        parser.set_defaults({"model": {"class_path": "lightning_conv.recipes.WideFC"}})
        parser.set_defaults({"data": {"class_path": "lightning_conv.recipes.DigitsDataModule"}})

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the given words; Lightning's method warns whenever the process itself has a command line.

        Raises:
            MisconfigurationException: `--ckpt_path` is a file of another kind, which Lightning would read next.
        """
        self.config = parser.parse_args(args)  # type: ignore[arg-type]
        require_checkpoint(self.config.get(f"{self.config.get('subcommand')}.ckpt_path"))

    @override
    def instantiate_classes(self) -> None:
        """Build model, data and trainer.

        Raises:
            MisconfigurationException: if a constructor refuses its arguments.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise MisconfigurationException(in_one_line(str(error), ())) from error

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; the logs of a fit are named for what it is.

        The saved configuration has no such name, so that a run of it gets its own.
        """
        resolved = self._get(self.config, "trainer", default={})
        given, logger = resolved.get("logger"), self._get(self.config_init, "trainer", default={}).get("logger")
        if self.subcommand == "fit" and hasattr(given, "init_args"):
            callbacks = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
            callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
            named = named_logger(logger, given.init_args.as_dict(), kind_of_run(self.model, callbacks))
            kwargs = {"logger": named, **kwargs} if named is not None else kwargs
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Print the table of a training run."""
        if self.trainer.is_global_zero:
            print_run(self.trainer)


class Prediction(Callback):
    """Says once, after the first epoch, how long a run is predicted to take, if that is ``LONG`` or more."""

    def __init__(self) -> None:
        self._begun = 0.0

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when the first epoch begins."""
        if trainer.current_epoch == 0:
            self._begun = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it after the first epoch."""
        epochs = trainer.max_epochs
        if trainer.current_epoch != 0 or epochs is None or epochs < 2:
            return
        seconds = (time.perf_counter() - self._begun) * epochs
        if seconds >= LONG:
            rank_zero_info(
                f"{epochs} epochs: about {said_duration(seconds)} for this run, and as long for the other one"
            )


class ComparedCLI(RecipeCLI):
    """One run of a comparison, which trains, tests the last weights and keeps the outcome."""

    outcome: RunOutcome

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the trainer of the configuration, which says how long the run is predicted to take."""
        made = super().instantiate_trainer(**kwargs)
        made.callbacks.append(Prediction())  # type: ignore[attr-defined]
        return made

    def before_fit(self) -> None:
        """Refuse a guard that would stay in the run without the guard.

        Raises:
            MisconfigurationException: if the trainer's own callbacks contain a guard.
        """
        if find_callback(self.trainer, ExpressivityGuard) is not None:
            raise MisconfigurationException(
                "trainer.callbacks: contains an ExpressivityGuard, which the run without the guard would keep; remove it "
                "and use the one of the model (model.guard, model.switch_at)"
            )
        self._started = time.perf_counter()

    @override
    def after_fit(self) -> None:
        """Test the last weights."""
        seconds = time.perf_counter() - self._started
        self.outcome = RunOutcome(
            trainer=self.trainer,
            steps=self.trainer.global_step,
            seconds=seconds,
            train_loss=mean_train_loss(self.model, self.datamodule),
            test_metrics=dict(self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)[0]),
        )


def compare(args: list[str]) -> None:
    """Run a recipe with the guard, the same run without it, and print both side by side.

    Args:
        args: options of `fit`; the model must have a setting `guard`, as the recipes do.
    """
    guarded = ComparedCLI(["fit", *args, "--model.guard=true"])
    # A seed chosen at random (seed_everything: true) is in the configuration after the first run.
    seed: Any = guarded.config["fit"]["seed_everything"]
    plain = ComparedCLI(["fit", *args, f"--seed_everything={seed}", "--model.guard=false"])
    if plain.trainer.is_global_zero:
        print_comparison(guarded.outcome, plain.outcome)
