"""Evaluation of a module as a pure function, without side effects.

All of this project evaluates networks through ``StatelessModule``. Parameters and buffers are passed in from outside
(``torch.func.functional_call``), so gradients, buffers, flags and random numbers of the run stay bit for bit what they
were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_conv.arguments import require_option
from lightning_conv.networks.aside import aside
from lightning_conv.networks.batch_norm import (
    BatchStatistics,
    adopt_statistics,
    batch_statistics,
    places_of_statistics,
    refuse_batch_statistics,
)
from lightning_conv.networks.equal_numbers import equal_numbers
from lightning_conv.networks.inputs import Inputs, input_tensors, map_inputs
from lightning_conv.networks.outputs import described
from lightning_conv.networks.parameter_names import aliases_of, places_of

BatchNormMode: TypeAlias = Literal["eval", "frozen", "batch"]


class StatelessModule:
    """A module as a function ``outputs(parameters, inputs)`` of detached parameters and buffers.

    The ``parameters`` share memory with the model where no conversion is needed, and are never written to. The buffers
    are cloned, so a forward that writes to buffers writes to the clones. A complex parameter is a real one of real and
    imaginary parts, (..., 2), since real outputs have derivatives by both. Call it only inside ``undisturbed(model)``.

    Args:
        model: any module whose outputs are one tensor with the samples along dimension 0.
        dtype: floating type of the evaluation; ``None`` keeps the model's own (at least float32).
        batch_norm: source of the statistics of BatchNorm layers. ``"eval"``: the running statistics. ``"frozen"``: the
            statistics of ``statistics_of``, held constant. This is the function that train mode computes on exactly this batch,
            without the derivative through mean and variance. ``"batch"``: the statistics of the batch that is evaluated, with
            derivatives through them. This is train-mode BatchNorm, with everything else in eval mode; it couples the
            samples.
        statistics_of: the batch that provides the statistics, or what another evaluation of the module at the same weights has found
            of it (``statistics``), in place of a forward; required for ``"frozen"``.
        before: called before each call, such as to put back what the forward writes to attributes.
        copies: whether each call gets its own copies of the parameters, for a forward that writes to them.

    Attributes:
        statistics: those of ``statistics_of``, with ``"frozen"`` where there are BatchNorm layers; otherwise None.

    Raises:
        ValueError: ``batch_norm`` is unknown; a BatchNorm layer has no running statistics (unless ``"batch"``), or is called twice
            per forward under ``"frozen"``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        batch_norm: BatchNormMode = "eval",
        statistics_of: Inputs | BatchStatistics | None = None,
        before: Callable[[], None] | None = None,
        copies: bool = False,
    ) -> None:
        require_option("batch_norm", batch_norm, get_args(BatchNormMode))
        self.model, self.batch_norm, self.before, self.copies = model, batch_norm, before, copies
        numbers = [p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point() or p.is_complex()]
        self.device = numbers[0].device if numbers else torch.device("cpu")
        kinds = [p.dtype.to_real() for p in model.parameters() if p.is_floating_point() or p.is_complex()]
        self.model_dtype = kinds[0] if kinds else torch.float32
        self.dtype = dtype or (torch.float64 if self.model_dtype == torch.float64 else torch.float32)
        self.strict = dtype is not None
        """Whether the outputs must be of this type as the forward returns them. A type that was asked for is kept to; where it is the
        model's own, outputs that the forward converts are converted back, and what was rounded is known from ``NarrowWatch``."""
        if self.device.type == "mps":
            self.device = torch.device("cpu")  # Apple's GPUs have no float64, in which all sums are taken
        self.parameters = {name: _as_real(self._convert(p.detach())) for name, p in model.named_parameters()}
        self._complex = {name for name, p in model.named_parameters() if p.is_complex()}
        self.aliases = aliases_of(model)
        """Every name of a parameter -> the one under which ``parameters`` has it; tied weights have several."""
        self.trainable = tuple(name for name, p in model.named_parameters() if p.requires_grad)
        self.buffers = {name: self._convert(b.detach()).clone() for name, b in model.named_buffers()}
        self._places = places_of(model)
        self.lone: set[torch.Size] = set()  # shapes of results for one sample that lack its dimension, as was verified
        self.statistics: BatchStatistics | None = None
        if batch_norm != "batch":
            refuse_batch_statistics(model)
        if batch_norm == "frozen" and any(isinstance(module, _BatchNorm) for module in model.modules()):
            if statistics_of is None:
                raise ValueError(
                    'statistics_of: batch_norm="frozen" needs the batch that gives the statistics, got None'
                )
            if isinstance(statistics_of, BatchStatistics):
                self.buffers |= {name: self._convert(each).clone() for name, each in statistics_of.buffers.items()}
                self.statistics = statistics_of
                return
            # Not under no_grad: the forward may differentiate inside. No parameter requires a graph.
            made = adopt_statistics(model, lambda: self.call({}, self.convert(statistics_of)))
            names = {self._places[place] for place in places_of_statistics(model)}
            self.statistics = BatchStatistics({name: self.buffers[name].clone() for name in names}, made)

    def again(self, *, dtype: torch.dtype | None, batch_norm: BatchNormMode) -> StatelessModule:
        """Return the present module as a function anew, called in the same way."""
        return StatelessModule(self.model, dtype=dtype, batch_norm=batch_norm, before=self.before, copies=self.copies)

    def twin(self, dtype: torch.dtype) -> StatelessModule:
        """Return the same function in another precision, with the same statistics, which are not computed again."""
        mode: BatchNormMode = "batch" if self.batch_norm == "batch" else "eval"
        twin = self.again(dtype=dtype, batch_norm=mode)
        twin.batch_norm, twin.strict, twin.lone = self.batch_norm, False, self.lone
        twin.buffers = {name: twin._convert(buffer).clone() for name, buffer in self.buffers.items()}
        return twin

    def _convert(self, tensor: Tensor) -> Tensor:
        if tensor.is_inference():  # autograd cannot save a tensor made under inference_mode, as in a validation loop
            tensor = tensor.clone()
        if tensor.is_complex():
            return tensor.to(self.device, self.dtype.to_complex())
        return tensor.to(self.device, self.dtype) if tensor.is_floating_point() else tensor.to(self.device)

    @contextmanager
    def on_copies(self) -> Iterator[Callable[[], bool]]:
        """Evaluate on one set of copies of the parameters inside this context, unless every call has its own.

        Yields:
            A function that says afterwards whether a forward has written to the copies.
        """
        own, changed = self.parameters, False
        if not self.copies:
            self.parameters = {name: tensor.clone() for name, tensor in own.items()}
        try:
            yield lambda: changed
        finally:
            if not self.copies:
                changed = not all(equal_numbers(own[name], tensor) for name, tensor in self.parameters.items())
            self.parameters = own

    def convert(self, inputs: Inputs) -> Inputs:
        """Return ``inputs`` on the device and, where they are floating, in the type of this evaluation.

        Raises:
            TypeError: A tensor is on the device ``meta``, and the module is not.
        """
        if self.device.type != "meta" and any(each.is_meta for each in input_tensors(inputs)):
            raise TypeError("inputs: a tensor is on the device meta, where it has no numbers; pass samples")
        return map_inputs(lambda tensor: self._convert(tensor.detach()), inputs)

    def call(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> object:
        """Return the raw result of the model with ``parameters`` in place of its own."""
        if self.before is not None:
            self.before()
        given = {**self.buffers, **self.parameters, **parameters}
        if self.copies:
            given = {name: tensor.clone() for name, tensor in given.items()}
        given |= {name: torch.view_as_complex(given[name]) for name in self._complex}
        state = {place: given[name] for place, name in self._places.items()}
        with batch_statistics(self.model) if self.batch_norm == "batch" else nullcontext():
            args: tuple[Any, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
            args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (args, {})
            model = self.model
            if isinstance(model, torch.jit.ScriptModule):  # refused by torch, but only as the outermost module
                model, state = _Around(model), {f"module.{place}": tensor for place, tensor in state.items()}
            with _said_type(model, self.dtype):
                return functional_call(model, state, args, kwargs, tie_weights=False)

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """Compute the network outputs u, shape (n, C): one row per sample, with all dimensions after the first flattened.

        A result for one sample may lack the dimension of the samples, as after ``squeeze()``, if two copies of the sample give two
        such results in rows.

        Raises:
            TypeError: the result is not one floating tensor, or not of this evaluation's type although that was asked for.
            ValueError: dimension 0 of the result is not the number of samples.
        """
        result = self.call(parameters, inputs)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            raise TypeError(f"model: returned {described(result)}")
        if result.dtype != self.dtype:
            if self.strict:
                raise TypeError(
                    f"model: evaluated in {self.dtype} but returned {result.dtype}; remove the cast inside forward, or choose "
                    "another precision"
                )
            result = result.to(self.dtype)
        samples = input_tensors(inputs)[0].shape[0]
        if result.ndim == 0 or result.shape[0] != samples:
            if samples == 1 and self._drops_samples(parameters, inputs, result):
                return result.reshape(1, -1)
            raise ValueError(
                f"model: returned shape {tuple(result.shape)} for {samples} samples; dimension 0 must index the samples"
            )
        return result.reshape(samples, -1)

    def _drops_samples(self, parameters: Mapping[str, Tensor], inputs: Inputs, result: Tensor) -> bool:
        """Return whether the result for one sample is a row that lacks its dimension: two copies of the sample give two such rows.

        Their numbers are compared, too, unless statistics of the batch enter them or a transform of ``torch.func`` hides them.
        """
        if result.shape not in self.lone:
            with aside(transforms=False):
                own = {name: value.detach() for name, value in parameters.items()}
                pair = self.call(own, map_inputs(lambda tensor: torch.cat([tensor, tensor]).detach(), inputs))
            rows = isinstance(pair, Tensor) and pair.ndim > 0 and len(pair) == 2 and pair.numel() == 2 * result.numel()
            if not (rows and isinstance(pair, Tensor)):
                return False
            if self.batch_norm != "batch" and torch._C._functorch.peek_interpreter_stack() is None:
                each = pair.detach().to(self.dtype).reshape(2, -1)
                near = torch.finfo(result.dtype).eps ** 0.5 * float(each.abs().max()) if each.numel() else 0.0
                if not bool(((each - result.detach().reshape(1, -1)).abs() <= near).all()):
                    return False
            self.lone.add(result.shape)
        return True


@contextmanager
def _said_type(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let modules that remember the type of their weights, as LightningModules do for ``self.dtype``, name that of the evaluation.

    Parameters tell it anyway; a forward that asks the module, as in ``x.to(self.dtype)``, is the same network.
    """
    held = [(vars(m), kind) for m in model.modules() if isinstance(kind := vars(m).get("_dtype"), torch.dtype)]
    said = [(values, kind) for values, kind in held if kind.is_floating_point]
    for values, _ in said:
        values["_dtype"] = dtype
    try:
        yield
    finally:
        for values, kind in said:
            values["_dtype"] = kind


class _Around(nn.Module):
    """A module that calls another one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
