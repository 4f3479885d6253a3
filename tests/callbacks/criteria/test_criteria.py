"""ConvergenceCriteria: it measures what it says, judges what applies, says what does not, and leaves the run alone."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_conv.callbacks import (
    ConvergenceCriteria,
    ConvergenceDiagnostics,
    ConvergenceReport,
    KernelStability,
    LambdaMin,
    Probe,
    RegularizedGradientClipping,
)
from lightning_conv.callbacks.criteria.papers.chatterjee.certificate import descent_certificate
from lightning_conv.callbacks.criteria.run_record import RunRecord
from lightning_conv.callbacks.run import probe_kernel
from lightning_conv.callbacks.run.callbacks import all_callbacks
from lightning_conv.callbacks.run.schedule import Schedule
from lightning_conv.theory.papers.chatterjee import certify_descent, positive_init_

STEP_TAGS = {"theory/contraction", "theory/curvature", "theory/descent_efficiency", "theory/rate"}
RAW_TAGS = {
    "theory/layer_distance_spectral", "theory/layer_distance_frobenius", "theory/layer_distance_spectral_relative",
    "theory/layer_distance_frobenius_relative", "theory/layer_stable_rank_min", "theory/layer_stable_rank_max",
    "theory/forward_drift", "theory/forward_drift_relative", "theory/log_phi",
    "theory/condition_number", "theory/stable_rank", "theory/effective_rank", "theory/rank_share", "theory/alignment_residual",
    "theory/hidden_norm_min", "theory/hidden_norm_max",
    "theory/least_radius", "theory/sigma_min", "theory/sigma_min_lower", "theory/sigma_max",
    "theory/separation", "theory/separation_by_label", "theory/close_pairs", "theory/near_orthogonality",
}  # fmt: skip
TAGS = {
    "theory/loss", "theory/gradient_norm", "theory/pl_ratio", "theory/pl_infimum", "theory/distance", "theory/path_length",
    "theory/refuted", *STEP_TAGS, *RAW_TAGS,
}  # fmt: skip


@pytest.fixture
def one_output(one_hot_digits) -> TensorDataset:
    inputs, targets = one_hot_digits.tensors
    return TensorDataset(inputs[:24].double(), (targets[:24, :5].sum(1, keepdim=True) * 2 - 1).double())


@pytest.fixture
def smooth(make_regression):
    """A smooth network for one output, float64."""

    def make(lr: float = 0.05, **options):
        torch.manual_seed(0)
        return make_regression(
            nn.Sequential(nn.Linear(64, 20), nn.Softplus(5), nn.Linear(20, 1)), lr=lr, **options
        ).double()

    return make


def verdicts(callback: ConvergenceCriteria) -> dict[str, str]:
    return {each.name: each.verdict for each in callback.criteria}


def whole(data: TensorDataset) -> DataLoader:
    return DataLoader(data, batch_size=len(data))


def test_on_plain_descent_every_number_is_that_of_the_run_by_hand(make_trainer, smooth, one_output, recorder):
    module = smooth()
    network, (inputs, targets) = copy.deepcopy(module.network), one_output.tensors
    criteria = ConvergenceCriteria(every_n_steps=1)
    make_trainer([criteria], max_epochs=6, logger=recorder).fit(module, whole(one_output))

    start = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
    path, ratios = 0.0, []
    for t in range(6):
        loss = nn.functional.mse_loss(network(inputs), targets)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        flat = torch.cat([g.flatten() for g in gradients])
        before = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
        ratios.append(float(flat @ flat) / float(loss.detach()))
        with torch.no_grad():
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter -= 0.05 * gradient
            after = float(nn.functional.mse_loss(network(inputs), targets))
        moved = torch.cat([p.detach().flatten() for p in network.parameters()]) - before
        expected = {
            "loss": float(loss.detach()), "gradient_norm": float(flat.norm()), "pl_ratio": ratios[-1], "pl_infimum": min(ratios),
            "distance": float((before - start).norm()), "path_length": path, "contraction": after / float(loss.detach()),
            "descent_efficiency": (float(loss.detach()) - after) / (0.05 * float(flat @ flat)),
            "curvature": 2 * (after - float(loss.detach()) - float(flat @ moved)) / float(moved @ moved),
        }  # fmt: skip
        for name, value in expected.items():
            assert recorder.scalars[f"theory/{name}"][t] == pytest.approx(value, rel=1e-5, abs=1e-12), (t, name)
        path += 0.05 * float(flat.norm())
    assert recorder.scalars["theory/path_length"][6] == pytest.approx(path, rel=1e-6)


def test_where_every_assumption_is_met_the_verdicts_are_about_the_theorems(make_trainer, smooth, one_output):
    criteria = ConvergenceCriteria(every_n_steps=1)
    make_trainer([criteria], max_epochs=8).fit(smooth(), whole(one_output))
    assert criteria.violations == []
    found = verdicts(criteria)
    for name in ("clipping_descent", "clipping_step_rate", "clipping_length"):
        assert found.pop(name) == "not applicable"  # there is no RegularizedGradientClipping
    assert {found.pop(name) for name in ("head_step", "head_bound", "phase_two_infimum")} == {"not applicable"}
    assert found.pop("separation") == "certified"
    for name in (
        "near_orthogonality", "hidden_norm_min", "hidden_norm_max", "sign_change_exponent", "active_fraction_start", "active_fraction",
    ):  # fmt: skip
        assert found.pop(name) == "not applicable"  # another network than the theorem's
    assert found.pop("expressivity_condition") == "refuted"  # 21 columns for 24 samples
    assert found.pop("alignment") == "refuted"
    assert found.pop("criterion_score_descent") == "undecided"  # this start is not a positive one
    assert found.pop("positive_start") == "not applicable"
    assert found.pop("independent_inputs") == "not applicable"  # it is asked for of a positive start
    assert found.pop("criterion_in_the_ball") == "undecided"  # of every radius no observation can tell
    assert found.pop("kernel_drift") == "undecided"  # it is above 1/4, with a lambda_0 that is not the theorem's
    assert found.pop("oymak_step") == "undecided"  # the Lipschitz constant of the Jacobian is not known
    names = (
        "descent_efficiency", "linear_rate", "path_length", "own_lambda_min_share", "step_contraction", "semi_smoothness",
        "misfit_and_distance",
    )  # fmt: skip
    assert found == dict.fromkeys(names, "consistent")


def test_a_positive_initialisation_is_certified_before_the_first_step_and_a_resumed_run_remembers(
    tmp_path, make_trainer, make_regression
):
    inputs = torch.eye(4, 6, dtype=torch.float64)
    data = TensorDataset(inputs, torch.tensor([[0.5], [-0.3], [0.2], [0.1]], dtype=torch.float64))

    def module(lr: float):
        network = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        positive_init_(network, A=100.0)
        return make_regression(network, lr=lr).double()

    certificate = certify_descent(module(1.0).network, inputs, data.tensors[1].flatten())
    assert certificate.holds

    def run(share, epochs, **kwargs):
        criteria = ConvergenceCriteria("chatterjee", every_n_steps=1)
        trainer = make_trainer([criteria], max_epochs=epochs, checkpoint=epochs == 2)
        trainer.fit(module(share * certificate.step), whole(data), **kwargs)
        return verdicts(criteria)

    assert run(0.9, 2)["criterion_score_descent"] == "certified"
    resumed = run(0.9, 3, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert resumed["criterion_score_descent"] == "certified"
    assert resumed["certified_step"] == "consistent"
    assert run(1.5, 1)["certified_step"] == "undecided"


def test_a_network_that_does_more_than_its_child_is_not_certified_as_its_child():
    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)).double()

        def forward(self, x):
            return self.net(x).abs()

    inputs, targets = torch.eye(4, 6, dtype=torch.float64), torch.full((4,), 0.2, dtype=torch.float64)
    network = Squared()
    positive_init_(network.net, A=100.0)  # outputs zero: at these weights the two agree
    child, whole_network = (descent_certificate(each, inputs, targets) for each in (network.net, network))
    assert child.criterion.verdict == "certified"
    assert child.step > 0
    assert [each.verdict for each in whole_network.criteria(1e-9)] == ["not applicable"]
    assert "Squared is not its child 'net' alone" in whole_network.criterion.reason


def test_a_step_that_is_too_long_is_refuted(make_trainer, smooth, one_output):
    criteria = ConvergenceCriteria("chatterjee", every_n_steps=1)
    trainer = make_trainer([criteria], max_epochs=12)
    trainer.fit(smooth(lr=0.35), whole(one_output))
    assert verdicts(criteria)["descent_efficiency"] == "refuted"
    assert float(trainer.callback_metrics["theory/refuted"]) >= 1


class Augmented(Dataset):
    """Digits with noise drawn anew at every reading."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        x, y = self.data[index]
        return x + 0.1 * torch.randn(x.shape), y


