"""Numbers of the core without a run: rank and singular values at every scale, the solved head, kernels, and non-analytic pieces."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import torch
import torch.nn.functional as F
from adversary import Case, Kind, reason
from scipy.optimize import minimize
from torch import Tensor, nn

from lightning_conv import HeadProblem, certify_expressivity, head_curvature, kernel_spectrum, ntk_gram, solve_head
from lightning_conv.networks.analytic import find_kinks

mpmath.mp.dps = 60


def whole_numbers(case: Case, rows: int, columns: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(case.seed)
    return torch.randint(-9, 10, (rows, columns), generator=draw).tolist()


SHAPES: dict[str, Callable[[Case], list[list[int]]]] = {
    "random": lambda case: whole_numbers(case, case.n // 3, case.n // 3 + 2),
    "two equal rows": lambda case: [*(m := whole_numbers(case, case.n // 3, case.n // 3 + 2))[:-1], m[0]],
    "a row that is a sum": lambda case: (
        [*(m := whole_numbers(case, 4, 6))[:3], [a + b for a, b in zip(m[0], m[1], strict=True)]]
    ),
    "rank one": lambda case: [[(i + 1) * v for v in whole_numbers(case, 1, 6)[0]] for i in range(4)],
    "diagonal": lambda case: [[(i + 2) * (i == k) for k in range(5)] for i in range(5)],
    "ones and one": lambda case: [[1 + (i == k) * (case.seed % 2) for k in range(5)] for i in range(4)],
}


def singular_values(matrix: Any) -> list[Any]:
    return sorted(mpmath.svd_r(mpmath.matrix(matrix), compute_uv=False), reverse=True)


def rank_and_scale(case: Case) -> str:
    """Compare sigma_min, sigma_max and the verdict with 60 digits, for whole numbers times a power of two."""
    whole = SHAPES[case.variant](case)
    power = round(case.scale * math.log2(10))
    h = torch.tensor(whole, dtype=torch.float64) * 2.0**power
    true = [value * mpmath.mpf(2) ** power for value in singular_values(whole)]
    try:
        found = certify_expressivity(h, method="singular", bias=False)
        curved = head_curvature(HeadProblem(h, torch.zeros(len(h), 1, dtype=torch.float64), nn.MSELoss(), bias=False))
    except (ValueError, ArithmeticError) as error:
        return "refused" if reason(error) else ""
    full = len(whole) <= len(whole[0]) and true[-1] > true[0] * mpmath.mpf(10) ** -50
    assert found.verdict != "certified" or full, f"certified: {true}"
    assert found.verdict != "refuted" or not full, f"refuted: {true}"
    assert found.rank_lower <= sum(value > true[0] * mpmath.mpf(10) ** -50 for value in true)
    for bounded, value in ((found.sigma_min, true[-1]), (found.sigma_max, true[0]), (curved.sigma_max, true[0])):
        if bounded is not None and bounded.certified:
            assert mpmath.mpf(bounded.lower) <= value * (1 + mpmath.mpf(10) ** -45), f"{value} below {bounded}"
            assert value * (1 - mpmath.mpf(10) ** -45) <= mpmath.mpf(bounded.upper), f"{value} above {bounded}"
    return found.verdict


def solved(case: Case) -> str:
    """Compare the bounds of the head's problem with scipy's minimum of the loss itself."""
    torch.manual_seed(case.seed)
    n = case.n
    h = torch.randn(n, 3 if case.variant == "narrow" else n + 2, dtype=torch.float64)
    if case.variant == "equal rows":
        h[1] = h[0]
    if case.variant == "nearly equal rows":
        h[1] = h[0] + 1e-9 * h[1]
    if case.variant == "one large column":
        h[:, 0] *= 1e8
    y = torch.randint(0, 2, (n,)) if case.loss == "cross entropy" else torch.randn(n, 2, dtype=torch.float64)
    y = (y > 0).double() if case.loss == "bce" else y
    losses = {
        "cross entropy": nn.CrossEntropyLoss,
        "mse": nn.MSELoss,
        "huber": nn.HuberLoss,
        "bce": nn.BCEWithLogitsLoss,
    }
    loss = losses[case.loss]()
    problem = HeadProblem(h, y, loss, bias=True, outputs=2)
    found = solve_head(problem, tol=1e-6)
    ones = torch.cat([h, torch.ones(n, 1, dtype=torch.float64)], 1)

    def value(w: Any) -> tuple[float, Any]:
        weights = torch.tensor(w, dtype=torch.float64).reshape(2, -1).requires_grad_()
        at = loss(ones @ weights.T, y)
        (slope,) = torch.autograd.grad(at, weights)
        return float(at.detach()), slope.flatten().numpy()

    best = minimize(value, [0.0] * (2 * ones.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 3000}).fun
    assert best >= -1e-12
    dual = found.head_infimum
    if dual is not None and math.isinf(dual.radius):
        assert dual.lower <= best * (1 + 1e-9) + 1e-12, f"lower bound {dual.lower} above a loss {best}"
    if found.infimum is not None:
        assert found.infimum.lower <= 1e-12
    return found.verdict


class Tied(nn.Module):
    """A small network with weights that are used twice, or are complex."""

    def __init__(self, variant: str, inputs: int, width: int) -> None:
        super().__init__()
        self.variant, self.a, self.c = variant, nn.Linear(inputs, width), nn.Linear(width, 1)
        self.b = nn.Linear(width, width)
        if variant == "tied modules":
            self.d = self.b
        if variant == "tied transposed":
            self.d = nn.Linear(width, width)
            self.d.weight = self.b.weight
        if variant.startswith("complex"):
            self.z = nn.Parameter(torch.randn(width, dtype=torch.complex128) / 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = torch.tanh(self.b(h))
        if self.variant in ("tied modules", "tied transposed"):
            h = torch.tanh(self.d(h))
        if self.variant == "used twice":
            h = torch.tanh(self.b(h))
        if self.variant == "complex modulus":
            h = h + (h * self.z).abs()
        if self.variant == "complex parts":
            h = (h * self.z).real + (h * self.z.conj() * 1j).real
        if self.variant == "weight of both":
            h = F.linear(h, self.b.weight.T @ self.b.weight)
        return self.c(h)


def kernel(case: Case) -> str:
    """Compare the kernel and its spectrum with a double loop of autograd in float64."""
    torch.manual_seed(case.seed)
    model, x = Tied(case.variant, case.inputs, 4).double(), torch.randn(5, case.inputs, dtype=torch.float64)
    weights, rows = list(dict.fromkeys(model.parameters())), []
    for each in x:
        parts = torch.autograd.grad(model(each[None]).sum(), weights, allow_unused=True)
        whole = [torch.zeros_like(w) if g is None else g for g, w in zip(parts, weights, strict=True)]
        rows.append(torch.cat([(torch.view_as_real(g) if g.is_complex() else g).flatten() for g in whole]))
    true = torch.stack([torch.stack([a @ b for b in rows]) for a in rows])
    try:
        gram = ntk_gram(model, x)
    except (ValueError, TypeError, NotImplementedError) as error:
        return "refused" if reason(error) else ""
    assert torch.allclose(gram.matrix.double(), true, rtol=1e-6, atol=1e-6 * float(true.abs().max())), "another kernel"
    values, found = torch.linalg.eigvalsh(true), kernel_spectrum(gram)
    slack = 1e-12 * float(values[-1])
    for bounded, value in ((found.lambda_min, values[0]), (found.lambda_max, values[-1])):
        if bounded.certified:
            assert bounded.lower - slack <= float(value) <= bounded.upper + slack, f"{value} outside {bounded}"
    return "bounds hold"


PIECES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "abs": torch.abs,
    "max of two": lambda z: torch.maximum(z, -z),
    "fmax": lambda z: torch.fmax(z, 0 * z),
    "sign": lambda z: z * torch.sign(z),
    "heaviside": lambda z: z * torch.heaviside(z, z.new_zeros(1)),
    "where": lambda z: torch.where(z > 0, z, 0.1 * z),
    "comparison": lambda z: z * (z > 0),
    "clamp": lambda z: z.clamp(-0.1, 0.1),
    "cast to int": lambda z: z - z.int(),
    "fmod": lambda z: torch.fmod(z, 0.3),
    "floor": lambda z: z - z.floor(),
    "smooth l1": lambda z: F.smooth_l1_loss(z, 0 * z, reduction="none"),
    "huber": lambda z: F.huber_loss(z, 0 * z, reduction="none"),
    "root of a square": lambda z: (z * z).sqrt(),
    "power of a square": lambda z: (z * z) ** 0.5,
    "norm": lambda z: z.norm(dim=1, keepdim=True).expand_as(z),
    "sort": lambda z: z.sort(1).values,
    "largest of a row": lambda z: z.amax(1, keepdim=True).expand_as(z),
    "topk": lambda z: z.topk(2, 1).values.repeat(1, 3),
    "median": lambda z: z.median(1, keepdim=True).values.expand_as(z),
    "branch": lambda z: z if float(z.sum()) > 0 else -z,
    "scatter of maxima": lambda z: z.new_zeros(z.shape).scatter_reduce(1, torch.zeros(z.shape).long(), z, "amax"),
    "hardtanh": F.hardtanh,
    "elu": lambda z: F.elu(z, 0.5),
    "selu": F.selu,
    "celu": lambda z: F.celu(z, 0.5),
    "hardswish": F.hardswish,
    "softshrink": lambda z: F.softshrink(z, 0.1),
    "threshold": lambda z: F.threshold(z, 0.1, 0.0),
    "prelu": lambda z: F.prelu(z, torch.tensor([0.2])),
    "softsign": F.softsign,
    "max pool": lambda z: F.max_pool1d(z[:, None], 2)[:, 0].repeat(1, 2),
    "masked fill": lambda z: z.masked_fill(z < 0, 0.0),
    "index by a value": lambda z: z.gather(1, z.argmax(1, keepdim=True)).expand_as(z),
    "rounded": lambda z: z + (z.round() - z).detach(),
    "distance": lambda z: torch.cdist(z, z.new_zeros(1, z.shape[1])).expand_as(z),
    "log of abs": lambda z: (z.abs() + 1).log(),
    "nan to num": lambda z: torch.nan_to_num(z.abs().sqrt()),
    "straight-through": lambda z: (z > 0).to(z) + z - z.detach(),
}
SMOOTH = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "square": torch.square,
    "sine": torch.sin,
    "exponential": torch.exp,
    "softmax": lambda z: z.softmax(1),
    "product": lambda z: z * z.roll(1, 1),
}


class Between(nn.Module):
    def __init__(self, inputs: int, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.f, self.b = nn.Linear(inputs, 6), f, nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.f(self.a(x)))


def analytic(case: Case) -> str:
    torch.manual_seed(case.seed)
    smooth = case.variant in SMOOTH
    model = Between(case.inputs, SMOOTH[case.variant] if smooth else PIECES[case.variant])
    found = find_kinks(model, torch.randn(case.n, case.inputs))
    assert smooth or found, "said to be real-analytic"
    assert not smooth or not found, f"{found} of a smooth network"
    return "said so" if smooth else "named"


TIED = ["plain", "tied modules", "tied transposed", "used twice", "complex modulus", "complex parts", "weight of both"]
HEADS = ["wide", "narrow", "equal rows", "nearly equal rows", "one large column"]
KINDS = [
    Kind("scale", list(SHAPES), rank_and_scale, ("scale", "n", "seed"), 80),
    Kind("solved heads", HEADS, solved, ("loss", "n", "seed"), 22),
    Kind("kernels", TIED, kernel, ("inputs", "seed"), 20),
    Kind("analytic", [*PIECES, *SMOOTH], analytic, ("n", "inputs", "seed"), 6),
]
