"""Whatever a forward writes to, the user's module and the global generators are bit for bit the same afterwards, and the kernel is
that of the function at the present state."""

import copy
import random

import numpy as np
import pytest
import torch
from dense_kernels import assert_same
from torch import nn
from writers import WRITERS, Base, NoCopy, Sometimes, X

from lightning_conv import NTKOperator, ntk_gram, plan_ntk, resolved_spectrum


def frozen(value, seen=None):
    """A value as plain data: tensors by their bytes, objects by their attributes, each object once."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        assert not torch._C._functorch.is_functorch_wrapped_tensor(value)
        return (str(value.dtype), tuple(value.shape), value.requires_grad, value.detach().numpy().tobytes())
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if id(value) in seen:
        return "seen"
    if isinstance(value, dict):
        seen.add(id(value))
        return [(str(key), frozen(each, seen)) for key, each in value.items()]
    if isinstance(value, (list, tuple, set)):
        seen.add(id(value))
        return [frozen(each, seen) for each in value]
    if (hasattr(value, "__dict__") and not callable(value)) or isinstance(value, nn.Module):
        seen.add(id(value))
        return (id(value), frozen(vars(value), seen))
    return repr(value)


def everything(model):
    """All that a module holds, and the global generators."""
    return (
        frozen(model),
        [id(p) for p in model.parameters()],
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002
    )


def by_autograd(model, inputs):
    """The trace kernel at the present state, by autograd on a copy (made by hand where there is none) in float64."""
    memo = {id(value): value for value in vars(model).values() if isinstance(value, NoCopy)}
    twin = copy.deepcopy(model, memo).double().eval()
    if type(model).__name__ in ("Lambda", "InTuple"):  # functions of the original in the copy
        twin = type(model)().double().eval()
        twin.load_state_dict(model.state_dict())
    twin.mean = twin.mean.double() if hasattr(twin, "mean") else None
    out = twin(inputs if inputs.dtype == torch.long else inputs.double())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(u, list(twin.parameters()), retain_graph=True)])
        for u in out.flatten()
    ]
    jacobian = torch.stack(rows).unflatten(0, out.shape)
    return torch.einsum("icp,jcp->ij", jacobian, jacobian)


def made(name):
    torch.manual_seed(0)
    model = WRITERS[name]()
    return model, getattr(model, "inputs", X)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
@pytest.mark.parametrize("name", WRITERS)
def test_the_module_is_the_same_and_the_kernel_is_that_of_its_present_state(name, precision, engine):
    model, inputs = made(name)
    expected = by_autograd(model, inputs)
    before = everything(model)
    gram = ntk_gram(model, inputs, precision=precision, engine=engine)
    assert everything(model) == before
    again = ntk_gram(model, inputs, precision=precision, engine=engine, plan=gram.plan)
    assert everything(model) == before
    for each in (gram, again):
        assert_same(each.matrix, expected, 1e-10 if precision == "certified" else 2e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", WRITERS)
def test_plans_spectra_and_operators_leave_it_alone(name):
    model, inputs = made(name)
    expected = by_autograd(model, inputs)
    before = everything(model)
    plan_ntk(model, inputs)
    resolved_spectrum(model, inputs)
    assert everything(model) == before
    if name == "MaxNormBag":  # torch has no second derivative of bags
        return
    operator = NTKOperator(model, inputs, outputs="trace", dtype=torch.float64)
    assert everything(model) == before
    assert_same(operator.dense(), expected, 1e-9)
    assert everything(model) == before


def test_an_operator_keeps_the_state_of_its_time():
    model, inputs = made("Counter")
    expected = by_autograd(model, inputs)
    operator = NTKOperator(model, inputs, outputs="trace", dtype=torch.float64)
    model.calls = 100
    assert_same(operator.dense(), expected, 1e-9)


@pytest.mark.parametrize("copied", [True, False])
def test_errors_leave_it_alone(copied):
    class Fails(Base):
        def __init__(self):
            super().__init__()
            self.calls, self.seen, self.mean, self.handle = 0, [], torch.zeros(5), None if copied else NoCopy()

        def forward(self, x):
            self.calls += 1
            self.seen.append(x)
            self.mean.add_(1)
            self.a.weight.data.mul_(2)
            random.random()
            np.random.rand()  # noqa: NPY002
            if len(x) == 1:
                raise RuntimeError("one sample")
            return super().forward(x)

    model = Fails()
    before = everything(model)
    for each in (ntk_gram, plan_ntk, resolved_spectrum, NTKOperator):
        with pytest.raises(RuntimeError, match="one sample"):
            each(model, X)
        assert everything(model) == before


def test_a_hidden_state_of_this_batch_is_refused_as_it_couples():
    model, inputs = made("Hidden")
    model(inputs)
    before = everything(model)
    with pytest.raises(ValueError, match="samples couple"):
        ntk_gram(model, inputs)
    assert everything(model) == before
    fewer = inputs[:5]
    assert_same(ntk_gram(model, fewer, precision="certified").matrix, by_autograd(model.double(), fewer), 1e-10)


def test_a_forward_that_is_random_by_python_or_numpy_is_refused():
    class Random(Base):
        draw = staticmethod(random.random)

        def forward(self, x):
            return super().forward(x) * (1 + self.draw())

    class RandomByNumPy(Random):
        draw = staticmethod(np.random.rand)

    for kind in (Random, RandomByNumPy):
        model = kind()
        before = everything(model)
        with pytest.raises(ValueError, match="random"):
            ntk_gram(model, X)
        assert everything(model) == before


@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
@pytest.mark.parametrize("engine", ["auto", "jacobian"])
def test_a_write_that_later_samples_cause_is_made_to_a_copy(engine, precision):
    torch.manual_seed(0)
    model = Sometimes()
    before = everything(model)
    with pytest.raises(ValueError, match="samples couple"):  # the weights of the batch depend on one of its samples
        ntk_gram(model, X, engine=engine, precision=precision)
    assert everything(model) == before


def test_layer_rules_are_used_where_only_attributes_are_written():
    for name in ("Attribute", "Counter", "Collects", "Metrics", "Draws"):
        model, inputs = made(name)
        assert len(ntk_gram(model, inputs).structured) == len(list(model.parameters()))


def test_gradients_of_the_run_are_kept():
    model = Base()
    model(X).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    ntk_gram(model, X)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
