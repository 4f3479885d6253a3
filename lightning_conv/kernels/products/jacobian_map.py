"""``JacobianMap``: the Jacobian of a model on samples as a linear map, applied in chunks that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lightning_conv.kernels.planning.request import OWN_TYPE
from lightning_conv.kernels.products.pullback import (
    BATCH,
    WORKING_COPIES,
    GraphSize,
    Pullback,
    graph_size,
    pays_to_batch,
)
from lightning_conv.kernels.products.pushforward import choose_push
from lightning_conv.kernels.reading.anatomy import READ_SAMPLES
from lightning_conv.kernels.reading.coupling import require_own_outputs, require_repeatable
from lightning_conv.kernels.reading.parameters import parameter_names
from lightning_conv.kernels.reading.samples import require_float_inputs
from lightning_conv.machine.memory import blocks, memory_budget
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.inputs import Inputs, sample_count, take
from lightning_conv.networks.narrow_watch import NarrowWatch, narrowing_of
from lightning_conv.networks.narrowing import Narrowing, coarser, coarsest
from lightning_conv.networks.origins import path_required
from lightning_conv.networks.stage import staged
from lightning_conv.networks.undisturbed import undisturbed

FULL_PASS = 16
"""Samples that a pass should have before it takes more vectors instead."""


class JacobianMap:
    """The Jacobian J of a model for a copy of its parameters; ``pull`` applies J^T, and ``push`` applies J.

    Arguments and errors are those of ``NTKOperator``.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        parameters: str | Sequence[str] | None,
        batch_norm: BatchNormMode,
        dtype: torch.dtype | None,
        max_memory: float | None,
        chunk: int | None,
    ) -> None:
        self.n_samples = sample_count(inputs)
        self.couples = batch_norm == "batch"
        asked, cure = (
            ("dtype: torch.float64", "use dtype=None or remove the cast") if dtype else ("dtype: None", OWN_TYPE)
        )
        with (
            undisturbed(model),
            staged(model, inputs) as self._stage,
            path_required(self._stage.stateless, inputs, dtype, asked=asked, cure=cure),
        ):
            self.module = self._stage.stateless(dtype=dtype, batch_norm=batch_norm, statistics_of=inputs)
            self.module.parameters = {name: tensor.clone() for name, tensor in self.module.parameters.items()}
            self.names = parameter_names(self.module, parameters)
            self.inputs = self.module.convert(inputs)
            require_float_inputs(self.inputs, partial(self.module.outputs, {}, self.inputs))
            few = self.few
            budget = memory_budget(max_memory, self.module.device, 0)
            graph = graph_size(self.module, self.names, few, limit=budget)
            self.n_outputs = graph.outputs
            narrowing = self._narrowing(few)
            unsteady = self._unsteady(graph, sample_count(few), budget, chunk, narrowing)
            self.push_rule = choose_push(self.module, self.names, few)
            self.narrowing = coarsest([narrowing, unsteady])
        self.chunk, self.block = self._plan(graph, sample_count(few), budget, chunk)
        longest = max(self.module.parameters[name].numel() for name in self.names)
        largest = max(longest, graph.largest * self.chunk // sample_count(few))
        self.batched = pays_to_batch(largest, self.module.device)
        self.pull_reason: str | None = None  # why J^T takes one vector at a time, if vectorised passes failed

    def follow(self, model: nn.Module) -> None:
        """Take over the present parameters of the model, which is the one that the map was made of.

        Args:
            model: The model.

        Raises:
            ValueError: A parameter is missing or has another shape.
        """
        present = dict(model.named_parameters())
        for name, known in self.module.parameters.items():
            now = present.get(name)
            if now is None or now.shape != known.shape:
                was = "missing" if now is None else f"of shape {tuple(now.shape)}"
                raise ValueError(
                    f"model: its parameter {name} is {was}; need the shape {tuple(known.shape)} as at first"
                )
            known.copy_(now.detach())

    def move(self, weights: Mapping[str, Tensor]) -> None:
        """Take other values of some of the parameters, from which J and the outputs are computed from now on.

        Args:
            weights: The values by name, in the shapes of the parameters.
        """
        for name, values in weights.items():
            self.module.parameters[name].copy_(values)

    def values(self) -> Tensor:
        """Return the outputs u at the present values of the parameters, (n, C) in float64: one forward pass."""
        with self.evaluating(), torch.no_grad():
            cuts = blocks(self.n_samples, self.chunk)
            return torch.cat([self.module.outputs({}, self._rows(cut)).double() for cut in cuts])

    def pull(self, cotangents: Callable[[slice], Tensor]) -> dict[str, Tensor]:
        """Apply J^T to each vector, and return (b, *shape) for each parameter.

        Chunks are summed in float64.

        Args:
            cotangents: gives the part (b, t, C) of the vectors that belongs to a chunk of t samples.
        """
        total: dict[str, Tensor] = {}
        cuts = blocks(self.n_samples, self.chunk)
        with self.evaluating():
            for cut in cuts:
                pullback = Pullback(
                    self.module, self.names, self._rows(cut), batched=self.batched and not self.pull_reason
                )
                for name, part in pullback(cotangents(cut).to(self.module.dtype)).items():
                    if name in total:
                        total[name] += part
                    else:
                        total[name] = part if len(cuts) == 1 else part.double()
                self.pull_reason = self.pull_reason or pullback.reason
        return total

    def push(self, directions: Mapping[str, Tensor], reduced: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Apply J to each direction, given as (b, *shape) for each parameter, and return (b, n, ...) in float64.

        Args:
            directions: see above.
            reduced: what to keep, (b, t, ...), of the images (b, t, C) of a chunk of t samples.
        """
        inside = {name: direction.to(self.module.dtype) for name, direction in directions.items()}
        with self.evaluating():
            parts = [
                reduced(self.push_rule(self.module, self._rows(cut), inside, batched=self.batched).double(), cut)
                for cut in blocks(self.n_samples, self.chunk)
            ]
        return torch.cat(parts, 1)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluate the network inside: its flags, the generators, and attributes that a forward writes are put back."""
        with undisturbed(self._stage.module), self._stage.guard():
            yield

    @property
    def few(self) -> Inputs:
        """Samples on which the network may be evaluated: the first ones, or all where they couple."""
        return self._rows(slice(0, self.n_samples if self.couples else min(READ_SAMPLES, self.n_samples)))

    def _rows(self, rows: slice) -> Inputs:
        return take(self.inputs, rows)

    def _narrowing(self, few: Inputs) -> Narrowing | None:
        """Return where a forward and a backward pass of these samples cast to a narrower type."""
        watch = NarrowWatch(self.module, few)
        cotangent = torch.ones(1, sample_count(few), self.n_outputs, dtype=self.module.dtype, device=self.module.device)
        with watch.watching():
            Pullback(self.module, self.names, few, batched=False)(cotangent)
        return narrowing_of(self.module, few, watch)

    def _unsteady(
        self, graph: GraphSize, measured: int, budget: int, chunk: int | None, narrowing: Narrowing | None
    ) -> Narrowing | None:
        """Refuse a network whose samples couple or whose forward is random, and return a change that is too small for that."""
        if self.couples:
            return require_repeatable(self.module, self.inputs)
        fits = max(1, int(budget * measured // 2 // max(1, graph.saved_bytes)))
        cuts = [] if chunk is None else [blocks(self.n_samples, chunk)]
        coarse = coarser(None, None if narrowing is None else narrowing.dtype)
        return require_own_outputs(self.module, self.inputs, rows=fits, cuts=cuts, coarse=coarse)

    def _plan(self, graph: GraphSize, measured: int, budget: int, chunk: int | None) -> tuple[int, int]:
        """Return the numbers of samples and of vectors per pass.

        Raises:
            MemoryError: one vector and one sample (all samples, if they couple) do not fit.
        """
        width = torch.finfo(self.module.dtype).bits // 8
        numel = sum(self.module.parameters[name].numel() for name in self.names)
        # J^T v as computed, its float64 sum over chunks, and its copy in the dtype of the network for ``push``.
        vector = numel * (2 * width + (0 if self.couples else 8))
        graphs = 1 if self.push_rule.method == "forward mode" else 3
        least = self.n_samples if self.couples else chunk or 1
        block = BATCH
        while True:
            sample = (graphs * graph.saved_bytes + block * WORKING_COPIES * graph.largest * width) / measured
            fit = int(max(0, budget - block * vector) / sample)
            if fit >= (max(least, min(FULL_PASS, self.n_samples)) if block > 1 else least):
                return chunk or min(fit, self.n_samples), block
            if block == 1:
                raise MemoryError(
                    f"max_memory: a pass takes {vector / 2**20:.3g} MiB for a vector in parameter space and {least * sample / 2**20:.3g} "
                    f"MiB for {least} sample(s), but {budget / 2**20:.3g} MiB are allowed; use fewer parameters"
                    f"{' or samples' if self.couples else ', a smaller chunk'} or a larger max_memory"
                )
            block //= 2
