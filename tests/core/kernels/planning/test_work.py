"""The work of a rank: by hand for a small perceptron, that of the plan for one rank, less with more ranks, and what the engine does."""

from dataclasses import replace

import pytest
import torch
from on_ranks import run
from torch import nn

from lightning_conv import ntk_gram, plan_ntk
from lightning_conv.kernels.planning.computed import convolutions, forming, multiplying, weights
from lightning_conv.kernels.planning.work import groups, meetings, work_of
from lightning_conv.machine.processes import Processes

N, D, H, K = 40, 6, 5, 3
FORWARD = 2 * D * H + 2 * H * K
BACKWARD = 2 * H * K  # nothing below the first layer needs a gradient
NUMEL = D * H + H + H * K + K


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, K))


def planned(n=N, outputs="trace", **options):
    return plan_ntk(perceptron(), torch.randn(n, D), outputs=outputs, precision="fast", **options)


def test_the_work_of_one_rank_by_hand():
    plan = planned()
    assert {each.way for each in plan.contributions} == {"per-sample gradients"}
    found = work_of(plan)
    rounding = (1 + 2) * 3 * (FORWARD + BACKWARD)  # three samples, in float32 and at twice the price in float64
    square = N**2  # one tile: both halves of it are computed
    assert found.computed.matrices == pytest.approx(N * (FORWARD + K * BACKWARD) + rounding + 2 * square * K * NUMEL)
    assert found.computed.small == N * K * FORWARD  # A^T B of each sample and output
    assert weights(plan) == NUMEL
    activations = N * (1 + K) * plan.sample_bytes
    pairs = N * (N + 1) / 2
    formed, matrix = 3 * 4 * N * K * NUMEL, 2 * 32 * pairs  # two layers are added
    assert found.computed.moved == pytest.approx(activations + formed + matrix + 6 * 4 * NUMEL + 3 * 8 * N**2)
    assert (found.by, found.sent, found.messages, found.gathered) == ("nothing", 0, 0, 0)
    assert found.eigenvalues == 4 / 3 * N**3


@pytest.mark.parametrize("outputs", ["trace", "sum", "full", "projected"])
def test_one_rank_has_the_flops_and_the_bytes_of_the_plan(outputs):
    plan = planned(outputs=outputs, projections=2)
    found = work_of(plan)
    twice = groups(plan) * (multiplying(plan) + forming(plan) - sum(each.flops for each in plan.contributions))
    flops = found.computed.matrices + found.computed.small - found.same.matrices - found.same.small
    assert flops - twice == pytest.approx(plan.flops, rel=1e-12)
    assert found.memory == plan.bytes


def test_convolutions_are_counted_as_small_products():
    torch.manual_seed(0)
    plan = plan_ntk(convolution(), torch.randn(4, 3, 12, 12), outputs="sum", precision="fast")
    linear = 2 * 32 * 64 * 4
    first, second = 2 * 27 * 32 * 100, 2 * 32 * 9 * 32 * 64
    assert convolutions(plan) == pytest.approx((first + second) / (first + second + linear))


def test_by_outputs_forward_passes_are_repeated():
    plan = planned()
    alone, found = work_of(plan), work_of(plan, 2)
    assert (found.by, found.sent) == ("outputs", plan.divided(2).division.sent)
    rounding = (1 + 2) * 2 * (FORWARD + BACKWARD)
    assert found.same.matrices == pytest.approx(N * FORWARD + rounding + multiplying(plan) / (K + 1))
    assert found.computed.small == pytest.approx(alone.computed.small * 2 / 3)  # two of the three outputs
    assert found.computed.matrices < alone.computed.matrices


def test_by_samples_passes_and_products_are_divided():
    plan = planned(outputs="sum")
    alone, found = work_of(plan), work_of(plan, 4)
    assert found.by == "samples"
    for kind in ("matrices", "small", "moved"):
        whole = getattr(alone.computed, kind) - getattr(alone.same, kind)
        assert getattr(found.computed, kind) - getattr(found.same, kind) == pytest.approx(whole / 4)
    assert found.sent == plan.divided(4).division.sent > 0


