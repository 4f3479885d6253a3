"""The arguments of ``ExpressivityGuard``: each is listed here once, in groups, and checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, TypeAlias, TypeGuard, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_conv.callbacks.run.data.batch import InputFn, TargetFn
from lightning_conv.callbacks.run.probe import ForwardFn
from lightning_conv.expressivity import Method
from lightning_conv.losses.kind import LossFn

OnUndecided: TypeAlias = Literal["warn", "raise", "continue"]
StepRule: TypeAlias = Literal["base", "certified", "solve"]


@dataclass(frozen=True, eq=False)
class SwitchSettings:
    """Arguments about the switch to phase 2."""

    switch_at: int | float | Literal["auto"] = 0.6
    head: str | None = None
    noise_scale: float = 1e-3
    on_undecided: OnUndecided = "warn"
    seed: int = 0


@dataclass(frozen=True, eq=False)
class RunFunctions:
    """Functions that read loss, inputs, targets and outputs of the run, where the defaults do not find them."""

    loss_fn: LossFn | None = None
    infimum: float | Callable[[Tensor], Tensor] | None = None
    input_fn: InputFn | None = None
    target_fn: TargetFn | None = None
    forward_fn: ForwardFn | None = None


@dataclass(frozen=True, eq=False)
class PhaseTwoSettings:
    """Arguments about the certificate of phase 2, and the training of the head in it."""

    method: Method = "auto"
    step_rule: StepRule = "base"
    cache_features: bool = False


@dataclass(frozen=True, eq=False)
class PlateauSettings:
    """Arguments of the rule ``switch_at="auto"``, see ``Plateau``."""

    plateau_threshold: float = 0.01
    plateau_patience: int = 3
    plateau_window: int | None = None
    latest_switch: float = 0.9


@dataclass(frozen=True, eq=False)
class GuardSettings(PlateauSettings, PhaseTwoSettings, RunFunctions, SwitchSettings):
    """All arguments of ``ExpressivityGuard``, which inherits its constructor from here and documents them.

    Python collects the fields of a dataclass from its last base to its first, so that ``switch_at`` comes first.

    Raises:
        MisconfigurationException: A value is out of range; the message names the argument.
    """

    tol: float = 1e-6
    track_rank: bool = False

    def __post_init__(self) -> None:
        """Reject values that are out of range."""
        at = self.switch_at
        named = isinstance(at, str) and at == "auto"
        if not (named or (_is_int(at) and at >= 0) or (isinstance(at, float) and 0 < at < 1)):
            self._refuse(
                "switch_at", "a share of the run in (0, 1), a number of optimizer steps (an int, 0 or more), or 'auto'"
            )
        for name, kind in (("method", Method), ("step_rule", StepRule), ("on_undecided", OnUndecided)):
            if getattr(self, name) not in get_args(kind):
                self._refuse(name, f"one of {', '.join(get_args(kind))}")
        for name in ("noise_scale", "plateau_threshold", "tol"):
            if not (_is_number(getattr(self, name)) and 0 < getattr(self, name) < math.inf):
                self._refuse(name, "a positive number, such as 1e-3")
        if not (_is_int(self.plateau_patience) and self.plateau_patience >= 1):
            self._refuse("plateau_patience", "1 or more windows")
        if self.plateau_window is not None and not (_is_int(self.plateau_window) and self.plateau_window >= 1):
            self._refuse("plateau_window", "1 or more batches, or None for as many as an epoch has")
        if not (_is_number(self.latest_switch) and 0 < self.latest_switch < 1):
            self._refuse("latest_switch", "a share of the run in (0, 1)")
        if not (_is_int(self.seed) and -(2**63) <= self.seed < 2**63):
            self._refuse("seed", "an int of 64 bits")
        for name in ("loss_fn", "input_fn", "target_fn", "forward_fn"):
            given = getattr(self, name)
            if given is not None and (isinstance(given, type) or not callable(given)):
                self._refuse(name, "a function or a module (an object such as nn.MSELoss(), not the class), or None")
        given = self.infimum
        if not (given is None or callable(given) or (_is_number(given) and not math.isinf(given))):
            self._refuse("infimum", "a finite number, a function of the targets, or None")
        for name in ("cache_features", "track_rank"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "True or False")

    def _refuse(self, name: str, need: str) -> None:
        raise MisconfigurationException(f"{name}: {getattr(self, name)!r}; need {need}")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)
