"""Finding the head of a network and the features that enter it."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_conv import find_head, last_hidden_features, ntk_gram
from lightning_conv.networks.analytic import find_kinks
from lightning_conv.networks.called_by import CalledBy
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.head import Head, head_again
from lightning_conv.networks.hidden_features import features_of


class Branches(nn.Module):
    """Two linear branches on one trunk; only one of them is the result."""

    def __init__(self):
        super().__init__()
        self.trunk, self.policy, self.value = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        hidden = torch.tanh(self.trunk(x))
        self.last_value = self.value(hidden).detach()
        return self.policy(input=hidden)


class SummedBranches(Branches):
    def forward(self, x):
        hidden = torch.tanh(self.trunk(x))
        return self.policy(hidden) + self.value(hidden)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.table(tokens).mean(1))


def sequential():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


class Switching(nn.Module):
    """Ends in one of two layers, or in a clamp."""

    def __init__(self):
        super().__init__()
        self.trunk, self.first, self.second, self.end = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3), "first"

    def forward(self, x):
        hidden = torch.tanh(self.trunk(x))
        return self.first(hidden).clamp(max=0) if self.end == "clamp" else getattr(self, self.end)(hidden)


def test_a_known_head_is_seen_again_in_one_forward():
    model, inputs = Switching(), torch.randn(5, 4)
    name = find_head(model, inputs).name
    calls = []
    model.trunk.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model.first.weight.mul_(3)
    again, features = head_again(model, inputs, name)
    assert calls == [1]
    assert again == find_head(model, inputs)
    assert again.module is model.first
    assert torch.equal(features, torch.tanh(model.trunk(inputs)))


def test_a_known_head_that_is_another_one_now_is_looked_for_again():
    model, inputs = Switching(), torch.randn(5, 4)
    model.end = "second"
    assert head_again(model, inputs, "first")[0].name == "second"
    model.end = "clamp"
    with pytest.raises(ValueError, match=r"no nn\.Linear produces the module's output"):
        head_again(model, inputs, "first")
    model.end, model.first.weight = "first", model.second.weight
    with pytest.raises(ValueError, match="shares its weight"):
        head_again(model, inputs, "first")
    for unknown in ("", "gone"):
        found, features = head_again(Switching(), inputs, unknown)
        assert (found.name, features) == ("first", None)


def test_head_of_a_sequential_is_its_last_layer():
    model = sequential()
    head = find_head(model, torch.randn(5, 4))
    assert head.name == "4"
    assert head.module is model[4]
    assert head.width == 6
    assert set(head.trunk_parameters(model)) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_head_of_resnet18_is_fc():
    model = torchvision.models.resnet18(num_classes=3)
    head = find_head(model, torch.randn(2, 3, 32, 32))
    assert head.name == "fc"
    assert head.width == 512
    assert len(head.trunk_parameters(model)) == len(list(model.parameters())) - 2


def test_head_of_two_branches_is_the_one_that_is_returned():
    assert find_head(Branches(), torch.randn(5, 4)).name == "policy"


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(sequential(), nn.Softmax(1)),
        SummedBranches(),
        nn.Sequential(sequential(), nn.Dropout(0.5), nn.ReLU()),
    ],
)
def test_refused_with_candidates_where_no_linear_layer_gives_the_result(model):
    with pytest.raises(ValueError, match=r"head: no nn\.Linear produces the module's output") as error:
        find_head(model, torch.randn(5, 4))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert f'"{name}"' in str(error.value)


def test_dropout_behind_the_head_does_not_hide_it():
    assert find_head(nn.Sequential(sequential(), nn.Dropout(0.5)).train(), torch.randn(5, 4)).name == "0.4"


def test_refused_where_the_weights_are_tied():
    for name in (None, "head"):
        with pytest.raises(ValueError, match="head: 'head' shares its weight with another layer"):
            find_head(Tied(), torch.randint(0, 9, (5, 3)), name)


@pytest.mark.parametrize("reparametrize", [spectral_norm, weight_norm])
def test_refused_where_the_head_is_reparametrized(reparametrize):
    model = sequential()
    reparametrize(model[4])
    for name in (None, "4"):
        with pytest.raises(ValueError, match=r"head: '4' is reparametrized"):
            find_head(model, torch.randn(5, 4), name)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_relu_behind_positive_outputs_is_not_overlooked(inplace):
    model = nn.Sequential(sequential(), nn.ReLU(inplace))
    with torch.no_grad():
        model[0][4].bias.fill_(100.0)
    with pytest.raises(ValueError, match=r"head: "):
        find_head(model, torch.randn(5, 4))
    assert not find_head(model, torch.randn(5, 4), "0.4").last


def test_refused_where_there_is_no_linear_layer():
    with pytest.raises(ValueError, match=r"head: .*the model has none"):
        find_head(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), torch.randn(2, 1, 3, 3))


def test_an_explicit_name_is_taken():
    model = nn.Sequential(sequential(), nn.Softmax(1))
    head = find_head(model, torch.randn(5, 4), "0.4")
    assert head.module is model[0][4]
    assert not head.last
    assert find_head(model[0], torch.randn(5, 4), "4").last
    with pytest.raises(ValueError, match=r"head: '0\.2' is followed by \"0\.4\", which has parameters"):
        find_head(model, torch.randn(5, 4), "0.2")


def test_an_explicit_name_must_be_a_linear_layer_called_once_on_features():
    with pytest.raises(ValueError, match=r"head: '0\.1' is not an nn.Linear .*\"0\.4\""):
        find_head(nn.Sequential(sequential()), torch.randn(5, 4), "0.1")
    with pytest.raises(ValueError, match=r"head: '0' was called on .*need one call on a matrix"):
        find_head(nn.Sequential(nn.Linear(4, 2), nn.Flatten()), torch.randn(5, 3, 4), "0")


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_features_are_those_of_the_model_in_eval_mode(dtype):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Softplus(), nn.Linear(6, 3)).train()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    inputs = torch.randn(5, 4)
    by_hand = copy.deepcopy(model).to(dtype or torch.float32).eval()
    found = last_hidden_features(model, find_head(model, inputs), inputs, dtype=dtype)
    assert found.dtype == (dtype or torch.float32)
    assert torch.equal(found, by_hand[:4](inputs.to(found.dtype)).detach())
    assert not found.requires_grad


def test_features_of_a_head_called_by_keyword_are_found():
    model, inputs = Branches(), torch.randn(5, 4)
    features = last_hidden_features(model, find_head(model, inputs), inputs)
    torch.testing.assert_close(features, torch.tanh(model.trunk(inputs)).detach())


def test_features_of_a_layer_that_is_called_twice_are_refused():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    head = find_head(nn.Sequential(layer), torch.randn(5, 4))
    with pytest.raises(ValueError, match="head: '0' was called 2 times"):
        last_hidden_features(model, head, torch.randn(5, 4))


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_no_trace(fails, snapshot):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).train()
    model(torch.randn(5, 4)).sum().backward()
    model[1].eval()
    inputs = torch.randn(5, 4)
    head = find_head(model, inputs)

    def fail(*_):
        torch.rand(1)
        if fails:
            raise KeyError("from inside the forward")

    model[1].register_forward_hook(fail)
    before = snapshot(model)
    for call in (
        lambda: find_head(model, inputs),
        lambda: find_head(model, inputs, "3"),
        lambda: last_hidden_features(model, head, inputs),
        lambda: last_hidden_features(model, head, inputs, dtype=torch.float64),
    ):
        if fails:
            with pytest.raises(KeyError):
                call()
        else:
            call()
        assert snapshot(model) == before


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping"])
def test_called_by_hands_the_inputs_on_as_they_were_given(kind):
    model, x = sequential().double(), torch.randn(5, 4).double()
    given = {"tensor": x, "tuple": (x, torch.zeros(5).double()), "mapping": {"image": x}}[kind]
    functions = {
        "tensor": lambda module, inputs: module(inputs),
        "tuple": lambda module, inputs: module(inputs[0]),
        "mapping": lambda module, inputs: module(inputs["image"]),
    }
    gram = ntk_gram(CalledBy(model, functions[kind]), given)
    torch.testing.assert_close(gram.matrix, ntk_gram(model, x).matrix, rtol=1e-13, atol=0)


class Breaks(nn.Module):
    def forward(self, x):
        raise RuntimeError("too far")


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def test_a_forward_can_end_at_the_layer_and_leaves_no_hook_either_way():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), Breaks(), nn.Linear(5, 2)).train()
    inputs = torch.randn(6, 3)
    layer = Head("2", model[2])
    module = StatelessModule(model)
    assert torch.equal(features_of(module, layer, inputs, stop=True), model[:2](inputs))
    assert hooks_of(model) == []
    with pytest.raises(RuntimeError, match="too far"):
        features_of(module, layer, inputs)
    assert hooks_of(model) == []
    assert all(part.training for part in model.modules())
    assert torch.is_grad_enabled()


def test_looking_at_a_network_leaves_no_hook_when_its_forward_fails():
    model = nn.Sequential(nn.Linear(3, 4), Breaks())
    for look in (find_head, find_kinks):
        with pytest.raises(RuntimeError, match="too far"):
            look(model, torch.randn(2, 3))
        assert hooks_of(model) == []


def test_a_head_on_sequences_is_refused_by_its_name():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"'2' was called on \(2, 7, 6\); need one call on a matrix"):
        find_head(model, torch.randn(5, 7, 4))
