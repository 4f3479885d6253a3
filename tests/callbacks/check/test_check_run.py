"""``check_run`` on a module whose answers are known by construction, and at its limits."""

import copy
import json
import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import (
    ConvergenceDiagnostics,
    ExpressivityGuard,
    KernelStability,
    LambdaMin,
    Probe,
    check_run,
)
from lightning_conv.kernels.gram import ntk_gram


class Net(pl.LightningModule):
    def __init__(self, width=8, momentum=0.0, norm=False):
        super().__init__()
        layers = [nn.Linear(6, width), *([nn.BatchNorm1d(width)] if norm else []), nn.Tanh(), nn.Linear(width, 2)]
        self.net, self.momentum = nn.Sequential(*layers), momentum

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=self.momentum)


def loader(count=20, batch_size=5):
    made = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(count, 6, generator=made), torch.randn(count, 2, generator=made))
    return DataLoader(data, batch_size=batch_size, shuffle=True, generator=torch.Generator().manual_seed(1))


def trainer_with(*callbacks, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(
        **(quiet | {"max_epochs": 3, "accelerator": "cpu", "devices": 1} | options), callbacks=list(callbacks)
    )


def theorems(found):
    return {each.paper: each for each in found.networks[0].theorems}


def test_the_parts_are_those_of_the_module():
    found = check_run(trainer_with(), Net(), loader())
    (network,) = found.networks
    assert found.ok
    assert found.module == "Net"
    assert network.call_source == "observed"
    assert "self.net(...)" in network.call
    assert network.inputs == {"": (20, 6)}
    assert network.targets == "float32 (20, 2)"
    assert (network.samples, network.of, network.numbers) == (20, 20, tuple(range(20)))
    assert network.n_outputs == 2
    assert network.weights == 6 * 8 + 8 + 8 * 2 + 2
    assert network.loss_source == "observed"
    assert "MSELoss" in network.loss
    assert network.cost.epochs == 3
    assert network.cost.epoch > 0
    assert network.cost.first > 0
    assert (found.head.name, found.head.features, found.head.columns, found.head.rows) == ("net.2", 8, 9, 20)
    assert not found.head.is_wide_enough


def test_without_callbacks_those_of_the_diagnostics_measure():
    (network,) = check_run(trainer_with(), Net(), loader()).networks
    assert network.callbacks == ("KernelStability", "LambdaMin", "ConvergenceCriteria", "ConvergenceHealth")


def test_the_callbacks_of_the_run_are_those_that_measure():
    given = [LambdaMin(Probe(size=6, outputs="sum"), every_n_steps=2), KernelStability(Probe(size=4, outputs="trace"))]
    found = check_run(trainer_with(*given), Net(), loader())
    assert [(each.callbacks, each.samples, each.outputs) for each in found.networks] == [
        (("LambdaMin",), 6, "sum"),
        (("KernelStability",), 4, "trace"),
    ]
    assert found.networks[0].cost.every_n_steps == 2
    # Without ConvergenceCriteria in the run, the theorems are looked at all the same.
    assert "mini-batches" in " ".join(theorems(found)["oymak"].reasons)


@pytest.mark.parametrize(
    ("module", "data", "word"),
    [
        (lambda: Net(momentum=0.9), lambda: loader(batch_size=20), "momentum=0.9"),
        (Net, lambda: loader(batch_size=5), "mini-batches: 5 of 20"),
        (lambda: Net(norm=True), lambda: loader(batch_size=20), "BatchNorm"),
    ],
)
def test_a_theorem_names_what_speaks_against_it(module, data, word):
    found = check_run(trainer_with(), module(), data())
    assert not theorems(found)["oymak"].applies
    assert word in "; ".join(theorems(found)["oymak"].reasons)


def test_nothing_speaks_against_full_batch_descent_on_a_smooth_network():
    given = ConvergenceDiagnostics(Probe(size=20, outputs="full"))
    assert theorems(check_run(trainer_with(given), Net(), loader(batch_size=20)))["oymak"].applies
    trace = theorems(check_run(trainer_with(), Net(), loader(batch_size=20)))["oymak"]
    assert trace.reasons == ('needs a squared loss and the full kernel, Probe(outputs="full")',)


def test_the_bytes_are_those_of_the_plan():
    module = Net()
    found = check_run(
        trainer_with(ConvergenceDiagnostics(Probe(size=20, outputs="trace", precision="exact"))), module, loader()
    )
    gram = ntk_gram(module.net, loader().dataset.tensors[0], outputs="trace", precision="exact")
    cost = found.networks[0].cost
    assert cost.memory is not None
    assert cost.memory_allowed is not None
    assert gram.plan.result_bytes <= cost.memory <= cost.memory_allowed
    # The callbacks measure each layer's trace as well, which adds less than a matrix of the kernel for each.
    assert cost.memory == pytest.approx(gram.plan.bytes, abs=8 * 20 * 20 * 4 + 2**20)


def test_a_module_that_is_to_be_divided_among_processes_is_refused():
    with pytest.raises(MisconfigurationException, match="ModelParallelStrategy divides the module among processes"):
        check_run(trainer_with(strategy=ModelParallelStrategy()), Net(), loader())


def test_no_room_is_refused_with_the_line_to_write():
    found = check_run(trainer_with(ConvergenceDiagnostics(Probe(size=20, max_memory=1000))), Net(), loader())
    assert not found.ok
    assert not found.networks
    assert "Probe(size=10)" in found.refused[0]
    assert "max_memory" in found.refused[0]


def test_a_head_that_the_guard_cannot_take_counts_only_where_there_is_a_guard():
    class WithoutHead(Net):
        def __init__(self):
            super().__init__()
            self.net.append(nn.Tanh())

    without = check_run(trainer_with(), WithoutHead(), loader())
    assert without.head.refused
    assert without.ok
    asked = check_run(trainer_with(ExpressivityGuard()), WithoutHead(), loader())
    assert asked.head.asked
    assert "head" in asked.head.refused
    assert not asked.ok


def test_the_users_objects_stay_as_they_are(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    module, data, diagnostics = Net(norm=True), loader(), ConvergenceDiagnostics()
    trainer = trainer_with(diagnostics, default_root_dir=tmp_path)
    weights, state = copy.deepcopy(module.state_dict()), data.generator.get_state()
    torch.manual_seed(3)
    drawn = torch.get_rng_state()
    capsys.readouterr(), caplog.clear()  # what the trainer of this test says
    with caplog.at_level(logging.INFO):
        check_run(trainer, module, data)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in weights.items())
    assert torch.equal(state, data.generator.get_state())
    assert torch.equal(drawn, torch.get_rng_state())
    assert trainer.state.fn is None
    assert module._trainer is None
    assert all(each.last_step is None for each in diagnostics.callbacks if hasattr(each, "last_step"))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    assert caplog.text == ""


def test_a_module_that_was_trained_before_can_be_checked():
    module, data = Net(), loader()
    trainer = trainer_with()
    trainer.fit(module, data)
    assert check_run(trainer_with(), module, data).ok
    assert module.trainer is trainer


def test_callbacks_of_others_are_seen_and_not_called():
    class Writes(pl.Callback):
        called = 0

        def setup(self, trainer, pl_module, stage):
            Writes.called += 1

    found = check_run(trainer_with(Writes()), Net(), loader())
    assert Writes.called == 0
    assert "Writes" in found.notes[0]


def test_a_checkpoint_is_gone_on_from_and_left_as_it_is(tmp_path):
    trainer = trainer_with(
        ConvergenceDiagnostics(Probe(size=7, outputs="trace")), max_epochs=1, default_root_dir=tmp_path
    )
    module = Net()
    trainer.fit(module, loader())
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    before = path.read_bytes()
    found = check_run(trainer_with(ConvergenceDiagnostics()), Net(), loader(), ckpt_path=str(path))
    assert found.networks[0].samples == 7  # those of the checkpoint
    assert path.read_bytes() == before
    with pytest.raises(MisconfigurationException, match="before its first step"):
        check_run(trainer_with(ConvergenceDiagnostics(), max_epochs=1), Net(), loader(), ckpt_path=str(path))


def test_an_error_of_the_users_own_is_the_users():
    class Broken(Net):
        def configure_optimizers(self):
            raise KeyError("no such optimizer")

    with pytest.raises(KeyError, match="no such optimizer"):
        check_run(trainer_with(), Broken(), loader())


def test_what_cannot_be_copied_is_named():
    class Shares(Net):
        def __deepcopy__(self, memo):
            raise RuntimeError("a socket")

    with pytest.raises(MisconfigurationException, match=r"a copy of Shares .* \(RuntimeError: a socket\); give"):
        check_run(trainer_with(), Shares(), loader())


def test_all_of_it_is_json():
    found = check_run(trainer_with(), Net(), loader())
    read = json.loads(json.dumps(found.to_dict()))
    assert read["ok"] is True
    assert read["networks"][0]["numbers"] == list(range(20))
    assert read["networks"][0]["theorems"][0]["paper"] == found.networks[0].theorems[0].paper
