"""ConvergenceCriteria beside the linearisation of the run: the error of a step, the rate, and the curve that the first kernel predicts."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv import ntk_gram
from lightning_conv.callbacks import ConvergenceCriteria, LambdaMin, Probe, RegularizedGradientClipping
from lightning_conv.callbacks.criteria.papers.du.projection import LabelProjection
from lightning_conv.callbacks.criteria.papers.du.steps import LinearisedSteps
from lightning_conv.kernels.infinite import fully_connected_limit
from lightning_conv.reporting.plots import plot_label_projection
from lightning_conv.theory.networks import DuFC

LINEARISED = {
    "theory/linearisation_error", "theory/residual_predicted", "theory/rate_linearised_least", "theory/rate_linearised_greatest",
}  # fmt: skip


@pytest.fixture
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randn(6, 2, generator=generator, dtype=torch.float64))


def two_outputs() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 2)).double()


@pytest.fixture
def follow(make_trainer, make_regression, with_rates, data):
    def run(
        network=None, *, lr=0.4, factors=(1.0,), epochs=5, batch=6, every=1, probe=None, callbacks=(), fit=None, on=None, **options
    ):  # fmt: skip
        network = two_outputs() if network is None else network
        criteria = ConvergenceCriteria("du", every_n_steps=every, probe=probe or Probe(6, outputs="full"))
        known = {key: options.pop(key) for key in ("loss_fn", "momentum", "weight_decay") if key in options}
        module = with_rates(make_regression(network, lr=lr, **known), list(factors)) if not set(known) - {"loss_fn"} else (
            make_regression(network, lr=lr, **known)
        )  # fmt: skip
        trainer = make_trainer([*callbacks, criteria], max_epochs=epochs, **options)
        trainer.fit(module, DataLoader(on or data, batch_size=batch), **(fit or {}))
        return criteria, trainer

    return run


def by_hand(network, data, lr, factors, steps, reduction="mean"):
    """Everything of a run by a loop: outputs, the Jacobian's rows i C + c, and the step sizes on S."""
    network, (x, y) = copy.deepcopy(network), data.tensors
    seen = []
    for t in range(steps):
        outputs = network(x)
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(u, list(network.parameters()), retain_graph=True)])
            for u in outputs.flatten()
        ]
        jacobian = torch.stack(rows)
        gram, r = (jacobian @ jacobian.T).numpy(), (outputs.detach() - y.reshape(outputs.shape)).flatten().numpy()
        rate = lr * factors[min(t, len(factors) - 1)]
        eta = rate * (2 / len(r) if reduction == "mean" else 2)
        gradient = jacobian.T @ torch.from_numpy(r)
        with torch.no_grad():
            start = 0
            for p in network.parameters():
                p -= eta * gradient[start : start + p.numel()].view_as(p)
                start += p.numel()
            after = network(x)
        seen.append(
            {"u": outputs.detach().flatten().numpy(), "next": after.flatten().numpy(), "G": gram, "r": r, "eta": eta}
        )
    return seen


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_error_of_every_step_is_that_of_the_definition(follow, data, recorder, reduction):
    lr, factors = (0.4, [1.0, 0.5, 2.0, 0.1]) if reduction == "mean" else (0.03, [1.0, 0.5, 2.0, 0.1])
    network = two_outputs()
    expected = by_hand(network, data, lr, factors, 5, reduction)
    follow(network, lr=lr, factors=factors, logger=recorder, loss_fn=nn.MSELoss(reduction=reduction))
    for t, step in enumerate(expected):
        linear = step["eta"] * step["G"] @ step["r"]
        error = np.linalg.norm(step["next"] - step["u"] + linear) / np.linalg.norm(linear)
        assert recorder.scalars["theory/linearisation_error"][t] == pytest.approx(error, rel=1e-4), t
        assert error > 1e-3
        before, after = (float(np.sum((u - data.tensors[1].flatten().numpy()) ** 2)) for u in (step["u"], step["next"]))
        assert recorder.scalars["theory/rate"][t] == pytest.approx(1 - after / before, rel=1e-6)
        rate = 2 * step["eta"] * step["r"] @ step["G"] @ step["r"] / before
        assert recorder.scalars["theory/rate_linearised"][t] == pytest.approx(rate, rel=1e-6)
        ends = [2 * step["eta"] * value for value in np.linalg.eigvalsh(step["G"])[[0, -1]]]
        least, greatest = (recorder.scalars[f"theory/rate_linearised_{end}"][t] for end in ("least", "greatest"))
        assert (least, greatest) == (pytest.approx(ends[0], rel=1e-3), pytest.approx(ends[1], rel=1e-5))
        assert least <= rate <= greatest
    assert 5 not in recorder.scalars["theory/linearisation_error"]  # no step follows


