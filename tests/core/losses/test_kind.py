"""`loss_kind`: a loss is what its exact type says, and all questions about it have one answer."""

import pytest
import torch
from torch import nn

from lightning_conv.losses import LossScale, loss_facts, loss_kind, loss_scale

KINDS = {
    "squared": nn.MSELoss(),
    "absolute": nn.L1Loss(),
    "huber": nn.HuberLoss(),
    "smooth_l1": nn.SmoothL1Loss(),
    "cross_entropy": nn.CrossEntropyLoss(),
    "binary_cross_entropy": nn.BCEWithLogitsLoss(),
    "soft_margin": nn.SoftMarginLoss(),
}


class HalfSquared(nn.MSELoss):
    def forward(self, outputs, targets):
        return super().forward(outputs, targets) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_torch_is_known_by_its_type(kind):
    found = loss_kind(KINDS[kind])
    assert (found.kind, found.name, found.reduction) == (kind, type(KINDS[kind]).__name__, "mean")
    assert found.distance == (kind in ("squared", "absolute", "huber", "smooth_l1"))
    assert found.logistic == (kind in ("binary_cross_entropy", "soft_margin"))


def test_a_subclass_a_function_and_no_loss_are_told_apart():
    subclass, function, nothing = loss_kind(HalfSquared()), loss_kind(nn.functional.mse_loss), loss_kind(None)
    assert [each.kind for each in (subclass, function, nothing)] == ["other", "other", "unknown"]
    assert [each.name for each in (subclass, function, nothing)] == ["HalfSquared", "mse_loss", "not known"]
    assert [each.reduction for each in (subclass, function, nothing)] == ["mean"] * 3
    # Its targets have the outputs' shape all the same: that is not a formula.
    assert [each.elementwise for each in (subclass, function, nothing)] == [True, False, False]
    assert subclass.scale(3, 1) is None
    assert subclass.facts(torch.zeros(3, 1), torch.zeros(3, 1)) is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_scale_and_facts_are_those_of_the_functions(reduction):
    loss_fn, outputs, targets = nn.MSELoss(reduction=reduction), torch.zeros(4, 3), torch.ones(4, 3)
    found = loss_kind(loss_fn)
    assert (found.summed, found.averaged) == (reduction == "sum", reduction == "mean")
    assert found.described == ("MSELoss" if reduction == "mean" else f"MSELoss(reduction='{reduction}')")
    assert found.scale(4, 3) == loss_scale(loss_fn, 4, 3)
    assert found.facts(outputs, targets) == loss_facts(loss_fn, outputs, targets)
    assert loss_kind(nn.MSELoss(reduction="sum")).scale(4, 3) == LossScale(2.0, 4)


@pytest.mark.parametrize(
    ("loss_fn", "targets", "hard"),
    [
        (nn.CrossEntropyLoss(), torch.tensor([0, 2]), True),
        (nn.CrossEntropyLoss(), torch.tensor([0, -100]), False),
        (nn.CrossEntropyLoss(), torch.eye(2), True),
        (nn.CrossEntropyLoss(), torch.full((2, 2), 0.5), False),
        (nn.CrossEntropyLoss(label_smoothing=0.1), torch.tensor([0, 2]), False),
        (nn.MSELoss(), torch.eye(2), False),
    ],
)
def test_hard_labels_are_classes_that_a_plain_cross_entropy_is_given(loss_fn, targets, hard):
    assert loss_kind(loss_fn).hard_labels(targets) == hard


def test_weights_make_a_loss_weighted_and_no_longer_logistic():
    weighted = loss_kind(nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)))
    assert not weighted.logistic
    assert not weighted.weighted
    assert loss_kind(nn.CrossEntropyLoss(torch.ones(3))).weighted
    assert weighted.classes_0_and_1
    assert not loss_kind(nn.SoftMarginLoss()).classes_0_and_1


def test_a_loss_whose_forward_is_replaced_or_hooked_is_another_one():
    replaced, hooked, prepared = nn.MSELoss(), nn.MSELoss(), nn.MSELoss()
    replaced.forward = lambda outputs, targets: 7 * nn.functional.mse_loss(outputs, targets)
    hooked.register_forward_hook(lambda module, args, output: output**2)
    prepared.register_forward_pre_hook(lambda module, args: (args[0] ** 2, args[1]))
    outputs, targets = torch.ones(3, 1), torch.zeros(3, 1)
    for loss in (replaced, hooked, prepared):
        assert loss_kind(loss).kind == "other"
        assert loss_kind(loss).facts(outputs, targets) is None


def test_soft_targets_below_zero_leave_a_cross_entropy_without_a_bound():
    targets = torch.tensor([[1.5, -0.5], [0.5, 0.5]])
    assert loss_kind(nn.CrossEntropyLoss()).facts(torch.zeros(2, 2), targets) is None
