"""``observe``: the network that a training step evaluates, seen by running the step on a copy of the module."""

from __future__ import annotations

import copy
import random as random_of_python
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_conv.callbacks.run.observed import Observed
from lightning_conv.callbacks.run.samples_of_batch import axis_of_length, count_samples, describe, is_inside, place_name
from lightning_conv.callbacks.run.twin import NotATwinError, Twin
from lightning_conv.networks.observed.calls import Call, CallWatch
from lightning_conv.networks.observed.carried import Attribute, Tensors, attributes_of, tensors_held, written
from lightning_conv.networks.observed.draws import Draws
from lightning_conv.networks.observed.frontier import Key, Output, find_outputs
from lightning_conv.networks.observed.leaves import Place, tensors_in, with_tensors
from lightning_conv.networks.observed.replay import Given, OutputPlace
from lightning_conv.networks.observed.sample_lists import lists_of_samples, shortened
from lightning_conv.networks.state import restored
from lightning_conv.networks.undisturbed import undisturbed


class NotObservedError(ValueError):
    """The training step is not a function of samples that can be measured; the message says why."""


@dataclass(frozen=True)
class Seen:
    """One run of the step."""

    loss: Tensor
    calls: list[Call]  # the outermost ones
    draws: list[Tensor]
    random: bool  # whether random numbers were drawn, those of Python and NumPy included
    written: dict[Attribute, Tensors]  # tensors that it put into attributes of its modules

    @property
    def results(self) -> dict[Key, Output]:
        """All that modules have returned."""
        calls = [each for call in self.calls for each in call.all]
        found = [Output(call, result) for call in calls for result in call.results]
        return {each.key: each for each in found}


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
    try:
        return _observed(twin, batch, count, (), batch_idx)
    except NotObservedError:
        if not (lists := lists_of_samples(batch, count)):
            raise
    return _observed(twin, batch, count, lists, batch_idx)


def _observed(twin: Twin, batch: Any, count: int, lists: Sequence[Place], batch_idx: int) -> Observed:
    """Observe the step, with lists in the batch whose entries are the samples."""
    axes = {
        place: axis
        for place, tensor in tensors_in(batch)
        if (axis := axis_of_length(tensor, count)) is not None and not is_inside(place, lists)
    }
    if count < 2 or not (axes or lists):
        raise NotObservedError(
            f"no tensor of the batch ({describe(batch)}) has one row for each of at least two samples"
        )
    seen = _run(twin, batch, batch_idx)
    fewer = with_tensors(
        batch, lambda place, tensor: tensor.narrow(axes[place], 0, count - 1) if place in axes else tensor
    )
    fewer = shortened(fewer, lists, count - 1)
    again = _without_one(twin, fewer, batch_idx, count) if count > 2 else seen
    places = _places(seen.results, again.results, count)
    outputs = find_outputs(seen.loss, seen.calls, lambda output: output.key in places)
    if not outputs.found:
        raise NotObservedError(
            "the loss of the training step depends on no output of a module that has one row per sample; does the step call "
            "`self(x)` or `self.net(x)`, and not `self.net.forward(x)`?"
        )
    of_calls = (places[each.key] for each in outputs.found)
    found = tuple(dict.fromkeys(replace(each, number=0) if each.padded else each for each in of_calls))
    names = {id(each): name for name, each in twin.module.named_parameters()}
    beside = tuple(names[id(each)] for each in outputs.beside if id(each) in names)
    random, losses = seen.random, len(twin.losses)
    carried = _carried(twin.module, seen.written, again.written, count)
    source = _source(outputs.found[0], found[0], seen) if len(found) == 1 and not found[0].padded else None
    if (call := _one_call([each.call for each in outputs.found], again, count)) is not None:
        first = replace(found[0], number=0)
        return Observed(
            count,
            call[1],
            (first,),
            call[0],
            beside=beside,
            random=random,
            source=source,
            losses=losses,
            carried=carried,
        )
    if len(seen.draws) != len(again.draws):
        raise NotObservedError("the training step draws other random numbers for fewer samples")
    drawn = {
        number: f"draw {number}"
        for number, (first, second) in enumerate(zip(seen.draws, again.draws, strict=True))
        if first.ndim and len(first) == count and len(second) == count - (count > 2)
    }
    given = Given(
        batch, {place_name(place): place for place in axes}, axes, {place_name(place): place for place in lists}
    )
    return Observed(count, given, found, None, tuple(seen.draws), drawn, beside, random, source, losses, carried)


def _without_one(twin: Twin, fewer: Any, batch_idx: int, count: int) -> Seen:
    """Run the step on all samples but one.

    Raises:
        NotObservedError: It ends in an error, so that it is no function of single samples.
        NotATwinError: It reaches back into the run.
    """
    try:
        return _run(twin, fewer, batch_idx)
    except (NotObservedError, NotATwinError):
        raise
    except Exception as error:  # the user's code may raise anything
        raise NotObservedError(
            f"the training step runs on {count} samples, but not on {count - 1} of them ({type(error).__name__}: {error})"
        ) from error


def _run(twin: Twin, batch: Any, batch_idx: int) -> Seen:
    draws = Draws()
    watch = CallWatch(draws.drawn)
    with (
        restored(twin.module),
        undisturbed(twin.module),
        twin.refused_to_the_original(),
        watch.watching(twin.module),
        draws.recording(),
    ):
        before, held = _states_outside_torch(), tensors_held(twin.module)
        twin.bare_step(with_tensors(batch, lambda _, tensor: tensor.detach().clone()), batch_idx)
        moved = before != _states_outside_torch()
        put = written(held, tensors_held(twin.module))
    if not twin.losses:
        raise NotObservedError("the training step gives no loss: it returns none and calls no `manual_backward`")
    loss = twin.losses[0]
    if loss.numel() != 1 or loss.grad_fn is None:
        raise NotObservedError(
            f"the loss of the training step (shape {tuple(loss.shape)}) is no number with a gradient"
        )
    return Seen(loss, watch.outermost, draws.drawn, bool(draws.drawn) or moved, put)


