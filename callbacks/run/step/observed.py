"""``Observed``: the network of a training step, as it was seen: what it is given, and which of its calls return the outputs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_conv.callbacks.run.step.samples_of_batch import rows_of
from lightning_conv.callbacks.run.step.step_code import ReplayStep
from lightning_conv.callbacks.run.twin import Twin
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.observed.carried import Attribute
from lightning_conv.networks.observed.replay import Given, OutputPlace, Replay


@dataclass(frozen=True)
class Observed:
    """The network of a training step: what it is given, and which of its calls return the outputs.

    Attributes:
        samples: Number n of samples on which it was observed.
        given: The batch, or what enters the one call that is the network.
        outputs: The outputs, as places in the results of calls.
        call: Dotted name of the one module whose call is the network; None: the whole step is.
        draws: Random numbers that the network draws.
        drawn: Those with one row per sample: names of inputs by the number of the draw.
        beside: Names of the parameters that the loss depends on beside the outputs.
        random: Whether the step draws random numbers, in the network or elsewhere.
        sources: Where the outputs are made, and the step can be given others; empty: they cannot be given.
        carried: Attributes in which the step keeps something of each sample for the next batch, such as a hidden state, with what they held
            before it; the network begins with that.
        aside: Which of the losses and steps of the training step they belong to, in words; empty: it has one.
        watched: Number of the optimizer whose loss is meant; None: the loss is what the step returns.
        meant: Numbers of the losses that this optimizer minimises; empty: they are looked for in each run of the step.
        batch_idx: Number of the batch, as the step was told.
        at_step: Optimizer steps that the step was told of; None: those of the run.
        counts: Numbers among the module's attributes that decide what the step does; empty: those of the run.
    """

    samples: int
    given: Given
    outputs: tuple[OutputPlace, ...]
    call: str | None
    draws: tuple[Tensor, ...] = ()
    drawn: Mapping[int, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    random: bool = False
    sources: tuple[OutputPlace, ...] = ()
    carried: Mapping[Attribute, Any] = field(default_factory=dict)
    aside: str = ""
    watched: int | None = None
    meant: tuple[int, ...] = ()
    batch_idx: int = 0
    at_step: int | None = None
    counts: Mapping[str, int] = field(default_factory=dict)

    def some(self, batch: Any, rows: Tensor) -> Any:
        """Return some samples of a batch.

        Args:
            batch: A batch of ``samples`` samples.
            rows: Their numbers.
        """
        return rows_of(batch, self.samples, rows, tuple(self.given.lists.values()))

    def set_up(self, twin: Twin) -> Twin:
        """Have another copy of the module begin as the observed one did, and tell the same loss; return it.

        Args:
            twin: The copy.
        """
        twin.watched, twin.meant = self.watched, self.meant
        for (module, attribute), value in self.carried.items():
            setattr(twin.module.get_submodule(module), attribute, copy.deepcopy(value))
        return twin

    @property
    def source(self) -> OutputPlace | None:
        """Where the outputs are made, if they are one tensor, and the step can be given another one."""
        return self.sources[0] if len(self.sources) == 1 else None

    @property
    def words(self) -> str:
        """What was observed, for a user."""
        times = Counter(name for name, _ in {(each.name, each.number) for each in self.outputs})
        each_by_itself = {each.name for each in self.outputs if each.padded}
        made = [
            (f"self.{name}(...)" if name else "self(...)")
            + (
                " (a call for each sample)"
                if name in each_by_itself
                else f" ({times[name]} calls)"
                if times[name] > 1
                else ""
            )
            for name in dict.fromkeys(each.name for each in self.outputs)
        ]
        aside = f", {self.aside}" if self.aside else ""
        kept = [".".join(part for part in ("self", *attribute) if part) for attribute in self.carried]
        state = f", with {' and '.join(kept)} as before the first batch" if kept else ""
        return f"{' and '.join(made)} as the training step calls {'it' if len(made) == 1 else 'them'}{aside}{state}"

    def network(self, twin: Twin) -> nn.Module:
        """Return the network over the weights of a copy of the module.

        Args:
            twin: The copy, in eval mode.
        """
        self.set_up(twin)
        if self.call is None:
            if self.at_step is not None:
                twin.tell(self.at_step)
            vars(twin.module).update(self.counts)
            step = ReplayStep(self.batch_idx)
            return Replay(twin.module, step, self.given, self.outputs, self.draws, self.drawn)
        if not self.call and self._is_plain:
            return twin.module
        name = self.call

        def code(model: nn.Module, given: Any) -> object:
            args, kwargs = given
            return model.get_submodule(name)(*args, **kwargs)

        return Replay(twin.module, code, self.given, self.outputs)

    @property
    def _is_plain(self) -> bool:
        """Whether the call takes tensors with samples alone, by position or by name, and returns the outputs as one tensor."""
        args, kwargs = self.given.structure
        simple = {(0, i) for i in range(len(args))} | {(1, name) for name in kwargs}
        both = bool(args) and bool(kwargs)
        (output,) = self.outputs
        return (
            not both
            and set(self.given.samples.values()) == simple
            and not any(self.given.axes.values())
            and (output.place, output.axis, output.several) == ((), 0, False)
        )

    def inputs(self) -> Inputs:
        """Return the samples as the network takes them: a tensor where there is one, by position where all are, or by name."""
        found = self.given.inputs() | {name: self.draws[number] for number, name in self.drawn.items()}
        by_position = self.call is not None and all(place[0] == 0 for place in self.given.samples.values())
        if by_position and len(found) == 1:
            return next(iter(found.values()))
        return tuple(found.values()) if by_position else found
