"""``observe``: the network that a training step evaluates, seen by running the step on a copy of the module."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_conv.callbacks.run.step.observed import Observed
from lightning_conv.callbacks.run.step.samples_of_batch import (
    axis_of_length,
    count_samples,
    describe,
    is_inside,
    place_name,
)
from lightning_conv.callbacks.run.step.seeking import NotObservedError, Seen, run_step, seek, steps_in_the_next
from lightning_conv.callbacks.run.twin import NotATwinError, Twin
from lightning_conv.networks.observed.calls import Call
from lightning_conv.networks.observed.carried import Attribute, Tensors, attributes_of
from lightning_conv.networks.observed.frontier import Key, Output, find_outputs
from lightning_conv.networks.observed.leaves import Place, tensors_in, with_tensors
from lightning_conv.networks.observed.replay import Given, OutputPlace
from lightning_conv.networks.observed.sample_lists import chosen, lists_of_samples


def observe(twin: Twin, batch: Any, samples: int | None = None) -> Observed:
    """Observe which function of the samples the training step evaluates: that whose loss the watched optimizer of the copy minimises.

    The step is run on a copy of the module, in eval mode, in float32 at least, on the batch and on all of its samples but one; what has a
    row less then has the samples as an axis.

    An optimizer may step in some batches only: the copy is told of the batches and steps that follow, up to ``BATCHES``, until it does.

    Args:
        twin: A copy of the module, in eval mode.
        batch: A batch as the training step gets it.
        samples: Number n of its samples; None: the most common length of its tensors.

    Raises:
        NotObservedError: There is no such function: the step gives no loss, or no module has outputs with one row per sample.

    Cost: two forward passes of the step; up to ``BATCHES + 1`` where the optimizer does not step in the first batch.
    """
    count = samples or count_samples(batch)
    try:
        return _observed(twin, batch, count, ())
    except NotObservedError:
        if not (lists := lists_of_samples(batch, count)):
            raise
    return _observed(twin, batch, count, lists)


def _observed(twin: Twin, batch: Any, count: int, lists: Sequence[Place]) -> Observed:
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
    step = twin.global_step
    seen = seek(twin, batch)
    twin.put_back(seen.before)
    fewer = with_tensors(
        batch, lambda place, tensor: tensor.narrow(axes[place], 0, count - 1) if place in axes else tensor
    )
    fewer = chosen(fewer, lists, range(count - 1))
    again = _without_one(twin, fewer, seen.batch_idx, count) if count > 2 else seen
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
    given = Given(
        batch, {place_name(place): place for place in axes}, axes, {place_name(place): place for place in lists}
    )
    observed = Observed(
        count,
        given,
        found,
        None,
        beside=tuple(names[id(each)] for each in outputs.beside if id(each) in names),
        random=seen.random,
        sources=()
        if any(each.padded for each in found)
        else tuple(_source(*each, seen) for each in zip(outputs.found, found, strict=True)),
        aside=seen.aside,
        batch_idx=seen.batch_idx,
    )
    call = _one_call([each.call for each in outputs.found], again, count)
    always = call is not None or steps_in_the_next(twin, batch, seen, step)
    twin.put_back(seen.before)
    twin.meant = seen.numbers if twin.seeks else ()
    carried = _carried(twin.module, seen.written, again.written, count)
    observed = replace(observed, carried=carried, watched=twin.watched, meant=twin.meant)
    if call is not None:
        return replace(observed, given=call[1], outputs=(replace(found[0], number=0),), call=call[0])
    if len(seen.draws) != len(again.draws):
        raise NotObservedError("the training step draws other random numbers for fewer samples")
    drawn = {
        number: f"draw {number}"
        for number, (first, second) in enumerate(zip(seen.draws, again.draws, strict=True))
        if first.ndim and len(first) == count and len(second) == count - (count > 2)
    }
    if not always:
        counts = {name: value for name, value in vars(twin.module).items() if type(value) is int}
        observed = replace(observed, at_step=step + seen.batch_idx, counts=counts)
    return replace(observed, draws=tuple(seen.draws), drawn=drawn)


def _without_one(twin: Twin, fewer: Any, batch_idx: int, count: int) -> Seen:
    """Run the step on all samples but one.

    Raises:
        NotObservedError: It ends in an error, so that it is no function of single samples.
        NotATwinError: It reaches back into the run.
    """
    try:
        seen = run_step(twin, fewer, batch_idx)
    except (NotObservedError, NotATwinError):
        raise
    except Exception as error:  # the user's code may raise anything
        raise NotObservedError(
            f"the training step runs on {count} samples, but not on {count - 1} of them ({type(error).__name__}: {error})"
        ) from error
    if seen is None:
        raise NotObservedError(f"the training step gives a loss on {count} samples, but not on {count - 1} of them")
    return seen


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
