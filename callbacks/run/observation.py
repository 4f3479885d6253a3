"""``observe``: the network that a training step evaluates, seen by running the step on a copy of the module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lightning_conv.callbacks.run.twin import Twin, call_step
from lightning_conv.networks.evaluation import Inputs, undisturbed
from lightning_conv.networks.observed.calls import CallWatch
from lightning_conv.networks.observed.draws import Draws
from lightning_conv.networks.observed.frontier import Output, Outputs, find_outputs
from lightning_conv.networks.observed.leaves import Place, tensors_in, with_tensors
from lightning_conv.networks.observed.replay import Given, OutputPlace, Replay


class NotObservedError(ValueError):
    """The training step is not a function of samples that can be measured; the message says why."""


@dataclass(frozen=True)
class Seen:
    """One run of the step."""

    loss: Tensor
    outputs: Outputs
    draws: list[Tensor]


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
    """

    samples: int
    given: Given
    outputs: tuple[OutputPlace, ...]
    call: str | None
    draws: tuple[Tensor, ...] = ()
    drawn: Mapping[int, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    random: bool = False

    @property
    def words(self) -> str:
        """What was observed, for a user."""
        made = " and ".join(
            dict.fromkeys(f"self.{each.name}(...)" if each.name else "self(...)" for each in self.outputs)
        )
        return f"{made} as the training step calls it"

    def network(self, twin: Twin) -> nn.Module:
        """Return the network over the weights of a copy of the module.

        Args:
            twin: The copy, in eval mode.
        """
        if self.call is None:
            return Replay(twin.module, call_step, self.given, self.outputs, self.draws, self.drawn)
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
            and (output.place, output.axis) == ((), 0)
        )

    def inputs(self) -> Inputs:
        """Return the samples as the network takes them: a tensor where there is one, by position where all are, or by name."""
        found = self.given.inputs() | {name: self.draws[number] for number, name in self.drawn.items()}
        by_position = self.call is not None and all(place[0] == 0 for place in self.given.samples.values())
        if by_position and len(found) == 1:
            return next(iter(found.values()))
        return tuple(found.values()) if by_position else found


def observe(twin: Twin, batch: Any, samples: int | None = None, batch_idx: int = 0) -> Observed:
    """Observe which function of the samples the training step evaluates.

    The step is run on a copy of the module, in eval mode, in float32 at least, on the batch and on all of its samples but one; what has a
    row less then has the samples as an axis.

    Args:
        twin: A copy of the module, in eval mode.
        batch: A batch as the training step gets it.
        samples: Number n of its samples; None: the most common length of its tensors.
        batch_idx: Its number in the epoch.

    Raises:
        NotObservedError: There is no such function: the step gives no loss, or no module has outputs with one row per sample.

    Cost: two forward passes of the step.
    """
    count = samples or count_samples(batch)
    axes = {place: axis for place, tensor in tensors_in(batch) if (axis := _axis_of_length(tensor, count)) is not None}
    if count < 2 or not axes:
        raise NotObservedError(
            f"no tensor of the batch ({describe(batch)}) has one row for each of at least two samples"
        )
    seen = _run(twin, batch, count, batch_idx)
    fewer = with_tensors(
        batch, lambda place, tensor: tensor.narrow(axes[place], 0, count - 1) if place in axes else tensor
    )
    again = _run(twin, fewer, count - 1, batch_idx) if count > 2 else seen
    if not seen.outputs.found:
        raise NotObservedError(
            "the loss of the training step depends on no output of a module that has one row per sample; does the step call "
            "`self(x)` or `self.net(x)`, and not `self.net.forward(x)`?"
        )
    outputs = tuple(_place(*pair, count) for pair in _pairs(seen, again))
    names = {id(each): name for name, each in twin.module.named_parameters()}
    beside = tuple(names[id(each)] for each in seen.outputs.beside if id(each) in names)
    random = bool(seen.draws)
    if (call := _one_call(seen, again, count)) is not None:
        return Observed(count, call[1], (replace(outputs[0], number=0),), call[0], beside=beside, random=random)
    drawn = {
        number: f"draw {number}"
        for number, (first, second) in enumerate(zip(seen.draws, again.draws, strict=True))
        if first.ndim and len(first) == count and len(second) == len(again.draws[number]) == (count - (count > 2))
    }
    given = Given(batch, {_named(place): place for place in axes}, axes)
    return Observed(count, given, outputs, None, tuple(seen.draws), drawn, beside, random)


def count_samples(batch: Any) -> int:
    """Return the most common length of the tensors of a batch, of equally common ones the first; 0: there is none.

    Args:
        batch: A batch.
    """
    lengths = Counter(len(tensor) for _, tensor in tensors_in(batch) if tensor.ndim)
    return lengths.most_common(1)[0][0] if lengths else 0


