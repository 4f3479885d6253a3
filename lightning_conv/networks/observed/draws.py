"""``Draws``: the random numbers that a piece of code draws from torch, recorded once and given again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NEW = (
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like, torch.randint_like,
    torch.normal, torch.bernoulli, torch.multinomial, torch.poisson,
    Tensor.bernoulli, Tensor.multinomial,
)  # fmt: skip
IN_PLACE = (
    Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_, Tensor.random_, Tensor.exponential_, Tensor.geometric_, Tensor.cauchy_,
    Tensor.log_normal_,
)  # fmt: skip
"""Functions of torch whose results are random; those behind ``torch.distributions`` are among them."""


class Draws:
    """Random tensors in the order in which they were drawn.

    Random numbers inside one of torch's functions, such as a dropout, are not seen.

    Attributes:
        drawn: The tensors.
    """

    def __init__(self, drawn: Sequence[Tensor] = ()) -> None:
        self.drawn: list[Tensor] = list(drawn)

    @contextmanager
    def recording(self) -> Iterator[Draws]:
        """Add what is drawn inside."""
        with _Intercept(self._record):
            yield self

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Give what was drawn instead of drawing anew.

        Raises:
            LookupError: More is drawn inside than was recorded.
        """
        waiting = iter(self.drawn)

        def give(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
            found = next(waiting, None)
            if found is None:
                raise LookupError("more random numbers are drawn than when the step was observed")
            if function not in IN_PLACE:
                return found.clone()
            written: Tensor = args[0].copy_(found)
            return written

        with _Intercept(give):
            yield

    def _record(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        made: Tensor = function(*args, **kwargs)
        self.drawn.append(made.detach().clone())
        return made


class _Intercept(TorchFunctionMode):
    """Hands random functions to another one."""

    def __init__(self, instead: Callable[..., Tensor]) -> None:
        super().__init__()
        self._instead = instead

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        return self._instead(func, args, given) if func in NEW or func in IN_PLACE else func(*args, **given)
