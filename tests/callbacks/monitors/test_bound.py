"""``LambdaMin(bound=...)``: a proven lower bound of lambda_min in a run, for the price of the kernel over a few parameters."""

from __future__ import annotations

import math
import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv import kernel_spectrum, lambda_min_bound, ntk_gram
from lightning_conv.callbacks import ConvergenceHealth, KernelStability, LambdaMin, Probe
from lightning_conv.callbacks.monitors import proven_bound
from lightning_conv.linalg.eigenvalues.bounded import Bounded

LAST = ("classifier.weight", "classifier.bias")


class Trained(pl.LightningModule):
    """A network that trains without chance, on inputs that are read as they are."""

    def __init__(self, width=48, net=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = net or nn.Sequential(
            nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 2)
        )

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([each for each in self.parameters() if each.requires_grad], lr=0.05)


def samples(n=16):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 6, generator=generator), torch.randn(n, 2, generator=generator))


def fit(make_trainer, monitors, module=None, data=None, epochs=2, **options):
    module = module or Trained()
    trainer = make_trainer(monitors, max_epochs=epochs, **options)
    trainer.fit(module, DataLoader(data or samples(), batch_size=8))
    return module, trainer


@pytest.mark.parametrize("bound", ["last block", "classifier.*", ["classifier.weight", "classifier.bias"]])
def test_what_is_logged_is_the_bound_of_the_core_and_below_the_whole_kernel(
    make_trainer, make_module, make_loader, recorder, bound
):
    module = make_module()
    monitor = LambdaMin(Probe(16), every_n_steps=3, bound=bound)
    trainer = make_trainer([monitor], max_epochs=2, logger=recorder)
    trainer.fit(module, make_loader())
    assert set(recorder.scalars) == {"kernel/lambda_min_bound", "train_loss", "epoch"}
    logged = recorder.scalars["kernel/lambda_min_bound"]
    assert list(logged) == [0, 3, 6]
    inputs = monitor.state_dict()["inputs"]
    found = lambda_min_bound(module, inputs, parameters=bound, batch_norm="frozen")
    assert found.parameters == monitor.proven.parameters == LAST
    assert logged[6] == pytest.approx(found.probe.lower, rel=1e-6)
    whole = kernel_spectrum(ntk_gram(module, inputs, precision="certified", batch_norm="frozen")).lambda_min
    assert 0 < logged[6] <= whole.upper
    assert float(trainer.callback_metrics["kernel/lambda_min_bound"]) <= monitor.proven.probe.lower
    assert "convergence/lambda_min" not in trainer.callback_metrics
    assert "the kernel is over 1,210 numbers in classifier.weight and classifier.bias" in monitor.measured


def test_the_run_is_bit_for_bit_the_same(make_trainer, make_module, make_loader):
    ends = []
    for monitors in ([], [LambdaMin(every_n_steps=1, bound="last block")], [LambdaMin(bound=["trunk.0.*"])]):
        module = make_module()
        trainer = make_trainer(monitors, max_epochs=2)
        trainer.fit(module, make_loader())
        ends.append(
            (module.state_dict(), trainer.optimizers[0].state_dict()["state"], torch.get_rng_state(), module.losses)
        )
    for other in ends[1:]:
        assert other[3] == ends[0][3]
        assert torch.equal(other[2], ends[0][2])
        for part in (0, 1):
            torch.testing.assert_close(other[part], ends[0][part], rtol=0, atol=0)


def test_beside_the_whole_kernel_the_bound_has_an_upper_end(make_trainer, recorder):
    probe = Probe(12, precision="certified")
    whole, bound = LambdaMin(probe, every_n_steps=2), LambdaMin(probe, every_n_steps=2, bound="last block")
    fit(make_trainer, [whole, bound], logger=recorder)
    assert bound.proven.probe.upper == whole.spectrum.lambda_min.upper
    assert bound.proven.training_set.upper == bound.proven.probe.upper
    assert len(recorder.scalars["kernel/lambda_min"]) == 3
    for step, lower in recorder.scalars["kernel/lambda_min_bound"].items():
        assert 0 < lower <= recorder.scalars["kernel/lambda_min_upper"][step]
    assert bound.spectrum is None


@pytest.mark.parametrize("other", [Probe(10, precision="certified"), Probe(12, outputs="full", precision="certified")])
def test_the_whole_kernel_of_other_samples_or_outputs_is_not_compared(make_trainer, other):
    bound = LambdaMin(Probe(12), every_n_steps=2, bound="last block")
    fit(make_trainer, [LambdaMin(other, every_n_steps=2), bound])
    assert bound.proven.probe.upper == math.inf


def test_a_whole_kernel_below_the_bound_is_a_failed_measurement(make_trainer, monkeypatch, lenient):
    low = Bounded(1e-9, 0.0, 1e-9, True, "wrong")
    monkeypatch.setattr("lightning_conv.callbacks.monitors.lambda_min.whole_lambda_min", lambda *_: low)
    monitor = LambdaMin(Probe(8), every_n_steps=2, bound="last block")
    with pytest.warns(UserWarning, match="it is of another kernel"):
        fit(make_trainer, [monitor])
    assert monitor.failed


