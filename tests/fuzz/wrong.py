"""Values that are wrong, or nearly right, for an argument: numbers, tensors, modules, functions and names."""

from __future__ import annotations

import decimal
import fractions
import math
import warnings

import numpy as np
import torch
from torch import Tensor, nn


class Opaque:
    """An object of a class that nobody knows."""

    def __repr__(self):
        return "<opaque>"


NUMBERS = {
    "half": 2.5,
    "minus one": -1,
    "zero": 0,
    "minus zero": -0.0,
    "tiny": 1e-320,
    "huge": 1e30,
    "huge whole": 10**13,
    "nan": math.nan,
    "inf": math.inf,
    "minus inf": -math.inf,
    "complex": 1 + 2j,
    "true": True,
    "numpy float": np.float64(0.5),
    "numpy float32 nan": np.float32("nan"),
    "numpy int": np.int64(3),
    "numpy bool": np.bool_(True),
    "numpy array": np.array([1.0, 2.0]),
    "fraction": fractions.Fraction(1, 2),
    "decimal": decimal.Decimal("0.5"),
    "tensor of one": torch.tensor(1.0),
    "tensor of two": torch.tensor([1, 2]),
}
OTHERS = {
    "none": None,
    "text": "x",
    "empty text": "",
    "bytes": b"trace",
    "list": [1, 2],
    "empty list": [],
    "empty tuple": (),
    "list of text": ["a", "b"],
    "dict": {"a": 1},
    "set": {1},
    "object": Opaque(),
    "class": Opaque,
    "function": lambda *args, **kwargs: None,
    "raises": lambda *args, **kwargs: 1 / 0,
    "generator": (each for each in ()),
    "range": range(3),
    "module class": nn.Linear,
    "module": nn.Linear(3, 2),
    "dtype": torch.float32,
    "device": torch.device("cpu"),
}


def tensors_like(right: Tensor) -> dict[str, object]:
    """Return tensors that are wrong in one way where a given one is right."""
    floating = right if right.is_floating_point() else right.float()
    found: dict[str, object] = {
        "no rows": right[:0],
        "one row": right[:1],
        "a row fewer": right[:-1],
        "a dimension more": right[..., None],
        "flat": right.flatten(),
        "one number": torch.tensor(1.0),
        "integers": floating.mul(3).round().long(),
        "bool": floating > 0,
        "half": floating.half(),
        "bfloat16": floating.bfloat16(),
        "float64": floating.double(),
        "complex": torch.complex(floating, floating),
        "nan": torch.where(torch.arange(floating.numel()).view_as(floating) == 1, math.nan, floating),
        "all nan": torch.full_like(floating, math.nan),
        "inf": torch.where(torch.arange(floating.numel()).view_as(floating) == 1, math.inf, floating),
        "huge": floating * 1e30,
        "zeros": torch.zeros_like(floating),
        "meta": right.to("meta"),
        "sparse": floating.to_sparse(),
        "not contiguous": torch.stack([right, right], -1)[..., 0],
        "with gradient": floating.clone().requires_grad_(),
        "numpy": right.numpy(),
        "nested list": right.tolist(),
        "parameter": nn.Parameter(floating.clone()),
        "expanded": right[:1].expand_as(right),
    }
    if right.ndim > 1:
        found |= {"no columns": right[:, :0], "a column fewer": right[:, :-1], "transposed": right.mT}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["nested"] = torch.nested.nested_tensor([floating[0], floating[1]])
        found["quantised"] = torch.quantize_per_tensor(floating.detach().float(), 0.1, 0, torch.qint8)
    return found


class Says(nn.Module):
    """A module that returns something else."""

    def __init__(self, what):
        super().__init__()
        self.layer, self.what = nn.Linear(3, 2), what

    def forward(self, *args, **kwargs):
        return self.what(self.layer(args[0])) if callable(self.what) else self.what


def modules() -> dict[str, object]:
    """Return modules that no kernel can be computed of, or hardly one."""
    half = nn.Linear(3, 2).half()
    frozen = nn.Linear(3, 2).requires_grad_(False)
    return {
        "without parameters": nn.ReLU(),
        "empty": nn.Sequential(),
        "lazy": nn.LazyLinear(2),
        "of other inputs": nn.Linear(7, 2),
        "half": half,
        "complex": nn.Linear(3, 2, dtype=torch.complex64),
        "meta": nn.Linear(3, 2, device="meta"),
        "frozen": frozen,
        "returns none": Says(None),
        "returns a pair": Says(lambda u: (u, u)),
        "returns a dict": Says(lambda u: {"logits": u}),
        "returns integers": Says(lambda u: u.argmax(1)),
        "returns one number": Says(lambda u: u.sum()),
        "returns nan": Says(lambda u: u * math.nan),
        "raises": Says(lambda u: u @ u),
        "random": nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train(),
        "no rows": Says(lambda u: u[:0]),
        "detached": Says(lambda u: u.detach()),
    }


def functions() -> dict[str, object]:
    """Return functions that return, or do, something else than is asked for."""
    return {
        "returns none": lambda *args, **kwargs: None,
        "returns text": lambda *args, **kwargs: "x",
        "returns nan": lambda *args, **kwargs: torch.tensor(math.nan),
        "takes nothing": lambda: torch.tensor(1.0),
        "raises": lambda *args, **kwargs: 1 / 0,
        "returns its argument": lambda first, *args, **kwargs: first,
        "loss of samples": nn.MSELoss(reduction="none"),
        "a class": nn.MSELoss,
    }


def wrong_for(right: object) -> dict[str, object]:
    """Return all values that are tried in place of a right one, by their names."""
    found = {f"number: {name}": each for name, each in NUMBERS.items()}
    found |= {f"other: {name}": each for name, each in OTHERS.items()}
    if isinstance(right, Tensor):
        found |= {f"tensor: {name}": each for name, each in tensors_like(right).items()}
    elif isinstance(right, nn.Module):
        found |= {f"module: {name}": each for name, each in modules().items()}
    elif isinstance(right, str):
        found |= {"name: misspelt": right[:-1], "name: capitals": right.upper(), "name: spaced": f" {right} "}
    elif callable(right):
        found |= {f"function: {name}": each for name, each in functions().items()}
    else:
        found |= {f"tensor: {name}": each for name, each in tensors_like(torch.ones(4, 3)).items() if name == "meta"}
    return found
