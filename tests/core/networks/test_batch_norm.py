"""``batch_norm="batch"``: train-mode BatchNorm in a network that is otherwise in eval mode, without side effects."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.undisturbed import undisturbed


class Mixed(nn.Module):
    """BatchNorm of every kind, one of them called twice and one nested, beside layers that must stay in eval mode."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1), norm(3)
        self.instance = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
        self.drop = nn.Dropout(0.5)
        self.shared = nn.BatchNorm1d(12, momentum=None)
        self.tail = nn.Sequential(nn.Linear(12, 12), nn.Sequential(nn.BatchNorm1d(12), nn.Tanh()), nn.Linear(12, 2))

    def forward(self, x):
        hidden = F.avg_pool2d(F.softplus(self.instance(self.norm(self.conv(x)))), 2).flatten(1)
        return self.tail(self.shared(torch.tanh(self.shared(self.drop(hidden)))))


KINDS = {
    "tracked": nn.BatchNorm2d,
    "cumulative average": lambda width: nn.BatchNorm2d(width, momentum=None),
    "not tracked": lambda width: nn.BatchNorm2d(width, track_running_stats=False),
    "without weights": lambda width: nn.BatchNorm2d(width, affine=False),
    "synchronised": nn.SyncBatchNorm,
}


@pytest.fixture(autouse=True)
def _matmul_precision_is_set():
    """Normalise the setting, for which torch reports another word before its first use."""
    torch.set_float32_matmul_precision("highest")


def build(kind):
    model = Mixed(KINDS[kind]).double()
    with torch.no_grad():  # dirty statistics everywhere, so that using them would show
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2)
    return model.train(), torch.randn(6, 2, 4, 4, dtype=torch.float64)


def batch_outputs(model, inputs):
    with undisturbed(model):
        module = StatelessModule(model, batch_norm="batch")
        return module.outputs({}, module.convert(inputs)).detach()


def by_hand(model, inputs):
    """A copy with train-mode BatchNorm, and everything else set to eval."""
    twin = copy.deepcopy(model).eval()
    if isinstance(twin.norm, nn.SyncBatchNorm):  # which computes on a GPU only
        plain = nn.BatchNorm2d(3).double()
        plain.load_state_dict(twin.norm.state_dict())
        twin.norm = plain
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return twin(inputs).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_is_batch_norm_in_train_mode_and_nothing_else(kind, snapshot):
    model, inputs = build(kind)
    before = snapshot(model)
    tracks = [getattr(module, "track_running_stats", None) for module in model.modules()]
    found = batch_outputs(model, inputs)
    torch.testing.assert_close(found, by_hand(model, inputs), rtol=1e-13, atol=1e-13)
    assert snapshot(model) == before
    assert [getattr(module, "track_running_stats", None) for module in model.modules()] == tracks
    assert all("forward" not in vars(module) for module in model.modules())


def test_differs_from_eval_and_depends_on_the_rest_of_the_batch():
    model, inputs = build("tracked")
    whole, part = batch_outputs(model, inputs), batch_outputs(model, inputs[:3])
    assert float((whole[:3] - part).abs().max()) > 1e-3
    with undisturbed(model):
        evaluated = StatelessModule(model).outputs({}, inputs)
    assert float((whole - evaluated).abs().max()) > 1e-3


def test_synchronised_batch_norm_exchanges_nothing_where_processes_are_connected(tmp_path, monkeypatch):
    # In train mode it would ask the group for its size, refuse the CPU, and wait for the others on a GPU.
    model, inputs = build("synchronised")
    expected = by_hand(model, inputs)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
        with pytest.raises(ValueError, match="expected input tensor to be on GPU"):
            copy.deepcopy(model).train()(inputs)
        torch.testing.assert_close(batch_outputs(model, inputs), expected, rtol=1e-13, atol=1e-13)
    finally:
        torch.distributed.destroy_process_group()


def test_flags_and_an_own_forward_come_back_after_an_error(snapshot):
    model, inputs = build("synchronised")
    own = model.norm.forward
    model.norm.forward = own
    model.tail[2].register_forward_pre_hook(lambda module, args: 1 / 0)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        batch_outputs(model, inputs)
    assert snapshot(model) == before
    assert model.norm.track_running_stats
    assert vars(model.norm)["forward"] is own


@pytest.mark.parametrize("mode", ["eval", "frozen"])
def test_other_modes_refuse_layers_that_do_not_track(mode):
    model, inputs = build("not tracked")
    with (
        undisturbed(model),
        pytest.raises(ValueError, match=r"without running statistics \(norm\).*batch_norm=\"batch\""),
    ):
        StatelessModule(model, batch_norm=mode, statistics_of=inputs)


def test_one_value_a_channel_is_refused_as_in_training():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        batch_outputs(model, torch.randn(1, 3))


class Once(nn.Module):
    """Two BatchNorms, one under two names, each called once."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)
        self.tail = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(2))
        self.again, self.calls = self.norm, 0

    def forward(self, x):
        self.calls += 1
        return self.tail(self.last(torch.relu(self.norm(self.first(x)))))


def test_statistics_that_are_known_give_the_same_function_without_a_forward():
    torch.manual_seed(0)
    model, inputs, others = Once(), torch.randn(7, 3), torch.randn(4, 3)
    with undisturbed(model), torch.no_grad():
        found = StatelessModule(model, batch_norm="frozen", statistics_of=inputs)
        calls = model.calls
        known = StatelessModule(model, batch_norm="frozen", statistics_of=found.statistics)
        assert model.calls == calls
        assert torch.equal(known.outputs({}, others), found.outputs({}, others))
        assert torch.equal(found.statistics.made, found.outputs({}, inputs))
        assert not known.outputs({}, others).allclose(StatelessModule(model).outputs({}, others))
    with torch.no_grad():  # as training mode computes it on this batch
        torch.testing.assert_close(found.statistics.made, copy.deepcopy(model).train()(inputs))


def test_statistics_belong_to_one_evaluation_and_are_not_changed_by_another():
    model, inputs = Once(), torch.randn(7, 3)
    with undisturbed(model):
        found = StatelessModule(model, batch_norm="frozen", statistics_of=inputs)
        kept = {name: each.clone() for name, each in found.statistics.buffers.items()}
        assert kept.keys() == {
            f"{layer}.{kind}" for layer in ("norm", "tail.1") for kind in ("running_mean", "running_var")
        }
        wide = StatelessModule(model, dtype=torch.float64, batch_norm="frozen", statistics_of=found.statistics)
        for buffer in (*found.buffers.values(), *wide.buffers.values()):
            buffer.zero_()
    assert all(torch.equal(each, found.statistics.buffers[name]) for name, each in kept.items())
    assert StatelessModule(model).statistics is None
