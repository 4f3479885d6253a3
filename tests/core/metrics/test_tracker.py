"""The reference of a metric survives the copies that ``MetricTracker`` makes, and stays apart where copies run side by side."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torchmetrics import MetricCollection, MetricTracker

from lightning_conv.metrics import KernelAlignment, KernelDrift

EYE = torch.eye(3, dtype=torch.float64)


def kernels(count=4):
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [factor @ factor.T for factor in factors]


def expected(grams):
    return [float((gram - grams[0]).norm() / grams[0].norm()) for gram in grams]


@pytest.mark.parametrize("feed", ["update", "forward"])
def test_a_tracked_drift_is_measured_against_the_first_kernel(feed):
    tracker, grams = MetricTracker(KernelDrift(), maximize=False), kernels()
    for gram in grams:
        tracker.increment()
        tracker.update(gram) if feed == "update" else tracker(gram)
    assert tracker.compute_all().tolist() == pytest.approx(expected(grams))
    assert expected(grams)[1] > 0.1


def test_within_a_period_the_latest_kernel_counts():
    tracker = MetricTracker(KernelDrift(), maximize=False)
    for scales in ((1.0, 2.0), (3.0, 1.5)):
        tracker.increment()
        for scale in scales:
            tracker.update(scale * EYE)
    assert tracker.compute_all().tolist() == [1.0, 0.5]


def test_a_tracked_collection_is_measured_against_the_first_kernels():
    tracker = MetricTracker(
        MetricCollection({"drift": KernelDrift(), "alignment": KernelAlignment()}), maximize=[True, False]
    )
    grams = kernels()
    for gram in grams:
        tracker.increment()
        tracker.update(gram)
    found = tracker.compute_all()
    assert found["drift"].tolist() == pytest.approx(expected(grams))
    assert float(found["alignment"][0]) == pytest.approx(1)
    assert float(found["alignment"][1]) < 0.999


def test_resets_of_the_tracker_keep_the_reference():
    tracker = MetricTracker(KernelDrift(), maximize=False)
    tracker.increment()
    tracker.update(EYE)
    tracker.reset_all()
    tracker.increment()
    tracker.update(3 * EYE)
    assert float(tracker.compute()) == 2


def test_a_restored_tracker_goes_on_against_the_first_kernel():
    tracker = MetricTracker(KernelDrift(), maximize=False)
    tracker.increment()
    tracker.update(EYE)
    restored = MetricTracker(KernelDrift(), maximize=False)
    restored.increment()
    # torchmetrics itself restores tensors of any shape.
    restored.load_state_dict(tracker.state_dict())
    restored.increment()
    restored.update(3 * EYE)
    assert float(restored.compute()) == 2


def test_copies_side_by_side_have_their_own_reference():
    metrics = MetricCollection({"drift": KernelDrift()})
    train, val = metrics.clone(prefix="train_"), metrics.clone(prefix="val_")
    train.update(EYE)
    val.update(2 * EYE)
    train.update(3 * EYE)
    val.update(3 * EYE)
    assert {**train.compute(), **val.compute()} == {"train_drift": 2.0, "val_drift": 0.5}


def test_a_copy_keeps_the_reference_of_its_original_and_does_not_change_it():
    original = KernelDrift()
    original.update(EYE)
    for copied in (original.clone(), copy.deepcopy(original)):
        copied.update(3 * EYE)
        assert float(copied.compute()) == 2
        copied.forget()
        copied.update(5 * EYE)
        assert float(copied.compute()) == 0
    original.update(2 * EYE)
    assert float(original.compute()) == 1


def test_a_given_reference_is_that_of_every_period():
    tracker = MetricTracker(KernelDrift(reference=EYE), maximize=False)
    for scale in (2.0, 4.0):
        tracker.increment()
        tracker.update(scale * EYE)
    assert tracker.compute_all().tolist() == pytest.approx([1.0, 3.0])


def test_a_copy_outlives_its_original_and_pickles():
    copied = KernelDrift().clone()
    again = pickle.loads(pickle.dumps(copied))
    for metric in (copied, again):
        metric.update(EYE)
        metric.update(2 * EYE)
        assert float(metric.compute()) == 1
