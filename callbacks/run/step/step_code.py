"""``call_step``, ``ReplayStep``: run the training step of a copy, without backward passes and switched gradients of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def call_step(module: pl.LightningModule, batch: Any, batch_idx: int = 0) -> Any:
    """Call the training step of a module, with the number of the batch where it takes one, or with an iterator over the one batch.

    A manual optimization passes nothing back.

    Args:
        module: A copy of the run's module.
        batch: A batch as the training step gets it.
        batch_idx: Its number in the epoch.
    """
    function = module.training_step
    fetches = is_param_in_hook_signature(function, "dataloader_iter", explicit=True)
    numbered = is_param_in_hook_signature(function, "batch_idx", min_args=2)
    with nullcontext() if module.automatic_optimization else NoBackward(module.manual_backward):
        if fetches:
            return function(iter([(batch, batch_idx, 0)]))
        return function(batch, batch_idx) if numbered else function(batch)


@dataclass(frozen=True)
class ReplayStep:
    """Calls the training step of a module whose parameters are replaced by other tensors; it holds nothing that a copy would copy.

    Args:
        batch_idx: Number of the batch in the epoch.
    """

    batch_idx: int = 0

    def __call__(self, module: pl.LightningModule, batch: Any) -> Any:
        """Call the training step.

        Args:
            module: A copy of the run's module.
            batch: A batch as the training step gets it.
        """
        with NoFlips(module.parameters()):
            return call_step(module, batch, self.batch_idx)


class NoFlips(TorchFunctionMode):
    """Leaves ``requires_grad`` of parameters as it is; what stands for them may be no leaf of a graph.

    Args:
        parameters: What stands for them.
    """

    FLIPS = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self._held = list(parameters)  # so that no other tensor gets the id of one
        self._ids = {id(each) for each in self._held}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in self.FLIPS and (id(args[0]) in self._ids or isinstance(args[0], nn.Parameter)):
            return args[0]
        return func(*args, **(kwargs or {}))


class NoBackward(TorchFunctionMode):
    """Hands tensors whose backward pass is asked for to a function, in place of the pass."""

    def __init__(self, instead: Callable[..., None]) -> None:
        super().__init__()
        self._instead = instead

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        instead = self._instead if func is Tensor.backward else func
        return instead(*args, **(kwargs or {}))
