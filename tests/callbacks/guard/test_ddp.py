"""Two processes follow the two-phase rule as one does: same decisions, same weights, a still trunk, a resume in both phases."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.callbacks.guard.support import require_supported
from lightning_conv.callbacks.run.data import sampling
from lightning_conv.callbacks.run.data.sampling import register_sampler


def samples():
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(24, 8, generator=generator), torch.randint(0, 3, (24,), generator=generator))


def classifier(make_regression, batch_norm=False):
    pl.seed_everything(0, verbose=False)
    trunk = nn.Sequential(nn.Linear(8, 12), nn.Softplus(10), nn.Linear(12, 40), nn.Softplus(10))
    network = nn.Sequential(OrderedDict(trunk=trunk, head=nn.Linear(40, 3)))
    if batch_norm:
        trunk.insert(1, nn.BatchNorm1d(12))
    return make_regression(network, 0.1, nn.CrossEntropyLoss(), momentum=0.9)


class Watch(pl.Callback):
    """The trunk's bits and gradients in phase 2, and whether the reducer waits for the head alone."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        guard = next(c for c in trainer.callbacks if isinstance(c, ExpressivityGuard))
        if guard.phase == 2:
            trunk = pl_module.network.trunk
            self.seen.append({k: v.clone() for k, v in trunk.state_dict().items()})
            waited_for = [p for p in trainer.strategy.model.parameters() if p.requires_grad]
            assert len(waited_for) == 2, len(waited_for)
            assert all(p.grad is None for p in trunk.parameters())


class Runs:
    """Guarded runs on this rank, each under a name: its checkpoints are in the folder of that name."""

    def __init__(self, make_trainer, make_regression):
        self.make_trainer, self.make_regression = make_trainer, make_regression
        self.folder = Path(make_trainer().default_root_dir)
        self.found = {}

    def __call__(self, name, ckpt=None, batch_norm=False, batch_size=6, **options):
        guard, watch, module = ExpressivityGuard(**options), Watch(), classifier(self.make_regression, batch_norm)
        save = ModelCheckpoint(self.folder / name, save_top_k=-1, filename="{step}", save_on_train_epoch_end=True)
        trainer = self.make_trainer([guard, watch, save], max_epochs=6, enable_checkpointing=True)
        data = DataLoader(samples(), batch_size=batch_size, shuffle=True)  # DistributedSampler, seed 0
        trainer.fit(module, data, ckpt_path=ckpt and self.folder / ckpt)
        assert all(torch.equal(v, later[k]) for later in watch.seen for k, v in watch.seen[0].items())
        assert all(p.requires_grad for p in module.parameters())
        self.found[name] = {
            "weights": module.state_dict(), "history": guard.history, "phase": guard.phase, "reason": guard.reason,
            "verdict": guard.verdict, "sigma_min": guard.certificate.sigma_min.value, "norm": guard.perturbation.norm,
        }  # fmt: skip


AUTO = {"switch_at": "auto", "plateau_threshold": 0.5, "plateau_patience": 1, "plateau_window": 2}
CERTIFIED = {"switch_at": 3, "step_rule": "certified"}
SOLVE = {"switch_at": 3, "step_rule": "solve", "tol": 1e-3}


def step(make_trainer, make_regression):
    run = Runs(make_trainer, make_regression)
    run("whole", switch_at=5)
    run("from_1", "whole/step=4.ckpt", switch_at=5)
    run("from_2", "whole/step=8.ckpt", switch_at=5)
    with pytest.MonkeyPatch.context() as patch:  # in tiles of five samples, divided among the ranks
        patch.setattr("lightning_conv.expressivity.certify.HELD_UP_TO", 4)
        patch.setattr("lightning_conv.expressivity.plan.TILE", 5)
        run("in_tiles", switch_at=5)
    return run.found


def auto(make_trainer, make_regression):
    run = Runs(make_trainer, make_regression)
    run("auto", cache_features=True, **AUTO)
    run("auto_from", "auto/step=2.ckpt", cache_features=True, **AUTO)
    run("normed", batch_norm=True, switch_at=5)
    return run.found


