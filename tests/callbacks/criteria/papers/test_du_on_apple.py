"""Du et al. on a device without float64: Apple's GPUs raise where a number is to become one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_conv import kernel_spectrum, ntk_gram
from lightning_conv.callbacks.criteria.papers.du.evidence import DuEvidence
from lightning_conv.theory.networks import DuConvResNet, DuFC, DuResNet, DuTwoLayer

MPS = torch.device("mps")


class OnApple(torch.Tensor):
    """Stands for a tensor on an Apple GPU: so is what is computed from it, until it is copied to the CPU."""

    there = False

    @classmethod
    def put(cls, tensor: torch.Tensor) -> OnApple:
        held = tensor.detach().as_subclass(cls)
        held.there = True
        return held

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = any(getattr(each, "there", False) for each in tree_leaves((args, kwargs)))
        if func is torch.Tensor.__deepcopy__:
            return as_parameter(args[0].clone())
        with torch._C.DisableTorchFunctionSubclass():
            if func == torch.Tensor.device.__get__:
                return MPS if there else torch.device("cpu")
            if func == torch.Tensor.data.__set__:
                args[0].there = getattr(args[1], "there", False)
                return func(*args, **kwargs)
            if func is torch.Tensor.to and MPS in args:
                return cls.put(args[0])
            found = func(*args, **kwargs)
        wide = [each for each in tree_leaves(found) if isinstance(each, torch.Tensor) and each.dtype == torch.float64]
        if func is torch.Tensor.cpu:
            return found.as_subclass(torch.Tensor)
        if there and wide:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return tree_map_only(torch.Tensor, cls.put, found) if there else found


def as_parameter(tensor: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(OnApple.put(tensor))
    parameter.there = True
    return parameter


def test_the_stand_in_does_as_apples_gpus_do():
    held = OnApple.put(torch.ones(2))
    assert held.device == (held + 1).device == MPS
    assert held.cpu().device == torch.device("cpu")
    for convert in (torch.Tensor.double, lambda t: t.to(torch.float64)):
        with pytest.raises(TypeError, match="float64"):
            convert(held)
    network = moved(nn.Linear(2, 1))
    assert copy.deepcopy(network).weight.device == network(held).device == MPS
    assert copy.deepcopy(network).cpu().double().weight.dtype == torch.float64
    with pytest.raises(TypeError, match="float64"):
        copy.deepcopy(network).double()


def moved(network: nn.Module) -> nn.Module:
    """In float32, as if it were on an Apple GPU."""
    network = copy.deepcopy(network).float()
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, as_parameter(parameter))
    return network


@pytest.mark.parametrize(
    "network", [DuFC(8, 30, 2), DuResNet(8, 30, 2), DuTwoLayer(8, width=30), DuConvResNet(1, (2, 4), 6, 2)]
)
def test_the_evidence_is_that_of_the_same_weights_on_the_cpu(network):
    generator = torch.Generator().manual_seed(0)
    x = torch.eye(5, 8).view(5, 1, 2, 4) if isinstance(network, DuConvResNet) else torch.eye(5, 8)
    y = torch.randn(5, generator=generator)
    network = network.float()
    names = tuple(name for name, parameter in network.named_parameters() if parameter.requires_grad)
    gram = ntk_gram(network, x, outputs="full", parameters=names)
    spectrum = kernel_spectrum(gram)
    later = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator) * parameter.requires_grad)
    start = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}

    def follow(first, now, inputs, targets, begun):
        evidence = DuEvidence()
        evidence.begin(network, x, names)
        assert evidence.of_the_paper
        evidence.measure(first, inputs, targets, gram, spectrum, None, 0)
        evidence.measure(now, inputs, targets, gram, spectrum, begun, 1)
        return evidence.criteria(), evidence.quantities(now, begun)

    there = {name: OnApple.put(weight) for name, weight in start.items()}
    found, numbers = follow(moved(network), moved(later), OnApple.put(x), OnApple.put(y), there)
    expected, raw = follow(network, later, x, y, start)
    assert len(expected) >= 4
    assert [(each.name, each.verdict) for each in found] == [(each.name, each.verdict) for each in expected]
    assert [each.measured for each in found] == pytest.approx([each.measured for each in expected], rel=1e-6)
    assert numbers == pytest.approx(raw, rel=1e-6)
    assert numbers
