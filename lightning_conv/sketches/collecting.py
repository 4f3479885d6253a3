"""``collect``: the sketches of all batches of a loader, written to disk as they come, from where an interrupted call ended."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized

import numpy as np
from torch import nn

from lightning_conv.kernels.planning.request import EngineName
from lightning_conv.reporting.progress import Report, progress_bar
from lightning_conv.sketches.batches import Split, split_batch
from lightning_conv.sketches.digests import digest_of_batch
from lightning_conv.sketches.settings import Settings
from lightning_conv.sketches.sketcher import Sketcher, evaluated
from lightning_conv.sketches.writer import Writer

PAUSE = 2.0
"""Seconds of work after which the journal of a checkpoint is written."""


def collect(
    model: nn.Module,
    loader: Iterable[object],
    writer: Writer,
    settings: Settings,
    *,
    loss_fn: object | None,
    split: Split | None,
    engine: EngineName,
    progress: bool | Report | None,
) -> None:
    """Write the sketches of a loader's batches.

    Args:
        model: see ``SketchStore.add``.
        loader: likewise.
        writer: of the checkpoint; the batches in its journal are read and compared, but not computed.
        settings: of the store.
        loss_fn: see ``SketchStore.create``.
        split: likewise.
        engine: see ``ntk_gram``.
        progress: see ``SketchStore.add``.

    Raises:
        ValueError: the loader yields nothing, or not the batches of the interrupted call.
    """
    batches = iter(loader)
    total = len(loader) if isinstance(loader, Sized) else 0
    first = next(batches, None)
    if first is None:
        raise ValueError("loader: yields no batch; need at least one")
    inputs, _ = split_batch(first, split, targets=settings.loss is not None)
    with evaluated(model, inputs) as module:
        sketcher = Sketcher(module, settings.layout, settings.seed, inputs, loss_fn, engine)
        steps = _steps(first, batches, sketcher, writer, settings, split)
        start = time.monotonic()
        next(steps)
        predicted = (time.monotonic() - start) * max(0, total - 1)
        with progress_bar(f"sketches for {writer.folder.name}", predicted, progress) as report:
            noted = time.monotonic()
            for number in steps:
                if writer.pending and time.monotonic() - noted >= PAUSE:
                    writer.note()
                    noted = time.monotonic()
                if total:
                    report(min(1.0, number / total))
            report(1.0)


def _steps(
    first: object,
    rest: Iterator[object],
    sketcher: Sketcher,
    writer: Writer,
    settings: Settings,
    split: Split | None,
) -> Iterator[int]:
    """Take one batch after the other.

    Yields:
        Its number, from 1 on.

    Raises:
        ValueError: the batches in the journal are others.
    """
    done, data, number = int(writer.state["batches"]), "", 0
    for number, batch in enumerate(_chained(first, rest), 1):
        inputs, targets = split_batch(batch, split, targets=settings.loss is not None)
        data = digest_of_batch(inputs, targets, data)
        if number == done and data != writer.state["data"]:
            break
        if number > done:
            rows, exponents = sketcher.sketch(inputs, targets)
            stored = np.ldexp(rows.numpy(), settings.lift).astype(settings.kind)
            writer.append(stored, exponents.numpy() - settings.lift, data)
        yield number
    else:
        if number >= done:
            return
    raise ValueError(
        f"loader: its first {done} batches are not those of the interrupted call; give the same ones in the same order (shuffle=False), "
        f"or remove {writer.part}"
    )


def _chained(first: object, rest: Iterator[object]) -> Iterator[object]:
    yield first
    yield from rest
