"""The kernel layer by layer in a run: one figure and one table, a lower bound, and no scalar for each layer."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_conv import kernel_spectrum, ntk_gram
from lightning_conv.callbacks import KernelStability, LambdaMin, Probe
from lightning_conv.callbacks.run import probe_kernel
from lightning_conv.kernels.products.precision import PRECISIONS


def read(board):
    accumulator = EventAccumulator(board.log_dir, size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def fit(monitors, make_trainer, make_module, make_loader, **options):
    module = make_module(dropout=0.0)
    trainer = make_trainer(monitors, max_epochs=2, **options)
    trainer.fit(module, make_loader())
    return module, trainer


def test_spectra_of_the_layers_are_those_of_kernels_over_their_parameters(
    make_trainer, make_module, make_loader, recorder
):
    monitor = LambdaMin(16, every_n_steps=3, per_layer="spectra")
    module, trainer = fit([monitor], make_trainer, make_module, make_loader, logger=recorder)
    inputs = monitor.state_dict()["inputs"]
    alone = {}
    for layer in ("trunk.0", "trunk.1", "trunk.4", "classifier"):
        gram = ntk_gram(module, inputs, parameters=f"{layer}.*", precision="certified", batch_norm="frozen")
        alone[layer] = kernel_spectrum(gram).lambda_min.value
    best = max(alone.values())
    found = recorder.scalars["kernel/lambda_min_layers"]
    assert list(found) == [0, 3, 6]
    assert found[6] == pytest.approx(best, rel=0.1)
    whole = kernel_spectrum(ntk_gram(module, inputs, precision="certified", batch_norm="frozen")).lambda_min
    assert trainer.callback_metrics["kernel/lambda_min_lower"] <= whole.upper * (1 + 1e-6)
    assert whole.lower <= trainer.callback_metrics["kernel/lambda_min_upper"] * (1 + 1e-6)


def test_the_layers_raise_the_lower_bound_where_they_know_better(
    monkeypatch, make_trainer, make_module, make_loader, recorder
):
    """As if rounding had left nothing of the whole kernel's bound."""
    original = probe_kernel.resolved_spectrum

    def blurred(*args, **kwargs):
        gram, spectrum = original(*args, **kwargs)
        smallest = spectrum.lambda_min
        object.__setattr__(smallest, "lower", 0.0)
        return gram, spectrum

    monkeypatch.setattr(probe_kernel, "resolved_spectrum", blurred)
    fit([LambdaMin(8, every_n_steps=3)], make_trainer, make_module, make_loader, logger=recorder)
    assert set(recorder.scalars["kernel/lambda_min_lower"].values()) == {0.0}
    fit([LambdaMin(8, every_n_steps=3, per_layer="spectra")], make_trainer, make_module, make_loader, logger=recorder)
    for step, lower in recorder.scalars["kernel/lambda_min_lower"].items():
        assert lower >= 0.9 * recorder.scalars["kernel/lambda_min_layers"][step] > 0
        assert lower <= recorder.scalars["kernel/lambda_min"][step]


@pytest.mark.parametrize(("per_layer", "columns"), [("traces", 2), ("spectra", 4), (None, 0)])
def test_layers_go_into_one_figure_and_one_table(tmp_path, make_trainer, make_module, make_loader, per_layer, columns):
    board = TensorBoardLogger(tmp_path)
    monitor = LambdaMin(8, every_n_steps=3, per_layer=per_layer)
    fit([monitor], make_trainer, make_module, make_loader, logger=board)
    logged = read(board)
    tags = logged.Tags()
    assert ("kernel/per_layer" in tags["images"]) == ("kernel/layers/text_summary" in tags["tensors"]) == bool(columns)
    assert not [tag for tag in tags["scalars"] if "trunk" in tag or "classifier" in tag]
    assert ("kernel/lambda_min_layers" in tags["scalars"]) == (per_layer == "spectra")
    if columns:
        table = logged.Tensors("kernel/layers/text_summary")[-1].tensor_proto.string_val[0].decode()
        assert table.splitlines()[0].count("|") == columns + 1
        for layer in ("trunk.0", "trunk.1", "trunk.4", "classifier"):
            assert layer in table


def test_a_monitor_that_wants_layers_shares_its_kernel_with_one_that_does_not(
    monkeypatch, make_trainer, make_module, make_loader
):
    calls, original = [], probe_kernel.resolved_spectrum
    monkeypatch.setattr(
        probe_kernel, "resolved_spectrum", lambda *a, **k: calls.append(k["per_layer"]) or original(*a, **k)
    )
    monitors = [KernelStability(8, every_n_steps=3), LambdaMin(8, every_n_steps=3, per_layer="spectra")]
    _, trainer = fit(monitors, make_trainer, make_module, make_loader)
    assert calls == [True] * 3
    assert "kernel/lambda_min_layers" in trainer.callback_metrics
    calls.clear()
    fit([KernelStability(8, every_n_steps=3), LambdaMin(8, every_n_steps=3)], make_trainer, make_module, make_loader)
    assert calls == [False] * 3


def test_the_layers_of_a_checkpointed_kernel_are_left_behind(tmp_path, make_trainer, make_module, make_loader):
    """One matrix for each layer would multiply the size of a checkpoint."""
    monitors = [KernelStability(8, every_n_steps=3), LambdaMin(8, every_n_steps=3, per_layer="spectra")]
    fit(monitors, make_trainer, make_module, make_loader, checkpoint=True)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["KernelStability"]
    assert "layer_matrices" not in state["reference"]
    assert "plan" not in state["reference"]
    assert set(state["reference"]["layer_traces"]) == {"trunk.0", "trunk.1", "trunk.4", "classifier"}


def test_another_kind_of_layers_is_refused():
    with pytest.raises(MisconfigurationException, match="per_layer: 'matrices'"):
        LambdaMin(per_layer="matrices")


@pytest.mark.parametrize("outputs", [10, 20])
def test_probes_of_projected_outputs_say_how_far_off_they_may_be(make_trainer, make_module, make_loader, outputs):
    module = make_module()
    module.classifier = torch.nn.Linear(120, outputs)
    trainer = make_trainer([LambdaMin(Probe(8, outputs="projected"))], max_epochs=1)
    trainer.fit(module, make_loader())
    # Of no more outputs than the 16 sign vectors the sum itself is taken.
    assert (trainer.callback_metrics["kernel/projection_error"] > 0) == (outputs > 16)


def test_fewer_sign_vectors_make_a_projected_probe_of_few_outputs(make_trainer, make_module, make_loader):
    module = make_module()
    probe = Probe(8, outputs="projected", projections=3, max_memory=1e9)
    monitor = LambdaMin(probe)
    trainer = make_trainer([monitor], max_epochs=1)
    trainer.fit(module, make_loader())
    names, inputs = monitor.state_dict()["parameters"], monitor.state_dict()["inputs"]
    precision = PRECISIONS[int(trainer.callback_metrics["kernel/precision"])]
    gram = ntk_gram(
        module, inputs, outputs="projected", projections=3, parameters=names, precision=precision, batch_norm="frozen"
    )
    assert trainer.callback_metrics["kernel/projection_error"] == pytest.approx(gram.projection_error, rel=1e-6)
    assert trainer.callback_metrics["kernel/trace"] == pytest.approx(gram.trace, rel=1e-6)
    assert gram.projection_error > 0
