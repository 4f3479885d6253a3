"""``FloorOfSet``: the loss that equal inputs force on the whole training set, found by hashing it a little at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_conv.callbacks.run.data.set_reader import NotReadError, SetReader, require_cheap
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.ranks import Ranks
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.finding import Finding
from lightning_conv.health.findings.of_training_set import finding_of_training_floor
from lightning_conv.health.fit.equal_inputs import DIGEST, equal_rows, sample_digests
from lightning_conv.health.fit.loss_floor import LossFloor, loss_floor
from lightning_conv.health.wording import percent
from lightning_conv.losses.per_sample import SampleLosses

AT_ONCE = 0.1
"""Seconds of reading at one measurement, roughly."""

CHEAP = 20.0
"""Seconds that reading the whole set may take, all measurements together; a set that takes longer is not read."""

MOST_BYTES = 16 * 2**20
"""Bytes that hashes and targets may take: they are kept, and are in the checkpoint, until all samples are read."""

FEWEST, MOST = 32, 1024
"""Samples that are read together: at first, and at most."""

CONFLICTS = 10_000
"""Groups of equal inputs with unequal targets that enter the floor; more of them would raise it further."""


@dataclass(frozen=True)
class Known:
    """What is known of the set.

    Attributes:
        floor: Its floor; None: not known (yet).
        why: Why there will be none; empty: there may be one.
        read: Samples that were read so far.
        size: Samples of the set; 0: not known yet.
        seconds: Of reading one sample.
    """

    floor: LossFloor | None = None
    why: str = ""
    read: int = 0
    size: int = 0
    seconds: float = 0.0


class FloorOfSet:
    """Reads the training set of one run, ``AT_ONCE`` seconds at a measurement; under DDP the first process reads for all.

    Attributes:
        known: What is known now.
    """

    def __init__(self) -> None:
        self.known = Known()
        self._reader: SetReader | None = None
        self._digests = torch.empty(0, DIGEST, dtype=torch.uint8)
        self._targets: list[Tensor] = []
        self._left = False

    def begin(self) -> None:
        """Begin a fit: how the samples are read is found out again."""
        self._reader, self._left = None, False
        self.known = replace(self.known, why="")

    def leave(self, why: str = "") -> None:
        """Read nothing in this fit.

        Args:
            why: The reason; empty: there is nothing to be said of it.
        """
        self._left = True
        self.known = replace(self.known, why=why)

    @property
    def is_wanted(self) -> bool:
        """Return whether there is anything left to do."""
        return not self._left and self.known.floor is None and not self.known.why

    @property
    def expected_seconds(self) -> float:
        """Return what the next look takes, roughly; that of a first one is not known."""
        left = (self.known.size - self.known.read) * self.known.seconds
        return min(AT_ONCE, 2 * left) if self.known.size else AT_ONCE / 2

    @property
    def state(self) -> str:
        """Return why there is no floor; empty: there is one."""
        if self.known.floor is not None or (self._left and not self.known.why):
            return ""
        share = f", {percent(self.known.read / self.known.size)} of them" if self.known.read else ""
        return self.known.why or f"{self.known.read:,} training samples are read so far{share}"

    def measure(self, run: RunView, losses: SampleLosses) -> None:
        """Read on, and compute the floor when all samples are read.

        Args:
            run: The run at this moment.
            losses: The losses of the probe's samples, whose formula is known.

        Cost: ``AT_ONCE`` seconds, or what reading ``FEWEST`` samples takes; at the end a sort of the hashes.
        """
        self.known = Ranks(run.trainer).once(lambda: self._advance(run, losses))

    def finding(self, *, labels: bool, step: int) -> Finding | None:
        """Return what is found about the set; None: it is not known.

        Args:
            labels: Whether the targets are class numbers.
            step: Step of the measurement.
        """
        if self.known.floor is None:
            return None
        return finding_of_training_floor(self.known.floor, what="labels" if labels else "targets", step=step)

    def _advance(self, run: RunView, losses: SampleLosses) -> Known:
        begun = time.perf_counter()
        try:
            if self._reader is None:
                self._reader = self._found(run)
            reader, together, seconds = self._reader, FEWEST, math.inf
            while (read := len(self._digests)) < reader.size:
                chosen = range(read, min(read + together, reader.size))
                before = time.perf_counter()
                self._add(reader, chosen)
                taken = time.perf_counter() - before
                if taken < AT_ONCE / 4:
                    together = min(2 * together, MOST)
                seconds = min(seconds, taken / len(chosen))
                if time.perf_counter() - begun + taken > AT_ONCE:
                    break
            known = Known(read=len(self._digests), size=reader.size, seconds=seconds)
            if known.read < known.size:
                require_cheap(known.size - known.read, seconds, CHEAP)
                return known
            return replace(known, floor=self._floor(reader, losses))
        except NotReadError as error:
            self._forget()
            return Known(why=str(error), size=self.known.size)

    def _found(self, run: RunView) -> SetReader:
        """Return what reads the samples, and forget what was read of another set, or in another way."""
        reader = SetReader.of(run, CHEAP)
        require_cheap(reader.size, reader.seconds, CHEAP)
        row = sum(each.element_size() * each[0].numel() for each in [run.targets] if each is not None) + DIGEST
        if reader.size * row > MOST_BYTES:
            raise NotReadError(f"hashes and targets of all {reader.size:,} training samples are too large to be kept")
        read = len(self._digests)
        some = sorted({0, read // 2, read - 1}) if read else []
        if self.known.size not in (0, reader.size) or any(
            _digests(*reader.read([k], 1), first=k)[0].ne(self._digests[k]).any() for k in some
        ):
            self._forget()
        return reader

    def _add(self, reader: SetReader, chosen: range) -> None:
        """Read some samples, the first of them once more by itself and from another seed.

        Raises:
            NotReadError: It was another one.
        """
        inputs, targets = reader.read(chosen, chosen.start)
        digests = _digests(inputs, targets, first=chosen.start)
        again = _digests(*reader.read(chosen[:1], chosen.start + 1), first=chosen.start)
        if bool((again[0] != digests[0]).any()):
            raise NotReadError("augmentation: an input differs when it is read again, so equal inputs mean nothing")
        self._digests = torch.cat([self._digests, digests])
        self._targets.append(targets.clone())

    def _floor(self, reader: SetReader, losses: SampleLosses) -> LossFloor | None:
        """Return the floor, with the numbers of the samples in the data set of the loader."""
        targets = torch.cat(self._targets)
        rows = targets.reshape(len(targets), -1)
        groups = [each for each in equal_rows(self._digests) if bool((rows[each] != rows[each[0]]).any())][:CONFLICTS]
        found = loss_floor(SampleLosses(losses.loss.loss_fn, targets, outputs=losses.outputs), groups)
        self._forget()
        if found is None:
            raise NotReadError("the infimum of this loss is not known")
        conflicts = tuple(tuple(reader.number(sample) for sample in each) for each in found.conflicts)
        return replace(found, conflicts=conflicts)

    def _forget(self) -> None:
        self._digests, self._targets = self._digests[:0], []

    def state_dict(self) -> dict[str, Any]:
        """Return what was read so far in plain types and tensors."""
        return {
            "known": asdict(self.known),
            "digests": self._digests,
            "targets": torch.cat(self._targets) if self._targets else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        known = dict(state["known"])
        floor = known.pop("floor")
        if floor is not None:
            floor = LossFloor(floor["value"], floor["forced"], tuple(tuple(each) for each in floor["conflicts"]))
        self.known = Known(floor=floor, **known)
        self._digests = state["digests"]
        self._targets = [] if state["targets"] is None else [state["targets"]]


def drawn_in_part(run: RunView) -> str:
    """Return why the run may not draw all samples equally often, so that a floor of the set is none of the run; empty if it does.

    Args:
        run: The run at this moment.
    """
    trainer = run.trainer
    with attempted(MisconfigurationException) as attempt:
        uneven = run.sampling.uneven
    if attempt.failed or uneven:
        return "the training data have no random access" if attempt.failed else uneven
    batches = len(trainer.train_dataloader) if trainer.train_dataloader is not None else 0
    if trainer.num_training_batches < batches:
        return f"an epoch has {trainer.num_training_batches} of the {batches} batches of the training set"
    return ""


def _digests(inputs: tuple[Tensor, ...], targets: Tensor, *, first: int) -> Tensor:
    found = b"".join(sample_digests(inputs, first=first))
    return torch.frombuffer(bytearray(found), dtype=torch.uint8).reshape(len(targets), DIGEST)
