"""``KnownSamples``: the samples and features that the certificate is about, and whether later ones are still these."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_conv.callbacks.guard.certify.checks import Check
from lightning_conv.callbacks.guard.state import GuardState
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.batch import InputFn, take_inputs
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.sample_keys import keys_of

REMEMBERED = 4096  # samples of phase 1, the last ones
ROWS = 64  # samples, evenly spaced, whose features are computed again
DIRECTIONS = 4  # random directions on which these features are projected
AGREEMENT = 1e-9  # relative difference of the projections in float64 up to which the features are the same


class KnownSamples:
    """Remembers what entered and left the trunk when it was certified.

    Of every sample a 128-bit hash is kept for the run, and one of all of them for the checkpoint; of up to 64 samples the features,
    computed in float64 and projected on four random directions.

    Args:
        view: The run.
        input_fn: Function that takes the model's input out of a batch, see ``Probe``.
        state: State of the guard, whose ``certified_on`` is filled by ``learn``.

    Cost of a comparison: a forward of 64 samples in float64. Of a batch: its hash; where the batch is on another device than the CPU
    only in the first epoch of phase 2, and in the first batch of each epoch.
    """

    def __init__(self, view: GuardView, input_fn: InputFn | None, state: GuardState) -> None:
        self._view, self._input_fn, self._state = view, input_fn, state
        self._known: set[bytes] = set()
        self._seen: deque[bytes] = deque(maxlen=REMEMBERED)  # in batches before the switch
        self._first_epoch: int | None = None  # of phase 2 in this part of the run

    def learn(self, keys: Sequence[bytes] | None) -> list[Check]:
        """Take in the samples of the certificate; where a checkpoint holds some, compare these with them.

        Args:
            keys: Hashes of all samples, in the order of the training set; None: they have none.
        """
        if keys is None:
            return [Check("fixed inputs", None, "the samples are no plain tensors, so that they cannot be recognised")]
        self._known = set(keys)
        strange, self._seen = not self._known.issuperset(self._seen), deque(maxlen=REMEMBERED)
        digest = hashlib.sha256(b"".join(keys)).hexdigest()
        with attempted(Exception) as attempt:
            features = self._features()
        if attempt.failed:
            return [Check("trunk unmoved", None, f"the features could not be computed again ({attempt.reason})")]
        if not self._state.certified_on:
            self._state.certified_on |= {"digest": digest, "features": features.tolist()}
            said = "batches before the switch held samples that are not those of the training set as it is read here"
            return [Check("fixed inputs", False, said)] if strange else []
        same = digest == self._state.certified_on["digest"]
        said = "the training set is another one than that of the certificate"
        return [*([] if same else [Check("fixed inputs", False, said)]), *self._moved(features)]

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
        rows = data.feature_rows(self._view.network, head, torch.float64).at(chosen)
        return rows @ torch.randn(
            head.width, DIRECTIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )

    def remember(self, batch: Any) -> None:
        """Keep the hashes of a batch of phase 1, to compare them at the switch; nothing where the batch is on another device than the CPU.

        Args:
            batch: The batch that the training step is about to see.
        """
        if self._view.module.device.type == "cpu":
            with attempted(Exception):
                self._seen.extend(keys_of(take_inputs(batch, self._input_fn)) or ())

    def look(self, batch: Any, batch_idx: int) -> list[Check]:
        """Return whether a batch of phase 2 holds a sample that was not certified.

        Args:
            batch: The batch that the training step is about to see.
            batch_idx: Its number in the epoch.
        """
        if not self._known:
            return []
        epoch = self._view.trainer.current_epoch
        self._first_epoch = epoch if self._first_epoch is None else self._first_epoch
        with attempted(Exception):
            inputs = take_inputs(batch, self._input_fn)
            if self._view.module.device.type != "cpu" and epoch > self._first_epoch and batch_idx > 0:
                return []
            if set(keys_of(inputs) or ()) <= self._known:
                return []
        said = f"a batch holds samples that were not certified (first at step {self._view.trainer.global_step})"
        return [Check("fixed inputs", False, said)]
