"""The studies of ConvergenceHealth: their judgement of runs, their fits, and that they go on where they were cut off."""

from __future__ import annotations

import copy
import json
import math

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceHealth, Probe
from lightning_conv.callbacks.run.guarded import set_strict
from lightning_conv.health.kernel.gradient_noise import gradient_noise
from lightning_conv.recipes.cli import main
from lightning_conv.recipes.lab.health import forecast_study, noise_study, step_study
from lightning_conv.recipes.lab.health.batch_sweep import gradient_products
from lightning_conv.recipes.lab.health.critical_batch import fewest_steps, fit_hyperbola
from lightning_conv.recipes.lab.health.edge_figure import check_edge, edge_run
from lightning_conv.recipes.lab.health.forecast_run import Forecast, ForecastTrack, scored, track_run
from lightning_conv.recipes.lab.health.judged_run import judge_run
from lightning_conv.recipes.lab.health.kept_results import KeptResults
from lightning_conv.recipes.lab.health.networks import GalleryModule
from lightning_conv.recipes.lab.health.plain_step import PlainStep, operator_of
from lightning_conv.recipes.lab.health.step_record import StepRecord, batches_of, probe_of, record_run
from lightning_conv.recipes.lab.health.step_tables import check_causes, risk_by_ratio, risk_by_start, told
from lightning_conv.recipes.lab.health.study_plan import planned_runs
from lightning_conv.recipes.lab.health.study_runs import StudyRun, Task, optimizer_of
from lightning_conv.recipes.lab.shares import Share


def a_run(**changes):
    settings = {"network": "mlp", "loss": "mse", "optimizer": "sgd", "full_batch": True, "ratio": 0.3, "seed": 7}
    return StudyRun(**settings | changes)


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_those_of_newcombe_1998_table_1(hits, of, low, high):
    assert Share(hits, of).interval == pytest.approx((low, high), abs=5e-5)
    mirrored = Share(of - hits, of).interval
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_a_share_of_none_is_no_share():
    assert Share(0, 0).words == "none"
    assert Share(0, 0).interval == (0.0, 1.0)
    with pytest.raises(ValueError, match="hits, of: 2, 1"):
        Share(2, 1)


@pytest.mark.parametrize("critical", [3.0, 40.0, 900.0])
def test_the_critical_batch_of_a_hyperbola_is_found(critical):
    steps = {batch: 50.0 * (1 + critical / batch) for batch in (1, 4, 16, 64, 256, 1024)}
    fit = fit_hyperbola(steps)
    assert fit.critical_batch == pytest.approx(critical, rel=0.02)
    assert fit.least_steps == pytest.approx(50.0, rel=0.02)
    assert fit.error < 0.01
    with pytest.raises(ValueError, match="three batch sizes"):
        fit_hyperbola({1: 2.0, 2: 1.0})


def test_the_best_rate_is_found_up_and_down():
    asked = []

    def steps_to_loss(rate, most):
        asked.append(rate)
        needed = 10 + 100 * abs(math.log2(rate / 4.0))
        return round(needed) if needed <= most else None

    rates = [2.0**k for k in range(8)]
    for first in range(8):
        assert fewest_steps(steps_to_loss, rates, first=first, most=10_000) == (10, 2)
    assert fewest_steps(lambda rate, most: None, rates, first=3, most=10) is None


def test_gradient_products_are_those_of_single_backward_passes():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    rows = []
    for one, label in zip(x, y, strict=True):
        loss = F.cross_entropy(net(one[None]), label[None])
        rows.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(net.parameters()))]))
    slow = torch.stack(rows).double()
    products = gradient_products(net, x, y)
    assert torch.allclose(products, slow @ slow.T, atol=1e-5)
    assert gradient_noise(products).variance == pytest.approx(float(slow.var(0).sum()), rel=1e-4)


def test_what_is_known_is_not_done_again_and_a_line_that_was_cut_off_is(tmp_path):
    done = []
    todo = [a_run(seed=seed) for seed in range(4)]

    def make(run):
        done.append(run.seed)
        return 10 * run.seed

    def results():
        kept = KeptResults(tmp_path / "kept.jsonl")
        return kept.results(todo, make, write=str, read=int, title="", seconds=0.0)

    whole = results()
    assert whole == [0, 10, 20, 30]
    text = (tmp_path / "kept.jsonl").read_text()
    (tmp_path / "kept.jsonl").write_text("\n".join(text.splitlines()[:2]) + '\n{"key": "mlp/')
    done.clear()
    assert results() == whole
    assert done == [2, 3]
    assert KeptResults(tmp_path / "kept.jsonl").words == " 4 runs are kept from an earlier call."
    assert KeptResults(None).words == ""


