"""The runs: members of the zoo as they are, and some of them made long."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lightning_conv.recipes import DigitsDataModule, WideFC

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "zoo"))
from case import Case
from cases import CASES
from cases.shapes import GPT, SmallGpt
from samples import floats, labels, padding, rows, table, tokens
from zoo_judge import Ran, fit

__all__ = ["MANY", "Case", "Ran", "fit", "long_runs", "short_runs"]

MANY = 256
"""Samples of a long run."""


class WiderGpt(SmallGpt):
    """A GPT of two layers over 64 tokens and 16 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT(vocabulary=64, width=32, layers=2, positions=17, heads=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


def short_runs() -> dict[str, Case]:
    """Return the members of the zoo whose packages are installed, by name."""
    return {case.name: case for case in CASES if not case.needs or find_spec(case.needs) is not None}


def long_runs() -> dict[str, Case]:
    """Return the runs that are made long: members of the zoo with more samples, the GPT, and the recipe on the digits."""
    y = labels(count=MANY)
    masked = {"input_ids": tokens(16, count=MANY), "attention_mask": padding(16, count=MANY), "labels": y}
    images = table(floats(3, 32, 32, count=MANY), y, batch_size=32)
    data: dict[str, Callable[[], Any]] = {
        "dict_batch": rows(32, x=floats(6, count=MANY), y=y),
        "optional_mask": rows(32, **masked),
        "segmentation": table(floats(1, 16, 16, count=MANY), labels(2, 16, 16, count=MANY), batch_size=32),
        "autoencoder": table(floats(6, count=MANY), batch_size=32),
        "lstm": table(floats(20, 3, count=MANY), y, batch_size=32),
        "conv_batch_norm": table(floats(2, 6, 6, count=MANY), y, batch_size=32),
        "resnet18": images,
        "frozen_resnet": images,
        "vit": images,
        "bert": rows(32, **masked | {"input_ids": tokens(16, 12, count=MANY)}),
    }
    known = short_runs()
    found = {name: replace(known[name], data=made, options={}) for name, made in data.items() if name in known}
    texts = table(tokens(17, 64, MANY), batch_size=32)
    found["gpt"] = replace(known["small_gpt"], module=WiderGpt, data=texts)
    digits = {"module": lambda: WideFC(guard=False, diagnostics=False), "options": {"limit_val_batches": 0}}
    found["wide_fc"] = replace(known["dict_batch"], data=DigitsDataModule, **digits)
    return found
