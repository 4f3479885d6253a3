"""Whether the samples of a kernel couple: the outputs of all samples, compared between several ways to batch them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from math import isfinite, isqrt

import torch
from torch import Tensor

from lightning_conv.kernels.reading.alone import change_alone
from lightning_conv.kernels.reading.drawn_outputs import drawn_outputs
from lightning_conv.kernels.reading.own_gradients import change_of_gradient
from lightning_conv.kernels.reading.own_samples import OwnSamples
from lightning_conv.linalg.rounding import unit_roundoff
from lightning_conv.machine.memory import blocks
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, map_inputs, sample_count, take
from lightning_conv.networks.narrowing import Narrowing

ROUNDINGS = 32
"""Factor on the measured rounding of the outputs, up to which a change is taken for rounding (ordinary networks: up to 4)."""
MOST = 2**12
"""Largest relative change, in units of eps, that is taken for rounding unless the terms of an output cancel."""
FEW = 3
"""Samples on which that rounding is measured."""
AT_ONCE = 2**22
"""Numbers of the outputs that are compared at once."""
CAST_ROUNDINGS = 8
"""Relative change, in units of the roundoff of a narrower type in which the forward computes, that is never refused."""
ENDS = 2
"""Samples at either end whose gradients are compared."""


def require_own_outputs(
    module: StatelessModule,
    inputs: Inputs,
    *,
    rows: int,
    cuts: Sequence[Sequence[slice]] = (),
    arranged: Callable[[Inputs], Inputs] = lambda inputs: inputs,
    level: float = 0.0,
    coarse: torch.dtype | None = None,
    gradients: bool = False,
    names: Sequence[str] = (),
    compared: int | None = None,
) -> Narrowing | None:
    r"""Refuse a network whose output for a sample changes with the others in its batch, with their order or with chance.

    The kernel of a pair of samples would then not be defined. All n samples are evaluated together, in the batches of the engine, each
    by itself (``outputs_alone``), and some in batches of two and three. Where they cannot be evaluated by themselves, or differ, all are
    evaluated in reverse order, without the first one, the first one alone, in groups of neighbours i // g and in groups of i mod g, where
    g is the integer part of the square root of n. Two samples that share a group in one of the two ways do not in the other, so every
    pair is separated at least once. Each way has another seed. None of these is needed where the operators of the first forward prove that
    samples are computed apart (``OwnSamples``); then batches of one, two and three show whether the forward asks for their number.

    A change is refused above sqrt(eps) of the largest output, or 8 times the unit roundoff of the type ``coarse``. In float64 a smaller
    one makes the kernel uncertified, unless it is

    .. math:: \le \min\{32 \max(r, \epsilon \max|u|), \; \epsilon \max(2^{12} \max|u|, \ell)\}

    with r, the rounding of the outputs, as measured against float32 (times 2^-29), and l the ``level``.

    With ``gradients`` those of the outputs of the first two and the last two samples are compared, too: that of a random combination of
    them together with the sum of those of each sample alone, relative to the sum of their norms. They differ where samples couple in
    the derivatives alone (a detached mean of the batch), as far as these four show it.

    Args:
        module: the network, inside ``undisturbed``.
        inputs: its n samples, converted.
        rows: largest number of samples whose forward fits into the memory. Above it the samples are taken in such batches, and what
            only a larger batch shows is not seen.
        cuts: further ways to batch the samples in their order, as the engine does.
        arranged: layout in which the engine passes the samples.
        level: size of the terms that add up to an output; where they cancel, what remains is rounding.
        coarse: a narrower type that the forward computes in, whose rounding changes with the batch; None: there is none.
        gradients: whether gradients are compared.
        names: parameters by which; none: all that are trainable.
        compared: number of outputs of each sample that are compared, drawn at random, the same of all samples; None: all of them. What
            changes a few others alone is not seen then.

    Returns:
        The largest change that is too large for rounding in float64 and too small to be refused; None: there is none.

    Raises:
        ValueError: the outputs, or their gradients, change by more than sqrt(eps).

    Cost: one forward of the n samples without a graph where its operators are known, else two, or five in 2 sqrt(n) + 4 batches where
    samples cannot be evaluated by themselves, and one for each of ``cuts``; the memory of their outputs (of those that are compared) and
    of those of one batch; a copy of the parameters in float32; with ``gradients`` five gradients of eight samples in all, two kept.
    """
    samples, ways = sample_count(inputs), 0
    proof, plainly = OwnSamples(module), partial(module.outputs, {})
    plain = module.transforms and module.before is None and not module.copies and not gradients
    columns = None if compared is None else drawn_outputs(module, inputs, compared)

    def narrowed(found: Tensor) -> Tensor:
        return found if columns is None else found[:, columns.to(found.device)]

    def evaluated(
        groups: Sequence[Tensor], evaluate: Callable[[Inputs], Tensor] = plainly
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield samples with their outputs, one batch after the other."""
        nonlocal ways
        ways += 1
        torch.default_generator.manual_seed(ways)
        for group in groups:
            for cut in blocks(len(group), rows):
                # Gradients stay enabled because the forward may differentiate inside; no parameter asks for a graph.
                given = arranged(_taken(inputs, group[cut].to(module.device)))
                yield group[cut], narrowed(evaluate(given).detach())

    order, group = torch.arange(samples), isqrt(samples)
    whole = _together(evaluated([order], proof.outputs) if plain else evaluated([order]), samples)
    judge = _Judge(module, inputs, whole, level, coarse=coarse)

    def compare(groups: Sequence[Tensor], whose: str, when: str) -> None:
        # One batch at a time: the outputs of all samples may be most of the memory that the network takes.
        changes = [judge.change_of_rows(found, whole, chosen) for chosen, found in evaluated(groups)]
        judge.take(max(changes), f"outputs {whose}", when)

    for cut in {tuple((each.start, each.stop) for each in cut) for cut in cuts}:
        if len(cut) > 1:
            parts = [order[start:stop] for start, stop in cut]
            compare(parts, "of a sample", "when its batch is a part of the samples")
    for few in (2, 3):
        if few < samples:  # a forward may ask for their number, whether it is even, for instance
            compare([order[:few]], f"of the first {few} samples", "when the rest of the batch is added")
    if plain and proof.holds:
        compare([order[:1]], "of the first sample", "when the rest of the batch is added")
    elif not judge.is_rounding(
        change_alone(
            lambda few, found: judge.change_of_rows(narrowed(found), whole, few), module, inputs, rows, arranged
        )
    ):
        compare([order[:1]], "of the first sample", "when the rest of the batch is added")
        if samples > 1:
            compare([order.flip(0)], "of a sample", "with the order of the batch")
            compare([order[1:]], "of the other samples", "when the first sample is left out")
            neighbours = [order[cut] for cut in blocks(samples, group)]
            compare(neighbours, "of a sample", "when its batch is a part of the samples")
        if group > 1:
            strided = [order[start::group] for start in range(group)]
            compare(strided, "of a sample", "when its batch is every few samples")
    ends = torch.tensor(sorted({*range(min(ENDS, samples)), *range(max(0, samples - ENDS), samples)}))
    if gradients and 1 < len(ends) <= rows:
        together, *alone = [
            arranged(_taken(inputs, some.to(module.device))) for some in (ends, *(each.reshape(1) for each in ends))
        ]
        judge.take(
            change_of_gradient(module, together, alone, names or module.trainable),
            "gradients of the outputs",
            "when samples are evaluated alone",
        )
    return judge.found


