"""The raw quantities that ConvergenceCriteria logs, each against a computation by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceCriteria, Probe, RegularizedGradientClipping
from lightning_conv.callbacks.run.layer_norms import LayerNorms
from lightning_conv.theory.networks import DuFC
from lightning_conv.theory.tools.hidden_states import activity


@pytest.fixture
def data() -> TensorDataset:
    torch.manual_seed(5)
    return TensorDataset(torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64))


class Layers(nn.Module):
    """ReLU as a module and as a function, a leaky one, and a batch normalisation on request."""

    def __init__(self, normalised: bool = False) -> None:
        super().__init__()
        self.first, self.relu = nn.Linear(6, 12), nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm1d(12) if normalised else nn.Identity()
        self.second, self.leaky, self.third, self.last = (
            nn.Linear(12, 11),
            nn.LeakyReLU(),
            nn.Linear(11, 14),
            nn.Linear(14, 2),
        )

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.third(self.leaky(self.second(x)))))

    def by_hand(self, x):
        """Pre-activations and what enters the layers."""
        z_1 = self.norm(self.first(x))
        h_1 = z_1.clamp(min=0)
        z_2 = self.second(h_1)
        h_2 = torch.where(z_2 > 0, z_2, 0.01 * z_2)
        z_3 = self.third(h_2)
        return torch.cat([z_1, z_2, z_3], 1), [h_1, h_2, z_3.clamp(min=0)]


def trained(make_trainer, make_regression, data, network, recorder, *, epochs=7, callbacks=(), **options):
    start = copy.deepcopy(network)
    criteria = ConvergenceCriteria(every_n_steps=1, **options)
    make_trainer([*callbacks, criteria], max_epochs=epochs, logger=recorder).fit(
        make_regression(network, lr=0.2).double(), DataLoader(data, batch_size=len(data))
    )
    return start, criteria


def test_every_quantity_is_that_of_the_definition(make_trainer, make_regression, data, recorder):
    torch.manual_seed(1)
    network = Layers().double()
    start, criteria = trained(make_trainer, make_regression, data, network, recorder)
    inputs, targets = data.tensors
    with torch.no_grad():
        (z, states), (z_0, states_0) = network.by_hand(inputs), start.by_hand(inputs)
        outputs = network(inputs)
    weights = [(w, w_0) for w, w_0 in zip(network.parameters(), start.parameters(), strict=True) if w.ndim == 2]

    def norms(order):
        moved = [float(torch.linalg.matrix_norm((w - w_0).detach(), order)) for w, w_0 in weights]
        sizes = [float(torch.linalg.matrix_norm(w_0.detach(), order)) for _, w_0 in weights]
        return max(moved), max(m / s for m, s in zip(moved, sizes, strict=True))

    singular = [torch.linalg.svdvals(w.detach()) for w, _ in weights]
    ranks = [float((s / s[0]).square().sum()) for s in singular]
    columns = torch.cat([states[-1], torch.ones(9, 1, dtype=torch.float64)], 1)
    sigma = torch.linalg.svdvals(columns)
    share = sigma / sigma.sum()
    solved = torch.linalg.lstsq(columns, targets, driver="gelsd").solution
    network.zero_grad()
    nn.functional.mse_loss(network(inputs), targets).backward()
    squared = sum(float(p.grad.square().sum()) for p in network.parameters())
    losses, ratios = [seen.loss for seen in criteria.history], [seen.ratio for seen in criteria.history]
    expected = {
        "layer_distance_spectral": norms(2)[0], "layer_distance_spectral_relative": norms(2)[1],
        "layer_distance_frobenius": norms("fro")[0], "layer_distance_frobenius_relative": norms("fro")[1],
        "layer_stable_rank_min": min(ranks), "layer_stable_rank_max": max(ranks),
        "active_fraction": float((z > 0).double().mean()),
        "sign_changes": float(((z >= 0) != (z_0 >= 0)).double().mean()),
        "forward_drift": max(float((h - h_0).norm(dim=1).max()) for h, h_0 in zip(states, states_0, strict=True)),
        "forward_drift_relative": max(
            float((h - h_0).norm(dim=1).max() / h_0.norm(dim=1).max()) for h, h_0 in zip(states, states_0, strict=True)
        ),
        "stable_rank": float(columns.square().sum() / sigma[0] ** 2), "effective_rank": math.exp(-float((share * share.log()).sum())),
        "log_phi": float(torch.linalg.slogdet(columns @ columns.T)[1]), "condition_number": float(sigma[0] / sigma[-1]),
        "rank_share": 1.0, "sigma_min": float(sigma[-1]), "sigma_max": float(sigma[0]),
        "least_radius": 2 * math.sqrt(losses[0] / min(ratios)),
        # A sample's share of the mean over 18 numbers.
        "gradient_over_largest": squared / float(((outputs - targets).square().sum(1) / 18).max()),
    }  # fmt: skip
    for name, value in expected.items():
        assert recorder.scalars[f"theory/{name}"][7] == pytest.approx(value, rel=1e-6), name
    assert recorder.scalars["theory/alignment_residual"][7] == pytest.approx(
        float((columns @ solved - targets).norm() / targets.norm()), abs=1e-9
    )
    assert 0.999 * float(sigma[-1]) < recorder.scalars["theory/sigma_min_lower"][7] <= float(sigma[-1])
    assert recorder.scalars["theory/sign_changes"][7] > 0
    assert recorder.scalars["theory/sign_changes"][0] == recorder.scalars["theory/forward_drift"][0] == 0
    assert recorder.scalars["theory/layer_distance_spectral"][0] == 0
    largest = recorder.scalars["theory/gradient_over_largest"][7]
    assert criteria.history[7].ratio <= largest <= 9 * criteria.history[7].ratio
    assert "theory/averaged_movement" not in recorder.scalars
    assert "theory/clipped_contraction" not in recorder.scalars
    assert all(math.isfinite(v) for tag in recorder.scalars.values() for v in tag.values())


def test_the_norm_of_the_start_is_taken_once_a_run_and_that_of_now_once_a_measurement(monkeypatch):
    from lightning_conv.callbacks.run import layer_norms
    from lightning_conv.theory.tools import matrix_norms

    taken: list[torch.Tensor] = []
    original = matrix_norms.spectral_norm
    counting = lambda matrix, **options: taken.append(matrix) or original(matrix, **options)  # noqa: E731
    monkeypatch.setattr(matrix_norms, "spectral_norm", counting)
    monkeypatch.setattr(layer_norms, "spectral_norm", counting)
    torch.manual_seed(0)
    start = {
        "w": torch.randn(5, 4),
        "kernel": torch.randn(3, 2, 2, 2),
        "zero": torch.zeros(2, 2),
        "bias": torch.ones(5),
    }
    norms, counts = LayerNorms(), []
    for t in range(4):
        now = {name: value + 0.1 * t * torch.ones_like(value) for name, value in start.items()}
        taken.clear()
        found = norms.measure(now, start)
        counts.append(len(taken))
    assert counts == [6, 6, 6, 6]  # three matrices: that of now and the change; at the start the two are one
    assert found["layer_stable_rank_min"] == pytest.approx(1)  # the one that began at zero is 0.3 everywhere
    # In a resumed run the start is another matrix than that of now.
    taken.clear()
    again = LayerNorms().measure(now, start)
    assert len(taken) == 9
    assert again == found
    assert "layer_stable_rank_min" not in LayerNorms().measure({"zero": start["zero"]}, {"zero": start["zero"]})


def test_a_head_narrower_than_the_samples_has_sigma_min_zero(make_trainer, make_regression, data, recorder):
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    trained(make_trainer, make_regression, data, network, recorder, epochs=2)
    hidden = torch.cat([network[:2](data.tensors[0]).detach(), torch.ones(9, 1, dtype=torch.float64)], 1)
    assert recorder.scalars["theory/sigma_max"][2] == pytest.approx(float(torch.linalg.svdvals(hidden)[0]), rel=1e-9)
    assert recorder.scalars["theory/sigma_min"][2] == recorder.scalars["theory/sigma_min_lower"][2] == 0
    assert "theory/condition_number" not in recorder.scalars


def test_the_movement_of_the_papers_networks_is_averaged_over_their_width(make_trainer, make_regression, recorder):
    torch.manual_seed(0)
    x = nn.functional.normalize(torch.randn(5, 6, dtype=torch.float64))
    network = DuFC(6, width=30, depth=2)
    options = {"which": "du", "probe": Probe(forward_fn=lambda module, inputs: module.network(inputs))}
    start, _ = trained(
        make_trainer, make_regression, TensorDataset(x, x.sum(1)), network, recorder, epochs=4, **options
    )
    moved = [
        float((w - w_0).norm()) / math.sqrt(30) for w, w_0 in zip(network.parameters(), start.parameters(), strict=True)
    ]
    assert recorder.scalars["theory/averaged_movement"][4] == pytest.approx(max(moved), rel=1e-9)
    assert "theory/active_fraction" not in recorder.scalars  # softplus units are never inactive


def test_the_contraction_that_clipping_promises_is_kept(make_trainer, make_regression, data, recorder):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2)).double()
    clip = RegularizedGradientClipping(gamma=0.1, delta=0.3)
    _, criteria = trained(make_trainer, make_regression, data, network, recorder, callbacks=[clip])
    promised = recorder.scalars["theory/clipped_contraction"]
    for t in range(7):
        infimum = min(seen.ratio for seen in criteria.history[: t + 1])
        assert promised[t] == pytest.approx(1 - 0.2 * 0.3 * infimum / 2, rel=1e-9)
        assert recorder.scalars["theory/contraction"][t] <= promised[t]
    assert 7 not in promised  # no step follows


@pytest.mark.parametrize("samples", [9, 300])
def test_batch_normalisation_has_the_statistics_of_its_own_weights(samples):
    torch.manual_seed(2)
    network, start = Layers(normalised=True).double().train(), Layers(normalised=True).double().train()
    x = torch.randn(samples, 6, dtype=torch.float64)
    before = copy.deepcopy(network.state_dict())
    found = activity(network, x, {name: p.detach() for name, p in start.named_parameters()})
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    (z, states), (z_0, states_0) = (each.by_hand(x) for each in (network, start))
    assert found is not None
    shown = found.quantities()
    assert shown["sign_changes"] == pytest.approx(float(((z >= 0) != (z_0 >= 0)).double().mean()))
    drift = max(float((h - h_0).norm(dim=1).max()) for h, h_0 in zip(states, states_0, strict=True))
    assert shown["forward_drift"] == pytest.approx(drift, rel=1e-9)
    assert activity(network, x, {}, batch_norm="eval") is None  # the running statistics of the start are not known


def test_a_network_that_cannot_be_looked_at_loses_these_numbers_and_nothing_else(
    monkeypatch, lenient, make_trainer, make_regression, data
):
    from lightning_conv.callbacks.run import view

    def broken(*_args, **_kwargs):
        raise RuntimeError("no forward here")

    monkeypatch.setattr(view, "activity", broken)
    criteria = ConvergenceCriteria(every_n_steps=1)
    trainer = make_trainer([criteria], max_epochs=2)
    with pytest.warns(UserWarning, match="no forward here"):
        trainer.fit(make_regression(Layers(), lr=0.1).double(), DataLoader(data, batch_size=9))
    assert "theory/loss" in trainer.callback_metrics
    assert "theory/forward_drift" not in trainer.callback_metrics


def test_the_run_is_bit_for_bit_the_same(make_trainer, make_regression, data):
    def run(callbacks):
        torch.manual_seed(0)
        module = make_regression(Layers(normalised=True), lr=0.1).double()
        make_trainer(callbacks, max_epochs=4).fit(module, DataLoader(data, batch_size=3, shuffle=True))
        return module.losses, module.state_dict(), torch.get_rng_state()

    plain, watched = run([]), run([ConvergenceCriteria(every_n_steps=1)])
    assert plain[0] == watched[0]
    assert all(torch.equal(value, watched[1][name]) for name, value in plain[1].items())
    assert torch.equal(plain[2], watched[2])
