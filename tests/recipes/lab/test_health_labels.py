"""The study of labels: what is flipped, how it is scored, and what the page says of it."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score

from lightning_conv.recipes.lab.health.label_methods import (
    KEPT,
    METHODS,
    auc,
    fold_confidence,
    precision_of_top,
    score_labels,
    train,
)
from lightning_conv.recipes.lab.health.label_sets import label_set, moved, nearest_class, with_flips
from lightning_conv.recipes.lab.health.labels import run


@pytest.fixture(scope="module")
def digits():
    return label_set("digits", 200, seed=3, root="data")


def test_a_share_of_the_labels_is_wrong_at_random_or_as_the_nearest_class(digits):
    for flips in ("random", "confusable"):
        given, wrong = with_flips(digits, flips, 0.1, seed=5)
        assert int(wrong.sum()) == 20
        assert torch.equal(given != digits.labels, wrong)
        again, _ = with_flips(digits, flips, 0.1, seed=5)
        assert torch.equal(again, given)
    given, wrong = with_flips(digits, "confusable", 0.1, seed=5)
    rows = digits.inputs.flatten(1)
    for number in wrong.nonzero()[:, 0].tolist():
        own = rows[digits.labels == digits.labels[number]].mean(0)
        distances = {
            c: float((rows[digits.labels == c].mean(0) - own).norm()) for c in range(10) if c != digits.labels[number]
        }
        assert int(given[number]) == min(distances, key=distances.get)
    assert not with_flips(digits, "none", 0.1, seed=5)[1].any()
    assert float(with_flips(digits, "all", 0.1, seed=5)[1].double().mean()) == pytest.approx(0.9, abs=0.07)
    assert nearest_class(digits).tolist() != list(range(10))


def test_moved_digits_are_the_digits_somewhere():
    images = torch.rand(30, 1, 8, 8) + 0.01
    canvas = moved(images, 0)
    for image, whole in zip(images, canvas, strict=True):
        plain = whole if float(whole.median()) < 0.5 else 1 - whole
        assert torch.allclose(plain.sum(), image.sum(), atol=1e-3)
        assert torch.allclose(plain[plain > 1e-4], image[image > 1e-4], atol=1e-6)
    assert torch.equal(canvas, moved(images, 0))


def test_auc_and_precision_are_those_of_scikit_learn_and_of_counting():
    scores = torch.tensor([0.1, 0.4, 0.4, 0.2, 0.9, 0.5])
    wrong = torch.tensor([True, False, True, False, False, True])
    assert auc(scores, wrong) == pytest.approx(roc_auc_score(wrong.numpy(), -scores.numpy()))
    assert precision_of_top(scores, wrong, 2) == 0.5


def test_the_confidence_of_a_fold_does_not_know_the_fold(digits):
    given = digits.labels.clone()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2000 + 1))
    held, rest = order[0::5], torch.cat([order[k::5] for k in range(1, 5)])
    torch.manual_seed(1)
    net = digits.network()
    for _ in train(net, digits.inputs[rest], given[rest], digits.fold_epochs, 1):
        pass
    expected = net(digits.inputs[held]).softmax(1).gather(1, given[held][:, None])[:, 0]
    assert torch.allclose(fold_confidence(digits, given, seed=1)[held], expected, atol=1e-6)


def test_each_method_finds_wrong_digits_and_the_kept_audit_is_before_the_end(digits):
    given, wrong = with_flips(digits, "random", 0.1, seed=0)
    found = score_labels(digits, given, seed=0)
    assert tuple(found.scores) == METHODS
    assert auc(found.scores[KEPT], wrong) > 0.95
    assert all(auc(scores, wrong) > 0.6 for name, scores in found.scores.items() if name != "loss, kept")
    assert found.kept < digits.epochs
    assert found.audits[KEPT, 200].samples == 200
    assert found.audits[KEPT, 128].samples == 128


def test_the_page_says_what_is_missing_and_which_method_is_better(tmp_path):
    report = run(sets=["digits", "mnist"], seeds=1, samples=100, root=str(tmp_path))
    assert f"MNIST is left out: it is not in {tmp_path}" in report.setting
    assert [row["set"] for row in report.tables["AUC"]] == ["digits", "digits"]
    text = report.markdown("a command")
    assert "no method has a larger AUC than the kernel kept" in text
    assert "better: " in text
    assert not any(check.must for check in report.checks if "larger AUC" in check.claim)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seeds": 0}, "seeds: 0"),
        ({"share": 0.0}, "share: 0"),
        ({"share": 1.0}, "share: 1"),
        ({"sets": ["nobody"]}, "no set 'nobody'"),
    ],
)
def test_mistakes_say_what_is_wrong(settings, says):
    with pytest.raises(ValueError, match=says):
        run(**settings)
