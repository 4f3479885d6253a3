"""The projections: their signs, their variance and the sizes that are chosen."""

import itertools

import pytest
import torch

from lightning_conv.sketches.layout import Layout, make_block
from lightning_conv.sketches.projections import kept_sizes, relative_variance, sign_matrix
from lightning_conv.sketches.sides import Sides, outer_sketch, rows_sketch


def gradients(*shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def terms(g, h, p, q):
    """The variance of <P G Q^T, P H Q^T> for normal entries, term by term."""
    right, left = h.T @ g, g @ h.T
    one = (right.square().sum() + (right @ right).trace()) / q
    two = (left.square().sum() + (left @ left).trace()) / p
    both = g.square().sum() * h.square().sum() + left.square().sum()
    both = both + ((g @ g.T) * (h @ h.T)).sum() + (g * h).sum() ** 2
    return float(one + two + both / (p * q))


def every_sign(count):
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=count)), dtype=torch.float64)


def test_over_all_signs_the_product_of_two_sketches_has_the_product_of_the_gradients_as_its_mean():
    g, h = gradients(3, 4)
    left, right = every_sign(3), every_sign(4)  # p = q = 1
    values = (left @ g @ right.T) * (left @ h @ right.T)
    assert float(values.mean()) == pytest.approx(float((g * h).sum()), rel=1e-12)
    # Signs do no worse than normal entries, whose variance is the documented one.
    assert float(values.var(correction=0)) <= terms(g, h, 1, 1)


def test_the_documented_variance_is_that_of_normal_entries():
    g, h = gradients(3, 4)
    generator = torch.Generator().manual_seed(0)
    p, q, draws = 2, 3, 200_000
    left = torch.randn(draws, p, 3, generator=generator, dtype=torch.float64) / p**0.5
    right = torch.randn(draws, q, 4, generator=generator, dtype=torch.float64) / q**0.5
    values = ((left @ g @ right.mT) * (left @ h @ right.mT)).sum((1, 2))
    assert float(values.var()) == pytest.approx(terms(g, h, p, q), rel=0.05)
    assert terms(g, h, p, q) <= relative_variance(3, 4, p, q) * float(g.square().sum() * h.square().sum())


def test_a_gradient_of_rank_one_against_itself_attains_the_bound():
    g = torch.outer(torch.arange(1.0, 6.0), torch.arange(1.0, 8.0)).double()
    assert terms(g, g, 2, 3) == pytest.approx(relative_variance(5, 7, 2, 3) * float(g.square().sum()) ** 2, rel=1e-12)


def test_signs_follow_from_seed_and_label_alone():
    first = sign_matrix(7, "a/left", 3, 50)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(first, sign_matrix(7, "a/left", 3, 50))
    torch.set_rng_state(state)
    assert set(first.unique().tolist()) == {-1, 1}
    for seed, label in ((8, "a/left"), (7, "a/right"), (7, "b/left")):
        assert not torch.equal(first, sign_matrix(seed, label, 3, 50))
    # Written down, so that a change of the stream, which would make every store unreadable, is noticed.
    assert sign_matrix(0, "weight/left", 1, 12).tolist() == [[-1, 1, -1, 1, 1, -1, -1, -1, 1, 1, -1, -1]]


def test_signs_are_balanced_and_not_correlated():
    signs = sign_matrix(0, "x", 64, 4096).double()
    product = signs @ signs.T / 4096
    assert float((product - torch.eye(64, dtype=torch.float64)).abs().max()) < 6 / 64  # six standard errors
    assert abs(float(signs.mean())) < 6 / (64 * 64)


@pytest.mark.parametrize(
    ("rows", "columns", "budget"), [(30, 40, 17), (1, 900, 16), (900, 1, 16), (5, 600, 32), (7, 7, 48)]
)
def test_sizes_are_the_best_of_all_that_the_budget_allows(rows, columns, budget):
    p, q = kept_sizes(rows, columns, budget)
    assert p * q <= budget
    least = min(
        relative_variance(rows, columns, a, b)
        for a in range(1, rows + 1)
        for b in range(1, columns + 1)
        if a * b <= budget
    )
    assert relative_variance(rows, columns, p, q) == least


def test_factors_and_formed_gradients_have_the_same_sketch():
    outer, inputs = torch.randn(5, 3, 6, dtype=torch.float64), torch.randn(5, 3, 8, dtype=torch.float64)
    formed = torch.einsum("nro,nri->noi", outer, inputs)
    for size in (1, 10, 40, 48):  # from one number for each group to no projection at all
        block = make_block(("w",), {"w": (6, 8)}, 4 * size, 4, once=False)
        sides = Sides.draw(block, 0, 4, outer)
        one, other = outer_sketch(outer, inputs, sides), rows_sketch(formed, sides)
        assert one.shape[1:] == other.shape[1:]
        assert one.shape[2:] == (block.kept_rows, block.kept_columns)
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_parts_of_a_layout_cover_a_sketch_without_overlap():
    shapes = {"small": (2, 3), "large": (40, 50), "bias": (200,)}
    layout = Layout(tuple(make_block((name,), shapes, 64, 4, once=True) for name in shapes), 4, True)
    assert Layout.from_json(layout.as_json()) == layout
    taken = torch.zeros(layout.size)
    for block, place in zip(layout.blocks, layout.places, strict=True):
        starts = [0] if layout.is_shared(block) else [layout.group(number).start for number in range(4)]
        for start in starts:
            taken[start + place.start : start + place.stop] += 1
    assert torch.equal(taken, torch.ones(layout.size))
    assert [block.exact for block in layout.blocks] == [True, False, False]
