"""``walk``: one pass over the training set, on which network, head and training step are compared sample by sample."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.callbacks.guard.certify.copies import frozen_twin, last_moment
from lightning_conv.callbacks.guard.certify.features_compared import (
    closest_pair,
    columns_rounding,
    directions,
    largest_of,
    other_features,
    project,
    sizes_of,
)
from lightning_conv.callbacks.guard.certify.gradients_compared import beside_the_outputs
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.call import NotAFunctionError, Seen, StepCall
from lightning_conv.callbacks.run.data.sample_keys import batch_keys, sample_keys
from lightning_conv.callbacks.run.twin import Twin
from lightning_conv.losses.of_outputs import ULPS, Point, difference, evaluate, rounding
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.head_probe import departure, same
from lightning_conv.networks.hidden_features import features_of
from lightning_conv.networks.inputs import Inputs, input_tensors, map_inputs
from lightning_conv.networks.watched import as_rows, entering, watched_forward

NO_GRADIENT = (
    "once the trunk is frozen the loss of the training step has no gradient, so the head cannot be trained (reentrant activation "
    "checkpoints around the head do that: use_reentrant=False)"
)
SAME = 1e-12  # relative difference of projections in float64 up to which they are those of equal features


@dataclass(frozen=True)
class Walk:
    """What one pass over the training set showed."""

    own: str = ""  # where the network's output is not W h + b
    step: str = ""  # where the training step's loss is not what it should be
    frozen: str = ""  # why the head cannot be trained on a frozen trunk
    later: str = ""  # where it is another one at the run's last step and epoch
    features: str = ""  # where the training step computes other features
    rounded: str = ""  # where the head's product is rounded to less than float32 in the training step
    keys: tuple[bytes, ...] | None = None  # of all samples; None: they have none
    outputs: Tensor | None = None  # of the network, in float64
    type: torch.dtype | None = None  # of the features in the step
    rows: tuple[bytes, ...] = ()  # hashes of the features that the step computes, of all samples
    projected: Tensor | None = None  # the features, ``project``; None without the step
    spread: Tensor | None = None  # by how much rounding may change these, (DIRECTIONS,)
    sizes: Tensor | None = None  # of the columns by which they were divided
    varies: bool = False  # whether features in the run's precision may be others in another step; False if not asked


def walk(view: GuardView, *, with_step: bool, varying: bool = False) -> Walk:
    """Call the network in float64 on every training sample, and the training step of a copy on every batch.

    Args:
        view: The run.
        with_step: Whether to run the step, with the trunk frozen as in phase 2.
        varying: Whether to ask, with the step, if features vary with a sample's place in a batch.

    Returns:
        All ranks get the same.

    Cost: a pass in float64, a hash of all samples, and with the step five passes in the run's precision, with a backward pass through the
        head, and a hash of all features; to ask whether they vary up to two more.
    """
    looked = _Look(view, with_step, varying)
    found = view.data.collect(looked)
    first = {
        name: next((said for each in found if (said := getattr(each, name))), "")
        for name in ("own", "step", "frozen", "later", "features", "rounded")
    }
    known = all(each.keys is not None for each in found)
    outputs = [each.outputs for each in found if each.outputs is not None]
    projected = [each.projected for each in found if each.projected is not None]
    spreads = [each.spread for each in found if each.spread is not None]
    return Walk(
        **first,
        keys=tuple(key for each in found for key in each.keys or ()) if known else None,
        outputs=torch.cat(outputs) if len(outputs) == len(found) else None,
        type=next((each.type for each in found if each.type is not None), None),
        rows=tuple(row for each in found for row in each.rows),
        projected=torch.cat(projected) if len(projected) == len(found) else None,
        spread=torch.stack(spreads).amax(0) if spreads else None,
        sizes=looked.sizes,
        varies=any(each.varies for each in found),
    )


class _Look:
    def __init__(self, view: GuardView, with_step: bool, varying: bool) -> None:
        self._varying = varying
        self._view, self._module = view, StatelessModule(view.network, dtype=torch.float64)
        self._twin = frozen_twin(view) if with_step else None
        self._later = frozen_twin(view, *last_moment(view.trainer)) if with_step else None
        self._own = StatelessModule(view.network)
        self.sizes = sizes_of(view.data.collect(self._largest)) if with_step else None
        self._number = 0

    def _largest(self, inputs: Inputs, _: Any) -> Tensor:
        return largest_of(features_of(self._own, self._view.head, inputs))

    def __call__(self, inputs: Inputs, batch: Any) -> Walk:
        view, head = self._view, self._view.head.module
        seen: list[tuple[Tensor, Tensor, list[Tensor]]] = []

        def record(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            weights = [each.detach() for each in (layer.weight, layer.bias) if isinstance(each, Tensor)]
            seen.append((as_rows(entering(args, kwargs)), as_rows(output.detach().clone()), weights))

        result = watched_forward(self._module, inputs, [head.register_forward_hook(record, with_kwargs=True)])
        keys = batch_keys(view.loss.with_targets(batch), inputs)
        kept = None if keys is None else tuple(keys)
        if len(seen) != 1 or not isinstance(result, Tensor):
            return Walk(f"the network calls {view.head_name!r} {len(seen)} times on some training samples", keys=kept)
        features, output, weights = seen[0]
        own = departure(output, features, *weights)
        if not own and view.head.last and not torch.equal(result.reshape(output.shape), output):
            own = f"the network's result is not that of {view.head_name!r} on some training samples"
        found = Walk(own, keys=kept, outputs=result.double().cpu())
        return found if self._twin is None else self._of_step(self._twin, inputs, batch, features, result, found)

    def _of_step(self, twin: Twin, inputs: Inputs, batch: Any, exact: Tensor, result: Tensor, found: Walk) -> Walk:
        view = self._view
        try:
            made = StepCall(twin, view.head_name, batch, self._number).observe()
        except NotAFunctionError:
            with torch.enable_grad():
                loss = twin.step(batch, self._number)
            if loss is None or loss.requires_grad:
                raise
            return replace(found, frozen=NO_GRADIENT)
        later = self._unlike_later(made, batch)
        coarse = features_of(self._own, view.head, inputs)
        rounding = 8 * (coarse.double() - exact).abs().amax(0)
        unlike = other_features(made.features, exact, rounding)
        assert self.sizes is not None
        width = exact.shape[-1]
        rounded = columns_rounding(exact, rounding, torch.finfo(made.features.dtype).eps)
        rounded = rounded.reshape(-1, width).amax(0).cpu()
        found = replace(
            found,
            step=other_value(view, batch, made, result.shape[1:]) or beside_the_outputs(view, twin, made),
            later=later,
            features=unlike,
            rounded=_rounded(twin.module.get_submodule(view.head_name), made),
            type=made.features.dtype,
            rows=tuple(sample_keys(((made.features,), {})) or ()),
            projected=project(exact, self.sizes).cpu(),
            varies=self._varying and (not same(made.features, coarse) or self._varies(inputs, coarse)),
            spread=((rounded / self.sizes).square() @ directions(width).square()).sqrt(),
        )
        self._number += 1
        return found

    def _varies(self, inputs: Inputs, coarse: Tensor) -> bool:
        """Return whether some bit of the features is another one in the reverse order, or where half of the samples are left out."""
        if self._view.data.sampling.repeats:
            return False
        n = len(input_tensors(inputs)[0])
        rows = coarse.reshape(n, -1, coarse.shape[-1])
        for chosen in ([*reversed(range(n))], [*range((n + 1) // 2)]):
            some = map_inputs(operator.itemgetter(chosen), inputs)
            made = features_of(self._own, self._view.head, some).reshape(len(chosen), -1, coarse.shape[-1])
            if not torch.equal(made, rows[chosen]):
                return True
        return False

    def _unlike_later(self, made: Seen, batch: Any) -> str:
        """Return whether the loss of a batch is another function of the outputs at the run's last step and epoch."""
        assert self._later is not None
        (slope,) = torch.autograd.grad(made.loss, made.outputs, retain_graph=True)
        now = Point.of(made.outputs, made.loss, slope)
        call = StepCall(self._later, self._view.head_name, batch, self._number)

        def then(u: Tensor) -> Tensor:
            return call(u.to(now.outputs))

        if not now.finite or not (apart := difference([now], then)):
            return ""
        return f"the loss of the training step changes during the run ({apart}, compared with step {self._later.global_step})"


