"""``EqualInputs``: which samples have exactly the same inputs, however many there are."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import torch
from torch import Tensor

from lightning_conv.networks.inputs import Inputs, input_tensors, sample_count

DIGEST = 16
"""Bytes of a digest: that two of a million different samples share one has a probability of 1e-27."""


def sample_digests(inputs: Inputs, *, first: int = 0) -> list[bytes]:
    """Return a hash of ``DIGEST`` bytes for each sample; equal inputs have the same one.

    Args:
        inputs: As a network takes them, with the samples in the rows.
        first: Number of the first of them, by which a sample with NaN differs from all others.

    Raises:
        TypeError: The inputs are no tensors.
        ValueError: There is no sample, or tensors of several lengths.
    """
    sample_count(inputs)
    tensors = [each.detach().cpu() for each in input_tensors(inputs)]
    rows = [_bytes_of_rows(each) for each in tensors]
    found = []
    for number, whole in enumerate(torch.stack([_has_no_nan(each) for each in tensors]).all(0).tolist()):
        digest = hashlib.blake2b(digest_size=DIGEST)
        for part in [each[number] for each in rows] if whole else [b"NaN %d" % (first + number)]:
            digest.update(part)
        found.append(digest.digest())
    return found


def equal_rows(digests: Tensor) -> list[list[int]]:
    """Return the groups of more than one row with the same bytes, by number, in the order of their first members.

    Args:
        digests: Hashes, (n, ``DIGEST``) bytes.

    Cost: a sort of n numbers; of a million rows half a second.
    """
    if not len(digests):
        return []
    order = torch.argsort(digests.contiguous().view(torch.int64)[:, 0], stable=True)
    ordered = digests[order]
    heads = torch.cat([torch.tensor([True]), (ordered[1:, :8] != ordered[:-1, :8]).any(1), torch.tensor([True])])
    starts = heads.nonzero()[:, 0]
    lengths = starts.diff()
    found: list[list[int]] = []
    for start, length in zip(starts[:-1][lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
        members: dict[bytes, list[int]] = defaultdict(list)
        for row in order[start : start + length].tolist():
            members[digests[row].numpy().tobytes()].append(row)
        found += [each for each in members.values() if len(each) > 1]
    return sorted(found)


class EqualInputs:
    """Groups of samples with the same inputs, number for number; 0 and -0 are the same, and a sample with NaN is like no other.

    Samples may come in any number of portions. Kept are 16 bytes of each one, not the sample.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._known: dict[bytes, int] = {}
        self._groups: list[int] = []

    def add(self, inputs: Inputs) -> None:
        """Add samples, which are numbered on.

        Args:
            inputs: As a network takes them, with the samples in the rows.
        """
        for key in sample_digests(inputs, first=self.samples):
            self._groups.append(self._known.setdefault(key, len(self._known)))
            self.samples += 1

    @property
    def groups(self) -> Tensor:
        """Return the number of each sample's group, (n,); equal inputs have the same one, in the order of their first samples."""
        return torch.tensor(self._groups, dtype=torch.long)

    @property
    def repeated(self) -> list[list[int]]:
        """Return the groups of more than one sample, by the numbers of their samples."""
        members: dict[int, list[int]] = defaultdict(list)
        for sample, group in enumerate(self._groups):
            members[group].append(sample)
        return [each for each in members.values() if len(each) > 1]


def _bytes_of_rows(tensor: Tensor) -> list[bytes]:
    if tensor.is_floating_point() or tensor.is_complex():
        tensor = tensor + 0.0  # -0 becomes 0
    flat = tensor.reshape(len(tensor), -1).contiguous()
    return [row.numpy().tobytes() for row in flat.view(torch.uint8)] if flat.numel() else [b""] * len(flat)


def _has_no_nan(tensor: Tensor) -> Tensor:
    return ~torch.isnan(tensor.reshape(len(tensor), -1)).any(1)
