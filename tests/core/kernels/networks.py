"""Small networks, each with something that a kernel can get wrong; ``cases`` pairs them with inputs."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# --- weights that are shared, tied, unused or used by hand


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder transposed: one weight, once as it is and once through ``t()``."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(5, 3)
        self.decoder_bias = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.decoder_bias)


class TiedModules(nn.Module):
    """One weight in two linear layers, with a bias each."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, a, b):
        return self.head(torch.tanh(self.left(a)) * self.right(b))


class Words(nn.Module):
    """A bag of words of any length."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(torch.tanh(self.table(tokens)).sum(1))


class TiedWords(nn.Module):
    """A table of words that is the weight of the head as well, with a bias; ``twice``: without one, and both are called twice."""

    def __init__(self, twice=False, padding=None):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4, padding_idx=padding), nn.Linear(4, 7, bias=not twice)
        self.head.weight = self.table.weight
        self.twice = twice

    def forward(self, tokens):
        x = torch.tanh(self.table(tokens))
        if self.twice:
            return torch.cat([self.head(x), self.head(torch.sin(x + self.table(tokens.flip(1))))], 1)
        return self.head(x)


class LowRank(nn.Module):
    """A frozen layer with a low-rank term whose second factor is zero, as at the start, and a layer over positions."""

    def __init__(self):
        super().__init__()
        self.frozen, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.frozen.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(2, 4))
        self.lora_B = nn.Parameter(torch.zeros(5, 2))

    def forward(self, x):
        return self.head(torch.tanh(self.frozen(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)))


def randomise_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


def convolutional():
    return randomise_statistics(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.Softplus(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(12, 4, bias=False),
            nn.BatchNorm1d(4),
            nn.Tanh(),
            nn.Linear(4, 2),
        )
    )


# --- forwards that no layer rule or no transform sees through


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.sin(self.layer(x)))))


class SequenceFirst(nn.Module):
    """Takes (n, T, E) and works on (T, n, E): with T = n the first dimension looks like the sample and is not."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = torch.tanh(self.embed(x.transpose(0, 1)))
        return self.head(hidden.cumsum(0)[-1] + hidden[0])


class ReadsValues(nn.Module):
    """Looks at a number inside forward, which torch.func.vmap refuses."""

    def __init__(self):
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.rand(4) + 0.5), nn.Linear(4, 2)

    def forward(self, x):
        if not float(x.abs().max()) < 1e6:
            raise ValueError("too large")
        return self.layer(torch.tanh(x * self.scale))


class BareParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(2))
        self.unused = nn.Parameter(torch.randn(3))
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x * self.scale) * self.scale[:2].exp() + self.shift


class WeightAlsoPenalised(nn.Module):
    """A linear layer whose weight enters the output a second time, outside of the layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x) + self.layer.weight.square().sum() * x[:, :2]


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        hidden = self.first(x)
        hidden.clamp_(min=0).mul_(2)
        return self.second(hidden)


def mlp(*widths, activation=nn.Tanh):
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def partly_frozen():
    model = mlp(4, 5, 5, 2)
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    return model


# --- layouts of images


class ViewFirst(nn.Module):
    """An MLP on CIFAR-like images, as it is often written."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3 * 4 * 4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x.view(len(x), -1))))


class ViewAfterConvolution(nn.Module):
    """A LeNet: its features keep the layout of the images, and ``view`` wants them channels first."""

    def __init__(self, channels=3):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 4, 3), nn.Conv2d(4, 3, 2)
        self.head = nn.Linear(3 * 2 * 2, 2)

    def forward(self, x):
        x = torch.tanh(nn.functional.max_pool2d(self.first(x), 2))
        return self.head(torch.tanh(self.second(x)).view(x.size(0), -1))


class Asserts(ViewFirst):
    def forward(self, x):
        assert x.is_contiguous()
        return super().forward(x)


class Doubling(torch.autograd.Function):
    """Takes any layout on the way forward, and one on the way back."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient.view(len(gradient), -1).view(gradient.shape)


class ViewsBackwards(ViewAfterConvolution):
    def forward(self, x):
        features = Doubling.apply(self.first(x))
        return self.head(self.second(torch.tanh(features)).mean((2, 3)).repeat(1, 4))


# --- samples that couple


class Reused(nn.Module):
    """One BatchNorm twice in a forward, a bare and an unused parameter, and dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.norm, self.drop = nn.BatchNorm1d(4, track_running_stats=False), nn.Dropout(0.5)
        self.shift, self.unused = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return self.head(self.drop(torch.sin(self.norm(torch.tanh(self.norm(self.first(x))) + self.shift))))