def _rounded(head: nn.Module, made: Seen) -> str:
    """Return whether the head's product, or the loss, is computed in less than float32, as under an autocast of the user's own."""
    if (kind := made.outputs.dtype).itemsize < 4:
        return f"the head computes in {kind} in the training step"
    if made.loss.dtype.itemsize < 4:
        return f"the loss of the training step is computed in {made.loss.dtype}"
    weights = [each.detach() for each in (head.weight, head.bias) if isinstance(each, Tensor)]
    said = departure(as_rows(made.outputs.detach()), made.features.detach(), *weights)
    return said and f"the head's product is rounded to less than {kind} in the training step: its {said}"


def lost_in_precision(walked: Walk, *, rank: bool) -> str:
    """Return which two samples have features that the run's own precision does not tell apart, or that it is one of 16 bits.

    Features are equal there bit for bit, or so close that rounding makes them equal at some places of a batch: within a 64th of what
    ``columns_rounding`` allows.

    Args:
        walked: A pass over the training set with the step.
        rank: Whether rank n is claimed; if not, features that are equal in float64 as well are no matter: the targets are known to be.

    Returns:
        Empty where all are told apart.
    """
    if walked.type is not None and walked.type.itemsize < 4:
        return f"the training step computes features in {walked.type}, and the certificate is about those in float64"
    if walked.projected is None or len(walked.rows) != len(walked.projected):
        return ""
    first: dict[bytes, int] = {}
    rounded = SAME * float(walked.projected.abs().max())
    for place, row in enumerate(walked.rows):
        other = first.setdefault(row, place)
        apart = float((walked.projected[other] - walked.projected[place]).abs().max())
        if other != place and (rank or apart > rounded):
            return _alike(other, place)
    close = closest_pair(walked.projected, walked.spread / ULPS) if rank and walked.spread is not None else None
    return "" if close is None else _alike(*close)


def _alike(one: int, other: int) -> str:
    return (
        f"in the run's own precision the features of samples {one} and {other} are equal, or may be, so what is certified in float64 is "
        "not about the features that the head is trained on"
    )


def other_value(view: GuardView, batch: Any, made: Seen, shape: tuple[int, ...]) -> str:
    """Return how the loss of a training step differs from ``loss_fn`` of the same outputs; empty if it does not, or is not known.

    Args:
        view: The run.
        batch: The batch.
        made: The step.
        shape: Shape of the network's result for one sample.
    """
    loss = view.loss
    if loss.loss_fn is None or not view.head.last:
        return ""
    targets = loss.targets_of(batch)

    def named(u: Tensor) -> Tensor:
        return loss.of_step(u.reshape(len(u), *shape), targets)

    u = made.outputs.detach()
    own, exact = evaluate(named, u), evaluate(named, u.double())
    stepped = float(made.loss.detach())
    if not exact.finite or abs(stepped - own.value) <= rounding(own, exact, own.steepness):
        return ""
    return (
        f"the training step minimises something else than the mean of {loss.kind.name} ({stepped:.9g} instead of {own.value:.9g} on a "
        f"batch at step {view.trainer.global_step})"
    )
