"""J w by forward mode and by the double backward, and the choice between them; J^T v vectorised and one by one."""

import re

import pytest
import torch
from kernels.networks import Recurrent
from torch import nn
from torch.autograd.function import once_differentiable

from lightning_conv.kernels import NTKOperator
from lightning_conv.kernels.products.pullback import Pullback, graph_size
from lightning_conv.kernels.products.pushforward import choose_push, push_by_double_backward, push_forward
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.undisturbed import undisturbed


class Square(torch.autograd.Function):
    """The older form of a custom function: no forward derivative, no rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Once(Square):
    """Nor a derivative of its backward, which torch then leaves out of a double backward in silence."""

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Applies(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.head, self.unused = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(2, 2)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self.layer(x)))


def reverse_gradient(x):
    """Train-mode gradients through it are those of 3 x; forward mode sees x."""
    if x.requires_grad:
        x.register_hook(lambda gradient: 3 * gradient)
    return x + 0


class OneByOne(torch.autograd.Function):
    """The newer form, with a forward derivative and without a rule for vmap."""

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


@pytest.mark.parametrize("function", [torch.tanh, torch.relu, nn.Softplus(), torch.sin])
def test_both_ways_agree_with_the_jacobian(function, naive_jacobian):
    model, inputs = Applies(function).double(), torch.randn(3, 4).double()
    rows = naive_jacobian(model, inputs)
    with undisturbed(model):
        module = StatelessModule(model)
        generator = torch.Generator().manual_seed(2)
        shapes = {name: parameter.shape for name, parameter in module.parameters.items()}
        directions = {n: torch.randn(4, *s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
        flat = torch.cat([direction.flatten(1) for direction in directions.values()], 1)
        expected = (flat @ rows.T).reshape(4, 3, 2)
        for found in (
            push_forward(module, inputs, directions, batched=True),
            push_forward(module, inputs, directions, batched=False),
            push_by_double_backward(module, inputs, directions),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            assert not found.requires_grad


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("function", [torch.tanh, Square.apply, Once.apply])
def test_pullback_vectorised_and_one_by_one(function, batched, naive_jacobian):
    model, inputs = Applies(function).double(), torch.randn(3, 4).double()
    rows = naive_jacobian(model, inputs)
    with undisturbed(model):
        module = StatelessModule(model)
        pullback = Pullback(module, module.trainable, inputs, batched=batched)
        vectors = torch.randn(4, 3, 2, dtype=torch.float64)
        found = torch.cat([gradient.flatten(1) for gradient in pullback(vectors).values()], 1)
        torch.testing.assert_close(found, vectors.flatten(1) @ rows, rtol=1e-12, atol=1e-12)
        assert set(pullback.reached()) == {"layer.weight", "layer.bias", "head.weight", "head.bias"}
        part = pullback(vectors, ["head.bias"])
    assert {name: value.shape for name, value in part.items()} == {"head.bias": (4, 2)}


def test_pullback_goes_one_by_one_where_vmap_cannot_and_says_why(naive_jacobian):
    class Reads(Square):
        @staticmethod
        def backward(ctx, gradient):
            assert float(gradient.abs().max()) < 1e6
            return 2 * ctx.saved_tensors[0] * gradient

    model, inputs = Applies(Reads.apply).double(), torch.randn(3, 4).double()
    with undisturbed(model):
        module = StatelessModule(model)
        pullback = Pullback(module, module.trainable, inputs, batched=True)
        vectors = torch.randn(4, 3, 2, dtype=torch.float64)
        found = torch.cat([gradient.flatten(1) for gradient in pullback(vectors).values()], 1)
    torch.testing.assert_close(found, vectors.flatten(1) @ naive_jacobian(model, inputs), rtol=1e-12, atol=1e-12)
    assert not pullback.batched
    assert "aten::item" in pullback.reason


def chosen(model, inputs):
    with undisturbed(model):
        module = StatelessModule(model)
        return choose_push(module, module.trainable, module.convert(inputs))


def test_forward_mode_is_chosen_where_it_works(naive_gram):
    push = chosen(Applies(torch.tanh), torch.randn(3, 4))
    assert (push.method, push.reason, push.vectorises) == ("forward mode", None, True)
    model, inputs = Applies(OneByOne.apply).double(), torch.randn(3, 4).double()
    push = chosen(model, inputs)
    assert (push.method, push.reason, push.vectorises) == ("forward mode", None, False)
    torch.testing.assert_close(NTKOperator(model, inputs).dense(), naive_gram(model, inputs, "full"))


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (lambda: Recurrent().float(), (3, 5, 3), "NotImplementedError.*forward AD"),
        (lambda: Applies(Square.apply), (3, 4), "RuntimeError.*functorch"),
        (lambda: Applies(reverse_gradient), (3, 4), r"it gives <u, J w> = .* the backward gives <J\^T u, w> = "),
    ],
)
def test_double_backward_takes_over_with_the_reason(model, shape, reason, naive_gram):
    model, inputs = model(), torch.randn(*shape)
    operator = NTKOperator(model, inputs)
    assert operator.jvp_method == "double backward"
    assert re.search(reason, operator.jvp_reason, flags=re.DOTALL)
    truth = naive_gram(model, inputs, "full")
    assert float((operator.dense() - truth).abs().max()) <= 1e-5 * float(truth.abs().max())
    # The kernel is that of the backward, chunk by chunk and for parameters that nothing depends on, too.
    parts = NTKOperator(model, inputs, chunk=2).dense()
    assert float((parts - truth).abs().max()) <= 1e-5 * float(truth.abs().max())


def test_double_backward_of_what_depends_on_no_parameter_is_zero():
    operator = NTKOperator(Applies(Square.apply), torch.randn(3, 4), parameters="unused.*")
    assert float(operator.dense().abs().max()) == 0
    with undisturbed(model := Applies(Square.apply)):
        module = StatelessModule(model)
        nothing = push_by_double_backward(module, torch.randn(3, 4), {"unused.bias": torch.randn(2, 2)})
    assert nothing.shape == (2, 3, 2)
    assert float(nothing.abs().max()) == 0


def test_what_neither_can_do_is_refused_with_both_reasons():
    with pytest.raises(RuntimeError, match=r"model: J w .*forward mode \(RuntimeError.*\) nor by a double backward \("):
        NTKOperator(Applies(Once.apply), torch.randn(3, 4))


# --- the graph's size -----------------------------------------------------------------------------------------------


def test_graph_size_counts_what_autograd_keeps_beside_the_model():
    # The inputs for the weight's gradient, tanh's result (also the head's input), and nothing else; float64.
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    with undisturbed(model):
        module = StatelessModule(model)
        inputs = torch.randn(7, 4).double()
        size = graph_size(module, module.trainable, inputs)
        assert (size.saved_bytes, size.largest, size.outputs) == (7 * (4 + 5) * 8, 35, 2)
        assert graph_size(module, ["2.bias"], inputs).saved_bytes == 0
        assert graph_size(module, module.trainable, inputs, limit=7 * 9 * 8) == size
        with pytest.raises(MemoryError, match="max_memory: the activations of the batch"):
            graph_size(module, module.trainable, inputs, limit=7 * 9 * 8 - 1)


def test_graph_size_of_a_forward_that_differentiates_inside():
    class Slope(nn.Module):
        """Returns the derivative of its layer by the inputs."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x):
            return torch.func.vmap(torch.func.grad(lambda row: torch.tanh(self.layer(row)).sum()))(x)

    model, inputs = Slope().double(), torch.randn(4, 3).double()
    operator = NTKOperator(model, inputs)
    rows = []
    for value in model(inputs).flatten():
        found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    rows = torch.stack(rows)
    torch.testing.assert_close(operator.dense(), rows @ rows.T)
