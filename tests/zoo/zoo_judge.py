"""``judge``: run a case without and with the diagnostics, and say how it came out."""

import dataclasses
import importlib.util
import logging
import random
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from case import Case, Cure, Expected
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from oracle import trace_kernel
from run_state import State, differences, run_state
from torch import Tensor
from watch import Measured, Watch, batches_of_the_probe

from lightning_conv.callbacks import ConvergenceDiagnostics, KernelStability, LambdaMin, Probe

Kind = Literal["worked", "needs one argument", "refused", "changed", "wrong", "crashed", "not installed"]
EPOCHS = 2


@dataclass(frozen=True)
class Outcome:
    """How a case came out, and the sentence that tells."""

    kind: Kind
    sentence: str = ""
    seconds_more: float = 0.0  # that the run with the one line took than the plain one

    def reaches(self, expected: Expected) -> bool:
        """Return whether it is as good as that, or better."""
        order = get_args(Expected)
        return self.kind in order[: order.index(expected) + 1]


class Losses(pl.Callback):
    """What each training step returned, in order."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.seen.append(
            torch.utils._pytree.tree_map(lambda x: x.detach().clone() if torch.is_tensor(x) else x, outputs)
        )


class Ran(NamedTuple):
    """What a run left behind, and the seconds that it took, on the clock and of the processor."""

    state: State
    seconds: float
    of_processor: float


def fit(case: Case, callbacks: Sequence[pl.Callback] = (), **options: Any) -> Ran:
    """Run the case from its seed."""
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    module, data, losses = case.module(), case.data(), Losses()
    with tempfile.TemporaryDirectory() as folder:
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        own = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "default_root_dir": folder}
        trainer = pl.Trainer(
            **(quiet | own | dict(case.options) | options), callbacks=[*case.callbacks(), losses, *callbacks]
        )
        begun = time.perf_counter(), time.process_time()
        trainer.fit(module, data)
        seconds, of_processor = time.perf_counter() - begun[0], time.process_time() - begun[1]
        return Ran(run_state(trainer, data, losses.seen), seconds, of_processor)


def judge(case: Case) -> Outcome:
    """Return how the case came out with one line, and with the argument that a refusal asks for.

    Raises:
        Exception: The case does not run by itself; the case is wrong then.
    """
    if case.needs and importlib.util.find_spec(case.needs) is None:
        return Outcome("not installed", f"pip install {case.needs}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = fit(case)
    first = _attempt(case, plain, lambda: None)
    cure = case.cure or Cure("forward_fn|input_fn", lambda: _by_hand(case))
    if first.kind != "refused" or re.search(cure.says, first.sentence) is None:
        return first
    second = _attempt(case, plain, cure.probe)
    if second.kind == "worked":
        return dataclasses.replace(second, kind="needs one argument", sentence=first.sentence)
    kind = "refused" if second.kind == "crashed" else second.kind
    return dataclasses.replace(second, kind=kind, sentence=f"{first.sentence}; followed, it ends in: {second.sentence}")


def _by_hand(case: Case) -> Probe:
    """Return the probe that the messages ask for where they know no better: the tensors of the batch, and the call itself on them."""
    batches: list[Any] = []

    def input_fn(batch: Any) -> tuple[Tensor, ...]:
        leaves: list[Tensor] = []
        batches.append(apply_to_collection(batch, Tensor, lambda leaf: leaves.append(leaf) or leaf))
        return tuple(leaves)

    def forward_fn(module: Any, inputs: Any) -> Tensor:
        leaves = iter(inputs if isinstance(inputs, tuple) else (inputs,))
        return case.readings[0].call(module, apply_to_collection(batches[-1], Tensor, lambda _: next(leaves)))

    return Probe(input_fn=input_fn, forward_fn=forward_fn)


def _attempt(case: Case, plain: Ran, probe: Callable[[], Probe | None]) -> Outcome:
    """Return how the run comes out with the one line, and with monitors that measure at every step."""
    shared = probe()
    every_step = [KernelStability(shared, every_n_steps=1), LambdaMin(shared, every_n_steps=1)]
    first = _run(case, plain, [ConvergenceDiagnostics(probe())])
    if first.kind != "worked":
        return first
    second = _run(case, plain, every_step, compare=True)
    return dataclasses.replace(second, seconds_more=first.seconds_more)


def _run(case: Case, plain: Ran, callbacks: Sequence[pl.Callback], *, compare: bool = False) -> Outcome:
    """Return how one run comes out; with ``compare`` it must have measured a trace kernel, the one that the oracle computes."""
    with warnings.catch_warnings(record=True) as warned, batches_of_the_probe() as batches:
        warnings.simplefilter("always")
        watch = Watch(batches)
        try:
            watched = fit(case, [*callbacks, watch])
        except Exception as error:  # whatever a user would see
            if isinstance(error, MisconfigurationException) and not watch.trained:
                return Outcome("refused", _line(error))
            return Outcome("crashed", f"{type(error).__name__}: {_line(error)}")
    more = watched.seconds - plain.seconds
    if changed := differences(plain.state, watched.state):
        names = ", ".join(changed[:4]) + (" ..." if len(changed) > 4 else "")
        return Outcome("changed", f"{names} ({len(changed)} differ)", more)
    if failed := [_line(each.message) for each in warned if "no measurement" in str(each.message)]:
        return Outcome("refused", failed[0], more)
    if not watch.kept:
        return Outcome("refused", "nothing was measured, and nothing was said", more)
    comparable = [each for each in watch.kept if each.outputs == "trace"] if compare else []
    if compare and not comparable:
        return Outcome("wrong", f"asked for the trace kernel, got {watch.kept[0].outputs!r}", more)
    missing = {each.optimizer for each in case.readings} - {each.optimizer for each in watch.kept}
    if missing and compare:
        return Outcome("wrong", f"no network of {', '.join(sorted(missing))} was measured", more)
    gaps = [gap for each in comparable if (gap := _gap(case, each))]
    return Outcome("wrong", gaps[0], more) if gaps else Outcome("worked", "", more)


def _gap(case: Case, measured: Measured) -> str:
    """Return how the kernel differs from the oracle's, in words; empty: it does not."""
    gaps = []
    readings = [each for each in case.readings if each.optimizer == measured.optimizer]
    if not readings:
        return f"a network of {measured.optimizer!r} was measured, and none is known"
    for reading in readings:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # from which the probe observes the step
        right = trace_kernel(measured.module, reading, measured.batch)
        if right.shape != measured.matrix.shape:
            gaps.append(f"{len(measured.matrix)} samples, not {len(right)}")
            continue
        gap = float((measured.matrix.double() - right).abs().max() / right.abs().max())
        if gap <= case.tolerance:
            return ""
        gaps.append(f"{gap:.2g} relative")
    of = f" of {measured.optimizer}" if measured.optimizer else ""
    return f"step {measured.step}: kernel{of} differs by {', '.join(gaps)}"


def _line(message: object) -> str:
    return " ".join(str(message).split())
