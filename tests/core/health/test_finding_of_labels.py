"""A notice needs enough labels beyond the limit and a kernel that predicts labels; everything else is no more than ``ok``."""

from __future__ import annotations

import pytest
import torch

from lightning_conv.health.findings.of_labels import FAR, finding_of_labels, fitted_share, knows_by_heart, traced
from lightning_conv.health.labels.audit_labels import audit_labels
from lightning_conv.health.labels.suspicious_labels import LabelAudit


def audit(far, samples=100, agree=0.9, top=-0.8):
    """So many labels beyond the limit, the first one sample 7; the share that agrees is at least what is asked for."""
    margins = torch.linspace(0.1, 0.9, samples, dtype=torch.float64)
    labels, suggested = torch.arange(samples) % 4, torch.arange(samples) % 4
    order = [7, *(i for i in range(samples) if i != 7)]
    margins[order[:far]] = torch.linspace(top, FAR, far, dtype=torch.float64) if far else margins[:0]
    suggested[order[: round((1 - agree) * samples)]] += 1
    suggested[order[:far]] = (labels[order[:far]] + 1) % 4
    return LabelAudit(
        labels=labels, margins=margins, suggested=suggested, judged=torch.ones(samples, dtype=torch.bool), ridge=1.0
    )


def test_many_contradicted_labels_are_a_notice_with_the_first_one_and_its_numbers():
    found = finding_of_labels(audit(9), step=5)
    assert found.level == "notice"
    assert found.sentence.startswith(
        "Sample 7 of the probe is labelled 3, and the other 99 samples of the probe say 0 (margin -0.8); 9 of 100 labels"
    )
    assert (found.value, found.limit, found.step, found.name) == (pytest.approx(-0.8), FAR, 5, "labels")
    assert "Look at these labels first" in found.advice
    named = finding_of_labels(audit(9), numbers=[50 * i for i in range(100)])
    assert named.sentence.startswith("Training sample 350 is labelled 3")


def test_a_few_are_no_notice():
    few = finding_of_labels(audit(1))
    assert few.level == "ok"
    assert few.sentence.endswith("(margin -0.8, limit -0.5); 1 label of 100 is beyond it (a notice needs 5).")
    assert few.advice == ""


@pytest.mark.parametrize(("samples", "needed"), [(100, 5), (200, 6), (1000, 30)])
def test_a_notice_needs_five_labels_and_three_in_a_hundred(samples, needed):
    assert finding_of_labels(audit(needed, samples)).level == "notice"
    assert f"unusual from {needed} on" in finding_of_labels(audit(needed, samples)).sentence
    below = finding_of_labels(audit(needed - 1, samples))
    assert below.level == "ok"
    assert f"{needed - 1} labels of {samples} are beyond it (a notice needs {needed})" in below.sentence


def test_doubt_within_the_limit_is_said_with_both_numbers():
    mild = audit(1, top=-0.3)
    mild.margins[7] = -0.3
    assert finding_of_labels(mild).sentence.endswith("say 0 (margin -0.3, limit -0.5).")


def test_labels_that_all_agree_are_ok():
    found = finding_of_labels(audit(0, agree=1.0))
    assert found.level == "ok"
    assert found.sentence == "No label of the probe is contradicted by the other samples (smallest margin 0.1)."


def test_a_kernel_that_does_not_predict_labels_calls_none_suspicious():
    found = finding_of_labels(audit(30, agree=0.5))
    assert found.level == "ok"
    assert "predict 50 % of the labels" in found.sentence
    assert "Sample 7" not in found.sentence


def test_the_fitted_share_is_that_of_the_largest_output():
    a = audit(0, samples=8, agree=1.0)
    u = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0, 0, 0, 0])]
    assert fitted_share(u, a) == 5 / 8
    assert knows_by_heart(u, a) is False
    assert knows_by_heart(torch.eye(4)[a.labels], audit(0, samples=8, agree=0.5)) is True
    assert fitted_share(u[:, :3], a) is None
    assert knows_by_heart(u[:, :3], a) is None


@pytest.mark.parametrize(("low", "scale"), [(0, 1.0), (-1, 5.0), (0, 5.0)])
def test_one_output_of_two_classes_is_judged_by_its_sign_or_its_middle(low, scale):
    labels = torch.tensor([low, 1, low, 1])
    a = LabelAudit(
        labels=labels,
        margins=torch.ones(4),
        suggested=labels,
        judged=torch.tensor([True, True, True, False]),
        ridge=1.0,
    )
    between = scale == 1.0
    u = torch.tensor([[0.1], [0.9], [0.8], [0.2]]) if between else scale * torch.tensor([[-1.0], [1.0], [1.0], [-1.0]])
    assert fitted_share(u, a) == pytest.approx(2 / 3)


def test_the_trace_of_a_full_kernel_is_the_sum_over_equal_outputs():
    full = torch.randn(12, 12, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            assert float(traced(full, 3)[i, j]) == pytest.approx(
                sum(float(full[3 * i + c, 3 * j + c]) for c in range(3))
            )


def test_numbers_outputs_and_kernels_of_other_samples_are_refused():
    audit = audit_labels(torch.eye(12, dtype=torch.float64) + 0.1, torch.arange(12) % 3)
    with pytest.raises(ValueError, match="numbers: 1 of them; need one for each of 12 samples"):
        finding_of_labels(audit, numbers=[1])
    for outputs in (torch.zeros(12), torch.zeros(3, 3)):
        with pytest.raises(ValueError, match=r"outputs: shape .*; need \(n, C\) for 12 samples"):
            fitted_share(outputs, audit)
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"outputs: {count}; need a divisor of the size of the matrix, 12"):
            traced(torch.eye(12), count)