def test_the_upper_end_of_the_rate_is_four_times_the_stability_number_of_lambda_min(follow, recorder):
    monitor = LambdaMin(every_n_steps=1, probe=Probe(6, outputs="full"))
    follow(logger=recorder, callbacks=[monitor])
    ratio, ends = recorder.scalars["kernel/step_size_ratio"], recorder.scalars["theory/rate_linearised_greatest"]
    for t in range(5):
        assert ends[t] == pytest.approx(4 * ratio[t], rel=1e-5)


def test_the_residual_is_predicted_from_the_first_kernel_with_the_steps_taken(follow, data, recorder):
    network, factors = two_outputs(), [1.0, 0.5, 2.0, 0.1, 1.0, 3.0]
    steps = by_hand(network, data, 0.4, factors, 7)
    values, vectors = np.linalg.eigh(steps[0]["G"])
    follow(network, factors=factors, epochs=7, every=2, logger=recorder)  # measures between steps of several sizes
    left = vectors.T @ steps[0]["r"]
    for t in range(8):
        if t in (0, 2, 4, 6, 7):
            measured = steps[t]["r"] if t < 7 else steps[6]["next"] - data.tensors[1].flatten().numpy()
            assert recorder.scalars["theory/residual"][t] == pytest.approx(np.linalg.norm(measured), rel=1e-5)
            assert recorder.scalars["theory/residual_predicted"][t] == pytest.approx(np.linalg.norm(left), rel=1e-4), t
        else:
            assert t not in recorder.scalars["theory/residual_predicted"]
        if t < 7:
            left = (1 - steps[t]["eta"] * values) * left


def test_a_linear_model_is_its_own_linearisation_to_the_end(follow, recorder):
    torch.manual_seed(1)
    follow(nn.Linear(5, 2).double(), lr=0.3, epochs=40, every=3, logger=recorder)
    for name in ("theory/residual", "theory/residual_predicted"):
        assert set(recorder.scalars[name]) == {*range(0, 40, 3), 40}
    for step, predicted in recorder.scalars["theory/residual_predicted"].items():
        assert recorder.scalars["theory/residual"][step] == pytest.approx(predicted, rel=1e-6)
    # The products in "fast" precision are what is left of it.
    assert max(recorder.scalars["theory/linearisation_error"].values()) < 1e-4
    for t, rate in recorder.scalars["theory/rate_linearised"].items():
        assert recorder.scalars["theory/rate"][t] == pytest.approx(rate, rel=0.5)


def test_a_resumed_run_predicts_the_same(tmp_path, follow, recorder):
    factors = [1.0, 0.5, 2.0, 0.1, 1.0, 3.0]
    straight, trainer = follow(epochs=8, every=3, factors=factors)
    follow(epochs=4, every=3, factors=factors, checkpoint=True)
    stored = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert any("projection" in str(each) for each in stored["callbacks"].values())
    resumed, again = follow(
        epochs=8, every=3, factors=factors, logger=recorder, fit={"ckpt_path": tmp_path / "checkpoints" / "last.ckpt"}
    )
    assert [repr(each) for each in resumed.trackers["du"].projection.curve] == [
        repr(each) for each in straight.trackers["du"].projection.curve
    ]
    for name in ("theory/residual", "theory/residual_predicted", "theory/linearisation_error"):
        assert float(again.callback_metrics[name]) == float(trainer.callback_metrics[name])
    assert math.isfinite(straight.trackers["du"].projection.curve[-1][2])


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"momentum": 0.9}, {"theory/linearisation_error", "theory/residual_predicted", "theory/rate_linearised_least"}),
        ({"batch": 3}, {"theory/linearisation_error", "theory/residual_predicted"}),
        ({"loss_fn": nn.L1Loss()}, LINEARISED | {"theory/residual"}),
        ({"probe": Probe(6)}, LINEARISED),
        ({"probe": Probe(4, outputs="full")}, {"theory/linearisation_error", "theory/residual_predicted"}),
        ({"callbacks": [RegularizedGradientClipping(gamma=0.05, delta=0.1)]}, {"theory/residual_predicted"}),
    ],
    ids=["momentum", "mini-batches", "another loss", "summed kernel", "part of the set", "clipping"],
)  # fmt: skip
def test_what_means_nothing_is_left_out_and_the_rest_is_there(follow, recorder, options, left_out):
    follow(logger=recorder, **options)
    assert not left_out & set(recorder.scalars)
    expected = {"theory/loss", "theory/rate", *LINEARISED, "theory/residual"} - left_out
    if "momentum" in options:  # no plain descent, so no size of a step
        expected -= {"theory/rate_linearised_greatest"}
    assert expected <= set(recorder.scalars)


