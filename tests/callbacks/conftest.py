"""A small network with BatchNorm, dropout and momentum on real digits, and ways to run it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
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

from lightning_conv.callbacks.run import budget, observe_run, schedule
from lightning_conv.callbacks.run.guarded import set_strict

# An error that nobody expects fails the test; the fixture `lenient` is for tests that inject one. Set here, not in a
# fixture, so that it also applies to fixtures of a module or session and to the processes of `run_on_two_processes`.
set_strict(True)

# What a probe holds by default must not depend on how fast the machine is; the tests of the budget set it themselves.
budget.LEAST_SECONDS = schedule.FIRST_SECONDS = schedule.SHORT_RUN_SECONDS = observe_run.SLOW = 1e4

SAMPLES = 96


read_digits = cache(load_digits)


def digits(count: int = SAMPLES) -> TensorDataset:
    source = read_digits()
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
import importlib.util
import itertools
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch

orders, fixtures = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, fixtures)
from conftest import Regression, quiet_trainer, set_strict

torch.set_num_threads(1)
parent = os.getppid()
for number in itertools.count():
    while not (order := orders / f"{number}.json").exists():
        if os.getppid() != parent:
            os._exit(0)
        time.sleep(0.02)
    file, name, folder = json.loads(order.read_text())
    spec = importlib.util.spec_from_file_location(f"body_{number}", file)
    sys.path.insert(0, str(Path(file).parent))
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    set_strict(True)  # whatever the function before this one switched
    found = getattr(module, name)(partial(quiet_trainer, Path(folder), devices=2, strategy="ddp"), Regression)
    torch.save(found, f"{folder}/rank{torch.distributed.get_rank()}.part")
    torch.distributed.barrier()  # no rank goes on while the other still talks to it
    os.replace(f"{folder}/rank{torch.distributed.get_rank()}.part", f"{folder}/rank{torch.distributed.get_rank()}.pt")
"""


class TwoProcesses:
    """Two DDP processes that run one function after the other; they start with the first, and anew after one that failed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process, self.orders, self.count = folder, None, folder, 0

    def start(self) -> None:
        self.orders, self.count = Path(tempfile.mkdtemp(dir=self.folder)), 0
        (script := self.orders / "on_each_rank.py").write_text(ON_EACH_RANK)
        with (self.orders / "stderr").open("w") as errors:
            command = [sys.executable, script, self.orders, Path(__file__).parent]
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)

    def run(self, body: Callable[..., Any], folder: Path) -> tuple[Any, Any]:
        if self.process is None or self.process.poll() is not None:
            self.start()
        part = self.orders / "part"
        part.write_text(json.dumps([body.__code__.co_filename, body.__name__, str(folder)]))
        part.rename(self.orders / f"{self.count}.json")
        self.count += 1
        results, latest = [folder / f"rank{rank}.pt" for rank in range(2)], time.monotonic() + 300
        while not all(result.exists() for result in results):
            if self.process.poll() is not None or time.monotonic() > latest:
                self.stop()
                raise AssertionError((self.orders / "stderr").read_text()[-4000:])
            time.sleep(0.02)
        first, second = (torch.load(result, weights_only=True) for result in results)
        return first, second

    def stop(self) -> None:
        """End the first process; the second one ends as soon as it misses its parent."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="session")
def two_processes_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoProcesses]:
    pair = TwoProcesses(tmp_path_factory.mktemp("two_processes"))
    yield pair
    pair.stop()


@pytest.fixture
def run_on_two_processes(
    tmp_path: Path, two_processes_of_the_session: TwoProcesses
) -> Callable[[Callable[..., Any]], tuple[Any, Any]]:
    """Run a test file's function on two processes, as a user's script is, and return what it returned on either rank.

    The function is called as ``body(make_trainer, make_regression)``: the fixtures of these names, save that the trainer has
    two DDP processes and that each process has one thread. It returns plain types and tensors, and its asserts hold, too.
    The processes run the functions of all tests, one after the other, since starting them takes longer than most functions.
    """
    return lambda body: two_processes_of_the_session.run(body, tmp_path)


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