@pytest.mark.slow
def test_with_adam_augmentation_and_batchnorm_nothing_applies_the_reasons_are_told_and_the_numbers_are_logged(
    tmp_path, make_trainer, make_module, make_loader
):
    module = make_module()
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), lr=0.01)
    criteria = ConvergenceCriteria(every_n_steps=2)
    trainer = make_trainer([criteria], max_epochs=2, logger=TensorBoardLogger(tmp_path))
    trainer.fit(module, make_loader(Augmented(make_loader().dataset)))
    reasons = "; ".join(each.reason for each in criteria.violations)
    for said in (
        "Adam",
        "augmentation",
        "BatchNorm",
        "dropout",
        "mini-batches: 32 of 96",
        "CrossEntropyLoss",
        "no weights attain",
    ):
        assert said in reasons
    found = verdicts(criteria)
    assert set(found.values()) == {"not applicable"}
    assert all(each.reason for each in criteria.criteria)
    assert {each.reason.count("Adam") for each in criteria.criteria} == {0, 1}  # said once, if at all
    assert {each.reason.count("Adam") for each in criteria.criteria if each.name.startswith("criterion_")} == {1}
    logged = EventAccumulator(trainer.logger.log_dir)
    logged.Reload()
    tags = logged.Tags()
    expected = TAGS - {"theory/path_length", "theory/descent_efficiency"}  # of plain descent only
    assert trainer.callback_metrics.keys() >= expected  # what does not change is no curve in TensorBoard
    assert {tag for tag in tags["scalars"] if tag.startswith("theory/")} <= TAGS
    text = logged.Tensors("theory/criteria/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("Step 0")
    assert "\n- Not applicable: " in text  # not indented, or TensorBoard would show a block of code
    assert "theory/path" in tags["images"]


@pytest.mark.parametrize(
    ("options", "network", "batch", "assumption"),
    [
        ({"momentum": 0.9}, None, 24, "descent"),
        ({"weight_decay": 0.1}, None, 24, "descent"),
        ({}, nn.ReLU(), 24, "smooth"),
        ({}, nn.Dropout(0.5), 24, "no dropout"),
        ({}, nn.BatchNorm1d(20), 24, "no BatchNorm"),
        ({}, None, 8, "full batch"),
        ({"loss_fn": nn.L1Loss()}, None, 24, "squared loss"),
    ],
)  # fmt: skip
def test_each_violated_assumption_is_found_alone(
    make_trainer, make_regression, one_output, options, network, batch, assumption
):
    torch.manual_seed(0)
    middle = [nn.Softplus()] if network is None else [network]
    module = make_regression(nn.Sequential(nn.Linear(64, 20), *middle, nn.Linear(20, 1)), lr=0.01, **options).double()
    criteria = ConvergenceCriteria(every_n_steps=2)
    make_trainer([criteria], max_epochs=1).fit(module, DataLoader(one_output, batch_size=batch))
    assert [each.assumption for each in criteria.violations] == [assumption]


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z):
        return self.function(z)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            lambda z: torch.erfinv(torch.tanh(z) / 2),
            "not known to be smooth in its weights (unknown operator aten::erfinv in network.1)",
        ),
        (lambda z: z if float(z.sum()) < 1e9 else -z, "not known to be smooth in its weights (a value read by Python"),
        (lambda z: (z * z).sqrt(), "not known to be smooth in its weights (a square root of values"),
        (lambda z: torch.fmax(z, 0.1 * z), "not smooth in its weights (maximum in network.1)"),
    ],
)
def test_what_is_not_known_to_be_smooth_is_not_taken_for_smooth(
    make_trainer, make_regression, one_output, function, said
):
    network = nn.Sequential(nn.Linear(64, 20), Call(function), nn.Linear(20, 1))
    criteria = ConvergenceCriteria(every_n_steps=2)
    make_trainer([criteria], max_epochs=1).fit(make_regression(network, lr=0.01).double(), whole(one_output))
    assert [each.assumption for each in criteria.violations] == ["smooth"]
    assert said in criteria.violations[0].reason


