"""The step size against its limit, and the contraction predicted beside the one measured, in runs of plain SGD on squared loss."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ExpressivityGuard, KernelStability, LambdaMin, Probe

RATIO, PREDICTED, MEASURED = "kernel/step_size_ratio", "kernel/contraction_predicted", "kernel/contraction_measured"


def linear_data(outputs=1, samples=20):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randn(samples, outputs, generator=generator, dtype=torch.float64))


def whole(data):
    """The whole training set as one batch."""
    return DataLoader(data, batch_size=len(data))


class Decaying:
    """Another learning rate after every step."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize(("outputs", "kind"), [(1, "trace"), (1, "projected"), (3, "full")])
def test_for_a_linear_model_trained_on_the_whole_probe_the_prediction_is_exact(
    make_trainer, make_regression, recorder, outputs, kind, schedule
):
    cls = type("Scheduled", (Decaying, make_regression), {}) if schedule else make_regression
    data = linear_data(outputs)
    module = cls(nn.Linear(6, outputs).double(), lr=0.3)
    monitor = LambdaMin(Probe(outputs=kind), every_n_steps=4)
    make_trainer([monitor], max_epochs=14, logger=recorder, precision="64-true").fit(module, whole(data))
    predicted, measured = recorder.scalars[PREDICTED], recorder.scalars[MEASURED]
    assert list(predicted) == [4, 8, 12, 14]
    assert predicted == pytest.approx(measured, rel=1e-6)
    # The losses of the run itself are the independent measurement: in step s the loss is that after s steps.
    for then, now in ((0, 4), (4, 8), (8, 12)):
        assert measured[now] == pytest.approx(module.losses[now] / module.losses[then], rel=1e-9)
    # eta_S lambda_max / 2 with eta_S = 2 eta / (20 outputs), from the Gram matrix of [x, 1] by hand.
    design = torch.cat([data.tensors[0], torch.ones(20, 1).double()], 1)
    largest = float(torch.linalg.matrix_norm(design, 2) ** 2)
    for step, ratio in recorder.scalars[RATIO].items():
        eta = 0.3 * (0.8**step if schedule else 1)
        assert ratio == pytest.approx(2 * eta / (20 * outputs) * largest / 2, rel=1e-6)
        assert recorder.scalars[RATIO + "_lower"][step] <= ratio <= recorder.scalars[RATIO + "_upper"][step]
    assert monitor.remarks == ()


@pytest.mark.parametrize("share", [0.97, 1.03])
def test_below_one_the_run_is_stable_and_above_it_diverges(make_trainer, make_regression, recorder, share):
    data = linear_data(samples=5)
    design = torch.cat([data.tensors[0], torch.ones(5, 1).double()], 1)
    limit = 2 / float(torch.linalg.matrix_norm(design, 2) ** 2) * 5 / 2
    module = make_regression(nn.Linear(6, 1).double(), lr=share * limit)
    trainer = make_trainer([LambdaMin(every_n_steps=50)], max_epochs=200, logger=recorder, precision="64-true")
    trainer.fit(module, whole(data))
    assert recorder.scalars[RATIO][0] == pytest.approx(share, rel=1e-6)
    assert (module.losses[-1] < module.losses[0]) == (share < 1)
    assert (recorder.scalars[PREDICTED][200] < 1) == (share < 1)


def test_a_summed_loss_is_converted_by_the_batchs_size(make_trainer, make_regression, recorder):
    data = linear_data(2)
    module = make_regression(nn.Linear(6, 2).double(), lr=0.003, loss_fn=nn.MSELoss(reduction="sum"))
    monitor = LambdaMin(Probe(outputs="full"), every_n_steps=3)
    make_trainer([monitor], max_epochs=6, logger=recorder, precision="64-true").fit(module, whole(data))
    assert recorder.scalars[PREDICTED] == pytest.approx(recorder.scalars[MEASURED], rel=1e-6)
    largest = float(monitor.spectrum.lambda_max.value)
    assert recorder.scalars[RATIO][6] == pytest.approx(2 * 0.003 * largest / 2, rel=1e-6)


