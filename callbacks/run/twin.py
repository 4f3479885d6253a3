"""``Twin``: a copy of the LightningModule on which the training step is run once more, without touching the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_conv.callbacks.run.callbacks import all_callbacks
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.step.own_hooks import hooks_from_outside, make_functions_anew
from lightning_conv.callbacks.run.step.step_code import call_step
from lightning_conv.callbacks.run.step.still import StepLoss, StepRecord, Still
from lightning_conv.callbacks.run.step.trainer_reader import TrainerReader
from lightning_conv.networks.copying import not_copied


class NotATwinError(RuntimeError):
    """The copy's training step reaches back into the run; the message says by what."""


def copy_module(module: pl.LightningModule, memo: dict[int, Any]) -> pl.LightningModule:
    """Return a copy of a module that shares no memory with it, and whose functions do not reach back into it.

    Args:
        module: Any LightningModule.
        memo: What stands for parts of it in the copy, by their ``id``, as ``copy.deepcopy`` takes and fills it.

    Raises:
        NotATwinError: The copy has the memory of the module's weights or buffers.
    """
    made: pl.LightningModule = copy.deepcopy(module, memo)
    for copied, original in zip(made.parameters(), module.parameters(), strict=True):
        if copied.grad_fn is not None:  # scripted modules copy their weights with a graph
            copied.detach_().requires_grad_(original.requires_grad)
    if shared_with_run := _shared(module, made):
        raise NotATwinError(
            f"a copy of the module shares {shared_with_run!r} with it, so nothing may be written into the copy"
        )
    for each in made.modules():
        make_functions_anew(each, memo)
    return made


