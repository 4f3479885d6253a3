"""Evaluation of a module as a pure function, without side effects.

All of this project evaluates networks through ``StatelessModule``. Parameters and buffers are passed in from outside
(``torch.func.functional_call``), so gradients, buffers, flags and random numbers of the run stay bit for bit what they
were.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_conv.networks.aside import aside
from lightning_conv.networks.batch_norm import batch_statistics
from lightning_conv.networks.dense_gradients import ROWS_OF_BAGS, dense_gradients
from lightning_conv.networks.outputs import described
from lightning_conv.networks.precision import full_float32
from lightning_conv.networks.recomputation import no_recomputation

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
BatchNormMode: TypeAlias = Literal["eval", "frozen", "batch"]


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Apply ``function`` to every tensor of ``inputs``: a tensor, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: function(value) for key, value in inputs.items()}
    return tuple(function(value) for value in inputs)


def input_tensors(inputs: Inputs) -> list[Tensor]:
    """Return the tensors of ``inputs`` in order.

    Raises:
        TypeError: ``inputs`` contains something else, or nothing.
    """
    if isinstance(inputs, Tensor):
        return [inputs]
    values: Sequence[object] = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors or len(tensors) != len(values):
        kinds = ", ".join(type(value).__name__ for value in values) or "nothing"
        raise TypeError(f"inputs: expected a tensor, a tuple or a mapping of tensors, got {kinds}; pass tensors only")
    return tensors


def sample_count(inputs: Inputs) -> int:
    """Return the number of samples n, the common length of dimension 0.

    Raises:
        ValueError: the tensors differ in length, or there is no sample.
    """
    tensors = input_tensors(inputs)
    lengths = {int(tensor.shape[0]) if tensor.ndim else 0 for tensor in tensors}
    if len(lengths) != 1 or 0 in lengths:
        flat = all(tensor.ndim == 1 and not tensor.is_floating_point() for tensor in tensors[:2])
        hint = f"; {ROWS_OF_BAGS}" if flat and len(tensors) > 1 else ""
        raise ValueError(
            f"inputs: need one or more samples along dimension 0 of every tensor, got lengths {sorted(lengths)}{hint}"
        )
    return lengths.pop()


def take(inputs: Inputs, rows: slice) -> Inputs:
    """Return the samples in ``rows``, as views."""
    return map_inputs(lambda tensor: tensor[rows], inputs)


def spread(inputs: Inputs, count: int) -> Inputs:
    """Return so many samples, evenly spaced from the first to the last, as copies; all of them where there are no more."""
    samples = sample_count(inputs)
    if count >= samples:
        return inputs
    chosen = torch.linspace(0, samples - 1, count).round().long()
    return map_inputs(lambda tensor: tensor[chosen.to(tensor.device)], inputs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Switch ``model`` to eval mode, full float32 precision and no autocast; restore all of it afterwards.

    The global generators of torch, Python and NumPy are restored, too.

    Fused attention is switched off, because its fast path has no derivative with respect to the layers inside it, and the
    fused kernels have no rule for per-sample derivatives. Activation checkpoints keep their activations. Embeddings have dense
    gradients.
    """
    flags = [(module, module.training) for module in model.modules()]
    device_type = next((p.device.type for p in model.parameters()), "cpu")
    devices = list(range(torch.cuda.device_count())) if device_type == "cuda" else []
    python, numpy = random.getstate(), _numpy_random()
    of_numpy = None if numpy is None else numpy.get_state()
    try:
        for module, _ in flags:
            module.training = False
        with (
            without_fused_attention(),
            full_float32(),
            _as_written(),
            no_recomputation(),
            dense_gradients(),
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device_type, enabled=False),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(of_numpy)
        for module, flag in flags:
            module.training = flag


def _numpy_random() -> Any:
    """Return NumPy's module of global random numbers; None: NumPy is not in memory, so that nothing draws from it."""
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random


