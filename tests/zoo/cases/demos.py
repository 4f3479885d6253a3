"""The demos of Lightning, as they are."""

from typing import Any

import torch
from case import case
from lightning.pytorch.demos import lstm, transformer
from lightning.pytorch.demos.boring_classes import (
    BoringDataModule,
    BoringModel,
    DemoModel,
    ManualOptimBoringModel,
    RandomDataset,
    RandomDictDataset,
    RandomIterableDataset,
)
from samples import tokens
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

DEMO, WORDS = "demos of Lightning", 8


def whole(module: Any, batch: Any) -> Tensor:
    return module(batch)


def texts() -> Any:
    rows = tokens(4, WORDS, count=6)
    return DataLoader(TensorDataset(rows[:, :-1], rows[:, 1:]), batch_size=3)


few = {"limit_train_batches": 3, "limit_val_batches": 1}
case(DEMO, data=BoringDataModule, call=whole, options=few, name="boring", about="BoringModel with BoringDataModule")(
    BoringModel
)
case(
    DEMO,
    "manual optimization and several optimizers",
    data=lambda: DataLoader(RandomDataset(32, 12), 4),
    call=whole,
    options=few,
    name="boring_manual",
    about="ManualOptimBoringModel",
)(ManualOptimBoringModel)
case(
    DEMO,
    "iterable and combined loaders",
    data=lambda: DataLoader(RandomIterableDataset(32, 12), 4),
    call=whole,
    options=few,
    name="boring_iterable",
    about="BoringModel on RandomIterableDataset",
)(BoringModel)


@case(
    DEMO,
    "dict batches",
    data=lambda: DataLoader(RandomDictDataset(32, 12), 4),
    call=lambda m, b: m(b["a"]),
    options=few,
)
class BoringDict(BoringModel):
    """BoringModel on RandomDictDataset."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss(self(batch["a"]), self(batch["b"]).detach())}


@case(DEMO, data=lambda: DataLoader(RandomDataset(32, 12), 4), call=whole)
class Demo(DemoModel):
    """DemoModel, which has no training step of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch).square().mean()


@case(DEMO, "sequence and image outputs", data=texts, call=(lambda m, b: m(*b).view(len(b[0]), -1), lambda m, b: m(*b)))
class DemoTransformer(transformer.LightningTransformer):
    """LightningTransformer, narrower: caches its mask and positions, returns (B T) x V."""

    def __init__(self) -> None:
        super().__init__(vocab_size=WORDS)
        self.model = transformer.Transformer(WORDS, 8, 2, 8, 1)

    def prepare_data(self) -> None:
        """Download nothing."""


def without_hidden_state(module: Any, batch: Any) -> Tensor:
    state = tuple(torch.zeros(1, len(batch[0]), 6, dtype=module.model.encoder.weight.dtype) for _ in range(2))
    return module.model(batch[0], state)[0].view(len(batch[0]), -1)


@case(DEMO, "recurrent", "side effects of a forward", data=texts, call=without_hidden_state)
class DemoLstm(lstm.LightningLSTM):
    """LightningLSTM, narrower: its state is carried from step to step."""

    def __init__(self) -> None:
        super().__init__(vocab_size=WORDS)
        self.model = lstm.SimpleLSTM(WORDS, 6, 6, 1)

    def prepare_data(self) -> None:
        """Download nothing."""
