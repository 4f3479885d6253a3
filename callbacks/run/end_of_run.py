"""``say_the_end``: the block with which a run ends in the terminal and in logs."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TextIO

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only
from lightning_utilities.core import rank_zero

from lightning_conv.health.finding import Finding
from lightning_conv.reporting.plain_words import run_block
from lightning_conv.reporting.terminal import log_block, path_from_here, width_of


@rank_zero_only
def say_the_end(
    trainer: pl.Trainer,
    how: str,
    findings: Sequence[Finding],
    not_judged: Mapping[str, Sequence[str]],
    files: Mapping[str, str] | None = None,
) -> None:
    """Log the verdict on a run, its findings, and where its files are, as Lightning logs: in colours on a terminal, plain elsewhere.

    Args:
        trainer: Trainer of the run.
        how: How it has ended.
        findings: What is known of it.
        not_judged: What could not be judged, by the reason.
        files: Paths by what they are.
    """
    shown = {name: path_from_here(path) for name, path in (files or {}).items()}
    block = partial(run_block, how, trainer.global_step, findings, not_judged, shown)

    def render(stream: TextIO | None) -> str:
        return block(stream=io.StringIO() if stream is None else stream, width=width_of(stream))

    log_block(rank_zero.log, logging.INFO, render)
