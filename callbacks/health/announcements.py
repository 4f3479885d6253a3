"""``Announcements``: what is said of the findings of a run while it goes on: each alert, each change of the words, each audit once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias, get_args

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_conv.callbacks.health.labels_of_run import LabelsOfRun
from lightning_conv.callbacks.run.loggers.sending import takes_texts
from lightning_conv.callbacks.run.logging import log_text
from lightning_conv.health.finding import Finding
from lightning_conv.health.labels.suspicious_labels import LabelAudit
from lightning_conv.reporting.plain_words import alert_line, plain_words_list
from lightning_conv.reporting.terminal import warnings_shown_as, width_of

WORDS = "convergence/health"
"""Tag of the sentences: TensorBoard sorts its texts, and they come first."""

OnAlert: TypeAlias = Literal["warn", "stop"] | Callable[[Finding], object]


def require_on_alert(on_alert: object, name: str) -> None:
    """Refuse what is no answer to an alert.

    Args:
        on_alert: The argument of this name.
        name: Of the callback.

    Raises:
        MisconfigurationException: It is none.
    """
    known = get_args(get_args(OnAlert)[0])
    if not callable(on_alert) and on_alert not in known:
        raise MisconfigurationException(
            f"{name}: on_alert={on_alert!r} is none of {', '.join(map(repr, known))}, nor a function of a Finding"
        )


class Announcements:
    """What was said of one run.

    Args:
        on_alert: What to do at an alert, see ``ConvergenceHealth``.

    Attributes:
        alerted: Names of the findings that were alerts.
    """

    def __init__(self, on_alert: OnAlert) -> None:
        self.alerted: set[str] = set()
        self._on_alert = on_alert
        self._audited: dict[str, int] = {}  # steps of the audits that were shown
        self._words = ""
        self._stops = False

    def alert(self, trainer: pl.Trainer, findings: Iterable[Finding], name: str) -> None:
        """Do what ``on_alert`` asks for, once for each finding that is an alert.

        Args:
            trainer: Trainer of the run.
            findings: What is known of it.
            name: Of the callback.
        """
        for each in findings:
            if each.level != "alert" or each.name in self.alerted:
                continue
            self.alerted.add(each.name)
            with warnings_shown_as(alert_line(each, name, stream=sys.stderr, width=width_of(sys.stderr))):
                rank_zero_warn(f"{name}: {each.sentence} {each.advice}".rstrip())
            if callable(self._on_alert):
                self._on_alert(each)
            elif self._on_alert == "stop":
                self._stops = True
                trainer.should_stop = trainer.should_stop or trainer.world_size == 1

    def stop_together(self, trainer: pl.Trainer) -> None:
        """Stop all processes if an alert of one of them has asked for it: losses differ from process to process.

        Args:
            trainer: Trainer of the run.
        """
        if trainer.world_size > 1 and self._on_alert == "stop":
            self._stops = trainer.strategy.reduce_boolean_decision(self._stops, all=False)
            trainer.should_stop = trainer.should_stop or self._stops

    def say(
        self,
        trainer: pl.Trainer,
        findings: Sequence[Finding],
        labels: LabelsOfRun | None,
        step: int,
        tag: Callable[[str], str],
    ) -> None:
        """Log the words if they have changed, and the table of the labels if there is another audit.

        Args:
            trainer: Trainer of the run.
            findings: What is known of it.
            labels: The audit of its labels; None: it was not asked for.
            step: The present step.
            tag: Returns the tag of this optimizer's network.
        """
        if takes_texts(trainer) and (words := plain_words_list(findings)) != self._words:
            log_text(trainer, tag(WORDS), words, step)
            self._words = words
        if labels is not None and self.new_audit(labels, "table") is not None:
            log_text(trainer, tag("health/labels_table"), labels.narrow, step)

    def new_audit(self, labels: LabelsOfRun | None, shown: str) -> tuple[LabelAudit, list[int] | None] | None:
        """Return the audit of the labels, with their numbers in the training set, if it was not shown yet in this way.

        Args:
            labels: The audit; None: it was not asked for.
            shown: As what, such as a table.
        """
        if labels is None or labels.audit is None or self._audited.get(shown) == labels.step:
            return None
        self._audited[shown] = labels.step
        return labels.audit, labels.numbers
