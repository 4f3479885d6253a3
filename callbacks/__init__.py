"""Lightning callbacks over the mathematics of `lightning_conv`."""

if __name__ != "lightning_conv.callbacks":
    raise ImportError(
        f"this folder is the package `lightning_conv.callbacks`; import it by that name, not as `{__name__}`"
    )

from typing import TYPE_CHECKING

from lightning_conv._lazy import lazy

__all__ = [
    "ConvergenceCriteria",
    "ConvergenceDiagnostics",
    "ConvergenceHealth",
    "ConvergenceReport",
    "CostCheck",
    "ExpressivityError",
    "ExpressivityGuard",
    "HeadCheck",
    "KernelStability",
    "LambdaMin",
    "NetworkCheck",
    "Probe",
    "RegularizedGradientClipping",
    "RunCheck",
    "ScaleCheck",
    "TheoremCheck",
    "check_run",
]

if TYPE_CHECKING:
    from lightning_conv.callbacks.check.check_run import check_run
    from lightning_conv.callbacks.check.run_check import (
        CostCheck,
        HeadCheck,
        NetworkCheck,
        RunCheck,
        ScaleCheck,
        TheoremCheck,
    )
    from lightning_conv.callbacks.clipping import RegularizedGradientClipping
    from lightning_conv.callbacks.criteria.callback import ConvergenceCriteria
    from lightning_conv.callbacks.diagnostics import ConvergenceDiagnostics
    from lightning_conv.callbacks.guard.callback import ExpressivityError, ExpressivityGuard
    from lightning_conv.callbacks.health.callback import ConvergenceHealth
    from lightning_conv.callbacks.monitors.kernel_stability import KernelStability
    from lightning_conv.callbacks.monitors.lambda_min import LambdaMin
    from lightning_conv.callbacks.report import ConvergenceReport
    from lightning_conv.callbacks.run.probe import Probe
else:
    __getattr__, __dir__ = lazy(__name__)
