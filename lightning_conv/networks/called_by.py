"""``called_by``: a custom call of a module as a module of its own."""

from __future__ import annotations

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
        result: Tensor = self._forward_fn(self.module, inputs)  # type: ignore[operator]
        return result


def called_by(module: nn.Module, forward_fn: object | None) -> nn.Module:
    """Return ``module`` itself or, given ``forward_fn``, a module that calls it through that function."""
    return module if forward_fn is None else CalledBy(module, forward_fn)
