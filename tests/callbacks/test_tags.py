"""docs/tags.md has every tag that is logged, once, and no tag that nothing logs."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import (
    ConvergenceDiagnostics,
    ExpressivityGuard,
    KernelStability,
    LambdaMin,
    Probe,
    RegularizedGradientClipping,
)
from lightning_conv.recipes import DigitsDataModule, WideFC
from lightning_conv.reporting.charts import CHARTS
from lightning_conv.reporting.tags import GROUPS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("lightning_conv", "callbacks", "recipes")
ROWS = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs" / "tags.md").read_text(encoding="utf-8"), re.MULTILINE)
TAGS = [tag for row in ROWS for tag in re.findall(r"`([^`]+)`", row)]
NOT_OURS = {"epoch", "hp_metric", "custom_scalars__config__"}  # of Lightning, and the layout of the charts


def logged(trainer) -> set[str]:
    """Return the tags of a run, those of its event files and of `callback_metrics`."""
    events = EventAccumulator(trainer.logger.log_dir).Reload().Tags()
    kinds = (events[kind] for kind in ("scalars", "images", "histograms", "tensors"))
    return {tag.removesuffix("/text_summary") for kind in kinds for tag in kind} | set(trainer.callback_metrics)


def missing(found: set[str]) -> set[str]:
    """Return the tags that the page does not have; those of the kernel of the loss gradients are like those of the kernel."""
    known = {*TAGS, *NOT_OURS, *(tag.replace("kernel/", "loss_kernel/") for tag in TAGS if tag.startswith("kernel/"))}
    return found - known


def written() -> tuple[set[str], set[str]]:
    """Return all strings and names of the source, without docstrings, and the names of all findings."""
    words, findings = set(), set()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        spoken = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spoken:
                words.add(node.value)
            if isinstance(node, ast.keyword | ast.arg | ast.AnnAssign | ast.FunctionDef | ast.Attribute):
                words.add(ast.unparse(node.target) if isinstance(node, ast.AnnAssign) else _name(node))
            if isinstance(node, ast.Call) and _called(node) == "Finding":
                findings |= {
                    k.value.value for k in node.keywords if k.arg == "name" and isinstance(k.value, ast.Constant)
                }
    return words, findings


def _name(node: ast.keyword | ast.arg | ast.FunctionDef | ast.Attribute) -> str:
    return str(
        node.name if isinstance(node, ast.FunctionDef) else node.attr if isinstance(node, ast.Attribute) else node.arg
    )


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func).removesuffix(".exact").rpartition(".")[2]


def comes_from(tag: str, words: set[str]) -> bool:
    """Return whether the source has the tag, its last part, or up to three pieces of that: f"share_{regime}" and "floor"."""
    ends = {word.rpartition("/")[2] for word in words} - {"", "_"}
    return tag in words or _made_of(tag.rpartition("/")[2], ends, 3)


def _made_of(name: str, pieces: set[str], most: int) -> bool:
    cuts = {place for i, letter in enumerate(name) if letter == "_" for place in (i, i + 1)}
    return name in pieces or (
        most > 1 and any(name[:at] in pieces and _made_of(name[at:], pieces, most - 1) for at in cuts)
    )


def test_every_tag_stands_in_the_table_once_and_in_a_known_group():
    assert [tag for tag, count in Counter(TAGS).items() if count > 1] == []
    assert len(TAGS) > 150
    assert {tag for tag in TAGS if not tag.startswith(GROUPS)} == {
        "train_loss",
        *(f"{s}_{w}" for s in ("val", "test") for w in ("loss", "acc")),
    }


def test_every_tag_of_the_table_comes_from_the_source():
    words, _ = written()
    assert [tag for tag in TAGS if tag not in {"loss_kernel/"} and not comes_from(tag, words)] == []
    assert not comes_from("kernel/number_of_wolves", words)


def test_every_finding_and_every_chart_is_in_the_table():
    _, findings = written()
    assert len(findings) > 15
    assert {f"health/{name}" for name in findings} <= set(TAGS)
    charts = {tag for charts in CHARTS.values() for chart in charts for tag in (*chart.tags, *chart.limits)}
    assert missing(charts - {tag for tag in charts if "loss_kernel" in tag}) == set()


def test_every_chart_has_a_row_on_the_page_about_the_dashboard():
    page = (ROOT / "docs" / "dashboard.md").read_text(encoding="utf-8").replace("\\|", "|")
    assert [chart.title for charts in CHARTS.values() for chart in charts if f"\n| {chart.title} |" not in page] == []


@pytest.mark.parametrize("outputs", ["trace", "full", "loss"])
def test_every_tag_of_the_diagnostics_is_in_the_table(make_trainer, make_regression, tmp_path, outputs):
    network = nn.Sequential(nn.Linear(6, 20), nn.Softplus(), nn.Linear(20, 2))
    data = DataLoader(TensorDataset(torch.randn(24, 6), torch.randn(24, 2)), batch_size=24)
    probe = Probe(size=24, outputs=outputs)
    callbacks = [ConvergenceDiagnostics(probe, every_n_steps=1, audit_labels=True)]
    trainer = make_trainer(callbacks, max_epochs=6, logger=TensorBoardLogger(tmp_path))
    trainer.fit(make_regression(network, lr=0.05), data)
    found = logged(trainer)
    assert {"theory/loss", "health/level"} <= found
    assert missing(found) == set()


def test_every_tag_of_the_guard_the_clipping_and_the_bound_is_in_the_table(
    make_trainer, make_module, make_loader, tmp_path
):
    callbacks = [
        ExpressivityGuard(switch_at=6, track_rank=True),
        RegularizedGradientClipping(gamma=1.0, delta=0.5),
        KernelStability(),
        LambdaMin(bound="last block"),
    ]
    trainer = make_trainer(callbacks, max_epochs=4, logger=TensorBoardLogger(tmp_path))
    trainer.fit(make_module(momentum=0.0), make_loader())
    found = logged(trainer)
    assert {"guard/gap", "guard/rank_at_start", "clipping/factor", "kernel/lambda_min_bound"} <= found
    assert missing(found) == set()


def test_every_tag_of_a_recipe_is_in_the_table(make_trainer, tmp_path):
    trainer = make_trainer([], max_epochs=2, logger=TensorBoardLogger(tmp_path))
    data = DigitsDataModule(n_train=60, batch_size=20)
    trainer.fit(WideFC(hidden=(16,), width=70, probe_size=32), data)
    trainer.test(trainer.lightning_module, data)
    found = logged(trainer)
    assert {"train_loss", "val_acc", "test_loss", "kernel/lambda_min"} <= found
    assert missing(found) == set()