def test_the_whole_training_set_is_named_only_where_the_probe_holds_it_as_it_is(make_trainer):
    part, every, augmented = (LambdaMin(Probe(n), every_n_steps=2, bound="last block") for n in (8, 16, 16))
    fit(make_trainer, [part])
    fit(make_trainer, [every])

    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, i):
            x, y = samples()[i]
            return x + torch.randn(6), y

    fit(make_trainer, [augmented], data=Noisy())
    assert [each.proven.on_training_set for each in (part, every, augmented)] == [False, True, False]
    assert every.proven.training_set == every.proven.probe
    assert part.proven.training_set.lower == 0
    assert "on the 8 samples of the probe" in part.finding.sentence
    assert "says nothing of other samples" in part.finding.sentence
    assert "on all training samples" in every.finding.sentence
    assert "on all training samples" not in augmented.finding.sentence


def test_the_text_names_the_parameters_and_what_is_proven(make_trainer, tmp_path):
    board = TensorBoardLogger(tmp_path)
    fit(make_trainer, [LambdaMin(Probe(8), every_n_steps=2, bound="last block")], logger=board)
    read = EventAccumulator(board.log_dir, size_guidance={"tensors": 0})
    read.Reload()
    text = read.Tensors("kernel/lambda_min_bound/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "on the 8 samples of the probe is at least" in text
    assert text.endswith("Parameters: `net.4.weight`, `net.4.bias`")
    assert "kernel/spectrum" not in read.Tags()["images"]


def test_where_nothing_is_proven_the_bound_is_zero_with_the_reason(make_trainer):
    data = samples()
    data.tensors[0][1] = data.tensors[0][0]  # two equal samples
    monitor = LambdaMin(Probe(16), every_n_steps=4, bound="last block")
    _, trainer = fit(make_trainer, [monitor], data=data)
    assert float(trainer.callback_metrics["kernel/lambda_min_bound"]) == 0
    assert monitor.finding is None
    assert "does not stand clear of its rounding error; name more parameters" in monitor._proven.words


def test_a_network_without_a_path_in_float64_trains_and_proves_nothing(make_trainer):
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 48), nn.Tanh(), nn.Linear(48, 2))

        def forward(self, x):
            return self.net(x @ torch.eye(6, dtype=torch.float32))

    monitor = LambdaMin(Probe(8), every_n_steps=2, bound="last block")
    _, trainer = fit(make_trainer, [monitor], module=Trained(net=Single()))
    assert float(trainer.callback_metrics["kernel/lambda_min_bound"]) == 0
    assert "is not certified: " in monitor._proven.words
    assert not monitor.failed


def test_the_loss_gradients_have_a_bound_of_their_own(make_trainer):
    monitor = LambdaMin(Probe(8, outputs="loss"), every_n_steps=2, bound="last block")
    module, trainer = fit(make_trainer, [monitor])
    assert not [name for name in trainer.callback_metrics if name.startswith("kernel/")]
    inputs, targets = monitor.state_dict()["inputs"], monitor.state_dict()["targets"]
    u = module.net(inputs).detach().requires_grad_()
    (s,) = torch.autograd.grad(F.mse_loss(u, targets), u)
    whole = kernel_spectrum(ntk_gram(module.net, inputs, cotangents=s, precision="certified")).lambda_min
    logged = float(trainer.callback_metrics["loss_kernel/lambda_min_bound"])
    assert 0 < logged <= whole.upper
    own = ntk_gram(module.net, inputs, cotangents=s, parameters="4.*", precision="certified")
    assert logged == pytest.approx(kernel_spectrum(own).lambda_min.value, rel=1e-5)
    assert "kernel of the loss gradients" in monitor.finding.sentence


def test_only_parameters_of_the_whole_kernel_take_part(make_trainer):
    module = Trained()
    module.net[4].requires_grad_(False)
    monitor = LambdaMin(Probe(8), every_n_steps=2, bound="last block")
    fit(make_trainer, [monitor], module=module)
    assert monitor.proven.parameters == ("net.2.weight", "net.2.bias")
    with pytest.raises(MisconfigurationException, match=re.escape("bound: 'net.4.*' matches only parameters")):
        fit(make_trainer, [LambdaMin(bound="net.4.*")], module=module)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bound": []}, "bound: [] names nothing"),
        ({"bound": 3}, "bound: got 3 (int); need 'last block'"),
        ({"bound": "Last block"}, "bound: 'Last block'; did you mean 'last block', in small letters?"),
        ({"bound": "last block", "probe": Probe(outputs="projected")}, 'Probe(outputs="projected") estimates'),
        ({"bound": "last block", "probe": Probe(precision="exact")}, 'needs precision="certified"'),
        ({"bound": "last block", "per_layer": "spectra"}, 'per_layer="spectra" has none to split'),
    ],
)
def test_what_proves_nothing_is_refused_at_once(settings, says):
    with pytest.raises(MisconfigurationException, match=re.escape(says)):
        LambdaMin(**settings)


