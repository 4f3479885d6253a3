"""Tensors are found in any structure, and put back into one of the same kind."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from lightning_conv.networks.observed.leaves import at, tensors_in, with_tensors

Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    name: str


X, Y = torch.zeros(3), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("structure", "places"),
    [
        (X, [()]),
        ([X, {"a": Y, "n": 3}], [(0,), (1, "a")]),
        (Pair(X, (Y, None)), [(0,), (1, 0)]),
        (Sample(X, "cat"), [("image",)]),
        (SimpleNamespace(loss=X, logits=Y), [("loss",), ("logits",)]),
        (OrderedDict(b=Y, a=X), [("b",), ("a",)]),
        ("text", []),
    ],
)
def test_every_tensor_has_a_place_and_stands_there(structure, places):
    found = list(tensors_in(structure))
    assert [place for place, _ in found] == places
    assert all(at(structure, place) is tensor for place, tensor in found)
    doubled = with_tensors(structure, lambda place, tensor: tensor + 1)
    assert type(doubled) is type(structure)
    assert all(torch.equal(at(doubled, place), tensor + 1) for place, tensor in found)
    assert all(at(structure, place) is tensor for place, tensor in found)  # the original is as it was


def test_what_holds_no_tensor_is_shared():
    part = {"names": ["a", "b"]}
    assert with_tensors([X, part], lambda place, tensor: tensor + 1)[1] is part


def test_a_place_that_is_not_there_is_named():
    with pytest.raises(LookupError, match="'b'"):
        at({"a": X}, ("b",))
