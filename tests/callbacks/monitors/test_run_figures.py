"""The figures of a run show the run's own numbers, at the steps at which they were measured, also after a resume."""

from __future__ import annotations

import copy
import io

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv import kernel_spectrum, ntk_gram
from lightning_conv.callbacks import ConvergenceHealth, KernelStability, LambdaMin, Probe
from lightning_conv.callbacks.monitors.spectrum_scalars import counted_eigenvalues
from lightning_conv.kernels.layers import trace_shares
from lightning_conv.reporting.figures.spectrum import geometric_ranks

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 5, generator=GENERATOR)
Y = torch.stack([X[:, :2].prod(1), X[:, 2:].sum(1).sin()], 1)
CLASSES = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


class Net(pl.LightningModule):
    def __init__(self, loss=F.mse_loss, outputs=2):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs))
        with torch.no_grad():
            self.net[0].bias[:3] = -100.0  # three dead units
        self.loss = loss
        self.seen = {}

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.seen.setdefault(self.global_step, copy.deepcopy(self.net))
        return self.loss(self(batch[0]), batch[1])

    def on_train_end(self):
        self.seen[self.global_step] = copy.deepcopy(self.net)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(module, callbacks, tmp_path, targets=Y, steps=9, **kwargs):
    trainer = pl.Trainer(
        max_epochs=steps,
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path, name="", version=0),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(X, targets), batch_size=24), **kwargs)
    return trainer


def logged(folder):
    read = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "tensors": 0})
    read.Reload()
    return read


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    stability, smallest, health = KernelStability(24, 1), LambdaMin(24, 1), ConvergenceHealth(24, 1)
    module = Net()
    trainer = fit(module, [stability, smallest, health], folder)
    return module, stability, smallest, health, logged(trainer.logger.log_dir)


def test_figures_are_drawn_when_the_step_has_doubled_and_at_the_end_in_the_size_of_a_card(run):
    images = run[-1]
    for tag in ("kernel/spectrum", "kernel/spectrum_against_start", "kernel/per_layer", "health/layers_over_training"):
        assert [each.step for each in images.Images(tag)] == [0, 1, 2, 4, 8, 9]
    for tag in ("kernel/spectrum_over_training", "kernel/error_modes"):
        assert [each.step for each in images.Images(tag)] == [1, 2, 4, 8, 9]
    assert "kernel/by_class" not in images.Tags()["images"]  # a regression has no classes
    for tag in images.Tags()["images"]:
        for each in images.Images(tag):
            assert Image.open(io.BytesIO(each.encoded_image_string)).size == (350, 216)


def test_the_spectrum_over_training_is_that_of_the_weights_of_each_step(run):
    module, _, smallest, _, _ = run
    seen = smallest._over_training
    assert seen.steps == list(range(10))
    for step, row in zip(seen.steps, seen.rows, strict=True):
        values = kernel_spectrum(ntk_gram(module.seen[step], X, precision="certified")).eigenvalues.flip(0)
        expected = values[torch.tensor(geometric_ranks(24)) - 1]
        clear = expected > 10 * row[1]
        assert clear.sum() >= 3
        np.testing.assert_allclose(row[3:][clear], expected[clear], rtol=1e-2)


def test_the_error_is_that_of_the_outputs_in_the_basis_of_the_first_kernel(run):
    module, stability, _, _, _ = run
    error = stability._error
    vectors = torch.linalg.eigh(ntk_gram(module.seen[0], X, precision="certified").matrix)[1].flip(1)
    for step, row in zip(error._seen.steps, error._seen.rows, strict=True):
        residual = 2 * (module.seen[step](X) - Y).detach().double() / Y.numel()
        whole = float(residual.norm())
        assert float(row.norm()) == pytest.approx(whole, rel=1e-5)
        for (first, last), component in zip(error._groups, row.tolist(), strict=True):
            expected = float((vectors[:, first - 1 : last].T @ residual).norm())
            assert component == pytest.approx(expected, rel=1e-2, abs=1e-3 * whole)


def test_the_layers_are_those_of_the_run(run):
    module, _, _, health, _ = run
    layers = health._record.over_training
    assert [name.rpartition(".")[2] for name, _ in layers._groups] == ["0", "2", "4"]
    for step, row in zip(layers._seen.steps, layers._seen.rows.reshape(-1, 3, 3), strict=True):
        net = module.seen[step]
        shares = trace_shares(ntk_gram(net, X, precision="certified", per_layer=True))
        np.testing.assert_allclose(row[0], list(shares.values()), rtol=1e-4)
        net.zero_grad()
        F.mse_loss(net(X), Y).backward()
        norms = [torch.cat([p.grad.flatten() for p in net[k].parameters()]).norm().item() for k in (0, 2, 4)]
        np.testing.assert_allclose(row[1], norms, rtol=1e-4)
        dead = [float((net[: k + 2](X) == 0).all(0).double().mean()) for k in (0, 2)]
        np.testing.assert_allclose(row[2, :2], dead)
        assert dead[0] >= 3 / 16
        assert row[2, 2].isnan()  # behind the last layer there is no unit


