"""Small networks, each with something that a kernel can get wrong; the test files import them."""

import torch
import torch.nn.functional as F
from torch import nn


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


def randomise_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


def convolutional():
    return randomise_statistics(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(12, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2),
        )
    )  # fmt: skip


def to_double(inputs):
    if isinstance(inputs, dict):
        return {key: to_double(value) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(to_double(value) for value in inputs)
    return inputs.double() if inputs.is_floating_point() else inputs


def lived_in_model():
    """Gradients, mixed flags, dirty statistics and a hook: what a model looks like in the middle of a run."""
    model = convolutional().train()
    model[1].eval()
    model[8].weight.requires_grad_(False)
    model(torch.randn(6, 2, 4, 4)).sum().backward()
    model[2].register_forward_hook(lambda module, args, output: None)
    return model