@pytest.mark.parametrize("summed", [False, True])
def test_a_constant_in_front_of_the_loss_counts(make_trainer, make_regression, recorder, summed):
    class Half(nn.Module):
        """3/4 of a squared error."""

        def forward(self, outputs, targets):
            squares = 0.75 * (outputs - targets).square()
            return squares.sum() if summed else squares.mean()

    data, lr = linear_data(2), 0.003 if summed else 0.1
    module = make_regression(nn.Linear(6, 2).double(), lr=lr, loss_fn=Half())
    monitor = LambdaMin(Probe(outputs="full"), every_n_steps=3)
    make_trainer([monitor], max_epochs=6, logger=recorder, precision="64-true").fit(module, whole(data))
    assert recorder.scalars[PREDICTED] == pytest.approx(recorder.scalars[MEASURED], rel=1e-6)
    numbers, largest = data.tensors[1].numel(), float(monitor.spectrum.lambda_max.value)
    on_sum = 0.75 * 2 * lr / (1 if summed else numbers)  # the step on 1/2 |u - y|^2
    assert recorder.scalars[RATIO][6] == pytest.approx(on_sum * largest / 2, rel=1e-6)


def test_a_wide_network_with_small_steps_nearly_does_what_is_predicted(make_trainer, make_regression, recorder):
    class Wide(nn.Module):
        """Two layers in the parametrisation of the NTK papers: the kernel hardly moves."""

        def __init__(self, width=4096):
            super().__init__()
            self.first = nn.Parameter(torch.randn(width, 6))
            self.second = nn.Parameter(torch.randn(width))

        def forward(self, x):
            return (torch.tanh(x @ self.first.T) @ self.second / len(self.second) ** 0.5)[:, None]

    inputs = nn.functional.normalize(torch.randn(24, 6))
    data = TensorDataset(inputs, torch.randn(24, 1))
    module = make_regression(Wide(), lr=0.4)
    make_trainer([LambdaMin(every_n_steps=20)], max_epochs=60, logger=recorder).fit(module, whole(data))
    predicted, measured = recorder.scalars[PREDICTED], recorder.scalars[MEASURED]
    assert list(predicted) == [20, 40, 60]
    assert measured[20] < 0.8  # it does learn
    for step, value in predicted.items():
        assert measured[step] == pytest.approx(value, rel=0.02)
        assert 1 - measured[step] == pytest.approx(1 - value, rel=0.05)


def test_mini_batches_of_real_digits_give_an_estimate(
    tmp_path, make_trainer, make_regression, make_loader, recorder, one_hot_digits
):
    network = nn.Sequential(nn.Linear(64, 60), nn.Softplus(10), nn.Linear(60, 10))
    module = make_regression(network, lr=0.2)
    monitor = LambdaMin(Probe(size=24, outputs="full"), every_n_steps=10)
    board = TensorBoardLogger(tmp_path)
    make_trainer([monitor], max_epochs=10, logger=[recorder, board]).fit(module, make_loader(one_hot_digits, 16))
    predicted, measured = recorder.scalars[PREDICTED], recorder.scalars[MEASURED]
    assert list(predicted) == list(measured) == list(range(10, 61, 10))
    for step, value in predicted.items():
        assert 0 < value < 1
        assert math.isfinite(measured[step])
    assert 0 < recorder.scalars[RATIO][60] < 1
    assert "estimate" in texts(board)[0]
    assert "estimate" in LambdaMin.__doc__


def test_labels_become_targets_by_target_fn(make_trainer, make_module, make_loader, recorder):
    class OneHotLoss(nn.Module):
        def forward(self, outputs, labels):
            return nn.functional.mse_loss(outputs, nn.functional.one_hot(labels, 10).float())

    def run(**settings):
        module = make_module(momentum=0.0, dropout=0.0)
        module.loss_fn = OneHotLoss()
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.01)
        monitor = LambdaMin(Probe(12, outputs="full", **settings), every_n_steps=3, loss_fn=nn.MSELoss())
        make_trainer([monitor], max_epochs=2, logger=recorder).fit(module, make_loader())
        return monitor

    assert "shape (12,) and the outputs (12, 10)" in run().remarks[0]
    assert PREDICTED not in recorder.scalars
    assert RATIO in recorder.scalars
    assert run(target_fn=lambda batch: nn.functional.one_hot(batch[1], 10)).remarks == ()
    assert list(recorder.scalars[PREDICTED]) == [3, 6]


def texts(board):
    accumulator = EventAccumulator(board.log_dir, size_guidance={"tensors": 0})
    accumulator.Reload()
    found = accumulator.Tensors("kernel/step_size/text_summary")
    return [event.tensor_proto.string_val[0].decode() for event in found]


def momentum(module):
    module.options = {"momentum": 0.9}


def decay(module):
    module.options = {"weight_decay": 1e-4}


def ascent(module):
    module.options = {"maximize": True}


