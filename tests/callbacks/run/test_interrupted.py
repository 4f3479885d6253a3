"""A signal in the midst of a measurement ends the run as Lightning ends it: at once, with everything put back and nothing half-written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_conv.callbacks.run.until_sigterm import until_sigterm

RUNS = ["SIGTERM 0", "SIGTERM 3", "SIGINT 0", "SIGINT 3"]
CEILING = 300
"""Seconds after which the subprocess is given up: it ends in a few."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    script = Path(__file__).with_name("interrupted_runs.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path_factory.mktemp("runs"))],
        capture_output=True,
        text=True,
        timeout=CEILING,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout)


@pytest.mark.parametrize("name", RUNS)
def test_the_run_ends_as_it_does_without_a_measurement(runs, name):
    measured, plain = ({key: left for key, left in each.items() if key != "of measuring"} for each in runs[name])
    assert plain["ended"].startswith(("SystemExit", "SIGTERMException"))
    assert measured == plain


@pytest.mark.parametrize("name", RUNS)
def test_the_measurement_stops_at_once_and_is_not_kept(runs, name):
    own, step = runs[name][0]["of measuring"], int(name.split()[1])
    assert own["evaluated"] == 5
    assert own["last"] in ((None,) if step == 0 else (step - 1,))


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_half_written(runs, name):
    own = runs[name][0]["of measuring"]
    assert own["files"] == ["convergence.html", "convergence.json", "convergence.md"]
    assert "interrupted (" in own["page"]


def test_a_handler_of_the_user_is_called_and_comes_back():
    called = []
    trainer = SimpleNamespace(received_sigterm=False)

    def own(number, frame):
        called.append(number)
        trainer.received_sigterm = True

    before = signal.signal(signal.SIGTERM, own)
    try:
        reached = False
        with until_sigterm(trainer):
            signal.raise_signal(signal.SIGTERM)
            reached = True
        assert (called, reached) == ([signal.SIGTERM], False)
        assert signal.getsignal(signal.SIGTERM) is own
        with pytest.raises(SystemExit), until_sigterm(SimpleNamespace(received_sigterm=False)):
            raise SIGTERMException  # not ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_the_block_runs_without_a_handler():
    reached = []

    def work():
        with until_sigterm(SimpleNamespace(received_sigterm=False)):
            reached.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reached == [signal.getsignal(signal.SIGTERM)]