class CentredCubes(nn.Module):
    """Samples couple without any BatchNorm, through an operator that vmap has no rule for."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return Cubed.apply(self.layer(x) - self.layer(x).mean(0))


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        if not float(gradient.abs().max()) < 1e6:  # vmap cannot read a value
            raise ValueError("too large")
        return 3 * x**2 * gradient


# --- ways that depend on the sample


class Expert(nn.Module):
    """``x @ W`` (no layer rule) for the samples whose first feature is positive, and a parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.shared, self.expert = nn.Linear(4, 2), nn.Parameter(torch.randn(4, 2))
        self.nothing = nn.Parameter(torch.randn(3))

    def extra(self, x):
        return x @ self.expert

    def forward(self, x):
        outputs, chosen = self.shared(x), (x[:, 0] > 0).nonzero()[:, 0]
        return outputs.index_add(0, chosen, self.extra(x[chosen])) if len(chosen) else outputs


class Gated(Expert):
    """The expert is called for every batch, by a rule, and dropped where no sample is sent to it."""

    def __init__(self):
        super().__init__()
        self.expert = nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        extra, chosen = F.linear(x, self.expert), x[:, :1] > 0
        return self.shared(x) + chosen * extra if bool(chosen.any()) else self.shared(x)


class Again(Expert):
    """The expert is the shared layer itself, transposed: one more use of a parameter that has a rule."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)

    def extra(self, x):
        return torch.tanh(x) @ self.shared.weight.t()


class AgainByRule(Expert):
    """One more call of the shared layer, which the outputs depend on for some samples only."""

    def forward(self, x):
        twice, chosen = self.shared(torch.tanh(x)), x[:, :1] > 0
        return self.shared(x) + chosen * twice if bool(chosen.any()) else self.shared(x)


class Called(Expert):
    """An expert with a rule that is called for some batches only."""

    def __init__(self):
        super().__init__()
        del self.expert
        self.expert = nn.Linear(4, 2)

    def extra(self, x):
        return self.expert(x)


def sent_to_the_expert(n, *chosen):
    """Of n samples, those that go to the expert."""
    inputs = torch.randn(n, 4).double()
    inputs[:, 0] = -inputs[:, 0].abs()
    inputs[list(chosen), 0] *= -1
    return inputs


# --- positions


class CalledAtPositions(nn.Module):
    """A convolution, a layer that is called twice, and a layer at every position."""

    def __init__(self):
        super().__init__()
        self.convolution, self.twice = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        hidden = torch.tanh(self.convolution(x)).flatten(2).mT
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(hidden)))).mean(1))


class Positions(nn.Module):
    """Adds what does not depend on the sample: a table of learned positions, or a network of the time."""

    def __init__(self, kind, length):
        super().__init__()
        self.kind, self.length = kind, length
        self.table, self.head = nn.Embedding(length, 3), nn.Linear(3, 2)
        self.embed, self.clock = nn.Linear(2, 3), nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        if self.kind == "table":
            place = self.table(torch.arange(self.length))
        else:
            times = torch.linspace(0, 1, self.length, dtype=x.dtype)[:, None]
            place = self.clock(times if self.kind == "network" else times[None])
        return self.head(torch.tanh(self.embed(x) + place).sum(1))


# --- two names


class TwoNames(nn.Module):
    """Its parts, and a container of the same parts."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.head = nn.Linear(5, 2)
        self.net = nn.Sequential(self.trunk, self.head)

    def forward(self, x):
        return self.net(x)


# --- in the middle of a run


def lived_in_model():
    """Gradients, mixed flags, dirty statistics and a hook: what a model looks like in the middle of a run."""
    model = convolutional().train()
    model[1].eval()
    model[8].weight.requires_grad_(False)
    model(torch.randn(6, 2, 4, 4)).sum().backward()
    model[2].register_forward_hook(lambda module, args, output: None)
    return model
