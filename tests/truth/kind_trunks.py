"""Trunks: casts, couplings of samples, paths of evaluation alone, and features of a rank that is known to be too low."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from adversary import Case, Kind
from judge import judge
from runs import Run, plain
from torch import Tensor, nn


class Through(nn.Module):
    """An affine map to the width of the head, and a function behind it."""

    def __init__(self, case: Case, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        width = case.n + case.spare
        self.wide, self.low, self.function = nn.Linear(case.inputs, width), nn.Linear(width, 2), function
        self.again = nn.Linear(2, width)
        self.gain = nn.Parameter(torch.ones(width))
        self.register_buffer("narrow", torch.ones(width, dtype=torch.float16))
        self.cell = nn.LSTM(case.inputs, width, batch_first=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def soft(z: Tensor) -> Tensor:
    return F.softplus(z, 10)


# A cast before an affine-in-exact-arithmetic map: the true rank of [h, 1] is at most inputs + 2 < n.
CASTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "float() and back": lambda m, x: m.wide(x).float().to(x),
    "rms norm in float32": lambda m, x: (
        (z := m.wide(x).float()).mul(torch.rsqrt(z.square().mean(-1, True) + 1e-6)).type_as(x) * m.gain
    ),
    "type_as a half buffer": lambda m, x: m.wide(x).type_as(m.narrow).to(x),
    "product with numbers of float32": lambda m, x: (m.wide(x).float() * torch.ones(1)).to(x),
    "bfloat16": lambda m, x: m.wide(x).to(torch.bfloat16).to(x),
    "autocast": lambda m, x: _autocast(m, x),
    "complex64": lambda m, x: torch.view_as_real(torch.complex(m.wide(x).float(), 0 * m.wide(x).float()))[..., 0].to(x),
    "numpy-like copy into float32": lambda m, x: torch.empty(len(x), m.wide.out_features).copy_(m.wide(x)).to(x),
    "einsum in float32": lambda m, x: torch.einsum("ni,oi->no", x.float(), m.wide.weight.float()).to(x),
    "rounded to integers over 1000": lambda m, x: (
        z + ((z * 1e6).round() / 1e6 - z).detach() if (z := m.wide(x)) is not None else z
    ),
    "out= of float32": lambda m, x: torch.add(m.wide(x).float(), 1.0).to(x),
    "fft in complex64": lambda m, x: torch.fft.ifft(torch.fft.fft(m.wide(x).float())).real.to(x),
}


def _autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.wide(x).to(x)


COUPLINGS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "less the batch's mean": lambda m, x: soft((z := m.wide(x)) - z.mean(0)),
    "running sum": lambda m, x: soft(m.wide(x).cumsum(0)),
    "the sample before": lambda m, x: soft(m.wide(x) + 0.5 * m.wide(x).roll(1, 0)),
    "earlier samples' mean": lambda m, x: soft(m.wide(x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None])),
    "sorted over the batch": lambda m, x: soft(m.wide(x).sort(0).values),
    "softmax over the batch": lambda m, x: m.wide(x).softmax(0) + soft(m.wide(x)),
    "time and batch swapped": lambda m, x: m.cell(x[:, None])[0][:, 0],
    "over the largest of the batch": lambda m, x: soft(m.wide(x)) / m.wide(x).abs().max(),
    "standardised over the batch": lambda m, x: F.batch_norm(soft(m.wide(x)), None, None, training=True),
    "attention over the batch": lambda m, x: F.scaled_dot_product_attention(*[soft(m.wide(x))[None]] * 3)[0],
    "gram of the batch": lambda m, x: soft(m.wide(x)) + (x @ x.T).mean(1, keepdim=True),
    "position in the batch": lambda m, x: soft(m.wide(x) + torch.arange(len(x))[:, None] / len(x)),
    "number of samples": lambda m, x: soft(m.wide(x) * len(x)),
    "batch normalised by a threshold": lambda m, x: soft(m.wide(x) * (2.0 if torch.sin(50 * x.mean()) > 0 else 1.0)),
}

PATHS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "no parameter needs a gradient": lambda m, x: (
        soft(m.wide(x)) if any(p.requires_grad for p in m.parameters()) else 0.5 * m.wide(x).tanh()
    ),
    "its weight needs no gradient": lambda m, x: soft(m.wide(x)) if m.wide.weight.requires_grad else m.wide(x).tanh(),
    "in eval mode with gradients": lambda m, x: (
        m.wide(x).tanh() if torch.is_grad_enabled() and not m.training else soft(m.wide(x))
    ),
    "without gradients": lambda m, x: soft(m.wide(x)) if torch.is_grad_enabled() else m.wide(x).tanh(),
    "result needs a gradient": lambda m, x: soft(z) if (z := m.wide(x)).requires_grad else z.tanh(),
    "of float64": lambda m, x: m.wide(x).tanh() if x.dtype == torch.float64 else soft(m.wide(x)),
    "of few samples": lambda m, x: m.wide(x).tanh() if len(x) < 10 else soft(m.wide(x)),
    "noise": lambda m, x: soft(m.wide(x)) + 0.1 * torch.randn(1).to(x),
    "noise where gradients are": lambda m, x: (
        soft(m.wide(x)) + (0.3 * torch.randn(1).to(x) if torch.is_grad_enabled() else 0)
    ),
    "dropout always": lambda m, x: F.dropout(soft(m.wide(x)), 0.3, True),
}

LOW: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "affine": lambda m, x: m.wide(x),
    "bottleneck": lambda m, x: m.again(m.low(soft(m.wide(x)))),
    "zero": lambda m, x: 0 * m.wide(x),
    "softplus in its line": lambda m, x: F.softplus(m.wide(x) + 60),
    "dead ReLU": lambda m, x: F.relu(m.wide(x) - 1e3),
    "equal columns": lambda m, x: soft(m.wide(x)[:, :3]).repeat(1, 20)[:, : m.wide.out_features],
    "squares of few": lambda m, x: torch.cat([x[:, :1] ** k for k in range(1, 6)], 1).repeat(1, 20)[
        :, : m.wide.out_features
    ],
    "signs": lambda m, x: m.wide(x) * 0 + x[:, :1].sign(),
    "saturated tanh": lambda m, x: torch.tanh(m.wide(x) + 60),
    "sum of two": lambda m, x: m.wide(x) + (0 * m.wide(x)).tanh(),
}
# With what rank is known to be too low the targets of a distance decide; cross-entropy may still be separated, and the judge looks.
GROUPS = {"casts": CASTS, "couplings": COUPLINGS, "paths": PATHS, "low": LOW}


def build(case: Case) -> Run:
    function = GROUPS[case.kind][case.variant]
    torch.manual_seed(case.seed)
    true = case.kind in ("low", "casts") or (case.variant == "of float64" and case.precision == "64-true")
    true = true or (case.variant == "of few samples" and case.batch == 5)  # all batches are small
    return plain(case, Through(case, function), claimable=true, covered=False, shuffled=case.kind == "couplings")


def kind(name: str, each: int, losses: tuple[str, ...]) -> Kind:
    draws = ("batch", "rule", "method", "loss", "precision", "module", "n", "inputs", "spare", "classes", "seed")
    # Batches of another composition every time: in one fixed order a coupling is a part of the features.
    choices = {
        "loss": losses,
        "batch": (5,) if name == "couplings" else (0, 5),
        "method": ("auto", "singular", "alignment", "distinct"),
    }
    return Kind(name, list(GROUPS[name]), lambda case: judge(case, build), draws, each, choices)


KINDS = [
    kind("casts", 9, ("mse", "huber")),
    kind("couplings", 8, ("cross entropy", "mse", "huber", "bce")),
    kind("paths", 10, ("cross entropy", "mse", "huber", "bce")),
    kind("low", 10, ("mse", "cross entropy", "huber", "bce")),
]
