"""``Probe``: a fixed set of training samples on which kernels are measured, taken without touching the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_conv.arguments import described, require_seed
from lightning_conv.callbacks.run.data.batch import InputFn, TargetFn, transfer
from lightning_conv.callbacks.run.data.data_generators import unread
from lightning_conv.callbacks.run.data.sampling import training_samples
from lightning_conv.kernels.products.precision import PRECISIONS, Precision
from lightning_conv.kernels.reading.parameters import matching_names
from lightning_conv.machine.memory import whole_bytes
from lightning_conv.networks.called_by import called_by
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.inputs import Inputs, sample_count
from lightning_conv.networks.parameter_names import aliases_of

ForwardFn: TypeAlias = Callable[[nn.Module, Any], torch.Tensor]

ProbeOutputs: TypeAlias = Literal["trace", "full", "sum", "projected", "loss"]
"""``Outputs`` of ``ntk_gram``, or ``"loss"``: the kernel of the per-sample gradients of the training step's loss."""

BY_HAND = "pass Probe(inputs=...)"


class Probe:
    r"""Says which samples, outputs, parameters and BatchNorm mode a kernel monitor measures.

    The samples are drawn once, by a generator of their own, from the training data set (not from its loader, whose
    iteration would consume global random numbers); they are stored in the checkpoint, so a resumed run measures on the
    same ones. So are the names of the parameters: kernels over different ones cannot be compared.

    Args:
        size: number of samples m; all of a smaller training set. lambda_min on them is an upper bound of the whole
            set's. None: up to 128, as many as the time for a measurement allows.
        seed: of the draw, and of the sign vectors of ``"projected"``.
        outputs: ``"trace"``: kernel summed over the outputs (m x m). ``"full"``: (m C x m C). ``"sum"``: of the summed
            output, cheapest. ``"projected"``: the trace kernel estimated from ``projections`` random sign vectors over the
            outputs, for heads with many classes; all bounds are then those of the estimate. ``"loss"``: the kernel of the loss gradients,
            :math:`M_{ij} = s_i^\top K_{ij} s_j` (m x m), with s_i the gradient by the outputs of sample i of the training step's loss
            on the whole probe, taken anew at each measurement: of a mean it carries 1 / m, and the gradients of the samples' own losses
            are m times those in M. It takes one backward pass whatever C is, and is not the NTK: its numbers are logged under
            ``loss_kernel/``. The loss must be observed, or given by ``loss_fn=``. None: ``"trace"``, or ``"projected"`` where the
            time for a measurement does not allow it, or ``"loss"`` where it does not allow that for a few samples.
        batch_norm: ``"frozen"``: the probe's own batch statistics, held constant. ``"eval"``: running statistics (at
            step 0 these are still (0, 1), so a drift measured against that kernel compares two different networks).
        input_fn: takes the inputs of ``forward_fn`` out of a collated batch; default: the batch itself if it is a tensor, ``batch[0]``, or
            the first of the keys x, input(s), image(s), pixel_values, features, data, input_ids of a dict.
        forward_fn: ``forward_fn(module, inputs)`` gives the outputs whose kernel is meant; default: ``module(inputs)`` where
            ``input_fn`` or ``inputs`` is given, and otherwise the call that the training step makes.
        inputs: the samples themselves, in place of those of the training set or of the first batch.
        max_memory: bytes that a kernel may use, such as ``2**30`` or ``1e9`` (default: a quarter of what is free).
        precision: ``"fast"``, ``"exact"`` or ``"certified"`` (see ``ntk_gram``); None: begin with ``"fast"`` and go up until
            lambda_min stands clear of its error.
        parameters: names in the network, or patterns such as ``"encoder.*"``, of the parameters that the kernel is over; None: those
            that are trainable when the run starts. With ``forward_fn`` the names begin with ``module.``.
        target_fn: takes the targets y out of a collated batch, in the shape of the outputs; default: those of the observed loss, or
            where it is not known ``batch[1]`` or one of the keys y, target(s), label(s).
        targets: the targets of ``inputs``.
        projections: number k of sign vectors of ``"projected"``: k backward passes in place of C. For a network of k outputs or
            fewer the trace kernel is computed instead, so a cheaper probe of 10 classes needs a smaller k. The standard error grows
            as 1 / sqrt(k).
        optimizer: name of the one optimizer whose network is meant, where the run has several: that of the module that it trains, such as
            ``"generator"``, or its class, such as ``"Adam-1"``. The outputs are those that its loss depends on, and the kernel is over
            its own parameters. None: the network of each of them.

    Raises:
        MisconfigurationException: ``size`` or ``projections`` below 2, an unknown option, no bytes, an empty list of parameters, an
            ``optimizer`` that is no name, a seed that is no whole number, samples that are no tensors, targets that do not belong to them.
    """

    def __init__(
        self,
        size: int | None = None,
        seed: int = 0,
        outputs: ProbeOutputs | None = None,
        batch_norm: Literal["frozen", "eval"] = "frozen",
        input_fn: InputFn | None = None,
        forward_fn: ForwardFn | None = None,
        inputs: Inputs | None = None,
        max_memory: float | None = None,
        precision: Precision | None = None,
        parameters: Sequence[str] | str | None = None,
        target_fn: TargetFn | None = None,
        targets: torch.Tensor | None = None,
        projections: int = 16,
        optimizer: str | None = None,
    ) -> None:
        self.given = frozenset(name for name, value in (("size", size), ("outputs", outputs)) if value is not None)
        size, outputs = 128 if size is None else size, "trace" if outputs is None else outputs
        if isinstance(size, bool) or not isinstance(size, int) or size < 2:
            raise MisconfigurationException(
                f"Probe: size={size!r}; a kernel needs at least 2 samples, as a whole number"
            )
        for name, function in (("input_fn", input_fn), ("forward_fn", forward_fn), ("target_fn", target_fn)):
            if function is not None and not callable(function):
                raise MisconfigurationException(
                    f"Probe: {name}={function!r}; need a function, such as lambda batch: batch[0]"
                )
        for name, value, allowed in (
            ("outputs", outputs, get_args(ProbeOutputs)),
            ("batch_norm", batch_norm, ("frozen", "eval")),
            ("precision", precision, (None, *PRECISIONS)),
        ):
            if value not in allowed:
                raise MisconfigurationException(
                    f"Probe: {name}={value!r} is not one of {', '.join(str(a) for a in allowed)}"
                )
        if isinstance(projections, bool) or not isinstance(projections, int) or projections < 2:
            raise MisconfigurationException(
                f"Probe: projections={projections!r}; an estimate with its error needs a whole number of at least 2"
            )
        try:
            whole = None if max_memory is None else whole_bytes(max_memory)
        except ValueError as error:
            raise MisconfigurationException(f"Probe: {error}".replace("max_memory: ", "max_memory=", 1)) from error
        patterns = [parameters] if isinstance(parameters, str) else parameters
        named = isinstance(patterns, Sequence) and bool(patterns)
        if patterns is not None and not (named and all(isinstance(name, str) and name for name in patterns)):
            raise MisconfigurationException(
                f"Probe: parameters={parameters!r}; need names or patterns such as 'encoder.*', or None for all that are trainable"
            )
        if optimizer is not None and not (isinstance(optimizer, str) and optimizer):
            raise MisconfigurationException(
                f"Probe: optimizer={optimizer!r}; need the name of an optimizer, such as 'generator' or 'Adam', or None for all of them"
            )
        try:
            require_seed(seed)
            given = None if inputs is None else sample_count(inputs)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"Probe: {error}") from error
        if targets is not None and not (isinstance(targets, torch.Tensor) and targets.ndim and len(targets) == given):
            raise MisconfigurationException(
                f"Probe: targets={described(targets)}; need a tensor with one row for each of the samples of inputs="
            )
        self.size = size
        self.seed = seed
        self.outputs: ProbeOutputs = outputs
        self.batch_norm: BatchNormMode = batch_norm
        self.input_fn = input_fn
        self.forward_fn = forward_fn
        self.inputs = inputs
        self.max_memory = whole
        self.projections = projections
        self.precision: Precision | None = precision
        self.parameters = parameters
        self.target_fn = target_fn
        self.targets = targets
        self.optimizer = optimizer

    @property
    def key(self) -> tuple[object, ...]:
        """The settings that make two probes equal; callbacks with equal keys share samples and kernels."""
        functions = id(self.input_fn), id(self.forward_fn), id(self.inputs), id(self.target_fn), id(self.targets)
        names = (self.parameters,) if isinstance(self.parameters, str) else tuple(self.parameters or ())
        kernel = self.outputs, self.projections, self.batch_norm, self.max_memory, self.precision, names
        return self.size, self.seed, self.given, self.optimizer, *kernel, *functions

    @property
    def is_given(self) -> bool:
        """Whether the user has said how the network is called."""
        return any(each is not None for each in (self.forward_fn, self.input_fn, self.inputs))

    def changed(self, **settings: Any) -> Probe:
        """Return a probe with other settings.

        Args:
            settings: Values by the name of the argument.
        """
        made = copy.copy(self)
        vars(made).update(settings)
        return made

    def network(self, pl_module: pl.LightningModule) -> nn.Module:
        """Return the module whose kernel is meant."""
        return called_by(pl_module, self.forward_fn)

    def parameter_names(self, pl_module: pl.LightningModule) -> list[str]:
        """Return the names, in ``network(pl_module)``, of the parameters that the kernel is over.

        Raises:
            MisconfigurationException: a name or pattern matches nothing, or nothing is trainable.
        """
        network = self.network(pl_module)
        try:
            if self.parameters is not None and self.parameters != "requires_grad":
                return list(matching_names(aliases_of(network), self.parameters))
        except ValueError as error:
            raise MisconfigurationException(f"Probe: {error}") from error
        trainable = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        if not trainable:
            raise MisconfigurationException(
                f"Probe: {type(pl_module).__name__} has no trainable parameter; name those that are meant: Probe(parameters=...)"
            )
        return trainable

    def indices(self, count: int) -> list[int]:
        """Return the numbers of the samples that the probe has of a training set, in order.

        Args:
            count: Samples of the training set.
        """
        generator = torch.Generator().manual_seed(self.seed)
        drawn: list[int] = torch.randperm(count, generator=generator)[: min(self.size, count)].sort().values.tolist()
        return drawn

    def batch(self, trainer: pl.Trainer) -> tuple[Any, int]:
        """Read the probe's samples, collated and moved as the training step gets them, and return them with their number.

        Generators that the data set and the collate function draw from are put back.

        Raises:
            MisconfigurationException: The data have no random access.
        """
        samples, loader = training_samples(trainer, hint=BY_HAND)
        indices = self.indices(len(samples))  # type: ignore[arg-type]
        with unread(samples, loader.collate_fn):
            return transfer(trainer, loader.collate_fn([samples[index] for index in indices])), len(indices)

    def numbers(self, trainer: pl.Trainer) -> list[int]:
        """Return the numbers of the samples of ``batch``, in its order: ``trainer.train_dataloader.dataset[number]`` is the sample.

        Raises:
            MisconfigurationException: The data have no random access.
        """
        samples, loader = training_samples(trainer, hint=BY_HAND)
        drawn = self.indices(len(samples))  # type: ignore[arg-type]
        return drawn if samples is loader.dataset else [int(samples.indices[each]) for each in drawn]  # type: ignore[attr-defined]


def cannot_call(pl_module: pl.LightningModule, error: Exception) -> str:
    """Return the message for a network that does not take its inputs or does not return its outputs as a tensor."""
    return (
        f"{type(pl_module).__name__} could not be evaluated on its inputs ({type(error).__name__}: {error or 'no message'}); pass "
        "forward_fn=lambda module, inputs: ... (and input_fn, if the inputs are more than batch[0])"
    )
