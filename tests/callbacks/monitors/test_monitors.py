"""The kernel monitors log the kernel of the right weights, to everyone, and leave the run alone."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv import kernel_drift, kernel_spectrum, ntk_gram
from lightning_conv.callbacks import ExpressivityGuard, KernelStability, LambdaMin, Probe
from lightning_conv.callbacks.run import probe_kernel

SCALARS = {
    "kernel/alignment",
    "kernel/condition_number",
    "kernel/decay_exponent",
    "kernel/degrees_of_freedom",
    "kernel/drift_floor",
    "kernel/effective_rank",
    "kernel/floor",
    "kernel/lambda_max",
    "kernel/lambda_min",
    "kernel/lambda_min_lower",
    "kernel/lambda_min_ratio",
    "kernel/lambda_min_ratio_lower",
    "kernel/lambda_min_ratio_upper",
    "kernel/lambda_min_upper",
    "kernel/relative_frobenius_change",
    "kernel/relative_spectral_change",
    "kernel/trace",
}
UNCHANGED = {"kernel/precision"}
REPEATED = {"convergence/kernel_change", "convergence/lambda_min", "kernel/spectral_change_over_lambda_min"}


class Weights(pl.Callback):
    """Keeps a copy of the module after every optimizer step."""

    def __init__(self):
        self.modules = {}

    def on_train_start(self, trainer, pl_module):
        self.modules[0] = self._copy(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.modules[trainer.global_step] = self._copy(pl_module)

    @staticmethod
    def _copy(pl_module):
        return copy.deepcopy(nn.Sequential(pl_module.trunk, pl_module.classifier))


def events(folder):
    accumulator = EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    )
    accumulator.Reload()
    return accumulator


def test_the_value_at_step_s_belongs_to_the_weights_after_s_steps(tmp_path, make_trainer, make_module, make_loader):
    weights, smallest, stability = Weights(), LambdaMin(every_n_steps=2), KernelStability(every_n_steps=2)
    trainer = make_trainer([weights, smallest, stability], max_epochs=2, logger=TensorBoardLogger(tmp_path))
    trainer.fit(make_module(), make_loader())
    logged = events(trainer.logger.log_dir)
    probe = smallest.state_dict()["inputs"]
    grams = {s: ntk_gram(m, probe, precision="certified", batch_norm="frozen") for s, m in weights.modules.items()}
    steps = [event.step for event in logged.Scalars("kernel/lambda_min")]
    assert steps == [0, 2, 4, 6]
    for event in logged.Scalars("kernel/lambda_min"):
        assert event.value == pytest.approx(kernel_spectrum(grams[event.step]).lambda_min.value, rel=0.1)
    for event in logged.Scalars("kernel/relative_frobenius_change"):
        expected = kernel_drift(grams[event.step], grams[0])
        assert event.value == pytest.approx(expected.relative_frobenius, rel=1e-3, abs=1e-4)
    lower, upper = (logged.Scalars(f"kernel/lambda_min_{end}") for end in ("lower", "upper"))
    for low, high in zip(lower, upper, strict=True):
        exact = kernel_spectrum(grams[low.step]).lambda_min.value
        assert low.value * (1 - 1e-6) <= exact <= high.value * (1 + 1e-6)


def test_the_event_file_holds_scalars_histogram_figures_and_layout(tmp_path, make_trainer, make_module, make_loader):
    trainer = make_trainer([LambdaMin(), KernelStability()], max_epochs=1, logger=TensorBoardLogger(tmp_path))
    trainer.fit(make_module(), make_loader())
    tags = events(trainer.logger.log_dir).Tags()
    assert set(tags["scalars"]) >= SCALARS
    assert "kernel/log10_eigenvalues" in tags["histograms"]
    assert {"kernel/spectrum", "kernel/spectrum_against_start", "kernel/per_layer"} <= set(tags["images"])
    texts = {"kernel/layers/text_summary", "kernel/step_size/text_summary"}
    assert {"custom_scalars__config__", *texts} <= set(tags["tensors"])
    assert set(tags["scalars"]) <= {
        *SCALARS,
        "convergence/log10_lambda_min",
        "train_loss",
        "epoch",
    }  # few tags: none for each layer


def test_every_logger_and_callback_metrics_get_the_scalars(tmp_path, make_trainer, make_module, make_loader):
    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    trainer = make_trainer([LambdaMin(), KernelStability()], max_epochs=1, logger=loggers)
    trainer.fit(make_module(), make_loader())
    for logger in loggers:
        header = (tmp_path / logger.name / "version_0" / "metrics.csv").read_text().splitlines()[0]
        assert set(header.split(",")) >= SCALARS | UNCHANGED
        assert not set(header.split(",")) & REPEATED
    assert set(trainer.callback_metrics) >= SCALARS | UNCHANGED | REPEATED


def test_early_stopping_can_monitor_a_kernel_value(make_trainer, make_module, make_loader):
    stop = EarlyStopping("kernel/alignment", mode="min", stopping_threshold=2.0, check_on_train_epoch_end=True)
    trainer = make_trainer([KernelStability(every_n_steps=1), stop], max_epochs=5)
    trainer.fit(make_module(), make_loader())
    assert trainer.current_epoch == 1


def test_equal_settings_share_one_probe_and_one_kernel_a_step(monkeypatch, make_trainer, make_module, make_loader):
    calls = []
    original = probe_kernel.resolved_spectrum
    monkeypatch.setattr(probe_kernel, "resolved_spectrum", lambda *a, **k: calls.append(1) or original(*a, **k))
    same = [LambdaMin(every_n_steps=3), KernelStability(every_n_steps=3)]
    make_trainer(same, max_epochs=2).fit(make_module(), make_loader())
    assert len(calls) == 3  # steps 0, 3, 6
    assert same[0]._restored["inputs"] is not None
    assert same[1]._restored["inputs"] is None
    calls.clear()
    different = [LambdaMin(every_n_steps=3), KernelStability(probe=17, every_n_steps=3)]
    make_trainer(different, max_epochs=2).fit(make_module(), make_loader())
    assert len(calls) == 6


def test_a_run_with_monitors_is_bit_for_bit_the_run_without(make_trainer, make_module, make_loader):
    def run(callbacks):
        module = make_module()
        make_trainer(callbacks, max_epochs=3).fit(module, make_loader())
        return module, torch.get_rng_state()

    plain, rng = run([])
    watched, watched_rng = run(
        [
            LambdaMin(every_n_steps=1, per_layer="spectra"),
            KernelStability(every_n_steps=2, probe=Probe(outputs="full", size=9)),
        ]
    )
    assert plain.losses == watched.losses
    assert torch.equal(rng, watched_rng)
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_an_error_before_the_first_step_is_raised_and_a_later_one_only_warned_of(
    lenient, monkeypatch, break_at_second_call, make_trainer, make_module, make_loader
):
    break_at_second_call(probe_kernel, "resolved_spectrum")
    module = make_module()
    with pytest.warns(UserWarning, match="no measurement at step 3: broken at a later step"):
        make_trainer([LambdaMin(every_n_steps=3)], max_epochs=2).fit(module, make_loader())
    assert len(module.losses) == 6

    def fails(*args, **kwargs):
        raise RuntimeError("broken from the start")

    monkeypatch.setattr(probe_kernel, "resolved_spectrum", fails)
    with pytest.raises(MisconfigurationException, match=r"broken from the start.*LambdaMin\(probe=Probe\("):
        make_trainer([LambdaMin()], max_epochs=1).fit(make_module(), make_loader())


class Viewed(nn.Module):
    """Flattens colour images by ``view``, which takes them channels first only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.view(len(x), -1))