def require_repeatable(module: StatelessModule, inputs: Inputs) -> Narrowing | None:
    """Refuse a network that is random in evaluation mode; return a smaller change as ``require_own_outputs`` does.

    Raises:
        ValueError: two forward passes of one batch differ by more than sqrt(eps).

    Cost: two forwards.
    """
    # Gradients stay enabled because the forward may differentiate inside; no parameter asks for a graph.
    outputs = []
    for seed in (1, 2):
        torch.default_generator.manual_seed(seed)
        outputs.append(module.outputs({}, inputs).detach())
    judge = _Judge(module, inputs, outputs[0], 0.0, measured=False)
    change = judge.change(outputs[1], outputs[0])
    if change > judge.refused:
        raise ValueError(
            f"model: two forward passes of one batch differ by {change:.1e} (relative), so the forward is random in evaluation mode; "
            "remove what is random"
        )
    judge.note(change, "outputs of a batch", "from one forward to the next")
    return judge.found


class _Judge:
    """Compares outputs with those of all samples together, and keeps the largest change that is not refused.

    Args:
        module: the network.
        inputs: the samples.
        whole: outputs of all samples together.
        level: see ``require_own_outputs``.
        coarse: see ``require_own_outputs``.
        measured: whether rounding is measured against float32; otherwise it is eps of the largest output.
    """

    def __init__(
        self,
        module: StatelessModule,
        inputs: Inputs,
        whole: Tensor,
        level: float,
        *,
        coarse: torch.dtype | None = None,
        measured: bool = True,
    ) -> None:
        eps = torch.finfo(whole.dtype).eps
        self.found: Narrowing | None = None
        self.refused = max(eps**0.5, 0.0 if coarse is None else CAST_ROUNDINGS * unit_roundoff(coarse))
        sizes = (whole[cut].abs().nan_to_num_(0.0, 0.0, 0.0).max() for cut in _few_rows(whole) if whole.numel())
        size = max(map(float, sizes), default=0.0)
        self._scale = max(size, self.refused * level, torch.finfo(whole.dtype).tiny)
        self._rounding = self.refused  # below float64 nothing is certified
        if whole.dtype == torch.float64:
            error = _rounding(module, inputs) if measured else 0.0
            self._rounding = min(ROUNDINGS * max(error, eps * size), eps * max(MOST * size, level)) / self._scale

    def change(self, found: Tensor, expected: Tensor) -> float:
        """Return the largest change relative to the outputs; what is not finite in both is the same."""
        same = (found == expected) | (found.isnan() & expected.isnan())
        moved = (found - expected).abs().masked_fill(same, 0.0).nan_to_num(nan=float("inf"), posinf=float("inf"))
        return float(moved.max()) / self._scale if moved.numel() else 0.0

    def change_of_rows(self, found: Tensor, whole: Tensor, chosen: Tensor) -> float:
        """Return the largest change of the outputs of the ``chosen`` samples against their rows of ``whole``."""
        return max(self.change(found[cut], whole[chosen[cut].to(whole.device)]) for cut in _few_rows(found))

    def is_rounding(self, change: float) -> bool:
        """Return whether a change would be neither refused nor noted."""
        return bool(change <= min(self._rounding, self.refused))

    def take(self, change: float, what: str, when: str) -> None:
        """Refuse a relative change above sqrt(eps), and note one above rounding.

        Raises:
            ValueError: the change is above sqrt(eps).
        """
        if change > self.refused:
            raise ValueError(
                f"model: the {what} change by {change:.1e} (relative) {when}, so samples couple or the forward is random; "
                "remove what mixes samples (batch-wide attention, a sum along the batch) or what is random in evaluation mode, or use "
                'batch_norm="batch", which computes the kernel of the whole batch'
            )
        self.note(change, what, when)

    def note(self, change: float, what: str, when: str) -> None:
        """Keep a change above rounding if it is the largest so far."""
        if change > self._rounding and (self.found is None or change > self.found.unit):
            said = f"changes the {what} by {change:.1e} (relative) {when}, more than rounding explains"
            self.found = Narrowing("the network", said, "samples couple or the forward is random", None, change)


