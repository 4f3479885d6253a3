"""A small network with BatchNorm, dropout and momentum on real digits, and ways to run it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_conv.callbacks.run.guarded import set_strict

# An error that nobody expects fails the test; the fixture `lenient` is for tests that inject one. Set here, not in a
# fixture, so that it also applies to fixtures of a module or session and to the processes of `run_on_two_processes`.
set_strict(True)

SAMPLES = 96


def digits(count: int = SAMPLES) -> TensorDataset:
    source = load_digits()
    return TensorDataset(
        torch.tensor(source.data[:count] / 16, dtype=torch.float32), torch.tensor(source.target[:count])
    )


class SmallNet(pl.LightningModule):
    """64 -> 32 (BatchNorm, dropout) -> 120 -> 10: the last hidden layer is wider than the 96 samples."""

    def __init__(self, width: int = 120, momentum: float = 0.9, dropout: float = 0.1) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(64, 32),
            nn.BatchNorm1d(32),
            nn.Softplus(100),
            nn.Dropout(dropout),
            nn.Linear(32, width),
            nn.Softplus(100),
        )
        self.classifier = nn.Linear(width, 10)
        self.loss_fn = nn.CrossEntropyLoss()
        self.momentum = momentum
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.trunk(x))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss_fn(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=self.momentum, weight_decay=1e-4)


def loader(data: Any = None, batch_size: int = 32) -> DataLoader[Any]:
    """Shuffled in an order that depends on the epoch alone, so that a resumed run sees what the killed one would have."""
    data = digits() if data is None else data
    return DataLoader(data, batch_size=batch_size, sampler=DistributedSampler(data, num_replicas=1, rank=0, seed=1))


@pytest.fixture
def data() -> TensorDataset:
    return digits()


@pytest.fixture
def make_module() -> Callable[..., SmallNet]:
    def make(seed: int = 0, **kwargs: Any) -> SmallNet:
        pl.seed_everything(seed, verbose=False)
        return SmallNet(**kwargs)

    return make


@pytest.fixture
def make_loader() -> Callable[..., DataLoader[Any]]:
    return loader


def quiet_trainer(
    folder: Path,
    callbacks: list[pl.Callback] | None = None,
    max_epochs: int = 5,
    checkpoint: bool = False,
    **kwargs: Any,
) -> pl.Trainer:
    callbacks = list(callbacks or [])
    if checkpoint:
        callbacks.append(ModelCheckpoint(dirpath=folder / "checkpoints", save_last=True, every_n_epochs=1))
    options: dict[str, Any] = {
        "max_epochs": max_epochs,
        "logger": False,
        "enable_checkpointing": checkpoint,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=callbacks, **(options | kwargs))


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    return partial(quiet_trainer, tmp_path)


class Recorder(Logger):
    """Keeps what is logged: {tag: {step: value}}."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.scalars: dict[str, dict[int, float]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for tag, value in metrics.items():
            self.scalars.setdefault(tag, {})[int(step or 0)] = float(value)


@pytest.fixture
def break_at_second_call(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], None]:
    def patch(owner: Any, name: str) -> None:
        original, calls = getattr(owner, name), []

        def fails_later(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) > 1:
                raise RuntimeError("broken at a later step")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, fails_later)

    return patch


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


class Regression(pl.LightningModule):
    """Any network, trained by plain SGD on the squared error; ``losses[s]`` is that of the weights after s steps."""

    def __init__(self, network: nn.Module, lr: float, loss_fn: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        self.network = network
        self.loss_fn = loss_fn or nn.MSELoss()
        self.lr, self.options = lr, options
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss_fn(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, **self.options)


@pytest.fixture
def make_regression() -> type[Regression]:
    return Regression


@pytest.fixture
def one_hot_digits() -> TensorDataset:
    """96 digits with the targets 0 and 1 of squared loss."""
    inputs, labels = digits().tensors
    return TensorDataset(inputs, nn.functional.one_hot(labels, 10).float())


ON_EACH_RANK = """
import sys
from functools import partial
from pathlib import Path

import torch

folder, fixtures, room, file, name = sys.argv[1:]
sys.path[:0] = [fixtures, room]
from conftest import Regression, quiet_trainer

torch.set_num_threads(1)
body = getattr(__import__(file), name)
found = body(partial(quiet_trainer, Path(folder), devices=2, strategy="ddp"), Regression)
torch.save(found, f"{folder}/rank{torch.distributed.get_rank()}.pt")
# No rank leaves while the other still talks to it: that can abort a process at its very end.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.fixture
def run_on_two_processes(tmp_path: Path) -> Callable[..., tuple[Any, Any]]:
    """Run a test file's function on two processes, as a user's script is, and return what it returned on either rank.

    The function is called as ``body(make_trainer, make_regression)``: the fixtures of these names, save that the trainer has
    two DDP processes and that each process has one thread. It returns plain types and tensors, and its asserts hold, too.
    """

    def run(body: Callable[..., Any]) -> tuple[Any, Any]:
        script, file = tmp_path / "on_each_rank.py", Path(body.__code__.co_filename)
        script.write_text(ON_EACH_RANK)
        fixtures = Path(__file__).parent
        command = [sys.executable, script, tmp_path, fixtures, file.parent, file.stem, body.__name__]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
        return first, second

    return run


class OnApple(torch.Tensor):
    """Says that it is on a device without float64, and behaves so."""

    @property
    def device(self):
        return torch.device("mps")

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


@pytest.fixture
def on_apple() -> type[OnApple]:
    return OnApple


@pytest.fixture
def with_rates() -> Callable[..., Any]:
    def scheduled(module: Any, factors: Sequence[float]) -> Any:
        """The module with its rate multiplied by ``factors``, one a step."""

        def configure() -> Any:
            optimizer = torch.optim.SGD(module.parameters(), lr=module.lr)
            rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: factors[min(t, len(factors) - 1)])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

        module.configure_optimizers = configure
        return module

    return scheduled


@pytest.fixture
def shrinking_sgd() -> Callable[[float], type[torch.optim.SGD]]:
    def make(share: float) -> type[torch.optim.SGD]:
        class Shrinks(torch.optim.SGD):
            """Looks like plain SGD, and multiplies what is trained by ``share`` after every step."""

            @torch.no_grad()
            def step(self, closure: Any = None) -> Any:
                loss = super().step(closure)
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter.requires_grad:
                            parameter.mul_(share)
                return loss

        return Shrinks

    return make
