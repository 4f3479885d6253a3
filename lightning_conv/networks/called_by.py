"""``called_by``: a custom call of a module as a module of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class CalledBy(nn.Module):
    """``forward_fn(module, inputs)`` as a module, so that custom calls work like ordinary ones."""

    def __init__(self, module: nn.Module, forward_fn: object) -> None:
        super().__init__()
        self.module = module
        self._forward_fn = forward_fn

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Call the function with the module and the inputs as they were given (tensor, tuple or mapping)."""
        inputs = kwargs or (args[0] if len(args) == 1 else args)
        if hasattr(self.module, "_get_fsdp_state"):
            return _gathered(self.module, self._forward_fn, inputs)
        result: Tensor = self._forward_fn(self.module, inputs)  # type: ignore[operator]
        return result


def _gathered(module: nn.Module, function: Any, inputs: Any) -> Tensor:
    """Return ``function(module, inputs)`` as the forward of the module, so that FSDP gathers the parameters that it holds itself."""
    own = vars(module)
    before = {"forward": own["forward"]} if "forward" in own else {}

    def forward(inputs: Any) -> Any:
        own.pop("forward", None)
        own.update(before)  # the function may call the module
        return function(module, inputs)

    own["forward"] = forward
    try:
        result: Tensor = module(inputs)
    finally:
        own.pop("forward", None)
        own.update(before)
    return result


def called_by(module: nn.Module, forward_fn: object | None) -> nn.Module:
    """Return ``module`` itself or, given ``forward_fn``, a module that calls it through that function."""
    return module if forward_fn is None else CalledBy(module, forward_fn)
