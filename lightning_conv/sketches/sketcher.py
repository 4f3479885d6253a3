"""``Sketcher``: the sketches of the gradients of a batch, computed on a network that was read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.kernels.engine.per_sample_jacobian import jacobian_rows
from lightning_conv.kernels.planning.request import EngineName
from lightning_conv.kernels.products.combinations import Cotangents
from lightning_conv.kernels.reading.anatomy import READ_SAMPLES, Anatomy
from lightning_conv.kernels.reading.coupling import require_own_outputs
from lightning_conv.kernels.reading.parameters import parameter_names
from lightning_conv.kernels.reading.reach import with_late_parameters
from lightning_conv.kernels.reading.read_within import read_within, reading_samples
from lightning_conv.kernels.reading.recording import LayerCall, layer_gradients, record
from lightning_conv.kernels.reading.same_uses import require_same_uses
from lightning_conv.kernels.reading.samples import require_float_inputs
from lightning_conv.losses.sample_gradients import sample_gradients
from lightning_conv.machine.memory import allowed_memory, blocks
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count, spread, take
from lightning_conv.networks.stage import staged
from lightning_conv.networks.undisturbed import undisturbed
from lightning_conv.sketches.choice import block_names, routes_of
from lightning_conv.sketches.layout import Layout
from lightning_conv.sketches.projections import sign_matrix
from lightning_conv.sketches.sides import Sides

AT_ONCE = 256 * 2**20
"""Bytes of activations and factors that a block of samples may take. It is fixed, so that a resumed run has the same blocks."""
CHECKED = 16
"""Samples of the first batch on which it is checked that samples do not couple."""


@contextmanager
def evaluated(model: nn.Module, inputs: Inputs) -> Iterator[StatelessModule]:
    """Provide a model as a function of its present weights; the model is bit for bit the same afterwards.

    Args:
        model: the user's module.
        inputs: some of its samples.

    Yields:
        The function, in eval mode.
    """
    with undisturbed(model), staged(model, inputs) as stage:
        yield stage.stateless()


def read(module: StatelessModule, names: tuple[str, ...], inputs: Inputs, engine: EngineName) -> Anatomy:
    """Read a network for its sketches, and refuse one whose samples couple.

    Args:
        module: the network, inside ``evaluated``.
        names: of the parameters.
        inputs: samples, converted.
        engine: ``"auto"`` or ``"jacobian"``, see ``ntk_gram``.

    Raises:
        ValueError: the inputs are not finite, or samples couple.
    """
    anatomy = read_within(
        module,
        names,
        reading_samples(inputs, None),
        rules=engine == "auto",
        couples=False,
        by_gradients=False,
        max_memory=None,
    )
    few = spread(inputs, CHECKED)
    require_own_outputs(
        module, few, rows=CHECKED, arranged=anatomy.arranged, level=anatomy.level, coarse=anatomy.coarse
    )
    return anatomy


def blocks_of(
    model: nn.Module, inputs: Inputs, parameters: Any, engine: EngineName
) -> tuple[list[tuple[str, ...]], dict[str, torch.Size]]:
    """Return the parameters of a model in blocks, and the shapes of all of them.

    Args:
        model: the model.
        inputs: some of its samples.
        parameters: see ``ntk_gram``.
        engine: see ``ntk_gram``.
    """
    require_float_inputs(inputs)
    with evaluated(model, inputs) as module:
        names = parameter_names(module, parameters)
        shapes = {name: module.parameters[name].shape for name in names}
        return block_names(read(module, names, module.convert(inputs), engine), shapes), shapes


class Sketcher:
    """Computes sketches on one network at its present weights. Construct it inside ``evaluated``.

    Args:
        module: the network.
        layout: of the sketches.
        seed: of the projections.
        inputs: the samples on which the network is read, the first of those to come.
        loss_fn: the loss whose gradients are sketched; None: random combinations of the outputs.
        engine: see ``ntk_gram``.
    """

    def __init__(
        self,
        module: StatelessModule,
        layout: Layout,
        seed: int,
        inputs: Inputs,
        loss_fn: object | None,
        engine: EngineName,
    ) -> None:
        self.module, self.layout, self.seed, self.loss_fn = module, layout, seed, loss_fn
        names = tuple(name for block in layout.blocks for name in block.names)
        self._like = next(module.parameters[name] for name in names)
        self._shapes = {name: module.parameters[name].shape for name in names}
        converted = module.convert(inputs)
        self.anatomy = read(module, names, converted, engine)
        self._tracked = {name: module.parameters[name] for name in self.anatomy.tracked}
        result = module.call({}, take(converted, slice(1)))
        assert isinstance(result, Tensor)
        alone = len(result) == 1 and result.numel() == self.anatomy.outputs
        self._outputs = tuple(result.shape[1:]) if alone else (self.anatomy.outputs,)
        self._sides = [Sides.draw(block, seed, layout.groups, self._like) for block in layout.blocks]
        calls = self._forward(take(converted, slice(READ_SAMPLES)))[1]
        self._routes = routes_of(self.anatomy, layout.blocks, self._shapes, calls)
        self._rows = self._rows_at_once()

    def sketch(self, inputs: Inputs, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the sketches of a batch.

        Args:
            inputs: its samples.
            targets: their targets; None: for random combinations of the outputs.

        Returns:
            The sketches (n, K) on the CPU, in the type of the evaluation, with a largest entry in [1/2, 1), and the exponents e
            (n,) of the powers of two by which they must be multiplied.

        Raises:
            ValueError: an input or a gradient is not finite.

        Cost: one forward and one backward pass, or one backward for each group where outputs are combined.
        """
        require_float_inputs(inputs)
        inputs = self.module.convert(inputs)
        # A parameter that no earlier sample reached may be reached now.
        allowed = allowed_memory(None, self.module.device)
        self.anatomy = with_late_parameters(self.anatomy, self.module, [inputs], allowed)
        parts = [
            self._block(take(inputs, rows), None if targets is None else targets[rows])
            for rows in blocks(sample_count(inputs), self._rows)
        ]
        return torch.cat([each for each, _ in parts]), torch.cat([each for _, each in parts])

    def _rows_at_once(self) -> int:
        """Return how many samples are taken at once, from what is known before the first one: a resumed run has to find the same."""
        anatomy, width = self.anatomy, self._like.element_size()
        formed = sum(self._shapes[name].numel() for name in (*anatomy.general, *anatomy.unused))
        numbers = 2 * anatomy.gradient_numel + 2 * formed + 3 * self.layout.size
        numbers += sum(route.numel() for route in self._routes)
        return max(1, AT_ONCE // max(1, 2 * anatomy.forward_bytes + width * numbers))

    def _block(self, inputs: Inputs, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        samples, layout = sample_count(inputs), self.layout
        outputs, calls = self._forward(inputs)
        whole = self._like.new_zeros(samples, layout.size)
        shift = torch.zeros(samples, dtype=torch.float64, device=whole.device)
        if self.loss_fn is not None:
            assert targets is not None
            shaped = outputs.detach().reshape(samples, *self._outputs)
            slopes = sample_gradients(self.loss_fn, shaped, targets).reshape(samples, -1)
            # Scaled, so that tiny ones are not lost in the backward pass.
            combined = Cotangents(slopes, self.module.device)
            assert combined.scales is not None
            shift = torch.frexp(combined.scales).exponent.to(torch.float64) - 1
            cotangent = combined.taken(slice(0, 1), slice(0, samples), self._like)[0]
            self._add(whole, inputs, outputs, calls, cotangent, slice(0, layout.groups), keep=False)
        else:
            for number in range(layout.groups):
                signs = sign_matrix(self.seed, f"outputs/{number}", 1, outputs.shape[1]).to(self._like)
                keep = number + 1 < layout.groups
                self._add(
                    whole, inputs, outputs, calls, signs.expand(samples, -1), slice(number, number + 1), keep=keep
                )
        return _normalised(whole.cpu(), shift.cpu())

    def _forward(self, inputs: Inputs) -> tuple[Tensor, list[LayerCall]]:
        if not self.anatomy.sites:
            with torch.no_grad():
                return self.module.outputs({}, inputs), []
        outputs, recorder = record(self.module, self.anatomy.arranged(inputs), self._tracked)
        require_same_uses(self.anatomy, outputs, recorder)
        return outputs, recorder.calls

    def _add(
        self,
        whole: Tensor,
        inputs: Inputs,
        outputs: Tensor,
        calls: list[LayerCall],
        cotangent: Tensor,
        groups: slice,
        *,
        keep: bool,
    ) -> None:
        """Write the sketches by these groups of the gradients of ``cotangent`` . u into ``whole``."""
        samples, layout = len(whole), self.layout
        wanted = sorted({index for route in self._routes for index in route.calls})
        found = layer_gradients(outputs, cotangent, [calls[index] for index in wanted], keep=keep)
        gradients = {
            index: outputs.new_zeros(calls[index].shape) if each is None else each
            for index, each in zip(wanted, found, strict=True)
        }
        general: Mapping[str, Tensor] = {}
        if self.anatomy.general:
            general = jacobian_rows(self.module, tuple(self.anatomy.general), inputs, cotangent[None])
        for route, sides, place in zip(self._routes, self._sides, layout.places, strict=True):
            sketch = route.sketch(calls, gradients, general, samples, sides.of_groups(groups))
            if sketch is None:
                continue
            if layout.is_shared(route.block):
                whole[:, place] = sketch.detach().reshape(samples, -1)
                continue
            for number in range(groups.start, groups.stop):
                start = layout.group(number).start
                own = sketch[:, number - groups.start if sketch.shape[1] > 1 else 0]
                whole[:, start + place.start : start + place.stop] = own.detach().reshape(samples, -1)


def _normalised(rows: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows with a largest entry in [1/2, 1), and the exponents of what they were divided by."""
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    if not bool(torch.isfinite(largest).all()):
        number = int((~torch.isfinite(largest)).nonzero()[0])
        raise ValueError(
            f"model: the gradient of sample {number} of a block contains NaN or infinity; check the network, its samples and the loss"
        )
    # x = m 2^e with 1/2 <= m < 1, so that x / m is 2^e, without rounding.
    mantissa, exponents = torch.frexp(largest)
    scaled = rows / torch.where(largest > 0, largest / mantissa, 1.0)[:, None]
    return scaled, torch.where(largest > 0, exponents + shift.to(exponents.dtype), 0).to(torch.int16)
