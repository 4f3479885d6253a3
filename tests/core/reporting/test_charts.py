"""The layout of TensorBoard's charts: what was logged has a chart, and charts of several runs can be merged."""

import math
import re

import pytest

from lightning_conv.reporting.charts import CHARTS, EDGE, drawn_values, layout, own_losses
from lightning_conv.reporting.tags import tag_of_network

ALL = [tag for charts in CHARTS.values() for chart in charts for tag in chart.tags]


def charts_of(*args):
    return {title: lines for charts in layout(*args).values() for title, (_, lines) in charts.items()}


@pytest.mark.parametrize("tag", ALL)
def test_a_chart_is_there_if_and_only_if_one_of_its_tags_was_logged(tag):
    found = charts_of([tag])
    assert [title for title in found] == [c.title for charts in CHARTS.values() for c in charts if tag in c.tags]
    assert any(re.match(line, tag) for lines in found.values() for line in lines)
    assert layout([EDGE, "kernel/trace"]) == {}


def test_lines_are_anchored_few_and_the_same_in_every_run():
    for tag in ALL:
        for lines in charts_of([tag], ["train_loss", "val_loss", "other_loss"]).values():
            assert len(lines) <= 4
            assert not any(re.match(line, f"{tag}_lower") for line in lines if re.match(line, tag))
    alone, together = charts_of([ALL[-1]]), charts_of(ALL)
    assert all(together[title] == lines for title, lines in alone.items())


def test_the_first_group_is_what_is_read_first():
    charts = list(layout(ALL, ["train_loss"])["convergence"])
    assert [re.sub(r" \(.*", "", title) for title in charts] == [
        "loss",
        "stability ratio",
        "log10 of the smallest kernel eigenvalue, with bounds",
        "change of the kernel since the start",
        "alignment of the kernel with the start",
        "log10 of the gap to the global infimum",
    ]
    assert list(layout(ALL)) == list(CHARTS)


def test_networks_of_several_optimizers_have_charts_of_their_own_and_names_are_no_expressions():
    tags = [tag_of_network(tag, name) for tag in ("kernel/alignment", "theory/loss") for name in ("Adam.1", "critic")]
    found = layout(tags, ["g_loss", "d_loss"])
    assert list(found) == ["convergence of Adam.1", "convergence of critic"]
    lines = found["convergence of Adam.1"]["alignment of the kernel with the start"][1]
    assert re.match(lines[0], "kernel/Adam.1/alignment")
    assert not re.match(lines[0], "kernel/AdamX1/alignment")
    assert found["convergence of Adam.1"]["loss"][1][:2] == ["g_loss$", "d_loss$"]
    assert "g_loss$" not in found["convergence of critic"]["loss"][1]


def test_two_losses_of_the_module_are_drawn():
    assert own_losses(["lr", "loss"]) == ["loss"]
    assert own_losses(["val_loss", "train_loss", "train_aux_loss"]) == ["train_loss", "val_loss"]
    assert own_losses(["a_loss", "b_loss", "c_loss"]) == ["a_loss", "b_loss"]
    assert own_losses(["loss_step", "loss_epoch"]) == ["loss_epoch"]
    assert own_losses(["loss_step"]) == ["loss_step"]
    assert own_losses(["theory/loss", "guard/best_loss", "health/loss_floor"]) == []


def test_logarithms_are_of_positive_values_and_bounds_are_apart():
    of_run, limits = drawn_values(
        {"kernel/lambda_min": 1e-3, "kernel/lambda_min_lower": 0.0, "kernel/critic/lambda_min_upper": 100.0, "a": 1.0}
    )
    assert of_run == {"convergence/log10_lambda_min": pytest.approx(-3)}
    assert limits == {"convergence/critic/log10_lambda_min_upper": pytest.approx(2)}
    assert drawn_values({"health/stability": 0.3}) == ({}, {EDGE: 1.0})
    assert drawn_values({"guard/gap": math.e, "guard/bound": -1.0}) == (
        {"convergence/log10_gap": math.log10(math.e)},
        {},
    )
