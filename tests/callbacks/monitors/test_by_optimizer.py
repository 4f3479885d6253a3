"""One network per optimizer, with its name in the tag: against a double loop over the calls, across checkpoints, failures and processes."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_conv.callbacks import (
    ConvergenceCriteria,
    ConvergenceDiagnostics,
    ConvergenceReport,
    KernelStability,
    LambdaMin,
    Probe,
)
from lightning_conv.callbacks.monitors.by_optimizer import monitors_of
from lightning_conv.callbacks.run import budget

N = 6
REAL, NOISE = (torch.randn(N, size, generator=torch.Generator().manual_seed(size)) for size in (4, 2))


def data(batch_size=3):
    return DataLoader(TensorDataset(REAL, NOISE), batch_size=batch_size)


class Gan(pl.LightningModule):
    """The generator's optimizer is the first one, and the critic's turn comes first."""

    kind, lr = torch.optim.SGD, 0.0

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(1)
        self.generator, self.critic = nn.Sequential(nn.Linear(2, 4), nn.Tanh()), nn.Linear(4, 1)
        self.count = 0

    def critic_loss(self, real, noise):
        fake = self.generator(noise).detach()
        return F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake)).mean()

    def generator_loss(self, real, noise):
        return F.softplus(-self.critic(self.generator(noise))).mean()

    def turn(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        self.turn(critic, self.critic_loss(*batch))
        self.turn(generator, self.generator_loss(*batch))

    def configure_optimizers(self):
        return [self.kind(part.parameters(), lr=self.lr) for part in (self.generator, self.critic)]


class NothingDetached(Gan):
    """The critic's loss reaches the generator, too, whose gradients are cleared before its own turn."""

    def critic_loss(self, real, noise):
        return F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(self.generator(noise))).mean()


class AsInPlainTorch(NothingDetached):
    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers(use_pl_optimizer=True)
        self.critic.zero_grad()
        F.softplus(-self.critic(batch[0])).mean().backward()
        F.softplus(self.critic(self.generator(batch[1]))).mean().backward()
        critic.step()
        self.generator.zero_grad()
        self.generator_loss(*batch).backward()
        generator.step()


class Toggled(NothingDetached):
    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        self.toggle_optimizer(critic)
        self.turn(critic, self.critic_loss(*batch))
        self.untoggle_optimizer(critic)
        with generator.toggle_model():
            self.manual_backward(self.generator_loss(*batch))
            self.clip_gradients(generator, 0.5, "norm")
            generator.step()
            generator.zero_grad()


class SwitchedByHand(NothingDetached):
    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        self.generator.requires_grad_(False)
        self.turn(critic, self.critic_loss(*batch))
        self.generator.requires_grad_(True)
        for each in self.critic.parameters():
            each.requires_grad = False
        self.turn(generator, self.generator_loss(*batch))
        for each in self.critic.parameters():
            each.requires_grad = True


class Closures(Gan):
    def training_step(self, batch, batch_idx):
        for optimizer, loss in zip(self.optimizers(), (self.generator_loss, self.critic_loss), strict=True):

            def closure(optimizer=optimizer, loss=loss):
                optimizer.zero_grad()
                value = loss(*batch)
                self.manual_backward(value)
                return value

            optimizer.step(closure)

    def configure_optimizers(self):
        return torch.optim.SGD(self.generator.parameters(), lr=0.0), torch.optim.LBFGS(self.critic.parameters(), lr=0.0)


class Kept(Gan):
    """Its optimizers are attributes of the module."""

    def configure_optimizers(self):
        self.of_generator, self.of_critic = super().configure_optimizers()
        return [self.of_generator, self.of_critic]

    def training_step(self, batch, batch_idx):
        self.turn(self.of_critic, self.critic_loss(*batch))
        self.turn(self.of_generator, self.generator_loss(*batch))


class Alternately(Gan):
    number = staticmethod(lambda module, batch_idx: batch_idx)

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        self.count += 1
        if self.number(self, batch_idx) % 2:
            self.turn(generator, self.generator_loss(*batch))
        else:
            self.turn(critic, self.critic_loss(*batch))


class ByStep(Alternately):
    number = staticmethod(lambda module, batch_idx: module.global_step)


class ByOwnCount(Alternately):
    number = staticmethod(lambda module, batch_idx: module.count)


class ManySteps(Gan):
    """As in a WGAN: the critic makes several steps, and its weights are clamped."""

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        for _ in range(3):
            self.turn(critic, self.critic_loss(*batch))
            for each in self.critic.parameters():
                each.data.clamp_(-9.0, 9.0)
        self.turn(generator, self.generator_loss(*batch))


