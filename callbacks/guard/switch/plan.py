"""The plan of a run: the step after which phase 1 ends, or the rule that tells it and the step at which it ends at the latest."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_conv.callbacks.guard.settings import GuardSettings
from lightning_conv.callbacks.guard.state import GuardState
from lightning_conv.callbacks.guard.switch.moment import Plateau, switch_step

ENDLESS_WINDOW = 100
"""Batches in a window of the training loss, where an epoch has no known number of them."""


def plan_switch(settings: GuardSettings, state: GuardState, total: float, batches: float) -> None:
    """Write into ``state`` when phase 1 is to end; the memory of the plateau rule stays.

    Args:
        settings: of the guard.
        state: its memory, in phase 1.
        total: optimizer steps of the run, infinite where that is not known.
        batches: of an epoch.

    Raises:
        MisconfigurationException: a share of an endless run.
    """
    known = 1 <= total < math.inf
    if settings.switch_at == "auto":
        window = settings.plateau_window or (int(batches) if math.isfinite(batches) else ENDLESS_WINDOW)
        rule = Plateau(window, settings.plateau_threshold, settings.plateau_patience)
        if state.plateau is not None:
            rule = replace(state.plateau, window=rule.window, threshold=rule.threshold, patience=rule.patience)
        state.plateau = rule
        state.switch_step = switch_step(settings.latest_switch, total) if known else None
        return
    state.plateau = None
    if isinstance(settings.switch_at, float) and not known:
        raise MisconfigurationException(
            f"switch_at: {settings.switch_at} is a share of the run, but its length is not known; set max_epochs or max_steps, or pass a "
            "number of optimizer steps"
        )
    state.switch_step = switch_step(settings.switch_at, total)
    if state.switch_step >= total:
        rank_zero_warn(
            f"switch_at: step {state.switch_step} is not before the run's last, {total}; nothing will be certified"
        )