def test_a_step_that_is_no_plain_descent_stops_the_prediction_for_good(make_trainer, make_regression, data, recorder):
    module = make_regression(two_outputs(), lr=0.3)

    def configure():
        optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
        optimizer.register_step_post_hook(
            lambda each, *_: [
                group.update(momentum=0.9 if len(module.losses) == 3 else 0.0) for group in each.param_groups
            ]
        )
        return optimizer

    module.configure_optimizers = configure
    criteria = ConvergenceCriteria("du", every_n_steps=1, probe=Probe(6, outputs="full"))
    make_trainer([criteria], max_epochs=6, logger=recorder).fit(module, DataLoader(data, batch_size=6))
    assert max(recorder.scalars["theory/residual_predicted"]) < 4
    assert max(recorder.scalars["theory/residual"]) == 6


def unit_rows() -> TensorDataset:
    torch.manual_seed(3)
    return TensorDataset(torch.eye(5, 8, dtype=torch.float64), torch.randn(5, dtype=torch.float64))


def test_the_lemmas_about_a_step_are_judged_at_the_worst_one_with_the_papers_lambda_0(follow):
    data, factors = unit_rows(), [1e-2, 5e-2, 1e-2]
    network = DuFC(8, width=4000, depth=1)
    lambda_0 = float(torch.linalg.eigvalsh(fully_connected_limit(data.tensors[0], 1, network.activation).matrix)[0])
    steps = by_hand(network, data, 0.03, factors, 3)
    criteria, _ = follow(network, lr=0.03, factors=factors, epochs=3, on=data, batch=5, probe=Probe(5))
    found = {each.name: each for each in criteria.criteria}
    shares = []
    for t, step in enumerate(steps):
        r = np.linalg.norm(step["r"])
        change = step["next"] - step["u"]
        shares.append(
            (
                np.linalg.norm(change + step["eta"] * step["G"] @ step["r"]) / r,
                (np.linalg.norm(change) / r) ** 2,
                step["eta"] * lambda_0 / 8,
                t,
            )
        )
    for name, column in (("linearisation_remainder", 0), ("output_change", 1)):
        worst = max(shares, key=lambda each, column=column: each[column] / each[2])
        assert found[name].measured == pytest.approx(worst[column], rel=1e-2)
        assert found[name].bound == pytest.approx(worst[2], rel=1e-6)
        assert f"at step {worst[3]}" in found[name].reason
        assert found[name].verdict == "consistent"


def test_a_long_step_of_a_narrow_network_refutes_the_lemmas(follow):
    criteria, _ = follow(DuFC(8, width=10, depth=2), lr=1.0, epochs=3, on=unit_rows(), batch=5, probe=Probe(5))
    found = {each.name: each for each in criteria.criteria}
    assert found["linearisation_remainder"].verdict == found["output_change"].verdict == "refuted"


def test_a_step_whose_change_is_rounding_is_left_out(follow, recorder):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 2))
    follow(
        network,
        lr=1e-9,
        epochs=2,
        on=TensorDataset(*(t.float() for t in (torch.randn(6, 5), torch.randn(6, 2)))),
        logger=recorder,
    )
    assert "theory/loss" in recorder.scalars
    assert "theory/linearisation_error" not in recorder.scalars


def test_in_float32_the_error_is_that_of_float64(follow, data, recorder):
    exact = by_hand(two_outputs(), data, 0.4, [1.0], 3)
    follow(two_outputs().float(), epochs=3, on=TensorDataset(*(t.float() for t in data.tensors)), logger=recorder)
    for t, step in enumerate(exact):
        linear = step["eta"] * step["G"] @ step["r"]
        error = np.linalg.norm(step["next"] - step["u"] + linear) / np.linalg.norm(linear)
        assert recorder.scalars["theory/linearisation_error"][t] == pytest.approx(error, rel=1e-2)