GANS = [
    Gan, NothingDetached, AsInPlainTorch, Toggled, SwitchedByHand, Closures, Kept, Alternately, ByStep, ByOwnCount, ManySteps,
]  # fmt: skip


def double_loop(outputs, parameters):
    """Return sum_c <grad u_ic, grad u_jc>, one output at a time."""
    jacobian = []
    for u in outputs.flatten():
        grads = torch.autograd.grad(u, parameters, retain_graph=True, allow_unused=True)
        flat = [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters, strict=True)]
        jacobian.append(torch.cat(flat))
    rows = torch.stack(jacobian).reshape(len(outputs), -1, len(jacobian[0])).double()
    return torch.einsum("icp,jcp->ij", rows, rows)


def expected(module):
    """Return the kernels of critic and generator, by the calls written by hand."""
    convinced = module.critic(module.generator(NOISE))
    judged = torch.cat([module.critic(REAL), convinced], 1)
    return {
        "generator": double_loop(convinced, list(module.generator.parameters())),
        "critic": double_loop(judged, list(module.critic.parameters())),
    }


def matrix(monitor):
    return monitor.state_dict()["reference"]["matrix"].double()


@pytest.mark.parametrize("kind", GANS)
def test_each_kernel_is_that_of_the_optimizers_own_loss_over_its_own_parameters(make_trainer, kind):
    monitor, module = KernelStability(every_n_steps=1), kind()
    trainer = make_trainer([monitor], max_epochs=3)
    trainer.fit(module, data())
    assert list(monitor.by_optimizer) == ["generator", "critic"]
    for name, right in expected(module).items():
        assert torch.allclose(matrix(monitor.by_optimizer[name]), right, rtol=1e-4, atol=1e-5 * float(right.max())), (
            name
        )
        assert monitor.by_optimizer[name].failed == []
        # The rates are zero: the kernel of the last step is that of the first.
        assert float(trainer.callback_metrics[f"kernel/{name}/relative_frobenius_change"]) < 1e-5


