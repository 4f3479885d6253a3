"""The guard on networks that the training step calls in every way: certified, with the features that a double loop finds."""

import pytest
import torch

from lightning_conv.callbacks import ExpressivityGuard
from tests.callbacks.guard.any_step import WAYS


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_the_call_of_the_step_is_what_is_certified(make_trainer, way):
    guard, module = ExpressivityGuard(switch_at=0.5), way.module()
    make_trainer([guard], max_epochs=4).fit(module, way.loader())
    assert (guard.phase, guard.verdict, guard.caveats, guard.why) == (2, "certified", [], "")
    assert "(observed)" in guard.measured
    assert way.loss in guard.measured
    with torch.no_grad():
        features = way.features(module).double()
    h = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], 1)
    sigma = torch.linalg.svdvals(h)
    assert guard.certificate.n == len(h)
    assert guard.certificate.sigma_min.value == pytest.approx(float(sigma[len(h) - 1]), rel=1e-3)
    assert guard.certificate.sigma_max.value == pytest.approx(float(sigma[0]), rel=1e-3)