def adam(module):
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters())


def groups(module):
    module.configure_optimizers = lambda: torch.optim.SGD(
        [{"params": [p], "lr": 0.01 * (k + 1)} for k, p in enumerate(module.parameters())], lr=0.1
    )


def part(module):
    module.configure_optimizers = lambda: torch.optim.SGD(module.network[2].parameters(), lr=0.1)


def huber(module):
    module.loss_fn = nn.HuberLoss()


def centred(module):
    del module.loss_fn
    module.loss_fn = lambda u, y: nn.functional.mse_loss(u - u.mean(0), y)


def own_clipping(module):
    module.__class__ = type("Clipping", (type(module),), {"configure_gradient_clipping": lambda *args, **kwargs: None})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (momentum, {}, "momentum=0.9"),
        (decay, {}, "weight_decay=0.0001"),
        (ascent, {}, "maximize=True"),
        (adam, {}, "the optimizer is Adam"),
        (groups, {}, "different learning rates"),
        (part, {}, "network.0.weight belongs to the kernel but is not trained"),
        (huber, {}, "HuberLoss"),
        (centred, {}, "loss_fn=nn.MSELoss()"),
        (own_clipping, {}, "configure_gradient_clipping"),
        (None, {"gradient_clip_val": 1.0}, "gradient_clip_val=1.0"),
        (None, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        (None, {"callbacks": [StochasticWeightAveraging(1e-2)]}, "StochasticWeightAveraging"),
    ],
)
def test_what_is_no_plain_descent_on_squared_loss_is_named_and_not_logged(
    tmp_path, make_trainer, make_regression, change, options, named
):
    module = make_regression(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double(), lr=0.1)
    if change is not None:
        change(module)
    monitor, board = LambdaMin(every_n_steps=1), TensorBoardLogger(tmp_path)
    callbacks = [monitor, *options.pop("callbacks", [])]
    trainer = make_trainer(callbacks, max_epochs=3, logger=board, precision="64-true", **options)
    trainer.fit(module, DataLoader(linear_data(), batch_size=10))
    assert len(monitor.remarks) == 1
    assert named in monitor.remarks[0]
    assert not [tag for tag in trainer.callback_metrics if "step_size" in tag or "contraction" in tag]
    assert len(texts(board)) == 1  # said once, not at every step


def test_a_kernel_over_some_of_the_parameters_is_not_that_of_the_run(make_trainer, make_regression):
    module = make_regression(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double(), lr=0.1)
    monitor = LambdaMin(Probe(parameters="network.2.*"), every_n_steps=1)
    make_trainer([monitor], max_epochs=2, precision="64-true").fit(module, whole(linear_data()))
    assert "network.0.weight is trained but not among those of the kernel" in monitor.remarks[0]


def test_groups_with_one_rate_are_plain(make_trainer, make_regression, recorder):
    module = make_regression(nn.Linear(6, 1).double(), lr=0.1)
    module.configure_optimizers = lambda: torch.optim.SGD([{"params": [p]} for p in module.parameters()], lr=0.1)
    make_trainer([LambdaMin(every_n_steps=2)], max_epochs=4, logger=recorder, precision="64-true").fit(
        module, whole(linear_data())
    )
    assert recorder.scalars[PREDICTED] == pytest.approx(recorder.scalars[MEASURED], rel=1e-6)


def test_a_step_that_was_not_plain_leaves_the_interval_out(make_trainer, make_regression, recorder):
    class Push(pl.Callback):
        """Momentum in one step only."""

        def on_train_batch_start(self, trainer, *args):
            trainer.optimizers[0].param_groups[0]["momentum"] = 0.9 if trainer.global_step == 2 else 0.0

    module = make_regression(nn.Linear(6, 1).double(), lr=0.1)
    make_trainer([Push(), LambdaMin(every_n_steps=2)], max_epochs=8, logger=recorder, precision="64-true").fit(
        module, whole(linear_data())
    )
    assert list(recorder.scalars[RATIO]) == [0, 2, 4, 6, 8]
    assert list(recorder.scalars[PREDICTED]) == [2, 6, 8]


