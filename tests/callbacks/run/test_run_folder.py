"""The folder of a run: one for each, decided in one place, the same on all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceReport
from lightning_conv.callbacks.run.loggers.folder import run_folder


class Server(Logger):
    """A logger of a server: it has a project and the id of a run, and may have no folder of this machine."""

    def __init__(self, folder=None, name="project", version="abc123"):
        super().__init__()
        self._folder, self._name, self._version = folder, name, version

    @property
    def save_dir(self):
        return self._folder

    @property
    def name(self):
        return self._name

    @property
    def version(self):
        if isinstance(self._version, Exception):
            raise self._version
        return self._version

    def log_metrics(self, *args, **kwargs):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


class OfBucket(Server):
    """A logger whose folder is not of this machine."""

    log_dir = "s3://bucket/project/abc123"


@pytest.mark.parametrize(
    ("loggers", "folder"),
    [
        ([], "."),
        ([Server()], "project/abc123"),
        ([Server(version=7)], "project/version_7"),
        ([Server(name=None)], "abc123"),
        ([Server("here")], "here/project/abc123"),
        ([Server("s3://bucket")], "project/abc123"),
        ([Server(name="../../up", version="/root")], "up/root"),
        ([Server(version=ConnectionError("no answer"))], "."),
        ([Server(version=ConnectionError("no answer")), Server(version="other")], "project/other"),
        ([Server(), CSVLogger("rows", name="a", version=3)], "rows/a/version_3"),
        (
            [CSVLogger("rows", name="a", version=3), TensorBoardLogger("board", name="b", version="x")],
            "rows/a/version_3",
        ),
        ([OfBucket(), TensorBoardLogger("board", name="b", version="x")], "board/b/x"),
    ],
)
def test_the_folder_is_that_of_the_run(tmp_path, monkeypatch, make_trainer, loggers, folder):
    monkeypatch.chdir(tmp_path)
    found = run_folder(make_trainer(logger=loggers))
    assert found.resolve() == (tmp_path / folder).resolve()


def test_a_folder_that_was_asked_for_is_the_folder(tmp_path, make_trainer):
    report = ConvergenceReport(folder=str(tmp_path / "mine"))
    assert report.folder_of(make_trainer(logger=CSVLogger(tmp_path))) == tmp_path / "mine"


def folder_on_each_rank(make_trainer, make_regression):
    class OfRankZero(Server):
        """On other ranks it has no id, as those of people have."""

        @property
        def version(self):
            return "abc123" if torch.distributed.get_rank() == 0 else None

    report = ConvergenceReport()
    trainer = make_trainer([report], max_epochs=1, logger=OfRankZero())
    data = DataLoader(TensorDataset(torch.rand(16, 8), torch.rand(16, 3)), batch_size=8)
    trainer.fit(make_regression(nn.Linear(8, 3), 0.05), data)
    return str(report.folder_of(trainer)), sorted(str(path) for path in Path(trainer.default_root_dir).rglob("*.html"))


def test_all_ranks_have_the_same_folder_and_one_of_them_writes(run_on_two_processes, tmp_path):
    (first, pages), (second, _) = run_on_two_processes(folder_on_each_rank)
    assert first == second == str(tmp_path / "project" / "abc123")
    assert pages == [f"{first}/convergence.html"]
