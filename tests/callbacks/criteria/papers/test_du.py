"""ConvergenceCriteria on the networks of Du et al.: layers at the start, movement against R', and each network's own limit kernel."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceCriteria, Probe
from lightning_conv.callbacks.criteria.papers.du import kernel as du_kernel
from lightning_conv.callbacks.criteria.papers.du.kernel import papers_network
from lightning_conv.kernels.infinite import convolutional_limit
from lightning_conv.theory.networks import DuConvResNet, DuFC, DuResNet, DuTwoLayer


@pytest.fixture
def points() -> TensorDataset:
    torch.manual_seed(3)
    return TensorDataset(torch.eye(5, 8, dtype=torch.float64), torch.randn(5, dtype=torch.float64))


@pytest.fixture
def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 1, 4, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(
        x / x.flatten(1).norm(dim=1)[:, None, None, None], torch.randn(4, generator=generator).double()
    )


@pytest.fixture
def follow(make_trainer, make_regression):
    """Trains and judges; gives the callback, the network at its start and as it is now, and the trainer."""

    def run(
        network, data, *, lr=0.2, epochs=4, batch=None, probe=None, logger=False, fit=None, checkpoint=False, **options
    ):
        start = copy.deepcopy(network)
        criteria = ConvergenceCriteria("du", every_n_steps=1, probe=probe)
        trainer = make_trainer([criteria], max_epochs=epochs, logger=logger, checkpoint=checkpoint)
        loader = DataLoader(data, batch_size=batch or len(data))
        trainer.fit(make_regression(network, lr=lr, **options), loader, **(fit or {}))
        return criteria, start, network, trainer

    return run


def by_name(callback: ConvergenceCriteria) -> dict:
    return {each.name: each for each in callback.criteria}


def residual(network, data) -> float:
    inputs, targets = data.tensors
    with torch.no_grad():
        return float((network(inputs) - targets).norm())


@pytest.mark.parametrize("kind", [DuFC, DuResNet])
def test_the_norms_of_all_layers_are_judged_at_the_start(follow, points, kind):
    criteria, start, network, _ = follow(kind(8, width=40, depth=3), points, epochs=6)
    with torch.no_grad():
        logs = [math.log2(float(row.norm())) for layer in start.states(points.tensors[0])[0][1:] for row in layer]
    found = by_name(criteria)["layer_norms"]
    assert found.measured == pytest.approx(max(abs(each) for each in logs), rel=1e-12)
    with torch.no_grad():
        now = [math.log2(float(row.norm())) for layer in network.states(points.tensors[0])[0][1:] for row in layer]
    assert abs(max(map(abs, now)) - found.measured) > 1e-6  # those of the end are others
    assert found.verdict == "consistent"


def test_layers_that_start_too_large_are_refuted_and_of_residual_networks_the_constant_is_open(follow, points):
    def large(network):
        with torch.no_grad():
            network.hidden[0].weight *= 12
        return network

    found = by_name(follow(large(DuFC(8, width=30, depth=2)), points, lr=1e-4, epochs=1)[0])["layer_norms"]
    assert (found.verdict, found.bound) == ("refuted", 1.0)
    open_one = by_name(follow(large(DuResNet(8, width=30, depth=2)), points, lr=1e-4, epochs=1)[0])["layer_norms"]
    assert open_one.verdict == "undecided"
    assert "for the residual ones the constant is not specified" in open_one.reason


def test_layers_stay_within_the_radius_of_lemma_b5(follow, points, recorder):
    criteria, start, network, _ = follow(DuFC(8, width=60, depth=2), points, epochs=5, logger=recorder)
    x, h_limit = points.tensors[0], du_kernel.limit_kernel(start, points.tensors[0])
    lambda_0 = float(np.linalg.eigvalsh(h_limit.matrix.numpy())[0])
    weights = [layer.weight.detach().numpy() for layer in start.hidden]
    c_w = max(np.linalg.svd(w, compute_uv=False)[0] for w in weights) / math.sqrt(60)
    a = float(start.output.weight.norm()) / math.sqrt(60)
    c_x = 2 * math.sqrt(start.c_sigma) * c_w  # softplus has Lipschitz constant 1
    radius = 16 * 2 * a * c_x**2 * math.sqrt(len(x)) * residual(start, points) / (lambda_0 * math.sqrt(60))
    moved = max(
        float((w - v).norm()) / math.sqrt(60) for w, v in zip(network.parameters(), start.parameters(), strict=True)
    )
    found = by_name(criteria)["layer_movement"]
    assert found.bound == pytest.approx(radius, rel=1e-6)
    assert found.measured >= moved * (1 - 1e-12)
    assert found.measured == pytest.approx(max(recorder.scalars["theory/averaged_movement"].values()), rel=1e-12)
    assert recorder.scalars["theory/layer_radius"][5] == pytest.approx(radius, rel=1e-6)
    assert (found.verdict, criteria.violations) == ("consistent", [])


def test_a_layer_that_moves_beyond_the_radius_is_refuted_and_stays_so(make_trainer, make_regression, points):
    network = DuFC(8, width=16, depth=1)
    with torch.no_grad():
        targets = network(points.tensors[0]) + 1e-4  # R' is proportional to the error at the start
    module = make_regression(network, lr=0.01)
    moves = iter([1.0, -1.0, 0.0, 0.0])

    def kicked(batch, batch_idx):  # far away and back, with the error as it was
        with torch.no_grad():
            network.hidden[0].weight[0] += 1e3 * next(moves)
        return module.loss_fn(module(batch[0]), batch[1])

    module.training_step = kicked
    criteria = ConvergenceCriteria("du", every_n_steps=1)
    make_trainer([criteria], max_epochs=2).fit(
        module, DataLoader(TensorDataset(points.tensors[0], targets), batch_size=5)
    )
    # A run that does this is no gradient descent: the theorem does not apply, and the number is told.
    found = by_name(criteria)["layer_movement"]
    assert found.verdict == "not applicable"
    assert found.measured > 100
    state = criteria.state_dict()["record"]["trackers"]["du"]["evidence"]["worst"]["layer_movement"]
    assert state["criterion"]["verdict"] == "refuted"
    assert state["step"] == 1


def test_neurons_stay_within_the_radius_of_corollary_4_1(follow, points, recorder):
    criteria, start, network, _ = follow(DuTwoLayer(8, width=2000), points, lr=0.5, epochs=6, logger=recorder)
    x = points.tensors[0]
    angle = torch.arccos((x @ x.T).clamp(-1, 1)).numpy()
    h_infinity = (x @ x.T).numpy() * (np.pi - angle) / (2 * np.pi)
    lambda_0 = np.linalg.eigvalsh(h_infinity)[0]
    radius = 4 * math.sqrt(5) * residual(start, points) / (math.sqrt(2000) * lambda_0)
    moved = max(float((w - v).norm()) for w, v in zip(network.hidden.weight, start.hidden.weight, strict=True))
    found = by_name(criteria)
    assert [each.assumption for each in criteria.violations] == ["smooth"]  # which the theorem does not ask for
    assert set(found) == {"lambda_min_share", "kernel_drift", "limit_distance", "neuron_movement", "step_contraction"}
    assert found["neuron_movement"].bound == pytest.approx(radius, rel=1e-6)
    assert found["neuron_movement"].measured == pytest.approx(moved, rel=1e-9)  # it is largest at the end
    assert {each.verdict for each in found.values()} == {"consistent"}
    assert recorder.scalars["theory/neuron_movement"][6] == pytest.approx(moved, rel=1e-9)
    assert recorder.scalars["theory/neuron_radius"][6] == pytest.approx(radius, rel=1e-6)
    assert 0 < recorder.scalars["theory/sign_changes"][6] < 0.1

    with torch.no_grad():  # H(k) by hand
        active = (x @ network.hidden.weight.T >= 0).double()
        gram = (x @ x.T) * (active @ active.T) / 2000
        first = (x @ x.T) * ((b := (x @ start.hidden.weight.T >= 0).double()) @ b.T) / 2000
    gap = np.linalg.norm(first.numpy() - h_infinity, 2) / lambda_0
    assert found["limit_distance"].measured == pytest.approx(gap, rel=1e-6)
    assert found["lambda_min_share"].measured <= np.linalg.eigvalsh(gram.numpy())[0] / lambda_0 * (1 + 1e-9)
    assert found["step_contraction"].bound == pytest.approx(1 - 0.5 * 2 / 5 * lambda_0 / 2, rel=1e-9)


def test_neurons_that_a_step_too_long_throws_out_are_refuted(follow, points):
    found = by_name(follow(DuTwoLayer(8, width=400), points, lr=40.0, epochs=3)[0])
    assert found["neuron_movement"].verdict == "refuted"
    assert found["neuron_movement"].measured > found["neuron_movement"].bound
    assert found["step_contraction"].verdict in ("refuted", "undecided")


def test_a_narrow_two_layer_network_is_far_from_its_limit(follow, points):
    found = by_name(follow(DuTwoLayer(8, width=6), points, lr=0.1)[0])
    assert found["limit_distance"].verdict == "refuted"
    assert not found["limit_distance"].source.startswith("after")


@pytest.mark.parametrize(
    "network",
    [
        DuTwoLayer(8, width=20, train_output=True),
        DuTwoLayer(8, width=20, activation=nn.Tanh()),
        DuFC(8, width=20, depth=2, activation=nn.ReLU()),
    ],
    ids=["both layers trained", "two layers without ReLU", "deep with a kink"],
)
def test_what_the_theorem_is_not_about_is_judged_by_analogy(follow, points, network):
    criteria, *_ = follow(network, points, lr=0.05, epochs=2)
    assert set(by_name(criteria)) == {"own_lambda_min_share", "kernel_drift", "step_contraction"}


def test_the_papers_network_is_found_where_exactly_its_weights_are_trained(points):
    x = points.tensors[0]
    two, deep = DuTwoLayer(8, width=20), DuFC(8, width=20, depth=2)
    assert papers_network(two, x, ["hidden.weight"]) == ""
    assert papers_network(two, x, ["hidden.weight", "output.weight"]) is None
    assert papers_network(deep, x, ["hidden.0.weight", "hidden.1.weight", "output.weight"]) == ""
    assert papers_network(deep, x, ["hidden.1.weight"]) is None
    assert papers_network(nn.Sequential(two), x, ["0.hidden.weight"]) == "0"
    assert papers_network(nn.Sequential(two, nn.Tanh()), x, ["0.hidden.weight"]) is None  # does more than its child
    assert papers_network(nn.Sequential(nn.Linear(8, 8).double(), two), x, ["0.weight", "1.hidden.weight"]) is None
    assert papers_network(two, 2 * x, ["hidden.weight"]) is None
    with torch.no_grad():
        two.output.weight *= 2  # a_r is -1 or 1
    assert papers_network(two, x, ["hidden.weight"]) is None


def test_the_convolutional_network_is_judged_against_its_own_limit(follow, images, recorder):
    criteria, start, network, _ = follow(
        DuConvResNet(1, (4, 4), width=24, depth=2), images, lr=0.02, epochs=3, logger=recorder
    )
    x = images.tensors[0]
    found = by_name(criteria)
    assert criteria.violations == []
    assert set(found) == {
        "lambda_min_share", "kernel_drift", "limit_distance", "step_contraction", "layer_norms", "linearisation_remainder",
        "output_change",
    }  # fmt: skip

    def gram(net):  # by autograd
        rows = [torch.autograd.grad(u, net.hidden[1].weight, retain_graph=True)[0].flatten() for u in net(x)]
        return (torch.stack(rows) @ torch.stack(rows).T).numpy()

    limit = convolutional_limit(x, 2, start.activation).matrix.numpy()
    lambda_0 = np.linalg.eigvalsh(limit)[0]
    assert found["limit_distance"].measured == pytest.approx(
        np.linalg.norm(gram(start) - limit, 2) / lambda_0, rel=1e-6
    )
    drift = np.linalg.norm(gram(network) - gram(start), 2) / lambda_0
    assert found["kernel_drift"].measured >= drift * (1 - 1e-9)
    assert found["lambda_min_share"].measured <= np.linalg.eigvalsh(gram(network))[0] / lambda_0 * (1 + 1e-9)
    assert not any(each.source.startswith("after") for each in found.values())
    with torch.no_grad():
        norms = [float(image.norm()) for layer in start.states(x)[0][1:] for image in layer]
    assert found["layer_norms"].measured == pytest.approx(max(abs(math.log2(each)) for each in norms), rel=1e-12)
    assert "theory/averaged_movement" in recorder.scalars
    assert "theory/layer_radius" not in recorder.scalars  # the paper specifies no constant


def test_a_limit_kernel_that_takes_too_long_or_too_much_is_left_out_with_the_reason(monkeypatch, follow, images):
    monkeypatch.setattr(du_kernel, "SLOWEST", 1e-9)
    with pytest.warns(UserWarning, match="the limit kernel of DuConvResNet on 4 images of 16 positions takes"):
        criteria, *_ = follow(DuConvResNet(1, (4, 4), width=6, depth=2), images, lr=0.02, epochs=1)
    assert set(by_name(criteria)) == {"own_lambda_min_share", "kernel_drift", "step_contraction"}
    with pytest.raises(MemoryError, match="are allowed"):
        du_kernel.limit_kernel(DuConvResNet(1, (4, 4), width=6, depth=1), images.tensors[0], max_memory=100)


def test_with_momentum_nothing_applies_and_the_numbers_are_told(follow, points, recorder):
    criteria, *_ = follow(DuFC(8, width=30, depth=2), points, momentum=0.9, lr=0.01, logger=recorder)
    found = by_name(criteria)
    assert set(found) >= {"layer_norms", "layer_movement", "linearisation_remainder", "output_change"}
    assert {each.verdict for each in found.values()} == {"not applicable"}
    assert all("momentum=0.9" in each.reason for each in found.values())
    assert found["layer_movement"].measured > 0
    assert math.isnan(found["linearisation_remainder"].measured)
    assert {"theory/averaged_movement", "theory/layer_radius", "theory/residual"} <= set(recorder.scalars)
    assert not {"theory/linearisation_error", "theory/residual_predicted"} & set(recorder.scalars)


@pytest.mark.parametrize("kind", [DuFC, DuTwoLayer])
def test_a_resumed_run_has_the_radius_and_the_norms_of_its_start(tmp_path, follow, points, kind):
    def network():
        return DuFC(8, width=30, depth=2) if kind is DuFC else DuTwoLayer(8, width=30)

    straight, *_ = follow(network(), points, epochs=6)
    follow(network(), points, epochs=3, checkpoint=True)
    path = {"ckpt_path": tmp_path / "checkpoints" / "last.ckpt"}
    resumed, *_ = follow(network(), points, epochs=6, fit=path)
    assert [repr(each) for each in resumed.criteria] == [repr(each) for each in straight.criteria]


def test_inputs_in_float32_are_judged_too(follow, points):
    data = TensorDataset(*(each.float() for each in points.tensors))
    criteria, *_ = follow(DuFC(8, width=30, depth=2, dtype=torch.float32), data, probe=Probe(5))
    assert {"layer_norms", "layer_movement", "linearisation_remainder"} <= set(by_name(criteria))


def test_a_run_that_was_not_seen_from_its_start_is_not_held_against_it(tmp_path, make_trainer, make_regression, points):
    network, loader = DuFC(8, width=40, depth=2), DataLoader(points, batch_size=len(points))
    make_trainer([], max_epochs=2, checkpoint=True).fit(make_regression(network, lr=0.2), loader)
    criteria = ConvergenceCriteria("du", every_n_steps=1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    make_trainer([criteria], max_epochs=4).fit(make_regression(copy.deepcopy(network), lr=0.2), loader, ckpt_path=last)
    found = by_name(criteria)
    for name in ("layer_norms", "limit_distance", "kernel_drift", "layer_movement"):
        assert found[name].verdict == "not applicable"
        assert "not observed from its first step" in found[name].reason
    assert found["lambda_min_share"].verdict != "not applicable"
    assert found["step_contraction"].verdict != "not applicable"
