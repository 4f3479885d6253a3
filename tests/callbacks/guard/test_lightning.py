"""Whatever a Lightning run is made of, the trunk of phase 2 is bit for bit constant - or the guard says beforehand what to do."""

from __future__ import annotations

import inspect

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from lightning_conv.callbacks import ExpressivityGuard

SWITCH = 6

OPTIONS = {
    "Adafactor": {"lr": 1e-2, "weight_decay": 0.1},
    "LBFGS": {"lr": 1e-2, "max_iter": 2},
    "Muon": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1},
    "RMSprop": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1},
    "Rprop": {"lr": 1e-3},
    "SGD": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
}
OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


class Watch(pl.Callback):
    """Parameters and buffers of trunk and head, at the switch and after every step of phase 2."""

    def __init__(self, guard):
        self.guard, self.trunk, self.head = guard, [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        if self.guard.phase == 2:
            state = {name: value.clone() for name, value in pl_module.state_dict().items()}
            self.trunk.append({name: value for name, value in state.items() if not name.startswith("classifier")})
            self.head.append(state["classifier.weight"])

    def check(self):
        assert self.guard.phase == 2
        assert len(self.trunk) > 3
        first = self.trunk[0]
        for later in self.trunk[1:]:
            for name, value in first.items():
                # Bits, not numbers: 0.0 == -0.0.
                assert torch.equal(bits(value), bits(later[name])), name
        assert not torch.equal(self.head[0], self.head[-1])


@pytest.fixture
def watched_run(make_trainer, make_module, make_loader):
    def run(module=None, guard=None, callbacks=(), data=None, **options):
        guard = ExpressivityGuard(switch_at=SWITCH) if guard is None else guard
        module = make_module() if module is None else module
        watch = Watch(guard)
        trainer = make_trainer([guard, watch, *callbacks], **options)
        trainer.fit(module, make_loader(data))
        watch.check()
        return guard, module, trainer

    return run


class Matrices(pl.LightningModule):
    """No parameter but matrices, as Muon wants it."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(64, 32, bias=False),
            nn.BatchNorm1d(32, affine=False),
            nn.Softplus(100),
            nn.Linear(32, 120, bias=False),
            nn.Softplus(100),
        )
        self.classifier = nn.Linear(120, 10, bias=False)
        self.loss_fn = nn.CrossEntropyLoss()

    def forward(self, x):
        return self.classifier(self.trunk(x))

    def training_step(self, batch, batch_idx):
        return self.loss_fn(self(batch[0]), batch[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_of_torch_moves_the_trunk(watched_run, make_module, name):
    kind = getattr(torch.optim, name)
    known = inspect.signature(kind).parameters
    options = OPTIONS.get(name, {"lr": 1e-3} | ({"weight_decay": 0.1} if "weight_decay" in known else {}))
    pl.seed_everything(0, verbose=False)
    module = Matrices() if name == "Muon" else make_module()
    module.configure_optimizers = lambda: kind(module.parameters(), **options)
    if name == "SparseAdam":  # which is for sparse gradients, and steps no dense network with or without the guard
        with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
            watched_run(module)
        return
    watched_run(module)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_fused_and_amsgrad_variants_neither(watched_run, make_module, amsgrad):
    module = make_module()
    module.configure_optimizers = lambda: torch.optim.AdamW(
        module.parameters(), lr=1e-3, weight_decay=0.1, amsgrad=amsgrad, fused=not amsgrad
    )
    watched_run(module)


def per_step(optimizer):
    return {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15), "interval": "step"}


def per_epoch(optimizer):
    return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}


def by_plateau(optimizer):
    return {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "train_loss"}


@pytest.mark.parametrize("schedule", [per_step, per_epoch, by_plateau])
def test_schedulers_go_on_in_phase_two(watched_run, make_module, schedule):
    module = make_module()

    def configure():
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        return {"optimizer": optimizer, "lr_scheduler": schedule(optimizer)}

    module.configure_optimizers = configure
    _, _, trainer = watched_run(module)
    if schedule is not by_plateau:
        assert trainer.optimizers[0].param_groups[0]["lr"] < 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
)
def test_accumulation_and_clipping(watched_run, options):
    watched_run(max_epochs=8, **options)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_every_precision_keeps_the_trunk_and_says_what_rounding_means_for_the_claim(
    watched_run, make_module, precision
):
    guard, _, trainer = watched_run(precision=precision)
    assert guard.certificate.verdict == "certified"
    assert guard.certificate.feature_error > 0
    low = trainer.precision not in ("32-true", "64-true")  # on a CPU Lightning takes bf16-mixed for 16-mixed
    assert ("the run computes in" in guard.reason) == low
    assert "weight decay" in guard.reason  # of the module that is used here
    assert guard.verdict == "undecided"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module(watched_run, make_module, backend):
    torch._dynamo.reset()
    plain_guard, plain, _ = watched_run(make_module(dropout=0.0))
    module = torch.compile(make_module(dropout=0.0), backend=backend)
    guard = ExpressivityGuard(switch_at=SWITCH, cache_features=True)
    with pytest.warns(UserWarning, match="the module is compiled"):
        guard, _, _ = watched_run(module, guard)
    assert guard.certificate.sigma_min.value == pytest.approx(plain_guard.certificate.sigma_min.value, rel=1e-3)
    for name, value in plain.state_dict().items():
        assert torch.allclose(value, module._orig_mod.state_dict()[name], atol=1e-5), name


def test_a_compiled_network_inside_the_module(watched_run, make_module):
    torch._dynamo.reset()
    module = make_module(dropout=0.0)
    module.trunk = torch.compile(module.trunk, backend="eager")
    guard = ExpressivityGuard(switch_at=SWITCH, cache_features=True)
    with pytest.warns(UserWarning, match="the module is compiled"):
        watched_run(module, guard)


def test_weight_averaging_is_refused(make_trainer, make_module, make_loader):
    with pytest.raises(MisconfigurationException, match=r"EMAWeightAveraging replaces the trunk.*remove one"):
        make_trainer([ExpressivityGuard(), EMAWeightAveraging()]).fit(make_module(), make_loader())


def test_several_optimizers_are_refused(make_trainer, make_module, make_loader):
    module = make_module()
    module.automatic_optimization = False
    module.configure_optimizers = lambda: [torch.optim.SGD([p], lr=0.1) for p in module.classifier.parameters()]
    with pytest.raises(MisconfigurationException, match="use automatic optimization"):
        make_trainer([ExpressivityGuard()]).fit(module, make_loader())
    module.automatic_optimization = True  # refused by Lightning, before it trains
    with pytest.raises(RuntimeError, match="multiple optimizers"):
        make_trainer([ExpressivityGuard()]).fit(module, make_loader())

    class Second(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.strategy.optimizers = 2 * trainer.optimizers

    with pytest.raises(MisconfigurationException, match=r"2 optimizers.*return one from configure_optimizers"):
        make_trainer([Second(), ExpressivityGuard()]).fit(make_module(), make_loader())


def test_the_noise_does_not_depend_on_the_runs_random_numbers_nor_touch_them(watched_run, make_module):
    states = []

    class Draw(pl.Callback):
        def on_train_end(self, *args):
            states.append(torch.rand(3))

    for seed, guard in ((0, ExpressivityGuard(switch_at=SWITCH)), (0, ExpressivityGuard(switch_at=SWITCH, seed=4))):
        watched_run(make_module(seed, dropout=0.0), guard, callbacks=[Draw()])
    assert torch.equal(*states)


@pytest.mark.parametrize("kind", ["replacement", "dropped", "reloaded"])
def test_what_an_epoch_leaves_out_is_said(make_trainer, make_module, make_loader, kind):
    data = make_loader().dataset
    options = {}
    loader = DataLoader(data, batch_size=36, drop_last=True)
    if kind == "replacement":
        loader = DataLoader(data, 32, sampler=torch.utils.data.RandomSampler(data, replacement=True))
    elif kind == "reloaded":
        loader, options = make_loader(), {"reload_dataloaders_every_n_epochs": 1}
    said = {
        "replacement": "draws with replacement",
        "dropped": "drop_last leaves out the same 24 samples",
        "reloaded": "loaded anew during the run",
    }[kind]
    guard = ExpressivityGuard(switch_at=2)
    with pytest.warns(UserWarning, match=said):
        make_trainer([guard], max_epochs=3, **options).fit(make_module(), loader)
    assert guard.phase == 2
    assert guard.verdict == "undecided"


def test_another_loss_in_the_training_step_is_found_out(make_trainer, make_module, make_loader):
    module = make_module()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05)
    step = type(module).training_step
    module.training_step = lambda batch, batch_idx: (
        step(module, batch, batch_idx) + 0.1 * module.classifier.weight.norm()
    )
    guard = ExpressivityGuard(switch_at=SWITCH)
    with pytest.warns(UserWarning, match="minimises something else than the mean of CrossEntropyLoss"):
        make_trainer([guard]).fit(module, make_loader())
    assert (guard.phase, guard.verdict) == (2, "undecided")
    assert "minimises something else" in guard.reason


@pytest.mark.parametrize("cache", [False, True])
def test_another_loss_that_sets_in_later_in_phase_2_is_found_out(make_trainer, make_module, make_loader, cache):
    module = make_module()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05)
    step = type(module).training_step

    module.late = False

    def training_step(batch, batch_idx):
        return step(module, batch, batch_idx) + module.late * 0.1 * module.classifier.weight.norm()

    def on_train_epoch_start():  # no copy of the module can tell
        module.late = module.trainer.current_epoch >= 3

    module.training_step, module.on_train_epoch_start = training_step, on_train_epoch_start
    guard = ExpressivityGuard(switch_at=SWITCH, cache_features=cache)
    with pytest.warns(UserWarning, match="minimises something else than the mean of CrossEntropyLoss"):
        make_trainer([guard], max_epochs=5).fit(module, make_loader())
    assert (guard.phase, guard.verdict) == (2, "undecided")
    assert len([each for each in guard.caveats if "minimises something else" in each]) == 1
    assert "at step 10)" in guard.reason  # the first of the fourth epoch of three batches


def test_a_clean_run_is_certified(make_trainer, make_module, make_loader):
    module = make_module()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    guard = ExpressivityGuard(switch_at=SWITCH)
    assert guard.verdict == "not applicable"
    make_trainer([guard]).fit(module, make_loader())
    assert (guard.phase, guard.verdict) == (2, "certified")


def test_a_network_with_kinks_is_named_as_such(make_trainer, make_module, make_loader):
    module = make_module()
    module.trunk[2] = nn.ReLU()
    guard = ExpressivityGuard(switch_at=SWITCH)
    make_trainer([guard]).fit(module, make_loader())
    assert guard.certificate.verdict == "certified"
    assert "not real-analytic (ReLU in trunk.2)" in guard.reason


def test_a_network_that_is_not_known_to_be_analytic_is_named_as_such(make_trainer, make_module, make_loader):
    module = make_module()
    module.trunk[2] = nn.Softsign()
    guard = ExpressivityGuard(switch_at=SWITCH)
    make_trainer([guard]).fit(module, make_loader())
    assert "not real-analytic (absolute value in trunk.2, division by values not known" in guard.reason
    module = make_module()
    module.trunk[2] = nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32))
    guard = ExpressivityGuard(switch_at=SWITCH)
    make_trainer([guard]).fit(module, make_loader())
    assert "the network is not known to be real-analytic (division by values not known to be positive" in guard.reason


def test_soft_and_smoothed_targets_have_their_entropy_as_infimum(make_trainer, make_module, make_loader):
    module = make_module()
    module.loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    guard = ExpressivityGuard(switch_at=SWITCH)
    make_trainer([guard]).fit(module, make_loader())
    smoothed = torch.full((10,), 0.01, dtype=torch.float64)
    smoothed[0] = 0.91
    entropy = -float((smoothed * smoothed.log()).sum())
    last = guard.history[-1]
    assert last["loss"] - last["gap"] == pytest.approx(entropy, rel=1e-9)
    assert last["gap"] > 0

    module = make_module()
    del module.loss_fn
    module.loss_fn = lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)
    guard = ExpressivityGuard(
        switch_at=SWITCH,
        loss_fn=module.loss_fn,
        infimum=lambda targets: torch.full((len(targets),), entropy, dtype=torch.float64),
    )
    make_trainer([guard]).fit(module, make_loader())
    assert guard.history[-1]["loss"] - guard.history[-1]["gap"] == pytest.approx(entropy, rel=1e-9)