class Shared(Gan):
    """Two optimizers on one loss, and a third one whose loss has no network behind it."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        generator, critic, temperature = self.optimizers()
        loss = self.generator_loss(*batch)
        for optimizer in (generator, critic):
            optimizer.zero_grad()
        self.manual_backward(loss)
        generator.step()
        critic.step()
        self.turn(temperature, self.temperature.exp() * loss.detach())

    def configure_optimizers(self):
        return [*super().configure_optimizers(), self.kind([self.temperature], lr=self.lr)]


def test_two_optimizers_share_a_loss_and_one_without_a_network_is_left_out_with_a_warning(make_trainer):
    monitor, other, module = KernelStability(every_n_steps=1), LambdaMin(every_n_steps=1), Shared()
    with pytest.warns(UserWarning, match="KernelStability: nothing is measured of temperature: the loss") as warned:
        make_trainer([monitor, other], max_epochs=1).fit(module, data())
    assert sum("nothing is measured" in str(each.message) for each in warned) == 1
    convinced = module.critic(module.generator(NOISE))
    for part in ("generator", "critic"):
        right = double_loop(convinced, list(getattr(module, part).parameters()))
        assert torch.allclose(matrix(monitor.by_optimizer[part]), right, rtol=1e-4, atol=1e-5 * float(right.max()))
    for each in (monitor, other):
        assert each.by_optimizer["temperature"].measured.startswith("nothing is measured of temperature: ")


def test_tags_have_the_name_of_the_optimizer_and_none_is_without(make_trainer, recorder):
    monitors = [KernelStability(every_n_steps=1), LambdaMin(every_n_steps=1), ConvergenceCriteria(every_n_steps=1)]
    trainer = make_trainer(monitors, max_epochs=1, logger=recorder)
    trainer.fit(Gan(), data())
    for group, tag in (
        ("kernel", "alignment"),
        ("kernel", "trace"),
        ("theory", "refuted"),
    ):
        for name in ("generator", "critic"):
            assert f"{group}/{name}/{tag}" in recorder.scalars
    parts = {tuple(tag.split("/")[:2]) for tag in (*recorder.scalars, *trainer.callback_metrics)}
    assert parts == {(group, name) for group in ("convergence", "kernel", "theory") for name in ("generator", "critic")}


class One(Gan):
    def training_step(self, batch, batch_idx):
        self.turn(self.optimizers(), self.generator_loss(*batch))

    def configure_optimizers(self):
        return super().configure_optimizers()[0]


def test_with_one_optimizer_tags_and_state_have_no_name(make_trainer):
    monitor = LambdaMin(every_n_steps=1)
    trainer = make_trainer([monitor], max_epochs=1)
    trainer.fit(One(), data())
    assert "kernel/lambda_min" in trainer.callback_metrics
    assert list(monitor.by_optimizer) == [""]
    assert not {"optimizer", "others"} & monitor.state_dict().keys()
    assert monitor.measured.startswith("the network is self.critic(...) as the training step calls it (observed)")


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (Gan, "critic", "the network of critic is self.critic(...) (2 calls) as the training step calls it (observed)"),
        (Gan, "generator", "the network of generator is self.critic(...) as the training step calls it (observed)"),
        (Alternately, "generator", "in batch 1, the first one in which this optimizer steps (observed)"),
        (ManySteps, "critic", "for the first of the 3 steps that this optimizer makes on a batch (observed)"),
        (AsInPlainTorch, "critic", "as the training step calls it, for the sum of 2 losses (observed)"),
    ],
)
def test_what_is_measured_is_said_for_each(make_trainer, kind, name, words):
    monitor = LambdaMin(every_n_steps=1)
    make_trainer([monitor], max_epochs=1).fit(kind(), data())
    assert words in monitor.by_optimizer[name].measured


class Accumulated(One):
    """Steps after more batches than are tried."""

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.generator_loss(*batch) / 20)
        self.count += 1
        if self.count % 20 == 0:
            self.optimizers().step()


def test_an_optimizer_whose_step_is_not_seen_is_measured_by_the_loss_that_reaches_it_and_that_is_said(make_trainer):
    monitor = LambdaMin(every_n_steps=1)
    make_trainer([monitor], max_epochs=1).fit(Accumulated(), data())
    assert "though no step of this optimizer was seen" in monitor.measured


def test_one_optimizer_can_be_chosen_and_its_tag_is_the_same(make_trainer):
    both, one, module = KernelStability(every_n_steps=1), KernelStability(Probe(optimizer="critic"), 1), Gan()
    make_trainer([both], max_epochs=1).fit(module, data())
    trainer = make_trainer([one], max_epochs=1)
    trainer.fit(Gan(), data())
    assert torch.equal(matrix(one), matrix(both.by_optimizer["critic"]))
    assert list(one.by_optimizer) == ["critic"]
    assert {tag.split("/")[1] for tag in trainer.callback_metrics} == {"critic"}


def test_an_unknown_optimizer_ends_the_run_before_it_begins_unless_it_is_to_warn(make_trainer):
    with pytest.raises(MisconfigurationException, match="it has 'generator', 'critic'"):
        make_trainer([LambdaMin(Probe(optimizer="discriminator"))], max_epochs=1).fit(Gan(), data())
    with pytest.warns(UserWarning, match=r"it has 'generator', 'critic'\. Nothing is measured"):
        make_trainer([LambdaMin(Probe(optimizer="discriminator"), on_error="warn")], max_epochs=1).fit(Gan(), data())


class Silent(Gan):
    def training_step(self, batch, batch_idx):
        return None


@pytest.mark.filterwarnings("ignore:KernelStability. nothing is measured of")
def test_a_run_in_which_no_optimizer_has_a_network_is_refused(make_trainer):
    with pytest.raises(MisconfigurationException, match=r"gives no loss.*KernelStability\(on_error="):
        make_trainer([KernelStability()], max_epochs=1).fit(Silent(), data())
    make_trainer([KernelStability(on_error="warn")], max_epochs=1).fit(Silent(), data())


class Normalised(Gan):
    """Its critic has a BatchNorm layer that is called for real and for generated samples."""

    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))

    def generator_loss(self, real, noise):
        return self.generator(noise).square().mean()


def test_an_optimizer_whose_network_cannot_be_measured_does_not_end_the_run_of_the_others(make_trainer):
    monitor, other = KernelStability(every_n_steps=1), LambdaMin(every_n_steps=1)
    with pytest.warns(UserWarning, match="KernelStability: nothing is measured of critic: .*BatchNorm"):
        make_trainer([monitor, other], max_epochs=1).fit(Normalised(), data())
    for each in (monitor, other):
        assert each.by_optimizer["critic"].measured.startswith("nothing is measured of critic: ")
        assert each.by_optimizer["generator"].measured.startswith("the network of generator is self.generator(...)")
    with pytest.raises(MisconfigurationException, match=r"KernelStability \(critic\): .*BatchNorm"):
        make_trainer([KernelStability(Probe(optimizer="critic"))], max_epochs=1).fit(Normalised(), data())


def test_a_given_network_is_one_network_over_all_parameters_as_before(make_trainer):
    probe = Probe(input_fn=lambda batch: batch[1], forward_fn=lambda module, z: module.critic(module.generator(z)))
    monitor, module = KernelStability(probe, every_n_steps=1), Gan()
    trainer = make_trainer([monitor], max_epochs=1)
    trainer.fit(module, data())
    right = double_loop(module.critic(module.generator(NOISE)), list(module.parameters()))
    assert torch.allclose(matrix(monitor), right, rtol=1e-4, atol=1e-5 * float(right.max()))
    assert "kernel/alignment" in trainer.callback_metrics


class Trained(Gan):
    kind, lr = torch.optim.Adam, 0.05


def test_a_resumed_run_goes_on_with_every_network(make_trainer, tmp_path):
    def monitors():
        return [KernelStability(every_n_steps=1), LambdaMin(every_n_steps=1), ConvergenceCriteria(every_n_steps=1)]

    whole = make_trainer(monitors(), max_epochs=4)
    whole.fit(Trained(), data())
    first = make_trainer(monitors(), max_epochs=2)
    first.fit(Trained(), data())
    first.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    resumed = monitors()[::-1]  # the order may have changed
    second = make_trainer(resumed, max_epochs=4)
    second.fit(Trained(), data(), ckpt_path=tmp_path / "half.ckpt")
    references = [matrix(each) for each in monitors_of(second, KernelStability)]
    assert [
        torch.equal(a, matrix(b)) for a, b in zip(references, monitors_of(first, KernelStability), strict=True)
    ] == [True] * 2
    assert second.callback_metrics.keys() == whole.callback_metrics.keys()
    for name, value in whole.callback_metrics.items():
        assert torch.allclose(second.callback_metrics[name], value, rtol=1e-3, atol=1e-6, equal_nan=True), name
    # A checkpoint holds the samples of each network once.
    states = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    held = [one["inputs"] is not None for state in states.values() for one in (state, *state["others"].values())]
    assert sum(held) == 2


def test_a_monitor_may_be_used_for_another_fit_and_for_a_run_of_one_optimizer(make_trainer):
    monitor = KernelStability(every_n_steps=1)
    make_trainer([monitor], max_epochs=1).fit(Trained(), data())
    before = matrix(monitor.by_optimizer["critic"])
    make_trainer([monitor], max_epochs=1).fit(Trained(), data())
    assert torch.equal(matrix(monitor.by_optimizer["critic"]), before)
    trainer = make_trainer([monitor], max_epochs=1)
    trainer.fit(One(), data())
    assert list(monitor.by_optimizer) == [""]
    assert "kernel/alignment" in trainer.callback_metrics
    make_trainer([monitor], max_epochs=1).fit(Trained(), data())
    assert list(monitor.by_optimizer) == ["generator", "critic"]


def test_a_state_of_another_network_is_not_gone_on_with(make_trainer, tmp_path):
    first = make_trainer([KernelStability(Probe(optimizer="critic"), 1)], max_epochs=1)
    first.fit(Trained(), data())
    first.save_checkpoint(tmp_path / "critic.ckpt")
    monitor = KernelStability(every_n_steps=1)
    make_trainer([monitor], max_epochs=2).fit(Trained(), data(), ckpt_path=tmp_path / "critic.ckpt")
    assert monitor.optimizer == "generator"
    assert monitor.state_dict()["parameters"] == ["generator.0.weight", "generator.0.bias"]


@pytest.mark.usefixtures("lenient")
def test_an_optimizer_that_fails_leaves_the_others_as_they_are(make_trainer, monkeypatch):
    record = LambdaMin.record

    def fails(self, trainer, gram, spectrum, step):
        if self.optimizer == "generator" and step:
            raise RuntimeError("broken")
        return record(self, trainer, gram, spectrum, step)

    monkeypatch.setattr(LambdaMin, "record", fails)
    monitor = LambdaMin(every_n_steps=1)
    trainer = make_trainer([monitor, ConvergenceReport()], max_epochs=1)
    with pytest.warns(UserWarning, match=r"LambdaMin \(generator\): no measurement at step 2: broken"):
        trainer.fit(Trained(), data())
    assert monitor.by_optimizer["generator"].failed
    assert monitor.by_optimizer["critic"].failed == []
    assert trainer.callback_metrics["kernel/generator/lambda_min"].isnan()
    assert trainer.callback_metrics["kernel/critic/lambda_min"].isfinite()


def test_the_report_has_the_verdicts_of_every_network(make_trainer, tmp_path):
    callbacks = [ConvergenceCriteria("kawaguchi_sun", every_n_steps=1), ConvergenceReport(str(tmp_path))]
    make_trainer(callbacks, max_epochs=1).fit(Trained(), data())
    page = json.loads((tmp_path / "convergence.json").read_text())
    names = {each["name"].split("/")[0] for each in page["criteria"]}
    assert names == {"generator", "critic"}
    assert "the network of critic is" in (tmp_path / "convergence.md").read_text()


def test_the_budget_is_one_for_all_of_them(make_trainer, monkeypatch):
    shares, fit_to_budget = [], budget.fit_to_budget

    def chosen(*args):
        made = fit_to_budget(*args)
        shares.append(made.budget)
        return made

    monkeypatch.setattr(budget, "fit_to_budget", chosen)
    monkeypatch.setattr(budget, "LEAST_SECONDS", 3.0)
    monitor = KernelStability(max_overhead=0.1)
    make_trainer([monitor], max_epochs=1).fit(Trained(), data())
    assert shares == [1.5, 1.5]
    assert [each._schedule.max_overhead for each in monitor.by_optimizer.values()] == [0.05, 0.05]
    make_trainer([monitor], max_epochs=1).fit(One(), data())
    assert monitor._schedule.max_overhead == 0.1
    assert shares[2:] == [3.0]


def test_everything_together_with_tensorboard_and_in_a_fast_dev_run(make_trainer, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer([ConvergenceDiagnostics()], max_epochs=2, logger=logger)
    trainer.fit(Trained(), data())
    assert {tag.split("/")[1] for tag in trainer.callback_metrics} == {"generator", "critic"}
    make_trainer([ConvergenceDiagnostics()], max_epochs=1, fast_dev_run=True).fit(Trained(), data())


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(REAL, NOISE, strict=True)


def test_the_first_batch_is_the_probe_of_all_networks_where_samples_cannot_be_read(make_trainer):
    monitor, module = KernelStability(every_n_steps=1), Gan()
    make_trainer([monitor], max_epochs=1).fit(module, DataLoader(Stream(), batch_size=N))
    for name, right in expected(module).items():
        assert torch.allclose(matrix(monitor.by_optimizer[name]), right, rtol=1e-4, atol=1e-5 * float(right.max()))


@pytest.mark.parametrize("kind", [Trained, SwitchedByHand, Toggled, Kept, ByOwnCount, ManySteps])
def test_the_run_is_left_alone(make_trainer, kind):
    def trained(callbacks):
        module = kind()
        module.lr = 0.05
        make_trainer(callbacks, max_epochs=3).fit(module, data())
        return {**module.state_dict(), "count": torch.tensor(module.count)}

    plain, watched = trained([]), trained([KernelStability(every_n_steps=1), LambdaMin(every_n_steps=1)])
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())


def on_two_processes(make_trainer, make_regression):
    monitor = LambdaMin(4, max_overhead=0.9)
    trainer = make_trainer([monitor], max_epochs=4, strategy="ddp_find_unused_parameters_true")
    trainer.fit(Trained(), data(batch_size=1))
    names = [f"kernel/{name}/{tag}" for name in ("generator", "critic") for tag in ("lambda_min", "trace")]
    steps = [each._last_step for each in monitor.by_optimizer.values()]
    return {"values": [float(trainer.callback_metrics[name]) for name in names], "steps": steps}


def test_ranks_measure_the_same_networks_at_the_same_steps(run_on_two_processes):
    found, other = run_on_two_processes(on_two_processes)
    assert found == other


class Notes(Toggled):
    """Notes its losses in a list before the outputs of the second optimizer are made."""

    def __init__(self):
        super().__init__()
        self.losses, self.last = [], {}

    def turn(self, optimizer, loss):
        self.losses.append(loss.item())
        self.last["loss"] = loss.item()
        super().turn(optimizer, loss)


def test_a_step_that_notes_its_losses_is_replayed_over_the_weights_of_now(make_trainer):
    monitor, module = KernelStability(every_n_steps=1), Notes()
    make_trainer([monitor], max_epochs=1).fit(module, data())
    for name, right in expected(module).items():
        assert torch.allclose(matrix(monitor.by_optimizer[name]), right, rtol=1e-4, atol=1e-5 * float(right.max())), (
            name
        )
    assert len(module.losses) == 2
