"""``ShardedModule``: a module whose parameters are divided among processes as a function, which records its layers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_conv.kernels.reading.recording import LayerCall, Recorder
from lightning_conv.networks.batch_norm import refuse_batch_statistics
from lightning_conv.networks.evaluation import BatchNormMode, StatelessModule
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.parameter_names import aliases_of
from lightning_conv.networks.sharded import meshes_of, parameters_told, whole
from lightning_conv.networks.supported import require_supported


class ShardedModule(StatelessModule):
    """A sharded module as a function of its inputs; the parameters are its own. Call it only inside ``undisturbed`` and ``as_found``.

    ``parameters`` have names and whole shapes and no numbers, since no process has all of them.

    Args:
        model: the module.
        batch_norm: see ``StatelessModule``; a network with BatchNorm layers has its running statistics.

    Raises:
        ValueError: what is asked for needs all parameters, or they have a type of 16 bits.
    """

    transforms = False  # its forward gathers parameters, which an error inside a transform would leave half done

    def __init__(self, model: nn.Module, *, batch_norm: BatchNormMode = "eval") -> None:
        require_supported(model)
        refuse_batch_statistics(model)
        normalised = any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in model.modules())
        if batch_norm == "batch" or (batch_norm == "frozen" and normalised):
            raise ValueError(
                f"batch_norm: {batch_norm!r} on a sharded module; statistics of a batch need a function of copies: use "
                'batch_norm="eval"'
            )
        renormed = [name for name, each in model.named_modules() if getattr(each, "max_norm", None) is not None]
        if renormed:
            raise ValueError(
                f"model: {renormed[0]!r} has max_norm, so that a forward writes to its weights, which a sharded module has only once; "
                "leave max_norm out"
            )
        kinds = {each.dtype for each in model.parameters()}
        if len(kinds) != 1 or not kinds <= {torch.float32, torch.float64}:
            raise ValueError(
                f"model: sharded parameters of {', '.join(sorted(map(str, kinds)))}; the kernel has their type, so all must be "
                "float32, or all float64"
            )
        self.model, self.batch_norm = model, batch_norm
        self.model_dtype = self.dtype = kinds.pop()
        self.before, self.copies, self.strict = None, False, True
        self.device = torch.device(meshes_of(model)[0].device_type)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.parameters = {
            name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in model.named_parameters()
        }
        self.aliases = aliases_of(model)
        self.trainable = tuple(name for name, each in model.named_parameters() if each.requires_grad)
        self.buffers = {}
        self.lone = set()
        self.statistics = None
        self.recorder = partial(ShardedRecorder, self)

    def call(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> object:
        """Return the raw result of the module with its own parameters, of which none can be replaced."""
        assert not parameters
        args: tuple[Any, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (args, {})
        result = self.model(*args, **kwargs)
        return whole(result) if isinstance(result, Tensor) else result

    def twin(self, dtype: torch.dtype) -> StatelessModule:
        """Refuse a copy in another precision."""
        raise TypeError(f"model: a sharded module has no copy in {dtype}")


class ShardedRecorder(Recorder):
    """A recorder that recognises the parameters by what FSDP puts in their place, and keeps none of their numbers.

    Args:
        module: the network.
        tracked: parameters whose uses are recorded; only their names count.

    Attributes:
        found: the tensor that stood for each parameter in the last forward.
    """

    def __init__(self, module: ShardedModule, tracked: Mapping[str, Tensor]) -> None:
        super().__init__({})
        self._module, self._wanted = module, set(tracked)
        self._stack, self._depth = ExitStack(), 0
        self.found: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        """Look for the parameters from now on; a recorder enters itself again inside functions that are written in others."""
        if self._depth == 0:
            self._stack.enter_context(parameters_told(self._module.model, self._tell))
        self._depth += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove all hooks when the forward has ended."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._depth -= 1
        if self._depth == 0:
            self._stack.close()

    def _tell(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype != self._module.dtype:
            raise TypeError(
                f"model: {name!r} of {self._module.dtype} is computed with in {tensor.dtype} (MixedPrecisionPolicy), so the kernel is "
                "another one; shard the module without a policy of narrower types"
            )
        if name in self._wanted:
            self._names[id(tensor)] = name
            self.found[name] = tensor

    def _record(self, func: Any, rule: Any, arguments: dict[str, Any], names: dict[str, str]) -> Tensor:
        known = len(self.calls)
        output = super()._record(func, rule, arguments, names)
        self.calls[known:] = [self._freed(each) for each in self.calls[known:]]
        if output.dtype != self._module.dtype:
            raise TypeError(
                f"model: the layer of {', '.join(names.values())} computes in {output.dtype} although its parameters have "
                f"{self._module.dtype}; shard the module without a MixedPrecisionPolicy of narrower types"
            )
        return output

    @staticmethod
    def _freed(call: LayerCall) -> LayerCall:
        """Return a call without the numbers of its parameters, which are scattered again, and with whole tensors of samples."""

        def kept(slot: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if slot in call.names:
                return torch.empty(value.shape, dtype=value.dtype, device="meta")
            return whole(value)

        arguments = {slot: kept(slot, value) for slot, value in call.arguments.items()}
        sampled = {slot: whole(value) for slot, value in call.sampled.items() if slot not in call.names}
        return replace(call, arguments=arguments, sampled=sampled)
