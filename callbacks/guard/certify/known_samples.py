"""``KnownSamples``: the samples and features that the certificate is about, and whether later ones are still these."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from typing import Any

import torch
from torch import Tensor

from lightning_conv.callbacks.guard.certify.checks import Check
from lightning_conv.callbacks.guard.certify.features_compared import DIRECTIONS, Expected, project
from lightning_conv.callbacks.guard.certify.training_pass import Walk
from lightning_conv.callbacks.guard.state import GuardState
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.data.sample_keys import batch_keys
from lightning_conv.callbacks.run.data.trunk_rows import TrunkRows
from lightning_conv.callbacks.run.guarded import attempted

REMEMBERED = 4096  # samples of phase 1, the last ones
ROWS = 64  # samples, evenly spaced, whose features are computed again
AGREEMENT = 1e-9  # relative difference of the projections in float64 up to which the features are the same


class KnownSamples:
    """Remembers what entered and left the trunk when it was certified.

    Of every sample a 128-bit hash of all that the training step gets of it, targets included, and its features on four random directions
    are kept for the run, and one hash of all of them for the checkpoint, with the features of up to 64 samples, computed in float64 and
    projected.

    Args:
        view: The run.
        state: State of the guard, whose ``certified_on`` is filled by ``learn``.

    Cost: 48 bytes per sample; of a comparison: a forward of 64 samples in float64; of a batch: its hash, for which it is copied to the CPU.
    """

    def __init__(self, view: GuardView, state: GuardState) -> None:
        self._view, self._state = view, state
        self._known: dict[bytes, int] = {}  # hash -> row of the projected features
        self._copies: Counter[bytes] = Counter()  # of each hash among the samples
        self._projected: Tensor | None = None
        self._spread = torch.zeros(DIRECTIONS)
        self._sizes: Tensor | None = None
        self._seen: deque[bytes] = deque(maxlen=REMEMBERED)  # in batches before the switch
        self._drawn: Counter[bytes] | None = None  # in this epoch of phase 2, if it was seen from its first batch on
        self._begun: list[bytes] | None = None  # of a batch without an end

    def learn(self, walked: Walk) -> list[Check]:
        """Take in the samples of the certificate; where a checkpoint holds some, compare these with them.

        Args:
            walked: A pass over the training set.
        """
        keys = walked.keys
        if keys is None:
            return [Check("fixed inputs", None, "the samples are no plain tensors, so that they cannot be recognised")]
        self._known, self._copies = {key: row for row, key in enumerate(keys)}, Counter(keys)
        if walked.projected is not None and walked.spread is not None:
            self._projected, self._spread = walked.projected.reshape(len(keys), -1, DIRECTIONS), walked.spread
            self._sizes = walked.sizes
        strange, self._seen = not self._known.keys() >= set(self._seen), deque(maxlen=REMEMBERED)
        digest = hashlib.sha256(b"".join(keys)).hexdigest()
        with attempted(Exception) as attempt:
            features = self._features()
        if attempt.failed:
            return [Check("trunk unmoved", None, f"the features could not be computed again ({attempt.reason})")]
        if not self._state.certified_on and self._state.phase == 2:
            return [
                Check(
                    "fixed inputs",
                    None,
                    "at the switch it could not be recorded which samples the certificate is about",
                )
            ]
        if not self._state.certified_on:
            bias = self._view.head.has_bias
            held = {"digest": digest, "features": features.tolist(), "bias": bias, "loss": self._view.loss.kind.name}
            self._state.certified_on |= held
            said = "batches before the switch held samples that are not those of the training set as it is read here"
            return [Check("fixed inputs", False, said)] if strange else []
        known, found = self._state.certified_on, self._moved(features)
        if digest != known["digest"]:
            found.append(Check("fixed inputs", False, "the training set is another one than that of the certificate"))
        if self._view.head.has_bias != known.get("bias", self._view.head.has_bias):
            found.append(
                Check("steps of the rule", False, "the head's bias is trained now and was not, or the other way round")
            )
        if self._view.loss.kind.name != known.get("loss", self._view.loss.kind.name):
            found.append(Check("same loss to the end", False, "the loss is another one than that of the certificate"))
        return found

    def compare(self) -> list[Check]:
        """Compare the features of some samples with those that were certified. All ranks call it together."""
        if not self._state.certified_on:
            return []
        with attempted(Exception) as attempt:
            return self._moved(self._features())
        return [Check("trunk unmoved", None, f"the features could not be computed again ({attempt.reason})")]

    def _moved(self, now: Tensor) -> list[Check]:
        then = torch.tensor(self._state.certified_on["features"], dtype=torch.float64)
        if then.shape == now.shape and bool(((now - then).abs() <= AGREEMENT * then.abs().max()).all()):
            return []
        return [Check("trunk unmoved", False, "the trunk computes other features than those that were certified")]

    def _features(self) -> Tensor:
        data, head = self._view.data, self._view.head
        chosen = torch.linspace(0, data.size - 1, min(ROWS, data.size)).round().long().tolist()
        return project(TrunkRows.of(data, self._view.network, head, torch.float64).at(chosen))

    def remember(self, batch: Any) -> None:
        """Keep the hashes of a batch of phase 1, to compare them at the switch; nothing where the batch is on another device than the CPU.

        Args:
            batch: The batch that the training step is about to see.
        """
        if self._view.module.device.type == "cpu":
            with attempted(Exception):
                self._seen.extend(self._keys(batch) or ())

    def _keys(self, batch: Any) -> list[bytes] | None:
        return batch_keys(self._view.loss.with_targets(batch), self._view.data.inputs_in(batch))

    def look(self, batch: Any, batch_idx: int) -> tuple[list[Check], Expected | None]:
        """Look at a batch of phase 2.

        Args:
            batch: The batch that the training step is about to see.
            batch_idx: Its number in the epoch.

        Returns:
            What is wrong with it, and the features that its samples must have; None: they are not known.
        """
        if not self._known:
            return [], None
        self._drawn = Counter() if batch_idx == 0 else self._drawn
        with attempted(Exception):
            keys = self._begun = self._keys(batch) or []
            if keys and self._known.keys() >= set(keys):
                rows = [self._known[key] for key in keys]
                if self._projected is None:
                    return [], None
                projected = self._projected[rows].flatten(0, 1)
                return [], Expected(projected, sizes=self._sizes, spread=self._spread)
        said = f"a batch holds samples that were not certified (first at step {self._view.trainer.global_step})"
        return [Check("fixed inputs", False, said)], None

    def after_batch(self, last: bool) -> list[Check]:
        """Count the samples of a batch, and return after the last one of an epoch whether all were drawn equally often, by one process.

        Args:
            last: Whether it is the last batch of the epoch.
        """
        begun, self._begun = self._begun, None
        if self._drawn is None or not begun:
            return []
        self._drawn.update(begun)
        if not last or not self._view.data.sampling.every_epoch_is_whole:
            return []
        drawn, self._drawn = self._drawn, None
        times = {drawn[key] / self._copies[key] for key in self._known}
        return [] if len(times) == 1 else self._unequal("an epoch did not draw every training sample equally often")

    def after_epoch(self, ending: bool) -> list[Check]:
        """Return whether a batch was skipped: it began and has no end; or whether the epoch ended before its last batch.

        Args:
            ending: Whether the run is about to end, which may be inside an epoch.
        """
        begun, self._begun = self._begun, None
        drawn, self._drawn = self._drawn, None
        if begun:
            return self._unequal("a batch was skipped, because a hook returned -1 at its start")
        if drawn and not ending and self._view.data.sampling.every_epoch_is_whole:
            return self._unequal("an epoch ended before its last batch")
        return []

    def _unequal(self, said: str) -> list[Check]:
        return [Check("every sample alike", False, f"{said} (first at step {self._view.trainer.global_step})")]
