"""``attempt_certificate``: the certificate of a switch is computed; what goes wrong leaves the condition undecided."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_conv.callbacks.guard.certify.certificate import certify_trunk, rewatched
from lightning_conv.callbacks.guard.certify.verdict import where_attained
from lightning_conv.callbacks.guard.settings import GuardSettings
from lightning_conv.callbacks.guard.state import GuardState
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.expressivity import too_narrow

# Errors of a user's network or data, and of certificates that do not fit.
EXPECTED = (MemoryError, MisconfigurationException, NotImplementedError, RuntimeError, TypeError, ValueError)


def attempt_certificate(view: GuardView, settings: GuardSettings, state: GuardState, root: str) -> str:
    """Compute the certificate and return its reason; an expected error leaves the condition undecided and does not end the run.

    Args:
        view: The run.
        settings: Settings of the guard.
        state: State of the guard, which takes the certificate.
        root: Folder under which a long certificate keeps its work.
    """
    method, head = settings.method, view.head
    narrow = too_narrow(view.rows, head.width, bias=head.has_bias) is not None
    state.certificate = None
    with attempted(*EXPECTED) as attempt:
        targets = (
            _targets(view, state)
            if head.rows == 1 and (method == "alignment" or (method == "auto" and narrow))
            else None
        )
        state.certificate = certify_trunk(view, method, targets, root)
        return state.certificate.reason
    return f"no certificate could be computed ({attempt.reason})"


def _targets(view: GuardView, state: GuardState) -> Tensor:
    """Return the targets for the trained part of the head, minus an untrained bias if the loss is attained at the targets alone."""
    targets, fixed = view.loss.targets(), view.head.fixed_bias
    state.loss_kind = where_attained(view.loss.kind, targets)
    if state.loss_kind != "distance":
        return targets
    rows = targets.double().reshape(len(targets), -1)
    return rows if fixed is None else rows - fixed.detach().double().cpu()


def rewatch(view: GuardView, state: GuardState) -> None:
    """Watch the trunk for casts where a run resumes from a checkpoint of a version that did not.

    Args:
        view: The run.
        state: State of the guard, with the certificate.
    """
    if state.certificate is not None:
        with attempted(*EXPECTED):
            state.certificate = rewatched(view, state.certificate)
