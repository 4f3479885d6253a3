"""The recipe `lora`: pre-training that is kept and continued, fine-tuning of the adapters alone, diagnostics over them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, seed_everything
from torch.utils.data import TensorDataset

from lightning_conv.callbacks import ConvergenceDiagnostics, KernelStability, LambdaMin
from lightning_conv.callbacks.run.callbacks import all_callbacks
from lightning_conv.recipes import GPT, LanguageDataModule, LoRAFineTuning
from lightning_conv.recipes.pretraining import pretrain, pretrained_path, read_weights, rows_of, sizes_of

TINY = {"width": 8, "depth": 1, "heads": 2, "rank": 2, "pretrain_steps": 3, "pretrain_batch_size": 4}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data():
    return LanguageDataModule(length=16, batch_size=8, n_train=32, n_test=8)


def gpt():
    torch.manual_seed(0)
    return GPT(256, 8, width=8, depth=1, heads=2)


def samples():
    rows = torch.randint(256, (40, 9), generator=torch.Generator().manual_seed(1))
    return TensorDataset(rows[:, :-1], rows[:, 1:])


class Killed(Exception):
    pass


def test_a_killed_pre_training_ends_in_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_conv.recipes.pretraining.SAVED_EVERY", 5)
    options = {"steps": 20, "batch_size": 8, "lr": 0.01}
    whole = gpt()
    loss = pretrain(whole, samples(), tmp_path / "whole.pt", **options)

    def stop(share):
        if share >= 0.6:
            raise Killed

    with pytest.raises(Killed):
        pretrain(gpt(), samples(), tmp_path / "parts.pt", **options, report=stop)
    assert (tmp_path / "parts.unfinished").is_file()
    torch.manual_seed(5)
    other = GPT(256, 8, width=8, depth=1, heads=2)  # its own weights do not matter
    steps = []
    assert pretrain(other, samples(), tmp_path / "parts.pt", **options, report=steps.append) == loss
    assert len(steps) == 10  # from step 10 on, where it was saved last
    assert not (tmp_path / "parts.unfinished").exists()
    for name, each in read_weights(tmp_path / "whole.pt").items():
        assert torch.equal(each, read_weights(tmp_path / "parts.pt")[name])
        assert torch.equal(each, whole.state_dict()[name])


def test_pre_training_lowers_the_loss_on_text_that_can_be_predicted(tmp_path):
    rows = (torch.arange(9) + torch.arange(40)[:, None]) % 7
    found = pretrain(
        gpt(), TensorDataset(rows[:, :-1], rows[:, 1:]), tmp_path / "a.pt", steps=80, batch_size=8, lr=0.02
    )
    assert found < 1.0 < torch.log(torch.tensor(256.0))


def test_every_sample_is_taken_once_per_epoch():
    taken = torch.cat([rows_of(40, 8, step, seed=3) for step in range(5)])
    assert sorted(taken.tolist()) == list(range(40))
    again = torch.cat([rows_of(40, 8, step, seed=3) for step in range(5, 10)])
    assert sorted(again.tolist()) == list(range(40))
    assert not torch.equal(taken, again)


def test_the_file_depends_on_every_setting():
    names = {pretrained_path("runs", settings).name for settings in ({"a": 1}, {"a": 2}, {"a": 1, "b": 0})}
    assert len(names) == 3
    assert pretrained_path("runs", {"a": 1, "b": 2}) == pretrained_path("runs", {"b": 2, "a": 1})


def test_a_fit_pre_trains_once_and_trains_the_adapters_alone(data, quiet_trainer):
    module = LoRAFineTuning(**TINY, diagnostics=False)
    seed_everything(0)
    state = torch.get_rng_state()
    quiet_trainer(max_epochs=1).fit(module, data)
    (kept,) = module.pretrained_file.parent.iterdir()
    assert kept == module.pretrained_file
    weights = read_weights(kept)
    trained = {name: each for name, each in module.net.state_dict().items() if "lora_" not in name}
    assert trained.keys() == weights.keys()
    assert all(torch.equal(each, weights[name]) for name, each in trained.items())
    assert any(bool(each.any()) for name, each in module.net.named_parameters() if name.endswith("lora_B"))
    written = kept.stat().st_mtime_ns
    again = LoRAFineTuning(**TINY, diagnostics=False)
    torch.set_rng_state(state)
    quiet_trainer(max_epochs=1).fit(again, data)
    assert kept.stat().st_mtime_ns == written
    # Whether the weights were there or had to be made, the run is the same.
    for name, each in module.net.state_dict().items():
        assert torch.equal(each, again.net.state_dict()[name])


def test_the_validation_loss_is_the_mean_cross_entropy_in_nats(data, quiet_trainer):
    module = LoRAFineTuning(**TINY, diagnostics=False)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, data)
    found = trainer.validate(module, data, verbose=False)[0]
    x, y = data.splits.test.tensors
    with torch.no_grad():
        logits = module(x)
    assert found["val_loss"] == pytest.approx(float(F.cross_entropy(logits.transpose(1, 2), y)), rel=1e-5)
    assert found["val_acc"] == pytest.approx(float((logits.argmax(2) == y).double().mean()), rel=1e-5)


def test_own_weights_bring_their_sizes(tmp_path, data, quiet_trainer):
    torch.manual_seed(2)
    own = GPT(256, 20, width=12, depth=2, heads=2)
    for path, content in (
        ("plain.pt", own.state_dict()),
        ("ckpt.pt", {"state_dict": {f"net.{k}": v for k, v in own.state_dict().items()}}),
    ):
        torch.save(content, path)
        module = LoRAFineTuning(pretrained=path, heads=2, rank=2, diagnostics=False)
        quiet_trainer(max_steps=1).fit(module, data)
        assert (module.hparams["width"], module.hparams["depth"], module.hparams["positions"]) == (12, 2, 20)
        assert torch.equal(module.net.wte.weight, own.wte.weight)
        assert not (tmp_path / "runs").exists()
    assert sizes_of(own.state_dict()) == {"vocabulary": 256, "positions": 20, "width": 12, "depth": 2}


def test_a_checkpoint_needs_neither_data_nor_pre_trained_weights(data, quiet_trainer, tmp_path):
    module = LoRAFineTuning(**TINY, diagnostics=False)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    module.pretrained_file.unlink()
    again = LoRAFineTuning.load_from_checkpoint(tmp_path / "run.ckpt")
    x = data.splits.test.tensors[0]
    with torch.no_grad():
        assert torch.equal(again.eval()(x), module.eval()(x))
    quiet_trainer().test(again, data, verbose=False)
    assert not module.pretrained_file.exists()


def test_the_diagnostics_are_over_the_adapters_and_say_what_they_measure(data, quiet_trainer):
    module, seen = LoRAFineTuning(**TINY, probe_size=4, measure_every=2), []

    class Look(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(
                [each.kernel for each in all_callbacks(trainer) if isinstance(each, KernelStability | LambdaMin)]
            )

    trainer = quiet_trainer(max_epochs=1, callbacks=[Look()])
    trainer.fit(module, data)
    (diagnostics,) = [each for each in trainer.callbacks if isinstance(each, ConvergenceDiagnostics)]
    adapters = {f"net.{name}" for name, _ in module.net.named_parameters() if "lora_" in name}
    assert len(seen[-1]) == 2
    for kernel in seen[-1]:
        assert {*kernel.parameters} == adapters
        assert kernel.plan.reading.general == {}  # also read at the start, where half of the gradients are zero
    assert not any(monitor.failures.words for monitor in diagnostics.callbacks[:4])
    assert "loss_kernel/relative_frobenius_change" in trainer.callback_metrics


def test_a_callback_of_the_user_takes_precedence(data, quiet_trainer):
    own = ConvergenceDiagnostics(4)
    trainer = quiet_trainer(max_steps=1, callbacks=[own])
    trainer.fit(LoRAFineTuning(**TINY), data)
    assert [each for each in trainer.callbacks if isinstance(each, ConvergenceDiagnostics)] == [own]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pretrained": "none.pt"}, "pretrained: there is no file .*none.pt"),
        ({"pretrained": "text.pt"}, "pretrained: text.pt is no file of torch.save"),
        ({"pretrained": "other.pt"}, "pretrained: other.pt has no wte.weight"),
        ({"pretrained": "gpt.pt", "width": 16}, "width: 16, and gpt.pt has 8; leave width out"),
        ({"adapted": ["*conv*"]}, "names: '\\*conv\\*' matches no linear layer"),
        ({"rank": 100}, "rank: got 100"),
        ({"pretrain_lr": float("inf")}, "pretrain_lr: the loss was nan"),
        ({"pretrain_steps": 0}, "pretrain_steps: must be at least 1, got 0"),
    ],
)
def test_mistakes_say_what_is_wrong(options, says, data, quiet_trainer, tmp_path):
    (tmp_path / "text.pt").write_text("no tensors")
    torch.save({"weight": torch.zeros(2)}, "other.pt")
    torch.save(GPT(256, 16, width=8, depth=1, heads=2).state_dict(), "gpt.pt")
    sizes = {} if "pretrained" in options else TINY
    with pytest.raises(MisconfigurationException, match=says):
        quiet_trainer(max_steps=1).fit(LoRAFineTuning(**sizes | options), data)


def test_without_data_the_missing_size_is_named():
    with pytest.raises(MisconfigurationException, match="vocabulary: is None, and there is no data module"):
        LoRAFineTuning(width=8)(torch.zeros(1, 4, dtype=torch.int64))
