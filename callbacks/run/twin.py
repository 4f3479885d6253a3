"""``Twin``: a copy of the LightningModule on which the training step is run once more, without touching the run."""

from __future__ import annotations

import copy
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.networks.copying import HOOKS, not_copied, own

METRICS = ("callback_metrics", "logged_metrics", "progress_bar_metrics")


class NotATwinError(RuntimeError):
    """The copy's training step reaches back into the run; the message says by what."""


class TrainerReader:
    """The trainer as the copy sees it: what it reads is the run's, nothing that it calls for reaches a logger or an optimizer.

    Args:
        trainer: Trainer of the run.
        step: Optimizer steps that the copy is told of; None: those of the run.
        epoch: Epoch that the copy is told of; None: that of the run.
    """

    def __init__(self, trainer: pl.Trainer, step: int | None = None, epoch: int | None = None) -> None:
        held = vars(self)
        held |= {"_read": trainer, "logger": DummyLogger(), "loggers": []}
        held["global_step"] = trainer.global_step if step is None else step
        held["current_epoch"] = trainer.current_epoch if epoch is None else epoch

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainerReader:
        """Return this reader: a copy of it would bring the trainer."""
        return self

    def __getattr__(self, name: str) -> Any:
        """Return what the run's trainer has under this name; of its metrics a copy."""
        found = getattr(self._read, name)
        return dict(found) if name in METRICS else found


