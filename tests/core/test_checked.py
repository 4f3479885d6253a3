"""Arguments against annotations: what fits, and what an error says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_conv.checked import SEED, check_arguments, checked, real, whole

if TYPE_CHECKING:
    from somewhere import Unknown


@checked(width=whole(1), scale=real(above=0), seed=SEED)
def function(
    x: Tensor | None = None,
    width: int = 1,
    scale: float = 1.0,
    seed: int = 0,
    *,
    count: int = 1,
    share: float = 0.5,
    flag: bool = False,
    mode: Literal["a", "b"] | None = "a",
    names: Sequence[str] | str = "x",
    pair: tuple[int, int] = (1, 2),
    steps: Mapping[float, int] | None = None,
    make: Callable[[], Any] | None = None,
    module: nn.Module | None = None,
    several: Iterable[int] = (),
    unknown: Unknown = 0,
    **more: int,
) -> dict[str, object]:
    """Return what was given."""
    return dict(locals())


RIGHT = [
    {"x": torch.eye(2)}, {"x": nn.Parameter(torch.eye(2))}, {"width": np.int64(3)}, {"scale": np.float32(0.5)}, {"scale": 2},
    {"count": 0}, {"share": float("nan")}, {"flag": True}, {"mode": "b"}, {"mode": None}, {"names": ["a", "b"]}, {"names": ()},
    {"pair": (3, 4)}, {"steps": {0.1: 5}}, {"make": dict}, {"module": nn.ReLU()}, {"several": [1, 2]}, {"several": (i for i in "ab")},
    {"unknown": object()}, {"other": "anything"}, {"seed": 2**64 - 1},
]  # fmt: skip
WRONG = {
    "x: 1 (int); need a tensor or None": {"x": 1},
    "x: a tensor that is sparse (torch.sparse_coo); need a dense tensor of real numbers or None": {
        "x": torch.eye(2).to_sparse()
    },
    "x: a tensor that is on the device meta, where it has no numbers; need a dense tensor of real numbers or None": {
        "x": torch.ones(2, device="meta")
    },
    "x: a tensor that is complex; need a dense tensor of real numbers or None": {"x": torch.ones(2) * 1j},
    "width: 0; need a whole number of at least 1": {"width": 0},
    "width: True (bool); need a whole number of at least 1": {"width": True},
    "width: None; need a whole number": {"width": None},
    "scale: -1; need a finite number above 0": {"scale": -1},
    "seed: 'x' (str); need a whole number, such as 0": {"seed": "x"},
    "count: 1.5 (float); need a whole number": {"count": 1.5},
    "share: '0.5' (str); need a number": {"share": "0.5"},
    "flag: 1 (int); need True or False": {"flag": 1},
    "mode: 'c' is not one of 'a', 'b'": {"mode": "c"},
    "mode: 3 (int); need 'a', 'b' or None": {"mode": 3},
    "names: [1, 2] (list); need a sequence whose members are each a string or a string": {"names": [1, 2]},
    "pair: (1,) (tuple); need a tuple whose members are each a whole number": {"pair": (1,)},
    "steps: [1] (list); need a mapping of a number to a whole number or None": {"steps": [1]},
    "make: 3 (int); need a function or None": {"make": 3},
    "module: the class Linear; need an nn.Module or None": {"module": nn.Linear},
    "several: ['a'] (list); need a sequence whose members are each a whole number": {"several": ["a"]},
}


@pytest.mark.parametrize("given", RIGHT, ids=lambda given: next(iter(given)))
def test_what_fits_is_passed_on(given):
    found = function(**given)
    assert all(value is (found[name] if name in found else found["more"][name]) for name, value in given.items())


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message):
    with pytest.raises((TypeError, ValueError)) as error:
        function(**WRONG[message])
    assert str(error.value) == message


def test_the_same_within_a_function():
    with pytest.raises(TypeError, match=r"^count: 'x' \(str\); need a whole number$"):
        check_arguments(function, {"count": "x", "what": 3})
    with pytest.raises(ValueError, match=r"^width: -1; need a whole number of at least 1$"):
        check_arguments(function, {"width": -1}, width=whole(1))


def test_a_decorated_function_keeps_its_name_and_says_what_python_says():
    assert function.__name__ == "function"
    assert function.__doc__ == "Return what was given."
    with pytest.raises(TypeError, match="multiple values"):
        function(torch.eye(2), x=1)
