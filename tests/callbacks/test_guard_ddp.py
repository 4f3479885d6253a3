"""Two processes follow the two-phase rule as one does: same decisions, same weights, a still trunk, a resume in both phases."""

from __future__ import annotations

import itertools
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.callbacks.guard.support import require_supported

COMMON = """
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_conv.callbacks import ExpressivityGuard


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 12), nn.Softplus(10), nn.Linear(12, 40), nn.Softplus(10))
        self.classifier = nn.Linear(40, 3)
        self.loss_fn = nn.CrossEntropyLoss()

    def forward(self, x):
        return self.classifier(self.trunk(x))

    def training_step(self, batch, batch_idx):
        return self.loss_fn(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data():
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(24, 8, generator=generator), torch.randint(0, 3, (24,), generator=generator))


def network():
    pl.seed_everything(0, verbose=False)
    return Net()


OPTIONS = dict(max_epochs=6, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
"""

SCRIPT = (
    COMMON
    + '''
import sys
from lightning.pytorch.callbacks import ModelCheckpoint

torch.set_num_threads(1)
FOLDER, PART = sys.argv[1], sys.argv[2]


class Watch(pl.Callback):
    """The trunk's bits and gradients in phase 2, and whether the reducer waits for the head alone."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        guard = next(c for c in trainer.callbacks if isinstance(c, ExpressivityGuard))
        if guard.phase == 2:
            self.seen.append({k: v.clone() for k, v in pl_module.trunk.state_dict().items()})
            waited_for = [p for p in trainer.strategy.model.parameters() if p.requires_grad]
            assert len(waited_for) == 2, len(waited_for)
            assert all(p.grad is None for p in pl_module.trunk.parameters())


def run(name, guard, ckpt=None, batch_norm=False, batch_size=6, **options):
    samples = data()
    watch, module = Watch(), network()
    if batch_norm:
        module.trunk.insert(1, nn.BatchNorm1d(12))
    save = ModelCheckpoint(dirpath=f"{FOLDER}/{name}", save_top_k=-1, filename="{step}", save_on_train_epoch_end=True)
    trainer = pl.Trainer(callbacks=[guard, watch, save], devices=2, strategy="ddp", **(OPTIONS | options))
    trainer.fit(module, DataLoader(samples, batch_size=batch_size, shuffle=True), ckpt_path=ckpt)  # DistributedSampler, seed 0
    assert all(torch.equal(v, later[k]) for later in watch.seen for k, v in watch.seen[0].items())
    found = {
        "weights": module.state_dict(), "history": guard.history, "phase": guard.phase, "reason": guard.reason,
        "verdict": guard.verdict, "sigma_min": guard.certificate.sigma_min.value, "norm": guard.perturbation.norm,
    }
    torch.save(found, f"{FOLDER}/{name}.{trainer.global_rank}.pt")
    assert all(p.requires_grad for p in module.parameters())
    return trainer
'''
)

PARTS = {
    "step": """
run("whole", ExpressivityGuard(switch_at=5))
run("from_1", ExpressivityGuard(switch_at=5), ckpt=f"{FOLDER}/whole/step=4.ckpt")
run("from_2", ExpressivityGuard(switch_at=5), ckpt=f"{FOLDER}/whole/step=8.ckpt")
""",
    "auto": """
auto = dict(switch_at="auto", plateau_threshold=0.5, plateau_patience=1, plateau_window=2, cache_features=True)
run("auto", ExpressivityGuard(**auto))
run("auto_from", ExpressivityGuard(**auto), ckpt=f"{FOLDER}/auto/step=2.ckpt")
run("normed", ExpressivityGuard(switch_at=5), batch_norm=True)
""",
    "rules": """
certified = dict(switch_at=3, step_rule="certified")
run("by_batch", ExpressivityGuard(**certified))
run("by_batch_from", ExpressivityGuard(**certified), ckpt=f"{FOLDER}/by_batch/step=6.ckpt")
run("whole_set", ExpressivityGuard(**certified), batch_size=12)
run("whole_set_from", ExpressivityGuard(**certified), ckpt=f"{FOLDER}/whole_set/step=4.ckpt", batch_size=12)
run("solved", ExpressivityGuard(switch_at=3, step_rule="solve", tol=1e-3))
""",
}


class Globally(DistributedSampler):
    """The samples of both ranks, batch after batch: each sample once, which of a sampler of one's own nobody would know."""

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


# No rank leaves while the other still talks to it: that can abort a process at its very end.
LEAVING = """
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def two_processes(folder, part):
    script = folder / f"{part}.py"
    script.write_text(SCRIPT + PARTS[part] + LEAVING)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), part], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]

    def found(name):
        return [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in range(2)]

    return found


def one_process(guard, batch_size=6):
    scope = {}
    exec(COMMON, scope)
    samples, module = scope["data"](), scope["network"]()
    trainer = pl.Trainer(callbacks=[guard], devices=1, enable_checkpointing=False, **scope["OPTIONS"])
    trainer.fit(module, DataLoader(samples, batch_size=2 * batch_size, sampler=Globally(samples, batch_size)))
    return module.state_dict(), guard


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_two_ranks_end_with_the_weights_of_one_process_on_the_same_batches_and_resume_in_both_phases(tmp_path):
    found = two_processes(tmp_path, "step")
    whole = found("whole")
    expected, guard = one_process(ExpressivityGuard(switch_at=5))
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
    for start in ("from_1", "from_2"):
        for resumed, uninterrupted in zip(found(start), whole, strict=True):
            assert same(resumed["weights"], uninterrupted["weights"]), start
            assert resumed["history"] == uninterrupted["history"]


def test_two_ranks_switch_at_the_same_plateau_train_on_cached_features_and_resume(tmp_path):
    found = two_processes(tmp_path, "auto")
    auto, resumed, normed = found("auto"), found("auto_from"), found("normed")
    assert auto[0]["reason"] == auto[1]["reason"]
    assert auto[0]["phase"] == 2
    assert same(auto[0]["weights"], auto[1]["weights"])
    assert same(auto[0]["weights"], resumed[1]["weights"])
    assert auto[0]["history"] == resumed[0]["history"]
    expected, guard = one_process(
        ExpressivityGuard(switch_at="auto", plateau_threshold=0.5, plateau_patience=1, plateau_window=2)
    )
    assert guard.history[0]["step"] == auto[0]["history"][0]["step"]
    for name, value in expected.items():
        assert torch.allclose(auto[0]["weights"][name], value, rtol=0, atol=1e-6), name
    # The BatchNorm statistics of the ranks differ until they agree on one set, which is then certified.
    assert same(normed[0]["weights"], normed[1]["weights"])
    assert normed[0]["verdict"] == "certified"


def test_two_ranks_take_the_certified_steps_of_one_process_and_resume(tmp_path):
    found = two_processes(tmp_path, "rules")
    for name, batch_size in (("by_batch", 6), ("whole_set", 12)):
        ranks, resumed = found(name), found(f"{name}_from")
        expected, guard = one_process(ExpressivityGuard(switch_at=3, step_rule="certified"), batch_size)
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
    solved = found("solved")
    expected, guard = one_process(ExpressivityGuard(switch_at=3, step_rule="solve", tol=1e-3))
    assert same(solved[0]["weights"], solved[1]["weights"])
    assert solved[0]["reason"] == solved[1]["reason"]
    assert all("solved by lbfgs" in reason for reason in (solved[0]["reason"], guard.reason))
    assert 0 <= solved[0]["history"][-1]["gap"] <= 1e-3
    for key, value in expected.items():
        if "classifier" not in key:  # the solution's weights are far out, where the loss hardly depends on them
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