class Still(Optimizer):
    """The settings of an optimizer or of a scheduler, to be read; its steps do nothing. It is an optimizer to whoever asks.

    Args:
        of: Optimizer or scheduler of the run.
        memo: Copies of the parameters by the ``id`` of their originals.
    """

    def __init__(self, of: Any, memo: dict[int, Any]) -> None:
        groups = getattr(of, "param_groups", getattr(getattr(of, "optimizer", None), "param_groups", []))
        own = [[memo[id(each)] for each in group["params"] if id(each) in memo] for group in groups]
        copied = [copy.copy(group) | {"params": params} for group, params in zip(groups, own, strict=True)]
        defaults = dict(getattr(of, "defaults", {}))
        # As if it had been loaded: an empty list of parameters, as a scheduler has, is no error then.
        self.__setstate__({"param_groups": copied, "defaults": defaults, "state": defaultdict(dict)})

    def get_last_lr(self) -> list[float]:
        """Return the learning rates of the groups."""
        return [float(group["lr"]) for group in self.param_groups]

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        """Call the closure, which computes a loss, and change nothing."""
        return None if closure is None else closure()

    def zero_grad(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    toggle_model = untoggle_model = zero_grad


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
        losses: What the last run of the step gave to a backward pass of its own, or returned.

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
        self.losses: list[Tensor] = []
        shared = [*trainer.callbacks, *_hooks_from_outside(module)]  # type: ignore[attr-defined]
        memo: dict[int, Any] = {id(trainer): self._reader} | {id(each): each for each in shared} | not_copied(module)
        self.module: pl.LightningModule = copy.deepcopy(module, memo)
        if shared_with_run := _shared(module, self.module):
            raise NotATwinError(
                f"a copy of the module shares {shared_with_run!r} with it, so nothing may be written into the copy"
            )
        for each in self.module.modules():
            _make_functions_anew(each, memo)
        still, schedulers = (
            [Still(each, memo) for each in some]
            for some in (trainer.optimizers, (config.scheduler for config in trainer.lr_scheduler_configs))
        )
        vars(self._reader)["optimizers"] = still
        instead: dict[str, Callable[..., Any]] = {
            "log": _nothing,
            "log_dict": _nothing,
            "print": _nothing,
            "manual_backward": self._keep_loss,
            "optimizers": lambda *_, **__: still[0] if len(still) == 1 else still,
            "lr_schedulers": lambda: (schedulers[0] if len(schedulers) == 1 else schedulers) or None,
        }
        for each in self.module.modules():
            if isinstance(each, pl.LightningModule):
                vars(each).update(instead, _trainer=self._reader)

    def __deepcopy__(self, memo: dict[int, Any]) -> Twin:
        """Return this twin, which a copy of its module may refer to."""
        return self

    def take_modes_of_the_run(self) -> None:
        """Put every module of the copy into the mode of its original: training or evaluation."""
        for copied, original in zip(self.module.modules(), self._original.modules(), strict=True):
            copied.training = original.training

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
        given = _copied(batch)
        with isolated(), self.refused_to_the_original(), self._trainer.precision_plugin.train_step_context():
            return self.bare_step(given, batch_idx)

    def bare_step(self, batch: Any, batch_idx: int = 0) -> Tensor | None:
        """Run the training step of the copy as it is called here: on this very batch, drawing from the run's generators.

        Backward passes of a manual optimization are left out, so that the graphs of ``losses`` stay.

        Args:
            batch: A batch as the training step gets it.
            batch_idx: Its number in the epoch.

        Returns:
            The loss, with its graph; None: the step gave none.
        """
        self.losses, automatic = [], self.module.automatic_optimization
        with nullcontext() if automatic else _NoBackward(self._keep_loss):
            made = call_step(self.module, batch, batch_idx)
        loss = made.get("loss") if isinstance(made, Mapping) else made
        if isinstance(loss, Tensor) and automatic:
            self._keep_loss(loss)
        return loss if isinstance(loss, Tensor) else None

    def _keep_loss(self, loss: Tensor, *_: Any, **__: Any) -> None:
        self.losses.append(loss)

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
    own = {each.untyped_storage().data_ptr() for each in (*module.parameters(), *module.buffers()) if each.numel()}
    named = (*copied.named_parameters(), *copied.named_buffers())
    return next((name for name, each in named if each.numel() and each.untyped_storage().data_ptr() in own), "")


def _hooks_from_outside(module: nn.Module) -> list[Any]:
    """Return the forward hooks that are methods of something else than a module, whose copy would bring all that it holds."""
    hooks = [hook for each in module.modules() for kind in HOOKS for hook in vars(each)[kind].values()]
    return [hook for hook in hooks if not isinstance(getattr(hook, "__self__", module), nn.Module)]


def call_step(module: pl.LightningModule, batch: Any, batch_idx: int = 0) -> Any:
    """Call the training step of a module, with the number of the batch where it takes one, or with an iterator over the one batch.

    Args:
        module: A copy of the run's module.
        batch: A batch as the training step gets it.
        batch_idx: Its number in the epoch.
    """
    function = module.training_step
    if is_param_in_hook_signature(function, "dataloader_iter", explicit=True):
        return function(iter([(batch, batch_idx, 0)]))
    numbered = is_param_in_hook_signature(function, "batch_idx", min_args=2)
    return function(batch, batch_idx) if numbered else function(batch)


class _NoBackward(TorchFunctionMode):
    """Hands tensors whose backward pass is asked for to a function, in place of the pass."""

    def __init__(self, instead: Callable[..., None]) -> None:
        super().__init__()
        self._instead = instead

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._instead(args[0]) if func is Tensor.backward else func(*args, **(kwargs or {}))


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""


def _make_functions_anew(module: nn.Module, memo: dict[int, Any]) -> None:
    """Give a copied module functions and hooks that do not reach back into the original, nor into what its hooks collect."""
    for name, value in list(vars(module).items()):
        if name in HOOKS:
            value |= {key: _hook(hook, memo) for key, hook in value.items()}
        elif isinstance(value, types.FunctionType):
            vars(module)[name] = own(value, memo)


def _hook(hook: Any, memo: dict[int, Any]) -> Any:
    if isinstance(hook, types.FunctionType):
        return own(hook, memo, isolated=True)
    if isinstance(hook, types.MethodType) and not isinstance(hook.__self__, nn.Module):
        return types.MethodType(hook.__func__, _isolated(hook.__self__, memo))
    return hook


def _isolated(owner: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of an object that has containers and tensors of its own, and shares everything else."""
    if isinstance(owner, type):
        return owner
    made = copy.copy(owner)
    for name, value in list(getattr(made, "__dict__", {}).items()):
        if isinstance(value, (list, dict, set, Tensor)):
            vars(made)[name] = own(value.detach().clone() if isinstance(value, Tensor) else value, memo)
    return made