def rules(make_trainer, make_regression):
    run = Runs(make_trainer, make_regression)
    run("by_batch", **CERTIFIED)
    run("by_batch_from", "by_batch/step=6.ckpt", **CERTIFIED)
    run("whole_set", batch_size=12, **CERTIFIED)
    run("whole_set_from", "whole_set/step=4.ckpt", batch_size=12, **CERTIFIED)
    run("solved", **SOLVE)
    return run.found


class Globally(DistributedSampler):
    """The samples of both ranks, batch after batch: each sample once, which the guard does not know of a user's sampler."""

    def __init__(self, samples, batch_size=6):
        super().__init__(samples, 1, 0)
        self.batch_size = batch_size
        self.parts = [DistributedSampler(samples, 2, rank, seed=0) for rank in range(2)]

    def __len__(self):
        return 24

    def set_epoch(self, epoch):
        for part in self.parts:
            part.set_epoch(epoch)

    def __iter__(self):
        first, second = (list(part) for part in self.parts)
        for start in range(0, 12, self.batch_size):
            yield from first[start : start + self.batch_size]
            yield from second[start : start + self.batch_size]


@pytest.fixture
def one_process(make_trainer, make_regression, monkeypatch):
    monkeypatch.setattr(sampling, "_EVEN", set(sampling._EVEN))
    register_sampler(Globally)

    def train(batch_size=6, **options):
        guard, module, data = ExpressivityGuard(**options), classifier(make_regression), samples()
        loader = DataLoader(data, batch_size=2 * batch_size, sampler=Globally(data, batch_size))
        make_trainer([guard], max_epochs=6).fit(module, loader)
        return module.state_dict(), guard

    return train


@pytest.fixture
def two_processes(run_on_two_processes):
    def train(body):
        first, second = run_on_two_processes(body)
        return {name: (first[name], second[name]) for name in first}

    return train


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_two_ranks_end_with_the_weights_of_one_process_on_the_same_batches_and_resume_in_both_phases(
    two_processes, one_process
):
    found = two_processes(step)
    whole = found["whole"]
    expected, guard = one_process(switch_at=5)
    assert whole[0]["phase"] == whole[1]["phase"] == guard.phase == 2
    assert same(whole[0]["weights"], whole[1]["weights"])
    for name, value in expected.items():
        assert torch.allclose(whole[0]["weights"][name], value, rtol=0, atol=1e-6), name
    assert whole[0]["norm"] == whole[1]["norm"] == pytest.approx(guard.perturbation.norm, rel=1e-6)
    assert whole[0]["sigma_min"] == pytest.approx(guard.certificate.sigma_min.value, rel=1e-3)
    assert whole[0]["history"] == whole[1]["history"]
    assert [entry["loss"] for entry in whole[0]["history"]] == pytest.approx(
        [entry["loss"] for entry in guard.history], abs=1e-6
    )
    assert (whole[0]["verdict"], whole[1]["verdict"]) == ("certified", "certified")
    for tiles, held in zip(found["in_tiles"], whole, strict=True):
        assert same(tiles["weights"], held["weights"])
        assert tiles["verdict"] == "certified"
        assert tiles["sigma_min"] == pytest.approx(held["sigma_min"], rel=1e-2)
        assert tiles["sigma_min"] != held["sigma_min"]  # another method
    for start in ("from_1", "from_2"):
        for resumed, uninterrupted in zip(found[start], whole, strict=True):
            assert same(resumed["weights"], uninterrupted["weights"]), start
            assert resumed["history"] == uninterrupted["history"]