def test_a_network_that_views_its_images_is_measured(make_trainer, make_regression, recorder):
    images, targets = torch.randn(12, 3, 4, 4), torch.randn(12, 2)
    module, data = make_regression(Viewed(), 0.01), DataLoader(TensorDataset(images, targets), batch_size=4)
    weights = copy.deepcopy(module)
    make_trainer([LambdaMin(every_n_steps=1)], max_epochs=1, logger=recorder).fit(module, data)
    found = recorder.scalars["kernel/lambda_min"]
    assert set(found) == {0, 1, 2, 3}
    assert found[0] == pytest.approx(
        float(torch.linalg.eigvalsh(ntk_gram(weights, images, precision="certified").matrix)[0]), rel=1e-3
    )


def test_a_network_that_diverged_is_warned_of_and_trains_on(lenient, make_trainer, make_module, make_loader):
    class Poison(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            with torch.no_grad():
                pl_module.classifier.weight[0, 0] = float("nan")

    module = make_module()
    with pytest.warns(UserWarning, match="no measurement at step"):
        make_trainer([Poison(), LambdaMin(every_n_steps=1)], max_epochs=1).fit(module, make_loader())
    assert len(module.losses) == 3


def test_without_a_logger_the_user_is_told_what_to_do(make_trainer, make_module, make_loader):
    with pytest.warns(UserWarning, match=r"no logger.*TensorBoardLogger"):
        make_trainer([LambdaMin()], max_epochs=1, limit_train_batches=1).fit(make_module(), make_loader())


def test_steps_are_counted_once_under_gradient_accumulation(tmp_path, make_trainer, make_module, make_loader):
    trainer = make_trainer(
        [LambdaMin(every_n_steps=1)], max_epochs=2, logger=TensorBoardLogger(tmp_path), accumulate_grad_batches=3
    )
    trainer.fit(make_module(), make_loader())
    assert [event.step for event in events(trainer.logger.log_dir).Scalars("kernel/lambda_min")] == [0, 1, 2]


def test_first_and_last_step_are_measured_however_small_the_budget(tmp_path, make_trainer, make_module, make_loader):
    trainer = make_trainer([LambdaMin(max_overhead=1e-9)], max_epochs=2, logger=TensorBoardLogger(tmp_path))
    trainer.fit(make_module(), make_loader())
    assert [event.step for event in events(trainer.logger.log_dir).Scalars("kernel/lambda_min")] == [0, 6]


@pytest.mark.parametrize("average", [EMAWeightAveraging, lambda: StochasticWeightAveraging(0.1, swa_epoch_start=1)])
@pytest.mark.parametrize("before", [True, False])
def test_averaged_weights_are_not_taken_for_those_of_the_last_step(
    average, before, make_trainer, make_module, make_loader
):
    monitor, averaging = KernelStability(every_n_steps=4), average()
    trainer = make_trainer([averaging, monitor] if before else [monitor, averaging], max_epochs=3)
    trainer.fit(make_module(dropout=0.0), make_loader())
    alone = KernelStability(every_n_steps=4)
    make_trainer([alone], max_epochs=3).fit(make_module(dropout=0.0), make_loader())
    assert alone.last_step == 9
    assert monitor.last_step == (8 if before else trainer.global_step)
    if isinstance(averaging, EMAWeightAveraging) and not before:  # the other one has its own learning rate
        assert monitor.drift == alone.drift


def test_a_resumed_run_keeps_probe_and_reference(tmp_path, make_trainer, make_module, make_loader):
    def monitors():
        return [KernelStability(every_n_steps=3, probe=20), LambdaMin(every_n_steps=3, probe=20)]

    whole = make_trainer(monitors(), max_epochs=4)
    whole.fit(make_module(dropout=0.0), make_loader())
    first = make_trainer(monitors(), max_epochs=2, checkpoint=True)
    first.fit(make_module(dropout=0.0), make_loader())
    # The order of the callbacks changes: whoever leads finds the stored probe.
    resumed = monitors()[::-1]
    second = make_trainer(resumed, max_epochs=4)
    second.fit(make_module(seed=5, dropout=0.0), make_loader(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    for name in SCALARS - {"kernel/precision"}:
        assert float(second.callback_metrics[name]) == float(whole.callback_metrics[name]), name


def test_a_callback_used_for_a_second_run_starts_anew(make_trainer, make_module, make_loader):
    monitor = KernelStability(every_n_steps=1, probe=10)
    make_trainer([monitor], max_epochs=2).fit(make_module(), make_loader())
    trainer = make_trainer([monitor], max_steps=0, max_epochs=1)
    trainer.fit(make_module(seed=3), make_loader())
    make_trainer([monitor], max_epochs=1, limit_train_batches=1).fit(make_module(seed=3), make_loader())
    assert monitor._reference_step == 0
    fresh = KernelStability(every_n_steps=1, probe=10)
    make_trainer([fresh], max_epochs=1, limit_train_batches=1).fit(make_module(seed=3), make_loader())
    assert monitor.drift == fresh.drift


def test_callbacks_pickle(make_trainer, make_module, make_loader):
    monitors = [LambdaMin(), KernelStability()]
    make_trainer(monitors, max_epochs=1, limit_train_batches=1).fit(make_module(), make_loader())
    for monitor in monitors:
        assert pickle.loads(pickle.dumps(monitor)).every_n_steps is None


def test_the_kernel_stays_over_the_same_parameters_when_the_guard_freezes_the_trunk(
    make_trainer, make_module, make_loader
):
    monitors = [LambdaMin(every_n_steps=3), KernelStability(every_n_steps=3)]
    module = make_module()
    trainer = make_trainer([ExpressivityGuard(switch_at=3), *monitors], max_epochs=3)
    trainer.fit(module, make_loader())
    assert trainer.callback_metrics["guard/phase"] == 2
    probe = monitors[0].state_dict()["inputs"]
    expected = ntk_gram(
        module, probe, precision="certified", batch_norm="frozen"
    )  # the module is handed back trainable
    assert set(monitors[0].state_dict()["parameters"]) == set(expected.parameters)
    assert float(trainer.callback_metrics["kernel/trace"]) == pytest.approx(expected.trace, rel=1e-5)


def test_the_last_picture_shows_the_last_step(tmp_path, make_trainer, make_module, make_loader):
    trainer = make_trainer([LambdaMin(every_n_steps=2)], max_epochs=2, logger=TensorBoardLogger(tmp_path))
    trainer.fit(make_module(), make_loader())
    logged = events(trainer.logger.log_dir)
    assert [image.step for image in logged.Images("kernel/spectrum")][-1] == 6
    assert [event.step for event in logged.Scalars("kernel/lambda_min")] == [0, 2, 4, 6]


@pytest.mark.slow
def test_a_compiled_module_is_measured_and_guarded_as_written(make_trainer, make_module, make_loader):
    def run(compiled):
        smallest, guard = LambdaMin(every_n_steps=3), ExpressivityGuard(switch_at=3)
        module = make_module(dropout=0.0)
        fitted = torch.compile(module, backend="eager") if compiled else module
        make_trainer([smallest, guard], max_epochs=2).fit(fitted, make_loader())
        return smallest.spectrum.lambda_min.value, guard.phase, guard.certificate.sigma_min.value

    assert run(compiled=True) == pytest.approx(run(compiled=False), rel=1e-4)
