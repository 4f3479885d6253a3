"""`pretrain`: train a small language model for some steps, with progress, into a file that a killed run continues."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_conv.recipes.language_model import GPT
from lightning_conv.reporting.progress import Report, silent

SAVED_EVERY = 100
"""Steps after which an unfinished training is written to disk."""

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises; it then falls to zero like a cosine."""


def pretrained_path(folder: str | Path, settings: Mapping[str, Any]) -> Path:
    """Return the file of a pre-trained network: its name tells the settings and the version of Python, whose text it has read.

    Args:
        folder: where such files are kept.
        settings: everything that decides what the weights are.
    """
    known = json.dumps({**settings, "python": platform.python_version()}, sort_keys=True)
    return Path(folder) / f"gpt_{hashlib.sha256(known.encode()).hexdigest()[:12]}.pt"


def pretrain(
    network: GPT,
    samples: TensorDataset,
    path: Path,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int = 0,
    report: Report = silent,
) -> float:
    """Train a network with AdamW on the mean cross-entropy of the next token, and write its weights to a file.

    The learning rate rises linearly over the first tenth of the steps and falls to zero like a cosine. The samples of step k are a
    function of (seed, k). Every `SAVED_EVERY` steps the state is written beside `path`; a later call continues from there and ends in
    the same weights as one that was not interrupted.

    Args:
        network: the network, which is trained in place on the device of its weights.
        samples: (x, y) of shape (n, T).
        path: the file for the weights.
        steps: number of steps.
        batch_size: sequences per step.
        lr: largest learning rate.
        seed: seed of the order of the samples.
        report: is called with the share that is done.

    Returns:
        The mean loss of the last tenth of the steps, in nats per token.

    Raises:
        MisconfigurationException: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    shape = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _shape(step, steps))
    unfinished = path.with_suffix(".unfinished")
    losses: list[float] = []
    if unfinished.is_file():
        state = torch.load(unfinished, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        shape.load_state_dict(state["shape"])
        losses = state["losses"]
    network.train()
    for step in range(len(losses), steps):
        loss = _loss(network, samples, rows_of(len(samples), batch_size, step, seed))
        losses.append(float(loss.detach()))
        if not losses[-1] < float("inf"):
            raise MisconfigurationException(
                f"pretrain_lr: the loss was {losses[-1]} at step {step}; take a smaller one than {lr}"
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        shape.step()
        if (step + 1) % SAVED_EVERY == 0:
            parts = {"network": network, "optimizer": optimizer, "shape": shape}
            _save({name: each.state_dict() for name, each in parts.items()} | {"losses": losses}, unfinished)  # type: ignore[attr-defined]
        report((step + 1) / steps)
    last = losses[-max(1, steps // 10) :]
    _save({"state_dict": network.state_dict(), "loss": sum(last) / len(last)}, path)
    unfinished.unlink(missing_ok=True)
    return sum(last) / len(last)


def rows_of(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Return the numbers of the samples of a step: the next ones in the order of their epoch, which is drawn from (seed, epoch).

    Args:
        count: number of samples.
        batch_size: samples of a step; at most all of them.
        step: number of the step, from 0 on.
        seed: of the orders.
    """
    per_epoch = max(1, count // batch_size)
    epoch, place = divmod(step, per_epoch)
    # Two multiplications apart, so that (seed, epoch) and (seed + 1, epoch - 1) are different orders.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)[place * batch_size : (place + 1) * batch_size]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the weights of a `GPT` from a file: its `state_dict`, or a checkpoint of Lightning that has one of them.

    Args:
        path: the file. Prefixes such as `net.` are dropped.

    Raises:
        MisconfigurationException: there is no such file, or it has no weights of a `GPT`.
    """
    if not Path(path).is_file():
        raise MisconfigurationException(f"pretrained: there is no file {Path(path).resolve()}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader of a foreign format raises
        raise MisconfigurationException(
            f"pretrained: {path} is no file of torch.save ({type(error).__name__})"
        ) from error
    state = found.get("state_dict", found) if isinstance(found, Mapping) else {}
    inner = next((name for name in state if name.endswith("wte.weight")), None)
    if inner is None:
        raise MisconfigurationException(
            f"pretrained: {path} has no wte.weight; need the state_dict of lightning_conv.recipes.GPT, or a checkpoint that has one"
        )
    prefix = inner.removesuffix("wte.weight")
    return {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the sizes of the `GPT` that has these weights: `vocabulary`, `positions`, `width` and `depth`.

    Args:
        weights: see ``read_weights``.
    """
    vocabulary, width = weights["wte.weight"].shape
    depth = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("h.")), default=0)
    return {"vocabulary": vocabulary, "positions": len(weights["wpe.weight"]), "width": width, "depth": depth}


def _shape(step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of the largest one."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * (step - rising) / max(1, steps - rising)))))


def _loss(network: GPT, samples: TensorDataset, rows: Tensor) -> Tensor:
    device = network.wte.weight.device
    inputs, targets = (each[rows].to(device) for each in samples.tensors)
    return F.cross_entropy(network(inputs).flatten(0, 1), targets.flatten())


def _save(state: Mapping[str, Any], path: Path) -> None:
    """Write a file as a whole: a reader never finds the half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f"{path.name}.{os.getpid()}")
    torch.save(dict(state), made)
    made.replace(path)
