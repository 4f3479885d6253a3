"""RegularizedGradientClipping: the step is delta-GClip's, however the gradient came about, and nothing clips twice."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import LambdaMin, Probe, RegularizedGradientClipping
from lightning_conv.callbacks.clipping import total_norm


def batches(data: TensorDataset, size: int) -> DataLoader:
    return DataLoader(data, batch_size=size)


def by_hand(network, data, *, lr, gamma, delta, size, accumulate, epochs):
    """delta-GClip written out; returns parameters and |grad| of each step."""
    inputs, targets = data.tensors
    norms = []
    chunks = range(0, len(inputs), size * accumulate)
    for _ in range(epochs):
        for start in chunks:
            part = slice(start, start + size * accumulate)
            loss = nn.functional.mse_loss(network(inputs[part]), targets[part])
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
            step = lr * min(1.0, max(delta, gamma / norms[-1]))
            with torch.no_grad():
                for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                    parameter -= step * gradient
    return norms


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_delta_gclip_written_out_also_under_accumulation(
    make_trainer, make_regression, one_hot_digits, accumulate, recorder
):
    torch.manual_seed(0)
    module = make_regression(nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)), lr=0.5)
    expected = make_regression(nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)), lr=0.5).network
    expected.load_state_dict(module.network.state_dict())
    clip = RegularizedGradientClipping(gamma=0.05, delta=0.3)
    trainer = make_trainer([clip], max_epochs=3, accumulate_grad_batches=accumulate, logger=recorder)
    trainer.fit(module, batches(one_hot_digits, 24))
    norms = by_hand(expected, one_hot_digits, lr=0.5, gamma=0.05, delta=0.3, size=24, accumulate=accumulate, epochs=3)
    for ours, theirs in zip(module.network.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    logged = recorder.scalars["clipping/gradient_norm"]
    assert list(logged) == list(range(1, len(norms) + 1))
    assert list(logged.values()) == pytest.approx(norms, rel=1e-4)
    factors = [min(1.0, max(0.3, 0.05 / norm)) for norm in norms]
    assert list(recorder.scalars["clipping/step_size"].values()) == pytest.approx(
        [0.5 * factor for factor in factors], rel=1e-4
    )
    shares = [sum(f == 1 for f in factors), sum(0.3 < f < 1 for f in factors), sum(f == 0.3 for f in factors)]
    assert shares[1] > 0  # the setting does clip
    for name, share in zip(("full", "clipped", "floor"), shares, strict=True):
        assert float(trainer.callback_metrics[f"clipping/share_{name}"]) == pytest.approx(share / len(norms))


def test_delta_one_is_the_run_without_it_bit_for_bit(make_trainer, make_module, make_loader):
    def run(callbacks):
        module = make_module()
        make_trainer(callbacks, max_epochs=2).fit(module, make_loader())
        return module.state_dict()

    plain, clipped = run([]), run([RegularizedGradientClipping(gamma=1e-6, delta=1.0)])
    assert all(torch.equal(plain[name], clipped[name]) for name in plain)


def test_groups_of_parameters_are_clipped_by_one_norm(make_trainer, one_hot_digits, make_regression):
    class Groups(type(make_regression(nn.Linear(1, 1), lr=1.0))):
        def configure_optimizers(self):
            weight, bias = self.network.parameters()
            return torch.optim.SGD([{"params": [weight], "lr": 0.1}, {"params": [bias], "lr": 0.01}])

    torch.manual_seed(1)
    module = Groups(nn.Linear(64, 10), lr=0.1)
    before = [p.detach().clone() for p in module.network.parameters()]
    loss = nn.functional.mse_loss(module.network(one_hot_digits.tensors[0]), one_hot_digits.tensors[1])
    gradients = torch.autograd.grad(loss, list(module.network.parameters()))
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    with pytest.warns(UserWarning, match="different learning rates"):
        make_trainer([RegularizedGradientClipping(gamma=norm / 2, delta=0.1)], max_epochs=1).fit(
            module, batches(one_hot_digits, 96)
        )
    for parameter, start, gradient, lr in zip(module.network.parameters(), before, gradients, (0.1, 0.01), strict=True):
        assert torch.allclose(parameter, start - 0.5 * lr * gradient, rtol=1e-4, atol=1e-7)


def test_the_norm_is_that_of_unscaled_gradients_under_a_scaler(make_trainer, make_regression, one_hot_digits, recorder):
    """A scaler multiplies the loss by 2^12; what is clipped is the gradient after it was undone."""

    def run(plugins):
        torch.manual_seed(0)
        module = make_regression(nn.Linear(64, 10), lr=0.5)
        clip = RegularizedGradientClipping(gamma=0.05, delta=0.1)
        make_trainer([clip], max_epochs=2, plugins=plugins).fit(module, batches(one_hot_digits, 96))
        return clip.metrics, module.network.weight.detach()

    class ScaledFloat32(MixedPrecision):
        """The scaler without the half precision."""

        def __init__(self):
            super().__init__("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4096.0))

        def autocast_context_manager(self):
            return torch.autocast("cpu", enabled=False)

    plain, scaled = run(None), run(ScaledFloat32())
    assert scaled[0]["clipping/gradient_norm"] == pytest.approx(plain[0]["clipping/gradient_norm"], rel=1e-5)
    assert torch.allclose(scaled[1], plain[1], rtol=1e-5)
    assert plain[0]["clipping/share_full"] < 1


def test_a_resumed_run_counts_on(tmp_path, make_trainer, make_module, make_loader):
    def run(epochs, **kwargs):
        clip = RegularizedGradientClipping(gamma=0.5, delta=0.2)
        make_trainer([clip], max_epochs=epochs, checkpoint=epochs == 2).fit(
            make_module(dropout=0.0), make_loader(), **kwargs
        )
        return clip.metrics

    whole = run(4)
    run(2)
    assert run(4, ckpt_path=tmp_path / "checkpoints" / "last.ckpt") == whole


def test_the_norm_takes_half_precision_and_sparse_gradients():
    half = torch.full((10,), 3e4, dtype=torch.float16)
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([1e4, 2e4]), (4,))
    expected = (10 * float(half[0]) ** 2 + 3e4**2) ** 0.5
    assert float(total_norm([half, sparse])) == pytest.approx(expected, rel=1e-5)


def test_what_would_clip_twice_or_not_at_all_is_refused(make_trainer, make_module, make_loader):
    def fit(callbacks, module=None, **options):
        make_trainer(callbacks, max_epochs=1, **options).fit(module or make_module(), make_loader())

    clip = RegularizedGradientClipping(gamma=1.0)
    with pytest.raises(MisconfigurationException, match=r"gradient_clip_val=0.5.*remove one"):
        fit([clip], gradient_clip_val=0.5)
    with pytest.raises(RuntimeError, match="more than one stateful callback"):  # Lightning itself sees to that
        fit([clip, RegularizedGradientClipping(gamma=2.0)])

    class Own(type(make_module())):
        def configure_gradient_clipping(self, *args, **kwargs):
            pass

    with pytest.raises(MisconfigurationException, match="own configure_gradient_clipping"):
        fit([clip], Own())
    manual = make_module()
    manual.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="optimizes manually"):
        fit([clip], manual)
    with pytest.raises(MisconfigurationException, match="delta: 2"):
        RegularizedGradientClipping(gamma=1.0, delta=2)


def test_another_optimizer_is_warned_of(make_trainer, make_module, make_loader):
    with pytest.warns(UserWarning, match="SGD with momentum=0.9"):
        make_trainer([RegularizedGradientClipping(gamma=1.0)], max_epochs=1).fit(make_module(), make_loader())


def test_the_step_size_monitor_knows_that_the_step_is_clipped(make_trainer, make_regression, one_hot_digits):
    monitor = LambdaMin(Probe(8, outputs="full"), every_n_steps=1)
    make_trainer([RegularizedGradientClipping(gamma=1e-3), monitor], max_epochs=1).fit(
        make_regression(nn.Linear(64, 10), lr=0.01), batches(one_hot_digits, 48)
    )
    assert "RegularizedGradientClipping scales the gradients" in monitor.remarks[0]


def clipped(make_trainer, make_regression):
    pl.seed_everything(0, verbose=False)
    inputs, targets = torch.rand(64, 8), torch.rand(64, 3)
    network = nn.Linear(8, 3)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    clip = RegularizedGradientClipping(gamma=0.1, delta=0.01)
    data = DataLoader(TensorDataset(inputs, targets), batch_size=32)
    make_trainer([clip], max_epochs=3).fit(make_regression(network, 0.5), data)
    return {
        "data": (inputs, targets),
        "start": start,
        "end": network.state_dict(),
        "norm": float(clip.metrics["clipping/gradient_norm"]),
    }


@pytest.mark.slow
def test_two_processes_clip_by_the_norm_of_the_whole_gradient(run_on_two_processes):
    found, other = run_on_two_processes(clipped)
    assert found["norm"] == other["norm"]
    network = nn.Linear(8, 3)
    network.load_state_dict(found["start"])
    # each rank has half of the samples, so a step is one of the whole set
    data = TensorDataset(*found["data"])
    norms = by_hand(network, data, lr=0.5, gamma=0.1, delta=0.01, size=64, accumulate=1, epochs=3)
    assert found["norm"] == pytest.approx(norms[-1], rel=1e-4)
    for rank in (found, other):
        assert torch.allclose(rank["end"]["weight"], network.weight, rtol=1e-4, atol=1e-6)


def test_it_is_a_lightning_callback_that_pickles(make_trainer, make_module, make_loader):
    import pickle

    clip = pickle.loads(pickle.dumps(RegularizedGradientClipping(gamma=1.5, delta=0.2)))
    assert isinstance(clip, pl.Callback)
    assert (clip.gamma, clip.delta) == (1.5, 0.2)


@pytest.mark.parametrize("quiet", [{"log_every_n_steps": 0}, {"barebones": True}])
def test_a_trainer_that_never_logs_is_served(make_module, make_loader, quiet):
    bare = (
        {} if "barebones" in quiet else {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    )
    clip = RegularizedGradientClipping(gamma=0.05, delta=0.3)
    pl.Trainer(callbacks=[clip], accelerator="cpu", max_epochs=1, **bare, **quiet).fit(make_module(), make_loader())
    assert clip.metrics["clipping/gradient_norm"] > 0
