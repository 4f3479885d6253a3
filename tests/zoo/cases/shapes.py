"""Outputs of every shape: B x T x V, B x C x H x W, squeezed ones; masks and lengths."""

from typing import Any

import torch
import torch.nn.functional as F
from case import Task, case
from samples import floats, labels, padding, rows, table, tokens
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from cases.batches import VALUE, X, Y, mlp

FEW = 6  # samples, where each has many outputs
MASK = padding(5)


class GPT(nn.Module):
    """A causal transformer."""

    def __init__(
        self, vocabulary: int = 8, width: int = 8, layers: int = 1, positions: int = 6, heads: int = 2
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(positions, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, batch_first=True, dropout=0.0, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=self.positions.dtype)
        return self.head(
            self.layers(self.tokens(tokens) + self.positions[: tokens.shape[1]], mask=mask, is_causal=True)
        )


@case("sequence and image outputs", data=table(tokens(6, 8, FEW), batch_size=3), call=lambda m, b: m(b[0][:, :-1]))
class SmallGpt(Task):
    """Next tokens by a GPT: the step cuts the batch in inputs and targets."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (rows,) = batch
        return F.cross_entropy(self(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


class UNet(nn.Module):
    """One level down and up again, with the skip connection."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.inner, self.down = nn.Conv2d(channels, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up, self.out = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Conv2d(6, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.inner(x).relu()
        return self.out(torch.cat([skip, self.up(self.down(skip).relu())], 1))


@case(
    "sequence and image outputs",
    data=table(floats(1, 4, 4, count=FEW), labels(2, 4, 4, count=FEW), batch_size=3),
    call=lambda m, b: m(b[0]),
)
class Segmentation(Task):
    """A class per pixel by a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=1)


@case(
    "sequence and image outputs",
    "dict batches",
    data=rows(3, image=floats(1, 4, 4, count=FEW), mask=labels(2, 1, 4, 4, count=FEW).float()),
    call=lambda m, b: m.net(b["image"]),
)
class FullyConvolutional(Task):
    """A mask per image by convolutions alone, with a dice loss of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 1, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        share = self.net(batch["image"]).sigmoid()
        return 1 - 2 * (share * batch["mask"]).sum() / (share.sum() + batch["mask"].sum() + 1)


@case("squeezed outputs", data=table(X, VALUE[:, 0]), call=lambda m, b: m.net(b[0]))
class Squeezed(Task):
    """Regression that ends in .squeeze()."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])


@case("squeezed outputs", "losses", data=table(X, (Y == 0).float()), call=lambda m, b: m(b[0]))
class SqueezedLogit(Task):
    """One logit that ends in .squeeze(-1)."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss_fn = mlp(6, 1), nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss_fn(self(batch[0]), batch[1])


@case("squeezed outputs", data=table(floats(1, 5, 5), VALUE[:, 0]), call=lambda m, b: m.net(b[0]))
class SqueezedInStep(Task):
    """The step squeezes what global pooling leaves: B x 1 x 1 x 1."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 1, 1), nn.AdaptiveAvgPool2d(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]).squeeze(), batch[1])


class Packed(nn.Module):
    """The last state of a GRU over sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][0])


@case("masks and lengths", "recurrent", data=table(floats(5, 3), MASK.sum(1), Y), call=lambda m, b: m(b[0], b[1]))
class PackedSequences(Task):
    """(x, lengths, y), packed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Packed()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.net(x, lengths)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, lengths, y = batch
        return F.cross_entropy(self(x, lengths), y)


@case(
    "masks and lengths",
    "recurrent",
    "dict batches",
    data=rows(x=floats(5, 3), mask=MASK.float(), y=floats(5, seed=11)),
    call=lambda m, b: m.head(m.rnn(b["x"])[0])[..., 0],
)
class MaskInTheLoss(Task):
    """A number per position, whose loss leaves the padding out; the network does not see the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.head(self.rnn(batch["x"])[0])[..., 0]
        return ((out - batch["y"]).square() * batch["mask"]).sum() / batch["mask"].sum()
