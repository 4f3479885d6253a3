"""``ConvergenceHealth(audit_labels=True)`` names wrong labels by their numbers in the training set, and changes nothing of the run."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from lightning_conv.callbacks import ConvergenceDiagnostics, ConvergenceHealth, ConvergenceReport, Probe
from lightning_conv.callbacks.health.labels_of_run import LabelsOfRun
from lightning_conv.callbacks.run.beginning import measurement_of
from lightning_conv.callbacks.run.schedule import Schedule
from lightning_conv.health.findings.of_labels import FAR
from lightning_conv.networks.inputs import spread

DIGITS = load_digits()
X, TRUE = torch.tensor(DIGITS.images[:240], dtype=torch.float32)[:, None] / 16, torch.tensor(DIGITS.target[:240])
FLIPPED = torch.randperm(240, generator=torch.Generator().manual_seed(1))[:24]
GIVEN = TRUE.clone()
GIVEN[FLIPPED] = (TRUE[FLIPPED] + 3) % 10


class Net(pl.LightningModule):
    def __init__(self, loss=F.cross_entropy, outputs=10, lr=2e-3):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, outputs))
        self.loss, self.lr, self.seen = loss, lr, []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        loss = self.loss(self(batch[0]), batch[1])
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def loader(y=GIVEN, **options):
    return DataLoader(TensorDataset(X, y), batch_size=40, **options)


def health(size=128, **options):
    return ConvergenceHealth(Probe(size), every_n_steps=4, audit_labels=True, **options)


@pytest.fixture
def fitted(make_trainer):
    def run(callback, module=None, data=None, *, epochs=3, path=None, extra=(), **options):
        pl.seed_everything(0, verbose=False)
        module = module or Net()
        trainer = make_trainer([callback, *extra], max_epochs=epochs, **options)
        trainer.fit(module, loader(shuffle=True) if data is None else data, ckpt_path=path)
        return trainer, module

    return run


def test_wrong_labels_are_a_notice_by_their_numbers_in_the_training_set(fitted):
    callback = health()
    fitted(callback)
    found = next(each for each in callback.findings if each.name == "labels")
    labels = callback.labels
    assert found.level == "notice"
    assert len(labels.numbers) == 128
    # The numbers are those of the samples: what was audited is what the data set has there.
    assert torch.equal(labels.audit.labels, GIVEN[labels.numbers])
    far = [labels.numbers[i] for i in labels.audit.beyond(FAR).tolist()]
    assert len(far) >= 5
    assert sum(number in FLIPPED.tolist() for number in far) >= 0.9 * len(far)
    first = labels.audit.top(1)[0]
    number = labels.numbers[first.number]
    assert found.sentence.startswith(f"Training sample {number:,} is labelled {int(GIVEN[number])}, and the other 127")
    assert first.suggested == TRUE[number]
    assert set(labels.audit.baselines) == {"inputs", "features", "loss"}


def test_labels_that_are_right_are_no_notice_and_one_hot_targets_are_read(fitted):
    callback = health()
    fitted(callback, Net(F.mse_loss), loader(F.one_hot(TRUE, 10).float()))
    found = next(each for each in callback.findings if each.name == "labels")
    assert found.level == "ok"
    assert torch.equal(callback.labels.audit.labels, TRUE[callback.labels.numbers])


def test_it_is_off_by_default(fitted):
    callback = ConvergenceHealth(Probe(64), every_n_steps=4)
    fitted(callback)
    assert callback.labels is None
    assert "labels" not in {each.name for each in callback.findings}
    assert not any("labels" in names for names in callback.not_judged.values())


def test_the_run_ends_bit_for_bit_as_without_it(fitted):
    _, plain = fitted(pl.Callback())
    _, audited = fitted(health())
    assert plain.seen == audited.seen
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), audited.parameters(), strict=True))


def test_table_and_pictures_reach_tensorboard_and_the_page(fitted, tmp_path):
    logger = TensorBoardLogger(tmp_path / "logs", name="", version="")
    fitted(health(), extra=[ConvergenceReport(folder=str(tmp_path))], logger=logger)
    events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"tensors": 0, "images": 0}).Reload()
    assert "health/labels_table/text_summary" in events.Tags()["tensors"]
    assert "health/labels_top" in events.Tags()["images"]
    assert "health/labels" in events.Tags()["scalars"]
    page = (tmp_path / "convergence.md").read_text()
    assert (
        page.index("## In plain words")
        < page.index("- module: Net")
        < page.index("## Labels\n\nLabels of the probe at step ")
    )
    assert "| rank | sample | of the training set | given | suggested | margin |" in page


def test_rows_of_numbers_get_a_table_and_no_pictures(fitted, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    flat = DataLoader(TensorDataset(X.flatten(1), GIVEN), batch_size=40)
    fitted(health(), data=flat, logger=logger, epochs=1)
    tags = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload().Tags()
    assert "health/labels_table/text_summary" in tags["tensors"]
    assert "health/labels_top" not in tags["images"]


def test_a_resumed_run_keeps_the_audit_of_the_whole_one(fitted):
    whole, resumed = health(), health()
    fitted(whole, data=loader(), epochs=4)
    first, _ = fitted(health(), data=loader(), epochs=2, checkpoint=True)
    path = str(first.checkpoint_callback.last_model_path)
    fitted(resumed, data=loader(), epochs=4, path=path)
    a, b = whole.labels.state_dict(), resumed.labels.state_dict()
    assert torch.equal(a["audit"].pop("margins"), b["audit"].pop("margins"))
    assert str(a) == str(b)
    assert [each.to_json() for each in whole.findings] == [each.to_json() for each in resumed.findings]


def test_numbers_survive_a_resume_in_which_they_can_no_longer_be_known(fitted):
    first, _ = fitted(health(64), data=loader(), epochs=1, checkpoint=True)
    callback = health(64)
    fitted(callback, data=loader(), epochs=2, path=str(first.checkpoint_callback.last_model_path))
    assert callback._kernel is None
    assert torch.equal(callback.labels.audit.labels, GIVEN[callback.labels.numbers])


def test_an_audit_is_kept_once_the_network_knows_labels_by_heart(fitted):
    callback = health(64)
    fitted(callback, Net(lr=2e-2), epochs=40)
    assert callback.labels._ended
    assert callback.labels.step < 100
    finding = next(each for each in callback.findings if each.name == "labels")
    assert finding.step == callback.labels.step


@pytest.mark.parametrize(
    ("module", "y", "reason"),
    [
        (lambda: Net(F.mse_loss, 1), X.mean((1, 2, 3))[:, None], "of a regression"),
        (lambda: Net(), torch.zeros(240, dtype=torch.long), "one class only"),
    ],
)
def test_what_has_no_labels_is_not_judged_with_the_reason(fitted, module, y, reason):
    callback = health(64)
    fitted(callback, module(), loader(y), epochs=1)
    assert any("labels" in names and reason in why for why, names in callback.not_judged.items())
    assert "labels" not in {each.name for each in callback.findings}


@pytest.mark.parametrize("outputs", ["full", "projected"])
def test_other_kernels_that_know_the_classes_serve(fitted, outputs):
    callback = ConvergenceHealth(Probe(48, outputs=outputs), every_n_steps=4, audit_labels=True)
    fitted(callback, epochs=1)
    assert callback.labels.audit.samples == 48
    if outputs == "full":
        plain = health(48)
        fitted(plain, epochs=1)
        assert torch.allclose(plain.labels.audit.margins, callback.labels.audit.margins, atol=1e-4)


@pytest.mark.parametrize("outputs", ["sum", "loss"])
def test_a_kernel_that_does_not_know_the_classes_is_refused(fitted, outputs):
    callback = ConvergenceHealth(Probe(48, outputs=outputs), every_n_steps=4, audit_labels=True)
    fitted(callback, epochs=1)
    assert any("labels" in names and 'Probe(outputs="trace")' in why for why, names in callback.not_judged.items())


def test_what_a_baseline_lacks_is_said(fitted):
    class Own(Net):
        def __init__(self):
            super().__init__(lambda u, y: (torch.logsumexp(u, 1) - u.gather(1, y[:, None])[:, 0]).pow(2).mean())
            self.net = nn.Sequential(self.net, nn.Softmax(1), nn.Conv1d(1, 1, 1), nn.Flatten())

        def forward(self, x):
            return self.net[3](self.net[2](self.net[1](self.net[0](x))[:, None]))

    callback = health(48)
    fitted(callback, Own(), epochs=1)
    audit = callback.labels.audit
    assert set(audit.baselines) == {"inputs"}
    assert "no nn.Linear produces" in audit.left_out["features"]
    assert "no formula for a single sample" in audit.left_out["loss"]


class Stream(IterableDataset):
    def __iter__(self):
        yield from TensorDataset(X, GIVEN)


@pytest.mark.parametrize("kind", ["sampler", "subset", "stream"])
def test_numbers_are_places_in_the_loaders_data_set_or_unknown(fitted, kind):
    rows = list(range(100, 220))
    data = {
        "sampler": lambda: loader(sampler=SubsetRandomSampler(rows)),
        "subset": lambda: DataLoader(Subset(TensorDataset(X, GIVEN), rows), batch_size=40),
        "stream": lambda: DataLoader(Stream(), batch_size=40),
    }[kind]()
    callback = health(40)
    fitted(callback, data=data, epochs=1)
    labels = callback.labels
    if kind == "stream":
        assert labels.numbers is None
        assert "of the training set" not in labels.markdown
        return
    assert [int(data.dataset[number][1]) for number in labels.numbers] == labels.audit.labels.tolist()
    assert set(labels.numbers) <= (set(rows) if kind == "sampler" else set(range(120)))


def test_fewer_measured_samples_keep_their_numbers(fitted):
    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            found = measurement_of(trainer, Probe(50), Schedule(1, 1.0))
            found.change(found.probe, spread(found.inputs, 7), spread(found.targets, 7))
            self.labels, self.numbers, self.inputs = found.targets, found.numbers, found.inputs

    look = Look()
    fitted(look, epochs=1)
    assert torch.equal(GIVEN[look.numbers], look.labels)
    assert torch.equal(X[look.numbers], look.inputs)


def test_the_diagnostics_pass_it_on():
    callbacks = ConvergenceDiagnostics(audit_labels=True).callbacks
    assert [each.audit_labels for each in callbacks if isinstance(each, ConvergenceHealth)] == [True]
    assert not any(
        each.audit_labels for each in ConvergenceDiagnostics().callbacks if isinstance(each, ConvergenceHealth)
    )


def test_the_state_comes_back_from_plain_types(tmp_path, fitted):
    callback = health(48)
    fitted(callback, epochs=1)
    torch.save(callback.labels.state_dict(), tmp_path / "state.pt")
    back = LabelsOfRun()
    back.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert back.markdown == callback.labels.markdown
    assert back.numbers == callback.labels.numbers


def audit_on_ranks(make_trainer, _):
    callback = health(64)
    pl.seed_everything(0, verbose=False)
    make_trainer([callback], max_epochs=2).fit(Net(), loader())
    return {
        "numbers": callback.labels.numbers,
        "table": callback.labels.markdown,
        "first": callback.findings[0].sentence,
    }


def test_two_processes_say_the_same(run_on_two_processes):
    one, other = run_on_two_processes(audit_on_ranks)
    assert one["table"] == other["table"]
    assert one["numbers"] == other["numbers"]
    assert "| 1 |" in one["table"]