@pytest.mark.slow
def test_two_ranks_switch_at_the_same_plateau_train_on_cached_features_and_resume(
    two_processes, one_process, make_regression
):
    found = two_processes(auto)
    switched, resumed, normed = found["auto"], found["auto_from"], found["normed"]
    assert switched[0]["reason"] == switched[1]["reason"]
    assert switched[0]["phase"] == 2
    assert same(switched[0]["weights"], switched[1]["weights"])
    assert same(switched[0]["weights"], resumed[1]["weights"])
    assert switched[0]["history"] == resumed[0]["history"]
    expected, guard = one_process(**AUTO)
    assert guard.history[0]["step"] == switched[0]["history"][0]["step"]
    for name, value in expected.items():
        assert torch.allclose(switched[0]["weights"][name], value, rtol=0, atol=1e-6), name
    # The BatchNorm statistics of the ranks differ until they agree on one set, which is then certified.
    assert same(normed[0]["weights"], normed[1]["weights"])
    assert normed[0]["verdict"] == "certified"
    module = classifier(make_regression, batch_norm=True)
    module.load_state_dict(normed[0]["weights"])
    with torch.no_grad():
        h = module.double().eval().network.trunk(samples().tensors[0].double())
    sigma_min = torch.linalg.svdvals(torch.cat([h, h.new_ones(24, 1)], 1))[-1]
    assert normed[0]["sigma_min"] == pytest.approx(float(sigma_min), rel=1e-5)


@pytest.mark.slow
def test_two_ranks_take_the_certified_steps_of_one_process_and_resume(two_processes, one_process):
    found = two_processes(rules)
    for name, batch_size in (("by_batch", 6), ("whole_set", 12)):
        ranks, resumed = found[name], found[f"{name}_from"]
        expected, guard = one_process(batch_size, **CERTIFIED)
        assert ranks[0]["phase"] == guard.phase == 2
        assert same(ranks[0]["weights"], ranks[1]["weights"])
        assert same(ranks[0]["weights"], resumed[1]["weights"])
        assert ranks[0]["history"] == ranks[1]["history"] == resumed[0]["history"]
        for key, value in expected.items():
            assert torch.allclose(ranks[0]["weights"][key], value, rtol=0, atol=1e-6), (name, key)
        gaps = [entry["gap"] for entry in ranks[0]["history"]]
        assert gaps == pytest.approx([entry["gap"] for entry in guard.history], abs=1e-6)
        assert len(gaps) > 2
        assert all(later < earlier for earlier, later in itertools.pairwise(gaps))
    solved = found["solved"]
    expected, guard = one_process(**SOLVE)
    assert same(solved[0]["weights"], solved[1]["weights"])
    assert solved[0]["reason"] == solved[1]["reason"]
    assert all("solved by lbfgs" in reason for reason in (solved[0]["reason"], guard.reason))
    assert 0 <= solved[0]["history"][-1]["gap"] <= 1e-3
    for key, value in expected.items():
        if "head" not in key:  # the solution's weights are far out, where the loss hardly depends on them
            assert torch.allclose(solved[0]["weights"][key], value, rtol=0, atol=1e-6), key


class Sharded(DDPStrategy):
    """As DeepSpeed's and XLA's, which derive from it, too."""


def test_other_strategies_are_refused_with_what_to_do(make_trainer, make_module):
    with pytest.raises(MisconfigurationException, match=r'Sharded on 2 devices.*strategy="ddp"'):
        require_supported(make_trainer(strategy=Sharded(), devices=2), make_module())
    averaging = DDPStrategy(model_averaging_period=2)
    with pytest.raises(MisconfigurationException, match="model_averaging_period"):
        require_supported(make_trainer(strategy=averaging, devices=2), make_module())
    require_supported(make_trainer(strategy="ddp", devices=2), make_module())


class RoundedOnTheSecondRank(nn.Module):
    def forward(self, x):
        return x.float().to(x) if torch.distributed.get_rank() == 1 else x


def cast(make_trainer, make_regression):
    found = {}
    for method in ("singular", "distinct"):
        guard, module = ExpressivityGuard(switch_at=3, method=method), classifier(make_regression)
        module.network.trunk.insert(0, RoundedOnTheSecondRank())
        module.network.trunk.insert(2, RoundedOnTheSecondRank())
        make_trainer([guard], max_epochs=3).fit(module, DataLoader(samples(), batch_size=6))
        found[method] = [guard.certificate.verdict, guard.certificate.narrow, guard.verdict]
    return found


@pytest.mark.slow
def test_a_cast_that_one_rank_sees_leaves_both_without_a_certificate(two_processes):
    for ranks in two_processes(cast).values():
        for verdict, narrow, of_the_run in ranks:
            assert verdict == "undecided"
            assert narrow == "'network.trunk.2' computes in torch.float32 (aten::_to_copy)"
            assert of_the_run != "certified"
