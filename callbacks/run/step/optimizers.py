"""The optimizers of a run: their names, the parameters that they train, and the network that belongs to each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_conv.callbacks.run.probe import Probe

WRAPPERS = ("_orig_mod", "module")
"""Names under which wrappers, such as a compiled module, hold the one that they wrap."""


@dataclass(frozen=True)
class RunOptimizer:
    """An optimizer of the run.

    Attributes:
        name: The module that it trains, such as ``"generator"``, or its class, such as ``"Adam-1"``.
        number: Its place among the optimizers of the run.
        parameters: Names of its parameters in the LightningModule.
    """

    name: str
    number: int
    parameters: tuple[str, ...]


def optimizers_of(trainer: pl.Trainer) -> list[RunOptimizer]:
    """Return the optimizers of a run by name, in their order.

    The name is that of the outermost module that holds all parameters of the optimizer and none of the others, such as ``"generator"``;
    where each has some of the others, the innermost one. A single parameter that lies in no module gives its own name. Where that is no
    name, or another optimizer has the same, it is the class with a number, such as ``"Adam"`` and ``"Adam-1"``, as Lightning's
    ``LearningRateMonitor`` counts them.

    Args:
        trainer: Trainer of the run.
    """
    names = {id(each): name for name, each in trainer.lightning_module.named_parameters()}
    trained = [
        tuple(names[id(each)] for group in one.param_groups for each in group["params"] if id(each) in names)
        for one in trainer.optimizers
    ]
    modules = [
        _module(own, {name for other in trained for name in other} - set(own), trained.count(own) == 1)
        for own in trained
    ]
    times = Counter(modules)
    classes = _numbered(trainer.optimizers)
    found = [module if module and times[module] == 1 else name for module, name in zip(modules, classes, strict=True)]
    unique = found if len(set(found)) == len(found) else classes  # a module may have the name of a class
    return [RunOptimizer(name, number, own) for number, (name, own) in enumerate(zip(unique, trained, strict=True))]


def _module(own: Sequence[str], others: set[str], alone: bool) -> str:
    """Return the name of the outermost module with all of some parameters, and none of others; empty: there is none."""
    if not own or not alone:
        return ""
    paths = sorted(_path(name) for name in own)  # what the first and the last one share, all of them do
    same = takewhile(lambda pair: pair[0] == pair[1], zip(paths[0], paths[-1], strict=False))
    shared = [name for name, _ in same]
    taken = [_path(name) for name in others]
    alone_in = (shared[: depth + 1] for depth in range(len(shared)))
    found = next((each for each in alone_in if not any(path[: len(each)] == each for path in taken)), shared)
    return ".".join(found)


def _path(name: str) -> list[str]:
    """Return the modules that a parameter lies in, from the outside in; of one that lies in none, its own name."""
    *modules, own = name.split(".")
    return [each for each in modules if each not in WRAPPERS] or [own]


def _numbered(optimizers: Sequence[Optimizer]) -> list[str]:
    seen: Counter[str] = Counter()
    names = []
    for each in optimizers:
        name = type(each).__name__
        names.append(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def find_optimizer(trainer: pl.Trainer, name: str) -> RunOptimizer:
    """Return the optimizer of this name.

    Args:
        trainer: Trainer of the run.
        name: The name.

    Raises:
        MisconfigurationException: There is none; the message names those that there are.
    """
    known = optimizers_of(trainer)
    found = next((each for each in known if each.name == name), None)
    if found is None:
        names = ", ".join(repr(each.name) for each in known)
        raise MisconfigurationException(f"Probe: optimizer={name!r} is none of this run; it has {names}")
    return found


def measured_parameters(trainer: pl.Trainer, probe: Probe) -> list[str]:
    """Return the names, in ``probe.network(...)``, of the parameters that a kernel is over.

    Those that the Probe names; otherwise those that ask for a gradient, of an optimizer only its own.

    Args:
        trainer: Trainer of the run.
        probe: The settings.

    Raises:
        MisconfigurationException: There are none, or there is no such optimizer.
    """
    module = trainer.lightning_module
    own = None if probe.optimizer is None else _ids(find_optimizer(trainer, probe.optimizer), module)
    names = probe.parameter_names(module)
    if own is None or probe.parameters is not None:
        return names
    named = dict(probe.network(module).named_parameters())
    found = [name for name in names if id(named[name]) in own]
    if not found:
        raise MisconfigurationException(
            f"Probe: the optimizer {probe.optimizer!r} has no trainable parameter; name those that are meant: Probe(parameters=...)"
        )
    return found


def _ids(optimizer: RunOptimizer, module: pl.LightningModule) -> set[int]:
    named = dict(module.named_parameters())
    return {id(named[name]) for name in optimizer.parameters}


def probe_of_each(trainer: pl.Trainer, probe: Probe) -> list[Probe]:
    """Return the settings for each network that is measured: one network per optimizer where the run has several.

    A Probe that names its optimizer, or says itself how the network is called, means one network. Of the parameters that it names each
    optimizer gets those that are its own; an optimizer without any is left out.

    Args:
        trainer: Trainer of the run.
        probe: The settings that the user has given.
    """
    known = optimizers_of(trainer)
    if len(known) < 2 or probe.optimizer is not None or probe.is_given:
        return [probe]
    return [made for each in known if (made := _for(trainer, probe, each)) is not None] or [probe]


def _for(trainer: pl.Trainer, probe: Probe, optimizer: RunOptimizer) -> Probe | None:
    module = trainer.lightning_module
    own = _ids(optimizer, module)
    if probe.parameters is None:
        trains = any(id(each) in own and each.requires_grad for each in module.parameters())
        return probe.changed(optimizer=optimizer.name) if trains else None
    named: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    try:
        names = [name for name in probe.parameter_names(module) if id(named[name]) in own]
    except MisconfigurationException:  # it is raised where the samples are read, as for one optimizer
        return None
    return probe.changed(optimizer=optimizer.name, parameters=names) if names else None
