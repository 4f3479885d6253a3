"""A measurement grows while the time allows, on a clock that only trials move; what the Probe names stays."""

from __future__ import annotations

import re
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_conv.callbacks import KernelStability, LambdaMin, Probe
from lightning_conv.callbacks.run import budget
from lightning_conv.callbacks.run.budget import (
    FEWEST_SAMPLES,
    LATER,
    PATIENT_SECONDS,
    READING,
    fit_to_budget,
    seconds_of_an_epoch,
)

LEAST_SECONDS = 1.0


@pytest.fixture(autouse=True)
def ordinary_budget(monkeypatch):
    monkeypatch.setattr(budget, "LEAST_SECONDS", LEAST_SECONDS)


PRECISIONS = ["fast", "exact", "certified"]


class Run:
    """A trainer, a measurement and a clock: a pass takes ``rate`` seconds per sample, a kernel as many passes as it has outputs."""

    def __init__(
        self,
        monkeypatch,
        *,
        rate,
        outputs=1,
        n=128,
        probe=None,
        batches=10,
        resolved_by="fast",
        squared=0.0,
        knows_loss=False,
        is_bound=False,
        backward=1.0,
    ):
        self.rate, self.n_outputs, self.squared, self.now, self.trials = rate, outputs, squared, 0.0, []
        self.trainer = SimpleNamespace(
            world_size=1, num_training_batches=batches, train_dataloader=SimpleNamespace(batch_size=32), callbacks=[]
        )
        self.is_bound, self.lowest = is_bound, "certified" if is_bound else "fast"
        self.knows_loss, self.run_network = knows_loss, SimpleNamespace(asked=None)
        self.probe, self.inputs, self.targets = probe or Probe(), torch.arange(float(n))[:, None], torch.arange(n)
        self.highest, self.resolved_by, self.awaited = "certified", resolved_by, 0.0
        monkeypatch.setattr(budget.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(budget, "time_pass", lambda trainer, measurement, samples: (samples * rate, outputs))
        monkeypatch.setattr(budget, "backward_share", lambda trainer, measurement: backward)
        monkeypatch.setattr(budget, "_trial", self.trial)

    @property
    def is_resolved(self):
        return PRECISIONS.index(self.highest) >= PRECISIONS.index(self.resolved_by)

    def trial(self, trainer, measurement, everything, samples, kind):
        passes = {"trace": self.n_outputs, "full": 1, "sum": 1, "projected": self.probe.projections, "loss": 2}[kind]
        slower = {"fast": 1.0, "exact": 2.5, "certified": 25.0}[self.highest]
        taken = (passes * samples * self.rate + self.squared * samples**2) * slower
        self.now += taken
        self.trials.append((samples, kind, self.highest))
        return taken

    def change(self, probe, inputs, targets):
        self.chosen = len(inputs)

    def fit(self, share=0.03, spent=0.0):
        self.now += spent
        self.choice = fit_to_budget(self.trainer, self, share, spent)
        return self.choice


def test_a_cheap_network_is_measured_whole(monkeypatch):
    run = Run(monkeypatch, rate=1e-6)
    choice = run.fit()
    assert (choice.samples, choice.outputs, choice.is_reduced) == (128, "trace", False)
    assert [samples for samples, _, _ in run.trials] == [16, 32, 64, 128]


@pytest.mark.parametrize(
    ("rate", "knows_loss", "samples", "kind"),
    [
        (1e-3, True, 8, "projected"),
        (1e-2, True, 4, "projected"),
        (3e-2, True, 4, "loss"),  # sixteen projections of four samples would take 1.92 s
        (3e-2, False, 4, "projected"),
        (1.0, True, 4, "loss"),
    ],
)
def test_the_kernel_of_the_loss_is_the_last_choice(monkeypatch, rate, knows_loss, samples, kind):
    run = Run(monkeypatch, rate=rate, outputs=300, knows_loss=knows_loss)
    choice = run.fit()
    assert (choice.samples, choice.outputs) == (samples, kind)
    assert choice.is_reduced
    assert ("the loss gradients" in choice.words) == (kind == "loss")


@pytest.mark.parametrize(
    ("rate", "backward", "knows_loss", "samples", "kind"),
    [
        (1e-7, 1.0, True, 128, "trace"),
        (1e-3, 1.0, True, 16, "loss"),
        (1e-3, 1.0, False, 4, "trace"),
        (1e-3, 1e-3, True, 4, "trace"),  # passes that go back through the last layer only; reading is slow in float64
    ],
)
def test_a_bound_is_never_estimated_and_always_certified(monkeypatch, rate, backward, knows_loss, samples, kind):
    options = {"knows_loss": knows_loss, "is_bound": True, "backward": backward}
    run = Run(monkeypatch, rate=rate, outputs=300, **options)
    run.n_outputs = max(round(300 * backward), 1)  # what the trials take
    choice = run.fit()
    assert (choice.samples, choice.outputs) == (samples, kind)
    assert all(precision == "certified" for _, _, precision in run.trials)
    assert run.highest == "certified"
    kept = Run(monkeypatch, rate=rate, outputs=300, probe=Probe(outputs="trace"), **options)
    assert kept.fit().outputs == "trace"


@pytest.mark.parametrize(("given", "kind"), [({"outputs": "trace"}, "trace"), ({"size": 64}, "loss")])
def test_what_the_probe_names_stays_where_the_loss_would_be_cheaper(monkeypatch, given, kind):
    run = Run(monkeypatch, rate=1e-2, outputs=300, n=64, knows_loss=True, probe=Probe(**given))
    assert run.fit().outputs == kind
    assert run.choice.samples == given.get("size", run.choice.samples)


@pytest.mark.parametrize("rate", [1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1])
@pytest.mark.parametrize("outputs", [1, 10, 300])
@pytest.mark.parametrize("squared", [0.0, 1e-5])
def test_all_trials_together_stay_within_the_budget(monkeypatch, rate, outputs, squared):
    run = Run(monkeypatch, rate=rate, outputs=outputs, squared=squared, resolved_by="certified")
    choice = run.fit()
    assert choice.budget == max(1.0, 0.03 * 10 * 32 * rate)
    if choice.waits:
        assert not run.trials
        assert choice.waits > PATIENT_SECONDS
        return
    fewest = [each for each in run.trials if each[0] > FEWEST_SAMPLES]
    if fewest:  # a single trial of the fewest samples is made whatever it takes
        assert run.now <= choice.budget * (1 + 1e-9)
    assert choice.samples == run.trials[-1][0]
    assert choice.samples & (choice.samples - 1) == 0


def test_it_grows_by_doubling_until_the_next_one_would_take_too_long(monkeypatch):
    run = Run(monkeypatch, rate=1.1e-3)  # 16 samples: 0.018 s, 32: 0.035 s, 64: 0.07 s; a later one may take 0.2 s
    choice = run.fit()
    assert [samples for samples, _, _ in run.trials][:4] == [16, 32, 64, 128]
    assert choice.samples == 128
    assert choice.seconds <= LATER * choice.budget


def test_a_long_epoch_allows_more_than_a_second(monkeypatch):
    short, long = (Run(monkeypatch, rate=3e-3, batches=batches).fit() for batches in (10, 2000))
    assert short.samples < long.samples == 128
    assert (short.budget, long.budget) == (1.0, pytest.approx(0.03 * 2000 * 32 * 3e-3))


def test_a_larger_share_allows_more(monkeypatch):
    few, many = (Run(monkeypatch, rate=3e-3, batches=1000).fit(share) for share in (0.001, 0.1))
    assert few.samples < many.samples


def test_the_number_of_samples_that_is_named_stays(monkeypatch):
    run = Run(monkeypatch, rate=1e-3, n=100, probe=Probe(size=100))
    choice = run.fit()
    assert {samples for samples, _, _ in run.trials} == {100}
    assert (choice.samples, choice.is_reduced) == (100, False)


@pytest.mark.parametrize("outputs", ["trace", "sum", "full", "projected"])
def test_the_outputs_that_are_named_stay(monkeypatch, outputs):
    run = Run(monkeypatch, rate=1e-4, outputs=1000, probe=Probe(outputs=outputs))
    assert run.fit().outputs == outputs
    assert {kind for _, kind, _ in run.trials} == {outputs}


def test_many_outputs_are_projected_only_where_they_would_take_too_long(monkeypatch):
    cheap, slow, few = (
        Run(monkeypatch, rate=rate, outputs=outputs).fit() for rate, outputs in ((1e-6, 300), (1e-3, 300), (1e-3, 10))
    )
    assert (cheap.outputs, slow.outputs, few.outputs) == ("trace", "projected", "trace")
    assert slow.is_reduced


def test_where_a_pass_is_slow_the_first_trial_has_fewer_samples_but_never_fewer_than_four(monkeypatch):
    run = Run(monkeypatch, rate=1.5e-3)  # on 16 samples, reading and the callbacks would take 1.3 s
    run.fit()
    assert run.trials[0][0] == 8
    run = Run(monkeypatch, rate=5.0)
    choice = run.fit()
    assert choice.samples == FEWEST_SAMPLES
    assert not run.trials


def test_a_network_that_takes_long_to_read_is_not_read_before_the_run_is_long_enough(monkeypatch):
    run = Run(monkeypatch, rate=0.1)
    choice = run.fit()
    assert run.awaited == choice.waits == pytest.approx((READING + 1) * FEWEST_SAMPLES * 0.1)
    assert (run.chosen, run.highest, run.trials) == (FEWEST_SAMPLES, "fast", [])
    long = Run(monkeypatch, rate=0.1, batches=10_000)  # an epoch of 9 hours
    assert long.fit().waits == long.awaited == 0.0
    assert long.trials


def test_what_finding_the_network_took_is_in_the_budget(monkeypatch):
    at_once = Run(monkeypatch, rate=1e-3).fit()
    assert at_once.samples > Run(monkeypatch, rate=1e-3).fit(spent=0.95).samples


def test_a_higher_precision_is_tried_as_far_as_it_fits_and_allowed_no_further(monkeypatch):
    highest = {}
    for rate in (1e-6, 2.5e-4, 2e-3):
        run = Run(monkeypatch, rate=rate, n=64, probe=Probe(size=64), resolved_by="certified")
        run.fit()
        highest[rate] = run.highest
    assert highest == {1e-6: "certified", 2.5e-4: "exact", 2e-3: "fast"}


def test_a_higher_precision_is_not_tried_where_the_kernel_is_resolved(monkeypatch):
    run = Run(monkeypatch, rate=1e-6, resolved_by="exact")
    run.fit()
    assert [precision for _, _, precision in run.trials][-1] == "exact"
    assert "certified" not in {precision for _, _, precision in run.trials}


def test_a_small_set_is_measured_whole(monkeypatch):
    run = Run(monkeypatch, rate=1e-6, n=5)
    choice = run.fit()
    assert (choice.samples, choice.whole, choice.is_reduced) == (5, 5, False)


@pytest.mark.parametrize("rate", [3e-3, 1e-2])
def test_the_words_name_what_was_chosen_and_the_line_that_asks_for_all(monkeypatch, rate):
    choice = Run(monkeypatch, rate=rate, outputs=300).fit()
    assert f"{choice.samples} of 128 samples" in choice.words
    assert "of 300 outputs" in choice.words
    assert "estimate of the trace kernel from random projections" in choice.words
    asked = eval(re.search(r"Probe\(.*?\)", choice.words)[0], {"Probe": Probe})
    assert (asked.size, asked.outputs, asked.given) == (128, "trace", {"size", "outputs"})


def test_an_epoch_of_unknown_length_is_none():
    loader = SimpleNamespace(batch_size=8)
    for trainer in (
        SimpleNamespace(num_training_batches=float("inf"), train_dataloader=loader),
        SimpleNamespace(num_training_batches=5, train_dataloader={"a": loader}),
        SimpleNamespace(num_training_batches=5, train_dataloader=SimpleNamespace(batch_size=None)),
    ):
        assert seconds_of_an_epoch(trainer, 1.0, 4) == 0.0
    trainer = SimpleNamespace(num_training_batches=5, train_dataloader=loader)
    assert seconds_of_an_epoch(trainer, 2.0, 4) == 5 * 8 * 2.0 / 4
    of_sampler = SimpleNamespace(batch_size=None, batch_sampler=SimpleNamespace(batch_size=3))
    assert seconds_of_an_epoch(SimpleNamespace(num_training_batches=5, train_dataloader=of_sampler), 2.0, 4) == 7.5


class Wide(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 40)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


DATA = [(torch.randn(3), torch.tensor(i % 40)) for i in range(64)]


def test_what_was_chosen_is_measured_from_then_on_and_stays_in_a_resumed_run(make_trainer, monkeypatch, tmp_path):
    def chosen(trainer, measurement, *share):
        taken = budget._trial(trainer, measurement, (measurement.inputs, measurement.targets), 8, "projected")
        measurement.highest = "exact"
        return budget.Choice(8, "projected", taken, 64, 40, 1.0)

    monkeypatch.setattr("lightning_conv.callbacks.run.budget.fit_to_budget", chosen)
    monitor = KernelStability()
    trainer = make_trainer([monitor], max_epochs=1)
    trainer.fit(Wide(), DataLoader(DATA, batch_size=16))
    state = monitor.state_dict()
    assert (len(state["inputs"]), state["outputs"], state["highest"]) == (8, "projected", "exact")
    trainer.save_checkpoint(tmp_path / "run.ckpt")

    def not_again(*_):
        raise AssertionError("a resumed run measures what it has measured")

    monkeypatch.setattr("lightning_conv.callbacks.run.budget.fit_to_budget", not_again)
    resumed = KernelStability()
    make_trainer([resumed], max_epochs=2).fit(Wide(), DataLoader(DATA, batch_size=16), ckpt_path=tmp_path / "run.ckpt")
    again = resumed.state_dict()
    assert torch.equal(again["inputs"], state["inputs"])
    assert (again["outputs"], again["highest"]) == ("projected", "exact")


@pytest.mark.parametrize(
    ("probe", "options"), [(Probe(8, outputs="trace"), {}), (None, {"every_n_steps": 2}), (16, {"every_n_steps": 1})]
)
def test_what_is_named_is_not_tried_out(make_trainer, monkeypatch, probe, options):
    def never(*_):
        raise AssertionError("nothing is left to choose")

    monkeypatch.setattr("lightning_conv.callbacks.run.budget.fit_to_budget", never)
    monitor = LambdaMin(probe, **options)
    make_trainer([monitor], max_epochs=1).fit(Wide(), DataLoader(DATA, batch_size=16))
    size = 64 if probe is None else 8 if isinstance(probe, Probe) else probe
    assert len(monitor.state_dict()["inputs"]) == size