def describe(batch: Any) -> str:
    """Return what a batch consists of, for a message.

    Args:
        batch: Anything.
    """
    found = [f"{_named(place) or 'tensor'} {tuple(tensor.shape)}" for place, tensor in tensors_in(batch)]
    return f"{type(batch).__name__}: {', '.join(found[:6]) or 'no tensor'}{', ...' if len(found) > 6 else ''}"


def _run(twin: Twin, batch: Any, samples: int, batch_idx: int) -> Seen:
    draws = Draws()
    watch = CallWatch(draws.drawn)
    with _alone(twin), watch.watching(twin.module), draws.recording():
        twin.bare_step(with_tensors(batch, lambda _, tensor: tensor.detach().clone()), batch_idx)
        if not twin.losses:
            raise NotObservedError("the training step gives no loss: it returns none and calls no `manual_backward`")
        loss = twin.losses[0]
        if loss.numel() != 1 or loss.grad_fn is None:
            raise NotObservedError(
                f"the loss of the training step (shape {tuple(loss.shape)}) is no number with a gradient"
            )
        found = find_outputs(loss, watch.outermost, lambda tensor: has_samples(tensor, samples))
    return Seen(loss, found, draws.drawn)


@contextmanager
def _alone(twin: Twin) -> Iterator[None]:
    with undisturbed(twin.module), twin.refused_to_the_original():
        yield


def has_samples(tensor: Tensor, samples: int) -> bool:
    """Return whether a tensor may have the samples as an axis, or several rows for each sample in the first one.

    Args:
        tensor: A tensor.
        samples: Number of samples.
    """
    return bool(tensor.ndim) and (samples in tensor.shape or (len(tensor) > 0 and len(tensor) % samples == 0))


def _axis_of_length(tensor: Tensor, count: int) -> int | None:
    return next((axis for axis, length in enumerate(tensor.shape) if length == count), None)


def _pairs(seen: Seen, again: Seen) -> list[tuple[Output, Output]]:
    first, second = seen.outputs.found, again.outputs.found
    if [_key(each) for each in first] != [_key(each) for each in second] or len(seen.draws) != len(again.draws):
        raise NotObservedError(
            "the training step calls other modules, or draws other random numbers, for fewer samples"
        )
    return list(zip(first, second, strict=True))


def _key(output: Output) -> tuple[str, int, Place]:
    return output.call.name, output.call.number, output.result.place


def _place(first: Output, second: Output, count: int) -> OutputPlace:
    shapes = first.result.tensor.shape, second.result.tensor.shape
    changed = [axis for axis, (a, b) in enumerate(zip(*shapes, strict=True)) if a != b]
    axis = changed[0] if changed else _axis_of_length(first.result.tensor, count) or 0
    if len(changed) > 1 or shapes[0][axis] % count or (axis and shapes[0][axis] != count):
        raise NotObservedError(
            f"what {first.call.name or 'the module'!r} returns has shape {tuple(shapes[0])} for {count} samples, "
            f"{tuple(shapes[1])} for one less; which axis has the samples cannot be told"
        )
    return OutputPlace(*_key(first), axis, len(shapes[0]))


def _one_call(seen: Seen, again: Seen, count: int) -> tuple[str, Given] | None:
    """Return the one call whose result the outputs are, with what enters it.

    None: there is not one, it draws random numbers, or what enters it depends on weights.
    """
    calls = {id(each.call): each.call for each in seen.outputs.found}
    others = {id(each.call): each.call for each in again.outputs.found}
    if len(calls) != 1 or len(seen.outputs.found) != 1:
        return None
    (call,), (other,) = calls.values(), others.values()
    entering = (call.args, dict(call.kwargs))
    tensors, fewer = dict(tensors_in(entering)), dict(tensors_in((other.args, dict(other.kwargs))))
    if call.draws or tensors.keys() != fewer.keys() or any(each.requires_grad for each in tensors.values()):
        return None
    samples, axes = {}, {}
    for place, tensor in tensors.items():
        changed = [axis for axis, (a, b) in enumerate(zip(tensor.shape, fewer[place].shape, strict=True)) if a != b]
        if count == 2:  # all of two samples but one: too few to tell
            changed = [axis for axis, length in enumerate(tensor.shape) if length == count][:1]
        if len(changed) > 1 or (changed and tensor.shape[changed[0]] != count):
            return None
        if changed:
            samples[_argument(place)], axes[place] = place, changed[0]
    return (call.name, Given(_detached(entering), samples, axes)) if samples else None


def _argument(place: Place) -> str:
    """Return the name of an argument's tensor: that of the keyword where it is one."""
    kind, *rest = place
    return ".".join(str(key) for key in rest) if kind else "argument " + ".".join(str(key) for key in rest)


def _detached(structure: Any) -> Any:
    return with_tensors(structure, lambda _, tensor: tensor.detach())


def _named(place: Place) -> str:
    return ".".join(str(key) for key in place) or "batch"
