"""The comparison of result folders knows former names, skips what differs from run to run, and sees a number in its last bit."""

import json
import runpy
import sys

import pytest


def write(folder, name, number, seconds):
    folder.mkdir(exist_ok=True)
    table = {"rows": [{"m": 64, "loss": number}]}
    page = {"name": name, "seconds": seconds, "checks": [], "tables": table, "data": {"curve": [1.0, number]}}
    (folder / f"{name}.json").write_text(json.dumps(page))


@pytest.mark.parametrize(("number", "code"), [(0.1 + 0.2, 0), (0.3, 1)])
def test_folders_are_compared_by_canonical_name_and_exactly(house, tmp_path, monkeypatch, capsys, number, code):
    write(tmp_path / "before", "du2layer", 0.1 + 0.2, 100.0)
    write(tmp_path / "after", "du_two_layer", number, 90.0)
    script = house.root / "benchmarks" / "compare_results.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "before", "after"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(script), run_name="__main__")
    assert done.value.code == code
    printed = capsys.readouterr().out
    assert printed.startswith("du_two_layer.json: " + ("2 differences" if code else "equal"))
    assert ("/tables/rows[0]/loss: 0.30000000000000004, then 0.3" in printed) == bool(code)
