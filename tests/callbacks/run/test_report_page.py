"""The page beside the logs: it is there however a run ends, never ends one, and shows no secret."""

import json
import re
import shlex
from html import unescape

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_conv.callbacks import ConvergenceDiagnostics, ConvergenceHealth, ConvergenceReport, LambdaMin
from lightning_conv.callbacks import report as report_file
from lightning_conv.callbacks.record_of_run import NO_HEALTH
from lightning_conv.callbacks.run import schedule
from lightning_conv.callbacks.run.setting_texts import HIDDEN, texts_of
from lightning_conv.recipes.cli import main

EVIL = "<script>alert(1)</script>"


def evil_module(make_module):
    module = make_module()
    module.trunk.add_module(EVIL, torch.nn.Linear(120, 120))
    return module


def data_of(page):
    return json.loads(re.search(r'id="data-charts">(.*?)</script>', page, re.DOTALL)[1])


def test_a_run_has_a_page_with_its_numbers(tmp_path, make_trainer, make_module, make_loader):
    trainer = make_trainer([ConvergenceDiagnostics(32, every_n_steps=2)], max_epochs=2, logger=CSVLogger(tmp_path))
    trainer.fit(evil_module(make_module), make_loader())
    folder = tmp_path / "lightning_logs" / "version_0"
    page = (folder / "convergence.html").read_text("utf-8")
    assert page.count("<script") == page.count("</script>") == 4
    assert "trunk.&lt;script&gt;alert(1)&lt;/script&gt;" in page
    charts = {each["title"]: each for each in data_of(page)}
    line = charts["lambda_min"]["lines"][0]
    assert line["x"] == [0, 2, 4, 6]
    stored = json.loads((folder / "convergence.json").read_text())
    assert line["y"][-1] == pytest.approx(stored["metrics"]["kernel/lambda_min"], rel=1e-4)
    assert charts["Loss"]["lines"][0]["y"] == pytest.approx(trainer.lightning_module.losses, rel=1e-4)
    assert set(stored["shares"][""]) == {"trunk.0", "trunk.1", "trunk.4", f"trunk.{EVIL}", "classifier"}
    assert stored["seconds"]["first measurement, finding the network included"] > 0
    assert stored["settings"]["Optimizer, at the end"]["momentum"] == "0.9"


def test_without_html_there_is_none(tmp_path, make_trainer, make_module, make_loader):
    report = ConvergenceReport(folder=str(tmp_path), html=False)
    make_trainer([report], max_epochs=1).fit(make_module(), make_loader())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["convergence.json", "convergence.md"]


@pytest.mark.parametrize(("limit", "drawn"), [(1e6, True), (0.0, False)])
def test_the_figure_is_left_out_of_a_run_that_is_too_short_for_it(
    tmp_path, monkeypatch, make_trainer, make_module, make_loader, limit, drawn
):
    monkeypatch.setattr(schedule, "SHORT_RUN_SECONDS", limit)
    folder = tmp_path / "two words"
    callbacks = [LambdaMin(32), ConvergenceReport(folder=str(folder))]
    make_trainer(callbacks, max_epochs=2, logger=CSVLogger(folder, name="", version="")).fit(
        make_module(), make_loader()
    )
    page = (folder / "convergence.html").read_text("utf-8")
    said = re.search(r"The run was too short for a figure, which takes 0\.4 s: lightning-conv (.*) draws it\.", page)
    assert ("<svg " in page, said is None) == (drawn, drawn)
    if said:  # the command is followed as it stands
        assert main(shlex.split(unescape(said[1]))) == 0
        assert "<svg " in (folder / "convergence.html").read_text("utf-8")


def test_without_health_the_page_says_why_it_has_no_words(tmp_path, make_trainer, make_module, make_loader):
    report = ConvergenceReport(folder=str(tmp_path))
    make_trainer([report, LambdaMin(32, every_n_steps=3)], max_epochs=1).fit(make_module(), make_loader())
    assert NO_HEALTH in (tmp_path / "convergence.html").read_text("utf-8")
    assert json.loads((tmp_path / "convergence.json").read_text())["missing"] == [NO_HEALTH]


def test_an_error_in_the_page_is_a_warning_and_the_other_files_are_there(
    tmp_path, monkeypatch, make_trainer, make_module, make_loader, lenient
):
    def fails(run, **_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(report_file, "run_page", fails)
    trainer = make_trainer([ConvergenceReport(folder=str(tmp_path))], max_epochs=1)
    with pytest.warns(UserWarning, match="convergence.html was not written: no ink"):
        trainer.fit(make_module(), make_loader())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["convergence.json", "convergence.md"]


def test_a_run_that_breaks_has_the_losses_up_to_there(tmp_path, make_trainer, make_module, make_loader):
    module = make_module()
    step = module.training_step

    def breaks(batch, batch_idx):
        if len(module.losses) == 4:
            raise RuntimeError(f"out of luck {EVIL}")
        return step(batch, batch_idx)

    module.training_step = breaks
    callbacks = [ConvergenceHealth(32, every_n_steps=50), ConvergenceReport(folder=str(tmp_path))]
    with pytest.raises(RuntimeError, match="out of luck"):
        make_trainer(callbacks, max_epochs=2).fit(module, make_loader())
    page = (tmp_path / "convergence.html").read_text("utf-8")
    assert "failed (RuntimeError)" in page
    assert {each["title"]: each for each in data_of(page)}["Loss"]["lines"][0]["y"] == pytest.approx(
        module.losses, rel=1e-4
    )


def test_settings_are_short_texts_without_secrets():
    class Breaks:
        def __str__(self):
            raise RuntimeError("no")

    shown = texts_of(
        {"lr": 0.1, "api_key": "k", "hf_token": "t", "max_tokens": 5, "x": Breaks(), "long": "a" * 999, 1: None}
    )
    assert shown.pop("long") == "a" * 300 + "..."
    assert shown == {"lr": "0.1", "api_key": HIDDEN, "hf_token": HIDDEN, "max_tokens": "5", "1": "None"}


def test_the_run_is_the_same_with_and_without_a_report(tmp_path, make_trainer, make_module, make_loader):
    def weights(callbacks):
        module = make_module()
        make_trainer(callbacks, max_epochs=3).fit(module, make_loader())
        return torch.cat([each.flatten() for each in module.parameters()]), module.losses

    plain, losses = weights([LambdaMin(32, every_n_steps=2)])
    beside, others = weights([LambdaMin(32, every_n_steps=2), ConvergenceReport(folder=str(tmp_path))])
    assert torch.equal(plain, beside)
    assert losses == others