def test_a_probe_that_is_a_part_of_the_set_is_said_to_be_one(make_trainer, smooth, one_output):
    criteria = ConvergenceCriteria(["du", "kawaguchi_sun"], probe=10, every_n_steps=1)
    make_trainer([criteria], max_epochs=1).fit(smooth(), whole(one_output))
    assert "10 of the 24 training samples" in criteria.violations[0].reason
    assert verdicts(criteria)["own_lambda_min_share"] == "not applicable"
    assert (
        verdicts(criteria)["expressivity_condition"] == "consistent"
    )  # rank 10 on ten samples proves nothing about 24


def test_clipped_descent_is_judged_by_its_own_theorem_and_its_path_is_that_of_the_clipped_steps(
    make_trainer, smooth, one_output
):
    clip, criteria = RegularizedGradientClipping(gamma=0.05, delta=0.1), ConvergenceCriteria(every_n_steps=1)
    make_trainer([clip, criteria], max_epochs=5).fit(smooth(), whole(one_output))
    assert clip.metrics["clipping/share_full"] < 1
    found = verdicts(criteria)
    assert {found[name] for name in ("clipping_descent", "clipping_step_rate", "clipping_length")} == {"consistent"}
    assert found["descent_efficiency"] == "not applicable"
    mu = min(seen.ratio for seen in criteria.history)
    shares = [seen.next_loss / seen.loss - (1 - seen.step_size * mu / 2) for seen in criteria.history[:-1]]
    rate = next(each for each in criteria.criteria if each.name == "clipping_step_rate")
    assert rate.measured - rate.bound == pytest.approx(max(shares), rel=1e-9)
    length = next(each for each in criteria.criteria if each.name == "clipping_length")
    assert length.bound == pytest.approx(4 * (criteria.history[0].loss / mu) ** 0.5, rel=1e-9)
    for seen in criteria.history[:-1]:
        assert seen.moved == pytest.approx(seen.step_size * seen.gradient_norm, rel=1e-6)
    assert criteria.history[-1].path_length == pytest.approx(
        sum(seen.moved for seen in criteria.history[:-1]), rel=1e-6
    )


