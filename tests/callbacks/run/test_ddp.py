"""On two processes the monitors measure the same everywhere, and the guard declines what it would decline on one."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_conv import ntk_gram
from lightning_conv.callbacks import ExpressivityGuard, KernelStability, LambdaMin, Probe


class Stream(IterableDataset):
    def __iter__(self):
        rank = torch.distributed.get_rank()
        generator = torch.Generator().manual_seed(rank)
        yield from zip(torch.rand(48, 8, generator=generator), torch.rand(48, 3, generator=generator), strict=True)


def watch_and_guard(make_trainer, make_regression):
    def network():
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Softplus(100), nn.Linear(16, 3))

    def measured(trainer, *names):
        return [float(trainer.callback_metrics[f"kernel/{name}"]) for name in names]

    found = {}
    pl.seed_everything(0, verbose=False)
    labelled = TensorDataset(torch.rand(64, 8), torch.randint(0, 3, (64,)))
    # The probe is half of the samples: the same half on both ranks.
    trainer = make_trainer([kind(32, max_overhead=0.9) for kind in (KernelStability, LambdaMin)], max_epochs=3)
    module = make_regression(network(), 0.05, nn.CrossEntropyLoss())
    trainer.fit(module, DataLoader(labelled, batch_size=8, shuffle=True))
    found["kernel"] = measured(trainer, "lambda_min", "relative_frobenius_change")

    data = DataLoader(TensorDataset(torch.rand(64, 8), torch.rand(64, 3)), batch_size=32)  # both ranks: the whole set
    follow = LambdaMin(Probe(64, outputs="full"), every_n_steps=2, per_layer="spectra")
    trainer = make_trainer([follow], max_epochs=3)
    trainer.fit(make_regression(nn.Linear(8, 3), 0.05), data)
    found["contraction"] = measured(trainer, "contraction_predicted", "contraction_measured", "lambda_min_layers")

    # The first batch of an iterable data set differs from rank to rank; that of the first one is measured on both.
    stream = LambdaMin(every_n_steps=2)
    trainer = make_trainer([stream], max_epochs=1, limit_train_batches=3)
    trainer.fit(make_regression(nn.Linear(8, 3), 0.05), DataLoader(Stream(), batch_size=16))
    found["stream"] = [*measured(trainer, "lambda_min", "trace"), float(stream.state_dict()["inputs"].sum())]

    guard = ExpressivityGuard()
    module = make_regression(network(), 0.05, nn.CrossEntropyLoss())
    make_trainer([guard], max_epochs=3).fit(module, DataLoader(labelled, batch_size=8))
    found["guard"] = [guard.phase, guard.reason]
    return found


def test_monitors_and_guard_agree_on_both_ranks(run_on_two_processes):
    found, other = run_on_two_processes(watch_and_guard)
    assert found == other
    lambda_min, change = found["kernel"]
    assert lambda_min > 0
    assert change > 0
    predicted, measured, _ = found["contraction"]
    assert predicted == pytest.approx(measured, rel=1e-4)
    assert measured < 1
    rows = torch.rand(48, 8, generator=torch.Generator().manual_seed(0))[:16]
    assert found["stream"][2] == pytest.approx(float(rows.sum()))
    phase, reason = found["guard"]
    assert phase == 1
    assert "too narrow" in reason


def divided(make_trainer, make_regression):
    """Measure with running statistics, which differ between the ranks before they are made alike, and all at once."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    probe = Probe(inputs=torch.rand(30, 8, generator=torch.Generator().manual_seed(3)), batch_norm="eval")
    monitor = LambdaMin(probe, every_n_steps=4)
    data = DataLoader(TensorDataset(torch.rand(64, 8), torch.rand(64, 3)), batch_size=8)
    make_trainer([monitor], max_epochs=1).fit(make_regression(network, 0.05), data)
    gram = ntk_gram(network.eval(), probe.inputs)
    return {
        name: float(value) for name, value in monitor._metrics.items() if name in ("kernel/trace", "kernel/lambda_max")
    } | {
        "true trace": float(gram.matrix.trace()),
        "true lambda_max": float(torch.linalg.eigvalsh(gram.matrix)[-1]),
    }


def test_the_ranks_share_one_kernel(run_on_two_processes):
    found, other = run_on_two_processes(divided)
    assert {"kernel/trace", "kernel/lambda_max"} <= found.keys()
    assert found["kernel/trace"] == other["kernel/trace"]
    assert found["kernel/trace"] == pytest.approx(found["true trace"], rel=1e-5)  # of the first rank's statistics
    assert found["kernel/lambda_max"] == pytest.approx(found["true lambda_max"], rel=1e-5)