def _few_rows(outputs: Tensor) -> list[slice]:
    """Cut the rows of ``outputs`` into blocks of about ``AT_ONCE`` numbers."""
    return blocks(len(outputs), max(1, AT_ONCE // max(1, outputs.shape[1])))


def _together(parts: Iterable[tuple[Tensor, Tensor]], samples: int) -> Tensor:
    """Return the outputs of all samples as one tensor, a copy, since a network may reuse the memory of its outputs."""
    whole: Tensor | None = None
    for chosen, found in parts:
        whole = found.new_empty(samples, found.shape[1]) if whole is None else whole
        whole[chosen.to(found.device)] = found
    assert whole is not None
    return whole


def _rounding(module: StatelessModule, inputs: Inputs) -> float:
    """Estimate the largest rounding error of an output in float64 by that in float32; 0: it cannot be measured."""
    few = take(inputs, slice(FEW))
    with suppress(TypeError, RuntimeError, ValueError):  # a forward that works in one dtype only
        twin = module.twin(torch.float32)
        narrow, wide = twin.outputs({}, twin.convert(few)), module.outputs({}, few)
        error = float((narrow.detach().double() - wide.detach()).abs().max()) * 2.0**-29
        return error if isfinite(error) else 0.0
    return 0.0


def _taken(inputs: Inputs, order: Tensor) -> Inputs:
    """Return the samples with these indices; a view where they are neighbours, since no copy is needed then."""
    if len(order) and bool(
        (order == torch.arange(int(order[0]), int(order[0]) + len(order), device=order.device)).all()
    ):
        return take(inputs, slice(int(order[0]), int(order[-1]) + 1))
    return map_inputs(lambda each: each[order], inputs)