def test_the_figure_shows_the_shares_and_both_curves(tmp_path, follow):
    criteria, trainer = follow(logger=TensorBoardLogger(tmp_path), epochs=6)
    logged = EventAccumulator(trainer.logger.log_dir)
    logged.Reload()
    assert "theory/label_projection" in logged.Tags()["images"]
    projection = criteria.trackers["du"].projection
    above, below = plot_label_projection(projection.shares, projection.curve).axes
    for line in above.get_lines():
        assert float(line.get_ydata()[-1]) == pytest.approx(1.0)
    measured, predicted = (line.get_ydata() for line in below.get_lines())
    assert len(measured) == len(predicted) == 7
    assert measured[0] == pytest.approx(predicted[0], rel=1e-6)


def test_shares_are_those_of_the_labels_on_the_leading_eigenvectors(follow, data):
    network = two_outputs()
    start = by_hand(network, data, 0.4, [1.0], 1)[0]
    criteria, _ = follow(network)
    _, vectors = np.linalg.eigh(start["G"])
    y = data.tensors[1].flatten().numpy()
    for name, vector in (("labels y", y), ("error y - u(0)", start["r"])):
        shares = (vectors.T @ vector)[::-1] ** 2 / (vector @ vector)
        assert criteria.trackers["du"].projection.shares[name].tolist() == pytest.approx(
            shares.tolist(), rel=1e-3, abs=1e-6
        )


def test_the_run_is_bit_for_bit_the_same(make_trainer, make_regression, data):
    def run(callbacks):
        torch.manual_seed(0)
        module = make_regression(two_outputs().float(), lr=0.3)
        few = TensorDataset(*(each.float() for each in data.tensors))
        make_trainer(callbacks, max_epochs=6).fit(module, DataLoader(few, batch_size=6, shuffle=True))
        return module.losses, module.state_dict(), torch.get_rng_state()

    plain = run([])
    watched = run([criteria := ConvergenceCriteria("du", every_n_steps=1, probe=Probe(6, outputs="full"))])
    assert math.isfinite(criteria.trackers["du"].projection.curve[-1][2])
    assert plain[0] == watched[0]
    assert all(torch.equal(value, watched[1][name]) for name, value in plain[1].items())
    assert torch.equal(plain[2], watched[2])


def test_an_error_on_the_way_leaves_these_numbers_out_and_nothing_else(
    monkeypatch, lenient, make_trainer, make_regression, data
):
    from lightning_conv.callbacks.run.view import RunView

    def broken(*_):
        raise RuntimeError("no float64 here")

    monkeypatch.setattr(RunView, "exact_outputs", property(broken))
    criteria = ConvergenceCriteria("du", every_n_steps=1, probe=Probe(6, outputs="full"))
    trainer = make_trainer([criteria], max_epochs=2)
    with pytest.warns(UserWarning, match="the linearised error is left out at step 0: no float64 here"):
        trainer.fit(make_regression(two_outputs(), lr=0.1), DataLoader(data, batch_size=6))
    assert {"theory/loss", "theory/contraction", "theory/rate"} <= set(trainer.callback_metrics)
    assert not {"theory/linearisation_error", "theory/residual_predicted"} & set(trainer.callback_metrics)


def test_steps_that_were_not_seen_end_the_prediction():
    projection = LabelProjection()
    projection.begin(ntk_gram(nn.Linear(3, 1), torch.eye(3)), torch.ones(3), torch.ones(3), 1.0, 5)
    projection.measure(5, math.sqrt(3))
    projection.before_step(0.1)
    projection.measure(6, 1.0)
    assert math.isfinite(projection.curve[-1][2])
    projection.measure(8, 1.0)
    assert not projection.follows
    assert set(projection.quantities()) == {"residual"}
    assert LinearisedSteps().quantities() == {}


class Rounded(nn.Module):
    def forward(self, x):
        return x.float().to(x)


def test_steps_of_a_network_that_casts_are_not_compared_and_its_loss_has_the_noise_of_float32(follow, recorder):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), Rounded(), nn.Linear(12, 2)).double()
    criteria, _ = follow(network, logger=recorder)
    assert "theory/linearisation_error" not in recorder.scalars
    assert "theory/residual_predicted" in recorder.scalars
    assert [seen.noise for seen in criteria.history] == pytest.approx([1e-6] * len(criteria.history))
    network[2] = nn.Identity()
    criteria, _ = follow(network, logger=recorder)
    assert "theory/linearisation_error" in recorder.scalars
    assert {seen.noise for seen in criteria.history} == {1e-14}
