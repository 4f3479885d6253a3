"""``Probe(outputs="loss")``: against the gradients of single samples' losses by the run's own step, in float64, one after the other."""

from __future__ import annotations

import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from own_losses import (
    Contrastive,
    Discounted,
    Focal,
    Language,
    LaterUsual,
    Masked,
    Mlp,
    N,
    Pieces,
    Siamese,
    SummedQuantile,
    collated,
)
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from lightning_conv.callbacks import ConvergenceCriteria, ConvergenceDiagnostics, KernelStability, LambdaMin, Probe
from lightning_conv.callbacks.run import budget


class Classes(Mlp):
    def of(self, u, batch):
        return F.cross_entropy(u, batch[1])


class Words(Language):
    def of(self, u, batch):
        return F.cross_entropy(u.flatten(0, 1), batch[0][:, 1:].flatten())


def single(batch, i):
    return tree_map(lambda x: x[i : i + 1].double() if x.is_floating_point() else x[i : i + 1], batch)


def share(module, batch, i):
    """What the loss of sample i alone counts for in the loss of all: 1 / n of a mean, 1 of a sum, its tokens in those of all."""
    if isinstance(module, Masked):
        return float(batch[1][i].sum() / batch[1].sum())
    return 1.0 if isinstance(module, SummedQuantile) else 1 / N


def gradients(module, batch):
    """The gradient of each sample's share of the loss by the weights, by the training step on that sample alone, (n, P), float64."""
    rows = []
    for i in range(N):
        loss = module.training_step(single(batch, i), 0) * share(module, batch, i)
        parameters = [p for p in module.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters, strict=True)]
            )
        )
    return torch.stack(rows)


class Kernels(pl.Callback):
    """Keeps the kernel of each step, and the one by single samples."""

    def __init__(self, monitor):
        self.monitor, self.kept = monitor, []

    def on_train_batch_start(self, trainer, module, *_):
        self.look(trainer, module)

    def on_train_end(self, trainer, module):
        self.look(trainer, module)

    def look(self, trainer, module):
        kernel = self.monitor._kernel
        if kernel is None or kernel._measured is None or kernel._measured[0] != trainer.global_step:
            return
        copied = type(module)().double().eval()
        copied.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
        batch = collated(copied)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.kept.append(SimpleNamespace(gram=kernel._measured[1], rows=gradients(copied, batch), metrics=metrics))


def fit(make_trainer, module, *monitors, **options):
    look = Kernels(monitors[0])
    trainer = make_trainer([*monitors, look], **({"max_epochs": 1} | options))
    trainer.fit(module, DataLoader(module.samples(), batch_size=4))
    return trainer, look.kept


def probe(**options):
    return Probe(N, outputs="loss", **({"precision": "exact"} | options))


