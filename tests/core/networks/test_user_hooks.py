"""Hooks of the user that only look do not fire on our passes; those that take part in the function do, and stay."""

import pytest
import torch
from dense_kernels import assert_same
from torch import nn
from torch.nn.utils import prune

from lightning_conv import NTKOperator, ntk_gram

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
COUNTED: list[int] = []
TOTAL = 0


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def by_autograd(model, inputs):
    """The trace kernel by autograd in float64, with the hooks that the model has."""
    model.double().eval()
    out = model(inputs.double())
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(u, parameters, retain_graph=True)]) for u in out.flatten()
    ]
    jacobian = torch.stack(rows).unflatten(0, out.shape)
    return torch.einsum("icp,jcp->ij", jacobian, jacobian)


class Counter:
    def __init__(self):
        self.calls, self.kept = 0, []

    def hook(self, module, args, output=None):
        self.calls += 1
        self.kept.append(args)

    def __call__(self, *args):
        self.calls += 1


def of_closure(model):
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    model[2].register_forward_pre_hook(lambda *_: calls.append(1))
    model.register_forward_hook(lambda module, args, kwargs, output: calls.append(1), with_kwargs=True)
    return lambda: len(calls)


def of_nonlocal(model):
    calls = 0

    def hook(*_):
        nonlocal calls
        calls += 1

    model[0].register_forward_hook(hook)
    return lambda: calls


def of_object(model):
    counter = Counter()
    model[0].register_forward_hook(counter.hook)
    model[1].register_forward_pre_hook(counter.hook)
    model[2].register_forward_hook(counter)
    return lambda: (counter.calls, len(counter.kept))


def global_list(model):
    COUNTED.clear()
    model[0].register_forward_hook(lambda *_: COUNTED.append(1))
    return lambda: len(COUNTED)


def global_number(model):
    def hook(*_):
        global TOTAL
        TOTAL += 1

    model[0].register_forward_hook(hook)
    return lambda: TOTAL


def of_module(model):
    model.seen = []
    model[0].register_forward_hook(lambda module, args, output: model.seen.append(output))
    return lambda: len(model.seen)


LOOKING = [of_closure, of_nonlocal, of_object, global_list, global_number, of_module]


@pytest.mark.parametrize("register", LOOKING)
def test_hooks_that_only_look_do_not_fire_for_us(register):
    model = network()
    count = register(model)
    model(X)
    before, hooks = count(), [dict(each._forward_hooks) for each in model.modules()]
    found = ntk_gram(model, X, precision="certified")
    ntk_gram(model, X)
    operator = NTKOperator(model, X, outputs="trace", dtype=torch.float64)
    dense = operator.dense()
    assert count() == before
    assert [dict(each._forward_hooks) for each in model.modules()] == hooks
    assert len(found.structured) == 4
    expected = by_autograd(network(), X)
    assert_same(found.matrix, expected, 1e-12)
    assert_same(dense, expected, 1e-12)


def doubles(model):
    model[0].register_forward_hook(lambda module, args, output: 2 * output)


def in_place(model):
    def triple(module, args, output):
        output.mul_(3)

    model[0].register_forward_hook(triple)


def changes_the_input(model):
    model[2].register_forward_pre_hook(lambda module, args: (args[0].sin(),))


def scales_the_gradient(model):
    """Looks like one that only looks, by its output."""

    def watch(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: 3 * gradient)

    model[1].register_forward_hook(watch)


def passes_on(model):
    """Without the first hook the second one has nothing."""
    kept = {}
    model[0].register_forward_hook(lambda module, args, output: kept.update(h=output))
    model[2].register_forward_hook(lambda module, args, output: output + kept["h"][:, :2])


def weight_norm(model):
    model[0] = nn.utils.weight_norm(model[0])


def spectral_norm(model):
    model[2] = nn.utils.spectral_norm(model[2])


def pruned(model):
    prune.l1_unstructured(model[0], "weight", 0.5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize(
    "register",
    [doubles, in_place, changes_the_input, scales_the_gradient, passes_on, weight_norm, spectral_norm, pruned],
)
def test_hooks_that_take_part_stay(register, engine):
    model = network()
    register(model)
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))  # looks
    found = ntk_gram(model, X, precision="certified", engine=engine)
    assert calls == []
    assert_same(found.matrix, by_autograd(model, X), 1e-10)


def test_a_hook_that_takes_part_counts_on_a_copy():
    model, calls = network(), []

    def hook(module, args, output):
        calls.append(1)
        return 2 * output

    model[0].register_forward_hook(hook)
    ntk_gram(model, X)
    assert calls == []


def test_a_hook_of_an_object_that_cannot_be_copied_fires_for_the_trial_alone():
    class Holder:
        def __init__(self, model):
            self.calls, self.model, self.lock = 0, model, (n for n in range(3))  # generators cannot be copied

        def hook(self, *_):
            self.calls += 1

    model = network()
    holder = Holder(model)
    model[0].register_forward_hook(holder.hook)
    found = ntk_gram(model, X, precision="certified")
    assert holder.calls <= 3
    assert_same(found.matrix, by_autograd(network(), X), 1e-12)