def test_without_targets_the_contraction_is_off_and_says_so(make_trainer, make_regression, recorder):
    data = linear_data()
    inputs, targets = data.tensors
    off = LambdaMin(Probe(inputs=inputs), every_n_steps=2)
    make_trainer([off], max_epochs=4, logger=recorder, precision="64-true").fit(
        make_regression(nn.Linear(6, 1).double(), lr=0.1), whole(data)
    )
    assert PREDICTED not in recorder.scalars
    assert RATIO in recorder.scalars
    assert "target_fn" in off.remarks[0]
    on = LambdaMin(Probe(inputs=inputs, targets=targets), every_n_steps=2)
    make_trainer([on], max_epochs=4, logger=recorder, precision="64-true").fit(
        make_regression(nn.Linear(6, 1).double(), lr=0.1), whole(data)
    )
    assert recorder.scalars[PREDICTED] == pytest.approx(recorder.scalars[MEASURED], rel=1e-6)


@pytest.mark.parametrize(("kind", "tags"), [("trace", {"_lower", "_upper"}), ("sum", {"_lower"}), ("projected", set())])
def test_of_several_outputs_only_what_holds_is_logged(make_trainer, make_regression, recorder, kind, tags):
    def run(outputs):
        module = make_regression(nn.Linear(6, 3).double(), lr=0.1)
        monitor = LambdaMin(Probe(outputs=outputs), every_n_steps=5)
        make_trainer([monitor], max_epochs=1, logger=recorder, precision="64-true").fit(module, whole(linear_data(3)))
        return monitor

    remarks = run(kind).remarks
    assert {tag.removeprefix(RATIO) for tag in recorder.scalars if "step_size" in tag} == tags
    assert 'outputs="full"' in remarks[0]
    bounds = {end: recorder.scalars.pop(RATIO + end)[1] for end in tags}
    run("full")
    assert bounds.get("_lower", 0) * (1 - 1e-9) <= recorder.scalars[RATIO][1] <= bounds.get("_upper", math.inf)


def test_when_the_guard_freezes_the_trunk_the_kernel_is_no_longer_that_of_the_run(
    make_trainer, make_regression, make_loader, recorder, one_hot_digits
):
    network = nn.Sequential(nn.Linear(64, 120), nn.Softplus(10), nn.Linear(120, 10))
    monitor = LambdaMin(Probe(8, outputs="full"), every_n_steps=2)
    trainer = make_trainer([ExpressivityGuard(switch_at=4), monitor], max_epochs=3, logger=recorder)
    trainer.fit(make_regression(network, lr=0.05), make_loader(one_hot_digits))
    assert trainer.callback_metrics["guard/phase"] == 2
    assert list(recorder.scalars[RATIO]) == [0, 2]
    assert list(recorder.scalars[PREDICTED]) == [2]
    assert "network.0.weight belongs to the kernel but is not trained" in monitor.remarks[0]


def monitors():
    return [
        LambdaMin(Probe(12, outputs="full"), every_n_steps=4, per_layer="spectra"),
        KernelStability(Probe(12, outputs="full"), every_n_steps=4),
    ]


def digit_network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 20), nn.BatchNorm1d(20), nn.Softplus(10), nn.Dropout(0.1), nn.Linear(20, 10))


def test_following_the_steps_leaves_the_run_alone_bit_for_bit(
    make_trainer, make_regression, make_loader, one_hot_digits
):
    def run(callbacks):
        pl.seed_everything(0, verbose=False)
        module = make_regression(digit_network(), lr=0.1)
        trainer = make_trainer(callbacks, max_epochs=3)
        trainer.fit(module, make_loader(one_hot_digits))
        return module, torch.get_rng_state(), trainer

    plain, watched = run([]), run(monitors())
    assert PREDICTED in watched[2].callback_metrics
    assert plain[0].losses == watched[0].losses
    assert torch.equal(plain[1], watched[1])
    for (name, a), b in zip(plain[0].state_dict().items(), watched[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in watched[0].parameters())


def test_a_run_resumed_between_two_measurements_logs_the_same(
    tmp_path, make_trainer, make_regression, make_loader, one_hot_digits, recorder
):
    def module():
        network = digit_network()
        network[3].p = 0.0
        return make_regression(network, lr=0.1)

    make_trainer(monitors(), max_epochs=4, logger=recorder).fit(module(), make_loader(one_hot_digits))
    first = make_trainer(monitors(), max_epochs=2, checkpoint=True)
    first.fit(module(), make_loader(one_hot_digits))
    other = type(recorder)()
    second = make_trainer(monitors(), max_epochs=4, logger=other)
    # At step 6: two steps after a measurement.
    second.fit(module(), make_loader(one_hot_digits), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert list(other.scalars[PREDICTED]) == [8, 12]
    for tag, values in other.scalars.items():
        assert values == {step: recorder.scalars[tag][step] for step in values}, tag
