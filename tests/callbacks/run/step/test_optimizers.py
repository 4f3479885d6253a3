"""Names and parameters of a run's optimizers, and which network of the settings belongs to each."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import nn

from lightning_conv.callbacks import Probe
from lightning_conv.callbacks.run.step.optimizers import (
    find_optimizer,
    measured_parameters,
    optimizers_of,
    probe_of_each,
)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict(
            {"generator": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), "critic": nn.Linear(2, 1)}
        )
        self.head = nn.Linear(2, 1)
        self.temperature = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def run_of(*parts, module=None, kinds=()):
    """Return a trainer with an optimizer for each list of parts."""
    module = module or Module()
    kinds = list(kinds) + [torch.optim.Adam] * (len(parts) - len(kinds))

    def parameters(part):
        found = module.get_parameter(part) if part == "temperature" else module.get_submodule(part)
        return [found] if isinstance(found, nn.Parameter) else list(found.parameters())

    optimizers = [
        kind([p for part in group for p in parameters(part)], lr=0.1) for kind, group in zip(kinds, parts, strict=True)
    ]
    return SimpleNamespace(lightning_module=module, optimizers=optimizers)


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ([["model.generator"], ["model.critic"]], ["model.generator", "model.critic"]),
        ([["model.generator"], ["head"]], ["model", "head"]),  # the outermost module that is its own
        ([["model.generator.0"], ["model.generator.1"]], ["model.generator.0", "model.generator.1"]),
        (
            [["model.generator"], ["model.generator.1"]],
            ["model", "model.generator.1"],
        ),  # what both train does not count
        ([["model.critic"], ["temperature"]], ["model", "temperature"]),
        ([["model.critic", "head"], ["model.generator"]], ["Adam", "model.generator"]),  # in no module of its own
        ([["model.critic", "head"], ["model.generator", "head"]], ["Adam", "Adam-1"]),
        ([["head"], ["head"], ["model.critic"]], ["Adam", "Adam-1", "model"]),  # the same parameters
        ([["model"], ["model.critic", "head"]], ["model", "Adam-1"]),
    ],
)
def test_an_optimizer_is_named_after_its_module_or_its_class(parts, names):
    assert [each.name for each in optimizers_of(run_of(*parts))] == names


def test_classes_are_counted_as_lightning_counts_them():
    kinds = [torch.optim.SGD, torch.optim.Adam, torch.optim.SGD, torch.optim.SGD]
    trainer = run_of(["head", "model"], ["head", "model"], ["head", "model"], ["head", "model"], kinds=kinds)
    as_lightning, _ = LearningRateMonitor()._find_names_from_optimizers(trainer.optimizers, [], defaultdict(int))
    names = [each.name for each in optimizers_of(trainer)]
    assert [[f"lr-{name}"] for name in names] == as_lightning
    assert names == ["SGD", "Adam", "SGD-1", "SGD-2"]


def test_a_compiled_module_has_the_name_of_the_one_inside():
    module = Module()
    module.head = torch.compile(module.head)
    assert [each.name for each in optimizers_of(run_of(["head"], ["model"], module=module))] == ["head", "model"]


def test_a_module_with_the_name_of_a_class_gives_no_two_optimizers_one_name():
    module = Module()
    module.Adam = nn.Linear(2, 2)
    names = [each.name for each in optimizers_of(run_of(["head", "model"], ["Adam"], module=module))]
    assert names == ["Adam", "Adam-1"]


def test_tied_weights_belong_to_both():
    module = Module()
    module.head.weight = module.model["critic"].weight
    first, second = optimizers_of(run_of(["model.critic"], ["head"], module=module))
    assert first.parameters[0] == second.parameters[0] == "model.critic.weight"
    assert len({first.name, second.name}) == 2


def test_the_kernel_is_over_the_optimizers_own_parameters():
    trainer = run_of(["model.generator"], ["head", "frozen"])
    assert measured_parameters(trainer, Probe(optimizer="Adam-1")) == ["head.weight", "head.bias"]
    assert measured_parameters(trainer, Probe()) == [
        n for n, p in trainer.lightning_module.named_parameters() if p.requires_grad
    ]
    assert measured_parameters(trainer, Probe(optimizer="Adam-1", parameters="frozen.*")) == [
        "frozen.weight",
        "frozen.bias",
    ]
    given = Probe(optimizer="model", forward_fn=lambda module, x: module.head(module.model["generator"](x)))
    assert measured_parameters(trainer, given) == [
        f"module.model.generator.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    ]


def test_an_optimizer_without_a_trainable_parameter_is_refused_by_name():
    with pytest.raises(MisconfigurationException, match="'frozen' has no trainable parameter"):
        measured_parameters(run_of(["head"], ["frozen"]), Probe(optimizer="frozen"))


def test_an_unknown_name_is_refused_with_those_that_there_are():
    with pytest.raises(
        MisconfigurationException, match=r"optimizer='heads' is none of this run; it has 'head', 'model'"
    ):
        find_optimizer(run_of(["head"], ["model"]), "heads")


@pytest.mark.parametrize("name", ["", 3])
def test_what_is_no_name_is_refused_at_once(name):
    with pytest.raises(MisconfigurationException, match="need the name of an optimizer"):
        Probe(optimizer=name)


@pytest.mark.parametrize(
    ("probe", "names"),
    [
        (Probe(), ["model", "head"]),
        (Probe(optimizer="head"), ["head"]),
        (Probe(parameters="model.generator.*"), ["model"]),
        (Probe(parameters=["model.critic.*", "head.bias"]), ["model", "head"]),
        (Probe(parameters="temperature"), [None]),  # no optimizer has it
        (Probe(parameters="nothing"), [None]),  # it is refused later, as for one optimizer
        (Probe(forward_fn=lambda module, x: module.head(x)), [None]),
        (Probe(inputs=torch.zeros(4, 2)), [None]),
    ],
)
def test_there_is_a_network_for_each_optimizer_unless_the_probe_means_one(probe, names):
    trainer = run_of(["model"], ["head"], ["frozen"])
    found = probe_of_each(trainer, probe)
    assert [each.optimizer for each in found] == names
    assert len({each.key for each in found}) == len(found)


def test_of_named_parameters_each_optimizer_gets_its_own():
    trainer = run_of(["model"], ["head"])
    first, second = probe_of_each(trainer, Probe(parameters=["model.critic.*", "head.bias"]))
    assert list(first.parameters) == ["model.critic.weight", "model.critic.bias"]
    assert list(second.parameters) == ["head.bias"]


def test_with_one_optimizer_nothing_is_said_of_it():
    probe = Probe()
    assert probe_of_each(run_of(["model", "head"]), probe) == [probe]