def test_a_record_survives_json():
    record = record_run(a_run(ratio=4.0, loss="mse", optimizer="momentum"))
    assert not math.isfinite(record.losses[-1])
    again = StepRecord.from_json(json.loads(json.dumps(record.to_json())))
    run = a_run(ratio=4.0, optimizer="momentum")
    said, resaid = judge_run(run, record).findings, judge_run(run, again).findings
    assert [[each.level for each in found] for _, found in said] == [
        [each.level for each in found] for _, found in resaid
    ]
    assert again.losses[:-1] == pytest.approx(record.losses[:-1], rel=1e-6)
    assert judge_run(run, again).ended_badly


CALM, UP = [1.0 - 0.01 * k for k in range(20)], [3.0, 9.0, 27.0, 81.0]


def a_record(losses, ratio, end=0.5):
    steps = range(0, len(losses) + 1, 10)
    probes = [(step, losses[min(step, len(losses) - 1)]) for step in steps]
    return StepRecord(
        ratio, 0.1, losses, [1.0] * len(losses), probes, [(step, ratio, ratio) for step in steps], False, end
    )


@pytest.mark.parametrize(
    ("losses", "end", "badly", "lost"),
    [
        ([1.0, 0.5], 0.4, False, False),
        ([1.0, 0.5], 1.1, True, True),
        ([1.0, 21.0, 0.5], 0.4, True, False),
        ([1.0, math.nan], 0.4, True, True),
        ([1.0, 0.5], math.nan, True, True),
    ],
)
def test_how_a_run_ended(losses, end, badly, lost):
    judged = judge_run(a_run(), StepRecord(0.3, 0.1, losses, [1.0] * len(losses), [(0, 1.0)], [], False, end))
    assert (judged.ended_badly, judged.lost) == (badly, lost)


def test_causes_are_scored_by_what_was_done_to_the_run():
    rising = [*CALM, *(1.5**k for k in range(20))]
    by_step = judge_run(a_run(), a_record(rising, 1.5, end=2000.0))
    assert told(by_step) == "right"
    assert told(judge_run(a_run(cause="bad batch"), a_record(rising, 1.5))) == "rose before"
    leaping = [1.0 - 0.001 * k for k in range(66)] + [50.0] * 4
    assert told(judge_run(a_run(cause="bad batch"), a_record(leaping, 0.1))) == "right"
    assert told(judge_run(a_run(cause="bad batch"), a_record(leaping, 3.0))) == "wrong"
    assert told(judge_run(a_run(), a_record(leaping, 0.1))) == "wrong"
    assert told(judge_run(a_run(), a_record(leaping, 0.8))) == "open"
    assert told(judge_run(a_run(), a_record(CALM, 0.8))) == "nothing"
    everything, _, _ = check_causes([by_step, judge_run(a_run(), a_record(leaping, 0.1))])
    assert not everything.holds
    assert not everything.must  # two runs are too few
    assert check_causes([by_step] * 18 + [judge_run(a_run(), a_record(leaping, 0.1))] * 2)[0].must
    assert everything.seen.startswith("50 %")


def test_tables_have_a_column_for_each_ratio_and_count_bad_ends():
    runs = [
        judge_run(a_run(ratio=ratio), a_record(CALM, ratio, end)) for ratio, end in ((0.3, 0.5), (0.3, 2.0), (4.0, 2.0))
    ]
    (row,) = risk_by_start(runs)
    assert row["ratio 0.3"].endswith("1 of 2)")
    assert row["ratio 4"].endswith("1 of 1)")
    (row,) = risk_by_ratio(runs, 10)
    assert row["to 0.5"].endswith("1 of 2)")
    assert row["to 4"].endswith("1 of 1)")
    assert row["above 4"] == "none"


@pytest.fixture
def _lenient():
    set_strict(False)  # a run that ends in NaN has errors that are expected
    yield
    set_strict(True)


@pytest.mark.usefixtures("_lenient")
@pytest.mark.parametrize(
    "run",
    [
        a_run(ratio=0.7, optimizer="momentum"),
        a_run(ratio=0.7, loss="cross-entropy"),
        a_run(ratio=1.2, optimizer="adamw"),
        a_run(ratio=4.0, loss="cross-entropy", full_batch=False),
        StudyRun(network="cnn", loss="mse", optimizer="momentum", full_batch=False, ratio=1.2, seed=3),
    ],
    ids=lambda run: run.key,
)
def test_the_callback_says_what_the_study_says(run, tmp_path):
    record = record_run(run)
    study = judge_run(run, record)
    said = {}

    class Listener(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            said[trainer.global_step] = {
                each.name: (each.level, each.sentence)
                for each in health.findings
                if each.name in ("stability", "loss_rise")
            }

    task = Task.of(run)
    optimizer = optimizer_of(run, task.net, record.rate)
    rows = torch.cat([rows for rows, _, _ in batches_of(run, task)])
    inputs, targets = probe_of(run, task)
    module = GalleryModule(task.net, task.loss, type(optimizer), lr=record.rate)
    module.configure_optimizers = lambda: optimizer
    health = ConvergenceHealth(Probe(inputs=inputs, targets=targets), every_n_steps=run.size.every)
    size = len(task.inputs) if run.full_batch else run.size.batch
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[health, Listener()], accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(task.inputs, task.targets), batch_size=size, sampler=rows.tolist()))
    compared = 0
    for step, found in study.findings:
        if step in said and step < len(record.losses):
            expected = {each.name: (each.level, each.sentence) for each in found}
            assert said[step] == expected
            compared += 1
    assert compared >= 1
    last = {each.name: each.level for each in study.findings[-1][1]}
    assert {name: level for name, (level, _) in said[len(record.losses)].items()} == last