class Twin:
    """A copy of a LightningModule: weights, buffers, attributes and metrics of its own, and a trainer that can only be read.

    Tensors with a graph among the attributes, such as outputs that the module collects, are copied without it; locks and open files are
    shared. A function among them, such as a training step that was assigned to the instance, is made anew where it holds the module or a
    container in its closure: otherwise the copy would run the module itself. So is a forward hook, which then counts and collects for
    itself. Whatever the step does outside the module, such as writing to a file, does happen.

    Args:
        trainer: Trainer of the run.
        module: LightningModule of the run.
        step: Optimizer steps that the copy is told of; None: those of the run.
        epoch: Epoch that the copy is told of; None: that of the run.

    Attributes:
        module: The copy, in the modes of the original, with all of its trainable parameters.
        global_step: Optimizer steps that it is told of.
        trained: Names of the parameters that ask for a gradient in the original.
        watched: Place of the optimizer whose loss counts, where there are several; None: the first loss of the step.
        meant: Places of the losses that are its own, where they are known; empty: those whose gradients it steps with.
        goes_on: Whether each step begins with the attributes that the one before it has left, such as counts, as in the run.

    Raises:
        NotATwinError: The copy has the memory of the module's weights or buffers: something in it copies itself in its own way.
        TypeError, RuntimeError, ...: The module cannot be copied, as Python's ``copy.deepcopy`` says.

    Cost: a copy of the module's weights.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, *, step: int | None = None, epoch: int | None = None
    ) -> None:
        self._trainer, self._original = trainer, module
        self._reader = TrainerReader(trainer, step, epoch)
        self.global_step: int = self._reader.global_step
        self.trained = {name for name, each in module.named_parameters() if each.requires_grad}
        self._record = StepRecord()
        self.watched: int | None = None
        self.meant: tuple[int, ...] = ()
        self.goes_on = False
        self._optimizers = [Still(self._record, number) for number, _ in enumerate(trainer.optimizers)]
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        still = [Still() for _ in schedulers]
        read = list(zip((*trainer.optimizers, *schedulers), (*self._optimizers, *still), strict=True))
        shared = [*all_callbacks(trainer), *hooks_from_outside(module)]
        memo: dict[int, Any] = {id(trainer): self._reader} | {id(each): each for each in shared} | not_copied(module)
        # A module may keep its optimizers, or Lightning's wrappers of them.
        memo |= {id(each): its for each, its in (*read, *zip(_wrappers(module), self._optimizers, strict=False))}
        self.module = copy_module(module, memo)
        for of, its in read:
            its.read(of, memo, self._optimizers)
        vars(self._reader)["optimizers"] = self._optimizers
        instead: dict[str, Callable[..., Any]] = {
            "log": _nothing,
            "log_dict": _nothing,
            "print": _nothing,
            "manual_backward": self._record.backward,
            "optimizers": lambda *_, **__: _one_or_all(self._optimizers),
            "lr_schedulers": lambda: _one_or_all(still) or None,
        }
        for each in self.module.modules():
            if isinstance(each, pl.LightningModule):
                vars(each).update(instead, _trainer=self._reader)

    def __deepcopy__(self, memo: dict[int, Any]) -> Twin:
        """Return this twin, which a copy of its module may refer to."""
        return self

    def step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Run the training step of the copy, in its present modes, as the run does: in its precision, from its random numbers.

        The generators are put back afterwards. The step gets a copy of the batch.

        Args:
            batch: A batch as the training step gets it.
            batch_idx: Its number in the epoch.

        Returns:
            The loss, with its graph; None: the step gave none.

        Raises:
            NotATwinError: The step calls a module of the run, or the batch cannot be copied.
        """
        given, attributes = _copied(batch), self.attributes()
        with isolated(), self.refused_to_the_original(), self._trainer.precision_plugin.train_step_context():
            made = self.bare_step(given, batch_idx)
        if not self.goes_on:
            self.put_back(attributes)  # such as a hidden state, or a count that decides which optimizer steps
        return made

    def bare_step(self, batch: Any, batch_idx: int = 0) -> Tensor | None:
        """Run the training step of the copy as it is called here: on this very batch, drawing from the run's generators.

        Backward passes of a manual optimization are left out, so that the graphs of its losses stay.

        Args:
            batch: A batch as the training step gets it.
            batch_idx: Its number in the epoch.

        Returns:
            The loss, with its graph; of a manual optimization that of the watched optimizer. None: the step gave none.
        """
        self._record.begin()
        if self.module.automatic_optimization:
            loss = _loss_in(call_step(self.module, batch, batch_idx))
            self._record.losses += [] if loss is None else [loss]
            return loss
        with self._record.recording(self.module):
            made = call_step(self.module, batch, batch_idx)
        found = self.step_loss
        return _loss_in(made) if found is None else found.total

    @property
    def n_losses(self) -> int:
        """Number of losses that the last run of the step gave to backward passes, or returned."""
        return len(self._record.losses)

    @property
    def step_loss(self) -> StepLoss | None:
        """What the watched optimizer minimised in the last run of the step; None: nothing that was seen."""
        first = StepLoss(tuple(self._record.losses[:1])) if self._record.losses else None
        if self.module.automatic_optimization or self.watched is None:
            return first
        if self.meant:
            return self._record.sum_of(self.meant)
        found = self._record.loss_of(self.watched, self._optimizers[self.watched].parameters)
        return found or (first if len(self._optimizers) == 1 else None)

    def attributes(self) -> list[dict[str, Any]]:
        """Return the attributes of all modules of the copy, for ``put_back``."""
        return [dict(vars(each)) | {"_buffers": dict(each._buffers)} for each in self._with_attributes]

    @property
    def _with_attributes(self) -> list[nn.Module]:
        """The modules of the copy, but for scripted ones, which have no attributes of Python."""
        return [each for each in self.module.modules() if not isinstance(each, torch.jit.ScriptModule)]

    def put_back(self, attributes: list[dict[str, Any]]) -> None:
        """Give the modules attributes that they had, such as counts.

        Args:
            attributes: What ``attributes`` has returned.
        """
        for each, held in zip(self._with_attributes, attributes, strict=True):
            buffers = each._buffers
            vars(each).clear()
            vars(each).update(held, _buffers=buffers)
            buffers.clear()
            buffers.update(held["_buffers"])

    @property
    def seeks(self) -> bool:
        """Whether the watched optimizer is one that the training step itself asks to step."""
        return self.watched is not None and not self.module.automatic_optimization

    def tell(self, step: int) -> None:
        """Tell the copy of another number of optimizer steps.

        Args:
            step: Steps that are done.
        """
        self.global_step = vars(self._reader)["global_step"] = step

    @contextmanager
    def refused_to_the_original(self) -> Iterator[None]:
        """Refuse calls of the run's own modules inside.

        Raises:
            NotATwinError: The step calls one of them.
        """

        def refuse(module: nn.Module, _: Any) -> NoReturn:
            raise NotATwinError(
                f"the training step of a copy of the module calls the module itself ({type(module).__name__})"
            )

        with ExitStack() as hooks:
            for each in self._refusing:
                own = vars(each)["_forward_pre_hooks"]
                # In front of the user's own hooks, and without a number of torch's counter.
                vars(each)["_forward_pre_hooks"] = type(own)({-1: refuse})
                hooks.callback(vars(each).__setitem__, "_forward_pre_hooks", own)
            yield

    @cached_property
    def _refusing(self) -> list[nn.Module]:
        """The run's modules that hold weights; scripted ones take no hooks."""
        modules = [each for each in self._original.modules() if not isinstance(each, torch.jit.ScriptModule)]
        return [each for each in modules if next(each.parameters(), None) is not None]


def _copied(batch: Any) -> Any:
    """Return a copy of a batch, in which nothing is shared that a step could write to.

    Raises:
        NotATwinError: There is something in it that cannot be copied.
    """
    try:
        return copy.deepcopy(apply_to_collection(batch, Tensor, lambda tensor: tensor.detach()))
    except Exception as error:  # copying runs any code
        raise NotATwinError(f"a batch cannot be copied ({type(error).__name__}: {error})") from error


def _shared(module: nn.Module, copied: nn.Module) -> str:
    """Return the name of a tensor of the copy that lies in the memory of one of the original; empty: there is none."""
    own = {each.untyped_storage().data_ptr() for _, each in _filled(module)}
    return next((name for name, each in _filled(copied) if each.untyped_storage().data_ptr() in own), "")


def _filled(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers that have a shape and are not empty, by name."""
    named = (*module.named_parameters(), *module.named_buffers())
    shapeless = UninitializedParameter, UninitializedBuffer
    return [(name, each) for name, each in named if not isinstance(each, shapeless) and each.numel()]


def _loss_in(made: Any) -> Tensor | None:
    """Return the loss in what a training step has returned."""
    loss = made.get("loss") if isinstance(made, Mapping) else made
    return loss if isinstance(loss, Tensor) else None


def _wrappers(module: pl.LightningModule) -> list[Any]:
    """Return Lightning's wrappers of the optimizers."""
    found = module.optimizers()
    return found if isinstance(found, list) else [found]


def _one_or_all(found: list[Still]) -> Still | list[Still]:
    return found[0] if len(found) == 1 else found


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""