@pytest.mark.parametrize("kind", [Classes, Words, Masked, Discounted, Pieces, Siamese, Focal, SummedQuantile])
def test_the_kernel_is_the_double_loop_over_single_samples_of_the_step(make_trainer, kind):
    _, kept = fit(make_trainer, kind(), LambdaMin(probe(), every_n_steps=1))
    assert len(kept) == 4
    for each in kept:
        expected = each.rows @ each.rows.T
        assert each.gram.outputs == "cotangents"
        assert float((each.gram.matrix - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
        norm = float(each.rows.sum(0).norm())
        assert each.metrics["loss_kernel/gradient_norm"] == pytest.approx(
            norm, rel=1e-3, abs=1e-4 * float(expected.max()) ** 0.5
        )


def test_stability_holds_the_gradients_of_the_start(make_trainer):
    """s_0i^T K_ij(t) s_0j against its double loop: the loss's gradients of the start, the weights of now."""
    monitor = KernelStability(probe(), every_n_steps=1)
    _, kept = fit(make_trainer, Classes(), monitor)
    start = Classes().double().eval()
    batch = collated(start)
    u = start.net(batch[0].double()).detach().requires_grad_()
    (s,) = torch.autograd.grad(F.cross_entropy(u, batch[1]), u)

    def held(module):
        rows = []
        for i in range(N):
            grads = torch.autograd.grad((module.net(batch[0][i].double()) * s[i]).sum(), list(module.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
        return torch.stack(rows) @ torch.stack(rows).T

    reference, module = held(start), Classes()
    trainer = make_trainer([again := KernelStability(probe(), every_n_steps=1)], max_epochs=1)
    trainer.fit(module, DataLoader(module.samples(), batch_size=4))
    now = held(module.double().eval())
    expected = float((now - reference).norm() / reference.norm())
    assert again.drift.relative_frobenius == pytest.approx(expected, rel=1e-3)
    assert float(trainer.callback_metrics["loss_kernel/relative_frobenius_change"]) == pytest.approx(expected, rel=1e-3)
    # with the gradients of now it would be another number
    moved = kept[-1].gram.matrix
    assert abs(float((moved - reference).norm() / reference.norm()) - expected) > 0.01 * expected


def test_stability_of_frozen_weights_is_exactly_that_however_the_loss_moves(make_trainer):
    class Still(Classes):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    trainer, _ = fit(make_trainer, Still(), KernelStability(probe(), every_n_steps=1))
    assert float(trainer.callback_metrics["loss_kernel/relative_frobenius_change"]) == 0.0


def test_stability_goes_on_from_a_checkpoint(make_trainer, tmp_path):
    def run(epochs, path=None):
        monitor, module = KernelStability(probe(), every_n_steps=1), Classes()
        trainer = make_trainer([monitor], max_epochs=epochs)
        trainer.fit(module, DataLoader(module.samples(), batch_size=4), ckpt_path=path)
        return trainer, monitor

    whole, _ = run(2)
    first, _ = run(1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed, _ = run(2, tmp_path / "first.ckpt")
    name = "loss_kernel/relative_frobenius_change"
    assert float(resumed.callback_metrics[name]) == pytest.approx(float(whole.callback_metrics[name]), rel=1e-6)


def test_its_numbers_have_tags_of_their_own_and_it_says_which_kernel_it_is(make_trainer):
    shared = probe()
    monitors = [
        LambdaMin(shared, every_n_steps=1),
        KernelStability(shared, every_n_steps=1),
        ConvergenceCriteria(probe=shared, every_n_steps=1),
    ]
    trainer, _ = fit(make_trainer, Classes(), *monitors)
    tags = {name for name in trainer.callback_metrics if not name.startswith("theory/")}
    assert tags
    assert all(name.startswith("loss_kernel/") for name in tags)
    for monitor in monitors:
        assert "the kernel is that of the loss gradients" in monitor.measured
        assert "not the NTK" in monitor.measured


def test_criteria_about_the_ntk_do_not_take_it(make_trainer):
    class One(Mlp):
        def build(self):
            self.net = nn.Linear(4, 1)

        def of(self, u, batch):
            return F.mse_loss(u, batch[2][:, :1])

    criteria, stability = ConvergenceCriteria(probe=probe(), every_n_steps=1), KernelStability(probe(), every_n_steps=1)
    trainer = make_trainer([criteria, stability, size := LambdaMin(probe(), every_n_steps=1)], max_epochs=2)
    module = One()
    trainer.fit(module, DataLoader(module.samples(), batch_size=N))
    about = {each.name: each for each in criteria.criteria}
    for name in ("own_lambda_min_share", "kernel_drift", "oymak_step", "misfit_and_distance"):
        assert about[name].verdict == "not applicable"
        assert math.isnan(about[name].measured)
    assert "loss gradients" in about["kernel_drift"].reason
    assert [each.verdict for each in stability.criteria] == ["not applicable"]
    assert "the loss gradients" in size.remarks[0]
    assert not any(
        "step_size" in name or "contraction" in name for name in trainer.callback_metrics if "kernel" in name
    )


def test_a_loss_that_is_unknown_ends_the_run_before_its_first_step_with_the_cure(make_trainer):
    monitor = LambdaMin(probe(), every_n_steps=1)
    with pytest.raises(MisconfigurationException, match=r"couples the samples.*pass loss_fn= to the callback"):
        fit(make_trainer, Contrastive(), monitor)
    cured = LambdaMin(probe(), every_n_steps=1, loss_fn=nn.CrossEntropyLoss())
    _, kept = fit(make_trainer, Contrastive(), cured)
    assert kept[0].gram.outputs == "cotangents"


def test_a_given_loss_is_the_one_whose_gradients_are_taken(make_trainer):
    class Doubled(Classes):
        def of(self, u, batch):
            return F.cross_entropy(u, batch[1])

    given = LambdaMin(probe(), every_n_steps=1, loss_fn=lambda u, y: 3 * F.cross_entropy(u, y))
    plain = LambdaMin(probe(), every_n_steps=1)
    trainer = make_trainer([given], max_epochs=1)
    trainer.fit(module := Doubled(), DataLoader(module.samples(), batch_size=4))
    tripled = float(trainer.callback_metrics["loss_kernel/trace"])
    trainer = make_trainer([plain], max_epochs=1)
    trainer.fit(module := Doubled(), DataLoader(module.samples(), batch_size=4))
    assert tripled == pytest.approx(9 * float(trainer.callback_metrics["loss_kernel/trace"]), rel=1e-5)


@pytest.mark.usefixtures("lenient")
def test_after_a_change_of_the_loss_nothing_is_measured_and_the_run_goes_on(make_trainer):
    monitor = LambdaMin(probe(), every_n_steps=1)
    with pytest.warns(UserWarning, match="no measurement"):
        trainer, _ = fit(make_trainer, LaterUsual(), monitor, max_epochs=4)
    assert trainer.global_step == 12
    assert math.isnan(float(trainer.callback_metrics["loss_kernel/trace"]))


class Slow:
    """A clock on which a forward and a backward pass take so long."""

    def __init__(self, monkeypatch, seconds):
        monkeypatch.setattr(budget, "LEAST_SECONDS", 1.0)
        monkeypatch.setattr(budget, "PATIENT_SECONDS", 1e4)
        monkeypatch.setattr(budget, "time_pass", lambda trainer, measurement, samples: (seconds * samples, 48))


@pytest.mark.parametrize(("seconds", "chosen"), [(1e-6, "trace"), (3e-4, "projected"), (1e-1, "cotangents")])
def test_the_budget_takes_it_as_the_last_choice(make_trainer, monkeypatch, caplog, seconds, chosen):
    Slow(monkeypatch, seconds)
    monitor = LambdaMin()
    with caplog.at_level("INFO"):
        _, kept = fit(make_trainer, Discounted(), monitor)
    assert kept[0].gram.outputs == chosen
    said = [each.message for each in caplog.records if "measured is" in each.message]
    assert len(said) == (chosen != "trace")
    if chosen == "cotangents":
        assert "the kernel of the loss gradients" in said[0]
        assert 'Probe(size=12, outputs="trace") asks for all of it' in said[0]
        assert "the kernel is that of the loss gradients" in monitor.measured


def test_the_budget_does_not_take_it_where_the_loss_is_unknown_or_the_ntk_is_waited_for(make_trainer, monkeypatch):
    Slow(monkeypatch, 1e-1)
    _, kept = fit(make_trainer, Contrastive(), LambdaMin())
    assert kept[0].gram.outputs == "projected"
    _, kept = fit(
        make_trainer, Discounted(), LambdaMin(), EarlyStopping("kernel/lambda_min", check_finite=False, patience=99)
    )
    assert kept[0].gram.outputs == "projected"


def test_the_diagnostics_share_one_kernel_of_the_loss(make_trainer):
    diagnostics = ConvergenceDiagnostics(probe(), every_n_steps=1)
    trainer = make_trainer([diagnostics], max_epochs=1)
    module = Words()
    trainer.fit(module, DataLoader(module.samples(), batch_size=4))
    assert {"loss_kernel/trace", "loss_kernel/alignment"} <= set(trainer.callback_metrics)
    assert "kernel/trace" not in trainer.callback_metrics
