"""``ShardedTask``: a request for a kernel of a sharded module, what was read of it, and its plan."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_conv.kernels.engine.kernel_sum import KernelSum
from lightning_conv.kernels.planning.plan import NTKPlan
from lightning_conv.kernels.planning.request import Request
from lightning_conv.kernels.planning.steadiness import unsteady_outputs
from lightning_conv.kernels.planning.task import Task
from lightning_conv.kernels.products.combinations import checked_sets
from lightning_conv.kernels.reading.contracted_error import chosen_samples, measured_count
from lightning_conv.kernels.reading.parameters import parameter_names
from lightning_conv.kernels.reading.samples import require_float_inputs
from lightning_conv.kernels.sharded.module import ShardedModule
from lightning_conv.kernels.sharded.reading import read_sharded, require_unreached, rounded_again
from lightning_conv.kernels.sharded.rounding import rounding_of
from lightning_conv.machine.memory import allowed_memory
from lightning_conv.networks.inputs import Inputs, input_tensors, map_inputs, sample_count
from lightning_conv.networks.narrowing import Narrowing
from lightning_conv.networks.origins import NoSuchPathError
from lightning_conv.networks.sharded import agreed, meshes_of


class ShardedTask(Task):
    """A sharded module that was read, and what is to be computed of it. Construct it inside ``undisturbed`` and ``as_found``.

    Arguments are those of ``ntk_gram``. All processes that have a part of the module make it together, with the same arguments.

    Raises:
        ValueError: what is asked for needs whole parameters; the processes were given different samples or options.
        NoSuchPathError: ``precision="certified"``.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        inputs2: Inputs | None,
        parameters: Sequence[str] | str | None,
        request: Request,
        plan: NTKPlan | None = None,
        cotangents: Tensor | None = None,
        cotangents2: Tensor | None = None,
        *,
        remeasure: bool = False,
    ) -> None:
        self._processes, self.couples, self.unsteady, self._general = None, False, None, None
        self._staging_seconds = 0.0
        if request.engine == "jacobian":
            raise ValueError(
                'engine: "jacobian" needs all parameters of a sharded module in one process; leave engine= out'
            )
        for each in (inputs, inputs2):
            if each is not None:
                sample_count(each)
                require_float_inputs(each)
        given = checked_sets(inputs, inputs2, cotangents, cotangents2)
        if request.precision == "certified":
            raise _uncertified()
        self.module = module = ShardedModule(model, batch_norm=request.batch_norm)
        self.names = parameter_names(module, parameters)
        if frozen := [name for name in self.names if name not in module.trainable]:
            raise ValueError(
                f"parameters: {frozen[0]!r} has no requires_grad, without which its rule cannot be compared on a sharded module"
            )
        self.request = replace(
            request, max_memory=_agreed(model, request, self.names, (inputs, inputs2, *(s for s, _ in given)))
        )
        self.inputs = module.convert(inputs)
        self.others = None if inputs2 is None else module.convert(inputs2)
        start = time.perf_counter()
        if plan is None:
            self.anatomy = read_sharded(module, self.names, self.inputs)
        else:
            self.anatomy = rounded_again(plan.reading, module, self.inputs) if remeasure else plan.reading
        for each in self._sets:
            require_unreached(self.anatomy, module, each)
        self.combinations = self._combinations(given)
        self._reading_seconds = time.perf_counter() - start if plan is None else 0.0
        # One plan for all, since each pass is one in which all take part.
        self.plan = agreed(model, self._plan())
        self.anatomy = self.plan.reading
        if plan is not None:
            self._require_same(plan, sizes=not remeasure)
        if plan is None or (plan.problem, plan.precision) != (self.plan.problem, self.plan.precision):
            with torch.no_grad():
                self.unsteady = self._unsteady()

    def _unsteady(self) -> Narrowing | None:
        return unsteady_outputs(
            self.module, self._sets, self.anatomy, self.plan, rows=self._fits, room=self._room, gradients=False
        )

    def agreed(self, found: KernelSum) -> tuple[KernelSum, float]:
        """Return the kernel and its ``jacobian_error`` as the first process has them, so that all decide by the same numbers.

        Args:
            found: the kernel as this process has it.
        """
        model = self.module.model
        traces, floor, spread = agreed(model, (found.layer_traces, found.floor, found.projection_error))
        layers = {name: agreed(model, each) for name, each in found.layer_matrices.items()}
        found = KernelSum(agreed(model, found.matrix), floor, traces, layers, spread)
        return found, agreed(model, self.jacobian_error(self.anatomy.jacobian_error, found.matrix))

    def jacobian_error(self, error: float, matrix: Tensor) -> float:
        """Return the relative rounding of the rows of the kernel, measured on the combinations themselves where they are contracted."""
        if not self.contracts:
            return error
        assert isinstance(self.module, ShardedModule)
        like = torch.empty(0, dtype=self.module.dtype, device=self.module.device)
        samples = sample_count(self.inputs)
        count = measured_count(samples, self.anatomy.forward_bytes)
        sizes = matrix.diagonal() if self.others is None else self.combinations[0].norms(samples, like)
        chosen = chosen_samples(sizes, count) if count < samples else torch.arange(samples)
        few = map_inputs(lambda each: each[chosen.to(each.device)], self.inputs)
        rows = [self.combinations[0].taken(slice(0, 1), slice(i, i + 1), like)[0] for i in chosen.tolist()]
        scales = self.combinations[0].scales
        vector = torch.cat(rows)
        if scales is not None:
            of_chosen = scales[chosen.to(scales.device)]
            vector = vector * (of_chosen / of_chosen.max()).to(vector)[:, None]
        found = rounding_of(self.module, self.anatomy.tracked, self.anatomy.sites, few, vector, len(chosen))
        return max(error, found)


def _agreed(model: nn.Module, request: Request, names: Sequence[str], given: Sequence[Any]) -> int:
    """Return the memory that all processes allow, so that they cut the work alike, and refuse different arguments.

    Raises:
        ValueError: the processes were given different arguments.
    """
    said = hashlib.sha256(repr((replace(request, max_memory=None), tuple(names))).encode())
    for each in given:
        for tensor in () if each is None else ([each] if isinstance(each, Tensor) else input_tensors(each)):
            said.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
            said.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    mark = int.from_bytes(said.digest()[:7], "big")
    (mesh, *_), meshes = meshes_of(model), meshes_of(model)
    device = torch.device(mesh.device_type)
    allowed = allowed_memory(request.max_memory, device)
    numbers = torch.tensor([allowed, mark, -mark], device=device)
    for each in meshes:
        for group in each.get_all_groups():
            dist.all_reduce(numbers, dist.ReduceOp.MIN, group)
    least, first, last = numbers.tolist()
    if first != -last:
        raise ValueError(
            "inputs: the processes of a sharded module were given different samples, parameters or options; all of "
            "them compute its kernel together, so give each the same"
        )
    share = 1 if request.max_memory is not None else max(int(each.size()) for each in meshes)
    return max(1, int(least) // share)


def _uncertified() -> NoSuchPathError:
    place = Narrowing(
        "the module", "is sharded, so that no process has a copy of it in another type", "fully_shard", None
    )
    return NoSuchPathError('precision: "certified"', torch.float64, place, "", 'use precision="exact"')
