"""Under ``ModelParallelStrategy`` the monitors measure the sharded module on two processes, and what needs all weights is refused."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import (
    ConvergenceCriteria,
    ConvergenceDiagnostics,
    ExpressivityGuard,
    KernelStability,
    LambdaMin,
    Probe,
)

pytestmark = pytest.mark.slow


class Sharded(pl.LightningModule):
    def __init__(self, within):
        super().__init__()
        self.within = within
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
        )

    def configure_model(self):
        mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
        for each in self.net:
            if isinstance(each, nn.Linear):
                fully_shard(each, mesh=mesh)
        fully_shard(self if self.within else self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss((self if self.within else self.net)(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Within(Sharded):
    """Is sharded as a whole, and called as a whole."""

    def forward(self, x):
        return self.net(x)


def data():
    generator = torch.Generator().manual_seed(3)
    labelled = TensorDataset(torch.rand(64, 8, generator=generator), torch.rand(64, 3, generator=generator))
    return DataLoader(labelled, batch_size=8)


def fitted(make_trainer, callbacks, *, within=False, **options):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    module = Within(True) if within else Sharded(False)
    trainer = make_trainer(callbacks, strategy=strategy, max_epochs=2, **options)
    trainer.fit(module, data())
    weights = {name: each.full_tensor().detach() for name, each in module.state_dict().items()}
    return {name: float(value) for name, value in trainer.callback_metrics.items()}, weights


def measured(make_trainer, make_regression):
    probe = Probe(24, outputs="trace")
    monitors = [KernelStability(probe, every_n_steps=2), LambdaMin(probe, every_n_steps=2)]
    found = {"plain": fitted(make_trainer, [])}
    found["monitors"] = fitted(make_trainer, monitors)
    found["inside"] = fitted(make_trainer, [KernelStability(probe, every_n_steps=2)], within=True)
    through = Probe(24, outputs="trace", forward_fn=lambda module, x: module.net(x))
    found["through"] = fitted(make_trainer, [KernelStability(through, every_n_steps=2)], within=True)
    found["all"] = fitted(make_trainer, [ConvergenceDiagnostics(probe=16)])
    return found


@pytest.fixture(scope="module")
def found(two_processes_of_the_session, tmp_path_factory):
    return two_processes_of_the_session.run(measured, tmp_path_factory.mktemp("sharded"))


def test_both_processes_measure_the_kernel_of_the_whole_module(found):
    first, second = found
    for name in ("monitors", "inside", "through", "all"):
        assert first[name][0] == pytest.approx(second[name][0], nan_ok=True)
    network, samples = Sharded(False).net, data().dataset.tensors[0]
    rows = samples[Probe(24).indices(64)]
    state = {name.removeprefix("net."): each for name, each in first["monitors"][1].items()}
    kernels = []
    for weights in (network.state_dict(), state):
        network.load_state_dict(weights)
        j = [
            torch.cat([g.flatten() for g in torch.autograd.grad(each, list(network.parameters()), retain_graph=True)])
            for x in rows
            for each in network(x)
        ]
        j = torch.stack(j).double().unflatten(0, (24, 3))
        kernels.append(torch.einsum("icp,jcp->ij", j, j))
    values = first["monitors"][0]
    change = float((kernels[1] - kernels[0]).norm() / kernels[0].norm())
    assert change > 1e-3
    assert values["kernel/relative_frobenius_change"] == pytest.approx(change, rel=1e-3)
    assert values["kernel/lambda_min"] == pytest.approx(float(torch.linalg.eigvalsh(kernels[1])[0]), rel=1e-2)
    for name in ("inside", "through"):
        assert first[name][0]["kernel/relative_frobenius_change"] == pytest.approx(change, rel=1e-3)


def test_measuring_moves_no_weight_by_a_bit(found):
    for each in found:
        for name in ("monitors", "inside", "through", "all"):
            assert all(
                torch.equal(a, b) for a, b in zip(each["plain"][1].values(), each[name][1].values(), strict=True)
            )


def test_diagnostics_measure_the_kernel_without_criteria_and_health(found):
    values = found[0]["all"][0]
    assert values["kernel/lambda_min"] >= 0
    assert not any(name.startswith(("criteria/", "health/")) for name in values)


def refused(make_trainer, make_regression):
    said = []
    for callback in (ConvergenceCriteria(), ExpressivityGuard(), LambdaMin(Probe(16), bound="net.5*")):
        try:
            fitted(make_trainer, [callback])
        except MisconfigurationException as error:
            said.append(str(error))
    try:
        fitted(make_trainer, [KernelStability(Probe(16, precision="certified"), every_n_steps=1)])
    except MisconfigurationException as error:
        said.append(str(error))
    return said


def test_what_needs_all_weights_is_refused_in_one_sentence(run_on_two_processes):
    first, second = run_on_two_processes(refused)
    assert first == second
    criteria, guard, bound, certified = first
    assert "ConvergenceCriteria: ModelParallelStrategy shards the parameters" in criteria
    assert "ModelParallelStrategy on 2 devices" in guard
    assert "bound=" in bound
    assert "sharded" in bound
    assert "no process has a copy of it in another type" in certified
