"""Rates are found again from seconds that they made; a prediction is the sum of its parts, and has no more of them with more ranks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_conv import plan_ntk
from lightning_conv.kernels.planning.prediction import EIGENVALUES, predict, step_seconds
from lightning_conv.kernels.planning.scale import GLOO_BYTE, Rates, device_rates, fit_rates
from lightning_conv.kernels.planning.work import work_of
from lightning_conv.machine.devices import GPUS

H100 = GPUS["h100"]


def planned(n, width=16, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
    return plan_ntk(net, torch.randn(n, 6), **({"precision": "fast"} | options))


def test_the_fit_finds_the_rates_that_made_the_seconds():
    true = Rates(matrices=9e-12, small=2e-11, moved=2e-10, sent=2e-9, message=1e-4, fixed=5e-3)
    works = [work_of(planned(n, width), ranks) for n in (64, 200, 512) for width in (16, 64) for ranks in (1, 2, 4)]
    found = fit_rates(works, [true.seconds(one) for one in works])
    for work in works:
        assert found.seconds(work) == pytest.approx(true.seconds(work), rel=1e-6)


def test_a_rate_of_what_nobody_did_is_zero():
    works = [work_of(planned(n, width)) for n in (64, 200, 512) for width in (16, 64)]
    assert fit_rates(works, [1.0] * 6).sent == 0


def test_fewer_measurements_than_rates_are_refused():
    with pytest.raises(ValueError, match="seconds: 1 for 1 works"):
        fit_rates([work_of(planned(64))], [1.0])


def test_a_prediction_is_the_sum_of_its_parts():
    plan = planned(200)
    found = predict(plan, H100, 2)
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert (found.work.by, found.parts["sent"]) == ("nothing", 0)
    assert found.parts["matrices"] == pytest.approx(found.work.computed.matrices / (0.5 * 67e12))
    assert found.parts["eigenvalues"] == pytest.approx(4 / 3 * 200**3 / EIGENVALUES)
    assert 0 < found.same_seconds < found.seconds


def test_where_sending_takes_longer_than_computing_each_rank_computes_all_and_the_division_is_told_beside_it():
    plan = planned(200)
    found, over = predict(plan, H100, 2, spectrum=False), work_of(plan, 2)
    assert found.work == work_of(plan, 2, rate=0.5 * 67e12)
    assert (found.work.by, over.by, over.sent > 0) == ("nothing", "samples", True)
    parts = device_rates(H100).parts(over)
    assert parts["sent"] == over.sent * GLOO_BYTE
    assert found.divided == pytest.approx(sum(parts.values()))
    byte, latency = H100.direct(2)
    sending = over.sent / byte + over.messages * latency
    assert found.direct == pytest.approx(found.divided - parts["sent"] - parts["message"] + sending)


@pytest.mark.parametrize("outputs", ["trace", "sum"])
def test_a_slow_device_divides_and_a_fast_one_does_not(outputs):
    plan = planned(64, width=512, outputs=outputs)
    assert plan.divided(2).division is not None
    assert plan.divided(2, 1e9).division.by == plan.divided(2, 2e9).division.by
    assert plan.divided(2, 1e14).division is None


def test_more_ranks_take_no_longer_to_compute():
    plan = planned(256, outputs="sum")
    found = [predict(plan, H100, ranks) for ranks in (1, 2, 4, 8)]
    computed = [sum(each.parts[part] for part in ("matrices", "small", "moved")) for each in found]
    assert computed == sorted(computed, reverse=True)


def test_parameters_of_a_sharded_module_are_divided_and_gathered_over_the_devices_own_links():
    plan = planned(64)
    whole, sharded = predict(plan, H100, 4, others=100), predict(plan, H100, 4, others=100, sharded=True)
    numel = 6 * 16 + 16 + 16 * 3 + 3
    assert (whole.parameters, sharded.parameters) == (4 * (numel + 100), numel + 100)
    byte, latency = H100.direct(4)
    assert sharded.parts["gathered"] == sharded.work.gathered / byte + sharded.work.messages * latency
    assert sharded.direct == pytest.approx(sharded.seconds)
    assert whole.fits
    assert not replace(whole, parameters=81e9).fits


def test_precisions_take_the_rates_of_their_types():
    device = replace(H100, double_flops=H100.flops / 4)
    fast, exact, certified = (device_rates(device, each) for each in ("fast", "exact", "certified"))
    assert (exact.small, exact.matrices) == (fast.small, 4 * fast.matrices)
    assert (certified.small, certified.matrices) == (4 * fast.small, 4 * fast.matrices)


def test_a_step_adds_up_the_gradients_of_all_parameters():
    plan = planned(64)
    alone, together = step_seconds(plan, H100, 1, 32), step_seconds(plan, H100, 8, 32, others=10**6)
    byte, latency = H100.direct(8)
    numel = 6 * 16 + 16 + 16 * 3 + 3 + 10**6
    assert together - alone == pytest.approx(2 * 4 * numel * 7 / 8 / byte + 14 * latency)
