"""Samples of different lengths in one batch: lists of tensors, packed or padded."""

from typing import Any

import torch
import torch.nn.functional as F
from case import Task, case
from samples import floats, padding, rows
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from cases.batches import Y, mlp

MASK = padding(5)


SEQUENCES = [each[:length] for each, length in zip(floats(5, 3), MASK.sum(1), strict=True)]


def lists(samples: list[dict[str, Tensor]]) -> tuple[list[Tensor], Tensor]:
    return [each["x"] for each in samples], torch.stack([each["y"] for each in samples])


@case(
    "ragged batches",
    data=rows(x=SEQUENCES, y=Y, collate=lists),
    call=lambda m, b: torch.stack([m.net(each).mean(0) for each in b[0]]),
)
class ListOfSequences(Task):
    """A list of tensors of several lengths, one at a time through the network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 3)

    def forward(self, sequences: list[Tensor]) -> Tensor:
        return torch.stack([self.net(each).mean(0) for each in sequences])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


@case(
    "ragged batches",
    "recurrent",
    data=rows(x=SEQUENCES, y=Y, collate=lists),
    call=lambda m, b: m.head(m.rnn(pack_sequence(b[0], enforce_sorted=False))[1][0]),
)
class PackedInStep(Task):
    """A list of sequences that the step packs."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 5, batch_first=True), nn.Linear(5, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.rnn(pack_sequence(batch[0], enforce_sorted=False))[1][0]), batch[1])


def padded(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(each["x"]) for each in samples])
    x = pad_sequence([each["x"] for each in samples], batch_first=True)
    return {"x": x, "lengths": lengths, "y": torch.stack([each["y"] for each in samples])}


def mean_state(module: Any, batch: Any) -> Tensor:
    packed = pack_padded_sequence(batch["x"], batch["lengths"].cpu(), batch_first=True, enforce_sorted=False)
    states, _ = pad_packed_sequence(module.rnn(packed)[0], batch_first=True)
    return module.head(states.sum(1) / batch["lengths"][:, None])


@case("ragged batches", "masks and lengths", "recurrent", data=rows(x=SEQUENCES, y=Y, collate=padded), call=mean_state)
class PaddedByCollate(Task):
    """The collate function pads to the longest of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True, bidirectional=True), nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(mean_state(self, batch), batch["y"])


class Ragged(Task):
    """A classifier of sequences, each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 3)


@case(
    "ragged batches",
    data=rows(x=SEQUENCES, y=Y, collate=list),
    call=lambda m, b: torch.stack([m.net(each["x"]).mean(0) for each in b]),
)
class ListOfDicts(Ragged):
    """A batch that is a list of dicts, as detectors take them; the mean over each sequence is an output."""

    def forward(self, samples: list[dict[str, Tensor]]) -> Tensor:
        return torch.stack([self.net(each["x"]).mean(0) for each in samples])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch), torch.stack([each["y"] for each in batch]))


@case("ragged batches", data=rows(x=SEQUENCES, y=Y, collate=list), call=lambda m, b: alone(m, [d["x"] for d in b]))
class LossOfEachSample(Ragged):
    """A loop over the samples, with a loss for each."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = [F.cross_entropy(self.net(each["x"]).mean(0), each["y"]) for each in batch]
        return torch.stack(losses).mean()


def alone(module: Any, sequences: list[Tensor]) -> Tensor:
    """Return the outputs at all places of each sequence, with zeros where it has ended."""
    return pad_sequence([module.net(each) for each in sequences], batch_first=True)


class Endless(IterableDataset[Any]):
    """The samples again and again."""

    def __iter__(self) -> Any:
        while True:
            yield from ({"x": x, "y": y} for x, y in zip(SEQUENCES, Y, strict=True))


@case(
    "ragged batches",
    "iterable and combined loaders",
    data=lambda: DataLoader(Endless(), 4, collate_fn=lists),
    call=lambda m, b: alone(m, b[0]),
    options={"limit_train_batches": 3},
)
class StreamOfLists(Ragged):
    """An iterable of lists of sequences, read through from the first batch on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        each = [F.mse_loss(self.net(x).mean(0), F.one_hot(y, 3).to(x)) for x, y in zip(*batch, strict=True)]
        return sum(each) / len(each)


@case("ragged batches", data=rows(x=SEQUENCES, y=Y, collate=lists), call=lambda m, b: alone(m, b[0]))
class OneRowCalls(Ragged):
    """A call of the module for each sample, whose forward takes a batch of one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[0])[None]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(torch.cat([self(x[None]).mean(1) for x in batch[0]]), batch[1])


WORDS = ["a b c", "b c", "c d a b", "d"] * 3


def bag(module: Any, batch: Any) -> Tensor:
    numbers = [torch.tensor([ord(word) - ord("a") for word in text.split()]) for text in batch[0]]
    starts = torch.tensor([0, *(len(each) for each in numbers)])[:-1].cumsum(0)
    return module.head(module.embedding(torch.cat(numbers), starts))


@case(
    "ragged batches",
    "strings and numbers",
    data=rows(x=WORDS, y=Y, build=lambda each: (each["x"], each["y"])),
    call=bag,
)
class TextsInStep(Task):
    """Texts, which the step splits into words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.EmbeddingBag(4, 6), nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(bag(self, batch), batch[1])


def last_states(module: Any, batch: Any) -> Tensor:
    states, _ = module.rnn(batch["x"])
    return module.head(torch.stack([states[row, length - 1] for row, length in enumerate(batch["lengths"])]))


def with_numbers(samples: list[dict[str, Tensor]]) -> dict[str, Any]:
    return padded(samples) | {"lengths": [len(each["x"]) for each in samples]}


@case("masks and lengths", "strings and numbers", data=rows(x=SEQUENCES, y=Y, collate=with_numbers), call=last_states)
class LengthsAsNumbers(Task):
    """Lengths that are Python's numbers, in a list beside the padded sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 5, batch_first=True), nn.Linear(5, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(last_states(self, batch), batch["y"])


def with_names(samples: list[dict[str, Tensor]]) -> dict[str, Any]:
    return padded(samples) | {"name": [f"sequence {number}" for number in range(len(samples))]}


@case("strings and numbers", "dict batches", data=rows(x=SEQUENCES, y=Y, collate=with_names), call=mean_state)
class NamesBeside(PaddedByCollate):
    """Names of the samples beside their tensors, which the step does not use."""
