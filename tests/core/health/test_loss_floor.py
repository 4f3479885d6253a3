"""Equal inputs are found, and no outputs have a smaller loss than the floor that they force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from lightning_conv.health.fit.equal_inputs import DIGEST, EqualInputs, equal_rows, sample_digests
from lightning_conv.health.fit.loss_floor import loss_floor
from lightning_conv.losses.per_sample import SampleLosses
from lightning_conv.networks.inputs import map_inputs

GROUPS = [[0, 3], [1, 4, 5], [2, 6]]
CLASSES = torch.tensor([0, 1, 2, 1, 1, 2, 2, 0])
VALUES = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
VALUES[6] = VALUES[2]  # these two agree
LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), CLASSES),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), CLASSES),
    "weighted": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])), CLASSES),
    "soft targets": (nn.CrossEntropyLoss(), VALUES.softmax(1)),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), CLASSES),
    "squared": (nn.MSELoss(), VALUES),
    "squared, summed": (nn.MSELoss(reduction="sum"), VALUES),
    "huber": (nn.HuberLoss(delta=0.3), VALUES),
    "smooth l1": (nn.SmoothL1Loss(), VALUES),
    "binary": (nn.BCEWithLogitsLoss(), (VALUES > 0).float()),
}


def least(fn, targets):
    """Minimise the loss itself over outputs that are equal within the groups, by Newton's method of torch."""
    place = {sample: number for number, group in enumerate(GROUPS) for sample in group} | {7: 3}
    index = torch.tensor([place[sample] for sample in range(8)])
    fn = fn.double()
    targets = targets.double() if targets.is_floating_point() else targets
    u = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [u], lr=0.5, max_iter=300, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = fn(u[index], targets)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return float(fn(u[index], targets))


@pytest.mark.parametrize("name", LOSSES)
def test_the_floor_is_the_least_loss_of_equal_outputs(name):
    fn, targets = LOSSES[name]
    found = loss_floor(SampleLosses(fn, targets, outputs=3), GROUPS)
    reached = least(fn, targets)
    assert found.value <= reached + 1e-9
    assert found.value == pytest.approx(reached, rel=1e-4, abs=1e-4)
    assert found.value >= found.forced > 0


def test_samples_twice_with_different_labels_name_their_pairs():
    losses = SampleLosses(nn.CrossEntropyLoss(), torch.tensor([0, 1, 2, 1, 1, 0, 2, 2]), outputs=3)
    found = loss_floor(losses, GROUPS)
    assert found.conflicts == ((0, 3), (1, 4, 5))
    entropy = -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))
    assert found.value == pytest.approx((2 * math.log(2) + 3 * entropy) / 8)


def test_the_least_absolute_error_is_at_one_of_the_targets():
    best = sum(
        min(float((VALUES[group, column] - VALUES[i, column]).abs().sum()) for i in group)
        for group in GROUPS
        for column in range(3)
    )
    found = loss_floor(SampleLosses(nn.L1Loss(), VALUES), GROUPS)
    assert found.value == pytest.approx(best / 24, rel=1e-6)
    assert found.value <= best / 24 + 1e-15


@pytest.mark.parametrize("fn", [lambda u, y: (u - y).square().mean(), nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))])
def test_a_loss_that_is_not_known_has_no_floor(fn):
    assert loss_floor(SampleLosses(fn, (VALUES > 0).float(), outputs=3), GROUPS) is None


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping"])
def test_equal_inputs_are_found_across_portions(kind):
    x = torch.randn(10, 2, 3)
    x[7], x[9], x[4] = x[1], x[1], x[2]
    x[5], x[6] = 0.0, -0.0
    other = torch.arange(10) % 2
    given = {"tensor": x, "tuple": (x, other), "mapping": {"x": x, "y": other}}[kind]
    found = EqualInputs()
    for rows in (slice(0, 6), slice(6, 10)):
        found.add(map_inputs(lambda tensor, rows=rows: tensor[rows], given))
    tensors = [x] if kind == "tensor" else [x, other]
    pairs = {(i, j) for i, j in itertools.combinations(range(10), 2) if all(torch.equal(t[i], t[j]) for t in tensors)}
    assert {pair for group in found.repeated for pair in itertools.combinations(group, 2)} == pairs
    assert len(found.groups.unique()) == 10 - sum(len(group) - 1 for group in found.repeated)


def test_a_sample_with_nan_is_like_no_other():
    found = EqualInputs()
    found.add(torch.full((3, 2), math.nan))
    assert found.repeated == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_any_type_of_numbers(dtype):
    found = EqualInputs()
    found.add(torch.tensor([[1, 0], [0, 1], [1, 0]]).to(dtype))
    assert found.repeated == [[0, 2]]


def digests_of(inputs, first=0):
    return torch.tensor([list(each) for each in sample_digests(inputs, first=first)], dtype=torch.uint8)


def test_rows_of_hashes_are_grouped_as_the_samples_are():
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randint(0, 3, (200, 4), generator=generator).float()
    inputs[inputs == 0] *= torch.randn(int((inputs == 0).sum()), generator=generator).sign()  # zeros of both signs
    inputs[7] = inputs[11] = torch.tensor([1.0, float("nan"), 0.0, 0.0])
    equal = EqualInputs()
    equal.add(inputs)
    in_portions = torch.cat([digests_of(inputs[:9]), digests_of(inputs[9:], first=9)])
    assert in_portions.shape == (200, DIGEST)
    found = equal_rows(in_portions)
    assert found == equal.repeated
    groups = {tuple(k for k in range(200) if torch.equal(inputs[k], inputs[j])) for j in range(200)}  # by comparison
    assert sorted(map(list, (each for each in groups if len(each) > 1))) == found
    assert not any(7 in group or 11 in group for group in found)


def test_hashes_that_share_their_first_half_are_told_apart():
    rows = torch.zeros(5, DIGEST, dtype=torch.uint8)
    rows[1, 15] = rows[3, 15] = 9
    rows[4, 0] = 1
    assert equal_rows(rows) == [[0, 2], [1, 3]]
    assert equal_rows(rows[:0]) == []
    assert equal_rows(rows[4:]) == []


@pytest.mark.parametrize("group", [[0, 9], [0, -1], [], ["a"]])
def test_a_group_of_no_samples_of_the_losses_is_refused(group):
    with pytest.raises(ValueError, match=r"groups: .*; need numbers of the 8 samples, from 0 on"):
        loss_floor(SampleLosses(nn.MSELoss(), VALUES), [group])


def test_what_are_no_losses_and_no_groups_is_refused():
    with pytest.raises(TypeError, match=r"losses: None; need SampleLosses\(loss_fn, targets\)"):
        loss_floor(None, [])
    for groups in (None, [3]):
        with pytest.raises(TypeError, match=r"groups: .*; need a list of lists of the numbers of samples"):
            loss_floor(SampleLosses(nn.MSELoss(), VALUES), groups)


def test_tensors_of_several_lengths_are_no_samples():
    with pytest.raises(ValueError, match=r"inputs: need one or more samples .*, got lengths \[3, 4\]"):
        EqualInputs().add((torch.zeros(3, 1), torch.zeros(4, 1)))