def _carried(
    model: nn.Module, seen: Mapping[Attribute, Tensors], fewer: Mapping[Attribute, Tensors], count: int
) -> dict[Attribute, Any]:
    """Return the attributes into which the step puts tensors with a row for each sample, as they were before."""
    found = [
        attribute
        for attribute, tensors in seen.items()
        if any(
            _axis(each.shape, fewer[attribute][place].shape, count) is not None
            for place, each in tensors.items()
            if place in fewer.get(attribute, {})
        )
    ]
    values = dict(attributes_of(model))
    return {attribute: copy.deepcopy(values.get(attribute)) for attribute in found}


def _states_outside_torch() -> tuple[object, ...]:
    """Return the states of the global generators of Python and NumPy."""
    state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    return random_of_python.getstate(), state["key"].tobytes(), state["pos"]


def _places(results: Mapping[Key, Output], fewer: Mapping[Key, Output], count: int) -> dict[Key, OutputPlace]:
    """Return where results have their samples, for those that have: the axis that is shorter where there is a sample less."""
    found = {}
    for key, output in results.items():
        if key not in fewer:
            continue
        shape, then = output.result.tensor.shape, fewer[key].result.tensor.shape
        axis = _axis(shape, then, count)
        if axis is not None and shape[axis] == count:
            found[key] = OutputPlace(*key, axis, len(shape), rest=(*shape[:axis], *shape[axis + 1 :]))
        elif axis == 0:
            found[key] = OutputPlace(*key, 0, len(shape), several=True)
    return _one_call_each(results, fewer, count) | found


def _one_call_each(results: Mapping[Key, Output], fewer: Mapping[Key, Output], count: int) -> dict[Key, OutputPlace]:
    """Return the results of modules that are called once for each sample, of which there are as many as there are samples."""
    calls: dict[tuple[str, Place], list[Key]] = defaultdict(list)
    for key in results:
        calls[key[0], key[2]].append(key)
    then = Counter((key[0], key[2]) for key in fewer)
    found: dict[Key, OutputPlace] = {}
    for named, keys in calls.items():
        if len(keys) == count and then[named] == count - (count > 2):
            longest = max(results[key].result.tensor.numel() for key in keys)
            found |= {key: OutputPlace(*key, padded=longest) for key in keys}
    return found


def _source(output: Output, place: OutputPlace, seen: Seen) -> OutputPlace:
    """Return where an output is made: a part of a result, such as ``.logits``, in the call inside that returns it by itself."""
    if not output.result.place:
        return place
    edge = output.result.node, output.result.number
    times = Counter(each.name for outermost in seen.calls for each in outermost.all)
    for call in _from_within(output.call):
        alone = any((each.node, each.number) == edge and not each.place for each in call.results)
        if alone and times[call.name] == 1:
            return replace(place, name=call.name, number=call.number, place=())
    return place


def _from_within(call: Call) -> Iterator[Call]:
    """Yield the calls inside a call and then itself, in the order in which they end."""
    for each in call.within:
        yield from _from_within(each)
    yield call


def _axis(shape: Sequence[int], fewer: Sequence[int], count: int) -> int | None:
    """Return the one axis along which there are as many rows for each sample; None: there is not one."""
    if len(shape) != len(fewer):
        return None
    if count == 2:  # all samples but one are too few to tell
        return next((axis for axis, length in enumerate(shape) if length == count), None)
    changed = [axis for axis, (a, b) in enumerate(zip(shape, fewer, strict=True)) if a != b]
    if len(changed) != 1:
        return None
    a, b = shape[changed[0]], fewer[changed[0]]
    return changed[0] if a * (count - 1) == b * count else None


def _one_call(calls: Sequence[Call], again: Seen, count: int) -> tuple[str, Given] | None:
    """Return the one call whose result the outputs are, with what enters it.

    None: there is not one, it draws random numbers, or what enters it depends on weights.
    """
    if len(calls) != 1:
        return None
    (call,) = calls
    everything = [each for outermost in again.calls for each in outermost.all]
    other = next((each for each in everything if (each.name, each.number) == (call.name, call.number)), None)
    if other is None:
        return None
    entering = (call.args, dict(call.kwargs))
    tensors, fewer = dict(tensors_in(entering)), dict(tensors_in((other.args, dict(other.kwargs))))
    if call.draws or tensors.keys() != fewer.keys() or any(each.requires_grad for each in tensors.values()):
        return None
    samples, axes = {}, {}
    for place, tensor in tensors.items():
        axis = _axis(tensor.shape, fewer[place].shape, count)
        if axis is None and tensor.shape != fewer[place].shape:
            return None
        if axis is not None and tensor.shape[axis] != count:
            return None
        if axis is not None:
            samples[_argument(place)], axes[place] = place, axis
    return (call.name, Given(_detached(entering), samples, axes)) if samples else None


def _argument(place: Place) -> str:
    """Return the name of an argument's tensor: that of the keyword where it is one."""
    kind, *rest = place
    return ".".join(str(key) for key in rest) if kind else "argument " + ".".join(str(key) for key in rest)


def _detached(structure: Any) -> Any:
    return with_tensors(structure, lambda _, tensor: tensor.detach())