def test_more_ranks_than_samples_share_nothing():
    alone, found = work_of(planned(n=3)), work_of(planned(n=3), 4)
    assert found.by == "nothing"
    assert found.computed.small == found.same.small == alone.computed.small


@pytest.mark.parametrize("outputs", ["trace", "sum", "full"])
def test_more_ranks_have_no_more_to_compute_each_and_more_messages(outputs):
    plan = planned(n=128, outputs=outputs)
    found = [work_of(plan, ranks) for ranks in (1, 2, 4, 8, 16, 32)]
    for less, more in zip(found[1:], found, strict=False):
        assert less.computed.matrices <= more.computed.matrices
        assert less.computed.small <= more.computed.small
        assert less.computed.moved <= more.computed.moved
        assert less.memory <= more.memory
        assert less.messages > more.messages


def test_ranks_of_a_sharded_module_all_do_the_same_and_gather_the_parameters():
    plan = planned()
    alone, found = work_of(plan), work_of(plan, 4, sharded=True, others=1000)
    assert found.by == "parameters"
    assert found.computed.small == found.same.small == alone.computed.small
    assert found.sent == 0
    (one,) = plan.passes
    tiles = -(-N // one.tile)
    assert found.gathered == tiles * 4 * (NUMEL + 1000 + K * NUMEL) * 3 / 4


def test_frozen_layers_add_their_forward_passes():
    plan = planned()
    more = work_of(plan, frozen=1000.0).computed.matrices - work_of(plan).computed.matrices
    assert more == pytest.approx(1000.0 * (N + 3 * (1 + 2)))


def test_what_cannot_be_modelled_is_refused():
    with pytest.raises(ValueError, match="ranks: 0; need a whole number of at least 1"):
        work_of(planned(), 0)
    with pytest.raises(TypeError, match=r"ranks: 1\.5"):
        work_of(planned(), 1.5)
    whole = [replace(each, way="whole batch") for each in planned().contributions]
    with pytest.raises(ValueError, match="plan: the samples couple"):
        work_of(replace(planned(), contributions=tuple(whole)))


def convolution():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 64, 4))


CASES = {
    "by outputs": (perceptron, (40, D), {"outputs": "trace"}),
    "by samples": (perceptron, (128, D), {"outputs": "full"}),
    "channels": (convolution, (12, 3, 12, 12), {"outputs": "full"}),
}


def met(rank, world):
    """Return, for each case, what was planned and counted: how often the processes met, and the bytes that one of them sent."""
    processes, counted, found = Processes(60), [0], {}
    attempt = processes._attempt

    def counting(send):
        counted[0] += 1
        attempt(send)

    processes._attempt = counting
    for name, (make, shape, options) in CASES.items():
        model, inputs = make(), torch.randn(shape, generator=torch.Generator().manual_seed(0))
        plan = plan_ntk(model, inputs, precision="fast", **options)
        before, sent = counted[0], processes.sent
        ntk_gram(model, inputs, plan=plan, remeasure=True, precision="fast", processes=processes, **options)
        work = work_of(plan, world)
        found[name] = (work.by, meetings(plan, world, work.by), counted[0] - before, work.sent, processes.sent - sent)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_the_engine_meets_as_often_as_is_counted_and_sends_as_much(world, tmp_path):
    found = run(world, met, tmp_path)
    assert None not in found
    for name in CASES:
        _, planned_meetings, counted, *_ = found[0][name]
        assert planned_meetings == counted, name
        largest = max(of[name][4] for of in found)
        assert found[0][name][3] == pytest.approx(largest, rel=0.1), name
    assert [found[0][name][0] for name in CASES][1:] == ["samples", "samples"]