def test_clipped_steps_that_are_too_long_are_refuted(make_trainer, smooth, one_output):
    clip, criteria = RegularizedGradientClipping(gamma=5.0, delta=0.9), ConvergenceCriteria("clipping", every_n_steps=1)
    make_trainer([clip, criteria], max_epochs=12).fit(smooth(lr=0.4), whole(one_output))
    assert verdicts(criteria)["clipping_descent"] == "refuted"
    assert verdicts(criteria)["clipping_step_rate"] == "refuted"


def test_unknown_names_are_refused_with_those_that_are_known():
    with pytest.raises(MisconfigurationException, match=r"\['nobody'\] is not known; choose from chatterjee, du"):
        ConvergenceCriteria(["du", "nobody"])
    with pytest.raises(MisconfigurationException, match="'auto' for all"):
        ConvergenceCriteria([])


def test_a_run_with_it_is_bit_for_bit_the_run_without(make_trainer, make_module, make_loader):
    def run(callbacks):
        module = make_module()
        make_trainer(callbacks, max_epochs=3).fit(module, make_loader(Augmented(make_loader().dataset)))
        return module, torch.get_rng_state()

    plain, rng = run([])
    watched, watched_rng = run([ConvergenceDiagnostics(every_n_steps=2)])
    assert plain.losses == watched.losses
    assert torch.equal(rng, watched_rng)
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_step_after_a_measurement_is_paid_for_too(monkeypatch, make_trainer, make_module, make_loader):
    paid: dict[int, float] = {}
    spend, observe = Schedule.spend, RunRecord.observe

    def noted(self, step, seconds):
        paid[step] = paid.get(step, 0.0) + seconds
        spend(self, step, seconds)

    def slow(self, trainer, kernel):
        time.sleep(0.05)
        return observe(self, trainer, kernel)

    monkeypatch.setattr(Schedule, "spend", noted)
    monkeypatch.setattr(RunRecord, "observe", slow)
    criteria = ConvergenceCriteria(every_n_steps=4)
    make_trainer([criteria], max_epochs=2).fit(make_module(), make_loader())
    assert [seen.step for seen in criteria.history] == [0, 4, 6]
    assert set(paid) == {0, 1, 4, 5, 6}
    assert min(paid[1], paid[5]) >= 0.05


