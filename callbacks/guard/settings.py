"""The settings of the guard, checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_conv.callbacks.run.batch import InputFn, TargetFn
from lightning_conv.callbacks.run.loss import LossFn
from lightning_conv.callbacks.run.probe import ForwardFn
from lightning_conv.expressivity import Method

OnUndecided: TypeAlias = Literal["warn", "raise", "continue"]
StepRule: TypeAlias = Literal["base", "certified", "solve"]


@dataclass(frozen=True)
class GuardSettings:
    """The arguments of ``ExpressivityGuard``, where they are documented.

    Raises:
        MisconfigurationException: a bad value; names the argument.
    """

    switch_at: int | float | Literal["auto"]
    method: Method
    step_rule: StepRule
    head: str | None
    noise_scale: float
    on_undecided: OnUndecided
    seed: int
    cache_features: bool
    track_rank: bool
    plateau_threshold: float
    plateau_patience: int
    plateau_window: int | None
    latest_switch: float
    tol: float
    loss_fn: LossFn | None
    infimum: float | Callable[[Tensor], Tensor] | None
    input_fn: InputFn | None
    target_fn: TargetFn | None
    forward_fn: ForwardFn | None

    def __post_init__(self) -> None:
        """Refuse bad values."""
        at = self.switch_at
        steps = isinstance(at, int) and not isinstance(at, bool) and at >= 0
        if not (at == "auto" or steps or (isinstance(at, float) and 0 < at < 1)):
            self._refuse(
                "switch_at", "a share of the run in (0, 1), a number of optimizer steps (an int, 0 or more), or 'auto'"
            )
        for name, kind in (("method", Method), ("step_rule", StepRule), ("on_undecided", OnUndecided)):
            if getattr(self, name) not in get_args(kind):
                self._refuse(name, f"one of {', '.join(get_args(kind))}")
        for name in ("noise_scale", "plateau_threshold", "tol"):
            if not 0 < getattr(self, name) < math.inf:
                self._refuse(name, "a positive number, such as 1e-3")
        if self.plateau_patience < 1:
            self._refuse("plateau_patience", "1 or more windows")
        if self.plateau_window is not None and self.plateau_window < 1:
            self._refuse("plateau_window", "1 or more batches, or None for as many as an epoch has")
        if not 0 < self.latest_switch < 1:
            self._refuse("latest_switch", "a share of the run in (0, 1)")

    def _refuse(self, name: str, need: str) -> None:
        raise MisconfigurationException(f"{name}: {getattr(self, name)!r}; need {need}")

    def qualified(self, name: str | None) -> str | None:
        """A module's name as the network that is called has it: with ``forward_fn`` it is a member of that."""
        return name if name is None or self.forward_fn is None else f"module.{name}"

    def said(self, name: str) -> str:
        """The same the other way round."""
        return name if self.forward_fn is None else name.removeprefix("module.")
