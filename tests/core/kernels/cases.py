"""The matrix of networks that drives the tests of the kernels: each case is a network with inputs, known by its name.

``CASES`` are networks whose samples do not couple, which ``test_cases`` sends through everything that a kernel promises. ``COUPLED`` are
those whose samples couple in train mode, ``LAYOUTS`` those of ``CASES`` that insist on a layout of their images.
"""

from functools import cache

import torch
from dense_kernels import naive_jacobian, reduced_rows
from kernels.networks import (
    Asserts,
    BareParameter,
    CalledAtPositions,
    CalledTwice,
    CentredCubes,
    Expert,
    Gated,
    InPlace,
    LowRank,
    Positions,
    ReadsValues,
    Recurrent,
    Reused,
    SequenceFirst,
    TiedAutoencoder,
    TiedModules,
    TiedWords,
    Transformer,
    TwoInputs,
    TwoNames,
    ViewAfterConvolution,
    ViewFirst,
    ViewsBackwards,
    WeightAlsoPenalised,
    Words,
    convolutional,
    mlp,
    partly_frozen,
    sent_to_the_expert,
)
from torch import nn


def rand(*shape):
    return torch.randn(*shape)


def tokens(*shape):
    return torch.randint(0, 7, shape)


LAYOUTS = {
    "view": lambda: (ViewFirst(), rand(6, 3, 4, 4)),
    "view after a convolution": lambda: (ViewAfterConvolution(), rand(6, 3, 8, 8)),
    "an assertion about the layout": lambda: (Asserts(), rand(6, 3, 4, 4)),
    "view in a backward pass": lambda: (ViewsBackwards(), rand(6, 3, 5, 5)),
}

CASES = {
    "mlp": lambda: (mlp(4, 6, 5, 3), rand(6, 4)),
    "mlp with dropout": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 3)),
        rand(6, 4),
    ),
    "one sample": lambda: (mlp(4, 6, 3), rand(1, 4)),
    "linear layer over a sequence": lambda: (nn.Sequential(mlp(3, 4, 2), nn.Flatten()), rand(5, 3, 3)),
    "cnn with batch norm": lambda: (convolutional(), rand(5, 2, 4, 4)),
    "cnn of one channel": lambda: (ViewAfterConvolution(1), rand(5, 1, 8, 8)),
    "convolution, then a layer called twice at every position": lambda: (CalledAtPositions(), rand(6, 2, 5, 5)),
    "transformer": lambda: (Transformer(), rand(5, 3, 6)),
    "tied weights, transposed": lambda: (TiedAutoencoder(), rand(5, 5)),
    "tied weights, two modules": lambda: (TiedModules(), rand(5, 4)),
    "modules with two names": lambda: (TwoNames(), rand(4, 3)),
    "module called twice": lambda: (CalledTwice(), rand(5, 4)),
    "sequence first, T = n = 3": lambda: (SequenceFirst(), rand(3, 3, 3)),
    "sequence first, T = n = 5": lambda: (SequenceFirst(), rand(5, 5, 3)),
    "sequence first, T = 3, n = 5": lambda: (SequenceFirst(), rand(5, 3, 3)),
    "lstm": lambda: (Recurrent(), rand(5, 3, 3)),
    "table of positions": lambda: (Positions("table", 4), rand(7, 4, 2)),
    "network of the time": lambda: (Positions("network", 3), rand(7, 3, 2)),
    "network of the time, a batch of one": lambda: (Positions("network of a batch of one", 3), rand(7, 3, 2)),
    "vmap cannot": lambda: (ReadsValues(), rand(5, 4)),
    "bare and unused parameters": lambda: (BareParameter(), rand(5, 4)),
    "weight used outside its layer": lambda: (WeightAlsoPenalised(), rand(5, 4)),
    "in-place activation": lambda: (InPlace(), rand(5, 4)),
    "partly frozen": lambda: (partly_frozen(), rand(5, 4)),
    "weight normalisation": lambda: (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)),
        rand(5, 4),
    ),
    "tuple of inputs": lambda: (TwoInputs(), (rand(5, 3), rand(5, 2))),
    "mapping of inputs": lambda: (TwoInputs(), {"b": rand(5, 2), "a": rand(5, 3)}),
    "embedding": lambda: (Words(), tokens(5, 3)),
    "embedding tied to the head": lambda: (TiedWords(), tokens(5, 3)),
    "embedding tied to the head, both used twice": lambda: (TiedWords(twice=True), tokens(5, 3)),
    "low-rank term that is zero": lambda: (LowRank(), rand(5, 3, 4)),
    "group and layer norm": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.GroupNorm(2, 6), nn.Linear(6, 2)),
        rand(5, 4),
    ),
    "dropout is off": lambda: (nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)), rand(5, 4)),
    "expert that only later samples reach": lambda: (Expert(), sent_to_the_expert(8, 4, 6)),
    "expert that is dropped for the first samples": lambda: (Gated(), sent_to_the_expert(8, 4, 6)),
    **LAYOUTS,
}

COUPLED = {
    "cnn with batch norm": lambda: (convolutional(), rand(5, 2, 4, 4)),
    "batch norm called twice": lambda: (Reused(), rand(5, 3)),
    "wide": lambda: (
        nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Linear(30, 2)),
        rand(12, 20),
    ),
    "without batch norm": lambda: (CentredCubes(), rand(5, 3)),
}


def to_double(inputs):
    if isinstance(inputs, dict):
        return {key: to_double(value) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(to_double(value) for value in inputs)
    return inputs.double() if inputs.is_floating_point() else inputs


def build(case, seed=0):
    """The network and the inputs of a case in float64, the same ones at every call."""
    torch.manual_seed(seed)
    model, inputs = CASES[case]()
    return model.double(), to_double(inputs)


def build_coupled(case):
    """Likewise of ``COUPLED``, with running statistics that are not those of a new network."""
    torch.manual_seed(0)
    model, inputs = COUPLED[case]()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2)
    return model.double(), inputs.double()


@cache
def jacobian(case):
    """J of ``build(case)`` by the double loop of autograd, (n C, P): computed once, for all tests."""
    return naive_jacobian(*build(case))


def kernel(case, outputs):
    """The kernel of ``build(case)`` from ``jacobian``."""
    inputs = build(case)[1]
    first = (
        inputs
        if isinstance(inputs, torch.Tensor)
        else next(iter(inputs.values() if isinstance(inputs, dict) else inputs))
    )
    return reduced_rows(jacobian(case), len(first), outputs)
