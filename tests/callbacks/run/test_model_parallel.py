"""Under ``ModelParallelStrategy`` the monitors measure the sharded module on two processes, and what needs all weights is refused."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
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


class Parallel(Sharded):
    """Is divided by a plan for tensor parallelism."""

    def configure_model(self):
        if self.device_mesh is not None:
            plan = {"0": ColwiseParallel(output_layouts=Replicate()), "3": ColwiseParallel(), "5": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)


def fitted(make_trainer, callbacks, *, within=False, parallel=False, **options):
    sizes = (1, 2) if parallel else (2, 1)
    strategy = ModelParallelStrategy(data_parallel_size=sizes[0], tensor_parallel_size=sizes[1])
    module = Parallel(False) if parallel else Within(True) if within else Sharded(False)
    trainer = make_trainer(callbacks, strategy=strategy, max_epochs=2, **options)
    trainer.fit(module, data())
    state = module.state_dict().items()
    weights = {name: each.full_tensor() if hasattr(each, "full_tensor") else each.clone() for name, each in state}
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
    found["default"] = fitted(make_trainer, [ConvergenceDiagnostics()])
    loss = LambdaMin(Probe(24, outputs="loss"), every_n_steps=2, loss_fn=nn.functional.mse_loss)
    found["loss"] = fitted(make_trainer, [loss])
    found["parallel plain"] = fitted(make_trainer, [], parallel=True)
    found["parallel"] = fitted(make_trainer, [LambdaMin(probe, every_n_steps=2)], parallel=True)
    return found


@pytest.fixture(scope="module")
def found(two_processes_of_the_session, tmp_path_factory):
    return two_processes_of_the_session.run(measured, tmp_path_factory.mktemp("sharded"))


def jacobian(weights):
    """Return J of the samples of the probe at some weights, (24, 3, P), the samples' outputs and their targets."""
    network = Sharded(False).net
    network.load_state_dict({name.removeprefix("net."): each for name, each in weights.items()})
    chosen = Probe(24).indices(64)
    inputs, targets = (each[chosen] for each in data().dataset.tensors)
    outputs = network(inputs)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(each, list(network.parameters()), retain_graph=True)])
        for each in outputs.flatten()
    ]
    return torch.stack(rows).double().unflatten(0, (24, 3)), outputs.detach(), targets


def trace_kernel(weights):
    j, _, _ = jacobian(weights)
    return torch.einsum("icp,jcp->ij", j, j)


def test_both_processes_measure_the_kernel_of_the_whole_module(found):
    first, second = found
    for name in first:
        assert first[name][0] == second[name][0] or "plain" in name
    kernels = [trace_kernel(Sharded(False).state_dict()), trace_kernel(first["monitors"][1])]
    values = first["monitors"][0]
    change = float((kernels[1] - kernels[0]).norm() / kernels[0].norm())
    assert change > 1e-3
    assert values["kernel/relative_frobenius_change"] == pytest.approx(change, rel=1e-3)
    assert values["kernel/lambda_min"] == pytest.approx(float(torch.linalg.eigvalsh(kernels[1])[0]), rel=1e-2)
    for name in ("inside", "through"):
        assert first[name][0]["kernel/relative_frobenius_change"] == pytest.approx(change, rel=1e-3)


def test_the_kernel_of_the_loss_is_that_of_its_gradients(found):
    values, weights = found[0]["loss"]
    j, outputs, targets = jacobian(weights)
    slope = 2 * (outputs - targets).double() / outputs.numel()
    expected = float(torch.einsum("ncp,nc->np", j, slope).square().sum())
    assert values["loss_kernel/trace"] == pytest.approx(expected, rel=1e-5)


def test_a_plan_for_tensor_parallelism_gives_the_kernel_of_the_whole_module(found):
    values, weights = found[0]["parallel"]
    assert values["kernel/trace"] == pytest.approx(float(trace_kernel(weights).trace()), rel=1e-5)


def test_measuring_moves_no_weight_by_a_bit(found):
    for each in found:
        for name in ("monitors", "inside", "through", "all", "default", "loss", "parallel"):
            plain = each["parallel plain" if name == "parallel" else "plain"][1]
            assert all(torch.equal(a, b) for a, b in zip(plain.values(), each[name][1].values(), strict=True)), name


def test_diagnostics_measure_the_kernel_without_criteria_and_health(found):
    for name in ("all", "default"):
        values = found[0][name][0]
        assert values["kernel/lambda_min"] >= 0
        assert not any(each.startswith(("criteria/", "health/")) for each in values)


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


def test_flat_pieces_are_refused_with_what_to_use(make_trainer, monkeypatch):
    trainer = make_trainer([])
    monkeypatch.setattr(trainer.strategy, "__class__", FSDPStrategy)
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy shards .* use ModelParallelStrategy"):
        LambdaMin(4).setup(trainer, Sharded(False), "fit")
