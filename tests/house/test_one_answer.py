"""Each fact about a run has one owner: which loss it is, how samples are drawn, what a step does."""

import ast
from pathlib import Path

import pytest
import torch

LOSSES = {name for name in dir(torch.nn) if name.endswith("Loss")} | {"_Loss", "_WeightedLoss"}
SAMPLERS = {name for name in dir(torch.utils.data) if name.endswith("Sampler")} | {
    "DistributedSamplerWrapper",
    "drop_last",
}
RULES = {"momentum", "weight_decay", "nesterov"}

OWNERS = {
    "loss": "lightning_conv/losses/",
    "sampling": "callbacks/run/data/sampling.py",
    # What stands around a step; what an optimizer makes of a gradient.
    "steps": ("callbacks/run/steps.py", "lightning_conv/health/step/optimizer_rules.py"),
}


def names_in(node: ast.AST) -> set[str]:
    """Every name, attribute and text in an expression."""
    found = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    found |= {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
    return found | {
        each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)
    }


def decisions(tree: ast.AST) -> dict[str, set[str]]:
    """What a module decides itself: the words that show it, by fact."""
    found: dict[str, set[str]] = {fact: set() for fact in OWNERS}
    annotated = {
        id(part)
        for node in ast.walk(tree)
        for field in ("annotation", "returns")
        if (note := getattr(node, field, None)) is not None
        for part in ast.walk(note)
    }
    for node in ast.walk(tree):
        asks = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "getattr")
        if asks or isinstance(node, ast.Compare | ast.Tuple | ast.List | ast.Set | ast.Dict):
            words = names_in(node)
        elif isinstance(node, ast.Attribute):
            words = {node.attr} & {"reduction", "drop_last", "label_smoothing", "ignore_index"}
        elif isinstance(node, ast.ImportFrom):
            words = {alias.name for alias in node.names} & SAMPLERS
        elif isinstance(node, ast.Subscript | ast.Call):
            words = names_in(node) & RULES
        else:
            continue
        if id(node) in annotated:
            continue
        found["loss"] |= words & (LOSSES | {"reduction", "label_smoothing", "ignore_index"})
        found["sampling"] |= words & SAMPLERS
        found["steps"] |= words & (RULES | {"SGD"})
    return found


def sources(house) -> dict[str, Path]:
    paths = {path.relative_to(house.root).as_posix(): path for path in house.modules().values()}
    return {name: path for name, path in paths.items() if not name.startswith("recipes/")}


@pytest.mark.parametrize("fact", OWNERS)
def test_only_the_owner_of_a_fact_decides_it(house, fact):
    others = {name: path for name, path in sources(house).items() if not name.startswith(OWNERS[fact])}
    deciding = {name for name, path in others.items() if decisions(ast.parse(path.read_text()))[fact]}
    assert deciding == set()


@pytest.mark.parametrize(
    ("fact", "line"),
    [
        ("loss", "isinstance(loss_fn, nn.MSELoss)"),
        ("loss", "type(loss_fn) is nn.CrossEntropyLoss"),
        ("loss", "getattr(loss_fn, 'reduction', 'mean')"),
        ("loss", "DISTANCES = (nn.MSELoss, nn.L1Loss)"),
        ("sampling", "isinstance(loader.sampler, WeightedRandomSampler)"),
        ("sampling", "from torch.utils.data import RandomSampler"),
        ("sampling", "loader.drop_last"),
        ("steps", "type(optimizer) is not torch.optim.SGD"),
        ("steps", "group.get('weight_decay')"),
        ("steps", "group['momentum']"),
        ("steps", "any(group.get(name) for name in ('momentum', 'nesterov'))"),
    ],
)
def test_the_search_finds_a_second_decision(fact, line):
    assert decisions(ast.parse(line))[fact]


@pytest.mark.parametrize(
    "line",
    ["loss_fn = nn.MSELoss()", "def f(loss_fn: nn.MSELoss | None) -> tuple[nn.MSELoss, int]: ...", "nn.BatchNorm1d(3)"],
)
def test_what_constructs_or_annotates_decides_nothing(line):
    assert not any(decisions(ast.parse(line)).values())