@contextmanager
def without_fused_attention() -> Iterator[None]:
    """Switch off torch's fast path of attention and Transformer layers in eval mode, and restore the setting.

    It is taken once no parameter needs a gradient, sets what is computed at padded positions to zero, and has no derivative by the
    layers inside it.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _as_written() -> AbstractContextManager[None]:
    """Run compiled modules eagerly, because hooks and per-sample derivatives do not reach into compiled code."""
    # Without dynamo in memory nothing is compiled, and loading it takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


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
        statistics_of: the batch that provides the statistics; required for ``"frozen"``.
        before: called before each call, such as to put back what the forward writes to attributes.
        copies: whether each call gets its own copies of the parameters, for a forward that writes to them.

    Raises:
        ValueError: a BatchNorm layer has no running statistics (unless ``"batch"``), or is called twice per forward
            under ``"frozen"``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        batch_norm: BatchNormMode = "eval",
        statistics_of: Inputs | None = None,
        before: Callable[[], None] | None = None,
        copies: bool = False,
    ) -> None:
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
        self._places = _places(model)
        self.lone: set[torch.Size] = set()  # shapes of results for one sample that lack its dimension, as was verified
        if batch_norm != "batch":
            _refuse_batch_statistics(model)
        if batch_norm == "frozen" and any(isinstance(module, _BatchNorm) for module in model.modules()):
            if statistics_of is None:
                raise ValueError(
                    'statistics_of: batch_norm="frozen" needs the batch that gives the statistics, got None'
                )
            self._freeze_statistics(statistics_of)

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
        """Return ``inputs`` on the device and, where they are floating, in the type of this evaluation."""
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

    def _freeze_statistics(self, inputs: Inputs) -> None:
        """Overwrite the cloned running statistics by those of ``inputs``, with the biased variance that train mode uses.

        Raises:
            ValueError: a layer is called twice.
        """
        calls: dict[nn.Module, int] = {}

        def adopt(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(module, _BatchNorm)
            calls[module] = calls.get(module, 0) + 1
            assert module.running_mean is not None
            assert module.running_var is not None
            axes = [axis for axis in range(args[0].ndim) if axis != 1]
            variance, mean = torch.var_mean(args[0].detach(), dim=axes, correction=0)
            # Inside functional_call these are the clones, not the model's own buffers.
            module.running_mean.copy_(mean)
            module.running_var.copy_(variance)

        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, _BatchNorm)}
        handles = [layer.register_forward_pre_hook(adopt) for layer in layers.values()]
        try:
            # Not under no_grad: the forward may differentiate inside. No parameter requires a graph.
            self.call({}, self.convert(inputs))
        finally:
            for handle in handles:
                handle.remove()
        repeated = [name for name, layer in layers.items() if calls.get(layer, 0) > 1]
        if repeated:
            raise ValueError(
                f'batch_norm: "frozen" needs one call of each BatchNorm per forward, but {repeated} are called several '
                'times, each time with other statistics; use batch_norm="eval"'
            )


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


def equal_numbers(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same numbers, NaN being equal to itself."""
    return one.shape == other.shape and (
        torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
    )


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Map every name of a parameter to the first one, under which ``named_parameters`` has it; tied weights have several."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: names[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _places(model: nn.Module) -> dict[str, str]:
    """Map each attribute that holds a parameter or buffer, listed once, to the name of its tensor.

    One tensor may be held in several places. Torch's own tying of weights cannot be used: of a module with two names
    (``self.net = nn.Sequential(self.trunk, self.head)``) it takes both for different places, and leaves its copies in
    place of the parameters when the call is over.
    """
    names: dict[int, str] = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    places: dict[str, str] = {}
    for prefix, module in model.named_modules():
        own = (*module.named_parameters("", False, False), *module.named_buffers("", False, False))
        places |= {f"{prefix}.{name}" if prefix else name: names[id(tensor)] for name, tensor in own}
    return places


def _refuse_batch_statistics(model: nn.Module) -> None:
    untracked = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
    if untracked:
        raise ValueError(
            f"model: BatchNorm without running statistics ({', '.join(untracked)}) couples the samples of a batch, so a "
            "kernel entry would depend on the rest of the batch; build it with track_running_stats=True, or pass "
            'batch_norm="batch" for the kernel of the whole batch'
        )
