"""A certificate that takes long says so beforehand and meanwhile, survives a kill, and is not chosen where another one will do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_conv.callbacks.guard.certify.certificate as room
from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.callbacks.guard.certify import almost_everywhere
from lightning_conv.callbacks.guard.certify.work_folder import NAME, work_folder
from lightning_conv.expressivity import certify, streamed

SWITCH = 6


@pytest.fixture
def said(monkeypatch):
    """What the guard tells while it certifies."""
    lines = []
    monkeypatch.setattr(room, "rank_zero_info", lines.append)
    return lines


@pytest.fixture(autouse=True)
def streaming(monkeypatch):
    """96 samples are many here."""
    monkeypatch.setattr(room, "is_held", lambda *args, **kwargs: False)
    monkeypatch.setattr(certify, "is_held", lambda *args, **kwargs: False)


@pytest.fixture
def run(make_trainer, make_module, make_loader):
    def go(method="auto", change=lambda module: None, **options):
        guard, module = ExpressivityGuard(switch_at=SWITCH, method=method), make_module(dropout=0.0)
        change(module)
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        make_trainer([guard], **options).fit(module, make_loader())
        return guard

    return go


def test_what_is_short_is_proven_at_these_weights_and_leaves_nothing_behind(run, said, tmp_path):
    guard = run()
    assert guard.certificate.method == "singular"
    assert guard.verdict == "certified"
    assert any("rank of [h, 1], 96 x 121" in line and "Gflop" in line and "of memory" in line for line in said)
    assert not (tmp_path / NAME).exists()


@pytest.mark.slow
def test_what_is_long_is_proven_at_almost_every_weight_where_that_can_be_and_said(run, said, monkeypatch):
    monkeypatch.setattr(room, "MODEST", 0.0)
    guard = run()
    assert guard.certificate.method == "distinct"
    assert guard.verdict == "certified"
    assert any("would take about" in line and "method='singular'" in line for line in said)
    assert "almost every weight" in guard.reason
    assert "method='singular', would take about" in guard.reason
    assert run("singular").certificate.method == "singular"


def relu(module):
    module.trunk[5] = nn.ReLU()


def test_without_a_wide_layer_the_long_proof_is_made(run, said, monkeypatch):
    monkeypatch.setattr(room, "MODEST", 0.0)
    guard = run(change=relu)
    assert guard.certificate.method == "singular"
    assert any("no shorter proof" in line and "activation" in line for line in said)


def test_an_undecided_short_proof_leaves_the_long_one(run, said, monkeypatch):
    monkeypatch.setattr(room, "MODEST", 0.0)
    for place in (room, almost_everywhere):
        monkeypatch.setattr(place, "allowance", lambda coarse, exact, rows: 1e-9 if exact.shape[1] > 100 else 1e9)
    guard = run()
    assert guard.certificate.method == "singular"
    assert guard.certificate.verdict == "certified"
    assert any("not beyond what rounding may move" in line for line in said)


def test_too_little_memory_for_the_long_proof_leaves_the_short_one(run, said, monkeypatch):
    def lacking(*args, **kwargs):
        raise MemoryError("max_memory: too little")

    monkeypatch.setattr(room, "plan_stream", lacking)
    assert run().certificate.method == "distinct"
    with pytest.warns(UserWarning, match="MemoryError: max_memory: too little"):
        assert run(change=relu).phase == 1


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_certifies_goes_on_where_it_was_to_the_same_bits(
    run, said, monkeypatch, tmp_path
):
    monkeypatch.setattr(room, "KEPT_FROM", 0.0)
    whole = run()
    assert not (tmp_path / NAME).exists()

    class Killed:
        def __init__(self, *args):
            pass

        def __call__(self, share):
            if share > 0.5:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, "Lines", Killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run()
    assert json.loads((tmp_path / NAME / "progress.json").read_text())["stages"]["gram"]
    done = []
    gram = streamed.stream_gram
    monkeypatch.setattr(streamed, "stream_gram", lambda *args, done=(0, 0, 0), **kw: begun(done, *args, **kw))

    def begun(at, *args, **kwargs):
        done.append(tuple(at))
        return gram(*args, done=at, **kwargs)

    again = run()
    assert done
    assert done[0] != (0, 0, 0)
    assert again.certificate.sigma_min == whole.certificate.sigma_min
    assert not (tmp_path / NAME).exists()
    assert any(f"kept in {tmp_path / NAME}" in line and "on disk" in line for line in said)


@pytest.mark.slow
def test_the_folder_is_one_processs_and_is_left_only_by_a_kill(tmp_path):
    code = f"""
from lightning_conv.callbacks.guard.certify.work_folder import work_folder
with work_folder({str(tmp_path)!r}, 1) as folder:
    print(folder)
"""
    with work_folder(str(tmp_path), 1) as folder:
        assert folder == tmp_path / NAME
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "None"
        assert "another process is at work" in done.stderr
        assert folder.is_dir()
    assert not folder.exists()
    with pytest.raises(RuntimeError), work_folder(str(tmp_path), 1):
        raise RuntimeError
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), work_folder(str(tmp_path), 1) as folder:
        raise KeyboardInterrupt
    assert folder.is_dir()


@pytest.mark.parametrize("root", ["s3://bucket/runs", "/proc/nowhere"])
def test_where_nothing_can_be_kept_the_certificate_is_made_all_the_same(root):
    with work_folder(root, 1) as folder:
        assert folder is None


def test_a_full_disk_keeps_nothing(tmp_path):
    with work_folder(str(tmp_path), 2**60) as folder:
        assert folder is None
    assert list(Path(tmp_path).iterdir()) == []
