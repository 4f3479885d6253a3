"""``Case``: a module, its data and its trainer, with the outputs that its training step's call makes, written by hand."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from lightning_conv.callbacks import Probe

Call = Callable[[Any, Any], Tensor]  # module, batch -> u; samples along the first axis
Expected = Literal["worked", "needs one argument", "refused"]


@dataclass(frozen=True)
class Reading:
    """One answer to "which network does this step train?": its outputs, and the parameters that they are differentiated by."""

    call: Call
    over: str | tuple[str, ...] = ""  # what the parameters' names begin with
    optimizer: str = ""  # whose network it is, in a run with several


@dataclass(frozen=True)
class Cure:
    """What a refusal tells the user to write."""

    says: str  # in the refusal, a regular expression
    probe: Callable[[], Probe]


@dataclass(frozen=True)
class Case:
    """One animal of the zoo."""

    name: str
    about: str  # one line
    families: tuple[str, ...]
    module: Callable[[], LightningModule]
    data: Callable[[], Any]  # what ``Trainer.fit`` takes
    readings: tuple[Reading, ...]  # each is right; which one is meant, the table says
    options: Mapping[str, Any] = field(default_factory=dict)  # of the Trainer
    callbacks: Callable[[], list[Callback]] = list  # the run's own
    expected: Expected = "worked"  # at least
    cure: Cure | None = None  # None: the case's own call, by ``forward_fn`` and ``input_fn``
    tolerance: float = 1e-4  # of the kernel, relative to its largest entry
    needs: str = ""  # package without which the case is not run


CASES: list[Case] = []


def case(
    *families: str, data: Callable[[], Any], call: Call | Reading | tuple[Call | Reading, ...], **rest: Any
) -> Any:
    """Add the LightningModule to the zoo, under its name; its docstring says what it stands for.

    Args:
        families: Kinds that it is a member of.
        data: Makes what ``Trainer.fit`` takes.
        call: The outputs of the call that the training step makes; several where several answers are right.
        rest: Further fields of ``Case``; ``name=`` and ``make=`` for a module that takes arguments.
    """
    calls = call if isinstance(call, tuple) else (call,)
    readings = tuple(each if isinstance(each, Reading) else Reading(each) for each in calls)

    def register(module: Any) -> Any:
        make, about = rest.pop("make", module), (module.__doc__ or "").strip().splitlines()[0].rstrip(".")
        name = rest.pop("name", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", module.__name__).lower())
        assert name not in {each.name for each in CASES}, name
        CASES.append(Case(name, rest.pop("about", about), families, make, data, readings, **rest))
        return module

    return register


class Task(LightningModule):
    """A LightningModule with momentum SGD on everything that asks for a gradient."""

    lr = 0.05

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)