def test_every_network_has_runs_left_alone_and_runs_that_are_disturbed():
    for network in ("mlp", "cnn", "resnet8", "gpt"):
        runs = planned_runs(network, [0, 1])
        assert len({each.key for each in runs}) == len(runs)
        causes = {each.cause for each in runs}
        assert {"none", "rate raised", "wrong labels", "overflow"} <= causes
        assert ("bad batch" in causes) == (network != "gpt")


def test_the_ratio_is_that_of_the_dense_matrix_through_the_statistics_of_batch_norm():
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    x, y, rate = torch.randn(12, 5), torch.randn(12, 3), 0.3
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    step = PlainStep(net, operator_of(net, x), x, lambda u: F.mse_loss(u, y.to(u)), optimizer)
    reading, _ = step.ratio(0, None)
    twin = copy.deepcopy(net).double().train()
    twin[1].track_running_stats, twin[1].num_batches_tracked = False, None  # writes nothing
    twin[1].running_mean = twin[1].running_var = None
    weights = {name: each.detach() for name, each in twin.named_parameters()}
    rows = torch.func.jacrev(lambda given: torch.func.functional_call(twin, given, (x.double(),)).flatten())(weights)
    jacobian = torch.cat([each.flatten(1) for each in rows.values()], 1)
    largest = float(torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1]) * 2 / y.numel()
    assert reading.lower == pytest.approx(largest * rate / 3.8, rel=0.01)


def test_descent_rises_to_the_edge():
    run = edge_run("momentum 0.9, rate 0.6", seed=3, steps=600)
    assert check_edge(run).holds, run.ratios


def test_forecasts_are_compared_with_what_came():
    losses = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125]
    made = [(number, [losses[number] / 2, losses[number] / 16]) for number in range(len(losses))]
    found = scored(losses, made)
    assert all(each.error < 1e-12 for each in found)
    assert [each.error_unchanged for each in found if each.ahead == 1] == [1.0] * 6
    assert [each.error_extrapolated for each in found if each.ahead == 4 and each.previous] == [0.0] * 2
    assert [each.shown for each in found if each.ahead == 1] == [False] * 3 + [
        True
    ] * 3  # three have to be compared first
    bad = scored(losses, [(number, [9.0, 9.0]) for number in range(len(losses))])
    assert not any(each.shown for each in bad)


def test_a_track_survives_json_and_knows_its_parts():
    track = track_run(a_run())
    assert ForecastTrack.from_json(json.loads(json.dumps(track.to_json()))) == track
    assert track.ended_well
    assert all(isinstance(each, Forecast) and each.share >= 0.3 for each in track.some(4, 0.3))
    assert len(track.some(1)) == 20


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        (
            "health_step",
            ["--networks", "[mlp]", "--most", "5", "--edge_steps", "20"],
            "Ended badly, by the ratio at the start",
        ),
        ("health_noise", ["--batches", "[16,64,256]", "--most", "60"], "critical batch"),
        ("health_forecast", ["--networks", "[mlp]", "--most", "2"], "What the product would have shown"),
    ],
)
def test_a_quick_variant_writes_its_page_and_goes_on_from_what_it_kept(name, words, says, tmp_path):
    keep = tmp_path / "kept.jsonl"
    command = ["lab", name, "--seeds", "1", *words, "--keep", str(keep), "--out", str(tmp_path)]
    assert main(command) in (0, 1)
    page, before = (tmp_path / f"{name}.md").read_text(), keep.read_text()
    assert says in page
    assert main(command) in (0, 1)
    assert keep.read_text() == before
    assert (tmp_path / f"{name}.md").read_text().split("## Checks")[1] == page.split("## Checks")[1]


@pytest.mark.parametrize("run", [step_study.run, forecast_study.run])
def test_mistakes_are_named(run):
    with pytest.raises(ValueError, match="seeds: 0"):
        run(seeds=0)
    with pytest.raises(ValueError, match="networks: rnn"):
        run(networks=["rnn"])
    with pytest.raises(ValueError, match="three batch sizes"):
        noise_study.run(batches=[1, 2])
