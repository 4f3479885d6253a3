"""What a run's JSON file has is what it was written from."""

import json
import math
from dataclasses import replace

import pytest
from records import record

from lightning_conv.reporting.page.charts import charts_of
from lightning_conv.reporting.page.run_record import RunRecord
from lightning_conv.reporting.series import Series


def test_the_file_gives_back_what_it_was_written_from():
    run = record(evil="<b>")
    again = RunRecord.from_json(run.to_json(), name=run.name, series=run.series)
    for name in ("facts", "not_judged", "steps", "shares", "seconds", "optimizers", "findings"):
        assert list(getattr(again, name)) == list(getattr(run, name)), name
    # NaN differs from itself: as text the two agree.
    assert str(again.criteria) == str(list(run.criteria))
    assert str(again.metrics) == str(run.metrics)
    assert again.settings == run.settings


def test_a_file_of_an_earlier_version_has_less():
    content = json.loads(record().to_json())
    for name in ("not_judged", "shares", "settings", "seconds", "optimizers", "health", "steps"):
        del content[name]
    again = RunRecord.from_json(json.dumps(content), name="old", series={})
    assert again.optimizers == ("",) or list(again.optimizers) == [""]
    assert not again.findings
    assert len(again.criteria) == 6


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"facts": 1, "criteria": [], "metrics": {}}', '{"facts": {}, "criteria": [{}], "metrics": {}}'],
)
def test_another_file_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 (json has a subclass of its own)
        RunRecord.from_json(text, name="x", series={})


def test_the_file_has_the_series_with_their_gaps_as_a_page_shows_them():
    run = record(evil='<b>"')
    again = RunRecord.from_json(run.to_json(), name=run.name, series={})
    assert list(again.series) == list(run.series)
    for tag, series in run.series.items():
        assert again.series[tag].steps == series.steps, tag
        assert again.series[tag].values == pytest.approx(series.values, rel=1e-5, nan_ok=True), tag
    assert charts_of([again]) == charts_of([replace(run, findings=again.findings)])


def test_what_the_logger_has_stands_before_what_the_file_has():
    kept = record()
    (first, *later) = zip(kept.series["loss"].steps, kept.series["loss"].values, strict=True)
    newer = Series().extend([(first[0], 5.0)])
    again = RunRecord.from_json(kept.to_json(), name="x", series={"loss": newer})
    assert (
        again.series["loss"].steps == kept.series["loss"].steps
    )  # also those that had not changed and were not logged
    assert again.series["loss"].values == pytest.approx([5.0, *(value for _, value in later)], nan_ok=True, rel=1e-5)
    assert "kernel/lambda_min" in again.series


def test_a_long_run_of_many_quantities_stays_under_two_megabytes_and_keeps_its_peak():
    long = {
        f"module/quantity_{number}": Series().extend((10**6 + k, 1e-5 * math.sin(k * number + 1)) for k in range(2000))
        for number in range(300)
    }
    long["module/quantity_7"].put(10**6 + 1999, 123.0)
    text = record(series=long).to_json()
    assert len(text) < 2e6
    again = RunRecord.from_json(text, name="x", series={})
    assert len(again.series) == 300
    assert max(again.series["module/quantity_7"].values) == 123.0
    assert all(100 < len(series) <= 134 for series in again.series.values())


@pytest.mark.parametrize(
    "series", ['{"loss": {"steps": [1], "values": []}}', '{"loss": {"values": []}}', "[]", '{"loss": 3}']
)
def test_series_of_another_kind_are_refused(series):
    text = '{"facts": {}, "criteria": [], "metrics": {}, "series": ' + series + "}"
    with pytest.raises(ValueError):  # noqa: PT011 (it has a message for each)
        RunRecord.from_json(text, name="x", series={})
