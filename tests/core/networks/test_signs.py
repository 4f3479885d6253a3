"""A sign that is claimed at every weight is that of the numbers, at zero and at random, for random programs."""

import random

import pytest
import torch

from lightning_conv.networks.signs import Sign
from lightning_conv.networks.weight_trace import WeightTrace


def traced(program, z):
    trace = WeightTrace([z], torch.float64, present=True)
    with torch.no_grad(), trace:
        result = program(z)
    return trace._sign(result), result, trace.found


@pytest.mark.parametrize(
    ("program", "sign"),
    [
        (lambda z: z, Sign.ANY),
        (lambda z: z * z, Sign.NONNEGATIVE),
        (lambda z: z * z.clone(), Sign.ANY),
        (lambda z: z * z.T, Sign.ANY),
        (lambda z: z[:2] * z[1:], Sign.ANY),
        (lambda z: z**2 + 1e-6, Sign.POSITIVE),
        (lambda z: z**2 + z.new_full((3,), 1e-6), Sign.POSITIVE),
        (lambda z: z**2 + z.new_tensor([1.0, 1.0, -1.0]), Sign.ANY),
        (lambda z: z**2 - 1e-6, Sign.ANY),
        (lambda z: z**3, Sign.ANY),
        (lambda z: z.exp() - z.exp(), Sign.ANY),
        (lambda z: torch.add(z.exp(), z.exp(), alpha=-2), Sign.ANY),
        (lambda z: z.exp() * -1, Sign.ANY),
        (lambda z: z.exp() * 0, Sign.NONNEGATIVE),
        (lambda z: z.exp() / -2, Sign.ANY),
        (lambda z: z.exp().sum(1), Sign.POSITIVE),
        (lambda z: z.exp()[:, :0].sum(1), Sign.ANY),
        (lambda z: z.exp() @ z.exp(), Sign.POSITIVE),
        (lambda z: z.exp() @ z.abs(), Sign.ANY),
        (lambda z: torch.cat([z.exp(), z]), Sign.ANY),
        (lambda z: torch.cat([z.exp(), z * z]), Sign.NONNEGATIVE),
        (lambda z: torch.where(torch.eye(3) > 0, z.exp(), -1.0), Sign.ANY),
        (lambda z: torch.nn.functional.pad(z.exp(), (1, 1)), Sign.NONNEGATIVE),
        (lambda z: torch.nn.functional.softplus(z, 2.0), Sign.POSITIVE),
        (lambda z: torch.nn.functional.softplus(z, -2.0), Sign.ANY),
        (lambda z: z.softmax(1), Sign.POSITIVE),
        (lambda z: (z + torch.where(torch.eye(3) > 0, -torch.inf, 0.0)).softmax(1), Sign.NONNEGATIVE),
        (lambda z: z.exp().sub_(1), Sign.ANY),
        (lambda z: z.exp().t().add_(z), Sign.ANY),
        (lambda z: torch.view_as_real(torch.exp(1j * z)), Sign.ANY),
    ],
)  # fmt: skip
def test_signs_of_formulas(program, sign):
    assert traced(program, torch.randn(3, 3, dtype=torch.float64))[0] is sign


def overwritten_in_part(z):
    y = z.exp()
    y[:, 0] = z[:, 0]
    return y


def filled_in_part(z):
    y = z.new_full(z.shape, -1.0)
    y[:, 0] = z[:, 0].exp()
    return y


def overwritten_through_a_view(z):
    y = z.exp()
    y.view(-1)[4:].neg_()
    return y


@pytest.mark.parametrize("program", [overwritten_in_part, filled_in_part, overwritten_through_a_view])
def test_writing_in_place_takes_a_sign_away(program):
    assert traced(program, torch.randn(3, 3, dtype=torch.float64))[0] is Sign.ANY


UNARY = [
    torch.exp,
    torch.square,
    torch.sigmoid,
    torch.tanh,
    torch.neg,
    torch.cosh,
    torch.sin,
    torch.sqrt,
    torch.rsqrt,
    torch.log1p,
    lambda a: a**2,
    lambda a: a**0.5,
    lambda a: a**-1,
    lambda a: a.t(),
    lambda a: a.flip(0),
    lambda a: a.cumsum(0),
    lambda a: a.mean(0, keepdim=True).expand(3, 3),
    lambda a: a.sum(1, keepdim=True).expand(3, 3),
    lambda a: a.var(0, keepdim=True).expand(3, 3),
    lambda a: a.softmax(0),
    lambda a: a.tril(),
    lambda a: a + 0.5,
    lambda a: a - 0.5,
    lambda a: a * 2,
    lambda a: a * -1,
    lambda a: a.clone().mul_(a),
    lambda a: a.clone().add_(1),
    lambda a: torch.nn.functional.softplus(a, 1, 40),
]
BINARY = [torch.add, torch.sub, torch.mul, torch.matmul, torch.div, lambda a, b: torch.cat([a, b])[1:4]]


def random_program(choose):
    """Return a program of a dozen operators on what came before."""
    steps = []
    for i in range(12):
        known = i + 2  # z, a constant, and what came before
        if choose.random() < 0.6:
            steps.append((choose.choice(UNARY), [choose.randrange(known)]))
        else:
            steps.append((choose.choice(BINARY), [choose.randrange(known), choose.randrange(known)]))

    def run(z):
        made = [z, torch.full_like(z, 0.25)]
        for function, arguments in steps:
            made.append(function(*(made[i] for i in arguments)))
        return made

    return run


def test_claimed_signs_are_those_of_the_numbers_for_random_programs():
    choose, judged = random.Random(0), 0
    for _ in range(150):
        program = random_program(choose)
        trace = WeightTrace([z := torch.randn(3, 3, dtype=torch.float64)], torch.float64, present=True)
        with torch.no_grad(), trace:
            signs = [trace._sign(each) if trace.depends(each) else None for each in program(z)]
        for scale in (0.0, 0.1, 1.0, 2.0):
            for each, sign in zip(program(scale * torch.randn(3, 3, dtype=torch.float64)), signs, strict=True):
                if sign in (Sign.POSITIVE, Sign.NONNEGATIVE) and bool(torch.isfinite(each).all()):
                    judged += 1
                    assert float(each.min()) >= 0  # an exp may underflow
    assert judged > 500


def test_a_program_without_findings_has_finite_derivatives_at_zero_too():
    """What is analytic at every weight is so at weights of 0, where roots and quotients fail."""
    choose, clean = random.Random(1), 0
    for _ in range(300):
        program = random_program(choose)
        found = traced(lambda z, program=program: program(z)[-1], torch.randn(3, 3, dtype=torch.float64))[2]
        if found:
            continue
        z = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
        result = program(z)[-1]
        if result.requires_grad and bool(torch.isfinite(result).all()):
            clean += 1
            (gradient,) = torch.autograd.grad(result.sum(), z)
            assert bool(torch.isfinite(gradient).all())
    assert clean > 50