@pytest.mark.parametrize(
    ("momentum", "affordable", "looked_at"), [(0.9, True, True), (0.9, False, False), (0.0, False, True)]
)
def test_a_step_that_is_no_plain_descent_is_looked_at_only_where_the_run_can_afford_it(
    monkeypatch, make_trainer, smooth, one_output, momentum, affordable, looked_at
):
    monkeypatch.setattr(Schedule, "allows_beside", lambda *_: affordable)
    criteria = ConvergenceCriteria(max_overhead=1.0)
    make_trainer([criteria], max_epochs=2).fit(smooth(lr=0.01, momentum=momentum), whole(one_output))
    assert criteria.history[0].step == 0
    assert math.isnan(criteria.history[0].next_loss) is not looked_at


def test_it_leaves_the_seed_of_the_environment_alone(monkeypatch, make_trainer, make_module, make_loader):
    module = make_module()
    monkeypatch.setenv("PL_GLOBAL_SEED", "77")
    make_trainer([ConvergenceCriteria(every_n_steps=3)], max_epochs=1).fit(module, make_loader())
    assert os.environ["PL_GLOBAL_SEED"] == "77"


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_verdicts_and_history(tmp_path, make_trainer, make_module, make_loader):
    def run(epochs, seed=0, checkpoint=False, **kwargs):
        criteria = ConvergenceCriteria(every_n_steps=3, probe=20)
        trainer = make_trainer([criteria], max_epochs=epochs, checkpoint=checkpoint)
        trainer.fit(make_module(seed=seed, dropout=0.0, momentum=0.0), make_loader(), **kwargs)
        return criteria, trainer

    straight, whole_trainer = run(4)
    run(2, checkpoint=True)
    resumed, trainer = run(4, seed=5, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert [repr(seen) for seen in resumed.history] == [repr(seen) for seen in straight.history]
    assert [repr(each) for each in resumed.criteria] == [repr(each) for each in straight.criteria]
    for name, value in whole_trainer.callback_metrics.items():
        if name.startswith("theory/"):
            assert float(trainer.callback_metrics[name]) == float(value), name


def test_it_shares_probe_and_kernel_with_the_monitors(monkeypatch, make_trainer, make_module, make_loader):
    calls = []
    original = probe_kernel.resolved_spectrum
    monkeypatch.setattr(probe_kernel, "resolved_spectrum", lambda *a, **k: calls.append(1) or original(*a, **k))
    same = [LambdaMin(every_n_steps=3), ConvergenceCriteria(every_n_steps=3), KernelStability(every_n_steps=3)]
    make_trainer(same, max_epochs=2).fit(make_module(), make_loader())
    assert len(calls) == 3  # steps 0, 3, 6


def test_a_measurement_that_fails_is_warned_of_and_the_run_goes_on(
    break_at_second_call, lenient, make_trainer, make_module, make_loader
):
    from lightning_conv.callbacks.run import moment as module_of_it

    break_at_second_call(module_of_it, "SampleLoss")
    module = make_module()
    with pytest.warns(UserWarning, match="broken at a later step"):
        make_trainer([ConvergenceCriteria(every_n_steps=3)], max_epochs=2).fit(module, make_loader())
    assert len(module.losses) == 6


def test_without_a_loss_the_user_is_told_and_the_rest_is_measured(make_trainer, make_module, make_loader):
    module = make_module()
    loss_fn = module.loss_fn
    module.loss_fn = None
    module.training_step = lambda batch, batch_idx: loss_fn(module(batch[0]), batch[1]).square()
    criteria = ConvergenceCriteria(every_n_steps=3)
    trainer = make_trainer([criteria], max_epochs=1)
    trainer.fit(module, make_loader())
    assert any("pass loss_fn=" in each.reason for each in criteria.violations)
    assert float(trainer.callback_metrics["theory/distance"]) > 0
    assert "theory/loss" not in trainer.callback_metrics
    given = ConvergenceCriteria(every_n_steps=3, loss_fn=loss_fn)
    trainer = make_trainer([given], max_epochs=1)
    trainer.fit(module, make_loader())
    assert "theory/loss" in trainer.callback_metrics


WRONG = [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.CrossEntropyLoss(weight=torch.ones(3))]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_loss_that_is_not_one_of_outputs_and_targets_does_not_stop_the_run(
    make_trainer, make_module, make_loader, wrong
):
    criteria = ConvergenceCriteria(every_n_steps=3, loss_fn=wrong)  # against ten outputs and class numbers
    trainer = make_trainer([criteria], max_epochs=1)
    trainer.fit(make_module(), make_loader())
    assert any("could not be evaluated on the probe" in each.reason for each in criteria.violations)
    assert "theory/distance" in trainer.callback_metrics


@pytest.mark.parametrize("other", WRONG)
def test_a_loss_for_something_else_is_not_taken_for_the_one_that_the_step_computes(
    make_trainer, make_module, make_loader, other
):
    module, reference = make_module(), make_module()
    module.loss_fn = other
    module.training_step = lambda batch, batch_idx: nn.functional.cross_entropy(module(batch[0]), batch[1])
    trainers = [make_trainer([ConvergenceCriteria(every_n_steps=3)], max_epochs=1) for _ in range(2)]
    for trainer, each in zip(trainers, (module, reference), strict=True):
        torch.manual_seed(0)
        trainer.fit(each, make_loader())
    assert len({float(trainer.callback_metrics["theory/loss"]) for trainer in trainers}) == 1


def test_the_report_lies_beside_the_logs_wherever_it_stands_in_the_list(
    tmp_path, make_trainer, make_module, make_loader
):
    criteria = ConvergenceCriteria(every_n_steps=3)
    trainer = make_trainer([ConvergenceReport(), criteria], max_epochs=2, logger=CSVLogger(tmp_path))
    trainer.fit(make_module(), make_loader())
    stored = json.loads((tmp_path / "lightning_logs" / "version_0" / "convergence.json").read_text())
    assert [each["verdict"] for each in stored["criteria"]] == [each.verdict for each in criteria.criteria]
    assert stored["facts"]["optimizer steps"] == 6
    assert stored["metrics"]["theory/loss"] == pytest.approx(criteria.history[-1].loss)
    page = (tmp_path / "lightning_logs" / "version_0" / "convergence.md").read_text()
    assert "SGD with momentum=0.9" in page
    assert "| theory/loss |" in page


def test_the_report_is_written_when_a_run_breaks_and_never_breaks_one(tmp_path, make_trainer, make_module, make_loader):
    module = make_module()
    step = module.training_step

    def breaks(batch, batch_idx):
        if len(module.losses) == 4:
            raise RuntimeError("out of luck")
        return step(batch, batch_idx)

    module.training_step = breaks
    report = ConvergenceReport(folder=str(tmp_path / "here"), name="page")
    with pytest.raises(RuntimeError, match="out of luck"):
        make_trainer([ConvergenceCriteria(every_n_steps=3), report], max_epochs=2).fit(module, make_loader())
    assert "failed (RuntimeError)" in (tmp_path / "here" / "page.md").read_text()
    (tmp_path / "file").write_text("")
    impossible = ConvergenceReport(folder=str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="nothing was written"):
        make_trainer([impossible], max_epochs=1).fit(make_module(), make_loader())


def test_the_report_of_a_kernel_monitor_alone_has_its_verdict(tmp_path, make_trainer, make_module, make_loader):
    report = ConvergenceReport(folder=str(tmp_path))
    make_trainer([report, KernelStability(every_n_steps=3)], max_epochs=1).fit(make_module(), make_loader())
    stored = json.loads((tmp_path / "convergence.json").read_text())
    assert [each["name"] for each in stored["criteria"]] == ["own_lambda_min_share"]


def test_diagnostics_bring_all_monitors_once_with_one_kernel_and_resume(
    tmp_path, monkeypatch, make_trainer, make_module, make_loader
):
    calls = []
    original = probe_kernel.resolved_spectrum
    monkeypatch.setattr(probe_kernel, "resolved_spectrum", lambda *a, **k: calls.append(1) or original(*a, **k))
    own = LambdaMin(every_n_steps=3)
    diagnostics = ConvergenceDiagnostics(every_n_steps=3)
    trainer = make_trainer([diagnostics, own], max_epochs=2, checkpoint=True, logger=CSVLogger(tmp_path))
    trainer.fit(make_module(), make_loader())
    assert len(calls) == 3
    kinds = [type(callback).__name__ for callback in all_callbacks(trainer)]
    assert kinds.count("LambdaMin") == 1
    assert own in trainer.callbacks
    assert {"KernelStability", "ConvergenceCriteria", "ConvergenceReport"} <= set(kinds)
    assert kinds[-1] == "ModelCheckpoint"
    assert (tmp_path / "lightning_logs" / "version_0" / "convergence.md").exists()
    assert {"kernel/lambda_min", "theory/loss", "convergence/kernel_change"} <= set(trainer.callback_metrics)
    again = ConvergenceDiagnostics(every_n_steps=3)
    second = make_trainer([again], max_epochs=3)
    second.fit(make_module(), make_loader(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    criteria = next(callback for callback in again.callbacks if isinstance(callback, ConvergenceCriteria))
    assert [seen.step for seen in criteria.history] == [0, 3, 6, 9]


def test_they_pickle_and_a_second_run_starts_anew(make_trainer, smooth, one_output):
    criteria = ConvergenceCriteria(every_n_steps=1)
    make_trainer([criteria], max_epochs=2).fit(smooth(), whole(one_output))
    assert [seen.step for seen in pickle.loads(pickle.dumps(criteria)).history] == [0, 1, 2]
    make_trainer([criteria], max_epochs=1).fit(smooth(), whole(one_output))
    assert [seen.step for seen in criteria.history] == [0, 1]
    pickle.dumps([ConvergenceDiagnostics(), ConvergenceReport()])


def test_many_outputs_take_the_full_kernel(make_trainer, make_regression, one_hot_digits):
    data = TensorDataset(*(tensor[:12] for tensor in one_hot_digits.tensors))

    def run(probe):
        torch.manual_seed(0)
        criteria = ConvergenceCriteria(["du", "oymak"], probe=probe, every_n_steps=1)
        module = make_regression(nn.Sequential(nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, 10)), lr=0.1)
        make_trainer([criteria], max_epochs=4).fit(module, whole(data))
        return criteria

    summed = run(Probe(12))
    assert set(verdicts(summed).values()) == {"not applicable"}
    assert all('Probe(outputs="full")' in each.reason for each in summed.criteria)
    full = verdicts(run(Probe(12, outputs="full")))
    assert full["own_lambda_min_share"] in ("consistent", "undecided")
    assert full["misfit_and_distance"] == "consistent"


def test_gradient_accumulation_is_no_plain_step_and_steps_are_counted_once(make_trainer, smooth, one_output, recorder):
    criteria = ConvergenceCriteria(every_n_steps=1)
    trainer = make_trainer([criteria], max_epochs=2, accumulate_grad_batches=3, logger=recorder)
    trainer.fit(smooth(), DataLoader(one_output, batch_size=8))
    assert [seen.step for seen in criteria.history] == [0, 1, 2]
    assert any("accumulate_grad_batches=3" in each.reason for each in criteria.violations)
    assert list(recorder.scalars["theory/contraction"]) == [0, 1]
    assert "theory/path_length" not in recorder.scalars


def diagnose(make_trainer, make_regression):
    pl.seed_everything(0, verbose=False)
    data = TensorDataset(torch.rand(32, 8).double(), torch.rand(32, 1).double())
    network = nn.Sequential(nn.Linear(8, 16), nn.Softplus(), nn.Linear(16, 1)).double()
    diagnostics = ConvergenceDiagnostics(every_n_steps=1)
    make_trainer([diagnostics], max_epochs=4).fit(make_regression(network, 0.01), DataLoader(data, batch_size=16))
    criteria = next(c for c in diagnostics.callbacks if isinstance(c, ConvergenceCriteria))
    return {
        "violations": [str(each) for each in criteria.violations],
        "steps": [(s.loss, s.gradient_norm, s.moved, s.path_length) for s in criteria.history[:-1]],
        "verdicts": {c.name: c.verdict for c in criteria.criteria},
    }


@pytest.mark.slow
def test_two_processes_measure_the_same_and_write_one_report(tmp_path, run_on_two_processes):
    found, other = run_on_two_processes(diagnose)
    assert found["violations"] == other["violations"] == []  # 16 samples on each of 2 ranks are all 32
    assert found["steps"] == other["steps"]
    assert len(found["steps"]) == 4
    # One rank's step is the gradient of its half; averaged, that of the probe, which is the whole set.
    for _, gradient_norm, moved, _ in found["steps"]:
        assert moved == pytest.approx(0.01 * gradient_norm, rel=1e-5)
    for verdicts in (found["verdicts"], other["verdicts"]):
        assert verdicts["descent_efficiency"] == verdicts["path_length"] == "consistent"
    assert (tmp_path / "convergence.json").exists()


def test_it_is_a_lightning_callback():
    assert isinstance(ConvergenceDiagnostics(), pl.Callback)
