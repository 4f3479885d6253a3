"""What a run's JSON file has is what it was written from."""

import json

import pytest
from records import record

from lightning_conv.reporting.page.run_record import RunRecord


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