def test_the_histogram_counts_every_eigenvalue(run):
    for event in run[-1].Histograms("kernel/log10_eigenvalues"):
        assert event.histogram_value.num == 24


def test_what_is_below_the_error_is_counted_at_it():
    spectrum = kernel_spectrum(torch.diag(torch.tensor([0.0, 0.0, 1.0, 100.0], dtype=torch.float64)))
    found = counted_eigenvalues(spectrum, "x")
    assert found.tolist() == pytest.approx([np.log10(spectrum.floor)] * 2 + [0.0, 2.0], abs=1e-6)
    nothing = kernel_spectrum(torch.zeros(3, 3, dtype=torch.float64))
    assert torch.isfinite(counted_eigenvalues(nothing, "x")).all()


def test_a_resumed_run_remembers_what_one_without_a_break_does(tmp_path):
    def monitors():
        return [KernelStability(24, 1), LambdaMin(24, 1), ConvergenceHealth(24, 1)]

    whole, first, second = monitors(), monitors(), monitors()
    fit(Net(), whole, tmp_path / "whole")
    trainer = fit(Net(), first, tmp_path / "first", steps=5)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = fit(Net(), second, tmp_path / "second", ckpt_path=tmp_path / "x.ckpt")
    histories = [lambda m: m[0]._error._seen, lambda m: m[1]._over_training, lambda m: m[2]._record.over_training._seen]
    for history in histories:
        assert history(second).steps == history(whole).steps == list(range(10))
        np.testing.assert_allclose(history(second).rows, history(whole).rows, rtol=1e-6, atol=1e-12)
    steps = [each.step for each in logged(resumed.logger.log_dir).Images("kernel/spectrum")]
    assert steps == [9]  # that of step 5 is there, and 10 is not reached


def test_classes_are_drawn_and_several_outputs_share_the_kernel(tmp_path):
    stability = KernelStability(24, 1)
    module = Net(F.cross_entropy, 3)
    trainer = fit(module, [stability], tmp_path, targets=CLASSES, steps=3)
    assert [each.step for each in logged(trainer.logger.log_dir).Images("kernel/by_class")] == [0, 1, 2, 3]
    slope = (module.seen[3](X).softmax(1) - F.one_hot(CLASSES, 3)) / 24
    assert float(stability._error._seen.rows[-1].norm()) == pytest.approx(float(slope.norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("probe", "why"),
    [(Probe(24, outputs="sum"), "the sum of 2 outputs"), (Probe(24, outputs="loss"), "that of the loss gradients")],
)
def test_where_the_error_has_no_components_a_text_says_why(tmp_path, probe, why):
    trainer = fit(Net(), [KernelStability(probe, 1)], tmp_path, steps=2)
    read = logged(trainer.logger.log_dir)
    group = "loss_kernel" if probe.outputs == "loss" else "kernel"
    text = read.Tensors(f"{group}/error_modes/text_summary")
    assert len(text) == 1
    assert why in text[0].tensor_proto.string_val[0].decode()
    assert f"{group}/error_modes" not in read.Tags()["images"]


def test_the_full_kernel_has_the_error_of_every_output(tmp_path):
    stability, module = KernelStability(Probe(24, outputs="full"), 1), Net()
    fit(module, [stability], tmp_path, steps=2)
    error = stability._error
    vectors = torch.linalg.eigh(ntk_gram(module.seen[0], X, outputs="full", precision="certified").matrix)[1].flip(1)
    residual = 2 * (module.seen[2](X) - Y).detach().double().flatten() / Y.numel()
    first, last = error._groups[0]
    expected = float((vectors[:, first - 1 : last].T @ residual).norm())
    assert float(error._seen.rows[-1, 0]) == pytest.approx(expected, rel=1e-2)


def test_an_unknown_loss_is_said(tmp_path):
    trainer = fit(
        Net(lambda u, y: (u - y).abs().sort(0).values.cumsum(0).mean()), [KernelStability(24, 1)], tmp_path, steps=2
    )
    read = logged(trainer.logger.log_dir)
    assert "kernel/error_modes/text_summary" in read.Tags()["tensors"]