def test_a_pattern_that_matches_nothing_ends_the_run_before_it_begins(make_trainer):
    with pytest.raises(
        MisconfigurationException, match=r"LambdaMin: bound: 'net.5.\*' matches none of the 6 .* closest is 'net"
    ):
        fit(make_trainer, [LambdaMin(bound="net.5.*")])
    with pytest.raises(MisconfigurationException, match="closest is"):
        fit(make_trainer, [LambdaMin(bound="lora")], fast_dev_run=True)
    _, trainer = fit(make_trainer, [LambdaMin(bound="net.4.*")], fast_dev_run=True)
    assert trainer.global_step == 1


def test_two_bounds_are_refused_since_they_have_one_tag(make_trainer):
    with pytest.raises(MisconfigurationException, match=re.escape("bound=['net.0.*', 'net.4.*']")):
        fit(make_trainer, [LambdaMin(bound="net.0.*"), LambdaMin(bound="net.4.*")])


def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(make_trainer, tmp_path, recorder):
    def monitors():
        return [LambdaMin(Probe(8), every_n_steps=1), LambdaMin(Probe(8), every_n_steps=1, bound="last block")]

    fit(make_trainer, monitors(), epochs=4, logger=recorder)
    uninterrupted = dict(recorder.scalars["kernel/lambda_min_bound"])
    recorder.scalars.clear()
    _, first = fit(make_trainer, monitors(), epochs=2, logger=recorder)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = monitors()[::-1]  # the order may have changed
    trainer = make_trainer(resumed, max_epochs=4, logger=recorder)
    trainer.fit(Trained(), DataLoader(samples(), batch_size=8), ckpt_path=tmp_path / "half.ckpt")
    assert recorder.scalars["kernel/lambda_min_bound"] == uninterrupted
    assert resumed[0].proven.parameters == ("net.4.weight", "net.4.bias")


def on_two_processes(make_trainer, make_regression):
    monitor = LambdaMin(Probe(8), bound="last block")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2))
    trainer = make_trainer([monitor], max_epochs=2)
    trainer.fit(make_regression(net, lr=0.05), DataLoader(samples(), batch_size=4))
    return {
        "bound": float(trainer.callback_metrics["kernel/lambda_min_bound"]),
        "parameters": list(monitor.proven.parameters),
        "step": monitor.last_step,
    }


def test_ranks_prove_the_same(run_on_two_processes):
    found, other = run_on_two_processes(on_two_processes)
    assert found == other
    assert found["bound"] > 0
    assert len(found["parameters"]) == 2


def test_every_optimizer_has_a_bound(make_trainer):
    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.one = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2))
            self.two = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2))

        def training_step(self, batch, batch_idx):
            for net, optimizer in zip((self.one, self.two), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(F.mse_loss(net(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.one, self.two)]

    monitor = LambdaMin(Probe(8), every_n_steps=4, bound="last block")
    _, trainer = fit(make_trainer, [monitor], module=Two())
    for name, each in monitor.by_optimizer.items():
        assert float(trainer.callback_metrics[f"kernel/{name}/lambda_min_bound"]) > 0
        assert each.proven.parameters == (f"{name}.2.weight", f"{name}.2.bias")


def test_health_says_what_is_proven(make_trainer, recorder):
    bound = LambdaMin(Probe(8), every_n_steps=2, bound="last block")
    health = ConvergenceHealth(Probe(8), every_n_steps=2)
    fit(make_trainer, [KernelStability(Probe(8), every_n_steps=2), bound, health], logger=recorder)
    (said,) = [each for each in health.findings if each.name == "lambda_min_bound"]
    assert said == bound.finding
    assert said.page == "docs/health.md#lambda-min"
    assert recorder.scalars["health/lambda_min_bound"][4] == pytest.approx(said.value)


def test_early_stopping_can_wait_for_the_bound(make_trainer):
    stopping = EarlyStopping("kernel/lambda_min_bound", mode="max", stopping_threshold=1e-6, patience=100)
    _, trainer = fit(make_trainer, [LambdaMin(Probe(8), every_n_steps=1, bound="last block"), stopping], epochs=5)
    assert stopping.stopped_epoch == 0
    assert trainer.current_epoch < 5


def test_what_a_bound_is_looked_at_for_is_looked_at_once_per_fit(make_trainer, monkeypatch):
    looked = []
    real = proven_bound.data_violations
    monkeypatch.setattr(proven_bound, "data_violations", lambda run: looked.append(run.step) or real(run))
    fit(make_trainer, [LambdaMin(Probe(8), every_n_steps=1, bound="last block")], epochs=3)
    assert looked == [0]
